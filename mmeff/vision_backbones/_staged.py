"""The surface that timm and its users expect of a hierarchical backbone, standing once for the families written here.

A family makes a stem, stages and a final norm and hands them over; everything else (features, heads, pruning, checkpointing,
parameter groups) is here. Modules are called `stem`, `stages.{i}.downsample`, `stages.{i}.blocks.{j}`, `norm` and `head.fc`:
downsampling stands at the start of a stage, so that the output of a stage is its feature map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth by stage: they grow linearly over all blocks, from 0 to `last`."""
    return [x.tolist() for x in torch.linspace(0, last, sum(depths), device="cpu").split(list(depths))]


def made_as(module: nn.Module) -> dict[str, Any]:
    """Device and dtype of a module, as arguments for a new part of it."""
    parameter = next(module.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


class Stage(nn.Module):
    """Downsampling, if any, and a sequence of blocks."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x


class StagedBackbone(nn.Module):
    """A stem, stages, a norm and a classifier, with timm's model surface.

    Args:
        stem: image (B, C, H, W) -> first map in the layout of the stages.
        stages: each maps the output of the one before it; `Stage` unless the family needs more.
        norm: applied to the last map. widths: channels of each stage's output, one per stage.
        reduction: stride of the first stage's output against the image; it doubles from stage to stage unless `growth` says 1.
        channels_last: whether maps are (B, H, W, C) between stages and in `forward_features`, or (B, C, H, W).
        num_classes: 0 for no classifier. global_pool: timm's name of a pooling, "" for none.
        drop_rate: dropout before the classifier. device, dtype: of the classifier; the rest comes made.
    """

    # last parts of parameter names that weight decay leaves alone, besides what timm leaves alone itself
    no_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        widths: Sequence[int],
        *,
        reduction: int = 4,
        growth: int = 2,
        channels_last: bool,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_features = widths[-1]
        self.output_fmt = "NHWC" if channels_last else "NCHW"
        self.feature_info = [
            {"num_chs": width, "reduction": reduction * growth**i, "module": f"stages.{i}"}
            for i, width in enumerate(widths)
        ]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self._make_head(num_classes, global_pool, drop_rate, device=device, dtype=dtype)

    def _make_head(self, num_classes: int, global_pool: str, drop_rate: float, **dd: Any) -> None:
        self.num_classes = num_classes
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head.train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    # ---------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, num_classes), or the pooled features where there is no classifier."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the last map, normed, in the layout that `output_fmt` names."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.norm(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> classes, or with pre_logits the pooled features."""
        found: Tensor = self.head(x, pre_logits=pre_logits)
        return found

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map as `forward_features` gives it, and the maps of chosen stages.

        Args:
            indices: the stages: a list, the last n, or None for all.
            norm: apply the final norm to the map of the last stage, the only one that it fits.
            stop_early: leave out the stages behind the last one asked for.
            output_fmt: of the maps, "NCHW" or "NHWC". intermediates_only: return the maps alone.
        Raises: ValueError for another output_fmt.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        take, last_wanted = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last_wanted + 1] if stop_early else self.stages
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                is_last = i == len(self.stages) - 1
                maps.append(self._in_layout(self.norm(x) if norm and is_last else x, output_fmt))
        if intermediates_only:
            return maps
        if len(stages) == len(self.stages):
            x = self.norm(x)
        return x, maps

    def _in_layout(self, x: Tensor, output_fmt: str) -> Tensor:
        if output_fmt == self.output_fmt:
            return x
        return x.permute((0, 3, 1, 2) if output_fmt == "NCHW" else (0, 2, 3, 1)).contiguous()

    # ---------------------------------------------------------------- what timm's tools ask for

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one asked for, with the norm and the head that they feed; return the indices."""
        take, last_wanted = feature_take_indices(len(self.stages), indices)
        shorter = last_wanted < len(self.stages) - 1
        if prune_norm or shorter:
            self.norm = nn.Identity()
        self.stages = self.stages[: last_wanted + 1]
        if shorter:
            self.num_features = self.feature_info[last_wanted]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return list(take)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, 0 for none, and the pooling if one is named."""
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        self._make_head(num_classes, pool, self.head.drop.p, **made_as(self))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass and compute the rest again."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong together for layer-wise learning rates."""
        stages: list[tuple[str, Any]] = [(r"^stages\.(\d+)", None)]
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": [*(stages if coarse else blocks), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in self.no_decay}


def init_weights(model: nn.Module, tables: Sequence[str] = ()) -> None:
    """Linear layers and the bias tables of these names from a normal of deviation 0.02, biases 0; the rest as torch makes it."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in tables:
            nn.init.trunc_normal_(parameter, std=0.02)
