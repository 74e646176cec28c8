"""GC ViT in timm: `gcvit_*`. Every second block takes its queries from a summary of the whole image, one window of them
that all windows share.
"""

from __future__ import annotations

from typing import Any

from mmeff.vision_backbones._windowed import (
    WindowCall,
    compute_dtype,
    has_grad,
    heads_of,
    rel_bias_of,
    rel_pos_obstacle,
)
from mmeff.vision_backbones.hosts._family import WindowFamily


class GCViTHost(WindowFamily):
    """Switches the local and the global window attention of timm's GC ViT."""

    name = "gcvit"
    models = "timm gcvit_*"
    module = "timm.models.gcvit"
    blocks = ("GlobalContextVitBlock",)
    attribute = "_window_attn"

    @classmethod
    def call(cls, block: Any, x: Any) -> Any:
        attn = block.attn
        B, H, W, _ = x.shape
        wh, ww = block.window_size
        return WindowCall(
            batch=B,
            grid=(H, W),
            window=(wh, ww),
            partition="window",
            heads=attn.num_heads,
            head_dim=attn.head_dim,
            device=x.device,
            dtype=compute_dtype(x),
            grad=has_grad(x, attn),
            biased=True,
            stock_fused=False,
            pads=False,
        )

    @classmethod
    def obstacle(cls, block: Any) -> str | None:
        attn = block.attn
        if attn.attn_drop.p and attn.training:
            return f"it drops attention weights in training (attn_drop={attn.attn_drop.p}), which our operator does not"
        return rel_pos_obstacle(attn.rel_pos)

    @classmethod
    def run(cls, block: Any, x: Any, rest: tuple[Any, ...], method: Any) -> Any:
        attn = block.attn
        q_global = rest[0] if rest else None
        if attn.use_global and q_global is not None:
            k, v = heads_of(attn.qkv(x), 2, attn.num_heads)
            q = q_global.unflatten(-1, (attn.num_heads, -1)).to(k.dtype)
        else:
            q, k, v = heads_of(attn.qkv(x), 3, attn.num_heads)
        out = method.attend(q, k, v, attn.window_size, rel_bias=rel_bias_of(attn.rel_pos), scale=attn.scale)
        return attn.proj_drop(attn.proj(out.flatten(-2)))


HOSTS = (GCViTHost,)
