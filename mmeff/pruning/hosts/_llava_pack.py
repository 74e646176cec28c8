"""What LLaVA-NeXT and its kin share: pictures as a base view and tiles, packed into one run of tokens after un-padding.

A picture's run is its base view, then the un-padded grid of its tiles line by line, a newline embedding behind each line. The
layout is not derived a second time here: coordinates are sent through the model's own packing, and so is whatever a
method wants to know of the encoder. A change of the packing cannot put tokens and values out of step.

Every tile is a frame of its own, and the base view is one. The encoder sees each as a picture, so that what it says of tokens
can be compared inside a tile only; and a quota by frame then keeps a share of every part of a large picture. Un-padding
leaves less of the outer tiles, and their share is less by as much.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmeff.config import MethodConfig
from mmeff.pruning._base import EncoderView, Need
from mmeff.pruning.hosts._boxes import cells, clipped, in_square
from mmeff.pruning.hosts._encoder import PatchEncoder
from mmeff.pruning.hosts._multimodal import Prompt, VisionLanguageHost
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View
from mmeff.pruning.hosts.llava import grid_side, has_class_token

Size = list[int]  # height and width in pixels
Given = Mapping[str, Any]  # keyword arguments of the model
COLUMNS = ("marker", "frame", "row", "column", "picture", "tile")  # frames and pictures among all of their kind


class PackedHost(VisionLanguageHost):
    """Base of families that pack tiles. A subclass packs values as its model does, and pools those of video frames."""

    # ---- what a family says

    @classmethod
    @abstractmethod
    def pack(cls, model: Any, given: Given, values: list[Tensor], sizes: list[Size], newline: Tensor) -> list[Tensor]:
        """The model's packing of (tiles, patches, C) per picture to (tokens, C) per picture; newline: (C,)."""

    @classmethod
    def tiles(cls, model: Any, given: Given, sizes: list[Size]) -> list[int]:
        """How many pictures the encoder is given for each picture, base view included."""
        family, config = sys.modules[cls.architecture[0]], model.config
        unit = config.vision_config.image_size
        return [int(family.image_size_to_num_patches(size, config.image_grid_pinpoints, unit)) for size in sizes]

    @classmethod
    def pool(cls, model: Any, values: Tensor) -> Tensor:
        """The model's pooling of video frames: (frames, patches, C) to (frames, tokens, C)."""
        raise NotImplementedError(f"{cls.name} models have no videos")

    @classmethod
    def pool_features(cls, model: Any, features: Tensor) -> Tensor:
        """As `pool`, for what entered the projector."""
        return cls.pool(model, features)

    video_newlines = 0  # at the end of each video

    # ---- what follows from it

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
    def why_not(cls, model: Any, method: MethodConfig) -> str | None:
        strategy, has = model.config.vision_feature_select_strategy, has_class_token(cls.eyes(model))
        if has != (strategy == "default"):
            return (
                f'its vision_feature_select_strategy is "{strategy}" for a tower with{"" if has else "out"} a class token, '
                "so its visual tokens are no grid"
            )
        return super().why_not(model, method)

    @classmethod
    def places(cls, model: Any, prompt: Prompt) -> Places:
        table = prompt.ids.new_zeros(*prompt.ids.shape, len(COLUMNS))
        box = torch.full((*prompt.ids.shape, 4), torch.nan, device=table.device)
        visual, frames, pictures = torch.zeros_like(prompt.ids, dtype=torch.bool), 0, 0
        for kind, here in _kinds(model, prompt.ids).items():
            tokens, boxes = (cls._pictures if kind == "image" else cls._videos)(model, prompt.kwargs)
            if len(tokens) != int(here.sum()):
                raise ValueError(
                    f"the {kind} tokens of a prompt must be those of its {kind}s, got {int(here.sum())} for {len(tokens)} "
                    f"that sizes and config make; prune prompts of whole {kind}s, with the sizes they were processed from"
                )
            tokens[:, 1] += frames
            tokens[:, 4] += pictures
            frames, pictures = int(tokens[:, 1].max()) + 1, int(tokens[:, 4].max()) + 1
            table[here], box[here] = tokens.to(table.device), boxes.to(box)
            visual |= here
        marker, frame, row, column, picture, tile = table.unbind(-1)
        visual &= marker == 0
        return Places(
            visual=visual, marker=marker.bool(), frame=_in_order(frame, visual), row=row, column=column,
            picture=_in_order(picture, visual), tile=tile.bool(), box=box,
        )  # fmt: skip

    @classmethod
    def encoder(cls, model: Any, prompt: Prompt, view: View) -> EncoderView:
        names = {"image": "pixel_values", "video": "pixel_values_videos"}
        pixels: dict[str, Any] = {kind: prompt.kwargs.get(name) for kind, name in names.items()}
        here = _kinds(model, prompt.ids)
        blind = [kind for kind in here if pixels[kind] is None]
        if blind and prompt.seen.calls:
            raise ValueError(
                f"the method looks at the vision encoder, which did not run for every picture: {blind[0]} features were passed "
                "in ready-made; pass pixel values, or choose a method that does not need the encoder"
            )
        sizes = _sizes(prompt.kwargs) if "image" in here else []
        tiles = cls.tiles(model, prompt.kwargs, sizes) if sizes else []

        def bring(values: Tensor) -> Tensor:
            return to_tokens(values[: sum(tiles)], cls.pool(model, values[sum(tiles) :]) if "video" in here else None)

        def to_tokens(pictures: Tensor, frames: Tensor | None) -> Tensor:
            out = pictures.new_zeros(*prompt.ids.shape, pictures.shape[-1])
            if "image" in here:
                newline = out.new_zeros(out.shape[-1])
                packed = cls.pack(model, prompt.kwargs, list(pictures.split(tiles)), sizes, newline)
                out[here["image"]] = torch.cat(packed)
            if frames is not None:
                videos = frames.unflatten(0, pixels["video"].shape[:2]).flatten(1, 2)
                lines = torch.nn.functional.pad(videos, (0, 0, 0, cls.video_newlines))
                out[here["video"]] = lines.flatten(0, 1)
            at = view.slots()
            rows = torch.arange(len(at), device=at.device) * len(out) // len(at)  # beams are copies of a row
            return out[rows[:, None], at] * view.present[..., None]

        features = None
        if prompt.seen.projected:
            parts = dict(zip(here, prompt.seen.projected, strict=True))  # models project pictures first, then videos
            frames = cls.pool_features(model, parts["video"]) if "video" in here else None
            features = to_tokens(parts["image"] if "image" in here else parts["video"][:0], frames)
        return PatchEncoder(
            prompt.seen,
            bring,
            class_token=has_class_token(cls.eyes(model)),
            features=features,
            projector=cls.projector(model),
        )

    @classmethod
    def visual_tokens(cls, model: Any, **sizes: int) -> tuple[int, str]:
        side, unit = grid_side(model), int(model.config.vision_config.image_size)
        if sizes["frames"] and "pixel_values_videos" in cls.inputs:
            each = cls.pool(model, torch.zeros(1, side * side, 1)).shape[1]
            return sizes["frames"] * each, f"{sizes['frames']} x {each}{_and_newlines(cls.video_newlines)}"
        count = sizes["frames"] or sizes["images"]
        size = [sizes["height"] or unit, sizes["width"] or unit]
        given = {"image_sizes": [size] * count, "batch_num_images": [count]}
        marker, frame, *_ = cls._pictures(model, given)[0].unbind(1)
        visual, tiles = int((marker == 0).sum()), (int(frame.max()) + 1) // count - 1
        grid = visual // count - side * side
        how = f"{count} x {side * side}" if not tiles else f"{count} x ({side * side} + {grid} of {tiles} tiles)"
        return visual, how + _and_newlines(int(marker.sum()))

    # ---- tables of tokens, (tokens, COLUMNS) and boxes

    @classmethod
    def _pictures(cls, model: Any, given: Given) -> tuple[Tensor, Tensor]:
        family, config, side = sys.modules[cls.architecture[0]], model.config, grid_side(model)
        sizes = _sizes(given)
        tiles = cls.tiles(model, given, sizes)
        shapes = [
            family.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
            if count > 1 else (0, 0)
            for size, count in zip(sizes, tiles, strict=True)
        ]  # fmt: skip
        values = [_coordinates(side, *shape) for shape in shapes]
        packed = cls.pack(model, given, values, sizes, torch.zeros(4, dtype=torch.float64))
        tables, boxes, frames = [], [], 0
        for number, (tokens, shape, size, count) in enumerate(zip(packed, shapes, sizes, tiles, strict=True)):
            table = _read(tokens, side, shape[1])
            table[:, 1] += frames
            table[:, 4] = number
            frames += count
            tables.append(table)
            boxes.append(_boxes(tokens, side, shape, size))
        return torch.cat(tables), torch.cat(boxes)

    @classmethod
    def _videos(cls, model: Any, given: Given) -> tuple[Tensor, Tensor]:
        side = grid_side(model)
        each = cls.pool(model, torch.zeros(1, side * side, 1)).shape[1]
        pooled = round(each**0.5)
        pixels = given.get("pixel_values_videos")
        if pixels is not None:
            counts = [pixels.shape[1]] * pixels.shape[0]
        else:
            encoded = given["mm_encoder_outputs"]["video"].pooler_output
            counts = [(x.numel() // x.shape[-1] - cls.video_newlines) // each for x in encoded]
        tables, frames = [], 0
        for count in counts:
            line = torch.arange(pooled)
            table = torch.cartesian_prod(torch.tensor([0]), torch.arange(frames, frames + count), line, line)
            newline = torch.tensor([[1, frames, 0, 0]] * cls.video_newlines).view(-1, 4).long()
            tables.append(torch.cat([table, newline]))
            frames += count
        table = torch.cat(tables)
        table = torch.cat([table, table[:, 1:2], torch.zeros_like(table[:, :1])], dim=1)  # a frame is a picture
        return table, cells(table[:, 2], table[:, 3], pooled, pooled)


def _kinds(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Which tokens (B, q) are those of images and of videos, if there are any; in the order in which models encode them."""
    tokens = {kind: getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")}
    found = {kind: ids.eq(token) for kind, token in tokens.items() if token is not None}
    return {kind: here for kind, here in found.items() if bool(here.any())}


def _sizes(given: Given) -> list[Size]:
    found = given.get("image_sizes")
    if found is None:
        raise ValueError(
            "the places of packed tokens must follow from the sizes of their pictures, got none; pass image_sizes, together "
            "with mm_encoder_outputs too"
        )
    sizes: list[Size] = torch.as_tensor(found).tolist()
    return sizes


def _coordinates(side: int, high: int, wide: int) -> Tensor:
    """(1 + high * wide, side * side, 4) float64 for the patches of a base view and its tiles: the row and column of their
    centres, in the whole grid for tiles; 1 for those of tiles; 1 for all, which tells them from newlines once packed."""
    line = torch.arange(side, dtype=torch.float64) + 0.5
    corners = torch.cartesian_prod(torch.arange(high), torch.arange(wide)).double() * side
    place = torch.cat([torch.zeros(1, 2), corners])[:, None] + torch.cartesian_prod(line, line)
    tiled = torch.ones(len(place), side * side, 1)
    tiled[0] = 0
    return torch.cat([place, tiled, torch.ones_like(tiled)], dim=-1)


def _read(packed: Tensor, side: int, across: int) -> Tensor:
    """(tokens, COLUMNS) of one picture with `across` tiles in a row, from its packed coordinates.

    Where the packing shrinks the grid, centres are those of the larger tokens, which belong to the tile they lie in; a
    centre on a seam belongs to the tile behind it.
    """
    y, x, tiled, patch = packed.unbind(1)
    marker, tiled = patch < 0.5, tiled > 0.5
    frame, row, column = torch.zeros(len(packed), dtype=torch.long), y.long(), x.long()
    if across:
        down, right = ((c / side + 1e-9).long() for c in (y, x))
        frame = torch.where(tiled, 1 + down * across + right, 0)
        length = (len(packed) - side * side) // int(marker.sum())
        at = torch.arange(len(packed)) - side * side
        for mine, whole in ((row, at // length), (column, at % length)):
            first = torch.full((int(frame.max()) + 1,), len(packed))
            first.scatter_reduce_(0, frame, whole, "amin")
            mine[tiled] = (whole - first[frame])[tiled]
    tile = tiled & ~marker if across else torch.zeros_like(marker)
    table = torch.stack([marker.long(), frame, row, column, torch.zeros_like(row), tile.long()], dim=1)
    table[marker, 1:] = 0
    return table


def _boxes(packed: Tensor, side: int, shape: tuple[int, int], size: Size) -> Tensor:
    """(tokens, 4) boxes in one picture of this size, from its packed coordinates; `shape` is that of its tiles, 0 for none.

    The base view is the picture squeezed into a square, or padded to one where there are no tiles. The grid of tiles is the
    picture scaled until it fits, with padding around it, most of which is not among the tokens.
    """
    y, x, tiled, patch = packed.unbind(1)
    marker, tiled = patch < 0.5, tiled > 0.5
    whole = torch.stack([x - 0.5, y - 0.5, x + 0.5, y + 0.5], dim=1) / side
    if not shape[1]:
        return in_square(whole, *size).masked_fill(marker[:, None], torch.nan)
    scale = min(n * side / pixels for n, pixels in zip(shape, size, strict=True))
    box = []
    for centre, tiles, pixels in ((x, shape[1], size[1]), (y, shape[0], size[0])):
        lines = centre[tiled & ~marker].unique()
        apart = lines.diff()
        step = float(apart[apart > 1e-6].median()) if len(lines) > 1 else pixels * scale  # of tokens, in patches
        pad = (tiles * side - pixels * scale) / 2
        box += [(centre + way * step / 2 - pad) / (pixels * scale) for way in (-1, 1)]
    left, right, top, bottom = box
    found = torch.where(tiled[:, None], clipped(torch.stack([left, top, right, bottom], dim=1)), whole)
    return found.masked_fill(marker[:, None], torch.nan)


def _in_order(frame: Tensor, visual: Tensor) -> Tensor:
    """(B, q): the frames of each row numbered from 0 as they appear in it; 0 elsewhere."""
    out = torch.zeros_like(frame)
    for b in range(len(frame)):
        _, label = frame[b][visual[b]].unique(return_inverse=True)
        if label.numel():
            first = torch.full((int(label.max()) + 1,), len(label), device=label.device)
            first.scatter_reduce_(0, label, torch.arange(len(label), device=label.device), "amin")
            out[b][visual[b]] = first.argsort().argsort()[label]
    return out


def _and_newlines(count: int) -> str:
    return f", and {count} newline{'s' if count > 1 else ''} that stay{'' if count > 1 else 's'}" if count else ""
