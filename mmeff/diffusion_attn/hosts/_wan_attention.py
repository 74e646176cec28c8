"""The self-attention of Wan with a sparse core: the stock processor is kept inside and serves every dense call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, _get_qkv_projections
from torch import Tensor

from mmeff.diffusion_attn.hosts._denoiser import Session


class SparseWanProcessor(WanAttnProcessor):
    """One self-attention layer under a handle.

    Dense calls go to the original processor untouched, so they are bit-identical. Settings that diffusers writes on a
    processor while it is installed (attention backend, context parallelism) reach the original and outlive us.
    """

    def __init__(self, original: WanAttnProcessor, layer: int, session: Session) -> None:
        self.original = original
        self.layer = layer
        self.session = session

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.original._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.original._parallel_config = value

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        obstacle = self._obstacle(encoder_hidden_states, attention_mask)
        if not self.session.admits(self.layer, hidden_states.device, tokens=hidden_states.shape[1], obstacle=obstacle):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        q, k, v = self_attention_inputs(attn, hidden_states, rotary_emb)
        out = self.session.attend(self.layer, q, k, v).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))

    def _obstacle(self, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None) -> str | None:
        if self._parallel_config is not None:
            return "context parallelism splits the tokens over devices, and the layout is for all of them"
        if encoder_hidden_states is not None or attention_mask is not None:
            return "self-attention was called with other keys or with a mask"
        return None


def self_attention_inputs(
    attn: Any, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, N, H, D) of a Wan self-attention: projected (fused or not), normalised, rotated.

    Args: hidden_states (B, N, C); rotary_emb the cosines and sines, (1, N, 1, D) each, or None.
    """
    q, k, v = _get_qkv_projections(attn, hidden_states, hidden_states)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
    if rotary_emb is not None:
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
    return q, k, v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channel pairs: (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos)."""
    x1, x2 = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]  # Wan stores each angle twice
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2).type_as(x)
