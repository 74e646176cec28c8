"""LLaVA-OneVision: SigLIP tiles, pooled videos and a Qwen2 decoder (transformers' `LlavaOnevisionForConditionalGeneration`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmeff.pruning.hosts._llava_pack import Given, PackedHost, Size


class LlavaOnevisionHost(PackedHost):
    """Finds the decoder layers and the visual tokens of LLaVA-OneVision models.

    Pictures of prompts that `batch_num_images` gives several are not tiled. Grids of many tiles are shrunk, and video frames
    always: their tokens are bilinear means of patches, and so is what the encoder says of them.
    """

    name = "llava_onevision"
    models = "transformers LlavaOnevisionForConditionalGeneration"
    architecture = (
        "transformers.models.llava_onevision.modeling_llava_onevision", "LlavaOnevisionForConditionalGeneration"
    )  # fmt: skip
    inputs = ("pixel_values", "pixel_values_videos")
    video_newlines = 1

    @classmethod
    def pack(cls, model: Any, given: Given, values: list[Tensor], sizes: list[Size], newline: Tensor) -> list[Tensor]:
        ratio = given.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        packed: list[Tensor]
        packed, _ = model.model.pack_image_features(values, sizes, newline, ratio)
        return packed

    @classmethod
    def tiles(cls, model: Any, given: Given, sizes: list[Size]) -> list[int]:
        found, counts = super().tiles(model, given, sizes), given.get("batch_num_images")
        if counts is None:
            return found
        alone = [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)]
        return [count if mine else 1 for count, mine in zip(found, alone, strict=True)]

    @classmethod
    def pool(cls, model: Any, values: Tensor) -> Tensor:
        pooled: Tensor = model.model.apply_pooling(values)
        return pooled


HOSTS = (LlavaOnevisionHost,)
