"""Train the tiny image model: flow matching on generated pictures, of half the size first, then of full size.

A picture of half the size has a quarter of the tokens, and its tokens are given the positions that they cover in the full
one; so what is learned about colours, shapes and places there is worth as much in full, at a fraction of the cost. The whole
recipe is `ImageRecipe`; its budget is counted in steps, never in seconds. `train` resumes from its folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmeff import training
from mmeff.tiny import image_model, stills

CHECKPOINT_EVERY = 250  # steps
QUICK_EVERY = 150  # steps between two quick scores
GATE = {"found": 0.85, "colour": 0.85, "shape": 0.85, "place": 0.85, "all": 0.85}


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """Everything that decides the weights."""

    seed: int = 1
    half_steps: int = 600  # steps on pictures of half the size
    full_steps: int = 450  # steps on pictures of full size
    half_batch: int = 32
    full_batch: int = 16
    lr: float = 3e-3
    warmup: int = 60
    constant: float = 0.3  # fraction of all steps before the linear decay
    ema: float = 0.995  # short, so that the average forgets the pictures of half the size
    text_dropout: float = 0.1  # share of pictures trained without their text, for classifier-free guidance
    sigma_std: float = 1.2  # of the logit-normal noise level, before the shift


class Student(nn.Module):
    """The transformer while training, with one token of padding that stands for all of it.

    The stock pipeline pads text to a fixed length and lets every token of padding take part. They are equal, at one
    position, and stay equal in every layer; so one of them, with log(count) added to the scores of its key, gives the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = image_model.transformer()
        self.ids = {pooled: image_model.positions(pooled=pooled) for pooled in (False, True)}
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Linear) and "time_text_embed" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        blocks = [*self.net.transformer_blocks, *self.net.single_transformer_blocks]
        for block in blocks:
            for norm, gates in (("norm1", (2, 5)), ("norm1_context", (2, 5)), ("norm", (2,))):
                if hasattr(block, norm):  # modulation starts as the identity with every gate open
                    linear = getattr(block, norm).linear
                    linear.weight.zero_()
                    for gate in gates:
                        linear.bias.view(-1, self.net.inner_dim)[gate] = 1.0
        self.net.norm_out.linear.weight.zero_()
        self.net.proj_out.weight.zero_()

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor, padding: float
    ) -> torch.Tensor:
        """Predict the velocity (B, N, 12). `padding`: tokens that the last row of the text stands for."""
        half = latents.shape[1] < math.prod(image_model.GRID)
        bias = latents.new_zeros(1, 1, 1, text.shape[1] + latents.shape[1])
        bias[..., text.shape[1] - 1] = math.log(padding)
        velocity: torch.Tensor = self.net(
            latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=sigma, img_ids=self.ids[half],
            txt_ids=latents.new_zeros(text.shape[1], 3), joint_attention_kwargs={"attention_mask": bias}, return_dict=False,
        )[0]  # fmt: skip
        return velocity


def _batch(recipe: ImageRecipe, step: int) -> dict[str, Any]:
    """Noised latents, velocity target and text of one step."""
    half = step < recipe.half_steps
    size = recipe.half_batch if half else recipe.full_batch
    draw = training.rng(recipe.seed, step)
    images, labels = stills.sample(stills.TRAIN_SEED + recipe.seed, step, size, pooled=half)
    latents = image_model.pack(torch.from_numpy(images))
    texts, bags = image_model.prompt_tables()
    index = stills.prompt_index(labels)
    index[draw.uniform(size=size) < recipe.text_dropout] = len(texts) - 1
    chosen = torch.from_numpy(index)
    noise = torch.randn(latents.shape, generator=training.torch_rng(recipe.seed, step))
    s = torch.from_numpy(1 / (1 + np.exp(-recipe.sigma_std * draw.standard_normal(size)))).float()
    sigma = image_model.SHIFT * s / (1 + (image_model.SHIFT - 1) * s)
    mixed = sigma[:, None, None] * noise + (1 - sigma[:, None, None]) * latents
    # The pipeline pads text to 512 by default; other lengths are met by training on all of them.
    padding = float(np.exp(draw.uniform(0, np.log(512 - image_model.TEXT_TOKENS))))
    return {
        "latents": mixed, "target": noise - latents, "sigma": sigma, "text": texts[chosen], "pooled": bags[chosen],
        "padding": padding,
    }  # fmt: skip


def train(
    recipe: ImageRecipe,
    folder: str | Path,
    *,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Student:
    """Run or resume a training in `folder`; returns the student with averaged weights.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """
    run = training.Run(folder, {"kind": "tiny-image", **asdict(recipe)})
    torch.manual_seed(recipe.seed)
    student = Student().train()
    matrices, others = training.split_matrices(
        student.named_parameters(), lambda name: "transformer_blocks." in name and "norm" not in name
    )
    optimizer = training.MuonWithAdamW(matrices, others)
    ema = training.Ema(student, recipe.ema)
    start, steps = 0, recipe.half_steps + recipe.full_steps
    if (stored := run.load()) is not None:
        tensors, state = stored
        student.load_state_dict(training.without_prefix("student", tensors))
        ema.shadow = training.without_prefix("ema", tensors)
        optimizer.load_tensors(tensors)
        start = state["step"]

    def checkpoint(step: int) -> None:
        tensors = training.with_prefix("student", student.state_dict()) | training.with_prefix("ema", ema.shadow)
        run.save(tensors | optimizer.tensors(), step=step)

    losses: list[float] = []
    for step in range(start, steps):
        batch = _batch(recipe, step)
        velocity = student(batch["latents"], batch["sigma"], batch["text"], batch["pooled"], batch["padding"])
        loss = F.mse_loss(velocity, batch["target"])
        loss.backward()
        lr = training.warmup_constant_linear(
            step, steps=steps, lr=recipe.lr, warmup=recipe.warmup, constant=recipe.constant
        )
        norm = optimizer.step(lr)
        ema.update(student, step)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            row = {"loss": float(np.mean(losses[-50:])), "lr": lr, "norm": norm}
            run.log(step=step + 1, **row)
            if progress:
                progress(step + 1, steps, row)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            checkpoint(step + 1)
        if (step + 1) % QUICK_EVERY == 0:
            averaged = Student()
            ema.copy_to(averaged)
            score = evaluate(averaged, count=32, seed=stills.GATE_SEED, steps=10, pooled=step + 1 <= recipe.half_steps)
            run.log(step=step + 1, quick=score)
            if progress:
                progress(step + 1, steps, score)
    ema.copy_to(student)
    return student.eval()


@torch.no_grad()
def generate(
    student: Student,
    labels: stills.StillLabels,
    *,
    seed: int,
    steps: int = 20,
    pooled: bool = False,
    padding: float = 8.0,
) -> np.ndarray:
    """Sample pictures (B, 48, 48, 3), or of half the size, from the student with Euler steps; one seed for the batch."""
    texts, bags = image_model.prompt_tables()
    chosen = torch.from_numpy(stills.prompt_index(labels))
    H, W = (n // 2 if pooled else n for n in image_model.GRID)
    x = torch.randn(len(chosen), H * W, 4 * image_model.CHANNELS, generator=torch.Generator().manual_seed(seed))
    times = np.linspace(1, 1 / steps, steps)
    times = np.append(image_model.SHIFT * times / (1 + (image_model.SHIFT - 1) * times), 0.0)
    for now, then in pairwise(times):
        sigma = torch.full((len(chosen),), float(now))
        x = x + (then - now) * student(x, sigma, texts[chosen], bags[chosen], padding)
    return image_model.unpack(x, (H, W)).numpy()


def evaluate(student: Student, *, count: int, seed: int, steps: int = 20, pooled: bool = False) -> dict[str, float]:
    """The detector's score on `count` fresh prompts drawn from the split `seed`."""
    _, labels = stills.sample(seed, 0, count, pooled=True)
    return stills.detect(generate(student.eval(), labels, seed=seed, steps=steps, pooled=pooled)).score(labels)
