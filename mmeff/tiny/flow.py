"""Flow matching as the tiny denoisers learn it: noise levels, the loop over steps, and sampling by Euler steps.

What is particular to a model (its data, its stages, its text) is in `train_video` and `train_image`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmeff import training

Progress = Callable[[int, int, dict[str, float]], None]
Net = TypeVar("Net", bound=nn.Module)
Levels = TypeVar("Levels", Tensor, np.ndarray)
CHECKPOINT_EVERY = 250  # steps
LOG_EVERY = 50
PIPELINE_TOKENS = 512  # of text, to which the stock pipelines pad by default


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """What decides the weights of any of them."""

    seed: int = 1
    lr: float = 3e-3
    warmup: int = 60
    constant: float = 0.3  # fraction of all steps before the linear decay
    ema: float = 0.999
    text_dropout: float = 0.1  # share of samples trained without their text, for classifier-free guidance
    sigma_std: float = 1.2  # of the logit-normal noise level, before the shift


def shifted(level: Levels, shift: float) -> Levels:
    """Noise levels in [0, 1] as the scheduler shifts them."""
    return shift * level / (1 + (shift - 1) * level)


def noised(
    latents: Tensor, recipe: FlowRecipe, step: int, draw: np.random.Generator, *, shift: float
) -> dict[str, Tensor]:
    """Latents (B, ...) at a noise level of each sample's own: `latents`, the velocity to learn as `target`, and `sigma` (B,)."""
    noise = torch.randn(latents.shape, generator=training.torch_rng(recipe.seed, step))
    level = 1 / (1 + np.exp(-recipe.sigma_std * draw.standard_normal(len(latents))))
    sigma = shifted(torch.from_numpy(level).float(), shift)
    each = sigma.view(-1, *[1] * (latents.ndim - 1))
    return {"latents": each * noise + (1 - each) * latents, "target": noise - latents, "sigma": sigma}


def padding(draw: np.random.Generator, *, fewest: int, text_tokens: int) -> float:
    """How many tokens of padding follow the text: pipelines pad to 512 by default, and other lengths are met by training on all."""
    return float(np.exp(draw.uniform(np.log(fewest), np.log(PIPELINE_TOKENS - text_tokens))))


def train(
    student: Net,
    run: training.Run,
    recipe: FlowRecipe,
    *,
    steps: int,
    matrices: Callable[[str], bool],
    predict: Callable[[int], tuple[Tensor, Tensor]],
    due: Callable[[int], bool],
    score: Callable[[Net, int], dict[str, float]],
    progress: Progress | None = None,
) -> Net:
    """Train or resume; returns the student with averaged weights.

    Args:
        student: made without arguments, so that another one can hold the average. run: the folder.
        matrices: whether Muon trains the parameter of a name. predict: the velocity at a step, and what it should be.
        due: whether the averaged weights are scored after so many steps; score: by what.
    """
    chosen, others = training.split_matrices(student.named_parameters(), matrices)
    optimizer = training.MuonWithAdamW(chosen, others)
    ema = training.Ema(student, recipe.ema)
    start = 0
    if (stored := run.load()) is not None:
        tensors, state = stored
        student.load_state_dict(training.without_prefix("student", tensors))
        ema.shadow = training.without_prefix("ema", tensors)
        optimizer.load_tensors(tensors)
        start = state["step"]
    losses: list[float] = []
    for done in range(start + 1, steps + 1):
        step = done - 1
        loss = F.mse_loss(*predict(step))
        loss.backward()
        lr = training.warmup_constant_linear(
            step, steps=steps, lr=recipe.lr, warmup=recipe.warmup, constant=recipe.constant
        )
        norm = optimizer.step(lr)
        ema.update(student, step)
        losses.append(loss.item())
        if done % LOG_EVERY == 0:
            row = {"loss": float(np.mean(losses[-LOG_EVERY:])), "lr": lr, "norm": norm}
            run.log(step=done, **row)
            if progress:
                progress(done, steps, row)
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            tensors = training.with_prefix("student", student.state_dict()) | training.with_prefix("ema", ema.shadow)
            run.save(tensors | optimizer.tensors(), step=done)
        if due(done):
            quick = score(_averaged(student, ema), done)
            run.log(step=done, quick=quick)
            if progress:
                progress(done, steps, quick)
    ema.copy_to(student)
    return student.eval()


def _averaged(student: Net, ema: training.Ema) -> Net:
    net = type(student)()
    net.load_state_dict(student.state_dict())
    ema.copy_to(net)
    return net


@torch.no_grad()
def sample(x: Tensor, times: np.ndarray, velocity: Callable[[Tensor, Tensor], Tensor], *, shift: float) -> Tensor:
    """Euler steps from noise x (B, ...) along `times`, descending from 1, to no noise at all; velocity(x, sigma (B,))."""
    for now, then in pairwise(np.append(shifted(times, shift), 0.0)):
        x = x + (then - now) * velocity(x, torch.full((len(x),), float(now)))
    return x
