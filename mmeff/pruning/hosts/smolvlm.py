"""SmolVLM: tiles with markers between them, SigLIP, pixel shuffle and a Llama-like decoder (transformers'
`SmolVLMForConditionalGeneration`).

A picture is a grid of tiles and then a view of the whole picture, video frames are one tile each. In front of every tile
stand tokens that say where it lies; they and the line breaks are text in front of visual tokens, and always stay. Every tile
is a frame.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmeff.pruning._base import EncoderView, Need
from mmeff.pruning.hosts._encoder import PatchEncoder
from mmeff.pruning.hosts._multimodal import Prompt, VisionLanguageHost
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View
from mmeff.pruning.hosts.internvl import mean_of_patches, places_in_tiles
from mmeff.pruning.hosts.llava import to_rows


class SmolVLMHost(VisionLanguageHost):
    """Finds the decoder layers and the visual tokens of SmolVLM models; every tile and every video frame is a frame."""

    name = "smolvlm"
    models = "transformers SmolVLMForConditionalGeneration"
    architecture = ("transformers.models.smolvlm.modeling_smolvlm", "SmolVLMForConditionalGeneration")

    @classmethod
    def language(cls, model: Any) -> Any:
        return model.model.text_model

    @classmethod
    def eyes(cls, model: Any) -> Any:
        return model.model.vision_model

    @classmethod
    def projector(cls, model: Any) -> Any:
        return model.model.connector.modality_projection

    @classmethod
    def offers(cls, model: Any) -> frozenset[Need]:
        return frozenset({"encoder", "projector", "frames"})

    @classmethod
    def places(cls, model: Any, prompt: Prompt) -> Places:
        pixels = prompt.kwargs.get("pixel_values")
        side = tile_side(model, None if pixels is None else pixels.shape[-1])
        visual = prompt.ids == model.config.image_token_id
        tiles = [tiles_of(ids, here, side**2) for ids, here in zip(prompt.ids, visual, strict=True)]
        seen: Any = [None] * len(tiles) if pixels is None or len(pixels) != len(tiles) else pixels
        return places_in_tiles(prompt, visual, side, tiles, seen)

    @classmethod
    def encoder(cls, model: Any, prompt: Prompt, view: View) -> EncoderView:
        visual = prompt.ids == model.config.image_token_id
        connector = model.model.connector
        _require_whole(prompt)

        def bring(values: Tensor) -> Tensor:
            packed = connector.pixel_shuffle(values, connector.scale_factor).flatten(0, 1)
            return to_rows(mean_of_patches(packed, values.shape[-1]), visual, view)

        projected = [x.flatten(0, 1) for x in prompt.seen.projected]
        features = to_rows(projected[0], visual, view) if projected else None
        return PatchEncoder(
            prompt.seen, bring, class_token=False, features=features, projector=cls.projector(model)
        )  # fmt: skip

    @classmethod
    def visual_tokens(cls, model: Any, **sizes: int) -> tuple[int, str]:
        each, unit = tile_side(model, None) ** 2, int(model.config.vision_config.image_size)
        if sizes["frames"]:
            return sizes["frames"] * each, f"{sizes['frames']} frames x {each}"
        assumed = "" if sizes["height"] and sizes["width"] else "; pass height and width, a square is assumed"
        tiles = count_tiles(sizes["height"] or unit, sizes["width"] or unit, unit)
        return sizes["images"] * tiles * each, f"{sizes['images']} x {tiles} tiles x {each}{assumed}"


def tile_side(model: Any, pixels: int | None) -> int:
    """Visual tokens along a side of a tile of so many pixels, by default of the size that the model is made for."""
    vision = model.config.vision_config
    return int(pixels or vision.image_size) // int(vision.patch_size) // int(model.config.scale_factor)


def tiles_of(ids: Tensor, visual: Tensor, each: int) -> list[int]:
    """How many tiles each picture of a row (q,) has, of `each` tokens a tile.

    In front of every tile stands its name. The last tile of a row is the view of a whole picture, and so are those of its
    name, with which pictures end.
    """
    first = visual.nonzero()[::each, 0]
    names = ids[(first - 1).clamp(min=0)]
    ends = (names == names[-1:]).nonzero()[:, 0] + 1
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def count_tiles(height: int, width: int, unit: int) -> int:
    """Tiles that the processor cuts a picture into by default, after it brought the longer side to that of four tiles; the view
    of the whole picture included."""
    from transformers import SmolVLMImageProcessor

    processor = SmolVLMImageProcessor(size={"longest_edge": 4 * unit}, max_image_size={"longest_edge": unit})
    tiles, _, _ = processor.get_number_of_image_patches(height, width, {})
    return max(1, int(tiles))


def _require_whole(prompt: Prompt) -> None:
    """Pictures that fill their tiles, as the processor makes them; tiles of zeros only fill up a batch."""
    pixels, mask = prompt.kwargs.get("pixel_values"), prompt.kwargs.get("pixel_attention_mask")
    if pixels is not None and mask is not None and not bool(mask.bool()[(pixels != 0).flatten(2).any(dim=2)].all()):
        raise ValueError(
            "a method that looks at the vision encoder must be given tiles without padding, got a pixel_attention_mask that "
            "blanks a part of one; resize pictures to whole tiles, as the processor does"
        )


HOSTS = (SmolVLMHost,)
