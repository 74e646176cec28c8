"""Swin (v1) in timm: `swin_*`, with windows that shift by half a window in every second block.

timm rolls the map, pads it with zeros that are attended to, and masks the seam in the last windows. The operator needs neither
roll nor mask. Where there is padding the map is rolled, padded and rolled back, so that seam and padding lie where timm has
them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from mmeff.vision_backbones._windowed import WindowCall, compute_dtype, from_flat_table, has_grad, heads_of
from mmeff.vision_backbones.hosts._family import WindowFamily


class SwinHost(WindowFamily):
    """Switches the window attention of timm's Swin, shifted or not."""

    name = "swin"
    models = "timm swin_*"
    module = "timm.models.swin_transformer"
    blocks = ("SwinTransformerBlock",)
    attribute = "_attn"

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
            head_dim=attn.qkv.out_features // (3 * attn.num_heads),
            device=x.device,
            dtype=compute_dtype(x),
            grad=has_grad(x, attn),
            biased=True,
            stock_fused=attn.fused_attn,
            pads=False,  # timm pads by itself
        )

    @classmethod
    def obstacle(cls, block: Any) -> str | None:
        attn = block.attn
        if attn.attn_drop.p and attn.training:
            return f"it drops attention weights in training (attn_drop={attn.attn_drop.p}), which our operator does not"
        return None

    @classmethod
    def run(cls, block: Any, x: Any, rest: tuple[Any, ...], method: Any) -> Any:

        attn, shift = block.attn, block.shift_size
        H, W = x.shape[1:3]
        wh, ww = block.window_size
        pad_h, pad_w = -H % wh, -W % ww
        if pad_h or pad_w:
            x = F.pad(x.roll((-shift[0], -shift[1]), (1, 2)), (0, 0, 0, pad_w, 0, pad_h)).roll(shift, (1, 2))
        q, k, v = heads_of(attn.qkv(x), 3, attn.num_heads)
        bias = from_flat_table(attn.relative_position_bias_table, (wh, ww))
        out = method.attend(q, k, v, (wh, ww), shift=shift, rel_bias=bias, scale=attn.scale).flatten(-2)
        if pad_h or pad_w:
            out = out.roll((-shift[0], -shift[1]), (1, 2))[:, :H, :W].roll(shift, (1, 2))
        return attn.proj_drop(attn.proj(out))


HOSTS = (SwinHost,)
