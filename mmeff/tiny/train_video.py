"""Train the tiny video model: flow matching on generated clips, single frames first, then whole clips.

The whole recipe is `VideoRecipe`. The budget is counted in steps, never in seconds, so the schedule does not depend on the
machine. `train` resumes from its folder; `evaluate` is the acceptance gate; `export` writes the pipeline folder.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmeff import training
from mmeff.accelerate import accelerate
from mmeff.diffusion_attn._base import SparseAttention
from mmeff.tiny import clips, codec, flow, video_model

QUICK_EVERY = 500  # steps between two quick scores
GATE = {"found": 0.90, "colour": 0.90, "shape": 0.90, "direction": 0.90, "all": 0.85}


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(flow.FlowRecipe):
    """Everything that decides the weights."""

    frame_steps: int = 700  # steps on single latent frames
    clip_steps: int = 3500  # steps on whole clips
    frame_batch: int = 64
    clip_batch: int = 16


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
    mixed = flow.noised(latents, recipe, step, draw, shift=video_model.SHIFT)
    padding = flow.padding(draw, fewest=2, text_tokens=video_model.TEXT_TOKENS)
    return {**mixed, "text": texts[torch.from_numpy(index)], "padding": padding, "frames": frames}


def prompt_table() -> torch.Tensor:
    """Text features of every prompt, and of the empty prompt last."""
    return video_model.embed_prompts([*clips.all_prompts(), ""], video_model.text_encoder(), video_model.tokenizer())


def train(
    recipe: VideoRecipe,
    folder: str | Path,
    *,
    method: SparseAttention | None = None,
    progress: flow.Progress | None = None,
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
    texts = prompt_table()

    def score(averaged: Student, done: int) -> dict[str, float]:
        with under(averaged, method):
            return evaluate(averaged, count=32, seed=clips.GATE_SEED, steps=14)

    with under(student, method) as handle:

        def predict(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            if handle is not None:
                handle.enabled = step >= recipe.frame_steps
            batch = _batch(recipe, step, texts)
            target = batch.pop("target")
            return student(**batch), target

        return flow.train(
            student, run, recipe, steps=recipe.frame_steps + recipe.clip_steps,
            matrices=lambda name: ".blocks." in name and "scale_shift" not in name, predict=predict,
            due=lambda done: done > recipe.frame_steps and (done - recipe.frame_steps) % QUICK_EVERY == 0, score=score,
            progress=progress,
        )  # fmt: skip


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

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        with_text, without = (student(x, sigma, t, padding, None) for t in (text, empty))
        return without + guidance * (with_text - without)

    x = flow.sample(x, np.linspace(1, 1 / 1000, steps + 1)[:-1], velocity, shift=video_model.SHIFT)
    x = (x * codec.LATENT_STD + codec.LATENT_MEAN).clamp(-1, 1)
    x = x.unflatten(1, (2, 3)).permute(0, 3, 1, 4, 5, 2).flatten(1, 2)[:, 1:]
    return ((x + 1) / 2).numpy()


def evaluate(student: Student, *, count: int, seed: int, steps: int = 20) -> dict[str, float]:
    """The detector's score on `count` fresh prompts drawn from the split `seed`."""
    _, labels = clips.sample(seed, 0, count, frames=1, pooled=True)
    student = student.eval()
    return clips.detect(generate(student, labels, seed=seed, steps=steps)).score(labels)
