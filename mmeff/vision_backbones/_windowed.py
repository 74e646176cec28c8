"""What a method that takes over window attention decides, and what a host tells it about a call.

The two halves: a method (`windowattention.py`) says whether it takes a call and computes it; a host (`hosts/`) knows where a
timm model has its windows, and how their tensors come about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf, RelPosMlp
from torch import Tensor, nn

from mmeff.config import MethodConfig


class WindowCall(NamedTuple):
    """One call of one window attention layer, as far as a decision needs it."""

    batch: int
    grid: tuple[int, int]  # rows and columns of the map, before any padding
    window: tuple[int, int]
    partition: Literal["window", "grid"]
    heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype  # of q, k and v
    grad: bool  # whether a backward pass may follow
    biased: bool  # whether a relative bias is added
    stock_fused: bool  # whether timm runs scaled_dot_product_attention here, or products and a softmax
    pads: bool  # whether the window does not divide the map, so that keys must be hidden

    @property
    def density(self) -> float:
        """Pairs within windows, of all pairs of the map."""
        (H, W), (wh, ww) = self.grid, self.window
        return min(wh, H) * min(ww, W) / (H * W)

    def __str__(self) -> str:
        (H, W), (wh, ww) = self.grid, self.window
        kind = "grids" if self.partition == "grid" else "windows"
        return f"{kind} of {wh} x {ww} on {H} x {W}, {self.heads} heads of {self.head_dim}, batch {self.batch}"


class WindowMethod(MethodConfig, ABC):
    """Base of methods of this room: they decide per call, and compute what they take."""

    stage: ClassVar[str] = "vision_backbones"

    @property
    @abstractmethod
    def pads(self) -> bool:
        """Whether maps that a window does not divide are padded where timm refuses them."""

    @abstractmethod
    def why_not(self, call: WindowCall) -> str | None:
        """A sentence why this call stays with timm, or None if the method takes it."""

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Sequence[int],
        *,
        partition: Literal["window", "grid"] = "window",
        shift: Sequence[int] = (0, 0),
        rel_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention within windows; arguments and result as `mmeff.kernels.partitioned.partitioned_attention`."""


def heads_of(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, H, W, parts * heads * D) -> `parts` tensors (B, H, W, heads, D), without a copy."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(3)


def rel_bias_of(rel_pos: nn.Module | None) -> Tensor | None:
    """The relative bias of a timm module as our operator wants it: (heads, 2 wh - 1, 2 ww - 1) by key - query.

    Raises: TypeError for a module of another kind.
    """
    if rel_pos is None:
        return None
    if isinstance(rel_pos, RelPosBiasTf):
        return rel_pos.relative_position_bias_table
    if isinstance(rel_pos, RelPosBias):
        return from_flat_table(rel_pos.relative_position_bias_table, rel_pos.window_size)
    if isinstance(rel_pos, RelPosMlp):
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log))  # (2 wh - 1, 2 ww - 1, heads) by query - key
        table = table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
        return table.permute(2, 0, 1).flip(1, 2)
    raise TypeError(f"the relative position of type {type(rel_pos).__name__} has no table of one bias for each offset")


def from_flat_table(table: Tensor, window: Sequence[int]) -> Tensor:
    """Swin's ((2 wh - 1) * (2 ww - 1), heads) by query - key, as (heads, 2 wh - 1, 2 ww - 1) by key - query."""
    wh, ww = window
    return table.T.unflatten(1, (2 * wh - 1, 2 * ww - 1)).flip(1, 2)


def rel_pos_obstacle(rel_pos: nn.Module | None) -> str | None:
    """Why `rel_bias_of` cannot express the module, or None."""
    if rel_pos is None or type(rel_pos) in (RelPosBias, RelPosBiasTf, RelPosMlp):
        return "it has a prefix token" if getattr(rel_pos, "prefix_tokens", 0) else None
    return f"its relative position is a {type(rel_pos).__name__}, which has no table of one bias for each offset"


def has_grad(x: Tensor, module: nn.Module) -> bool:
    """Whether a backward pass may follow a call of the module on x."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer makes of x here: autocast's dtype, or its own."""
    kind = x.device.type
    if x.device.type != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
