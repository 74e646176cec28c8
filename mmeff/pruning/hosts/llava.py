"""LLaVA-1.5: a CLIP tower, a two-layer projector and a Llama-like language model (transformers' `LlavaForConditionalGeneration`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmeff.pruning._base import EncoderView, Need
from mmeff.pruning.hosts._boxes import cells
from mmeff.pruning.hosts._encoder import PatchEncoder
from mmeff.pruning.hosts._multimodal import Prompt, VisionLanguageHost
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View


class LlavaHost(VisionLanguageHost):
    """Finds the decoder layers and the visual tokens of LLaVA-1.5 models; every image of a prompt is a frame."""

    name = "llava"
    models = "transformers LlavaForConditionalGeneration"
    architecture = ("transformers.models.llava.modeling_llava", "LlavaForConditionalGeneration")

    @classmethod
    def eyes(cls, model: Any) -> Any:
        return model.model.vision_tower

    @classmethod
    def projector(cls, model: Any) -> Any:
        return model.model.multi_modal_projector

    @classmethod
    def offers(cls, model: Any) -> frozenset[Need]:
        found: set[Need] = {"encoder", "projector", "frames"}
        return frozenset(found | {"class token"} if has_class_token(cls.eyes(model)) else found)

    @classmethod
    def places(cls, model: Any, prompt: Prompt) -> Places:
        visual = prompt.ids == model.config.image_token_id
        rank = (visual.cumsum(dim=1) - 1).clamp(min=0)
        side, no = grid_side(model), torch.zeros_like(visual)
        frame, row, column = rank // (side * side), rank % (side * side) // side, rank % side
        return Places(
            visual=visual, marker=no, frame=frame, row=row, column=column, picture=frame, tile=no,
            box=cells(row, column, side, side),
        )  # fmt: skip

    @classmethod
    def encoder(cls, model: Any, prompt: Prompt, view: View) -> EncoderView:
        def bring(values: Tensor) -> Tensor:
            return to_rows(values.flatten(0, 1), prompt.ids == model.config.image_token_id, view)

        features = bring(torch.cat(prompt.seen.projected)) if prompt.seen.projected else None
        return PatchEncoder(
            prompt.seen,
            bring,
            class_token=has_class_token(cls.eyes(model)),
            features=features,
            projector=cls.projector(model),
        )

    @classmethod
    def visual_tokens(cls, model: Any, **sizes: int) -> tuple[int, str]:
        each, images = grid_side(model) ** 2, sizes["frames"] or sizes["images"]
        return each * images, f"{images} x {each}"


def grid_side(model: Any) -> int:
    """Visual tokens along a side of an image."""
    vision = model.config.vision_config
    return int(vision.image_size) // int(vision.patch_size)


def has_class_token(tower: Any) -> bool:
    """Whether a CLIP-like tower puts a class token before the patches; SigLIP towers do not."""
    return any("class_embedding" in name for name, _ in tower.named_parameters())


def to_rows(values: Tensor, visual: Tensor, view: View) -> Tensor:
    """(B, V, C) for a view's visual tokens, from (tokens, C) of all visual tokens of a prompt in the order of its rows."""
    starts = visual.sum(dim=1).cumsum(0) - visual.sum(dim=1)
    starts = starts.repeat_interleave(len(view.original) // len(starts))  # beams
    at = (starts[:, None] + view.original).clamp(max=len(values) - 1)
    return values[at] * view.present[..., None]


HOSTS = (LlavaHost,)
