"""The joint self-attention of HunyuanVideo with a sparse core: the stock processor is kept inside for every dense call.

Dual blocks project the text by weights of their own, single blocks by those of the video; both hand the two streams apart and
get them back apart. Only the video is rotated. The text is last already, and its padding is at its end.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from mmeff.diffusion_attn.hosts._joint import heads, rotate_video
from mmeff.diffusion_attn.hosts._processor import Projected, SparseProcessor, ulysses_group


class SparseHunyuanVideoProcessor(SparseProcessor, HunyuanVideoAttnProcessor2_0):
    """One self-attention layer of HunyuanVideo under a handle."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        call = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        return self.run(attn, hidden_states, call)

    def tokens(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> int:
        return hidden_states.shape[1] + (0 if encoder_hidden_states is None else encoder_hidden_states.shape[1])

    def obstacle(self, call: dict[str, Any]) -> str | None:
        if call["encoder_hidden_states"] is None:
            return "self-attention was called without its text"
        mask = call["attention_mask"]
        if mask is None or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
            return "self-attention was called with another mask than that of the padded prompt"
        if ulysses_group(self._parallel_config) is not None:
            return "context parallelism splits video and text each by itself, so their tokens arrive interleaved"
        return None

    def project(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Projected:
        text = call["encoder_hidden_states"]
        dual = attn.add_q_proj is not None
        x = hidden_states if dual else torch.cat((hidden_states, text), dim=1)
        q, k, v = heads(attn, x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if call["image_rotary_emb"] is not None:
            q, k = (rotate_video(x, hidden_states.shape[1], call["image_rotary_emb"]) for x in (q, k))
        if dual:
            of_text = heads(
                attn, text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
            )
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), of_text, strict=True))
        return Projected(q, k, v, rest=hidden_states.shape[1], mask=call["attention_mask"])

    def finish(self, attn: Any, out: Tensor, projected: Projected, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out = out.flatten(2).type_as(projected.q)
        video, text = out[:, : projected.rest], out[:, projected.rest :]
        if getattr(attn, "to_out", None) is not None:  # single blocks project behind their MLP
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text
