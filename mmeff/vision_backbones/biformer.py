"""BiFormer: a convolutional hierarchy whose tokens attend to the regions of the map that matter most to their own region.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023 (arXiv 2303.08810); official code and
weights: rayleizhu/BiFormer (MIT).

Differs from the official models: the picked regions are attended to by the backend that is fastest for the map
(`routing_backend`, see `_routing.py`); maps that the regions do not divide are padded without being asked to; the number of
regions may grow with the image (`regions`); downsampling stands at the start of a stage; inputs are normalised as in training,
by ImageNet's mean and deviation. What the official code computes is kept even where it surprises: scores are scaled by the
full width, padding attends and is attended to, and the last stage has 8 heads, no bias and a position term of its own.

Under torch.export, routing_backend="auto" takes plain PyTorch alone, so that programs run anywhere and ONNX needs no operator
of ours; "kernel" puts our operator into the program, which ONNX does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from mmeff.vision_backbones._routing import RoutingBackend, check_backend, cut, region_attention, route, surround
from mmeff.vision_backbones._staged import Stage, StagedBackbone, drop_path_rates, init_weights
from mmeff.vision_backbones._timm import State, build, cfg, check_keys, register, unwrap

__all__ = [
    "BiFormer", "BiFormerBlock", "BiLevelRoutingAttention", "biformer_base", "biformer_small", "biformer_stl",
    "biformer_stl_nchw", "biformer_tiny",
]  # fmt: skip

Form = Literal["conv", "stl", "stl_nchw"]

# Side of the first stage's map in an image of 224 pixels, from which regions="scaled" counts.
FIRST_MAP = 56
HEAD_DIM = 32
LEPE_REACH = 2  # tokens on each side that the convolution of the values sees
# Heads of the last stage, whatever its width.
DENSE_HEADS = 8


class BiLevelRoutingAttention(nn.Module):
    """Attention of each region of a map to the tokens of the `topk` regions that it picks, and a convolution of the values.

    Args:
        dim: channels, a multiple of `head_dim`. topk: regions that each region picks; all, where there are fewer.
        regions: per side of the map, or "scaled" to let them grow with it. reference: side of the map at 224 pixels.
        auto_pad: pad maps that the regions do not divide; without it they are refused.
        pad_projected: pad as the NCHW rewrite of the official code does: zeros behind the projection, left out of the means
            and of the convolution, and region sizes rounded down. Otherwise zeros before the projection, so that padding has
            the bias for queries, keys and values and counts like any token. Either way it is attended to.
        routing_backend: "auto" or a backend of `region_attention`.
    """

    def __init__(
        self,
        dim: int,
        topk: int,
        *,
        head_dim: int = HEAD_DIM,
        regions: int | Literal["scaled"] = 7,
        reference: int = FIRST_MAP,
        auto_pad: bool = True,
        pad_projected: bool = False,
        routing_backend: RoutingBackend = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"BiFormer.widths must be multiples of {head_dim} channels, one head each, got {dim}.")
        if regions != "scaled" and (isinstance(regions, bool) or not isinstance(regions, int) or regions < 1):
            raise ValueError(
                f"BiFormer.regions must be an int >= 1, the regions along a side of a map, or 'scaled', got {regions!r}; "
                "checkpoints were trained with 7."
            )
        if topk < 1:
            raise ValueError(f"BiFormer.topk must be at least 1 region, or None for dense attention, got {topk}.")
        dd = {"device": device, "dtype": dtype}
        self.heads, self.topk, self.scale = dim // head_dim, topk, dim**-0.5
        self.regions, self.reference = regions, reference
        self.auto_pad, self.pad_projected = auto_pad, pad_projected
        self.routing_backend = check_backend(routing_backend)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 2 * LEPE_REACH + 1, padding=LEPE_REACH, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> the same shape. Raises: ValueError for a map to pad without auto_pad."""
        B, H, W, C = x.shape
        regions = cut(H, W, self.regions, reference=self.reference, floor=self.pad_projected)
        pad_h, pad_w = regions.padding
        qkv = self.qkv(x)
        values, fill = qkv[..., 2 * C :], None
        if pad_h or pad_w:
            if not self.auto_pad:
                raise ValueError(
                    f"without auto_pad, regions must divide the maps of all stages that route, got a map of {H} x {W} and "
                    f"{regions.rows} x {regions.cols} regions; pass an image of another size, or create the model with "
                    "auto_pad=True."
                )
            # what the projection makes of zeros, or zeros in its place
            fill = qkv.new_zeros(3 * C) if self.pad_projected else self.qkv(x.new_zeros(C))
            if not self.pad_projected:
                values = surround(values, fill[2 * C :], min(pad_h, LEPE_REACH), min(pad_w, LEPE_REACH))
        by_region = regions.split(qkv, fill)
        means = by_region[..., : 2 * C].detach().mean(2)
        if self.pad_projected and (pad_h or pad_w):
            means = means * (regions.tokens / regions.inside(x.device))[:, None]
        mean_q, mean_k = means.chunk(2, -1)
        routes = route(mean_q, mean_k, self.topk)
        out = region_attention(by_region, routes, heads=self.heads, scale=self.scale, backend=self.routing_backend)
        lepe = self.lepe(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(regions.join(out) + lepe[:, :H, :W])

    def extra_repr(self) -> str:
        return f"heads={self.heads}, topk={self.topk}, regions={self.regions}, routing_backend={self.routing_backend!r}"


class DenseAttention(nn.Module):
    """The last stage: every token attends to all, in 8 heads of any width, with a convolution for the position.

    Args:
        dim: channels, a multiple of 8. lepe_of_values: convolve the values instead of the input.
    """

    def __init__(self, dim: int, *, lepe_of_values: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if dim % DENSE_HEADS:
            raise ValueError(
                f"BiFormer.widths must be multiples of {DENSE_HEADS} where topk is None: such a stage has {DENSE_HEADS} heads; "
                f"got {dim}."
            )
        dd = {"device": device, "dtype": dtype}
        self.lepe_of_values = lepe_of_values
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, 2 * LEPE_REACH + 1, padding=LEPE_REACH, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> the same shape."""
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.view(B, H * W, 3, DENSE_HEADS, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        of = qkv[..., 2 * C :] if self.lepe_of_values else x
        return self.proj(out + self.lepe(of.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class BiFormerBlock(nn.Module):
    """A depthwise convolution for the position, attention and an MLP, each added to its input.

    Args:
        attn: maps (B, H, W, C) to the same shape. mlp_ratio: hidden channels over dim.
        pos_embed: whether there is the convolution. drop_path: chance to skip attention or MLP in training.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        pos_embed: bool,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) -> the same shape, stored with channels last, as attention, norms and MLP want it."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class _Stem(nn.Sequential):
    """Layers from the image on, with channels last in memory, which depthwise convolutions on CPUs want (30 times faster)."""

    def __init__(self, layers: Sequence[nn.Module], smallest: int) -> None:
        super().__init__(*layers)
        self.smallest = smallest

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(
                f"images must be at least {self.smallest} pixels high and wide for this network, whose maps are halved without "
                f"overlap, got {x.shape[2]} x {x.shape[3]}; enlarge them."
            )
        x = super().forward(x.contiguous(memory_format=torch.channels_last))
        return x


def _stem(in_chans: int, width: int, form: Form, dd: dict[str, Any]) -> nn.Module:
    """(B, C, H, W) -> (B, width, H / 4, W / 4)."""
    if form != "conv":
        return _Stem([nn.Conv2d(in_chans, width, 4, 4, **dd), nn.BatchNorm2d(width, **dd)], 32)
    first = [nn.Conv2d(in_chans, width // 2, 3, 2, 1, **dd), nn.BatchNorm2d(width // 2, **dd), nn.GELU()]
    return _Stem([*first, nn.Conv2d(width // 2, width, 3, 2, 1, **dd), nn.BatchNorm2d(width, **dd)], 1)


def _downsample(narrow: int, wide: int, form: Form, dd: dict[str, Any]) -> nn.Module:
    """(B, narrow, H, W) -> (B, wide, H / 2, W / 2)."""
    if form != "conv":
        return nn.Sequential(nn.BatchNorm2d(narrow, **dd), nn.Conv2d(narrow, wide, 2, 2, **dd))
    return nn.Sequential(nn.Conv2d(narrow, wide, 3, 2, 1, **dd), nn.BatchNorm2d(wide, **dd))


class BiFormer(StagedBackbone):
    """BiFormer for images of any size.

    Args:
        in_chans, num_classes, global_pool: as in timm.
        depths, widths: blocks and channels of each stage, four of each; widths are multiples of 32.
        mlp_ratio: hidden channels of the MLPs over channels.
        form: "conv" has overlapping convolutions between stages and a convolution in every block; "stl" and "stl_nchw" have
            the layout of Swin-T without either, and the latter the padding and position term of the official rewrite.
        topk: regions that each region attends to, per stage; None attends to everything, densely.
        regions: regions per side of a map, 7 for the published weights; "scaled" has 7 at 224 pixels and (side / 224) ** (2 / 3)
            times as many on larger images, which keeps the cost at (HW) ** (4 / 3), the paper's, instead of (HW) ** 2.
        auto_pad: pad maps that the regions do not divide; without it such images are refused.
        routing_backend: "auto", "masked", "gather", "kernel" or "gather-reference"; see `region_attention` and `choose`.
        drop_rate: dropout before the classifier. drop_path_rate: of the last block; it grows linearly from 0.
        device, dtype: of the weights.

    Raises: ValueError for options that do not exist or do not fit each other; from forward for images that are too small for
        the Swin layout (32 pixels), or not divided where auto_pad is off; BackendUnavailable for a named "kernel" that
        cannot run.
    Numerics: affinities of regions and softmax in float32, also in half precision; LayerNorm's eps is 1e-6.
    Source: arXiv 2303.08810; the official code for what the paper leaves open.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        mlp_ratio: float = 3.0,
        form: Form = "conv",
        topk: Sequence[int | None] = (1, 4, 16, None),
        regions: int | Literal["scaled"] = 7,
        auto_pad: bool = True,
        routing_backend: RoutingBackend = "auto",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if form not in get_args(Form):
            raise ValueError(f"BiFormer.form must be one of {', '.join(map(repr, get_args(Form)))}, got {form!r}.")
        check_backend(routing_backend)  # also where no stage routes
        if not len(depths) == len(widths) == len(topk) == 4:
            raise ValueError(
                f"BiFormer.depths, widths and topk must have one entry for each of the 4 stages, got {depths}, {widths} and "
                f"{topk}."
            )
        dd = {"device": device, "dtype": dtype}
        drop_paths = drop_path_rates(drop_path_rate, depths)

        def attention(i: int) -> nn.Module:
            picks = topk[i]
            if picks is None:
                return DenseAttention(widths[i], lepe_of_values=form == "stl_nchw", **dd)
            return BiLevelRoutingAttention(
                widths[i], picks, regions=regions, reference=FIRST_MAP // 2**i, auto_pad=auto_pad,
                pad_projected=form == "stl_nchw", routing_backend=routing_backend, **dd,
            )  # fmt: skip

        stages = []
        for i, width in enumerate(widths):
            blocks = [
                BiFormerBlock(
                    width, attention(i), mlp_ratio=mlp_ratio, pos_embed=form == "conv", drop_path=drop_path, **dd
                )
                for drop_path in drop_paths[i]
            ]
            stages.append(Stage(blocks, _downsample(widths[i - 1], width, form, dd) if i else None))
        super().__init__(
            _stem(in_chans, widths[0], form, dd),
            stages,
            nn.BatchNorm2d(widths[-1], **dd),
            widths,
            channels_last=False,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        init_weights(self)


# ---------------------------------------------------------------- checkpoints and variants

_RENAMED = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter(content: Mapping[str, Any], model: nn.Module) -> State:
    """Turn an official checkpoint into the model's state dict; one that was saved here stays as it is.

    Raises: ValueError if it does not fit; missing and unexpected keys are listed.
    """
    state = unwrap(content)
    renamed = {}
    for key, value in state.items():
        name = key
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        # the NCHW rewrite has its linear layers as convolutions of one pixel
        linear = re.search(r"\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight$", name)
        renamed[name] = value.flatten(1) if linear and value.ndim == 4 else value
    return check_keys(renamed, model, state, family="a BiFormer")


default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": cfg(first_conv="stem.0")
        for name in ("biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw")
    }
)

_SWIN = {"depths": (2, 2, 6, 2), "widths": (96, 192, 384, 768), "mlp_ratio": 4.0}


def _create(name: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> BiFormer:
    model: BiFormer = build(BiFormer, name, pretrained, checkpoint_filter, args, kwargs)
    return model


@register
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 G multiply-adds, 81.4 % on ImageNet-1k as published."""
    return _create("biformer_tiny", pretrained, {}, kwargs)


@register
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 G multiply-adds, 83.8 % on ImageNet-1k as published."""
    return _create("biformer_small", pretrained, {"depths": (4, 4, 18, 4)}, kwargs)


@register
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 G multiply-adds, 84.3 % on ImageNet-1k as published."""
    return _create("biformer_base", pretrained, {"depths": (4, 4, 18, 4), "widths": (96, 192, 384, 768)}, kwargs)


@register
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer in the layout of Swin-T: 28.4 M parameters, 4.6 G multiply-adds, 82.7 % on ImageNet-1k as published."""
    return _create("biformer_stl", pretrained, {**_SWIN, "form": "stl"}, kwargs)


@register
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """The same as the authors rewrote it: other padding, and the last stage convolves its values; its own weights."""
    return _create("biformer_stl_nchw", pretrained, {**_SWIN, "form": "stl_nchw"}, kwargs)
