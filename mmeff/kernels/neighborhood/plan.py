"""How a grid is cut into tiles of queries, each with the box of keys that contains all their windows.

Each axis is cut on its own. A tile is `t` successive positions of one dilation class, aligned to the groups of the
stride, and `u` successive positions that contain the windows of all of them. All tiles of an axis share t and u: a
short last tile repeats its last query, and a box near a border starts early enough to fit. Tiles that look alike from
within (same masks, same offsets) are one *kind*; a tile of the grid is a product of axis tiles, and its mask is made
once for every combination of kinds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .rule import Axis, Rule, outer

# The model of a tile's time, in multiply-adds, fitted to one CPU core (float32, SDPA on 2..8 tiles, D 32 and 64):
SCORE_WORK = 20  # exponential and mask of one score
COPY_WORK = 12  # one gathered element
TILE_WORK = 7e4  # starting on one head of one tile: small products are slow
CALL_WORK = {"cpu": 1.2e7, "cuda": 1e9}  # starting one batch of tiles
CHUNK_WORK = 2e6  # handling one chunk, on CPU of about this many gathered elements:
CHUNK_ELEMENTS = 2**19
MASK_WORK = 100  # one element of a combination's mask
# Scores of one head of one tile at most, where a mask of that size is made: 4 MiB of float32 on CPU. Else four times that.
MAX_SCORES = {"cpu": 2**20, "cuda": 2**24}
# Rows that are addressed at a time, so that chunks of few large tiles do not wait for small index computations.
INDEX_ELEMENTS = 2**17
CANDIDATES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """The m tiles of one axis, and their K kinds."""

    queries: Tensor  # (m, t) coordinates
    real: Tensor  # (m, t) bool, False for the repeated queries of a short tile
    keys: Tensor  # (m, u) coordinates
    visible: Tensor  # (K, t, u) bool
    offset: Tensor | None  # (K, t, u) index on this axis of the relative bias, if there is one
    full: tuple[bool, ...]  # kinds that hide nothing
    members: tuple[Tensor, ...]  # the tiles of each kind


@dataclass(frozen=True, eq=False)
class Combination:
    """All tiles of the grid that are products of given kinds, one per axis."""

    plan: Plan
    kinds: tuple[int, ...]

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return math.prod(len(a.members[k]) for a, k in zip(self.plan.axes, self.kinds, strict=True))

    def visible(self) -> Tensor | None:
        """Return (Tq, U) bool, or None if every query sees the whole box."""
        axes = list(zip(self.plan.axes, self.kinds, strict=True))
        if all(a.full[k] for a, k in axes):
            return None
        return outer([a.visible[k] for a, k in axes])

    def bias_index(self) -> Tensor:
        """Return (Tq, U) indices into a head's flat relative bias."""
        return outer(self._offsets(), self.plan.rule.bias_shape)

    def collect_bias(self, dscores: Tensor) -> Tensor:
        """Sum (H, Tq, U) over the pairs that share an element of the relative bias: (H, *bias_shape).

        Products with 0/1 matrices, axis by axis, so that the sum has one order on every device.
        """
        tables = self._offsets()
        sizes = [x.shape for x in tables]
        x = dscores.reshape(-1, *(s[0] for s in sizes), *(s[1] for s in sizes))
        n = len(tables)
        x = x.permute(0, *itertools.chain.from_iterable((1 + a, 1 + n + a) for a in range(n)))
        x = x.reshape(-1, *(s[0] * s[1] for s in sizes))
        for table, size in zip(tables, self.plan.rule.bias_shape, strict=True):
            one_hot = torch.nn.functional.one_hot(table.flatten(), size).to(x.dtype)
            x = torch.tensordot(x, one_hot, dims=([1], [0]))  # moves the axis to the end: after all, in order again
        return x

    def chunks(self, B: int, T: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield up to `size` tiles at a time, of all B samples, as rows to read and write.

        Returns: queries (c, Tq), where their results go (c, Tq), and keys (c, U + T). The token n of sample b is row
            b N + n, its extra keys are rows B N + b T and on, and the repeated queries of short tiles go to row B N.
        """
        several = max(1, INDEX_ELEMENTS // (size * (self.plan.keys + T)))
        device = self.plan.axes[0].queries.device
        for flat in torch.arange(B * self.tiles, device=device).split(size * several):
            yield from zip(*(x.split(size) for x in self._rows(flat, B, T)), strict=True)

    def _rows(self, flat: Tensor, B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what chunks yields, of the tiles numbered `flat` over all samples."""
        plan, N = self.plan, self.plan.rule.N
        sample, rest = flat // self.tiles, flat % self.tiles
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        real: list[Tensor] = []
        for axis, kind in zip(reversed(plan.axes), reversed(self.kinds), strict=True):
            members = axis.members[kind]
            tile, rest = members[rest % len(members)], rest // len(members)
            for found, table in ((queries, axis.queries), (keys, axis.keys), (real, axis.real)):
                found.insert(0, table[tile])
        first = (sample * N)[:, None]
        rows, box = (first + _combine(x, plan.rule.grid) for x in (queries, keys))
        if T:
            box = torch.cat([box, B * N + sample[:, None] * T + torch.arange(T, device=box.device)], 1)
        return rows, rows if plan.whole else rows.where(_all_of(real), B * N), box

    def _offsets(self) -> list[Tensor]:
        offsets = []
        for a, k in zip(self.plan.axes, self.kinds, strict=True):
            assert a.offset is not None, "the plan was made without a relative bias"
            offsets.append(a.offset[k])
        return offsets


@dataclass(frozen=True, eq=False)
class Plan:
    """A cut of the whole grid."""

    rule: Rule
    axes: tuple[AxisTiles, ...]
    whole: bool  # no tile is short

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return math.prod(a.queries.shape[1] for a in self.axes)

    @property
    def keys(self) -> int:
        """Keys of a tile, without the extra ones."""
        return math.prod(a.keys.shape[1] for a in self.axes)

    def combinations(self) -> list[Combination]:
        """Return the combinations of kinds: together, every tile once."""
        return [Combination(self, kinds) for kinds in itertools.product(*(range(len(a.members)) for a in self.axes))]


def _all_of(masks: list[Tensor]) -> Tensor:
    """(c, a_i) masks per axis -> (c, prod a): where all hold."""
    total = masks[0]
    for x in masks[1:]:
        total = (total[:, :, None] & x[:, None]).flatten(1)
    return total


def _combine(coordinates: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """(c, a_i) coordinates per axis -> (c, prod a) flat tokens."""
    total = coordinates[0]
    for axis, x in enumerate(coordinates[1:], 1):
        total = (total[:, :, None] * grid[axis] + x[:, None]).flatten(1)
    return total


@dataclass(frozen=True, eq=False)
class _Cut:
    """Where the m tiles of an axis lie, before anything of size u is made."""

    u: int
    positions: Tensor  # (m, t) class positions of the queries
    real: Tensor  # (m, t) bool
    start: Tensor  # (m, 1) class position of the first key
    cls: Tensor  # (m, 1) class
    n: Tensor  # (m, 1) its length
    windows: Tensor  # (m, 2 t) lo and hi of each query, relative to start


def _cut(axis: Axis, t: int) -> _Cut:
    lo, hi = axis.windows()
    parts = []
    for n, classes in axis.class_lengths:
        a = torch.arange(0, n, t)[:, None] + torch.arange(t)
        p, r = a.clamp(max=n - 1), classes[0]  # classes of one length have the same windows
        parts.append((n, classes, p, a < n, lo[r :: axis.dilation][p], hi[r :: axis.dilation][p]))
    u = max(int((hi_p[:, -1] - lo_p[:, 0]).max()) for *_, lo_p, hi_p in parts)
    rows = []
    for n, classes, p, real, lo_p, hi_p in parts:
        start = lo_p[:, :1].clamp(max=max(0, n - u))
        windows = torch.cat([lo_p, hi_p], 1) - start
        cls = torch.tensor(list(classes)).repeat_interleave(len(p))[:, None]
        same = [x.repeat(len(classes), 1) for x in (p, real, start, windows)]
        rows.append((*same[:3], cls, torch.full_like(cls, n), same[3]))
    return _Cut(u, *(torch.cat(x) for x in zip(*rows, strict=True)))


def _signature(cut: _Cut, bias: bool) -> Tensor:
    """Return what tells tiles apart, a row each; without a relative bias, where the queries are does not matter."""
    return torch.cat([cut.windows, (cut.positions - cut.start)], 1) if bias else cut.windows


def cut_axis(axis: Axis, t: int, bias: bool, device: torch.device) -> AxisTiles:
    """Cut every class of the axis into tiles of t positions, with kinds as a relative bias needs them or does not."""
    cut = _cut(axis, t)
    queries = cut.positions * axis.dilation + cut.cls
    j = cut.start + torch.arange(cut.u)
    keys = torch.minimum(j, cut.n - 1) * axis.dilation + cut.cls

    kinds, kind = torch.unique(_signature(cut, bias), dim=0, return_inverse=True)
    lo, hi = (x[:, :, None] for x in kinds[:, : 2 * t].split(t, 1))
    b = torch.arange(cut.u)
    visible = (b >= lo) & (b < hi)
    offset = None
    if bias:
        offset = (b - kinds[:, 2 * t :, None] + axis.window - 1).clamp(0, 2 * axis.window - 2).to(device)
    members = tuple((kind == i).nonzero()[:, 0].to(device) for i in range(len(kinds)))
    full = tuple(visible.flatten(1).all(1).tolist())
    return AxisTiles(
        queries.to(device), cut.real.to(device), keys.to(device), visible.to(device), offset, full, members
    )


@lru_cache(maxsize=4096)
def _outline(axis: Axis, t: int, bias: bool) -> tuple[int, int, int, bool]:
    """Return what tiles of t positions would be: their number, u, number of kinds, whether any mask is needed."""
    cut = _cut(axis, t)
    kinds = torch.unique(_signature(cut, bias), dim=0)[:, : 2 * t]
    return len(cut.start), cut.u, len(kinds), not bool((kinds[:, :t] == 0).all() and (kinds[:, t:] == cut.u).all())


@dataclass(frozen=True)
class Sizes:
    """What the choice of tiles depends on besides the rule; hashable."""

    B: int
    H: int
    Hk: int
    D: int
    extra: int  # keys that every query sees
    bias: bool
    device: str  # its type


@lru_cache(maxsize=256)
def choose_tiles(rule: Rule, sizes: Sizes, unmasked: bool) -> tuple[tuple[int, ...], float]:
    """Return the tile of least work, positions per axis, and that work in multiply-adds.

    unmasked: only among tiles whose queries all see the whole box.
    """
    device = "cpu" if sizes.device == "cpu" else "cuda"
    options = []
    for axis in rule.axes:
        n, s = axis.class_length(0), axis.stride
        lengths = sorted({min(n, -(-c // s) * s) for c in CANDIDATES if c < n} | {n})
        outlines = [(t, *_outline(axis, t, sizes.bias)) for t in lengths]
        options.append([o for o in outlines if not (unmasked and o[4])])
    best: tuple[tuple[int, ...], float] | None = None
    for combination in itertools.product(*options):
        ts = tuple(o[0] for o in combination)
        tiles, u, kinds = (math.prod(o[i] for o in combination) for i in (1, 2, 3))
        masked = sizes.bias or any(o[4] for o in combination)
        rows, keys = math.prod(ts), u + sizes.extra
        if rows * keys > MAX_SCORES[device] * (1 if masked else 4) and best is not None:
            continue
        scores = rows * keys * _per_score(sizes.D) + TILE_WORK
        copies = (rows * sizes.H + keys * sizes.Hk) * 2 * sizes.D * COPY_WORK
        mask = rows * keys * (sizes.H if sizes.bias else 1) * MASK_WORK if masked else 0
        chunk = CHUNK_WORK * min(1.0, keys * sizes.Hk * 2 * sizes.D / CHUNK_ELEMENTS)
        work = sizes.B * tiles * (sizes.H * scores + copies + chunk) + kinds * (CALL_WORK[device] + mask)
        if best is None or work < best[1]:
            best = ts, work
    assert best is not None, "the backend was asked for a problem that it cannot run"
    return best


def dense_work(sizes: Sizes, N: int) -> float:
    """Return what plain dense attention over the grid and the extra keys costs, in the units of choose_tiles."""
    return sizes.B * sizes.H * N * (N + sizes.extra) * _per_score(sizes.D)


def _per_score(D: int) -> int:
    return 2 * D + SCORE_WORK


@lru_cache(maxsize=32)
def make_plan(rule: Rule, tile: tuple[int, ...], bias: bool, device: torch.device) -> Plan:
    """Cut the grid; plans are kept, because the layers of a network share them."""
    with torch.inference_mode(False):  # a plan made in inference mode must serve training later
        axes = tuple(cut_axis(axis, t, bias, device) for axis, t in zip(rule.axes, tile, strict=True))
        return Plan(rule, axes, whole=all(bool(a.real.all()) for a in axes))
