"""DaViT in timm: `davit_*`. The spatial blocks attend within windows, without a bias; the channel blocks stay as they are.

timm cuts the map inside the block's `forward`, padded with zeros that are attended to. What is replaced is the attention over
windows that are cut already, each of them a map of its own.
"""

from __future__ import annotations

from typing import Any

from mmeff.vision_backbones._windowed import WindowCall, compute_dtype, has_grad, heads_of
from mmeff.vision_backbones.hosts._family import WindowFamily


class DaViTHost(WindowFamily):
    """Switches the window attention in the spatial blocks of timm's DaViT."""

    name = "davit"
    models = "timm davit_*"
    module = "timm.models.davit"
    blocks = ("SpatialBlock",)
    attribute = "forward"

    @classmethod
    def layers(cls, model: Any) -> list[tuple[str, Any]]:
        return [(f"{name}.attn", block.attn) for name, block in super().layers(model)]

    @classmethod
    def call(cls, block: Any, x: Any) -> Any:
        windows, N, C = x.shape
        return WindowCall(
            batch=windows,
            grid=block.window_size,
            window=block.window_size,
            partition="window",
            heads=block.num_heads,
            head_dim=C // block.num_heads,
            device=x.device,
            dtype=compute_dtype(x),
            grad=has_grad(x, block),
            biased=False,
            stock_fused=block.fused_attn,
            pads=False,
        )

    @classmethod
    def obstacle(cls, block: Any) -> str | None:
        return None

    @classmethod
    def run(cls, block: Any, x: Any, rest: tuple[Any, ...], method: Any) -> Any:
        q, k, v = heads_of(block.qkv(x).unflatten(1, block.window_size), 3, block.num_heads)
        return block.proj(method.attend(q, k, v, block.window_size, scale=block.scale).flatten(-2).flatten(1, 2))


HOSTS = (DaViTHost,)
