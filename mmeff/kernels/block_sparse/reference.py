"""Block-sparse attention as its definition reads: the slow truth that the other backends are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import Backend
from .problem import BackwardProblem, Problem, accumulation_dtype


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T over the attended pairs) v, and its log-sum-exp.

    Numerics: computed in float32, or float64 for float64 inputs. Every score exists at once. A query that attends to
    nothing gives output 0 and log-sum-exp -inf, with gradient 0.
    """
    q, k, v, scores = _scores(problem)
    lse = torch.logsumexp(scores, -1)
    weights = _weights(scores, lse)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).to(problem.q.dtype)
    return out, lse


def backward(problem: BackwardProblem) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k and v: with weights P and scores S, dS = P * (dP - rowsum(dO * O) + dLSE)."""
    forward = problem.forward
    q, k, v, scores = _scores(forward)
    lse = problem.lse.to(q.dtype)
    weights = _weights(scores, lse)
    dout = torch.zeros_like(q) if problem.dout is None else problem.dout.to(q.dtype)
    if forward.layout.has_padding:
        dout = dout.masked_fill(~forward.layout.tokens_in_use()[0][:, :, None, None], 0.0)
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, dout)
    dscores = torch.einsum("bqhd,bkhd->bhqk", dout, v) - problem.shift()[..., None]
    # a row without keys has weights 0, but may be given any gradient, infinite included
    dscores = torch.where(weights > 0, weights * dscores, 0.0) * forward.scale
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, k)
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q)
    dk, dv = (x.unflatten(2, (forward.Hk, -1)).sum(3) for x in (dk, dv))
    grads = (x.to(forward.q.dtype) if need else None for x, need in zip((dq, dk, dv), problem.needs, strict=True))
    return tuple(grads)  # type: ignore[return-value]


def _scores(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k and v in the dtype of the computation, one key head per query head, and the masked scores."""
    dtype = accumulation_dtype(problem.q.dtype)
    group = problem.H // problem.Hk
    q = problem.q.to(dtype)
    k, v = (x.to(dtype).repeat_interleave(group, 2) for x in problem.without_padding())
    if problem.layout.has_padding:
        q = q.masked_fill(~problem.layout.tokens_in_use()[0][:, :, None, None], 0.0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.scale
    return q, k, v, scores.masked_fill(~problem.layout.to_dense_mask(), -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # a row of nothing but -inf has no softmax: its weights are 0
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


FORWARD = Backend(
    name="reference",
    summary="the definition, slow, for tests",
    why_not=lambda problem: None,
    cost=lambda problem: math.inf,
    run=attend,
)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="reference",
    summary="the definition, slow, for tests",
    why_not=lambda problem: None,
    cost=lambda problem: math.inf,
    run=backward,
)
