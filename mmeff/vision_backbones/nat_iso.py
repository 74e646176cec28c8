"""Isotropic NAT and DiNAT, and the plain vision transformer with relative bias that they are compared with.

Paper: Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, arXiv:2209.15001, section on isotropic models.
Official code and weights: SHI-Labs, under the names nat_isotropic_*, dinat_isotropic_* and vitrpb_*. Patches of 16 pixels,
12 blocks of one width, mean pooling.

Differs as `nat.py` says, and: the official models take 224 pixels only. Here NAT and DiNAT take any size; ViT-rpb, whose
table of biases spans the whole map, is made for a size, and `set_input_size` resamples the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from mmeff.kernels import neighborhood_attention
from mmeff.vision_backbones._nat_keys import filter_of, from_official
from mmeff.vision_backbones._staged import Stage, StagedBackbone, drop_path_rates, init_weights
from mmeff.vision_backbones._timm import State, build, cfg, register, unwrap
from mmeff.vision_backbones.dinat_s import PatchTokenizer
from mmeff.vision_backbones.nat import NATBlock, NeighborhoodAttention2d, SmallInput

__all__ = [
    "NATIso", "ViTRPB", "GlobalAttention2d", "nat_iso_small", "nat_iso_base", "dinat_iso_small", "dinat_iso_base",
    "vitrpb_small", "vitrpb_base",
]  # fmt: skip


class GlobalAttention2d(nn.Module):
    """Multi-head attention over the whole map (B, H, W, C) with a relative bias: a window as large as the map.

    Args:
        dim: channels. heads: attention heads; they divide dim. grid: H and W, the only ones that it takes.
        qkv_bias: whether queries, keys and values have a bias. proj_drop: dropout of the output.
        backend: of neighborhood_attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads, self.grid, self.backend = heads, grid, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.zeros(heads, *(2 * n - 1 for n in grid), **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> the same shape. Raises: ValueError for a map of another size."""
        if tuple(x.shape[1:3]) != self.grid:
            raise ValueError(
                f"the map must have the size that the model's relative bias was made for, {self.grid[0]} x {self.grid[1]}, got "
                f"{x.shape[1]} x {x.shape[2]}; call model.set_input_size((height, width)) with the size of the image."
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(3)
        out = neighborhood_attention(q, k, v, self.grid, rel_bias=self.rpb, backend=self.backend)
        assert isinstance(out, Tensor)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Take maps of another size; the bias is resampled."""
        self.grid = grid
        self.rpb = nn.Parameter(resample(self.rpb.detach(), grid), requires_grad=self.rpb.requires_grad)


def resample(rpb: Tensor, grid: tuple[int, int]) -> Tensor:
    """A relative bias (heads, 2H - 1, 2W - 1) for another map, bicubic; the far corners stay the far corners."""
    size = [2 * n - 1 for n in grid]
    if list(rpb.shape[1:]) == size:
        return rpb
    return F.interpolate(rpb.float()[None], size, mode="bicubic", align_corners=True)[0].to(rpb.dtype)


class _Isotropic(StagedBackbone):
    """Blocks of one width on patches. attention: (number of the block, options) -> a module for (B, H, W, C)."""

    no_decay = ("rpb",)

    def __init__(
        self,
        attention: Callable[..., nn.Module],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        patch_size: int,
        dim: int,
        depth: int,
        mlp_ratio: float,
        *,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        backend: str = "auto",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        drop_paths = drop_path_rates(drop_path_rate, [depth])[0]
        options = {"qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, "backend": backend, **dd}
        blocks = [
            NATBlock(
                dim, attention(i, **options), mlp_ratio, layer_scale=layer_scale, drop_path=drop_path,
                proj_drop=proj_drop_rate, **dd,
            )
            for i, drop_path in enumerate(drop_paths)
        ]  # fmt: skip
        super().__init__(
            PatchTokenizer(in_chans, dim, patch_size, **dd),
            [Stage([block]) for block in blocks],
            nn.LayerNorm(dim, **dd),
            [dim] * depth,
            reduction=patch_size,
            growth=1,
            channels_last=True,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        init_weights(self, tables=self.no_decay)


class NATIso(_Isotropic):
    """Isotropic NAT and DiNAT. Any image size; every block is a feature map of stride `patch_size`.

    Args:
        in_chans, num_classes, global_pool: as in timm. patch_size: pixels of a patch along each axis.
        embed_dim, depth, num_heads: of all blocks. mlp_ratio: hidden channels of the MLPs over channels.
        kernel_size: tokens of a window along each axis. dilation: of every other block, 1 for the rest.
        small_input: "pad", "error" or "clamp" maps that are smaller than a window; see NeighborhoodAttention2d.
        qkv_bias, layer_scale, backend, drop_rate, proj_drop_rate, drop_path_rate, device, dtype: as for NAT.
    Source: arXiv:2209.15001; the official code.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        dilation: int = 1,
        small_input: SmallInput = "pad",
        **rest: Any,
    ) -> None:
        def attention(i: int, **options: Any) -> nn.Module:
            return NeighborhoodAttention2d(
                embed_dim, num_heads, kernel_size, dilation if i % 2 else 1, small_input=small_input, **options
            )

        super().__init__(attention, in_chans, num_classes, global_pool, patch_size, embed_dim, depth, mlp_ratio, **rest)


class ViTRPB(_Isotropic):
    """A plain vision transformer with a relative bias over the whole map, for images of one size at a time.

    Args: img_size: pixels, one number or height and width; the others as for NATIso.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        **rest: Any,
    ) -> None:
        def attention(_: int, **options: Any) -> nn.Module:
            return GlobalAttention2d(embed_dim, num_heads, _grid(img_size, patch_size), **options)

        super().__init__(attention, in_chans, num_classes, global_pool, patch_size, embed_dim, depth, mlp_ratio, **rest)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size; the relative biases are resampled."""
        grid = _grid(img_size, self.stem.patch_size)
        for module in self.modules():
            if isinstance(module, GlobalAttention2d):
                module.set_grid(grid)


def _grid(img_size: int | Sequence[int], patch_size: Any) -> tuple[int, int]:
    height, width = to_2tuple(img_size)
    return -(-height // patch_size), -(-width // patch_size)


# ---------------------------------------------------------------- variants


_FAMILY = "an isotropic NAT, DiNAT or ViT-rpb"


def _resampling_filter(content: Mapping[str, Any], model: nn.Module) -> State:
    """As the plain filter, with the relative biases resampled to the model's size."""
    state = from_official(unwrap(content), "isotropic")
    for name, module in model.named_modules():
        rpb = state.get(f"{name}.rpb")
        if isinstance(module, GlobalAttention2d) and rpb is not None and rpb.ndim == 3:
            state[f"{name}.rpb"] = resample(rpb, module.grid)
    return filter_of("isotropic", _FAMILY)(state, model)


default_cfgs = generate_default_cfgs(
    {
        **{f"{kind}_iso_{size}.shi_in1k": cfg(first_conv="stem.proj", pool_size=(14, 14))
           for kind in ("nat", "dinat") for size in ("small", "base")},
        **{f"vitrpb_{size}.shi_in1k": cfg(first_conv="stem.proj", pool_size=(14, 14), fixed_input_size=True)
           for size in ("small", "base")},
    }
)  # fmt: skip

_SIZES: dict[str, dict[str, Any]] = {
    "small": {"embed_dim": 384, "num_heads": 12},
    "base": {"embed_dim": 768, "num_heads": 24},
}
_MAPS = (2, 5, 8, 11)


def _create(name: str, size: str, pretrained: bool, kwargs: dict[str, Any], **variant: Any) -> NATIso:
    args = {**_SIZES[size], **variant}
    found: NATIso = build(
        NATIso, name, pretrained, filter_of("isotropic", _FAMILY), args, kwargs, out_indices=_MAPS
    )  # fmt: skip
    return found


def _create_vit(name: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> ViTRPB:
    found: ViTRPB = build(ViTRPB, name, pretrained, _resampling_filter, _SIZES[size], kwargs, out_indices=_MAPS)
    return found


@register
def nat_iso_small(pretrained: bool = False, **kwargs: Any) -> NATIso:
    """Isotropic NAT-Small: 22 M parameters, 4.3 G multiply-adds, 80.0 % on ImageNet-1k as published."""
    return _create("nat_iso_small", "small", pretrained, kwargs)


@register
def nat_iso_base(pretrained: bool = False, **kwargs: Any) -> NATIso:
    """Isotropic NAT-Base: 86 M parameters, 16.9 G multiply-adds, 81.6 % on ImageNet-1k as published."""
    return _create("nat_iso_base", "base", pretrained, kwargs)


@register
def dinat_iso_small(pretrained: bool = False, **kwargs: Any) -> NATIso:
    """Isotropic DiNAT-Small: 22 M parameters, 4.3 G multiply-adds, 80.8 % on ImageNet-1k as published."""
    return _create("dinat_iso_small", "small", pretrained, kwargs, dilation=2)


@register
def dinat_iso_base(pretrained: bool = False, **kwargs: Any) -> NATIso:
    """Isotropic DiNAT-Base: 86 M parameters, 16.9 G multiply-adds, 82.1 % on ImageNet-1k as published."""
    return _create("dinat_iso_base", "base", pretrained, kwargs, dilation=2)


@register
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> ViTRPB:
    """ViT-rpb-Small: 22 M parameters, 4.6 G multiply-adds, 81.2 % on ImageNet-1k as published."""
    return _create_vit("vitrpb_small", "small", pretrained, kwargs)


@register
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> ViTRPB:
    """ViT-rpb-Base: 86 M parameters, 17.5 G multiply-adds, 82.5 % on ImageNet-1k as published."""
    return _create_vit("vitrpb_base", "base", pretrained, kwargs)
