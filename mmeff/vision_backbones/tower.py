"""A backbone as the vision tower of a vision-language model: one of its feature maps as a sequence of tokens.

transformers builds timm models by name (`TimmWrapperModel`) and hands their feature maps on as they are, as (B, C, H, W),
while a language model wants (B, tokens, C). So this registers one more name with timm, `vision_tower`, which builds any
backbone and returns tokens. A stock LLaVA can have it, and comes back from a folder once this package is imported:

    TimmWrapperConfig(
        architecture="vision_tower", model_args={"backbone": "biformer_tiny", "index": 3}, do_pooling=False,
        hidden_size=512, image_size=224, patch_size=32,  # what LLaVA reads of a vision tower
    )

with `vision_feature_layer=-1` and `vision_feature_select_strategy="full"`, since there is no class token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

__all__ = ["VisionTower", "vision_tower"]


class VisionTower(nn.Module):
    """A feature map of a backbone, row by row as tokens, under a norm of its own; with what transformers asks of a timm model.

    Args:
        backbone: a timm name. index: which of its feature maps, counted as `features_only` counts; what lies behind is not
            built into the tower. backbone_args: further arguments of the backbone.
        grid: rows and columns of that map, to add a learned table of positions to its tokens; pictures of other sizes are
            refused then. Backbones without absolute positions leave a language model nothing but the order of tokens to say
            where they lie.
        pretrained: whether to load the backbone's weights.
        pretrained_cfg_overlay: as for timm.create_model; `dict(file=path)` loads an official file.
        device, dtype: of the norm; the backbone's go into backbone_args.
    """

    num_classes = 0

    def __init__(
        self,
        backbone: str,
        index: int = -1,
        backbone_args: Mapping[str, Any] | None = None,
        *,
        grid: Sequence[int] | None = None,
        pretrained: bool = False,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        args = dict(backbone_args or {})
        if pretrained_cfg_overlay:
            args["pretrained_cfg_overlay"] = dict(pretrained_cfg_overlay)
        self.net = timm.create_model(
            backbone, pretrained, features_only=True, feature_cls="getter", out_indices=[index], **args
        )
        self.num_features = self.head_hidden_size = int(self.net.feature_info.channels()[0])
        self.reduction = int(self.net.feature_info.reduction()[0])  # pixels along a side of a token
        self.pretrained_cfg = self.default_cfg = self.net.pretrained_cfg
        self.norm = nn.LayerNorm(self.num_features, device=device, dtype=dtype)
        self.grid = None if grid is None else tuple(map(int, grid))
        self.positions = None
        if self.grid is not None:
            table = torch.empty(math.prod(self.grid), self.num_features, device=device, dtype=dtype)
            self.positions = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, V, num_features). Raises: ValueError for a map that is not the grid."""
        return self.forward_features(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """As `forward`."""
        (found,) = self.net(x)
        tokens: Tensor = self.norm(found.flatten(2).transpose(1, 2))
        if self.positions is None:
            return tokens
        if found.shape[2:] != self.grid:
            raise ValueError(
                f"this vision_tower has positions for maps of {self.grid} tokens, and pictures of {tuple(x.shape[2:])} pixels make "
                f"{tuple(found.shape[2:])}; resize them, or create the tower without a grid."
            )
        return tokens + self.positions

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean token; there is no classifier, before which pre_logits would stop."""
        return x.mean(1)

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The tokens, and a list that holds nothing else. Raises: ValueError for indices that mean more than one map."""
        if indices is not None and (indices if isinstance(indices, int) else tuple(indices)) not in (1, (0,), (-1,)):
            raise ValueError(
                f"vision_tower has one feature map, so indices must be [0] or [-1], got {indices}; create the tower with "
                "another index to see another map."
            )
        tokens = self.forward_features(x)
        return tokens, [tokens]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass, as the backbone does it."""
        self.net.model.set_grad_checkpointing(enable)


@register_model
def vision_tower(
    pretrained: bool = False,
    *,
    backbone: str,
    index: int = -1,
    backbone_args: Mapping[str, Any] | None = None,
    grid: Sequence[int] | None = None,
    num_classes: int = 0,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    pretrained_cfg: Any = None,
    cache_dir: Any = None,
    device: Any = None,
    dtype: Any = None,
) -> VisionTower:
    """Build a `VisionTower`. Raises: ValueError for classes, or for what only a model with weights of its own could have."""
    for name, value in (("num_classes", num_classes), ("pretrained_cfg", pretrained_cfg), ("cache_dir", cache_dir)):
        if value:
            raise ValueError(
                f"vision_tower has no classifier and no weights of its own, so {name} must be left out, got {value!r}"
            )
    return VisionTower(
        backbone, index, backbone_args, grid=grid, pretrained=pretrained, pretrained_cfg_overlay=pretrained_cfg_overlay,
        device=device, dtype=dtype,
    )  # fmt: skip
