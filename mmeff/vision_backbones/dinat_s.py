"""DiNAT_s: Swin's layout with neighborhood attention in place of its windows, every other layer dilated.

Paper: Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, arXiv:2209.15001. Official code and weights:
SHI-Labs. Differs as `nat.py` says.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from mmeff.vision_backbones._nat_keys import filter_of
from mmeff.vision_backbones._timm import build, cfg, register
from mmeff.vision_backbones.nat import NAT

__all__ = [
    "DiNATs", "PatchTokenizer", "dinat_s_tiny", "dinat_s_small", "dinat_s_base", "dinat_s_large", "dinat_s_large_384",
]  # fmt: skip


class PatchTokenizer(nn.Module):
    """Patches that do not overlap, and a norm: (B, C, H, W) -> (B, H / p, W / p, dim); a ragged border is padded with 0."""

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Image -> map."""
        H, W = x.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            x = F.pad(x, (0, -W % self.patch_size, 0, -H % self.patch_size))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class _PatchMerging(nn.Module):
    """Four neighbours side by side, a norm and a linear layer: (B, H, W, dim) -> (B, H / 2, W / 2, 2 dim)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        # left before right and up before down, columns outermost: the order of the official weights
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x))


class DiNATs(NAT):
    """DiNAT_s; arguments as for NAT, of which it differs in the stem and the downsampling. Any image size."""

    detection_dilations = ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))

    def __init__(self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", **kwargs: Any) -> None:
        super().__init__(
            in_chans, num_classes, global_pool, tokenizer=PatchTokenizer, downsample=_PatchMerging, **kwargs
        )


_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {
        **{f"dinat_s_{size}.shi_in1k": cfg(first_conv="stem.proj") for size in ("tiny", "small", "base")},
        "dinat_s_large.shi_in22k_ft_in1k": cfg(first_conv="stem.proj"),
        "dinat_s_large_384.shi_in22k_ft_in1k": cfg(first_conv="stem.proj", **_384),
    }
)

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 6, 2), "embed_dim": 96, "num_heads": (3, 6, 12, 24)},
    "small": {"depths": (2, 2, 18, 2), "embed_dim": 96, "num_heads": (3, 6, 12, 24)},
    "base": {"depths": (2, 2, 18, 2), "embed_dim": 128, "num_heads": (4, 8, 16, 32)},
    "large": {"depths": (2, 2, 18, 2), "embed_dim": 192, "num_heads": (6, 12, 24, 48)},
}


def _create(name: str, size: str, pretrained: bool, kwargs: dict[str, Any], **variant: Any) -> DiNATs:
    args = {**_SIZES[size], "mlp_ratio": 4.0, "dilations": (8, 4, 2, 1), **variant}
    found: DiNATs = build(DiNATs, name, pretrained, filter_of("layers", "a DiNAT_s"), args, kwargs)
    return found


@register
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Tiny: 28 M parameters, 4.5 G multiply-adds, 81.8 % on ImageNet-1k as published."""
    return _create("dinat_s_tiny", "tiny", pretrained, kwargs)


@register
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Small: 50 M parameters, 8.7 G multiply-adds, 83.5 % on ImageNet-1k as published."""
    return _create("dinat_s_small", "small", pretrained, kwargs)


@register
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Base: 88 M parameters, 15.4 G multiply-adds, 83.8 % on ImageNet-1k as published."""
    return _create("dinat_s_base", "base", pretrained, kwargs)


@register
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Large: 197 M parameters, 34.5 G multiply-adds, 86.5 % on ImageNet-1k as published, after ImageNet-22k."""
    return _create("dinat_s_large", "large", pretrained, kwargs)


@register
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Large at 384 pixels: 101.5 G multiply-adds, 87.4 % on ImageNet-1k as published, after ImageNet-22k."""
    return _create("dinat_s_large_384", "large", pretrained, kwargs, dilations=(13, 6, 3, 1))
