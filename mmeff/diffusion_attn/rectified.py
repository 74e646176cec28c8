"""Rectified SpaAttn: block-sparse attention that gives the keys it skips their estimated share of the output.

Paper: Liu et al., "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation", 2025,
arXiv:2511.19835. Written from a description of BienLuky/Rectified-SpaAttn at 4b0aa10, which has no licence.

A softmax over the visited keys alone acts as if the skipped ones did not exist, so it weighs the visited ones too high. Mean
queries and keys estimate the share p of attention that every key block receives. The visited blocks get their share back,
and a skipped block contributes its share of its mean value:

    O = R * O_visited + sum of p_j * V_j over the skipped blocks that are worth it,     R = 1 - the sum of those p_j

Text keys are too unlike each other for a mean: each is scored by itself ("isolated pooling", IPAR). A skipped block is worth
its mean where the products of the means exceed what they may be wrong by ("gain-aware", GAPR).

Differs:

* any lengths, a batch with prompts of its own length per sample: means and shares are those of the tokens that a block
  really holds, where the published code pads and counts 128 for each;
* blocks of the first frame are those that hold its tokens, where the published code takes the first blocks of the curve,
  which are a corner of the video;
* drop=0 visits everything; a block that holds video and text is visited, and its queries visit everything;
* gradients, exact for the blocks that were selected;
* any other method may say what is visited (`base`). A block that it visits in part counts by the share of its pairs: the rest
  of the block gets the same share of what the block is worth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmeff.config import option
from mmeff.diffusion_attn._base import Grid, SparseAttention, timed
from mmeff.diffusion_attn._checks import require_finite
from mmeff.diffusion_attn._ordered import KernelLayout, OrderedLayout
from mmeff.errors import suggest
from mmeff.kernels import BlockLayout, block_sparse_attention
from mmeff.kernels.dispatch import without_autocast
from mmeff.kernels.permute import gilbert_permutation, identity
from mmeff.kernels.selection import (
    blocks_holding,
    diagonal,
    neighbours,
    pool,
    pooled_probabilities,
    pooled_scores,
    text,
    top_p,
)
from mmeff.registry import register

_SCRIPTS = "scripts of BienLuky/Rectified-SpaAttn at 4b0aa10"
# Bytes that the distances of tokens from their block's mean take at a time.
CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
# Fields that choose blocks, and have nothing to say where a base does.
_CHOICE = ("drop", "p_threshold", "block", "order", "first_frame", "neighbours")

# The published schedules. They count forwards of one guidance branch; here two of those are one step.
_PRESETS: dict[str, dict[str, Any]] = {
    "hunyuanvideo": {"drop": 0.8, "first_frame": False, "dense_steps": 0, "dense_layers": 0},
    "wan2.1-t2v-14b": {},
    "wan2.1-i2v-14b": {"dense_steps": 0},
    "wan2.2-ti2v-5b": {},
    "wan2.2-t2v-a14b": {"drop": 0.85, "dense_steps": 3},
    "wan2.2-i2v-a14b": {"drop": 0.85, "dense_steps": 0},
    "cogvideox1.5-t2v": {"drop": 0.85, "first_frame": False, "dense_steps": 5, "dense_layers": 0},
    "cogvideox1.5-i2v": {"first_frame": False, "dense_steps": 5, "dense_layers": 0},
    "flux": {"drop": 0.9, "first_frame": False, "dense_steps": 0, "dense_layers": tuple(range(37, 57))},
}


class Cut(NamedTuple):
    """How the video part of a sequence is cut into blocks."""

    slots: int  # slots of the video, padding included
    q_block: int
    kv_block: int
    q_valid: Tensor | None  # (1, nQ) tokens of the video in each block; None where only the last may be short
    kv_valid: Tensor | None


@register
@dataclass(frozen=True, kw_only=True)
class RectifiedSpaAttn(SparseAttention):
    """Top blocks by pooled scores, rectified: skipped blocks keep their estimated share by their mean values.

    The defaults are the authors' for Wan2.1-T2V-14B; `for_model` has those of other models. drop=0 is dense attention.
    """

    source: ClassVar[str] = "arXiv:2511.19835; BienLuky/Rectified-SpaAttn at 4b0aa10"

    drop: float = option(
        0.75, "key blocks that a query block may skip, of all", unit="ratio", source=f"Wan2.1-T2V-14B, {_SCRIPTS}"
    )
    p_threshold: float = option(
        0.3, "share of attention that the visited blocks hold at least, by the estimate", unit="ratio", source=_SCRIPTS
    )
    block: int = option(128, "tokens in a query block and in a key block", unit="tokens", source="the authors' kernel")
    order: Literal["gilbert", "raster"] = option(
        "gilbert",
        "order in which the video is cut: along a space-filling curve, or as it is",
        source="the authors' code",
    )
    first_frame: bool = option(
        True, "blocks that hold tokens of the first of several frames visit each other", source="true for Wan"
    )
    neighbours: bool = option(
        True, "blocks visit those that they touch in the video, diagonally too", source="the authors' code"
    )
    rectify: bool | Literal["ipar", "gapr"] = option(
        True,
        "what is done about skipped blocks: all of it; 'ipar' without the gain test; 'gapr' with text pooled like the "
        "video; or nothing",
        source="the parts that the paper ablates",
    )
    base: SparseAttention | None = option(  # noqa: RUF009 - a field like the others
        None,
        "a method that says what is visited, in place of the estimate; its schedule keeps calls dense beside this one's",
        source="not in the paper",
    )
    dense_steps: int = option(
        5, "first denoising steps that run dense", unit="steps", source=f"Wan2.1-T2V-14B, 10 forwards, {_SCRIPTS}"
    )
    dense_layers: int | tuple[int, ...] = option(
        2,
        "layers that run dense: a number n means the first n; a list names them, negative ones from the end",
        unit="layers",
        source=f"Wan2.1-T2V-14B, {_SCRIPTS}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.drop <= 1, "drop", "be in [0, 1]", "the authors use 0.75 to 0.9")
        self.require(0 <= self.p_threshold <= 1, "p_threshold", "be in [0, 1]", "the authors use 0.3")
        self.require(self.block >= 1, "block", "be >= 1 token", "the authors use 128")
        if self.base is None:
            return
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in _CHOICE:
            self.require(
                getattr(self, name) == defaults[name],
                name,
                f"be left at {defaults[name]!r} where base is given",
                "the base says what is visited",
            )
        nested = isinstance(self.base, RectifiedSpaAttn)
        self.require(not nested, "base", "be another method", "what is rectified once is not rectified again")
        self.require(self.base.backend == "auto", "base", "have backend='auto'", "the backend of this method runs")

    @classmethod
    def for_model(cls, model: str, **fields: Any) -> RectifiedSpaAttn:
        """The authors' setting for a model, with some fields changed. With a `base`, only its schedule.

        Args:
            model: one of hunyuanvideo, wan2.1-t2v-14b, wan2.1-i2v-14b, wan2.2-ti2v-5b, wan2.2-t2v-a14b, wan2.2-i2v-a14b,
                cogvideox1.5-t2v, cogvideox1.5-i2v, flux. Both experts of Wan2.2-A14B keep their own first two layers dense;
                the first step of its low-noise expert, which the authors keep dense too, lies where its boundary does
                and is not in the setting.
        Raises: ValueError for a model without a setting; TypeError for unknown fields.
        """
        found = _PRESETS.get(model.lower())
        if found is None:
            raise ValueError(
                f"RectifiedSpaAttn.for_model has no published setting for {model!r}.{suggest(model, _PRESETS)} "
                f"Known: {', '.join(_PRESETS)}; pass RectifiedSpaAttn(drop=...) for other models."
            )
        if fields.get("base") is not None:
            found = {name: value for name, value in found.items() if name not in _CHOICE}
        return cls(**found).replace(**fields)

    # ---------------------------------------------------------------- when

    def dense_layer_ids(self, num_layers: int) -> frozenset[int]:
        own = super().dense_layer_ids(num_layers)
        return own if self.base is None else own | self.base.dense_layer_ids(num_layers)

    def is_dense(self, *, step: int | None, num_steps: int | None, layer: int, num_layers: int) -> bool:
        call: dict[str, Any] = {"step": step, "num_steps": num_steps, "layer": layer, "num_layers": num_layers}
        return super().is_dense(**call) or (self.base is not None and self.base.is_dense(**call))

    def at_every_step(self) -> RectifiedSpaAttn:
        own = super().at_every_step()
        return own if own.base is None else own.replace(base=own.base.at_every_step())

    def check_steps(self, num_steps: int) -> None:
        super().check_steps(num_steps)
        if self.base is not None:
            self.base.check_steps(num_steps)

    @property
    def counts_steps(self) -> bool:
        return super().counts_steps or (self.base is not None and self.base.counts_steps)

    # ---------------------------------------------------------------- where

    @property
    def dynamic(self) -> bool:  # type: ignore[override]
        """Whether what is visited depends on q and k: not so over a static base."""
        return self.base is None or self.base.dynamic

    def layout_key(self, layer: int) -> Hashable:
        return None if self.base is None else self.base.layout_key(layer)

    def check_grid(self, grid: Grid, text_len: int = 0) -> None:
        super().check_grid(grid, text_len)
        if self.base is not None:
            self.base.check_grid(grid, text_len)

    def layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> BlockLayout:
        """The visited blocks in the order of the video, with order="raster" or a base.

        Args: as `SparseAttention.layout`; q and k are required without a base.
        Returns: a BlockLayout of full blocks, or that of the base. `attend` adds to it what the skipped blocks contribute.
        Raises: ValueError with order="gilbert", whose blocks are not blocks of the video; as `kernel_layout` otherwise.
        """
        if self.base is not None:
            return self.base.layout(grid=grid, text_len=text_len, q=q, k=k, layer=layer)
        if self.order != "raster":
            raise ValueError(
                f"RectifiedSpaAttn.layout needs order='raster' or a base, got order={self.order!r}: blocks along the curve "
                "are not blocks of the video; kernel_layout(grid=..., q=..., k=...) returns them together with their order."
            )
        return cast(BlockLayout, self.kernel_layout(grid=grid, text_len=text_len, q=q, k=k, layer=layer))

    def kernel_layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> KernelLayout:
        """The visited blocks in the order that attention runs in: the base's, or those selected for q and k.

        Args: as `SparseAttention.layout`; q and k are required without a base.
        Returns: an OrderedLayout along the curve, or a BlockLayout for order="raster".
        Raises: ValueError without q and k, or if they are not finite on a CPU; as `check_grid`.
        """
        if self.base is not None:
            return self.base.kernel_layout(grid=grid, text_len=text_len, q=q, k=k, layer=layer)
        if q is None or k is None:
            raise ValueError("RectifiedSpaAttn selects blocks by q and k, so its layout needs both; pass q=..., k=....")
        self.check_tokens(q, k, k, grid=grid, text_len=text_len)
        frame = self._forced(grid, text_len, q.device)
        q, k = _arrange(frame, q), _arrange(frame, k)
        cut = _cut(_blocks(frame), grid, text_len)
        selected = self._select(self._shares(q, k, cut, None), _blocks(frame))
        return dataclasses.replace(frame, layout=selected) if isinstance(frame, OrderedLayout) else selected

    def _forced(self, grid: Grid, text_len: int, device: torch.device) -> KernelLayout:
        first = self.first_frame and grid[0] > 1
        return _forced(grid, text_len, self.block, self.order, first, self.neighbours, device)

    def _shares(self, q: Tensor, k: Tensor, cut: Cut, text_valid: Tensor | None) -> Tensor:
        """(B, H, nQ, nK), or nK + 1 with text: the estimated share of each key block, and of all text; rows sum to 1.

        q and k are in the order of the blocks. Carries gradients.
        """
        video, words = k[:, : cut.slots], k[:, cut.slots :]
        blocks = (q[:, : cut.slots], video, cut.q_block, cut.kv_block)
        require_finite("RectifiedSpaAttn", q=blocks[0], k=video)
        if not words.shape[1]:
            return pooled_probabilities(*blocks, q_valid=cut.q_valid, kv_valid=cut.kv_valid)
        used = None
        if text_valid is not None:
            used = torch.arange(words.shape[1], device=q.device) < text_valid[:, None]
            words = words.masked_fill(~used[:, :, None, None], 0.0)  # padding may hold anything
        if self.rectify == "gapr":
            return _shares_of_pooled_text(*blocks, words, cut, text_valid)
        return pooled_probabilities(
            *blocks, q_valid=cut.q_valid, kv_valid=cut.kv_valid, isolated=words, isolated_mask=used
        )

    @torch.no_grad()
    def _select(self, shares: Tensor, forced: BlockLayout) -> BlockLayout:
        """The layout of the blocks with the largest shares and of those that are visited in any case."""
        B, H, nQ = shares.shape[:3]
        if self.drop == 0:
            chosen = torch.ones(1, 1, nQ, nQ, dtype=torch.bool, device=shares.device)
        else:
            budget = int((1 - self.drop) * nQ)
            chosen = top_p(shares.detach(), self.p_threshold, at_least=budget)[..., :nQ]  # the text is visited anyhow
        rest = forced.nQ - nQ
        mask = F.pad(chosen, (0, rest, 0, rest)) | forced.derived("block_mask", BlockLayout.block_mask)
        # no row is empty, since the diagonal is forced; asking would wait for the device
        return BlockLayout.from_block_mask(
            mask, q_len=forced.q_len, kv_len=forced.kv_len, q_block=self.block, kv_block=self.block,
            allow_empty_rows=True,
        )  # fmt: skip

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
        """Attention to the visited blocks, rectified for the skipped ones.

        Args: as `SparseAttention.attend`; a layout is used in place of selecting one.
        Returns: (B, N, H, D) in the dtype of q. The weights of a query sum to 1, those on mean values included.
        Raises: as `SparseAttention.attend` and `kernel_layout`.
        Numerics: shares, means and the sum of both parts in float32 (float64 for float64 inputs). Gradients are exact for
            the blocks that were visited and compensated; which ones has none.
        """
        self.check_tokens(q, k, v, grid=grid, text_len=text_len, text_valid=text_valid)
        device, choose = q.device, layout is None and self.base is None
        if layout is None:
            with timed("layout", device):
                layout = self._forced(grid, text_len, device) if choose else self.kernel_layout(
                    grid=grid, text_len=text_len, q=q, k=k, layer=layer
                )  # fmt: skip
        frame, blocks = layout, _blocks(layout)
        with timed("permute", device):
            q, k, v = (_arrange(frame, x) for x in (q, k, v))
        cut = _cut(blocks, grid, text_len)
        shares = skipped = None
        with timed("selection", device):
            if choose or self.rectify:
                shares = self._shares(q, k, cut, text_valid)
            if choose:
                assert shares is not None
                blocks = self._select(shares, blocks)
            if self.rectify:
                skipped = self._compensated(q, k, cut, blocks)
        if text_valid is not None:
            blocks = blocks.with_tail(text_len, text_valid)
        out = cast(Tensor, block_sparse_attention(q, k, v, blocks, backend=self.backend))
        with timed("permute", device):
            out = frame.restore(out) if isinstance(frame, OrderedLayout) else out
        if shares is None or skipped is None:
            return out
        with timed("rectification", device):
            return _rectified(out, v, shares, skipped, cut, frame, math.prod(grid))

    @torch.no_grad()
    def _compensated(self, q: Tensor, k: Tensor, cut: Cut, blocks: BlockLayout) -> Tensor:
        """(B|1, H|1, nQ, nK): the share of each key block of the video that is skipped, 0 where it is not worth its mean."""
        nQ, nK = -(-cut.slots // cut.q_block), -(-cut.slots // cut.kv_block)
        visited = blocks.derived("visited_shares", BlockLayout.visited_shares)[:, :, :nQ, :nK]
        skipped = (1 - visited).to(torch.promote_types(q.dtype, torch.float32))
        if self.rectify == "ipar":
            return skipped
        q_mean, q_spread = _moments(q[:, : cut.slots], cut.q_block, cut.q_valid)
        k_mean, k_spread = _moments(k[:, : cut.slots], cut.kv_block, cut.kv_valid)

        def products(x: Tensor, y: Tensor) -> Tensor:
            return pooled_scores(x, y, 1, 1, scale=1.0).abs()

        gain, error = products(q_mean, k_mean), products(q_spread, k_mean) + products(q_mean, k_spread)
        return skipped * (gain > error)


@lru_cache(maxsize=16)
def _forced(
    grid: Grid, text_len: int, block: int, order: str, first_frame: bool, near: bool, device: torch.device
) -> KernelLayout:
    """What is visited whatever the scores say, in the order of the blocks; kept, because every layer and step asks."""
    video = math.prod(grid)
    with torch.inference_mode(False), torch.device("cpu"):
        # the published curve runs along W, H and F in this order of precedence
        curve = identity(video) if order == "raster" else gilbert_permutation(grid, (2, 1, 0))
        nV = -(-video // block)
        mask = neighbours(grid, block, position=curve.inverse) if near else diagonal(nV, nV)
        if first_frame:
            holds = blocks_holding(curve.perm < grid[1] * grid[2], block)
            mask = mask | (holds[:, None] & holds)
        rest = -(-(video + text_len) // block) - nV
        mask = F.pad(mask, (0, rest, 0, rest))
        if text_len:
            mask = mask | text(video + text_len, text_len, q_block=block, kv_block=block)
        total = video + text_len
        layout = BlockLayout.from_block_mask(mask, q_len=total, kv_len=total, q_block=block, kv_block=block)
        frame = layout if order == "raster" else OrderedLayout.of(layout, curve, text_len)
    return frame.to(device)


def _blocks(layout: KernelLayout) -> BlockLayout:
    return layout.layout if isinstance(layout, OrderedLayout) else layout


def _arrange(frame: KernelLayout, x: Tensor) -> Tensor:
    return frame.arrange(x) if isinstance(frame, OrderedLayout) else x


def _cut(layout: BlockLayout, grid: Grid, text_len: int) -> Cut:
    """Count the tokens of the video in each block of a layout over the video and the text behind it."""
    slots = layout.q_len - text_len
    if slots == math.prod(grid):
        return Cut(slots, layout.q_block, layout.kv_block, None, None)

    def counts(valid: Tensor, block: int) -> Tensor:
        left = slots - torch.arange(0, slots, block, device=valid.device, dtype=torch.int32)
        return torch.minimum(valid[:1, : left.shape[0]], left)

    q_valid, kv_valid = counts(layout.q_valid, layout.q_block), counts(layout.kv_valid, layout.kv_block)
    return Cut(slots, layout.q_block, layout.kv_block, q_valid, kv_valid)


def _shares_of_pooled_text(
    q: Tensor, k: Tensor, q_block: int, kv_block: int, words: Tensor, cut: Cut, text_valid: Tensor | None
) -> Tensor:
    """`_shares` with the text pooled in blocks of its own, as the video is."""
    T, video = words.shape[1], k.shape[1]
    starts = torch.arange(0, max(video, T), kv_block, device=k.device)
    lengths = torch.full((1,), T, device=k.device) if text_valid is None else text_valid
    of_text = (lengths[:, None] - starts[: -(-T // kv_block)]).clamp(0, kv_block)
    nK = -(-video // kv_block)
    of_video = (video - starts[:nK]).clamp(max=kv_block)[None] if cut.kv_valid is None else cut.kv_valid
    keys = torch.cat((F.pad(k, (0, 0, 0, 0, 0, -video % kv_block)), words), 1)
    valid = torch.cat((of_video.long().expand(of_text.shape[0], -1), of_text.long()), 1)
    shares = pooled_probabilities(q, keys, q_block, kv_block, q_valid=cut.q_valid, kv_valid=valid)
    return torch.cat((shares[..., :nK], shares[..., nK:].sum(-1, keepdim=True)), -1)


def _moments(x: Tensor, block: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of each block and the mean distance from it, channel by channel, (B, blocks, H, D) each."""
    mean = pool(x, block, valid)
    B, N, H, D = x.shape
    n = mean.shape[1]
    counts = (N - torch.arange(0, N, block, device=x.device)).clamp(max=block)[None] if valid is None else valid
    spread = torch.empty_like(mean)
    limit = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cpu"])
    step = max(1, limit // (B * block * H * D * mean.element_size()))
    for first in range(0, n, step):
        at = slice(first, min(n, first + step))
        part = x[:, at.start * block : at.stop * block]
        part = F.pad(part, (0, 0, 0, 0, 0, (at.stop - at.start) * block - part.shape[1])) if at.stop == n else part
        distance = (part.unflatten(1, (-1, block)) - mean[:, at, None]).abs_()
        if valid is not None or at.stop == n:
            unused = torch.arange(block, device=x.device) >= counts[:, at, None]
            distance = distance.masked_fill_(unused[..., None, None], 0.0)
        spread[:, at] = distance.sum(2)
    return mean, spread / counts.clamp(min=1)[..., None, None]


def _rectified(
    out: Tensor, v: Tensor, shares: Tensor, skipped: Tensor, cut: Cut, frame: KernelLayout, video: int
) -> Tensor:
    """R * out + the shares of the compensated blocks times their mean values, for the queries of the video.

    out: (B, N, H, D) in the order of the video; v in that of the blocks.
    """
    nK = skipped.shape[-1]
    weights = shares[..., :nK] * skipped
    kept = (shares[..., :nK] - weights).sum(-1) + shares[..., nK:].sum(-1)  # R, (B, H, nQ)
    means = pool(v[:, : cut.slots], cut.kv_block, cut.kv_valid)
    with without_autocast(out.device):
        tail = torch.einsum("bhqk,bkhd->bqhd", weights, means)
    if isinstance(frame, OrderedLayout):
        block = frame.inverse[:video] // cut.q_block
    else:
        block = torch.arange(video, device=out.device) // cut.q_block
    factor = kept.transpose(1, 2)[..., None].index_select(1, block)
    rectified = (out[:, :video] * factor + tail.index_select(1, block)).to(out.dtype)
    return torch.cat((rectified, out[:, video:]), 1) if out.shape[1] > video else rectified
