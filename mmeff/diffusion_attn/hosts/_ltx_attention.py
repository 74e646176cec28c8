"""The self-attention of LTX-Video with a sparse core: the stock processor is kept inside and serves every dense call."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, apply_rotary_emb
from torch import Tensor

from mmeff.diffusion_attn.hosts._processor import Projected, SparseProcessor


class SparseLTXProcessor(SparseProcessor, LTXVideoAttnProcessor):
    """One self-attention layer of LTX-Video under a handle."""

    text_first = True  # keyframes outside the grid lie before the video

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        call = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        return self.run(attn, hidden_states, call)

    def tokens(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> int:
        return hidden_states.shape[1]

    def obstacle(self, call: dict[str, Any]) -> str | None:
        if call["encoder_hidden_states"] is not None or call["attention_mask"] is not None:
            return "self-attention was called with other keys or with a mask"
        return None

    def project(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Projected:
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        if call["image_rotary_emb"] is not None:  # over all channels, before they are split into heads
            q, k = (apply_rotary_emb(x, call["image_rotary_emb"]) for x in (q, k))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        return Projected(q, k, v)

    def finish(self, attn: Any, out: Tensor, projected: Projected, call: dict[str, Any]) -> Tensor:
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(projected.q)))
