"""How much faster neighborhood attention can be, counted before anything runs.

A kernel works on tiles: a query tile reads every key tile that any of its windows touches, and reads it whole. What it
skips is therefore less than what attention leaves out, and by how much is a matter of window, stride and tile shapes.
Windows and tiles are products over the axes of the grid, so everything is counted per axis and multiplied: exact, for
any size, in milliseconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The tiles that one neighborhood attention visits; `simulate` makes it.

    Args:
        grid, window, stride, dilation, causal, q_tile, kv_tile: as given to `simulate`, one value per axis.
        attended_pairs: query-key pairs that attend.
        visited_tiles: pairs of a query tile and a key tile with at least one attending pair.
        full_tiles: those in which every pair attends, so that no mask is needed.
        total_tiles: pairs of tiles that dense attention would visit.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    attended_pairs: int
    visited_tiles: int
    full_tiles: int
    total_tiles: int

    @property
    def flop_bound(self) -> float:
        """Speedup over dense, non-causal attention if only attending pairs cost time."""
        return math.prod(self.grid) ** 2 / self.attended_pairs

    @property
    def tile_bound(self) -> float:
        """Speedup over dense, non-causal attention if every visited tile costs a tile of dense attention.

        Permuting the tokens, masks in partial tiles and launches come on top of it: a bound, not a prediction.
        """
        return self.total_tiles / self.visited_tiles

    @property
    def density(self) -> float:
        """Fraction of the query-key pairs that attend, 0 to 1."""
        return 1 / self.flop_bound

    @property
    def perfectly_block_sparse(self) -> bool:
        """Whether every visited tile is full: no mask anywhere, and no pair is computed in vain."""
        return self.full_tiles == self.visited_tiles

    def __str__(self) -> str:
        def cross(values: tuple[int, ...]) -> str:
            return "x".join(map(str, values))

        parts = [f"grid {cross(self.grid)}", f"window {cross(self.window)}", f"stride {cross(self.stride)}"]
        if any(d > 1 for d in self.dilation):
            parts.append(f"dilation {cross(self.dilation)}")
        if any(self.causal):
            parts.append(f"causal {self.causal}")
        perfect = "perfectly block-sparse" if self.perfectly_block_sparse else "with partial tiles"
        return (
            f"{', '.join(parts)}, tiles {cross(self.q_tile)} and {cross(self.kv_tile)}: at most {self.tile_bound:.2f}x "
            f"by tiles, {self.flop_bound:.2f}x by operations, {perfect}"
        )


def simulate(
    grid: tuple[int, ...],
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    *,
    q_tile: int | tuple[int, ...],
    kv_tile: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> Simulation:
    """Count the tiles that neighborhood attention visits, and bound its speedup over dense attention.

    Args:
        grid: extents of the token grid, e.g. (F, H, W); any number of axes.
        window: keys that a query sees along each axis, 1 to grid / dilation.
        stride: queries that share a window along each axis, 1 to window.
        q_tile, kv_tile: extents of the tiles a kernel works on. Tiles at the far edges may be smaller; they are
            counted whole.
        dilation: distance of neighbours along each axis. Tiles then lie within a dilation class, as after
            `dilation_permutation`.
        causal: whether the axis hides later keys.
        A single number holds for every axis.

    Returns: a Simulation; print it, or read `flop_bound`, `tile_bound` and `perfectly_block_sparse`.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: exact integers. The windows are those of `neighborhood_attention`.
    Source: the analysis of generalised neighborhood attention (Hassani et al., 2025, arXiv:2504.16922).
    """
    who = "simulate"
    grid, window = _geometry(who, grid, window, dilation)
    n = len(grid)
    strides, dilations = _per_axis(who, "stride", stride, n), _per_axis(who, "dilation", dilation, n)
    for axis, (s, w) in enumerate(zip(strides, window, strict=True)):
        if s > w:
            raise ValueError(
                f"{who}: stride must be <= window along each axis, got stride {s} for window {w} on axis {axis}; a "
                "larger stride would leave keys that no query sees."
            )
    q_tiles, kv_tiles = _per_axis(who, "q_tile", q_tile, n), _per_axis(who, "kv_tile", kv_tile, n)
    causals = _flags(who, causal, n)
    axes = [_count(*axis) for axis in zip(grid, window, strides, dilations, causals, q_tiles, kv_tiles, strict=True)]
    return Simulation(
        grid=grid,
        window=window,
        stride=strides,
        dilation=dilations,
        causal=causals,
        q_tile=q_tiles,
        kv_tile=kv_tiles,
        attended_pairs=math.prod(axis.pairs for axis in axes),
        visited_tiles=math.prod(axis.visited for axis in axes),
        full_tiles=math.prod(axis.full for axis in axes),
        total_tiles=math.prod(axis.total for axis in axes),
    )


def best_strides(
    grid: tuple[int, ...],
    window: int | tuple[int, ...],
    *,
    q_tile: int | tuple[int, ...],
    kv_tile: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> Simulation:
    """Find the stride with the highest tile bound, and among equals the smallest along each axis.

    A small stride stays close to a sliding window; a stride equal to the window is blocked attention.

    Args: as for `simulate`.
    Returns: the Simulation of that stride.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: exact: the axes are independent, so each is searched by itself.
    """
    who = "best_strides"
    grid, window = _geometry(who, grid, window, dilation)
    n = len(grid)
    dilations, causals = _per_axis(who, "dilation", dilation, n), _flags(who, causal, n)
    q_tiles, kv_tiles = _per_axis(who, "q_tile", q_tile, n), _per_axis(who, "kv_tile", kv_tile, n)
    stride = tuple(
        min(range(1, w + 1), key=lambda s: (_count(length, w, s, d, c, tq, tk).visited, s))
        for length, w, d, c, tq, tk in zip(grid, window, dilations, causals, q_tiles, kv_tiles, strict=True)
    )
    return simulate(grid, window, stride, q_tile=q_tiles, kv_tile=kv_tiles, dilation=dilations, causal=causals)


def best_tiles(
    grid: tuple[int, ...],
    window: int | tuple[int, ...],
    *,
    q_tokens: int,
    kv_tokens: int,
    stride: int | tuple[int, ...] | None = None,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    top: int = 5,
) -> list[Simulation]:
    """Rank the tile shapes of a kernel, with the best stride of each, by their tile bound.

    Args:
        grid, window, dilation, causal: as for `simulate`.
        q_tokens, kv_tokens: tokens in a tile, which the kernel fixes; every way to write them as a product over the
            axes is tried.
        stride: as for `simulate`; None takes `best_strides` of each pair of tiles.
        top: how many to return.

    Returns: up to `top` Simulations, best first; of equal bounds, perfectly block-sparse ones first, then the smaller
        strides.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    """
    who = "best_tiles"
    grid, window = _geometry(who, grid, window, dilation)
    for name, value in (("q_tokens", q_tokens), ("kv_tokens", kv_tokens), ("top", top)):
        _per_axis(who, name, value, 1)
    found = []
    for q_tile, kv_tile in itertools.product(
        _factorisations(q_tokens, len(grid)), _factorisations(kv_tokens, len(grid))
    ):
        if stride is None:
            found.append(best_strides(grid, window, q_tile=q_tile, kv_tile=kv_tile, dilation=dilation, causal=causal))
        else:
            found.append(
                simulate(grid, window, stride, q_tile=q_tile, kv_tile=kv_tile, dilation=dilation, causal=causal)
            )
    found.sort(key=lambda s: (-s.tile_bound, not s.perfectly_block_sparse, math.prod(s.stride), s.stride))
    return found[:top]


# ---------------------------------------------------------------- one axis


@dataclass(frozen=True)
class _AxisCount:
    pairs: int
    visited: int
    full: int
    total: int


def _windows(length: int, window: int, stride: int, dilation: int, causal: bool) -> tuple[list[int], list[int]]:
    """lo and hi per coordinate: it sees the positions lo <= j < hi of its dilation class."""
    from .neighborhood.rule import Axis  # here, because the package beside it counts its tiles with this module

    low, high = Axis(length, window, stride, dilation, causal).windows()
    return low.tolist(), high.tolist()


@lru_cache(maxsize=4096)
def _count(length: int, window: int, stride: int, dilation: int, causal: bool, q_tile: int, kv_tile: int) -> _AxisCount:
    lows, highs = _windows(length, window, stride, dilation, causal)
    visited = full = 0
    for r in range(dilation):
        low, high = lows[r::dilation], highs[r::dilation]  # by position in the class
        n = len(low)
        key_tiles = -(-n // kv_tile)
        for start in range(0, n, q_tile):
            rows = slice(start, start + q_tile)
            # stride <= window, so the windows of neighbouring queries leave no gap between them
            visited += (max(high[rows]) - 1) // kv_tile - min(low[rows]) // kv_tile + 1
            every_low, every_high = max(low[rows]), min(high[rows])  # keys that every query of the tile sees
            complete = key_tiles if every_high == n else every_high // kv_tile  # the last tile ends with the axis
            full += max(0, complete - -(-every_low // kv_tile))
    total = -(-length // q_tile) * -(-length // kv_tile)  # dense attention has no classes
    return _AxisCount(sum(highs) - sum(lows), visited, full, total)


def _factorisations(number: int, n: int) -> list[tuple[int, ...]]:
    if n == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [(d, *rest) for d in divisors for rest in _factorisations(number // d, n - 1)]


# ---------------------------------------------------------------- arguments


def _per_axis(who: str, name: str, value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * n
    if len(values) != n:
        raise ValueError(f"{who}: {name} must be one number or one per axis ({n}), got {values}.")
    for v in values:
        if not isinstance(v, int) or isinstance(v, bool):
            raise TypeError(f"{who}: {name} must be integers, got {type(v).__name__} {v!r}.")
        if v < 1:
            raise ValueError(f"{who}: {name} must be >= 1 along each axis, got {values}.")
    return values


def _flags(who: str, causal: bool | Sequence[bool], n: int) -> tuple[bool, ...]:
    values = tuple(causal) if isinstance(causal, Sequence) else (causal,) * n
    if len(values) != n or not all(isinstance(v, bool) for v in values):
        raise ValueError(f"{who}: causal must be one bool or one per axis ({n}), got {causal!r}.")
    return values


def _geometry(
    who: str, grid: tuple[int, ...], window: int | tuple[int, ...], dilation: int | tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not isinstance(grid, Sequence) or not grid:
        raise ValueError(f"{who}: grid must be a tuple of extents such as (F, H, W), got {grid!r}.")
    n = len(grid)
    grid, windows = _per_axis(who, "grid", grid, n), _per_axis(who, "window", window, n)
    for axis, (length, w, d) in enumerate(zip(grid, windows, _per_axis(who, "dilation", dilation, n), strict=True)):
        if w * d > length:
            raise ValueError(
                f"{who}: window * dilation must be <= the grid along each axis, got {w} * {d} > {length} on axis {axis} "
                f"of grid {grid}; a window of {length // d} sees the whole axis."
            )
    return grid, windows
