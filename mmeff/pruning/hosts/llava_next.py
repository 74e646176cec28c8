"""LLaVA-NeXT (1.6): LLaVA with high-resolution tiles behind a base view (transformers' `LlavaNextForConditionalGeneration`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmeff.pruning.hosts._llava_pack import Given, PackedHost, Size


class LlavaNextHost(PackedHost):
    """Finds the decoder layers and the visual tokens of LLaVA-NeXT models; base views and tiles are frames."""

    name = "llava_next"
    models = "transformers LlavaNextForConditionalGeneration"
    architecture = ("transformers.models.llava_next.modeling_llava_next", "LlavaNextForConditionalGeneration")

    @classmethod
    def pack(cls, model: Any, given: Given, values: list[Tensor], sizes: list[Size], newline: Tensor) -> list[Tensor]:
        packed: list[Tensor]
        packed, _ = model.model.pack_image_features(values, sizes, "default", newline)
        return packed


HOSTS = (LlavaNextHost,)
