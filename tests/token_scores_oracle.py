"""token_scores with the whole attention matrix, in plain PyTorch, and the comparison of a backend with it."""

from __future__ import annotations

import torch
from oracle import assert_close_to_reference

from mmeff.kernels import token_scores


def tensors(B, R, Nk, H, Hk, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((B, R, H, D), (B, Nk, Hk, D))]


def whole_matrix(q, k, visible=None, weights=None, scale=None, lse=None):
    """The same in the dtype of q, with the attention matrix in memory; visible broadcastable to (B, H, R, Nk)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("brhd,bkhd->bhrk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones((), dtype=torch.bool, device=q.device) if visible is None else visible
    if lse is None:
        sees = visible.expand(scores.shape).any(-1, keepdim=True)
        received = torch.softmax(scores.masked_fill(~visible & sees, -torch.inf), -1).masked_fill(~sees, 0.0)
    else:
        received = torch.where(visible & lse[..., None].isfinite(), torch.exp(scores - lse[..., None]), 0.0)
    if weights is not None:
        received = received * weights[..., None]
    return received.sum(2)


def results(compute, differentiable):
    """The scores, and the gradients of the named inputs under a fixed random cotangent."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in differentiable.items()}
    out = compute(**inputs)
    g = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(out)).sum()
    return {"scores": out, **dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))}


def check(q, k, visible=None, weights=None, scale=None, lse=None, backend="chunked", **arguments):
    """Compare scores and gradients with the whole matrix."""
    given = {"q_rows": q, "k": k, "weights": weights, "lse": lse}
    given = {name: x for name, x in given.items() if x is not None}
    actual = results(lambda **x: token_scores(**x, scale=scale, backend=backend, **arguments), given)

    def plainly(widen):
        def compute(q_rows, k, weights=None, lse=None):
            rest = (None if x is None else widen(x) for x in (weights, lse))
            return whole_matrix(widen(q_rows), widen(k), visible, next(rest), scale, next(rest))

        return compute

    # scores are float32 whatever the inputs are; gradients come back in the dtype of the inputs
    same_dtype = results(plainly(lambda x: x.to(torch.promote_types(x.dtype, torch.float32))), given)
    reference = results(plainly(torch.Tensor.double), {name: x.double() for name, x in given.items()})
    for name in reference:
        assert_close_to_reference(actual[name], same_dtype[name], reference[name], name=f"{backend} {name}")
