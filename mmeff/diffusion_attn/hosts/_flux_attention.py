"""The joint attention of Flux with a sparse core: the stock processor is kept inside and serves every dense call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, _get_qkv_projections
from torch import Tensor

from mmeff.diffusion_attn.hosts._processor import Projected, SparseProcessor, ulysses_group


class SparseFluxProcessor(SparseProcessor, FluxAttnProcessor):
    """One attention layer of Flux under a handle: of a dual block, or of a single block without text of its own."""

    text_first = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        call = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        out: Tensor | tuple[Tensor, Tensor] = self.run(attn, hidden_states, call)
        return out

    def tokens(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> int:
        return hidden_states.shape[1] + (0 if encoder_hidden_states is None else encoder_hidden_states.shape[1])

    def obstacle(self, call: dict[str, Any]) -> str | None:
        if call["attention_mask"] is not None:
            return "self-attention was called with a mask"
        if ulysses_group(self._parallel_config) is not None:
            return "context parallelism splits image and text each by itself, so their tokens arrive interleaved"
        return None

    def project(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Projected:
        text = call["encoder_hidden_states"]
        q, k, v, text_q, text_k, text_v = _get_qkv_projections(attn, hidden_states, text)
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in (q, k, v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if text is not None:
            text_q, text_k, text_v = (x.unflatten(-1, (-1, attn.head_dim)) for x in (text_q, text_k, text_v))
            text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
            q, k, v = torch.cat((text_q, q), dim=1), torch.cat((text_k, k), dim=1), torch.cat((text_v, v), dim=1)
        if call["image_rotary_emb"] is not None:
            q, k = (apply_rotary_emb(x, call["image_rotary_emb"], sequence_dim=1) for x in (q, k))
        return Projected(q, k, v)

    def finish(self, attn: Any, out: Tensor, projected: Projected, call: dict[str, Any]) -> Any:
        out, text = out.flatten(2).type_as(projected.q), call["encoder_hidden_states"]
        if text is None:  # a single block projects the output itself
            return out
        of_text, of_image = out[:, : text.shape[1]], out[:, text.shape[1] :]
        return attn.to_out[1](attn.to_out[0](of_image.contiguous())), attn.to_add_out(of_text.contiguous())
