"""What the backends of partitioned_attention are asked, and the rule that they share: which tokens make a window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Partition = Literal["window", "grid"]


class Places(NamedTuple):
    """The windows of one axis of the map.

    position (windows, window) int64: where token n of a window lies; side (windows, window) bool: whether it lies behind the
    seam of a shift, across which nothing is seen.
    """

    position: Tensor
    side: Tensor


@lru_cache(maxsize=256)
def places(length: int, window: int, partition: Partition, shift: int) -> Places:
    """Return the windows of an axis of `length` tokens, a multiple of the window.

    "window" cuts the axis into runs of `window` neighbours that begin at `shift`; what is left before it joins the end of
    the axis in the last window. "grid" takes every (length / window)-th token, so that a window spans the axis.
    """
    with torch.inference_mode(False):  # made in inference mode, they must serve training later
        count = length // window
        token = torch.arange(length)
        if partition == "grid":
            position = token.view(window, count).T.contiguous()
        else:
            position = ((token + shift) % length).view(count, window)
        return Places(position, position < shift)


@dataclass(frozen=True, eq=False)
class Problem:
    """One call, validated: k and v (B, Hg, Wg, H, D); q likewise, or (B, *window, H, D) where all windows share it."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: tuple[int, int]
    partition: Partition
    shift: tuple[int, int]
    rel_bias: Tensor | None
    key_mask: Tensor | None  # (B or 1, Hg, Wg) bool
    scale: float

    @property
    def B(self) -> int:
        """Batch."""
        return self.k.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the map."""
        return self.k.shape[1], self.k.shape[2]

    @property
    def H(self) -> int:
        """Heads."""
        return self.k.shape[3]

    @property
    def D(self) -> int:
        """Channels of a head."""
        return self.k.shape[4]

    @property
    def N(self) -> int:
        """Tokens of a window."""
        return self.window[0] * self.window[1]

    @property
    def shared_q(self) -> bool:
        """Whether q is one window that serves all."""
        return self.q.shape[1:3] != self.k.shape[1:3]

    @property
    def dtype(self) -> torch.dtype:
        """What scores and gradients accumulate in: float32, or float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def density(self) -> float:
        """Pairs within windows, of all pairs; a seam and a key mask hide some more."""
        return self.N / (self.grid[0] * self.grid[1])

    def axes(self) -> tuple[Places, Places]:
        """The windows along the rows and along the columns."""
        rows, columns = (
            places(length, window, self.partition, shift)
            for length, window, shift in zip(self.grid, self.window, self.shift, strict=True)
        )
        return rows, columns

    def __str__(self) -> str:
        extras = "" if self.rel_bias is None else ", with rel_bias"
        extras += "" if self.key_mask is None else ", with a key mask"
        extras += f", shifted by {self.shift}" if any(self.shift) else ""
        return (
            f"q {tuple(self.q.shape)}, k/v {tuple(self.k.shape)}, {self.q.dtype} on {self.q.device}, {self.partition} "
            f"partition of {self.window}{extras}"
        )


@dataclass(frozen=True, eq=False)
class BackwardProblem:
    """The gradient of one call: dout is like out, and need_bias says whether the bias has one."""

    forward: Problem
    out: Tensor
    dout: Tensor
    need_bias: bool


@dataclass(frozen=True)
class Gradients:
    """What a backward returns, shaped like the inputs; None for a bias that has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    rel_bias: Tensor | None
