"""LLaVA-NeXT-Video: LLaVA-NeXT whose video frames are pooled before the projector (`LlavaNextVideoForConditionalGeneration`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mmeff.pruning.hosts.llava import grid_side
from mmeff.pruning.hosts.llava_next import LlavaNextHost


class LlavaNextVideoHost(LlavaNextHost):
    """LLaVA-NeXT's host with videos, each frame of which is one frame without newlines."""

    name = "llava_next_video"
    models = "transformers LlavaNextVideoForConditionalGeneration"
    architecture = (
        "transformers.models.llava_next_video.modeling_llava_next_video", "LlavaNextVideoForConditionalGeneration"
    )  # fmt: skip
    inputs = ("pixel_values", "pixel_values_videos")

    @classmethod
    def pool(cls, model: Any, values: Tensor) -> Tensor:
        """The mean over the patches of a window, whichever way the model pools features ("average", "max" or "conv")."""
        grid = values.transpose(1, 2).unflatten(2, (grid_side(model), -1))
        return F.avg_pool2d(grid, model.config.spatial_pool_stride).flatten(2).transpose(1, 2)

    @classmethod
    def pool_features(cls, model: Any, features: Tensor) -> Tensor:
        return features  # pooled before the projector


HOSTS = (LlavaNextVideoHost,)
