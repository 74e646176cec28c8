"""Sliding tile attention: the queries of a tile share one window of whole tiles, so that no block needs a mask.

Paper: Zhang et al., "Fast Video Generation with Sliding Tile Attention", ICML 2025, arXiv:2502.04507. Behaviour follows the
authors' reference mask, `csrc/sliding_tile_attention/test/flex_sta_ref.py` of hao-ai-lab/FastVideo at 60fb02b.

Differs:

* any grid: tiles at the far edges may be smaller, and a grid may be smaller than a tile; the published kernel takes a few
  sizes that tiles divide;
* an even window has as many tiles as it says, one more before the query than behind it; the published mask takes one
  tile more, on both sides alike;
* text of any length; padded text queries give 0, where the published code leaves them to the caller;
* the search for windows per head, layer and step is not part of it: `windows_per_head` takes what it finds for heads.

For windows of an odd number of tiles on a grid that tiles divide it equals GNA with the tile as its stride.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, cast

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.diffusion_attn import _windows
from mmeff.diffusion_attn._base import Grid, SparseAttention, timed
from mmeff.diffusion_attn._ordered import KernelLayout, OrderedLayout, on_device
from mmeff.diffusion_attn._windows import AXES, Extent, Window
from mmeff.kernels import BlockLayout, Bounds
from mmeff.kernels.neighborhood.rule import Axis, outer
from mmeff.kernels.permute import PaddedTiles, padded_tiles
from mmeff.registry import register

_CODE = "FastVideo's STA kernel, HunyuanVideo at 30 x 48 x 80"


@register
@dataclass(frozen=True, kw_only=True)
class SlidingTile(SparseAttention):
    """Sliding tile attention: all queries of a tile see the same tiles around it, clamped at the borders of the video.

    The window "all" on every axis is dense attention.
    """

    source: ClassVar[str] = "arXiv:2502.04507; hao-ai-lab/FastVideo at 60fb02b"

    tile: tuple[int, int, int] = option(
        (6, 8, 8), "tokens of a tile along F, H and W, cut to the grid", unit="tokens", source=_CODE
    )
    window: tuple[Extent, Extent, Extent] = option(
        (3, 3, 3),
        "tiles along F, H and W that a tile sees, itself included: a number, a fraction of the tiles, or 'all' (-1)",
        unit="tiles, or fractions",
        source=_CODE,
    )
    windows_per_head: tuple[Window, ...] = option(
        (),
        "windows in place of `window`: head i takes entry i modulo their number, which must divide the heads of a call",
        unit="tiles",
        source="the mask strategies of FastVideo list one per head",
    )
    block: int = option(128, "tokens in a block of `layout`, which is in the order of the video", unit="tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "window", _windows.normal(self.window))
        object.__setattr__(self, "windows_per_head", tuple(map(_windows.normal, self.windows_per_head)))
        self.require(min(self.tile) >= 1, "tile", "be >= 1 token along every axis")
        self.require(self.block >= 1, "block", "be >= 1 token")
        for name, window in self._windows():
            _windows.check(name, window, "tiles")

    def _windows(self) -> list[tuple[str, Window]]:
        """The windows of the heads, with the names of their fields."""
        heads = [(f"SlidingTile.windows_per_head[{i}]", window) for i, window in enumerate(self.windows_per_head)]
        return heads or [("SlidingTile.window", self.window)]

    @property
    def per_head(self) -> bool:
        return len(self.windows_per_head) > 1

    def check_grid(self, grid: Grid, text_len: int = 0) -> None:
        super().check_grid(grid, text_len)
        tiles = self._tiling(grid).tiles
        for name, window in self._windows():
            for axis, n, t, size in zip(AXES, grid, tiles, _windows.resolve(window, tiles), strict=True):
                if size > t:
                    raise ValueError(
                        f"{name} must be <= the tiles along every axis, got {size} along {axis}, where {n} tokens of {grid} "
                        f"make {t} tiles at tile={self.tile}; pass at most {t}, a fraction such as 0.5, or 'all'."
                    )

    def _tiling(self, grid: Grid) -> _Tiling:
        F, H, W = map(min, self.tile, grid)
        tiles = (-(-grid[0] // F), -(-grid[1] // H), -(-grid[2] // W))
        return _Tiling(grid, (F, H, W), tuple(_windows.resolve(window, tiles) for _, window in self._windows()))

    # ---------------------------------------------------------------- layouts

    def layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> BlockLayout:
        """The windows in the order of the video, where blocks cut across tiles and most of them are partial.

        Args: as `SparseAttention.layout`; k and layer change nothing.
        Returns: a BlockLayout of blocks of `block` tokens, for one head or, with windows per head, for all heads of q (one
            round of the windows without q). Partial blocks have bounds; with windows per head they have bitmaps of block x
            block bytes, which is for small grids: the kernel runs on `kernel_layout`, where every block is full.
        Raises: as `check_grid`, and ValueError for heads that the windows do not divide.
        Numerics: exact integers.
        Source: arXiv:2502.04507.
        """
        self.check_grid(grid, text_len)
        found = _in_video_order(self._tiling(grid), self.block, text_len)
        layout = cast(BlockLayout, on_device(found, None, text_len, None if q is None else q.device))
        return layout if q is None else self._for_heads(layout, q.shape[2])

    def kernel_layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> KernelLayout:
        """The windows in tile order: a block is a tile, and every visited block is full.

        Dense attention under a mask ("sdpa") computes every pair in any order, and takes no padding: it gets `layout`.
        """
        self.check_grid(grid, text_len)
        if self.backend == "sdpa":
            return self.layout(grid=grid, text_len=text_len, q=q, layer=layer)
        layout, order = _in_tile_order(self._tiling(grid), text_len)
        return on_device(layout, order, text_len, None if q is None else q.device)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid,
        text_len: int = 0,
        layer: int = 0,
        text_valid: Tensor | None = None,
        layout: KernelLayout | None = None,
    ) -> Tensor:
        self.check_tokens(q, k, v, grid=grid, text_len=text_len, text_valid=text_valid)
        if layout is None:
            with timed("layout", q.device):
                layout = self.kernel_layout(grid=grid, text_len=text_len, q=q, layer=layer)
        if isinstance(layout, OrderedLayout):
            layout = dataclasses.replace(layout, layout=self._for_heads(layout.layout, q.shape[2]))
        else:
            layout = self._for_heads(layout, q.shape[2])
        return super().attend(
            q, k, v, grid=grid, text_len=text_len, layer=layer, text_valid=text_valid, layout=layout
        )  # fmt: skip

    def _for_heads(self, layout: BlockLayout, heads: int) -> BlockLayout:
        """Repeat one round of windows over the heads. Rows are shared, so nothing but their addresses is copied."""
        n = layout.shape[1]
        if n in (1, heads):
            return layout
        if heads % n:
            raise ValueError(
                f"SlidingTile.windows_per_head must hold a number of windows that divides the heads, got {n} windows for "
                f"{heads} heads; list one for each head, or fewer that repeat."
            )
        return layout.derived(
            ("heads", heads),
            lambda one: dataclasses.replace(
                one, row_of=one.row_of.repeat(1, heads // n, 1),
                known_pairs=None if one.known_pairs is None else one.known_pairs * (heads // n),
            ),
        )  # fmt: skip


# ---------------------------------------------------------------- what is kept per grid


@dataclass(frozen=True)
class _Tiling:
    """Tiles of a grid, and the windows of one round of heads in tiles; hashable, so that layouts are kept by it."""

    grid: Grid
    tile: Grid
    windows: tuple[Grid, ...]

    @property
    def tiles(self) -> Grid:
        """Tiles along each axis."""
        F, H, W = (-(-n // t) for n, t in zip(self.grid, self.tile, strict=True))
        return F, H, W

    def ranges(self, window: Grid) -> list[tuple[Tensor, Tensor]]:
        """First and last tile, inclusive, that each tile sees along each axis."""
        rules = (Axis(n, w, 1, 1, False) for n, w in zip(self.tiles, window, strict=True))
        return [(lo, hi - 1) for lo, hi in (rule.windows() for rule in rules)]

    def pairs(self, window: Grid, text_len: int) -> int:
        """Attending pairs of one head."""
        pairs, N = 1, math.prod(self.grid)
        for n, t, (lo, hi) in zip(self.grid, self.tile, self.ranges(window), strict=True):
            edges = torch.arange(len(lo) + 1).mul(t).clamp(max=n)
            pairs *= int(((edges[1:] - edges[:-1]) * (edges[hi + 1] - edges[lo])).sum())
        return pairs + 2 * N * text_len + text_len**2


@lru_cache(maxsize=16)
def _in_tile_order(tiling: _Tiling, text_len: int) -> tuple[BlockLayout, PaddedTiles]:
    """The layout on the CPU over padded tiles and the text, and the order of the tiles."""
    with torch.device("cpu"):
        order = padded_tiles(tiling.grid, tiling.tile)
        size, n = order.tile_size, order.valid.shape[0]
        text = torch.arange(0, text_len, size)
        mask = torch.ones(1, len(tiling.windows), n + len(text), n + len(text), dtype=torch.bool)
        for head, window in enumerate(tiling.windows):
            mask[0, head, :n, :n] = outer([_sees(lo, hi) for lo, hi in tiling.ranges(window)])
        valid = torch.cat((order.valid, (text_len - text).clamp(max=size)))
        slots = order.perm.shape[0] + text_len
        layout = BlockLayout.from_block_mask(
            mask, q_len=slots, kv_len=slots, q_block=size, kv_block=size, q_valid=valid, kv_valid=valid
        )
        pairs = sum(tiling.pairs(window, text_len) for window in tiling.windows)
        return dataclasses.replace(layout, known_pairs=pairs), order


def _sees(lo: Tensor, hi: Tensor) -> Tensor:
    at = torch.arange(len(lo))
    return (lo[:, None] <= at) & (at <= hi[:, None])


@lru_cache(maxsize=16)
def _in_video_order(tiling: _Tiling, block: int, text_len: int) -> BlockLayout:
    """The layout on the CPU over the tokens as they come."""
    with torch.device("cpu"):
        at = torch.meshgrid(
            [torch.arange(n) // t for n, t in zip(tiling.grid, tiling.tile, strict=True)], indexing="ij"
        )
        tile = [x.flatten() for x in at]  # of each token, along each axis
        heads = []
        for window in tiling.windows:
            ranges = [(lo[i], hi[i]) for i, (lo, hi) in zip(tile, tiling.ranges(window), strict=True)]
            heads.append(
                BlockLayout.from_bounds(
                    Bounds.points(ranges, tile).with_free(text_len, text_len), q_block=block, kv_block=block,
                    known_pairs=tiling.pairs(window, text_len),
                )
            )  # fmt: skip
        return heads[0] if len(heads) == 1 else _stack_heads(heads)


def _stack_heads(heads: list[BlockLayout]) -> BlockLayout:
    """Make one layout of several for one head each. Bounds belong to tokens, whatever the head, so bitmaps replace them."""
    rows = starts = 0
    row_of, row_start, bitmaps = [], [], []
    for one in heads:
        entries = one.entries(torch.arange(one.nQ))
        partial = ~entries.full
        bitmaps.append(one.slabs(entries.row[partial], entries.col[partial], entries.slab[partial]))
        row_of.append(one.row_of + rows)
        row_start.append(one.row_start + starts)
        rows, starts = rows + one.nQ, starts + one.col_idx.shape[0]
    bitmap = torch.cat(bitmaps)
    return dataclasses.replace(
        heads[0],
        row_of=torch.cat(row_of, 1),
        row_start=torch.cat(row_start),
        n_partial=torch.cat([one.n_partial for one in heads]),
        n_full=torch.cat([one.n_full for one in heads]),
        col_idx=torch.cat([one.col_idx for one in heads]),
        bitmap=bitmap if len(bitmap) else None,
        bounds=None,
        known_pairs=sum(one.attended_pairs for one in heads),
    )
