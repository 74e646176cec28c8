"""Which keys a query sees in neighborhood attention: the one statement of the rule that every backend reads.

Axes are independent: a query at (i, j, ...) sees the keys whose coordinate on every axis lies in that axis's window.
On one axis of length L, with window w, stride s and dilation d, the query at coordinate i

    belongs to class r = i mod d, which has n = ceil((L - r) / d) members, at class position p = i div d,
    follows the leader of its group of s positions, min((p div s) s + s div 2, n - 1),
    and sees the w class positions around that leader; at a border the window shifts inward, so it never shrinks.
    An even window leans left: w div 2 positions before the leader, (w - 1) div 2 behind it.
    A causal axis has the leader min((p div s) s + s - 1, n - 1) and sees j with leader - w < j <= p: fewer at the start.

A query is always in its own window, so no row is empty, and key - query lies in -(w - 1) .. w - 1 class positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of the grid. Checked by the operator: window * dilation <= length, 1 <= stride <= window."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    def class_length(self, r: int) -> int:
        """Return how many coordinates are r modulo the dilation."""
        return -(-(self.length - r) // self.dilation)

    @property
    def class_lengths(self) -> tuple[tuple[int, range], ...]:
        """The one or two lengths of classes, each with the classes that have it; the longer first."""
        d, rest = self.dilation, self.length % self.dilation
        kinds = (self.class_length(0), range(rest or d)), (self.class_length(d - 1), range(rest, d))
        return kinds if rest else kinds[:1]

    @property
    def covers(self) -> bool:
        """Whether every query sees its whole class."""
        return not self.causal and self.window * self.dilation == self.length

    @property
    def partitions(self) -> bool:
        """Whether the windows are the groups of the stride and tile every class: queries see exactly their group."""
        return not self.causal and self.stride == self.window and self.length % (self.window * self.dilation) == 0

    @property
    def pairs(self) -> int:
        """Attended query-key pairs."""
        if not self.causal:
            return self.length * self.window
        lo, hi = self.windows()
        return int((hi - lo).sum())

    def windows(self) -> tuple[Tensor, Tensor]:
        """Return lo and hi, (L,) int64 on the CPU: coordinate i sees the positions lo[i] <= j < hi[i] of its class.

        Both never decrease along a class.
        """
        i = torch.arange(self.length)
        p, r = i // self.dilation, i % self.dilation
        last = (self.length - 1 - r) // self.dilation  # of the class
        group = p // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(group + self.stride - 1, last)
            return (leader - self.window + 1).clamp(min=0), p + 1
        leader = torch.minimum(group + self.stride // 2, last)
        behind = (self.window - 1) // 2
        lo = (torch.minimum(leader, last - behind) - self.window // 2).clamp(min=0)
        return lo, lo + self.window

    def slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the window of each coordinate as a list: coordinates (L, w), visible (L, w), bias index (L, w).

        In key order. A causal axis hides the slots before the start and after the query; a hidden slot holds some
        coordinate that exists.
        """
        i = torch.arange(self.length)
        p, r = (i // self.dilation)[:, None], (i % self.dilation)[:, None]
        lo, hi = (x[:, None] for x in self.windows())
        first = lo
        if self.causal:
            last = (self.length - 1 - r) // self.dilation
            first = torch.minimum(p // self.stride * self.stride + self.stride - 1, last) - self.window + 1
        j = first + torch.arange(self.window)
        visible = (j >= lo) & (j < hi)
        j = j.where(visible, p)
        return j * self.dilation + r, visible, j - p + self.window - 1


@dataclass(frozen=True)
class Rule:
    """The rule on all axes of a grid; hashable, so that plans can be kept by it."""

    axes: tuple[Axis, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        return tuple(axis.length for axis in self.axes)

    @property
    def N(self) -> int:
        """Tokens in the grid."""
        return math.prod(self.grid)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of one head's relative bias."""
        return tuple(2 * axis.window - 1 for axis in self.axes)

    @property
    def pairs(self) -> int:
        """Attended query-key pairs."""
        return math.prod(axis.pairs for axis in self.axes)

    def __str__(self) -> str:
        def each(values: list[int] | list[bool]) -> str:
            return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))

        text = f"grid {'x'.join(map(str, self.grid))}, window {'x'.join(str(a.window) for a in self.axes)}"
        for name, default in (("stride", 1), ("dilation", 1), ("causal", False)):
            values = [getattr(a, name) for a in self.axes]
            text += "" if set(values) == {default} else f", {name} {each(values)}"
        return text


def outer(tables: list[Tensor], sizes: tuple[int, ...] | None = None) -> Tensor:
    """Combine a table per axis, each (a_i, b_i), into one over flat tokens, (prod a, prod b).

    Without sizes the tables are masks and all must hold; with them, indices into an array of these sizes, row-major.
    """
    total = tables[0]
    for axis, table in enumerate(tables[1:], 1):
        left, right = total[:, None, :, None], table[None, :, None, :]
        both = left & right if sizes is None else left * sizes[axis] + right
        total = both.flatten(2, 3).flatten(0, 1)
    return total
