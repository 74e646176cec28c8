"""token_scores as its definition reads, attention matrix and all: the slow truth the other backends are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import Backend
from .problem import BackwardProblem, Gradients, Problem


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return sum_r weight_r exp(scores_rj - lse_r), and the log-sum-exp that normalised.

    Numerics: computed in float32, or float64 for float64 inputs. Every score of the chosen rows exists at once.
    """
    p, lse = _probabilities(problem, problem.lse, *_inputs(problem, problem.lse))
    if problem.weights is not None:
        p = p * problem.weights.to(p.dtype)[..., None]
    return p.sum(2), lse


def backward(problem: BackwardProblem) -> Gradients:
    """Return the gradients of q, k and per row, all of them whatever is needed."""
    forward = problem.forward
    q, k = _inputs(forward, problem.lse)
    p, _ = _probabilities(forward, problem.lse, q, k)
    per_row = torch.einsum("bhrk,bhk->bhr", p, problem.grad)
    centre = per_row[..., None] if problem.centred else 0.0
    dscores = p * (problem.grad[:, :, None] - centre) * forward.scale
    if forward.weights is not None:
        dscores = dscores * forward.weights.to(p.dtype)[..., None]
    dq = torch.einsum("bhrk,bkhd->brhd", dscores, k)
    dk = torch.einsum("bhrk,brhd->bkhd", dscores, q).unflatten(2, (forward.Hk, forward.group)).sum(3)
    return Gradients(dq, dk, per_row)


def _visible(problem: Problem) -> Tensor:
    """Which keys the rows see: (B, R, Nk) bool."""
    visible = torch.ones(problem.B, problem.R, problem.Nk, dtype=torch.bool, device=problem.k.device)
    if problem.positions is not None:
        visible = visible & (torch.arange(problem.Nk, device=problem.k.device) <= problem.positions[..., None])
    if problem.key_mask is not None:
        visible = visible & problem.key_mask[:, None]
    return visible


def _inputs(problem: Problem, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k in the dtype of the scores, k repeated to the heads of q; what is not to be looked at is 0, NaN or not."""
    q = problem.q.to(problem.dtype)
    if lse is not None:
        q = q.masked_fill((lse == -torch.inf).transpose(1, 2)[..., None], 0.0)
    k = problem.k.to(problem.dtype).masked_fill(~_visible(problem).any(1)[..., None, None], 0.0)
    return q, k.repeat_interleave(problem.group, 2)


def _probabilities(problem: Problem, lse: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(scores - lse), (B, H, R, Nk), and the LSE."""
    scores = torch.einsum("brhd,bkhd->bhrk", q, k) * problem.scale
    scores = scores.masked_fill(~_visible(problem)[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1) if lse is None else lse.to(problem.dtype)
    # a row with LSE -inf contributes nothing: exp(-inf - inf) is 0, where exp(-inf + inf) is NaN
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]), lse


FORWARD: Backend[Problem] = Backend(
    name="reference",
    summary="the definition with the attention matrix of the rows in memory, slow, for tests",
    why_not=lambda problem: None,
    cost=lambda problem: math.inf,
    run=run,
)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="reference",
    summary=FORWARD.summary,
    why_not=lambda problem: None,
    cost=lambda problem: math.inf,
    run=backward,
)
