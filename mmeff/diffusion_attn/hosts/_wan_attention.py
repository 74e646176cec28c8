"""The self-attention of Wan with a sparse core: the stock processor is kept inside and serves every dense call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, _get_qkv_projections
from torch import Tensor

from mmeff.diffusion_attn.hosts._processor import Projected, SparseProcessor


class SparseWanProcessor(SparseProcessor, WanAttnProcessor):
    """One self-attention layer of Wan under a handle."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        call = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "rotary_emb": rotary_emb,
            **kwargs,
        }
        return self.run(attn, hidden_states, call)

    def tokens(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> int:
        return hidden_states.shape[1]

    def obstacle(self, call: dict[str, Any]) -> str | None:
        if call["encoder_hidden_states"] is not None or call["attention_mask"] is not None:
            return "self-attention was called with other keys or with a mask"
        return None

    def project(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Projected:
        q, k, v = _get_qkv_projections(attn, hidden_states, hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if call["rotary_emb"] is not None:
            q, k = rotate(q, *call["rotary_emb"]), rotate(k, *call["rotary_emb"])
        return Projected(q, k, v)

    def finish(self, attn: Any, out: Tensor, projected: Projected, call: dict[str, Any]) -> Tensor:
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(projected.q)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channel pairs: (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos)."""
    x1, x2 = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]  # Wan stores each angle twice
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2).type_as(x)
