"""Token permutations that make blocks of a sequence compact in the grid: tiles, dilation classes, space-filling curves.

A block of 128 raster tokens is a thin line through a video; after a permutation it is a small box, whose tokens
resemble each other and share their neighbourhood. Attention does not care about the order of tokens as long as
positions are already encoded, so a permutation may be applied once per model forward, before the first block, and undone
after the last. Methods of this library apply it within each layer, where it cannot disturb dense layers and caches: it took
1 to 9 % of the attention time on CPUs; on GPUs NATTEN reports a fifth.

The functions make a Permutation on the CPU; move it by `.to(device)` once and keep it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

O = TypeVar("O", bound="_Order")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class _Order:
    """What a permutation and a padded order share: an index of the new order and one of the way back."""

    perm: Tensor
    inverse: Tensor

    def __post_init__(self) -> None:
        for name in ("perm", "inverse"):
            _check_index(f"{type(self).__name__}.{name}", getattr(self, name), self.perm.device)

    def __len__(self) -> int:
        """Number of tokens."""
        return self.inverse.shape[0]

    def __call__(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return a copy of x with the tokens along `dim` in the new order."""
        self._check_tokens(x, dim, len(self), "permute")
        return x.index_select(dim, self.perm)

    def undo(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return a copy of x with the tokens along `dim` back in the original order."""
        self._check_tokens(x, dim, self.perm.shape[0], "undo")
        return x.index_select(dim, self.inverse)

    def to(self: O, device: torch.device | str) -> O:
        """Return this order on `device`; itself when it is there already."""
        with torch.inference_mode(False):  # as in _index
            tensors = {
                f.name: value.to(device)
                for f in dataclasses.fields(self)
                if isinstance(value := getattr(self, f.name), Tensor)
            }
        if all(moved is getattr(self, name) for name, moved in tensors.items()):
            return self
        return dataclasses.replace(self, **cast(Any, tensors))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(N={len(self)}, {self.perm.device})"

    def _check_tokens(self, x: Tensor, dim: int, wanted: int, what: str) -> None:
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != wanted:
            raise ValueError(
                f"{type(self).__name__}: to {what}, axis {dim} of x must hold {wanted} tokens, got shape "
                f"{tuple(x.shape)}; name the token axis by dim, and take text behind the grid along by with_tail."
            )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Permutation(_Order):
    """An order of N tokens and its inverse. Call it to permute a token axis, `undo` to go back.

    Args:
        perm: (N,) int64; position i of the new order holds token perm[i].
        inverse: (N,) int64; token t sits at position inverse[t] of the new order.

    Raises: ValueError for tensors of another shape, dtype or device. `of` also checks that perm is a permutation.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perm.shape != self.inverse.shape:
            raise ValueError(
                f"Permutation: perm and inverse must be equally long, got {self.perm.shape[0]} and "
                f"{self.inverse.shape[0]}; Permutation.of(perm) makes the inverse."
            )

    @classmethod
    def of(cls, perm: Tensor) -> Permutation:
        """Make a permutation of an order, checking that it is one (which synchronises with the device).

        Raises: ValueError unless perm is int64 (N,) and holds every number below N once.
        """
        _check_index("Permutation.of: perm", perm, getattr(perm, "device", None))
        with torch.inference_mode(False):  # as in _index
            ordered, inverse = torch.sort(perm)
        N = perm.shape[0]
        if not torch.equal(ordered, torch.arange(N, device=perm.device)):
            raise ValueError(
                f"Permutation.of: perm must hold every number from 0 to {N - 1} once, got {N} numbers from "
                f"{int(ordered[0])} to {int(ordered[-1])}, {torch.unique(perm).shape[0]} of them different."
            )
        return Permutation(perm=perm, inverse=inverse)

    def then(self, other: Permutation) -> Permutation:
        """Return the permutation that does this one first and `other` on its result.

        Raises: ValueError if the two are of different lengths.
        """
        if len(self) != len(other):
            raise ValueError(
                f"Permutation.then: both must permute equally many tokens, got {len(self)} and {len(other)}; "
                "with_tail adds the tokens behind the grid."
            )
        with torch.inference_mode(False):  # as in _index
            return Permutation(perm=self.perm[other.perm], inverse=other.inverse[self.inverse])

    def with_tail(self, tokens: int) -> Permutation:
        """Return the permutation of a longer sequence whose last `tokens` tokens (text) stay in place.

        Raises: ValueError unless tokens is a number >= 0.
        """
        if not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"Permutation.with_tail: tokens must be an int >= 0, got {tokens!r}; count the text.")
        with torch.inference_mode(False):  # as in _index
            tail = torch.arange(len(self), len(self) + tokens, device=self.perm.device)
            return Permutation(perm=torch.cat((self.perm, tail)), inverse=torch.cat((self.inverse, tail)))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class GroupedPermutation(Permutation):
    """A permutation that makes the tokens of each group (a tile, a dilation class) contiguous.

    Args:
        perm, inverse: as in Permutation.
        counts: (groups,) int64, tokens in each group, in the order of the groups.
        groups: groups along each axis of the grid; their raster order is the order in the sequence.
    """

    counts: Tensor
    groups: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class PaddedTiles(_Order):
    """Tiles padded to equal size, so that each is one block of a layout. Used like a Permutation.

    Args:
        perm: (tiles * tile_size,) int64, the token of each slot; slots of padding repeat some token of the tile.
        inverse: (N,) int64, the slot of each token.
        valid: (tiles,) int64, tokens of each tile; they come first in it, then its padding.
        tiles: tiles along each axis of the grid.
        tile_size: slots of a tile.

    Raises: ValueError for tensors that do not fit each other.
    """

    valid: Tensor
    tiles: tuple[int, ...]
    tile_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_index("PaddedTiles.valid", self.valid, self.perm.device)
        if self.perm.shape[0] != self.valid.shape[0] * self.tile_size:
            raise ValueError(
                f"PaddedTiles: perm must hold {self.valid.shape[0]} tiles of {self.tile_size} slots, got "
                f"{self.perm.shape[0]}; padded_tiles(grid, tile) makes one."
            )

    def __call__(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return x in tile order along `dim`, with zeros in the slots of padding."""
        slots = super().__call__(x, dim)
        padding = torch.arange(self.tile_size, device=x.device) >= self.valid[:, None]
        return slots.masked_fill(padding.flatten().view(-1, *[1] * (x.ndim - 1 - dim % x.ndim)), 0)


def identity(N: int) -> Permutation:
    """Return the permutation of N tokens that changes nothing.

    Raises: ValueError or TypeError unless N is a positive int.
    """
    (N,) = _extents("identity", "N", (N,))
    return Permutation(perm=_index(np.arange(N)), inverse=_index(np.arange(N)))


def tile_permutation(grid: tuple[int, ...], tile: tuple[int, ...]) -> GroupedPermutation:
    """Make the tokens of each tile of a 1- to 3-D grid contiguous.

    Args:
        grid: extents of the token grid, the last one running fastest, e.g. (F, H, W).
        tile: extents of a tile. Where they do not divide the grid, the tiles at the far edges are smaller.

    Returns: a GroupedPermutation; tiles and the tokens within a tile are in raster order, `counts` are the tokens of
        each tile.
    Raises: ValueError or TypeError for extents that are not positive integers or do not fit each other.
    """
    grid, tile = _grid_and("tile_permutation", grid, "tile", tile)
    groups = tuple(-(-n // t) for n, t in zip(grid, tile, strict=True))
    return _group(grid, [np.arange(n) // t for n, t in zip(grid, tile, strict=True)], groups)


def padded_tiles(grid: tuple[int, ...], tile: tuple[int, ...]) -> PaddedTiles:
    """Make the tokens of each tile contiguous and pad every tile to its full size.

    Args: as for `tile_permutation`.
    Returns: a PaddedTiles, whose `valid` counts tell attention which slots are tokens. Without ragged tiles it equals
        the tile permutation.
    Raises: ValueError or TypeError for extents that are not positive integers or do not fit each other.
    Source: the tiles of VSA (Zhang et al., 2025, arXiv:2505.13389).
    """
    grid, tile = _grid_and("padded_tiles", grid, "tile", tile)
    ragged, size = tile_permutation(grid, tile), math.prod(tile)
    counts, n = ragged.counts.numpy(), len(ragged.counts)
    starts = np.cumsum(counts) - counts
    slots = starts[:, None] + np.minimum(np.arange(size), counts[:, None] - 1)
    tile_of = np.repeat(np.arange(n), counts)
    slot_of = np.arange(len(ragged)) + (tile_of * size - starts[tile_of])
    return PaddedTiles(
        perm=_index(ragged.perm.numpy()[slots.reshape(-1)]),
        inverse=_index(slot_of[ragged.inverse.numpy()]),
        valid=ragged.counts,
        tiles=ragged.groups,
        tile_size=size,
    )


def dilation_permutation(grid: tuple[int, ...], dilation: tuple[int, ...]) -> GroupedPermutation:
    """Make the tokens of each dilation class contiguous: those with equal coordinates modulo the dilation.

    Dilated neighbourhood attention never leaves a class, and within a class it is the undilated kind.

    Args:
        grid: extents of the token grid, the last one running fastest.
        dilation: distance of neighbours along each axis, at most its extent.

    Returns: a GroupedPermutation; the tokens of a class are in raster order, `counts` are the tokens of each class.
        Classes differ in size where the dilation does not divide the grid.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    """
    grid, dilation = _grid_and("dilation_permutation", grid, "dilation", dilation)
    if any(d > n for d, n in zip(dilation, grid, strict=True)):
        raise ValueError(
            f"dilation_permutation: dilation must be <= the grid {grid} along each axis, got {dilation}; a larger one "
            "leaves classes without tokens."
        )
    return _group(grid, [np.arange(n) % d for n, d in zip(grid, dilation, strict=True)], dilation)


def gilbert_permutation(grid: tuple[int, ...], axes: tuple[int, ...] | None = None) -> Permutation:
    """Order the tokens of a 1- to 3-D grid along a generalised Hilbert curve, for extents of any size.

    Consecutive tokens are neighbours, and stretches of the curve fill compact boxes. If all extents are even, every
    step is along one axis. Odd extents bring diagonal steps: at most one in a 2-D grid, under 1 % in a video.

    Args:
        grid: extents of the token grid, the last one running fastest.
        axes: the order in which axes of equal extent take precedence, the first being the main direction of the curve.
            None is (0, 1, ...); Rectified SpaAttn and Jenga order a video (F, H, W) by (2, 1, 0).

    Returns: a Permutation, cached per grid and axes. It starts at the origin of the grid.
    Raises: ValueError or TypeError for extents that are not positive integers, or axes that are not an order of them.
    Numerics: exact.
    Source: the generalised Hilbert curve known as "Gilbert" (J. Červený), by halving boxes.
    Differs: written anew, level by level on arrays of boxes instead of token by token.
    """
    grid = _extents("gilbert_permutation", "grid", grid)
    order = tuple(range(len(grid))) if axes is None else tuple(axes)
    if sorted(order) != list(range(len(grid))):
        raise ValueError(
            f"gilbert_permutation: axes must name each of the {len(grid)} axes of the grid once, got {axes}; "
            "(2, 1, 0) starts with the fastest."
        )
    return _gilbert(grid, order)


# ---------------------------------------------------------------- parts


def _index(x: np.ndarray[Any, Any]) -> Tensor:
    # an index made during inference must stay usable in training
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))


def _group(grid: tuple[int, ...], per_axis: list[np.ndarray[Any, Any]], groups: tuple[int, ...]) -> GroupedPermutation:
    """Sort raster tokens by group, given the group of every coordinate along each axis."""
    group = np.ravel_multi_index(np.meshgrid(*per_axis, indexing="ij"), groups).reshape(-1)
    perm = np.argsort(group, kind="stable")
    return GroupedPermutation(
        perm=_index(perm),
        inverse=_index(np.argsort(perm)),
        counts=_index(np.bincount(group, minlength=math.prod(groups))),
        groups=groups,
    )


@lru_cache(maxsize=32)
def _gilbert(grid: tuple[int, ...], order: tuple[int, ...]) -> Permutation:
    n = len(grid)
    by_extent = sorted(order, key=lambda axis: -grid[axis])  # stable: axes of equal extent stay in the given order
    sides = np.zeros((1, 3, 3), dtype=np.int64)  # (boxes, side, axis): each box is spanned by three signed sides
    for i in range(3):
        if i < n:
            sides[0, i, by_extent[i]] = grid[by_extent[i]]
        else:
            sides[0, i, i] = 1  # an axis the grid lacks
    points = _curve(np.zeros((1, 3), dtype=np.int64), sides)
    perm = np.ravel_multi_index(tuple(points[:, :n].T), grid)
    return Permutation(perm=_index(perm), inverse=_index(np.argsort(perm)))


def _curve(start: np.ndarray[Any, Any], sides: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Trace boxes one after another, each from its start to the far end of its first side.

    Args:
        start: (boxes, 3) the corner where the curve enters each box.
        sides: (boxes, 3, 3) three signed sides along different axes; the box reaches from the corner along them.

    Returns: (points, 3). Every round cuts each box that is not yet a line into two, three or five, in curve order.
    """
    while True:
        length = np.abs(sides).sum(2)
        w, h, d = length.T
        line = (length > 1).sum(1) <= 1
        if line.all():
            break
        long = ~line & (2 * w > 3 * h) & (2 * w > 3 * d)
        flat = ~line & ~long & (3 * h > 4 * d)
        deep = ~line & ~long & ~flat & (3 * d > 4 * h)
        cube = ~(line | long | flat | deep)
        pieces = np.select([line, long, flat, deep], [1, 2, 3, 3], 5)
        at = np.cumsum(pieces) - pieces
        new_start = np.empty((pieces.sum(), 3), dtype=np.int64)
        new_sides = np.empty((pieces.sum(), 3, 3), dtype=np.int64)
        for which, cut in ((line, _keep), (long, _cut_long), (flat, _cut_flat), (deep, _cut_deep), (cube, _cut_cube)):
            for i, (corner, spans) in enumerate(cut(start[which], *sides[which].transpose(1, 0, 2))):
                new_start[at[which] + i] = corner
                new_sides[at[which] + i] = np.stack(spans, 1)
        start, sides = new_start, new_sides
    points = length.max(1)
    step = (np.sign(sides) * (length > 1)[..., None]).sum(1)
    box = np.repeat(np.arange(len(points)), points)
    along = np.arange(len(box)) - (np.cumsum(points) - points)[box]
    return start[box] + step[box] * along[:, None]


# How each kind of box is cut. a is the side that the curve runs along, from corner p to the far end of a; b and c are
# the others. Each piece enters next to where the one before it left. Halves are even where possible: the curve ends
# beside its start, across an even side, without a diagonal step.

_Box = tuple[np.ndarray[Any, Any], tuple[np.ndarray[Any, Any], ...]]


def _half(side: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    n = np.abs(side).sum(1, keepdims=True)
    half = n // 2
    return np.sign(side) * (half + ((half % 2 == 1) & (n > 2)))


def _keep(p: Any, a: Any, b: Any, c: Any) -> list[_Box]:
    return [(p, (a, b, c))]


def _cut_long(p: Any, a: Any, b: Any, c: Any) -> list[_Box]:
    """Two halves of a, one after the other."""
    a1 = _half(a)
    return [(p, (a1, b, c)), (p + a1, (a - a1, b, c))]


def _cut_flat(p: Any, a: Any, b: Any, c: Any) -> list[_Box]:
    """Along b to its half, along all of a in the other half of b, and back along b."""
    a1, b1 = _half(a), _half(b)
    return [
        (p, (b1, c, a1)),
        (p + b1, (a, b - b1, c)),
        (p + _end(a) + _end(b1), (-b1, c, a1 - a)),
    ]


def _cut_deep(p: Any, a: Any, b: Any, c: Any) -> list[_Box]:
    """As for a flat box, with c in the place of b."""
    a1, c1 = _half(a), _half(c)
    return [
        (p, (c1, a1, b)),
        (p + c1, (a, b, c - c1)),
        (p + _end(a) + _end(c1), (-c1, a1 - a, b)),
    ]


def _cut_cube(p: Any, a: Any, b: Any, c: Any) -> list[_Box]:
    """Five pieces: up b, up c behind it, along all of a at the top, and down again the same way."""
    a1, b1, c1 = _half(a), _half(b), _half(c)
    return [
        (p, (b1, c1, a1)),
        (p + b1, (c, a1, b - b1)),
        (p + _end(b1) + _end(c), (a, -b1, c1 - c)),
        (p + _end(a) + b1 + _end(c), (-c, a1 - a, b - b1)),
        (p + _end(a) + _end(b1), (-b1, c1, a1 - a)),
    ]


def _end(side: Any) -> Any:
    """From the first to the last token of a side."""
    return side - np.sign(side)


def _check_index(name: str, x: object, device: torch.device | None) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.ndim != 1 or not x.numel() or x.device != device:
        got = f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a non-empty int64 tensor of shape (N,) on {device}, got {got}.")


def _extents(who: str, name: str, values: tuple[int, ...]) -> tuple[int, ...]:
    values = tuple(values)
    if not 1 <= len(values) <= 3:
        raise ValueError(f"{who}: {name} must have 1 to 3 extents, got {values}; a video is (F, H, W).")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{who}: {name} must be integers (tokens), got {value!r} in {values}.")
        if value < 1:
            raise ValueError(f"{who}: {name} must be >= 1 token along each axis, got {values}.")
    return values


def _grid_and(
    who: str, grid: tuple[int, ...], name: str, values: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    grid, values = _extents(who, "grid", grid), _extents(who, name, values)
    if len(grid) != len(values):
        raise ValueError(f"{who}: {name} must have one extent per axis of the grid {grid}, got {values}.")
    return grid, values
