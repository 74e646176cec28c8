"""Bounds: a closed form for which query-key pairs attend, in place of a bitmap per block.

Every query and every key carries one interval of integers per axis; a pair attends if the intervals overlap on all axes.
Sequence order (causal), bands and neighbourhood windows in any number of dimensions are all of this form: the key's
interval is its own coordinate and the query's interval is its window. A token whose interval is everything, such as a text
token beside a video, attends to and is attended by all. Kernels need one rule, two comparisons per axis, and tables that
grow with the tokens instead of with the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_AXES = 6  # three axes, each of which dilation splits into a class and a position
LOWEST, HIGHEST = -(2**31), 2**31 - 1


@dataclass(frozen=True, eq=False)
class Bounds:
    """Intervals per axis; query i and key j attend if, on every axis a, their closed intervals overlap.

    Args:
        q_bounds: (A, 2, Nq) int32, lowest and highest value of each query on each of 1 <= A <= 6 axes.
        k_bounds: (A, 2, Nk) int32, the same for keys.

    Raises: ValueError for other shapes or dtypes, or tensors on different devices.
    """

    q_bounds: Tensor
    k_bounds: Tensor

    def __post_init__(self) -> None:
        for name, x in (("q_bounds", self.q_bounds), ("k_bounds", self.k_bounds)):
            if x.dtype != torch.int32 or x.ndim != 3 or x.shape[1] != 2 or not 1 <= x.shape[0] <= MAX_AXES:
                raise ValueError(
                    f"Bounds.{name} must be an int32 tensor of shape (A, 2, N) with 1 <= A <= {MAX_AXES} axes, got "
                    f"{x.dtype} {tuple(x.shape)}; the second axis holds the lowest and the highest value."
                )
        if self.q_bounds.shape[0] != self.k_bounds.shape[0] or self.q_bounds.device != self.k_bounds.device:
            raise ValueError(
                f"Bounds: queries and keys must share axes and device, got {self.q_bounds.shape[0]} axes on "
                f"{self.q_bounds.device} and {self.k_bounds.shape[0]} on {self.k_bounds.device}."
            )

    @classmethod
    def causal(cls, q_len: int, kv_len: int, *, offset: int | None = None) -> Bounds:
        """Query i sees keys 0 .. i + offset. None aligns the last query with the last key (offset kv_len - q_len)."""
        offset = kv_len - q_len if offset is None else offset
        return cls.band(q_len, kv_len, before=HIGHEST, after=0, offset=offset)

    @classmethod
    def band(cls, q_len: int, kv_len: int, *, before: int, after: int, offset: int = 0) -> Bounds:
        """Query i sees keys i + offset - before .. i + offset + after."""
        q = torch.arange(q_len) + offset
        return cls.points([(q - before, q + after)], [torch.arange(kv_len)])

    @classmethod
    def points(cls, windows: Sequence[tuple[Tensor, Tensor]], coordinates: Sequence[Tensor]) -> Bounds:
        """Make bounds from the queries' windows and the keys' coordinates.

        Args:
            windows: per axis, the lowest and highest coordinate that each query sees, (Nq,) integers each.
            coordinates: per axis, the coordinate of each key, (Nk,) integers.
        """
        q = torch.stack([torch.stack(pair) for pair in windows])
        k = torch.stack([torch.stack((c, c)) for c in coordinates])
        return cls(*(x.clamp(LOWEST, HIGHEST).to(torch.int32) for x in (q, k)))

    def with_free(self, queries: int = 0, keys: int = 0) -> Bounds:
        """Append tokens whose intervals are everything: they see, or are seen by, all that is bounded here."""

        def append(x: Tensor, n: int) -> Tensor:
            free = torch.tensor([LOWEST, HIGHEST], dtype=torch.int32, device=x.device)
            return torch.cat((x, free[None, :, None].expand(x.shape[0], 2, n)), -1)

        return Bounds(append(self.q_bounds, queries), append(self.k_bounds, keys))

    def reordered(self, order: Tensor) -> Bounds:
        """Return the bounds of tokens in another order, (N,): position p holds what was token order[p]."""
        return Bounds(self.q_bounds[..., order], self.k_bounds[..., order])

    @property
    def q_len(self) -> int:
        """Queries."""
        return self.q_bounds.shape[-1]

    @property
    def kv_len(self) -> int:
        """Keys."""
        return self.k_bounds.shape[-1]

    def swapped(self) -> Bounds:
        """Return the bounds with queries and keys exchanged; overlap is symmetric."""
        return Bounds(self.k_bounds, self.q_bounds)

    def to(self, device: torch.device | str) -> Bounds:
        """Return these bounds on `device`."""
        return Bounds(self.q_bounds.to(device), self.k_bounds.to(device))

    def attends(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        """Return whether the pairs attend, for two index tensors that broadcast: bool of the broadcast shape."""
        result: Tensor | None = None
        for q, k in zip(self.q_bounds, self.k_bounds, strict=True):
            overlap = (q[0][q_index] <= k[1][k_index]) & (k[0][k_index] <= q[1][q_index])
            result = overlap if result is None else result & overlap
        assert result is not None
        return result

    def block_kinds(self, q_block: int, kv_block: int, q_valid: Tensor, kv_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return which blocks may attend and which attend in full, two (B|1, 1, nQ, nK) bools.

        A block that is not among the first holds no attending pair. One among the first but not the second is to be
        looked at pair by pair. q_valid (B|1, nQ) and kv_valid (B|1, nK) count the tokens in use of each block.
        """
        q_ranges = _ranges(self.q_bounds, q_block, q_valid)
        k_ranges = _ranges(self.k_bounds, kv_block, kv_valid)
        some = (q_valid > 0)[:, :, None] & (kv_valid > 0)[:, None, :]
        every = some.clone()
        for (q_lo, q_hi), (k_lo, k_hi) in zip(q_ranges, k_ranges, strict=True):
            some &= (q_lo[0][:, :, None] <= k_hi[1][:, None, :]) & (k_lo[0][:, None, :] <= q_hi[1][:, :, None])
            every &= (q_lo[1][:, :, None] <= k_hi[0][:, None, :]) & (k_lo[1][:, None, :] <= q_hi[0][:, :, None])
        return some[:, None], every[:, None]


def _ranges(bounds: Tensor, block: int, valid: Tensor) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Per axis, (min, max) over each block of the lowest values and of the highest values, each (B|1, nBlocks)."""
    n = valid.shape[1]
    padded = torch.nn.functional.pad(bounds, (0, n * block - bounds.shape[-1])).unflatten(-1, (n, block))
    if valid.shape[0] == 1 and bool((valid[0, :-1] == block).all()) and n:
        # only the last block is short: repeating a token in use leaves the extremes alone and needs no masks
        padded[..., n - 1, int(valid[0, -1]) :] = padded[..., n - 1, :1]
        return [((lo.amin(-1)[None], lo.amax(-1)[None]), (hi.amin(-1)[None], hi.amax(-1)[None])) for lo, hi in padded]
    used = torch.arange(block, device=bounds.device) < valid[..., None]  # (B, n, block)
    ranges = []
    for lo, hi in padded:
        low = tuple(_extreme(lo, used, largest) for largest in (False, True))
        high = tuple(_extreme(hi, used, largest) for largest in (False, True))
        ranges.append(((low[0], low[1]), (high[0], high[1])))
    return ranges


def _extreme(x: Tensor, used: Tensor, largest: bool) -> Tensor:
    x = x.masked_fill(~used, LOWEST if largest else HIGHEST)
    return x.amax(-1) if largest else x.amin(-1)
