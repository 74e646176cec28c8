"""NAT and DiNAT: hierarchical transformers whose layers attend within a sliding window, every other one dilated in DiNAT.

Papers: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv:2204.07143; Hassani and Shi, "Dilated
Neighborhood Attention Transformer", 2022, arXiv:2209.15001. Official code and weights: SHI-Labs.

Differs from the official models: attention is our `neighborhood_attention`, so that nothing has to be compiled for it and
the relative bias works on every device; downsampling stands at the start of a stage, so that stages end in feature maps;
inputs that are too small for a window may also be refused, or the window shrunk (`small_input`). The official layout of
the weights and that of transformers load through `_nat_keys.py`, which also writes the former.

Attention weights are never dropped out (no published variant does). ONNX knows no neighborhood attention; torch.export does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from mmeff.kernels import neighborhood_attention
from mmeff.vision_backbones._nat_keys import filter_of
from mmeff.vision_backbones._staged import Stage, StagedBackbone, drop_path_rates, init_weights
from mmeff.vision_backbones._timm import build, cfg, register

__all__ = [
    "NAT", "NATBlock", "NeighborhoodAttention2d",
    "nat_mini", "nat_tiny", "nat_small", "nat_base",
    "dinat_mini", "dinat_tiny", "dinat_small", "dinat_base", "dinat_large", "dinat_large_384", "dinat_large_384_k11",
]  # fmt: skip

SmallInput = Literal["pad", "error", "clamp"]
Dilations = Literal["detection"] | Sequence[int | Sequence[int]]


class NeighborhoodAttention2d(nn.Module):
    """Multi-head attention of every token of a map (B, H, W, C) to the window around it, with a relative bias.

    Args:
        dim: channels. heads: attention heads; they divide dim. kernel_size: tokens of a window along each axis.
        dilation: distance between the tokens of a window. qkv_bias: whether queries, keys and values have a bias.
        proj_drop: dropout of the output.
        small_input: what to do with a map shorter than kernel_size * dilation along an axis. "pad" adds zeros below and to the
            right before queries, keys and values are made, attends to them like to any token, and crops: what the official
            weights were trained with. "clamp" lowers the dilation, then the window, on that axis. "error" refuses.
        backend: of neighborhood_attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        small_input: SmallInput = "pad",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"num_heads must divide the channels of its stage, got {heads} heads for {dim} channels.")
        if min(kernel_size, dilation) < 1:
            raise ValueError(f"kernel_size and dilations must be at least 1, got {kernel_size} and {dilation}.")
        if small_input not in get_args(SmallInput):
            raise ValueError(f"small_input must be one of {', '.join(get_args(SmallInput))}, got {small_input!r}.")
        dd = {"device": device, "dtype": dtype}
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation
        self.small_input, self.backend = small_input, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> the same shape. Raises: ValueError for a small map under small_input="error"."""
        H, W = x.shape[1:3]
        bias: Tensor = self.rpb
        window, dilation = [self.kernel_size] * 2, [self.dilation] * 2
        need = self.kernel_size * self.dilation
        if min(H, W) < need:
            if self.small_input == "error":
                raise ValueError(
                    f"kernel_size * dilation must fit into every map, got {self.kernel_size} * {self.dilation} = {need} on a map "
                    f"of {H} x {W}; pass a larger image, or create the model with small_input='pad' or 'clamp'."
                )
            if self.small_input == "pad":
                x = F.pad(x, (0, 0, 0, max(0, need - W), 0, max(0, need - H)))
            else:
                window = [min(self.kernel_size, n) for n in (H, W)]
                dilation = [min(self.dilation, n // w) for n, w in zip((H, W), window, strict=True)]
                # the bias of the offsets that a smaller window still has: the middle of the table
                rows, columns = (slice(self.kernel_size - w, self.kernel_size + w - 1) for w in window)
                bias = bias[:, rows, columns]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(3)
        out = neighborhood_attention(q, k, v, window, dilation=dilation, rel_bias=bias, backend=self.backend)
        assert isinstance(out, Tensor)
        return self.proj_drop(self.proj(out.flatten(-2)[:, :H, :W]))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kernel_size={self.kernel_size}, dilation={self.dilation}, small_input={self.small_input!r}"


class NATBlock(nn.Module):
    """Attention and an MLP, each on the normed input and added to it; optionally scaled per channel.

    Args:
        attn: maps (B, H, W, C) to the same shape. mlp_ratio: hidden channels of the MLP over dim.
        layer_scale: the scales' first value; None has none.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), float(layer_scale), **dd)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> the same shape."""
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)


class _ConvTokenizer(nn.Module):
    """Two convolutions of stride 2 with nothing between them, and a norm: (B, C, H, W) -> (B, H / 4, W / 4, dim)."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd), nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd))
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class _ConvDownsample(nn.Module):
    """A convolution of stride 2 and a norm: (B, H, W, dim) -> (B, H / 2, W / 2, 2 dim)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(StagedBackbone):
    """NAT, DiNAT, and with another stem and downsampling DiNAT_s. Any image size.

    Args:
        in_chans, num_classes, global_pool: as in timm. embed_dim: channels of the first stage, doubled from stage to stage.
        depths, num_heads: blocks and heads of each stage. mlp_ratio: hidden channels of the MLPs over channels.
        kernel_size: tokens of a window along each axis.
        dilations: per stage a number d for layers of dilation 1 and d in turn, or the dilations of its layers, repeated or
            cut to their number; "detection" for those of the official detection and segmentation models.
        layer_scale: first value of the scales per channel, None for none.
        qkv_bias: whether queries, keys and values have a bias.
        small_input: "pad", "error" or "clamp" maps that are smaller than a window; see NeighborhoodAttention2d.
        backend: of neighborhood_attention.
        drop_rate: dropout before the classifier; proj_drop_rate: in blocks; drop_path_rate: the last block's, linear from 0.
        tokenizer, downsample: classes of the stem (in_chans, dim) and of what starts the stages behind the first (dim).
        device, dtype: of the weights.
    Source: arXiv:2204.07143 and arXiv:2209.15001; the official code for what the papers leave open.
    """

    no_decay = ("rpb",)
    # what the official detection and segmentation models raise the dilations to, for larger images
    detection_dilations: ClassVar[Sequence[Sequence[int]]] = ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3))

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Dilations = (1, 1, 1, 1),
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        small_input: SmallInput = "pad",
        backend: str = "auto",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        tokenizer: type[nn.Module] = _ConvTokenizer,
        downsample: type[nn.Module] = _ConvDownsample,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        per_layer = self._dilations(dilations, depths)
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry per stage, got {num_heads} for depths {depths}.")
        drop_paths = drop_path_rates(drop_path_rate, depths)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        stages = []
        for i, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
            blocks = [
                NATBlock(
                    width,
                    NeighborhoodAttention2d(
                        width, heads, kernel_size, dilation, qkv_bias=qkv_bias, proj_drop=proj_drop_rate,
                        small_input=small_input, backend=backend, **dd,
                    ),
                    mlp_ratio, layer_scale=layer_scale, drop_path=drop_path, proj_drop=proj_drop_rate, **dd,
                )
                for dilation, drop_path in zip(per_layer[i], drop_paths[i], strict=True)
            ]  # fmt: skip
            stages.append(Stage(blocks, downsample(widths[i - 1], **dd) if i else None))
        super().__init__(
            tokenizer(in_chans, embed_dim, **dd),
            stages,
            nn.LayerNorm(widths[-1], **dd),
            widths,
            channels_last=True,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        init_weights(self, tables=self.no_decay)

    @classmethod
    def _dilations(cls, given: Dilations, depths: Sequence[int]) -> list[list[int]]:
        """The dilation of every layer, stage by stage."""
        if isinstance(given, str):
            if given != "detection":
                raise ValueError(f"dilations must be 'detection' or one entry per stage, got {given!r}.")
            given = cls.detection_dilations
        if len(given) != len(depths):
            raise ValueError(f"dilations must have one entry per stage, got {given} for depths {tuple(depths)}.")
        cycles = [(1, stage) if isinstance(stage, int) else tuple(stage) for stage in given]
        return [[cycle[j % len(cycle)] for j in range(depth)] for cycle, depth in zip(cycles, depths, strict=True)]


# ---------------------------------------------------------------- variants

_FIRST = "stem.proj.0"
_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {
        **{f"nat_{size}.shi_in1k": cfg(first_conv=_FIRST) for size in ("mini", "tiny", "small", "base")},
        **{f"dinat_{size}.shi_in1k": cfg(first_conv=_FIRST) for size in ("mini", "tiny", "small", "base")},
        "dinat_large.shi_in22k_ft_in1k": cfg(first_conv=_FIRST),
        "dinat_large_384.shi_in22k_ft_in1k": cfg(first_conv=_FIRST, **_384),
        "dinat_large_384_k11.shi_in22k_ft_in1k": cfg(first_conv=_FIRST, **_384),
    }
)

_SIZES: dict[str, dict[str, Any]] = {
    "mini": {"depths": (3, 4, 6, 5), "embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0},
    "tiny": {"depths": (3, 4, 18, 5), "embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0},
    "small": {"depths": (3, 4, 18, 5), "embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0},
    "base": {"depths": (3, 4, 18, 5), "embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0},
    "large": {"depths": (3, 4, 18, 5), "embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0},
}
_DINAT = (8, 4, 2, 1)


def _create(name: str, size: str, pretrained: bool, kwargs: dict[str, Any], **variant: Any) -> NAT:
    found: NAT = build(
        NAT, name, pretrained, filter_of("levels", "a NAT or DiNAT"), {**_SIZES[size], **variant}, kwargs
    )
    return found


@register
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini: 20.0 M parameters, 2.7 G multiply-adds, 81.8 % on ImageNet-1k as published."""
    return _create("nat_mini", "mini", pretrained, kwargs)


@register
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny: 27.9 M parameters, 4.3 G multiply-adds, 83.2 % on ImageNet-1k as published."""
    return _create("nat_tiny", "tiny", pretrained, kwargs)


@register
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small: 50.7 M parameters, 7.8 G multiply-adds, 83.7 % on ImageNet-1k as published."""
    return _create("nat_small", "small", pretrained, kwargs, layer_scale=1e-5)


@register
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base: 89.8 M parameters, 13.7 G multiply-adds, 84.3 % on ImageNet-1k as published."""
    return _create("nat_base", "base", pretrained, kwargs, layer_scale=1e-5)


@register
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini: 20.0 M parameters, 2.7 G multiply-adds, 81.8 % on ImageNet-1k as published."""
    return _create("dinat_mini", "mini", pretrained, kwargs, dilations=_DINAT)


@register
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny: 27.9 M parameters, 4.3 G multiply-adds, 82.7 % on ImageNet-1k as published."""
    return _create("dinat_tiny", "tiny", pretrained, kwargs, dilations=_DINAT)


@register
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small: 50.7 M parameters, 7.8 G multiply-adds, 83.8 % on ImageNet-1k as published; no layer scale."""
    return _create("dinat_small", "small", pretrained, kwargs, dilations=_DINAT)


@register
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base: 89.8 M parameters, 13.7 G multiply-adds, 84.4 % on ImageNet-1k as published."""
    return _create("dinat_base", "base", pretrained, kwargs, dilations=_DINAT, layer_scale=1e-5)


@register
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large: 200.9 M parameters, 30.6 G multiply-adds, 86.6 % on ImageNet-1k as published, after ImageNet-22k."""
    return _create("dinat_large", "large", pretrained, kwargs, dilations=_DINAT)


@register
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large at 384 pixels: 89.7 G multiply-adds, 87.4 % on ImageNet-1k as published, after ImageNet-22k."""
    return _create("dinat_large_384", "large", pretrained, kwargs, dilations=(13, 6, 3, 1))


@register
def dinat_large_384_k11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large at 384 pixels with windows of 11: 92.4 G multiply-adds, 87.5 % on ImageNet-1k as published."""
    return _create("dinat_large_384_k11", "large", pretrained, kwargs, dilations=_DINAT, kernel_size=11)
