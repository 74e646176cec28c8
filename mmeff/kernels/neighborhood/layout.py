"""Neighborhood windows as a BlockLayout: how large grids, and text beside them, run on the block-sparse kernels.

In raster order a block of tokens is a line through the grid and meets the windows of its queries in many blocks, most of
them partly. In tile order a block is a small box: fewer blocks are visited, and where the stride makes all queries of a
tile share their window and the window's ends fall on tile borders, every visited block is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..layout import BlockLayout, Bounds
from ..permute import PaddedTiles, padded_tiles
from .rule import Rule


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """The layout of a rule and the order of tokens that it is for.

    layout: over the grid, then the text. order: the tiles of the grid, or None where tokens stay in raster order.
    """

    layout: BlockLayout
    order: PaddedTiles | None
    text_len: int

    def arrange(self, x: Tensor) -> Tensor:
        """Bring tokens (B, N + T, H, D), grid then text, into the layout's order; padding holds zeros."""
        if self.order is None:
            return x
        N = len(self.order)
        grid = self.order(x[:, :N])
        return torch.cat((grid, x[:, N:]), 1) if self.text_len else grid

    def restore(self, x: Tensor) -> Tensor:
        """Undo `arrange`."""
        if self.order is None:
            return x
        slots = self.order.perm.shape[0]
        grid = self.order.undo(x[:, :slots])
        return torch.cat((grid, x[:, slots:]), 1) if self.text_len else grid

    def to(self, device: torch.device | str) -> WindowLayout:
        """Return this on `device`."""
        order = None if self.order is None else self.order.to(device)
        return WindowLayout(self.layout.to(device), order, self.text_len)


@lru_cache(maxsize=32)
def window_layout(rule: Rule, *, tile: tuple[int, ...] | None, block: int = 128, text_len: int = 0) -> WindowLayout:
    """Make the layout of a neighborhood rule, on the CPU. Kept, because every layer and step asks for the same one.

    Args:
        rule: grid, window, stride, dilation and causality of each axis.
        tile: tokens of a tile along each axis; a tile is a block of the layout. None leaves raster order.
        block: tokens of a block in raster order, and of text blocks nothing: those have the size of a tile.
        text_len: tokens behind the grid that see and are seen by all.

    Returns: a WindowLayout with bounds for its partial blocks; `known_pairs` is counted from the rule.
    """
    with torch.device("cpu"):
        index = torch.arange(rule.N)
        windows, coordinates = [], []
        for i, axis in zip(_coordinates(rule.grid, index), rule.axes, strict=True):
            lo, hi = axis.windows()
            windows.append((lo[i], hi[i] - 1))
            coordinates.append(i // axis.dilation)
            if axis.dilation > 1:  # attention stays within the class: an axis of its own
                r = i % axis.dilation
                windows.append((r, r))
                coordinates.append(r)
        bounds = Bounds.points(windows, coordinates)
        pairs = rule.pairs + 2 * rule.N * text_len + text_len**2
        if tile is None:
            return WindowLayout(
                BlockLayout.from_bounds(
                    bounds.with_free(text_len, text_len), q_block=block, kv_block=block, known_pairs=pairs
                ),
                None,
                text_len,
            )
        order = padded_tiles(rule.grid, tile)
        size = order.tile_size
        text = torch.arange(0, text_len, size)
        valid = torch.cat((order.valid, (text_len - text).clamp(max=size)))
        layout = BlockLayout.from_bounds(
            bounds.reordered(order.perm).with_free(text_len, text_len),
            q_block=size, kv_block=size, q_valid=valid, kv_valid=valid, known_pairs=pairs,
        )  # fmt: skip
    return WindowLayout(layout, order, text_len)


def _coordinates(grid: tuple[int, ...], index: Tensor) -> list[Tensor]:
    """The coordinate of each raster index on every axis."""
    found: list[Tensor] = []
    for n in reversed(grid):
        found.insert(0, index % n)
        index = index // n
    return found
