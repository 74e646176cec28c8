"""What the attention of families with text inside self-attention shares: heads of a stream, and rotation of the video alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


def heads(attn: Any, x: Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any) -> tuple[Tensor, ...]:
    """Projected and normalised q, k and v (B, N, H, D) of a stream x (B, N, C); a norm may be None."""
    q, k, v = (to(x).unflatten(2, (attn.heads, -1)) for to in (to_q, to_k, to_v))
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def rotate_video(x: Tensor, video: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first `video` tokens of x (B, N, H, D) by cos and sin (video, D)."""
    rotated = apply_rotary_emb(x[:, :video], rotary, sequence_dim=1)
    return rotated if x.shape[1] == video else torch.cat((rotated, x[:, video:]), dim=1)
