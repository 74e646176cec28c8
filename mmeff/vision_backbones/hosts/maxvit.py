"""MaxViT in timm: `maxvit_*` and `maxxvit_*`, whose blocks attend within windows and within a grid.

The parallel blocks of `maxvit_tiny_pm_256` attend within both in one step and count as one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmeff.vision_backbones._windowed import WindowCall, compute_dtype, has_grad
from mmeff.vision_backbones.hosts._family import WindowFamily
from mmeff.vision_backbones.maxvit import attentions, obstacle, partition_attention, round_up


class MaxViTHost(WindowFamily):
    """Switches the window and grid attention of timm's MaxViT."""

    name = "maxvit"
    models = "timm maxvit_*, maxxvit_*"
    module = "timm.models.maxxvit"
    blocks = ("PartitionAttentionCl", "ParallelPartitionAttention")
    attribute = "_partition_attn"

    @classmethod
    def call(cls, block: Any, x: Any) -> Any:
        attn = attentions(block)[0]
        B, H, W, _ = x.shape
        wh, ww = block.partition_size
        return WindowCall(
            batch=B,
            grid=(H, W),
            window=(wh, ww),
            partition="window" if getattr(block, "partition_block", True) else "grid",
            heads=attn.num_heads,
            head_dim=attn.dim_head,
            device=x.device,
            dtype=compute_dtype(x),
            grad=has_grad(x, attn),
            biased=attn.rel_pos is not None,
            stock_fused=attn.fused_attn,
            pads=bool(H % wh or W % ww),
        )

    @classmethod
    def prepare(cls, model: Any, method: Any) -> list[Callable[[], None]]:
        if not method.pads:
            return []
        round_up(model, True)
        return [lambda: round_up(model, False)]

    @classmethod
    def obstacle(cls, block: Any) -> str | None:
        return obstacle(block)

    @classmethod
    def run(cls, block: Any, x: Any, rest: tuple[Any, ...], method: Any) -> Any:
        return partition_attention(block, x, attend=method.attend)


HOSTS = (MaxViTHost,)
