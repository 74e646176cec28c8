"""Qwen2-VL and Qwen2.5-VL: pictures and videos of any size, four patches to a token, and M-RoPE (transformers'
`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`).

A picture is a grid (1, rows, columns) of patches, a video (frames, rows, columns) where a frame already stands for two.
Blocks of `spatial_merge_size` squared patches are merged into a token by the projector. The vision encoder runs over the
patches of all pictures as one sequence, cut into pictures, and in most layers of Qwen2.5-VL into windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmeff.kernels import token_scores
from mmeff.pruning._base import EncoderView, Need
from mmeff.pruning.hosts._boxes import cells
from mmeff.pruning.hosts._encoder import Bring, Capture
from mmeff.pruning.hosts._multimodal import Prompt, VisionLanguageHost
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View
from mmeff.pruning.hosts.llava import to_rows

KINDS, PIXELS = ("image", "video"), ("pixel_values", "pixel_values_videos")


class Qwen25VLHost(VisionLanguageHost):
    """Finds the decoder layers and the visual tokens of Qwen2.5-VL models; images and frames of videos are frames."""

    name = "qwen2.5-vl"
    models = "transformers Qwen2_5_VLForConditionalGeneration"
    architecture = ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
    inputs = PIXELS

    @classmethod
    def eyes(cls, model: Any) -> Any:
        return model.model.visual

    @classmethod
    def projector(cls, model: Any) -> Any:
        return model.model.visual.merger

    @classmethod
    def offers(cls, model: Any) -> frozenset[Need]:
        return frozenset({"encoder", "projector", "frames"})

    @classmethod
    def places(cls, model: Any, prompt: Prompt) -> Places:
        masks = token_masks(model, prompt)
        found = places_from_grids(model, prompt, masks) or places_from_positions(prompt, masks)
        visual = masks["image"] | masks["video"]
        frame, no = (found.first.cumsum(dim=1) - 1).clamp(min=0), torch.zeros_like(visual)
        return Places(
            visual=visual, marker=no, frame=frame, row=found.row, column=found.column, picture=frame, tile=no,
            box=cells(found.row, found.column, *found.size.unbind(-1)),
        )  # fmt: skip

    @classmethod
    def encoder(cls, model: Any, prompt: Prompt, view: View) -> EncoderView:
        ran = [kind for kind, name in zip(KINDS, PIXELS, strict=True) if prompt.kwargs.get(name) is not None]
        masks = token_masks(model, prompt)
        grids = [prompt.kwargs[f"{kind}_grid_thw"] for kind in ran]
        tokens = [int(mask.sum()) for kind, mask in masks.items() if kind in ran]
        expected = [int(grid.prod(dim=1).sum()) // merge_of(model) ** 2 for grid in grids]
        visual = masks["image"] | masks["video"]
        if len(prompt.seen.calls.get(0, ())) != len(ran) or tokens != expected or sum(tokens) != int(visual.sum()):
            raise ValueError(
                "the method looks at the vision encoder, which did not run for all visual tokens of this prompt: features "
                "were passed in ready-made; pass pixel values, or choose a method that does not need the encoder"
            )

        def bring(values: Tensor) -> Tensor:
            table = values.new_empty(*visual.shape, values.shape[-1])
            for kind, part in zip(ran, values.split(tokens), strict=True):
                table[masks[kind]] = part
            return to_rows(table[visual], visual, view)

        vision = model.config.vision_config
        window = getattr(vision, "window_size", 0) // merge_of(model) // vision.patch_size
        packings = [Packing.of(grid, merge_of(model), window) for grid in grids]
        return BlockEncoder(prompt.seen, bring, packings, cls.projector(model))

    @classmethod
    def visual_tokens(cls, model: Any, **sizes: int) -> tuple[int, str]:
        vision, merge = model.config.vision_config, merge_of(model)
        unit = vision.patch_size * merge
        assumed = "" if sizes["height"] and sizes["width"] else "; pass height and width, this size is assumed"
        height, width = (sizes[name] or cls.standard(model) * vision.patch_size for name in ("height", "width"))
        rows, columns = (max(1, round(pixels / unit)) for pixels in (height, width))
        frames = -(-sizes["frames"] // vision.temporal_patch_size) or sizes["images"]
        return frames * rows * columns, f"{frames} x {rows} x {columns}, each {unit} x {unit} pixels{assumed}"

    @classmethod
    def standard(cls, model: Any) -> int:
        """Patches along a side of the picture that a plan assumes where it is not told: 448 pixels of 14."""
        return 32


class Qwen2VLHost(Qwen25VLHost):
    """Finds the decoder layers and the visual tokens of Qwen2-VL models."""

    name = "qwen2-vl"
    models = "transformers Qwen2VLForConditionalGeneration"
    architecture = ("transformers.models.qwen2_vl.modeling_qwen2_vl", "Qwen2VLForConditionalGeneration")


# ---- where the tokens lie


@dataclass(frozen=True)
class Raster:
    """Per prompt token (B, q): whether it is the first of its frame, and its row and column there.

    size: (B, q, 2) rows and columns of the frame, NaN where they are not known.
    """

    first: Tensor
    row: Tensor
    column: Tensor
    size: Tensor


def merge_of(model: Any) -> int:
    """Patches along a side of a token."""
    return int(model.config.vision_config.spatial_merge_size)


def token_masks(model: Any, prompt: Prompt) -> dict[str, Tensor]:
    """(B, q) bool for tokens of images and of videos: none of a kind that did not come, for the model may say such ids."""
    ready, masks = prompt.kwargs.get("mm_encoder_outputs") or {}, {}
    for kind, pixels in zip(KINDS, PIXELS, strict=True):
        came = prompt.kwargs.get(pixels) is not None or ready.get(kind) is not None
        masks[kind] = (prompt.ids == getattr(model.config, f"{kind}_token_id")) & came
    return masks


def places_from_grids(model: Any, prompt: Prompt, masks: dict[str, Tensor]) -> Raster | None:
    """From the grids that come with pixels; None where they do not describe just the tokens of this chunk, as with grids of
    earlier turns or with prompts that were shortened before."""
    row, column = (torch.zeros_like(prompt.ids, dtype=torch.long) for _ in range(2))
    size = torch.ones(*row.shape, 2, device=row.device)
    for kind, mask in masks.items():
        grid = prompt.kwargs.get(f"{kind}_grid_thw")
        grids = [] if grid is None else grid.tolist()
        found = [row.new_empty(0, 4, device="cpu")]
        for t, h, w in grids:
            at = _cells(t, h, w, merge_of(model))
            found.append(torch.cat([at, torch.tensor([h, w]).expand(len(at), 2) // merge_of(model)], dim=1))
        table = torch.cat(found).to(row.device)
        if len(table) != int(mask.sum()):
            return None
        row[mask], column[mask], size[mask] = table[:, 0], table[:, 1], table[:, 2:].float()
    return Raster((masks["image"] | masks["video"]) & (row == 0) & (column == 0), row, column, size)


def places_from_positions(prompt: Prompt, masks: dict[str, Tensor]) -> Raster:
    """From the M-RoPE positions of the tokens, which generate() passes, and with them users who pick tokens themselves.

    Frames of a video that share a time and of which only some tokens are left may count as one.

    Raises:
        ValueError: there are no such positions.
    """
    given = prompt.kwargs.get("position_ids")
    visual = masks["image"] | masks["video"]
    kind = masks["image"] + 2 * masks["video"]
    time, row, column = given[-3:] if torch.is_tensor(given) and given.ndim == 3 and len(given) > 2 else (0 * kind,) * 3
    opens = visual & (kind != _previous(kind))  # a picture, or a video
    inside = visual & ~opens
    if bool((inside & (time == row) & (row == column)).eq(inside).all()) and bool(inside.any()):
        raise ValueError(
            "where the visual tokens lie cannot be told: the model was given neither image_grid_thw and video_grid_thw that "
            "match them nor M-RoPE positions of theirs; pass the grids and mm_token_type_ids, as the processor returns them"
        )
    run = opens.cumsum(dim=1)
    least = torch.where(visual, torch.minimum(time, torch.minimum(row, column)), torch.iinfo(time.dtype).max)
    origin = torch.full_like(least, torch.iinfo(time.dtype).max).scatter_reduce(1, run, least, "amin").gather(1, run)
    row, column = ((x - origin) * visual for x in (row, column))
    above, left = _previous(row), _previous(column)
    onward = (row > above) | (row == above) & (column > left)
    unknown = torch.full((*row.shape, 2), torch.nan, device=row.device)
    return Raster(opens | inside & ((time != _previous(time)) | ~onward), row, column, unknown)


def _previous(x: Tensor) -> Tensor:
    return F.pad(x[:, :-1], (1, 0))


def _cells(frames: int, rows: int, columns: int, merge: int) -> Tensor:
    """(tokens, 2): row and column of each token of a picture or video of frames x rows x columns patches."""
    return torch.cartesian_prod(torch.arange(rows // merge), torch.arange(columns // merge)).repeat(frames, 1)


# ---- what the encoder saw


@dataclass(frozen=True)
class Packing:
    """How the tokens of a call of the encoder stand in its sequence.

    order: (tokens,) the token at each place of the sequence. patches: (tokens,) patches in the token's frame. merge: patches
    in a token.
    """

    order: Tensor
    patches: Tensor
    merge: int

    @classmethod
    def of(cls, grid: Tensor, side: int, window: int) -> Packing:
        """For grids (pictures, 3) in patches, and windows of so many tokens along a side, or 0 for none. Frames stay together,
        then windows row by row, then the tokens of each."""
        order, patches, before = [], [], 0
        for frames, rows, columns in grid.tolist():
            cells = _cells(frames, rows, columns, side)
            frame = torch.arange(frames).repeat_interleave(len(cells) // frames)
            inside = cells // (window or max(rows, columns))
            order.append(((frame * rows + inside[:, 0]) * columns + inside[:, 1]).argsort(stable=True) + before)
            patches.append(torch.full((len(cells),), rows * columns))
            before += len(cells)
        return cls(torch.cat(order).to(grid.device), torch.cat(patches).to(grid.device), side**2)

    def tokens(self, values: Tensor) -> Tensor:
        """(tokens, C) means of their patches, from (patches, C) as they stand in the sequence."""
        return self.sort(values.unflatten(0, (-1, self.merge)).mean(dim=1))

    def sort(self, values: Tensor) -> Tensor:
        """(tokens, C) in the order of the prompt, from the sequence's."""
        return torch.empty_like(values).index_copy_(0, self.order, values)


class BlockEncoder:
    """An `EncoderView` of Qwen's vision encoders: blocks with `norm1` and `attn.qkv`, rotary embeddings, one packed sequence.

    Keys are those after the rotary embedding. The features of a token are those of its patches, side by side.

    Args:
        seen: the captured forward. bring: takes values of all tokens, call by call, to visual tokens. packings: one for
            each call of the encoder. projector: the merger.
    """

    def __init__(self, seen: Capture, bring: Bring, packings: list[Packing], projector: Any) -> None:
        self.layers = len(seen.modules)
        self._seen, self._bring, self._packings, self._projector = seen, bring, packings, projector

    def received(self, layer: int, rows: Literal["class", "all"]) -> Tensor:
        """Patches outside a window pay none to those inside, and count as patches of the picture all the same."""
        if rows == "class":
            raise ValueError('this vision encoder has no class token; ask for rows="all"')
        found = []
        for packing, (q, k, lengths, scale) in zip(self._packings, self._queries_and_keys(layer), strict=True):
            got = q.new_empty(len(q), dtype=torch.float32)
            starts = lengths.cumsum(0) - lengths
            for length in lengths.unique().tolist():  # windows at the edges of a picture are smaller
                at = starts[lengths == length, None] + torch.arange(length, device=starts.device)
                got[at] = token_scores(q[at], k[at], scale=scale).mean(dim=1).float()
            found.append(packing.tokens(got[:, None]) / packing.patches[:, None])
        return self._bring(torch.cat(found))[..., 0]

    def keys(self, layer: int) -> Tensor:
        both = zip(self._packings, self._queries_and_keys(layer), strict=True)
        return self._bring(torch.cat([packing.tokens(k.mean(dim=1)) for packing, (_, k, _, _) in both]))

    def features(self) -> Tensor:
        both = zip(self._packings, self._seen.projected, strict=True)
        return self._bring(torch.cat([p.sort(x.unflatten(0, (-1, p.merge)).flatten(1)) for p, x in both]))

    def project(self, features: Tensor) -> Tensor:
        patches = features.unflatten(-1, (self._packings[0].merge, -1)).flatten(0, -2)
        return self._seen.project(self._projector, patches).reshape(*features.shape[:-1], -1)

    def _queries_and_keys(self, layer: int) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        """(patches, heads, D) float32 each, lengths of the pieces that attend among themselves, and the scale, per call."""
        index = layer % self.layers
        block, found = self._seen.modules[index], []
        for args, kwargs in self._seen.calls[index]:
            x = block.norm1(args[0] if args else kwargs["hidden_states"])
            q, k, _ = block.attn.qkv(x).float().unflatten(-1, (3, block.attn.num_heads, -1)).unbind(dim=1)
            cos, sin = (part.float()[:, None] for part in kwargs["position_embeddings"])
            q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], dim=-1) * sin for y in (q, k))
            found.append((q, k, kwargs["cu_seqlens"].diff().long(), block.attn.scaling))
        return found


HOSTS = (Qwen25VLHost, Qwen2VLHost)
