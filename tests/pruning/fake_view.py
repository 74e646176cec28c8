"""A `LayerView` made of given attention matrices and embeddings, so that methods are tested without any model.

Rows are built left-padded, as prompts are: padding, one start token, the visual tokens, then text. Attention is a causal
softmax of random scores in the dtype asked for (float64 by default).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from mmeff.pruning._base import Transition
from mmeff.pruning._schedule import PrunePoint


def attention(real: torch.Tensor, heads: int, *, seed: int, sharp: float = 3.0, dtype=torch.float64) -> torch.Tensor:
    """(B, H, S, S) causal softmax of random scores over real keys; rows of padding are 0."""
    draw = torch.Generator().manual_seed(seed)
    size = real.shape[1]
    scores = sharp * torch.randn(len(real), heads, size, size, generator=draw, dtype=dtype)
    seen = torch.ones(size, size, dtype=torch.bool).tril() & real[:, None, None, :]
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0) * real[:, None, :, None]


@dataclass
class FakeEncoder:
    """Per-layer attention received by each visual token, keys, and a projector; tensors are as `EncoderView` says."""

    layers: int = 4
    by_class: dict[int, torch.Tensor] = field(default_factory=dict)
    by_all: dict[int, torch.Tensor] = field(default_factory=dict)
    key: dict[int, torch.Tensor] = field(default_factory=dict)
    inputs: torch.Tensor | None = None
    projector: Any = None

    def received(self, layer: int, rows: str) -> torch.Tensor:
        return (self.by_class if rows == "class" else self.by_all)[layer % self.layers]

    def keys(self, layer: int) -> torch.Tensor:
        return self.key[layer % self.layers]

    def features(self) -> torch.Tensor:
        assert self.inputs is not None
        return self.inputs

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.projector(features)


class FakeView:
    """See the module. `visual` (B, S) bool may already lack tokens that were dropped earlier; `initial` says how many
    there were. Attributes are those of `LayerView`; `before`, `next` are the attention matrices."""

    def __init__(
        self, *, visual: torch.Tensor, real: torch.Tensor, before: torch.Tensor | None = None, next: torch.Tensor | None = None,
        embedded: torch.Tensor | None = None, entering: torch.Tensor | None = None, frame: torch.Tensor | None = None,
        place: torch.Tensor | None = None, original: torch.Tensor | None = None, initial: torch.Tensor | None = None,
        keep: float | int = 0.5, layer: int = 2, layers: int = 8, state: Any = None, encoder: FakeEncoder | None = None,
        rotary: Any = None, moved: dict[int, tuple[Transition, Transition]] | None = None,
        raster: torch.Tensor | None = None, padded: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.visual, self.real, self.layers, self.state = visual, real, layers, state
        self.point = PrunePoint(layer=layer, keep=keep)
        self._matrix = {"before": before, "next": next}
        self._embedded, self._entering, self._encoder, self._rotary = embedded, entering, encoder, rotary
        self._moved, self._ids = moved or {}, ids
        width = int(visual.sum(1).max())
        self._slots = (~visual).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self.present = visual.gather(1, self._slots)
        rank = torch.arange(width).expand(len(visual), -1)
        self.original = rank if original is None else original
        self.initial = visual.sum(1) if initial is None else initial
        self.counts = torch.tensor([self.point.count(int(n)) for n in self.initial])
        self.frame = torch.zeros_like(rank) if frame is None else frame
        self.place = torch.stack([torch.zeros_like(rank), rank], -1) if place is None else place
        same = (self.frame[:, :, None] == self.frame[:, None, :]) & self.present[:, None, :]
        earlier = same & (self.original[:, None, :] < self.original[:, :, None])
        self.raster = earlier.sum(-1) if raster is None else raster  # complete frames, unless it is given
        self.padded = padded
        behind = visual.flip(1).cumsum(1).flip(1) == 0
        text = real & behind
        self._text_slots = (~text).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(text.sum(1).max())]
        self.text = text.gather(1, self._text_slots)
        self.digest = torch.arange(len(visual))

    def _attention(self, where: str) -> torch.Tensor:
        found = self._matrix[where]
        assert found is not None, f"this view has no attention {where!r}"
        return found

    def received(self, rows="last", *, weights=None, where="before"):
        matrix = self._attention(where)
        assert weights is None or rows == "text"
        if rows == "last":
            summed = matrix[:, :, -1]
        elif rows == "all":
            summed = (matrix * self.real[:, None, :, None]).sum(2)
        else:
            part = _rows(matrix, self._text_slots) * self.text[:, None, :, None]
            summed = (part if weights is None else part * weights[..., None]).sum(2)
        return summed.gather(2, self._slots[:, None].expand(-1, summed.shape[1], -1)) * self.present[:, None]

    def text_attention(self, *, to="text", where="before"):
        part = _rows(self._attention(where), self._text_slots)
        slots, there = (self._text_slots, self.text) if to == "text" else (self._slots, self.present)
        columns = slots[:, None, None].expand(-1, part.shape[1], part.shape[2], -1)
        return part.gather(3, columns) * self.text[:, None, :, None] * there[:, None, None, :]

    def embeddings(self):
        return _tokens(self._embedded, self._slots) * self.present[..., None]

    def text_embeddings(self):
        return _tokens(self._embedded, self._text_slots) * self.text[..., None]

    def text_ids(self):
        assert self._ids is not None, "this view has no token ids"
        return self._ids.gather(1, self._text_slots)

    def hidden(self):
        return _tokens(self._entering, self._slots) * self.present[..., None]

    def transitions(self, layer):
        return self._moved[layer]

    def inputs(self):
        return self._embedded, self.real, self._rotary

    def slots(self):
        return self._slots

    def encoder(self):
        assert self._encoder is not None, "this view has no encoder"
        return self._encoder


def _rows(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return matrix.gather(2, rows[:, None, :, None].expand(-1, matrix.shape[1], -1, matrix.shape[3]))


def _tokens(x: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
    assert x is not None, "this view has no such embeddings"
    return x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))


def prompt_masks(visual: list[int], texts: list[int]) -> SimpleNamespace:
    """Left-padded rows of one start token, `visual[i]` visual tokens and `texts[i]` text tokens: `visual`, `real` (B, S)."""
    size = max(v + t + 1 for v, t in zip(visual, texts, strict=True))
    real = torch.zeros(len(visual), size, dtype=torch.bool)
    pictured = torch.zeros_like(real)
    for b, (v, t) in enumerate(zip(visual, texts, strict=True)):
        real[b, size - v - t - 1 :] = True
        pictured[b, size - v - t : size - t] = True
    return SimpleNamespace(visual=pictured, real=real)
