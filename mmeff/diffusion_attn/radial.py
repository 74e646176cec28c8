"""Radial attention: a static mask whose window narrows, and whose frames thin out, as frames lie further apart.

Paper: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
NeurIPS 2025, arXiv:2506.19852. Behaviour follows the authors' code, mit-han-lab/radial-attention at 72788d4.

Differs, and only where a frame or the whole sequence is not a multiple of the block (the published code there loses
blocks, can leave a row empty, or raises):

* every block that a frame touches is judged, by the rows and keys that it really shares with the frame;
* blocks that touch frames at distance <= 1 are always visited, and so are those that touch text;
* the last block may be ragged; nothing is padded.

The layout is kept per handle, never on a class, so a second resolution gets a layout of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.diffusion_attn._base import Grid, SparseAttention
from mmeff.errors import suggest
from mmeff.kernels import BlockLayout
from mmeff.registry import register

_SCRIPTS = "scripts of mit-han-lab/radial-attention at 72788d4"

# What the authors' scripts pass for each model. Where a script leaves the decay out, its command line means 1.
_PRESETS: dict[str, dict[str, Any]] = {
    "wan2.1-14b": {"decay": 0.2, "dense_steps": 12, "dense_layers": 1},
    "wan2.1-14b-2x": {"decay": 1.0, "dense_steps": 2, "dense_layers": 2},
    "wan2.1-14b-fusionx": {"decay": 0.2, "dense_steps": 2, "dense_layers": 1},
    "wan2.1-14b-lightx2v": {"decay": 0.2, "dense_steps": 1, "dense_layers": 1},
    "wan2.2-a14b": {"decay": 0.8, "block": 64, "dense_steps": 11, "dense_layers": 1},
    "hunyuanvideo": {"decay": 0.95, "sink": False, "dense_steps": 12, "dense_layers": 0},
    "hunyuanvideo-4x": {"decay": 1.0, "sink": False, "dense_steps": 2, "dense_layers": 2},
}


@register
@dataclass(frozen=True, kw_only=True)
class Radial(SparseAttention):
    """Static radial mask: near frames attend fully, far frames through a narrowing window and at growing intervals.

    The defaults are the authors' for Wan2.1-14B at 69 frames of 768 x 1280; `for_model` has those of other models.
    """

    source: ClassVar[str] = "arXiv:2506.19852; mit-han-lab/radial-attention at 72788d4"

    decay: float = option(
        0.2, "factor on the window of frames at distance > 1; smaller is sparser", source=f"Wan2.1-14B, {_SCRIPTS}"
    )
    block: int = option(128, "tokens in a query block and in a key block", unit="tokens", source="the authors' kernels")
    sink: bool = option(True, "every query sees the first frame", source="the authors' code: true for Wan, not Hunyuan")
    drop_below: int = option(
        128,
        "frames are thinned out once P / 2^bits(distance), P the power of two above H*W, is below this; it does not "
        "follow `block`, so lower it for small frames; 0 keeps every frame",
        unit="tokens",
        source="a constant in the authors' code",
    )
    dense_steps: int = option(
        12, "first denoising steps that run dense", unit="steps", source=f"Wan2.1-14B, 50 steps, {_SCRIPTS}"
    )
    dense_layers: int | tuple[int, ...] = option(
        1,
        "layers that run dense: a number n means the first n; a list names them, negative ones from the end",
        unit="layers",
        source=f"Wan2.1-14B, {_SCRIPTS}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        finite = math.isfinite(self.decay) and self.decay >= 0
        self.require(finite, "decay", "be finite and >= 0", "the authors use 0.2 to 1")
        self.require(self.block >= 1, "block", "be >= 1 token", "the authors use 64 and 128")
        self.require(self.drop_below >= 0, "drop_below", "be >= 0 tokens", "the authors use 128; 0 drops no frame")

    @classmethod
    def for_model(cls, model: str, **fields: Any) -> Radial:
        """The authors' setting for a model, with some fields changed.

        Args:
            model: one of wan2.1-14b, wan2.1-14b-2x (161 frames), wan2.1-14b-fusionx (8 steps), wan2.1-14b-lightx2v
                (4 steps), wan2.2-a14b, hunyuanvideo, hunyuanvideo-4x (509 frames, with their LoRA).
        Raises: ValueError for a model without a setting; TypeError for unknown fields.
        """
        found = _PRESETS.get(model.lower())
        if found is None:
            raise ValueError(
                f"Radial.for_model has no published setting for {model!r}.{suggest(model, _PRESETS)} "
                f"Known: {', '.join(_PRESETS)}; pass Radial(decay=..., block=...) for other models."
            )
        return cls(**found).replace(**fields)

    def check_grid(self, grid: Grid, text_len: int = 0) -> None:
        super().check_grid(grid, text_len)
        F, H, W = grid
        if self.block > F * H * W:
            raise ValueError(
                f"Radial.block must be <= F*H*W = {F}*{H}*{W} = {F * H * W} video tokens for this grid, got {self.block}; "
                f"pass block={_power_of_two_below(max(F * H * W // 8, 1))}, or run so small a video dense."
            )

    def layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> BlockLayout:
        """The radial layout: blocks of `block` tokens, the same for every head, layer and step.

        Args: as `SparseAttention.layout`; k and layer change nothing.
        Returns: a BlockLayout of full blocks that no row leaves empty.
        Raises: ValueError if the video has fewer tokens than a block.
        Numerics: exact integers. Memory and time grow with the square of the number of blocks, never of the tokens.
        Source: `gen_log_mask_shrinked` of the authors' code. Equal to it wherever H*W and F*H*W + T are multiples of
            the block.
        Differs: on other grids, as the head of this file says.
        """
        self.check_grid(grid, text_len)
        F, H, W = grid
        tokens = F * H * W + text_len
        with torch.device("cpu"):  # whatever the default device is: hundreds of small operations
            mask = self._block_mask(F, H * W, text_len)
        layout = BlockLayout.from_block_mask(mask, q_len=tokens, kv_len=tokens, q_block=self.block, kv_block=self.block)
        return layout if q is None else layout.to(q.device)

    def _window(self, distance: int, N: int) -> int:
        """Half-width of the band that frames at this distance keep, in raster positions of a frame of N tokens."""
        if distance <= 1:
            return N
        narrowing = 2 ** N.bit_length() / 2 ** distance.bit_length() * self.decay
        return int(min(N, max(self.block, narrowing)))

    def _keeps_frame(self, distance: int, N: int) -> bool:
        """Whether frames at this distance attend at all."""
        reach = 2 ** N.bit_length() / 2 ** distance.bit_length()
        return reach >= self.drop_below or distance % int(self.drop_below / reach) == 0

    def _block_mask(self, F: int, N: int, text_len: int) -> Tensor:
        """The visited blocks, (nQ, nK) bool, for F frames of N tokens and the text behind them."""
        B, video = self.block, F * N
        on_grid = N % B == 0 and text_len % B == 0
        n_blocks = -(-(video + text_len) // B)
        mask = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)

        # A segment is what one block and one frame share. On the grid every segment is a whole block.
        edges = torch.cat((torch.arange(0, video, B), torch.arange(0, video, N), torch.tensor([video]))).unique()
        starts, ends = edges[:-1], edges[1:]
        frame, block = starts // N, starts // B
        first, last = (starts - frame * N).int(), (ends - 1 - frame * N).int()  # raster positions, inclusive
        window = torch.tensor([self._window(d, N) for d in range(F)], dtype=torch.int32)
        kept = torch.tensor([self._keeps_frame(d, N) for d in range(F)])

        for i, rows in enumerate(torch.split(torch.arange(len(starts)), torch.bincount(frame).tolist())):
            distance = (frame - i).abs()
            lo, hi, W = first[rows, None], last[rows, None], window[distance]
            # A key column of the pair keeps the rows within W of it. How many columns keep at least t rows needs no
            # matrix: they are the columns in [lo - W + t - 1, hi + W - t + 1], because t <= rows <= min(B, N) <= W.
            third = torch.div(hi - lo + 1, 3, rounding_mode="floor")  # t - 1 for "more than a third of the rows"
            touched = _overlap(first, last, lo - W, hi + W)
            dense = _overlap(first, last, lo - W + third, hi + W - third)
            keep = (5 * dense > 3 * touched) & kept[distance]  # more than 0.6 of the touched columns are dense
            if self.sink:
                keep |= frame == 0
            if not on_grid:
                keep |= distance <= 1
            # Blocks that straddle frames collect what any of their segments keeps.
            visits = torch.zeros(len(rows), n_blocks, dtype=torch.int32).index_add_(1, block, keep.int())
            mask[block[rows]] |= visits > 0

        if text_len:
            mask[video // B :] = True
            mask[:, video // B :] = True
        return mask


def _overlap(first: Tensor, last: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """How many integers the intervals [first, last] and [lo, hi] share."""
    return (torch.minimum(last, hi) - torch.maximum(first, lo) + 1).clamp(min=0)


def _power_of_two_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)
