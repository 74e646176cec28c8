"""VideoLLaMA3: pictures and videos of any size, and frames that are thinned out before the language model (transformers'
`VideoLlama3ForConditionalGeneration`).

A picture is a grid (1, rows, columns) of patches, a video (frames, rows, columns); blocks of merge size squared patches are
averaged into a token, where pictures and videos have merge sizes of their own. The processor finds tokens of a video that
differ little from those of the frame before, and `video_compression_mask` says which are left: only these are in the
prompt, and they are what methods choose from. Frames stand apart, each behind its time as text, which always stays.

The model computes logits of every token, and has no argument to keep the last alone: under generate() that does not matter,
and who calls it by hand passes logits_to_keep=1 to say that he looks at the last only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmeff.pruning._base import EncoderView, Need
from mmeff.pruning.hosts._boxes import cells
from mmeff.pruning.hosts._multimodal import Prompt, VisionLanguageHost
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View
from mmeff.pruning.hosts.llava import to_rows
from mmeff.pruning.hosts.qwen_vl import KINDS, BlockEncoder, token_masks

IMAGE_MERGE, VIDEO_MERGE = 1, 2  # of the processors, which put them into every prompt; the config does not know them
STANDARD = 32  # patches along a side of the picture that a plan assumes where it is not told


class VideoLlama3Host(VisionLanguageHost):
    """Finds the decoder layers and the visual tokens of VideoLLaMA3 models; images and frames of videos are frames."""

    name = "video_llama_3"
    models = "transformers VideoLlama3ForConditionalGeneration"
    architecture = (
        "transformers.models.video_llama_3.modeling_video_llama_3", "VideoLlama3ForConditionalGeneration"
    )  # fmt: skip
    inputs = ("pixel_values", "pixel_values_videos")

    @classmethod
    def eyes(cls, model: Any) -> Any:
        return model.model.vision_model

    @classmethod
    def projector(cls, model: Any) -> Any:
        return model.model.projector

    @classmethod
    def offers(cls, model: Any) -> frozenset[Need]:
        return frozenset({"encoder", "projector", "frames"})

    @classmethod
    def places(cls, model: Any, prompt: Prompt) -> Places:
        table = prompt.ids.new_zeros(*prompt.ids.shape, 5)
        visual, frames = torch.zeros_like(prompt.ids, dtype=torch.bool), 0
        for kind, mask in token_masks(model, prompt).items():
            if bool(mask.any()):
                mine = Grids.of(prompt, kind, int(mask.sum())).cells()
                mine[:, 0] += frames
                frames = int(mine[:, 0].max()) + 1  # images and videos share no frame
                table[mask] = mine.to(mask.device)
                visual |= mask
        frame, row, column, rows, columns = table.unbind(dim=-1)
        frame, no = in_order(frame, visual), torch.zeros_like(visual)
        return Places(
            visual=visual, marker=no, frame=frame, row=row, column=column, picture=frame, tile=no,
            box=cells(row, column, rows, columns),
        )  # fmt: skip

    @classmethod
    def encoder(cls, model: Any, prompt: Prompt, view: View) -> EncoderView:
        ran = [kind for kind, name in zip(KINDS, cls.inputs, strict=True) if prompt.kwargs.get(name) is not None]
        masks = token_masks(model, prompt)
        visual = masks["image"] | masks["video"]
        blind = any(bool(mask.any()) for kind, mask in masks.items() if kind not in ran)
        if blind or len(prompt.seen.calls.get(0, ())) != len(ran):
            raise ValueError(
                "the method looks at the vision encoder, which did not run for all visual tokens of this prompt: features "
                "were passed in ready-made; pass pixel values, or choose a method that does not need the encoder"
            )
        grids = [Grids.of(prompt, kind, int(masks[kind].sum())) for kind in ran]

        def bring(values: Tensor) -> Tensor:
            table = values.new_empty(*visual.shape, values.shape[-1])
            for kind, grid, part in zip(ran, grids, values.split([grid.tokens for grid in grids]), strict=True):
                table[masks[kind]] = part[grid.left.to(part.device)]
            return to_rows(table[visual], visual, view)

        here = prompt.ids.device
        mergings: list[Any] = [Merging.of(grid.grid.to(here), grid.merge.to(here)) for grid in grids]
        return VideoLlama3Encoder(prompt.seen, bring, mergings, cls.projector(model))

    @classmethod
    def visual_tokens(cls, model: Any, **sizes: int) -> tuple[int, str]:
        patch, merge = int(model.config.vision_config.patch_size), VIDEO_MERGE if sizes["frames"] else IMAGE_MERGE
        unit, frames = patch * merge, sizes["frames"] or sizes["images"]
        height, width = (sizes[name] or STANDARD * patch for name in ("height", "width"))
        rows, columns = (max(1, round(pixels / unit)) for pixels in (height, width))
        notes = [] if sizes["height"] and sizes["width"] else ["pass height and width, this size is assumed"]
        notes += ["before the compression of what stands still"] if sizes["frames"] else []
        how = "; ".join([f"{frames} x {rows} x {columns}, each {unit} x {unit} pixels", *notes])
        return frames * rows * columns, how


# ---- where the tokens lie


class Grids(NamedTuple):
    """The pictures or videos of a prompt: grid (pictures, 3) in patches, merge (pictures,) patches along a side of a token, and
    left (tokens,) bool, which of all their tokens are in the prompt; on the CPU."""

    grid: Tensor
    merge: Tensor
    left: Tensor

    @classmethod
    def of(cls, prompt: Prompt, kind: str, present: int) -> Grids:
        """Of one kind, which has `present` tokens in the prompt.

        Raises:
            ValueError: grids are missing, or are not those of the tokens.
        """
        given = [prompt.kwargs.get(f"{kind}_{name}") for name in ("grid_thw", "merge_sizes")]
        if any(x is None for x in given):
            raise ValueError(
                f"the places of {kind} tokens must follow from the grids of the {kind}s, got none; pass {kind}_grid_thw and "
                f"{kind}_merge_sizes, as the processor returns them, together with mm_encoder_outputs too"
            )
        grid, merge = (torch.as_tensor(x).cpu() for x in given)
        tokens = int((grid.prod(dim=1) // merge**2).sum())
        mask = prompt.kwargs.get("video_compression_mask") if kind == "video" else None
        left = torch.ones(tokens, dtype=torch.bool)
        if mask is not None and len(mask) % tokens == 0:
            left = mask.cpu().bool().view(tokens, -1)[:, 0]  # beams repeat every entry
        if int(left.sum()) != present:
            raise ValueError(
                f"the {kind} tokens of a prompt must be those of its grids, got {present} for {int(left.sum())} that "
                f"{kind}_grid_thw, {kind}_merge_sizes and video_compression_mask leave; pass those of this prompt's {kind}s "
                "alone, and of whole ones"
            )
        return cls(grid, merge, left)

    @property
    def tokens(self) -> int:
        """Before compression."""
        return len(self.left)

    def cells(self) -> Tensor:
        """(tokens left, 5): frame, counted over all pictures, row and column, and rows and columns of the frame."""
        found, frames = [], 0
        for (t, h, w), m in zip(self.grid.tolist(), self.merge.tolist(), strict=True):
            at = torch.cartesian_prod(*(torch.arange(n) for n in (t, h // m, w // m)))
            at[:, 0] += frames
            found.append(torch.cat([at, torch.tensor([h // m, w // m]).expand(len(at), 2)], dim=1))
            frames += t
        return torch.cat(found)[self.left]


def in_order(frame: Tensor, visual: Tensor) -> Tensor:
    """(B, q): the frames of each row numbered from 0 as they follow each other; 0 elsewhere. Tokens of a frame must follow each
    other too, be it with text between them."""
    out = torch.zeros_like(frame)
    for b, here in enumerate(visual):
        mine = frame[b][here]
        out[b][here] = (mine.diff(prepend=mine[:1]) != 0).cumsum(dim=0)
    return out


# ---- what the encoder saw


@dataclass(frozen=True)
class Merging:
    """How the patches of a call of the encoder become tokens.

    token: (patches,) the token that each is part of. merge: (tokens,) patches in the token. patches: (tokens,) patches in its
    frame.
    """

    token: Tensor
    merge: Tensor
    patches: Tensor

    @classmethod
    def of(cls, grid: Tensor, merge: Tensor) -> Merging:
        """For grids (pictures, 3) in patches, which stand block by block, and their merge sizes."""
        area = merge**2
        tokens = grid.prod(dim=1) // area
        each = area.repeat_interleave(tokens)
        return cls(
            token=torch.arange(len(each), device=grid.device).repeat_interleave(each),
            merge=each,
            patches=grid[:, 1:].prod(dim=1).repeat_interleave(tokens),
        )

    def tokens(self, values: Tensor) -> Tensor:
        """(tokens, C) means of their patches, from (patches, C)."""
        sums = values.new_zeros(len(self.merge), values.shape[-1])
        return sums.index_add_(0, self.token, values) / self.merge[:, None]


class VideoLlama3Encoder(BlockEncoder):
    """An `EncoderView` of layers with `layer_norm1` and `self_attn`, rotary embeddings, one packed sequence, frames apart.

    Keys are those after the rotary embedding. The features of a token are the mean of its patches, as the encoder makes it.
    """

    def features(self) -> Tensor:
        return self._bring(torch.cat(self._seen.projected))

    def project(self, features: Tensor) -> Tensor:
        return self._seen.project(self._projector, features)

    def _queries_and_keys(self, layer: int) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        index = layer % self.layers
        module, found = self._seen.modules[index], []
        attention = module.self_attn
        for args, kwargs in self._seen.calls[index]:
            x = module.layer_norm1(args[0] if args else kwargs["hidden_states"])
            cos, sin = (part.float()[:, None] for part in kwargs["position_embeddings"])
            q, k = (
                proj(x).float().unflatten(-1, (attention.num_heads, -1))
                for proj in (attention.q_proj, attention.k_proj)
            )
            q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], dim=-1) * sin for y in (q, k))
            found.append((q, k, kwargs["cu_seqlens"].diff().long(), attention.scaling))
        return found


HOSTS = (VideoLlama3Host,)
