"""InternVL: square tiles, an encoder of its own with a class token, and several patches to a token (transformers'
`InternVLForConditionalGeneration`).

Pictures are cut into tiles, a small view of the whole picture behind them, and videos come as pictures of one tile each. The
encoder sees every tile as a picture; pixel shuffle then puts blocks of patches side by side, which the projector makes
tokens of. Every tile is a frame, so that a quota by frame keeps a share of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmeff.config import MethodConfig
from mmeff.pruning._base import EncoderView, Need
from mmeff.pruning.hosts._boxes import in_tiles, runs
from mmeff.pruning.hosts._encoder import PatchEncoder
from mmeff.pruning.hosts._multimodal import Prompt, VisionLanguageHost
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View
from mmeff.pruning.hosts.llava import to_rows


class InternVLHost(VisionLanguageHost):
    """Finds the decoder layers and the visual tokens of InternVL models; every tile and every video frame is a frame."""

    name = "internvl"
    models = "transformers InternVLForConditionalGeneration"
    architecture = ("transformers.models.internvl.modeling_internvl", "InternVLForConditionalGeneration")

    @classmethod
    def eyes(cls, model: Any) -> Any:
        return model.model.vision_tower

    @classmethod
    def projector(cls, model: Any) -> Any:
        return model.model.multi_modal_projector

    @classmethod
    def offers(cls, model: Any) -> frozenset[Need]:
        return frozenset({"encoder", "class token", "projector", "frames"})

    @classmethod
    def why_not(cls, model: Any, method: MethodConfig) -> str | None:
        eyes = model.config.vision_config.model_type
        if eyes != "internvl_vision":  # the config takes others too
            return f'its vision encoder is of type "{eyes}", and only that of "internvl_vision" is known here'
        return super().why_not(model, method)

    @classmethod
    def places(cls, model: Any, prompt: Prompt) -> Places:
        pixels = prompt.kwargs.get("pixel_values")
        side = tile_side(model, None if pixels is None else pixels.shape[-1])
        visual = prompt.ids == model.config.image_token_id
        tiles = [[length // side**2 for length in lengths] for lengths in runs(visual)]  # a picture is one run
        each = [sum(counts) for counts in tiles]
        seen: Any = [None] * len(tiles) if pixels is None or len(pixels) != sum(each) else pixels.split(each)
        return places_in_tiles(prompt, visual, side, tiles, seen)

    @classmethod
    def encoder(cls, model: Any, prompt: Prompt, view: View) -> EncoderView:
        visual = prompt.ids == model.config.image_token_id

        def bring(values: Tensor) -> Tensor:
            side = round(values.shape[1] ** 0.5)
            grid = values.unflatten(1, (side, side))
            packed = model.model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio).flatten(0, 2)
            return to_rows(mean_of_patches(packed, values.shape[-1]), visual, view)

        projected = [x.flatten(0, 1) for x in prompt.seen.projected]
        features = to_rows(projected[0], visual, view) if projected else None
        return InternVLEncoder(
            prompt.seen, bring, class_token=True, features=features, projector=cls.projector(model)
        )  # fmt: skip

    @classmethod
    def visual_tokens(cls, model: Any, **sizes: int) -> tuple[int, str]:
        each, (height, width) = tile_side(model, None) ** 2, model.config.vision_config.image_size
        if sizes["frames"]:
            return sizes["frames"] * each, f"{sizes['frames']} frames x {each}"
        assumed = "" if sizes["height"] and sizes["width"] else "; pass height and width, the size of a tile is assumed"
        tiles = count_tiles(sizes["height"] or height, sizes["width"] or width, height, width)
        return sizes["images"] * tiles * each, f"{sizes['images']} x {tiles} tiles x {each}{assumed}"


class InternVLEncoder(PatchEncoder):
    """An `EncoderView` of InternVL's encoder: layers with `layernorm_before` and `attention`, which may norm queries and keys
    over all heads at once."""

    def _queries_and_keys(self, layer: int) -> list[tuple[Tensor, Tensor, float]]:
        index = layer % self.layers
        module, found = self._seen.modules[index], []
        attention = module.attention
        for args, kwargs in self._seen.calls[index]:
            x = module.layernorm_before(args[0] if args else kwargs["hidden_states"])
            q, k = attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x))
            q, k = (y.unflatten(-1, (attention.num_heads, -1)) for y in (q, k))
            found.append((q, k, attention.scale))
        return found


def tile_side(model: Any, pixels: int | None) -> int:
    """Visual tokens along a side of a tile of so many pixels, by default of the size that the model is made for."""
    vision = model.config.vision_config
    pixels = vision.image_size[1] if pixels is None else pixels
    return int(pixels // vision.patch_size[1] * model.config.downsample_ratio)


def count_tiles(height: int, width: int, tile_height: int, tile_width: int) -> int:
    """Tiles that the processor cuts a picture into by default, the view of the whole picture included."""
    from transformers import GotOcr2ImageProcessor

    processor = GotOcr2ImageProcessor(size={"height": tile_height, "width": tile_width}, crop_to_patches=True)
    return int(processor.get_number_of_image_patches(height, width, {}))


# ---- for families of square tiles, each a run of tokens


def places_in_tiles(
    prompt: Prompt, visual: Tensor, side: int, tiles: Sequence[Sequence[int]], pixels: Sequence[Tensor | None]
) -> Places:
    """Places of tokens that come in tiles of side x side, row by row; `tiles` and `pixels` as for `in_tiles`.

    Raises:
        ValueError: the tokens are no whole tiles, as after dropping some by hand.
    """
    at = (visual.cumsum(dim=1) - 1).clamp(min=0)
    frame, at = at // side**2, at % side**2
    position = prompt.kwargs.get("position_ids")
    if position is None:
        position = visual.long().cumsum(dim=1)
    opens = visual & (at == 0)
    follows = F.pad(visual[:, :-1], (1, 0)) & (position.diff(dim=1, prepend=position[:, :1]) == 1)
    whole = visual.sum(dim=1) % side**2 == 0
    if not bool(whole.all()) or not bool((opens | follows | ~visual).all()):
        raise ValueError(
            f"the visual tokens of a row must be whole tiles of {side} x {side}, got rows of {visual.sum(dim=1).tolist()}, or "
            "others between those of a tile; prune prompts of whole pictures, and pass pixel values if tiles are of another "
            "size than the config says"
        )
    row, column = at // side, at % side
    return Places(
        visual=visual, marker=visual.new_zeros(visual.shape), frame=frame, row=row, column=column,
        **in_tiles(frame, row, column, side, tiles, pixels),
    )  # fmt: skip


def mean_of_patches(packed: Tensor, width: int) -> Tensor:
    """(tokens, width) from the values of each token's patches side by side, (tokens, patches * width)."""
    return packed.unflatten(-1, (-1, width)).mean(dim=-2)


HOSTS = (InternVLHost,)
