"""The self-attention of Cosmos with a sparse core: the stock processor is kept inside and serves every dense call."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from torch import Tensor

from mmeff.diffusion_attn.hosts._processor import Projected, SparseProcessor


class SparseCosmosProcessor(SparseProcessor, CosmosAttnProcessor2_0):
    """One self-attention layer of Cosmos under a handle."""

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
        q, k, v = (to(hidden_states).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if call["image_rotary_emb"] is not None:  # channel d turns with channel d + D/2
            rope = call["image_rotary_emb"]
            q, k = (apply_rotary_emb(x, rope, use_real_unbind_dim=-2, sequence_dim=1) for x in (q, k))
        return Projected(q, k, v)

    def finish(self, attn: Any, out: Tensor, projected: Projected, call: dict[str, Any]) -> Tensor:
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(projected.q)))
