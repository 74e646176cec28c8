"""Train the tiny video model: flow matching on generated clips, single frames first, then whole clips.

The whole recipe is `VideoRecipe`. The budget is counted in steps, never in seconds, so the schedule does not depend on the
machine. `train` resumes from its folder; `evaluate` is the acceptance gate; `export` writes the pipeline folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmeff import training
from mmeff.accelerate import accelerate
from mmeff.diffusion_attn._base import SparseAttention
from mmeff.tiny import clips, codec, video_model

CHECKPOINT_EVERY = 250  # steps
GATE = {"found": 0.90, "colour": 0.90, "shape": 0.90, "direction": 0.90, "all": 0.85}


@dataclass(frozen=True, kw_only=True)
class VideoRecipe:
    """Everything that decides the weights."""

    seed: int = 1
    frame_steps: int = 700  # steps on single latent frames
    clip_steps: int = 3500  # steps on whole clips
    frame_batch: int = 64
    clip_batch: int = 16
    lr: float = 3e-3
    warmup: int = 60
    constant: float = 0.3  # fraction of all steps before the linear decay
    ema: float = 0.999
    text_dropout: float = 0.1  # share of clips trained without their text, for classifier-free guidance
    sigma_std: float = 1.2  # of the logit-normal noise level, before the shift


class PaddingAsOneKey:
    """Cross-attention for training: the last text row stands for `count` zero rows of padding.

    The stock pipeline pads text to a fixed length and lets every padding row be attended. Equal keys with equal values are
    one key with log(count) added to its score, so training need not compute them one by one.
    """

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None  # (T,) added to the scores

    def __call__(
        self, attn: Any, hidden: torch.Tensor, text: torch.Tensor, mask: Any = None, rotary: Any = None
    ) -> torch.Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if self.bias is None else self.bias[None, None, None]
        )
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class Student(nn.Module):
    """The transformer, the map from coordinates to the position table, and the padding shortcut, while training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = video_model.transformer()
        self.place = nn.Linear(
            video_model.coordinates().shape[-1], self.net.config.num_attention_heads * 32, bias=False
        )
        self.register_buffer("features", video_model.coordinates(), persistent=False)
        self.padding = PaddingAsOneKey()
        for block in self.net.blocks:
            block.attn2.set_processor(self.padding)
        self._table: torch.Tensor | None = None
        self.net.patch_embedding.register_forward_hook(lambda module, args, out: out + self._table)
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Linear) and "time_embedder" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in self.net.blocks:
                block.scale_shift_table[:, 2] = 1.0
                block.scale_shift_table[:, 5] = 1.0
            self.net.condition_embedder.text_embedder.linear_2.weight.mul_(2.0)
            self.net.proj_out.weight.zero_()
        nn.init.xavier_uniform_(self.place.weight)

    def table(self) -> torch.Tensor:
        """The position table (C, F, H, W)."""
        return self.place(self.features).permute(3, 0, 1, 2)

    def forward(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        padding: float,
        frames: torch.Tensor | None,
    ) -> torch.Tensor:
        """Predict the velocity. `frames` (B,) picks the place in time of single-frame latents."""
        table = self.table()
        self._table = table[None] if frames is None else table[:, frames].transpose(0, 1)[:, :, None]
        bias = text.new_zeros(text.shape[1])
        bias[-1] = math.log(padding)
        self.padding.bias = bias
        return self.net(latents, sigma * 1000.0, text, return_dict=False)[0]


def _batch(recipe: VideoRecipe, step: int, texts: torch.Tensor) -> dict[str, Any]:
    """Noised latents, velocity target and text of one step."""
    single = step < recipe.frame_steps
    size = recipe.frame_batch if single else recipe.clip_batch
    draw = training.rng(recipe.seed, step)
    video, labels = clips.sample(clips.TRAIN_SEED + recipe.seed, step, size, pooled=True)
    frames = None
    if single:
        frames = torch.from_numpy(draw.integers(video_model.GRID[0], size=size))
        rows = np.arange(size)
        second = (2 * frames).numpy()
        first = np.maximum(second - 1, 0)
        pair = np.stack([video[rows, first], video[rows, second]], axis=1)
        latents = codec.pack(torch.from_numpy(np.concatenate([pair[:, :1], pair], axis=1)), pooled=True)[:, :, 1:]
    else:
        latents = codec.pack(torch.from_numpy(video), pooled=True)
    index = clips.prompt_index(labels)
    index[draw.uniform(size=size) < recipe.text_dropout] = len(texts) - 1
    noise = torch.randn(latents.shape, generator=training.torch_rng(recipe.seed, step))
    s = torch.from_numpy(1 / (1 + np.exp(-recipe.sigma_std * draw.standard_normal(size)))).float()
    sigma = video_model.SHIFT * s / (1 + (video_model.SHIFT - 1) * s)
    mixed = sigma[:, None, None, None, None] * noise + (1 - sigma[:, None, None, None, None]) * latents
    # The pipeline pads text to 512 by default; other lengths are met by training on all of them.
    padding = float(np.exp(draw.uniform(np.log(2), np.log(512 - video_model.TEXT_TOKENS))))
    return {
        "latents": mixed, "target": noise - latents, "sigma": sigma, "text": texts[torch.from_numpy(index)],
        "padding": padding, "frames": frames,
    }  # fmt: skip


def prompt_table() -> torch.Tensor:
    """Text features of every prompt, and of the empty prompt last."""
    return video_model.embed_prompts([*clips.all_prompts(), ""], video_model.text_encoder(), video_model.tokenizer())


def train(
    recipe: VideoRecipe,
    folder: str | Path,
    *,
    method: SparseAttention | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Student:
    """Run or resume a training in `folder`; returns the student with averaged weights, without the method.

    Args:
        method: installed from the first step on whole clips. Single frames stay dense: they are too short to be sparse in.
    Raises:
        ValueError: the folder holds a run of another recipe, or the method counts denoising steps or cannot serve the grid.
    """
    more: dict[str, Any] = {}
    if method is not None:
        if method.counts_steps:
            raise ValueError(
                f"training has no denoising steps, so the schedule of {type(method).__name__} must not count them, got "
                f"dense_steps={method.dense_steps}, last_dense_steps={method.last_dense_steps}; pass 0 for both"
            )
        method.check_grid(video_model.GRID)
        more["method"] = method.to_dict()
    run = training.Run(folder, {"kind": "tiny-video", **asdict(recipe), **more})
    torch.manual_seed(recipe.seed)
    student = Student().train()
    matrices, others = training.split_matrices(
        student.named_parameters(), lambda name: ".blocks." in name and "scale_shift" not in name
    )
    optimizer = training.MuonWithAdamW(matrices, others)
    ema = training.Ema(student, recipe.ema)
    start, steps = 0, recipe.frame_steps + recipe.clip_steps
    if (stored := run.load()) is not None:
        tensors, state = stored
        student.load_state_dict(training.without_prefix("student", tensors))
        ema.shadow = training.without_prefix("ema", tensors)
        optimizer.load_tensors(tensors)
        start = state["step"]

    def checkpoint(step: int) -> None:
        tensors = training.with_prefix("student", student.state_dict()) | training.with_prefix("ema", ema.shadow)
        run.save(tensors | optimizer.tensors(), step=step)

    texts = prompt_table()
    losses: list[float] = []
    with under(student, method) as handle:
        for step in range(start, steps):
            if handle is not None:
                handle.enabled = step >= recipe.frame_steps
            batch = _batch(recipe, step, texts)
            velocity = student(batch["latents"], batch["sigma"], batch["text"], batch["padding"], batch["frames"])
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
            if step + 1 > recipe.frame_steps and (step + 1 - recipe.frame_steps) % 500 == 0:
                averaged = Student()
                averaged.load_state_dict(student.state_dict())
                ema.copy_to(averaged)
                with under(averaged, method):
                    score = evaluate(averaged, count=32, seed=clips.GATE_SEED, steps=14)
                run.log(step=step + 1, quick=score)
                if progress:
                    progress(step + 1, steps, score)
    ema.copy_to(student)
    return student.eval()


def under(student: Student, method: SparseAttention | None) -> AbstractContextManager[Any]:
    """A block inside which the student attends as the method says; it yields the handle, or None where that is dense."""
    return nullcontext() if method is None else accelerate(student.net, method)


@torch.no_grad()
def generate(
    student: Student,
    labels: clips.ClipLabels,
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 2.0,
    padding: float = 506.0,
) -> np.ndarray:
    """Sample clips (B, 17, 24, 24, 3) from the student with Euler steps, one noise seed for the whole batch."""
    texts = prompt_table()
    text = texts[torch.from_numpy(clips.prompt_index(labels))]
    empty = texts[-1:].expand_as(text)
    x = torch.randn(len(text), codec.LATENT_CHANNELS, 9, 24, 24, generator=torch.Generator().manual_seed(seed))
    times = np.linspace(1, 1 / 1000, steps + 1)[:-1]
    times = np.append(video_model.SHIFT * times / (1 + (video_model.SHIFT - 1) * times), 0.0)
    for now, then in pairwise(times):
        sigma = torch.full((len(text),), float(now))
        with_text, without = (student(x, sigma, t, padding, None) for t in (text, empty))
        x = x + (then - now) * (without + guidance * (with_text - without))
    x = (x * codec.LATENT_STD + codec.LATENT_MEAN).clamp(-1, 1)
    x = x.unflatten(1, (2, 3)).permute(0, 3, 1, 4, 5, 2).flatten(1, 2)[:, 1:]
    return ((x + 1) / 2).numpy()


def evaluate(student: Student, *, count: int, seed: int, steps: int = 20) -> dict[str, float]:
    """The detector's score on `count` fresh prompts drawn from the split `seed`."""
    _, labels = clips.sample(seed, 0, count, frames=1, pooled=True)
    student = student.eval()
    return clips.detect(generate(student, labels, seed=seed, steps=steps)).score(labels)
