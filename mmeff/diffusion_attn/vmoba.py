"""VMoBA: every query picks the chunks of the video that it attends to, by its products with their mean keys.

Paper: Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", 2025, arXiv:2506.23858. Written from a
description of KwaiVGI/VMoBA at 4da72ff, which has no licence; the cycle of layers is that of FastVideo at 2f3d407.

Differs:

* any grid: chunks at the far edges are smaller where the published code asserts that they divide, and count for what they
  hold in means and in attention;
* text, which the published code does not know: every query attends to it, and it attends to everything;
* only chunks that a query does not belong to compete, in every scope;
* a query always attends to its own chunk, so that nothing falls back to dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmeff.config import option
from mmeff.diffusion_attn._base import Expected, Grid, SparseAttention, timed
from mmeff.diffusion_attn._checks import require_finite
from mmeff.diffusion_attn._ordered import KernelLayout
from mmeff.errors import suggest
from mmeff.kernels import BlockLayout, routed_attention
from mmeff.kernels.calibration import sparse_ratio
from mmeff.kernels.permute import padded_tiles
from mmeff.kernels.routed.op import relative_cost
from mmeff.kernels.selection import SCOPES, minmax_cumulative, pool, query_scores, top_k_with_self
from mmeff.registry import register

_CONFIGS = "FastVideo at 2f3d407, its configuration for 77 frames of 480 x 832"
_CYCLE = ((2,), (3, 4), (4, 6, 4))
_DEFAULT_THRESHOLD = 0.25
# Bytes of scores at a time, where queries or heads choose apart from each other.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}

_PRESETS: dict[str, dict[str, Any]] = {
    "77x480x832": {"dense_steps": 12},
    "77x480x832-topk": {"top_k": (3, 20, 15), "dense_steps": 12},
    "77x448x832": {"chunks": ((2,), (4, 13), (4, 4, 13)), "top_k": (2, 6, 18), "dense_steps": 12},
    "speed-test": {"chunks": ((7, 5, 13),), "threshold": 0.3},
}


@dataclass(frozen=True, eq=False)
class Partition:
    """The chunks of a grid. Slots are tokens in chunk order, every chunk filled up to `size`."""

    size: int  # slots of a chunk
    valid: Tensor  # (chunks,) int32, tokens of each chunk, at its start
    chunk_of: Tensor  # (F*H*W,) int64, the chunk of each token
    slots: Tensor | None  # (chunks * size,) int64, the token of each slot; None where tokens stay as they are
    even: bool  # whether all chunks are full

    @property
    def own(self) -> Tensor:
        """(F*H*W, chunks) bool: the chunk that each token belongs to."""
        return self.chunk_of[:, None] == torch.arange(self.valid.shape[0], device=self.valid.device)


@dataclass(frozen=True, eq=False)
class Routes:
    """What every query picked.

    picked: (B, H, F*H*W, chunks) bool, for queries in the order of the video. chunk_of: (F*H*W,) the chunk of each token.
    """

    picked: Tensor
    chunk_of: Tensor

    @property
    def density(self) -> float:
        """Fraction of the query-key pairs of the video that attend, 0 to 1."""
        tokens = torch.bincount(self.chunk_of, minlength=self.picked.shape[-1])
        pairs = (self.picked.sum((0, 1, 2)) * tokens).sum()
        return int(pairs) / (math.prod(self.picked.shape[:3]) * self.chunk_of.shape[0])

    def to_dense_mask(self, text_len: int = 0) -> Tensor:
        """Return the attention mask (B, H, N, N), text included. For tests and small problems."""
        return F.pad(self.picked[..., self.chunk_of], (0, text_len, 0, text_len), value=True)


@register
@dataclass(frozen=True, kw_only=True)
class VMoBA(SparseAttention):
    """Queries pick chunks of the video by their mean keys; layers take turns in how the video is cut.

    The defaults are those published for 77 frames of 480 x 832; `for_model` has others. A `top_k` of at least the number of
    chunks is dense attention.
    """

    source: ClassVar[str] = "arXiv:2506.23858; KwaiVGI/VMoBA at 4da72ff; FastVideo at 2f3d407"
    dynamic: ClassVar[bool] = True

    threshold: float | None = option(
        _DEFAULT_THRESHOLD,
        "share of a query's summed chunk scores, stretched to [0, 1], that its chunks must hold; None with top_k",
        unit="ratio",
        source="the authors' default",
    )
    top_k: int | tuple[int, ...] | None = option(
        None,
        "chunks per query, its own included, instead of the threshold; a list has one number per entry of chunks",
        unit="chunks",
        source=f"3, 20 and 15 in {_CONFIGS}",
    )
    chunks: tuple[tuple[int | float, ...], ...] = option(
        _CYCLE,
        "how layers cut the video, in turns: (frames,), also in fractions; (rows, columns) through all frames; or "
        "(frames, rows, columns)",
        unit="frames and tokens",
        source=_CONFIGS,
    )
    scope: Literal["query_head", "head_global", "block", "overall"] = option(
        "query_head",
        "who shares a threshold or budget: each query of each head, all queries of a head, all of a chunk, or all",
        source="the authors' code; head_global is the paper's global selection",
    )
    first_layer: int = option(0, "layer that the turns of chunks are counted from", unit="layers", source=_CONFIGS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.threshold == _DEFAULT_THRESHOLD:
            object.__setattr__(self, "threshold", None)  # so that the config says what runs
        self.require(
            (self.threshold is None) != (self.top_k is None),
            "threshold",
            f"be {'None where top_k is given' if self.top_k is not None else 'a number where top_k is None'}",
            "pass either of the two",
        )
        in_range = self.threshold is None or 0 <= self.threshold <= 1
        self.require(in_range, "threshold", "be in [0, 1]", "the authors use 0.25")
        self.require(len(self.chunks) > 0, "chunks", "hold at least one way to cut", f"the published cycle is {_CYCLE}")
        for chunk in self.chunks:
            positive = all(math.isfinite(c) and c > 0 for c in chunk)
            whole = len(chunk) == 1 or all(type(c) is int for c in chunk)
            self.require(
                1 <= len(chunk) <= 3 and positive and whole,
                "chunks",
                "hold (frames,), (rows, columns) or (frames, rows, columns), positive, and whole but for the first kind",
                f"the published cycle is {_CYCLE}",
            )
        if self.top_k is not None:
            counts = (self.top_k,) if isinstance(self.top_k, int) else self.top_k
            fits = isinstance(self.top_k, int) or len(counts) == len(self.chunks)
            self.require(fits, "top_k", f"have one number per entry of chunks ({len(self.chunks)}), or be one number")
            self.require(min(counts) >= 1, "top_k", "be >= 1 chunk, a query's own")
            self.require(
                self.scope != "block",
                "scope",
                "not be 'block' with top_k, which counts chunks per query",
                "pass a threshold, or another scope",
            )
        self.require(self.first_layer >= 0, "first_layer", "be >= 0", "it is the id of a layer")

    @classmethod
    def for_model(cls, model: str, **fields: Any) -> VMoBA:
        """The setting published for a size of video, with some fields changed.

        Args:
            model: frames x height x width of the video: 77x480x832 (threshold), 77x480x832-topk (the counts that the same
                configuration carries), 77x448x832; or speed-test (81x480x832, one 3-D cut into chunks of 455 tokens).
        Raises: ValueError for a size without a setting; TypeError for unknown fields.
        """
        found = _PRESETS.get(model.lower())
        if found is None:
            raise ValueError(
                f"VMoBA.for_model has no published setting for {model!r}.{suggest(model, _PRESETS)} Known: "
                f"{', '.join(_PRESETS)}; pass VMoBA(chunks=...) for other sizes."
            )
        return cls(**{**found, **fields})

    def check_grid(self, grid: Grid, text_len: int = 0) -> None:
        super().check_grid(grid, text_len)
        _, H, W = grid
        for chunk in self.chunks:
            if len(chunk) == 1 and int(chunk[0] * H * W) < 1:
                raise ValueError(
                    f"VMoBA.chunks must make chunks of at least one token, got {chunk[0]} frames of {H}*{W} tokens; pass at "
                    f"least {1 / (H * W):.3g}."
                )

    # ---------------------------------------------------------------- where

    def turn(self, layer: int) -> int:
        """The entry of `chunks` that a layer uses."""
        return (layer - self.first_layer) % len(self.chunks)

    def layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> BlockLayout:
        """Raise TypeError: queries choose one by one, so no layout of query blocks says what they attend to.

        `routes` returns what they picked.
        """
        raise TypeError(
            "VMoBA has no block layout, because every query picks its own chunks; VMoBA.routes(grid=..., q=..., k=...) "
            "returns the picks, and its to_dense_mask() the mask."
        )

    def routes(self, *, grid: Grid, q: Tensor, k: Tensor, text_len: int = 0, layer: int = 0) -> Routes:
        """The chunks that the queries of the video pick.

        Args:
            grid: (F, H, W). text_len: T. layer: the layer that asks.
            q, k: (B, N, H, D), N = F*H*W + T, video first, rotary embedding applied.
        Returns: Routes. Every query picks its own chunk, and under a threshold at least one more where there is one in its
            group.
        Raises: ValueError for tensors that do not fit the grid or, on a CPU, are not finite.
        Numerics: scores are unscaled products in float32 (float64 for float64 inputs); no gradient passes through them.
        """
        self.check_tokens(q, k, k, grid=grid, text_len=text_len)
        part = _partition(grid, self.chunks[self.turn(layer)], q.device)
        video = math.prod(grid)
        return Routes(self._pick(q[:, :video], _in_chunks(k[:, :video], part), part, layer), part.chunk_of)

    def layout_key(self, layer: int) -> Hashable:
        return self.turn(layer)

    def expect(self, *, grid: Grid, text_len: int = 0, layer: int = 0, ratio: float | None = None) -> Expected:
        self.check_grid(grid, text_len)
        q, k = self._random_tokens(grid, text_len)
        routes = self.routes(grid=grid, q=q, k=k, text_len=text_len, layer=layer)
        picks = int(routes.picked.sum()) / math.prod(routes.picked.shape[:3])
        ratio = sparse_ratio("cpu") if ratio is None else ratio
        cost = relative_cost(routes.density, picks, math.prod(grid) + text_len, ratio)
        return Expected(routes.density, 1 / cost)

    @torch.no_grad()
    def _pick(self, q: Tensor, k: Tensor, part: Partition, layer: int) -> Tensor:
        """(B, H, F*H*W, chunks) bool, for queries in the order of the video and keys in that of the chunks."""
        require_finite("VMoBA", q=q, k=k)
        own, axes = part.own, SCOPES[self.scope]
        means = pool(k, part.size, None if part.even else part.valid)
        picked = own.new_empty(q.shape[0], q.shape[2], *own.shape)
        for heads, rows in self._portions(q, own.shape[1]):
            scores = query_scores(q[:, rows, heads].to(means.dtype), means[:, :, heads], 1)
            if self.threshold is not None:
                chosen = minmax_cumulative(scores, self.threshold, own=own[rows], axes=axes)
            else:
                assert self.top_k is not None
                count = self.top_k if isinstance(self.top_k, int) else self.top_k[self.turn(layer)]
                chosen = top_k_with_self(scores, count, own=own[rows], axes=axes)
            # scores of NaN pick nothing, and no query may be left without keys
            picked[:, heads, rows] = chosen | own[rows]
        return picked

    def _portions(self, q: Tensor, chunks: int) -> Iterator[tuple[slice, slice]]:
        """Heads and queries that choose apart from the others, a bounded number of scores at a time."""
        B, N, H, _ = q.shape
        most = CHUNK_BYTES.get(q.device.type, CHUNK_BYTES["cpu"]) // (4 * B * chunks)  # pairs of a head and a query
        if self.scope == "query_head":
            step = max(1, most // H)
            yield from ((slice(None), slice(first, first + step)) for first in range(0, N, step))
        elif self.scope == "head_global":
            step = max(1, most // N)
            yield from ((slice(first, first + step), slice(None)) for first in range(0, H, step))
        else:
            yield slice(None), slice(None)

    # ---------------------------------------------------------------- attention

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
        """Attention of every query to the chunks that it picks, its own among them, and to the text.

        Args: as `SparseAttention.attend`; there is no layout to be passed.
        Returns: (B, N, H, D) in the dtype of q.
        Raises: as `SparseAttention.attend` and `routes`; TypeError for a layout.
        Numerics: those of `routed_attention`. Gradients are exact for the picks that were made.
        """
        if layout is not None:
            raise TypeError("VMoBA.attend takes no layout, because every query picks its own chunks; leave it out.")
        self.check_tokens(q, k, v, grid=grid, text_len=text_len, text_valid=text_valid)
        video = math.prod(grid)
        part = _partition(grid, self.chunks[self.turn(layer)], q.device)
        with timed("permute", q.device):
            k_chunks, v_chunks = _in_chunks(k[:, :video], part), _in_chunks(v[:, :video], part)
        with timed("selection", q.device):
            routes = self._pick(q[:, :video], k_chunks, part, layer)
            kv_valid = None if part.even else part.valid[None]
        if text_len:
            # text fills chunks of its own, which every query picks
            blocks = -(-text_len // part.size)
            routes = F.pad(routes, (0, blocks, 0, text_len), value=True)
            k_chunks, v_chunks = torch.cat((k_chunks, k[:, video:]), 1), torch.cat((v_chunks, v[:, video:]), 1)
            if text_valid is not None:
                used = torch.arange(text_len, device=q.device) < text_valid[:, None]
                routes[:, :, video:] &= used[:, None, :, None]
            if text_valid is not None or not part.even:
                lengths = text_valid if text_valid is not None else torch.full((1,), text_len, device=q.device)
                starts = torch.arange(blocks, device=q.device) * part.size
                text = (lengths[:, None] - starts).clamp(0, part.size).to(torch.int32)
                kv_valid = torch.cat((part.valid.expand(text.shape[0], -1), text), 1)
        return cast(
            Tensor,
            routed_attention(
                q, k_chunks, v_chunks, routes, kv_block=part.size, kv_valid=kv_valid, backend=self.backend
            ),
        )


@lru_cache(maxsize=64)
def _partition(grid: Grid, chunk: tuple[int | float, ...], device: torch.device) -> Partition:
    """Cut a grid, on the device; kept, because every step asks for the same few."""
    F, H, W = grid
    N = F * H * W
    with torch.inference_mode(False), torch.device("cpu"):
        if len(chunk) == 1:
            size = min(int(chunk[0] * H * W), N)
            valid = (N - torch.arange(0, N, size)).clamp(max=size)
            chunk_of = torch.arange(N) // size
            slots = None if N % size == 0 else torch.arange(len(valid) * size).clamp(max=N - 1)
        else:
            asked = (F, *chunk) if len(chunk) == 2 else chunk
            tile = tuple(min(int(c), n) for c, n in zip(asked, grid, strict=True))
            order = padded_tiles(grid, tile)
            size, valid, slots = order.tile_size, order.valid, order.perm
            chunk_of = order.inverse // size
        return Partition(
            size=size,
            valid=valid.to(device, torch.int32),
            chunk_of=chunk_of.to(device),
            slots=None if slots is None else slots.to(device),
            even=bool((valid == size).all()),
        )


def _in_chunks(x: Tensor, part: Partition) -> Tensor:
    """Video tokens (B, F*H*W, H, D) in chunk order. Slots of padding repeat a token; attention never reads them."""
    return x if part.slots is None else x.index_select(1, part.slots)
