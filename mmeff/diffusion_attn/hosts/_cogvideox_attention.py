"""The joint self-attention of CogVideoX with a sparse core: the stock processor is kept inside for every dense call.

The stock processor puts the text before the video. Attention does not care, so the streams, which arrive apart and leave apart,
are joined here with the text last from the start. The padding of the text is attended, as the model was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch import Tensor

from mmeff.diffusion_attn.hosts._joint import heads, rotate_video
from mmeff.diffusion_attn.hosts._processor import Projected, SparseProcessor


class SparseCogVideoXProcessor(SparseProcessor, CogVideoXAttnProcessor2_0):
    """One self-attention layer of CogVideoX under a handle."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
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

    def obstacle(self, call: dict[str, Any]) -> str | None:
        return None if call["attention_mask"] is None else "self-attention was called with a mask"

    def project(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Projected:
        video = hidden_states.shape[1]
        x = torch.cat((hidden_states, call["encoder_hidden_states"]), dim=1)
        q, k, v = heads(attn, x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if call["image_rotary_emb"] is not None:
            q, k = (rotate_video(x, video, call["image_rotary_emb"]) for x in (q, k))
        return Projected(q, k, v, rest=video)

    def finish(self, attn: Any, out: Tensor, projected: Projected, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        return out[:, : projected.rest], out[:, projected.rest :]
