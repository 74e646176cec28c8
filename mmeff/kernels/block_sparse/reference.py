"""Block-sparse attention as its definition reads: the slow truth that the other backends are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import Backend
from .problem import Problem, accumulation_dtype


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return softmax(scale q k^T over the attended pairs) v, and its log-sum-exp.

    Numerics: computed in float32, or float64 for float64 inputs. Every score exists at once. A query that attends to
    nothing gives output 0 and log-sum-exp -inf, with gradient 0.
    """
    dtype = accumulation_dtype(problem.q.dtype)
    group = problem.H // problem.Hk
    q = problem.q.to(dtype)
    k = problem.k.to(dtype).repeat_interleave(group, 2)
    v = problem.v.to(dtype).repeat_interleave(group, 2)
    mask = problem.layout.to_dense_mask()
    attends = mask.any(-1, keepdim=True)

    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.scale
    # a row of nothing but -inf has no softmax and no gradient: leave its scores and blank its results instead
    scores = scores.masked_fill(~mask & attends, -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(~attends, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(~attends.squeeze(-1), -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).to(problem.q.dtype)
    return out, lse if problem.return_lse else None


def _why_not(problem: Problem) -> str | None:
    return None


def _cost(problem: Problem) -> float:
    return math.inf


BACKEND = Backend(
    name="reference",
    summary="the definition, slow, for tests",
    why_not=_why_not,
    cost=_cost,
    run=run,
)
