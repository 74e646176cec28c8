"""The joint self-attention of Mochi with a sparse core: the stock processor is kept inside for every dense call.

The stock processor goes through the batch and drops the text that a sample does not use, which waits for the device at every
sample and layer. Here all samples run at once: text in use moves to the front of the text, where it usually is, and the
kernel is told how much there is. As in the stock processor the text comes back in that order, with zeros behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from torch import Tensor

from mmeff.diffusion_attn.hosts._joint import heads
from mmeff.diffusion_attn.hosts._processor import Projected, SparseProcessor


class SparseMochiProcessor(SparseProcessor, MochiAttnProcessor2_0):
    """One self-attention layer of Mochi under a handle."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        return self.run(attn, hidden_states, call)

    def tokens(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> int:
        assert encoder_hidden_states is not None  # the stock processor needs it too
        return hidden_states.shape[1] + encoder_hidden_states.shape[1]

    def project(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Projected:
        in_use = call["attention_mask"].bool()  # (B, T)
        order = (~in_use).byte().argsort(dim=1, stable=True)
        in_use = in_use.gather(1, order)
        text = call["encoder_hidden_states"].take_along_dim(order[..., None], dim=1)

        video = heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if call["image_rotary_emb"] is not None:
            q, k = (_rotate(x, *call["image_rotary_emb"]) for x in video[:2])
            video = (q, k, video[2])
        of_text = heads(
            attn, text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(video, of_text, strict=True))
        mask = torch.cat((in_use.new_ones(len(in_use), hidden_states.shape[1]), in_use), dim=1)
        return Projected(q, k, v, rest=in_use, mask=mask[:, None, None])

    def finish(self, attn: Any, out: Tensor, projected: Projected, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        in_use = projected.rest
        text_len = in_use.shape[1]
        video, text = out.flatten(2).split((out.shape[1] - text_len, text_len), dim=1)
        text = text.masked_fill(~in_use[..., None], 0)  # a dense call in a compiled block gives the padding a value
        video = attn.to_out[1](attn.to_out[0](video))
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text  # the last block drops its text


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channel pairs of x (B, N, H, D), with angles (N, H, D / 2) for each head."""
    x1, x2 = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack(((x1 * cos - x2 * sin).type_as(x), (x1 * sin + x2 * cos).type_as(x)), dim=-1).flatten(-2)
