"""Which tile of the grid to make a block of, so that block-sparse kernels have the least to do for a neighborhood rule."""

from __future__ import annotations

import math
from functools import lru_cache

from ..simulator import simulate
from .rule import Axis, Rule

SMALLEST_TILE, LARGEST_TILE = 64, 128  # tokens that a tile may hold
# What it costs to bring a token into tile order and back, in query-key pairs of attention: 0.5 to 1 us against 13 to 25 ns
# (N 12480, H 4, D 64, float32, one CPU core, "native").
REORDER_PAIRS = 50


@lru_cache(maxsize=256)
def pick_tile(rule: Rule, block: int = 128) -> tuple[int, ...] | None:
    """Return the tile of 64 to 128 tokens in whose order a kernel has the least to do, or None to keep raster order.

    Args: rule: of any number of axes. block: tokens of a block in raster order.
    Returns: extents of the tile. Among equals it is one that divides the grid, then one that needs fewer masks, then the
        larger, then the one closest to a cube.
    Numerics: tiles are counted by the simulator, padding included. Raster order, whose blocks are runs of rows, is taken
        to be tiles of whole rows.
    """
    axes, N = rule.axes, rule.N
    counts = [[_count(axis, t) for t in range(1, min(axis.length, LARGEST_TILE) + 1)] for axis in axes]
    least = min(SMALLEST_TILE, N)

    def rank(tile: tuple[int, ...]) -> tuple[float, ...]:
        of_axis = [counts[i][t - 1] for i, t in enumerate(tile)]
        visited, full = (math.prod(c[j] for c in of_axis) for j in (0, 1))
        size = math.prod(tile)
        ragged = sum(axis.length % t != 0 for axis, t in zip(axes, tile, strict=True))
        return (visited * size**2, ragged, (visited - full) * size**2, -size, sum(size / t for t in tile))

    best = min((tile for tile in _tiles(rule.grid, LARGEST_TILE) if math.prod(tile) >= least), key=rank)
    rows: list[int] = []
    left = block
    for axis in reversed(axes):
        rows.insert(0, min(axis.length, max(left, 1)))
        left //= axis.length
    raster = math.prod(_count(a, t)[0] / math.ceil(a.length / t) ** 2 for a, t in zip(axes, rows, strict=True)) * N**2
    return best if rank(best)[0] + REORDER_PAIRS * N < raster else None


def _count(axis: Axis, tile: int) -> tuple[int, int]:
    """Pairs of tiles of one axis that are visited, and those of them that need no mask."""
    window, stride, dilation = axis.window, axis.stride, axis.dilation
    if dilation > 1 and tile > 1:  # such a tile holds several classes, and visits what lies between them
        window = min(axis.length, (window - 1) * dilation + 1)
        stride, dilation = min(stride * dilation, window), 1
    found = simulate(
        (axis.length,), (window,), (stride,), q_tile=tile, kv_tile=tile, dilation=(dilation,), causal=(axis.causal,)
    )
    return found.visited_tiles, found.full_tiles if dilation == axis.dilation else 0


def _tiles(grid: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Every tile of at most so many tokens that fits into the grid."""
    if not grid:
        return [()]
    extents = range(1, min(grid[0], most) + 1)
    return [(t, *rest) for t in extents for rest in _tiles(grid[1:], most // t)]
