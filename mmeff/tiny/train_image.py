"""Train the tiny image model: flow matching on generated pictures, of half the size first, then of full size.

A picture of half the size has a quarter of the tokens, and its tokens are given the positions that they cover in the full
one; so what is learned about colours, shapes and places there is worth as much in full, at a fraction of the cost. The whole
recipe is `ImageRecipe`; its budget is counted in steps, never in seconds. `train` resumes from its folder.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmeff import training
from mmeff.tiny import flow, image_model, stills

QUICK_EVERY = 150  # steps between two quick scores
GATE = {"found": 0.85, "colour": 0.85, "shape": 0.85, "place": 0.85, "all": 0.85}


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(flow.FlowRecipe):
    """Everything that decides the weights."""

    half_steps: int = 600  # steps on pictures of half the size
    full_steps: int = 450  # steps on pictures of full size
    half_batch: int = 32
    full_batch: int = 16
    ema: float = 0.995  # short, so that the average forgets the pictures of half the size


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
    mixed = flow.noised(latents, recipe, step, draw, shift=image_model.SHIFT)
    padding = flow.padding(draw, fewest=1, text_tokens=image_model.TEXT_TOKENS)
    return {**mixed, "text": texts[chosen], "pooled": bags[chosen], "padding": padding}


def train(recipe: ImageRecipe, folder: str | Path, *, progress: flow.Progress | None = None) -> Student:
    """Run or resume a training in `folder`; returns the student with averaged weights.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """
    run = training.Run(folder, {"kind": "tiny-image", **asdict(recipe)})
    torch.manual_seed(recipe.seed)
    student = Student().train()

    def predict(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = _batch(recipe, step)
        target = batch.pop("target")
        return student(**batch), target

    def score(averaged: Student, done: int) -> dict[str, float]:
        return evaluate(averaged, count=32, seed=stills.GATE_SEED, steps=10, pooled=done <= recipe.half_steps)

    return flow.train(
        student, run, recipe, steps=recipe.half_steps + recipe.full_steps,
        matrices=lambda name: "transformer_blocks." in name and "norm" not in name, predict=predict,
        due=lambda done: done % QUICK_EVERY == 0, score=score, progress=progress,
    )  # fmt: skip


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
    x = flow.sample(
        x, np.linspace(1, 1 / steps, steps), shift=image_model.SHIFT,
        velocity=lambda x, sigma: student(x, sigma, texts[chosen], bags[chosen], padding),
    )  # fmt: skip
    return image_model.unpack(x, (H, W)).numpy()


def evaluate(student: Student, *, count: int, seed: int, steps: int = 20, pooled: bool = False) -> dict[str, float]:
    """The detector's score on `count` fresh prompts drawn from the split `seed`."""
    _, labels = stills.sample(seed, 0, count, pooled=True)
    return stills.detect(generate(student.eval(), labels, seed=seed, steps=steps, pooled=pooled)).score(labels)
