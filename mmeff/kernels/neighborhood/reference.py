"""Neighborhood attention as its definition reads: dense attention under a mask of the rule. Slow; any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import Backend
from .problem import BackwardProblem, Gradients, Problem
from .rule import Rule, outer


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return softmax over the visible keys of scale q k^T + bias, times v, and its log-sum-exp (B, H, N).

    Numerics: computed in float32, or float64 for float64 inputs. Every score exists at once.
    """
    _, _, v = _operands(problem)
    scores = _scores(problem)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v)
    return out.reshape(problem.q.shape).to(problem.q.dtype), torch.logsumexp(scores, -1) if problem.with_lse else None


def backward(asked: BackwardProblem) -> Gradients:
    """Return the gradients, by the formulas of softmax attention on the dense matrix."""
    problem = asked.forward
    q, k, v = _operands(problem)
    N, group = problem.N, problem.H // problem.Hk
    weights = torch.softmax(_scores(problem), -1)
    do = asked.dout.flatten(1, -3).to(problem.dtype)
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, do)
    dscores = weights * (torch.einsum("bqhd,bkhd->bhqk", do, v) - asked.delta.transpose(1, 2)[..., None])
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, k) * problem.scale
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q) * problem.scale
    dk, dv = (x.unflatten(2, (problem.Hk, group)).sum(3) for x in (dk, dv))  # heads of a group share their keys
    dbias = None
    if problem.rel_bias is not None and asked.need_bias:
        _, index = dense_tables(problem.rule, q.device)
        dbias = dscores.new_zeros(problem.H, math.prod(problem.rule.bias_shape))
        dbias.index_add_(1, index.flatten(), dscores[..., :N].sum(0).flatten(1))
        dbias = dbias.view(problem.rel_bias.shape)
    return Gradients(
        dq.reshape(problem.q.shape),
        dk[:, :N].reshape(problem.k.shape),
        dv[:, :N].reshape(problem.v.shape),
        dbias,
        dk[:, N:].clone() if problem.T else None,  # the results of an operator may not share memory
        dv[:, N:].clone() if problem.T else None,
    )


def dense_tables(rule: Rule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return visible (N, N) bool, and (N, N) int64 indices into a head's flat bias; hidden pairs have some index."""
    masks, offsets = [], []
    for axis in rule.axes:
        lo, hi = (x[:, None] for x in axis.windows())
        i = torch.arange(axis.length)
        p, r = i // axis.dilation, i % axis.dilation
        masks.append((r[:, None] == r) & (p >= lo) & (p < hi))
        offsets.append((p - p[:, None] + axis.window - 1).clamp(0, 2 * axis.window - 2))
    visible = outer(masks)
    return visible.to(device), outer(offsets, rule.bias_shape).to(device)


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, N, H, D) and k, v (B, N + T, H, D), flat and wide, each key head repeated for its group."""
    q, k, v = (x.flatten(1, -3).to(problem.dtype) for x in (problem.q, problem.k, problem.v))
    if problem.extra_k is not None and problem.extra_v is not None:
        k = torch.cat([k, problem.extra_k.to(k.dtype)], 1)
        v = torch.cat([v, problem.extra_v.to(v.dtype)], 1)
    group = problem.H // problem.Hk
    return q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)


def _scores(problem: Problem) -> Tensor:
    q, k, _ = _operands(problem)
    visible, index = dense_tables(problem.rule, q.device)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.scale
    grid = scores[..., : problem.N]
    if problem.rel_bias is not None:
        grid += problem.rel_bias.to(scores.dtype).flatten(1)[:, index]
    grid.masked_fill_(~visible, -torch.inf)
    return scores


FORWARD: Backend[Problem] = Backend(
    name="reference",
    summary="the definition, slow, for tests",
    why_not=lambda problem: None,
    cost=lambda problem: math.inf,
    run=run,
)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="reference",
    summary="the definition, slow, for tests",
    why_not=lambda asked: None,
    cost=lambda asked: math.inf,
    run=backward,
)
