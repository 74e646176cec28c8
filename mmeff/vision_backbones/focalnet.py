"""FocalNets that timm does not have: the isotropic ones, and the large one with four levels as its file was trained.

Paper: Yang et al., "Focal Modulation Networks", NeurIPS 2022, arXiv:2203.11926. Official code and weights: microsoft/FocalNet.
All modules are timm's; the hierarchical models are timm's own `focalnet_*`.

* `focalnet_{tiny,small,base}_iso`: patches of 16 pixels and 12 blocks of one width, with three levels (kernels 3, 5, 7). The
  official base model norms after each branch and scales it, although its settings file says otherwise; whether a file
  was trained so, its `gamma` keys tell, and loading it makes the model so.
* `focalnet_large_fl4_normalized`: timm's `focalnet_large_fl4` with the modulator divided by its levels, as the official
  settings of that file say. timm leaves the division out, which changes the outputs.

Differs: nothing that is computed. Focal modulation is depthwise convolution, so no kernel of ours takes part.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import LayerNorm2d, LayerScale2d, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models.focalnet import Downsample, FocalNet, checkpoint_filter_fn
from torch import Tensor, nn

from mmeff.vision_backbones._staged import made_as
from mmeff.vision_backbones._timm import State, build, cfg, check_keys, register, unwrap

__all__ = [
    "FocalNetIso", "focalnet_tiny_iso", "focalnet_small_iso", "focalnet_base_iso", "focalnet_large_fl4_normalized",
]  # fmt: skip

LAYER_SCALE = 1e-4  # official, where there is any
NORM = partial(LayerNorm2d, eps=1e-5)


class FocalNetIso(FocalNet):
    """An isotropic FocalNet: one stage of blocks on patches.

    Args:
        patch_size: pixels of a patch; the image is cut to whole patches.
        in_chans, num_classes, global_pool, **kwargs: as for timm's FocalNet, with one stage's `depths`, `focal_levels` and
            `focal_windows`.
    Source: arXiv:2203.11926, section 4.4; microsoft/FocalNet.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 192,
        depths: tuple[int, ...] = (12,),
        focal_levels: tuple[int, ...] = (3,),
        focal_windows: tuple[int, ...] = (3,),
        norm_layer: Any = NORM,
        **kwargs: Any,
    ) -> None:
        if len(depths) != 1:
            raise ValueError(
                f"an isotropic FocalNet has one stage, got depths={tuple(depths)}; pass one number, e.g. (12,)."
            )
        super().__init__(
            in_chans, num_classes, global_pool, embed_dim, depths, focal_levels=focal_levels, focal_windows=focal_windows,
            norm_layer=norm_layer, **kwargs,
        )  # fmt: skip
        self.stem = Downsample(in_chans, embed_dim, patch_size, norm_layer=norm_layer, **made_as(self))
        trunc_normal_(self.stem.proj.weight, std=0.02)
        nn.init.zeros_(self.stem.proj.bias)
        self.feature_info = [{"num_chs": embed_dim, "reduction": patch_size, "module": "layers.0"}]

    @property
    def post_norm(self) -> bool:
        """Whether each branch is normed and scaled behind itself, instead of normed before."""
        return not isinstance(self.layers[0].blocks[0].norm1_post, nn.Identity)

    def set_post_norm(self, post: bool) -> None:
        """Norm and scale each branch behind itself, or norm it before; norms keep their weights."""
        if post == self.post_norm:
            return
        for block in self.layers[0].blocks:
            block.use_post_norm = post
            for i in ("1", "2"):
                before, behind = getattr(block, f"norm{i}"), getattr(block, f"norm{i}_post")
                setattr(block, f"norm{i}", behind)
                setattr(block, f"norm{i}_post", before)
                scale = LayerScale2d(block.dim, LAYER_SCALE, **made_as(self)) if post else nn.Identity()
                setattr(block, f"ls{i}", scale)


def load_focalnet(content: Mapping[str, Any], model: FocalNet) -> State:
    """The weights of a file in the official layout, or as timm saves them, under the names of timm's modules.

    Raises: ValueError for a file that does not fit; it lists the keys.
    """
    state: dict[str, Tensor] = unwrap(content)
    if isinstance(model, FocalNetIso):
        model.set_post_norm(any(".gamma_1" in key or ".ls1.gamma" in key for key in state))
    return check_keys(checkpoint_filter_fn(state, model), model, state, family="a FocalNet")


# ---------------------------------------------------------------- variants

_iso = partial(cfg, first_conv="stem.proj", pool_size=(14, 14))

default_cfgs = generate_default_cfgs(
    {
        "focalnet_tiny_iso.ms_in1k": _iso(),
        "focalnet_small_iso.ms_in1k": _iso(),
        "focalnet_base_iso.ms_in1k": _iso(),
        "focalnet_large_fl4_normalized.ms_in22k": cfg(
            first_conv="stem.proj", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, num_classes=21842
        ),
    }
)


def _create_iso(name: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> FocalNetIso:
    model: FocalNetIso = build(FocalNetIso, name, pretrained, load_focalnet, args, kwargs, out_indices=(0,))
    return model


@register
def focalnet_tiny_iso(pretrained: bool = False, **kwargs: Any) -> FocalNetIso:
    """Isotropic FocalNet of width 192: 5.9 M parameters, 74.1 % on ImageNet-1k as published."""
    return _create_iso("focalnet_tiny_iso", pretrained, kwargs, embed_dim=192)


@register
def focalnet_small_iso(pretrained: bool = False, **kwargs: Any) -> FocalNetIso:
    """Isotropic FocalNet of width 384: 22.4 M parameters, 80.9 % as published."""
    return _create_iso("focalnet_small_iso", pretrained, kwargs, embed_dim=384)


@register
def focalnet_base_iso(pretrained: bool = False, **kwargs: Any) -> FocalNetIso:
    """Isotropic FocalNet of width 768, normed behind its branches: 87.2 M parameters, 82.4 % as published."""
    return _create_iso(
        "focalnet_base_iso", pretrained, kwargs, embed_dim=768, use_post_norm=True, layerscale_value=LAYER_SCALE
    )


@register
def focalnet_large_fl4_normalized(pretrained: bool = False, **kwargs: Any) -> FocalNet:
    """The large FocalNet with four levels whose modulator is divided by them, for the official 22k file."""
    args = {
        "depths": (2, 2, 18, 2), "embed_dim": 192, "focal_levels": (4, 4, 4, 4), "use_post_norm": True,
        "use_overlap_down": True, "layerscale_value": LAYER_SCALE, "normalize_modulator": True,
    }  # fmt: skip
    model: FocalNet = build(FocalNet, "focalnet_large_fl4_normalized", pretrained, load_focalnet, args, kwargs)
    return model
