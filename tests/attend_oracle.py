"""`attend` of a static sparse attention against plain attention under the dense mask of its layout, with gradients."""

from __future__ import annotations

import math

import torch
from oracle import assert_close_to_reference, gradient_terms, plain_attention
from torch import Tensor


def video_tensors(grid, text_len=0, *, B=2, H=2, D=8, dtype=torch.float32, seed=0) -> list[Tensor]:
    """q, k, v and the gradient of the output, (B, N, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, math.prod(grid) + text_len, H, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def check_attend(
    method, grid, text_len=0, *, text_valid=None, layer=0, layout=None, mask=None, H=2, dtype=torch.float32
):
    """Assert that output and gradients are those of the mask, with NaN where nothing may be read.

    mask: (1 | B, 1 | H, N, N) bool of all tokens in use; None is that of `method.layout`.
    """
    q, k, v, dout = video_tensors(grid, text_len, H=H, dtype=dtype)
    N = q.shape[1]
    if mask is None:
        mask = method.layout(grid=grid, text_len=text_len, q=q, layer=layer).to_dense_mask()
    used = torch.ones(2, N, dtype=torch.bool)
    if text_valid is not None:
        used = torch.arange(N) < (N - text_len + text_valid)[:, None]
        mask = mask & used[:, None, :, None] & used[:, None, None, :]

    def run(attend, dtype):
        leaves = [x.to(dtype).masked_fill(~used[:, :, None, None], 0).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return out, torch.autograd.grad(out, leaves, dout.to(dtype).masked_fill(~used[:, :, None, None], 0))

    def ours(q, k, v):
        poison = torch.where(used, 0.0, torch.nan)[:, :, None, None].to(q.dtype)
        return method.attend(
            q, k + poison, v + poison, grid=grid, text_len=text_len, layer=layer, text_valid=text_valid, layout=layout
        )

    reference, of_reference = run(lambda *qkv: plain_attention(*qkv, mask)[0], torch.float64)
    plain, of_plain = run(lambda *qkv: plain_attention(*qkv, mask)[0], dtype)
    out, grads = run(ours, dtype)
    assert_close_to_reference(out, plain, reference, name="out")
    terms = gradient_terms(q, k, v, dout)
    for name, found, near, far in zip("qkv", grads, of_plain, of_reference, strict=True):
        assert_close_to_reference(found, near, far, name=f"d{name}", terms=terms)
