"""Attention within windows as its definition reads: dense attention of the map under a mask. Slow; any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import Backend
from .problem import BackwardProblem, Gradients, Problem


def run(problem: Problem) -> Tensor:
    """Return softmax over the keys of a query's window of scale q k^T + bias, times v.

    Numerics: computed in float32, or float64 for float64 inputs. Every score of the map exists at once.
    """
    out = torch.einsum("bhqk,bkhd->bqhd", _weights(problem), _seen(problem, problem.v))
    return out.reshape(problem.k.shape).to(problem.q.dtype)


def backward(asked: BackwardProblem) -> Gradients:
    """Return the gradients, by the formulas of softmax attention on the dense matrix."""
    problem = asked.forward
    q, k, v = _queries(problem), _seen(problem, problem.k), _seen(problem, problem.v)
    weights = _weights(problem)
    do = asked.dout.flatten(1, 2).to(problem.dtype)
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, do)
    dweights = torch.einsum("bqhd,bkhd->bhqk", do, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, k) * problem.scale
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q) * problem.scale
    if problem.shared_q:
        _, place = _tables(problem)
        dq = dq.new_zeros(problem.B, problem.N, *dq.shape[2:]).index_add_(1, place.to(q.device), dq)
    dbias = None
    if problem.rel_bias is not None and asked.need_bias:
        visible, _ = _tables(problem)
        flat = dscores.new_zeros(problem.H, math.prod(problem.rel_bias.shape[1:]))
        rows = dscores.sum(0)[:, visible.to(q.device)]  # only pairs of one window have an index of their own
        dbias = flat.index_add_(1, _bias_index(problem)[visible].to(q.device), rows).view(problem.rel_bias.shape)
    return Gradients(dq.reshape(problem.q.shape), dk.reshape(problem.k.shape), dv.reshape(problem.k.shape), dbias)


def _axis(length: int, window: int, partition: str, shift: int) -> tuple[Tensor, Tensor]:
    """Window and side of every position of an axis as one number, and its place in the window."""
    i = torch.arange(length)
    if partition == "grid":
        stride = length // window
        return i % stride, i // stride
    moved = (i - shift) % length
    return 2 * (moved // window) + (i < shift), moved % window


def _tables(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return which pairs of tokens share a window (N, N), and the place of a token within its window (N,), row-major."""
    groups, inner = zip(
        *(
            _axis(length, w, problem.partition, s)
            for length, w, s in zip(problem.grid, problem.window, problem.shift, strict=True)
        ),
        strict=True,
    )
    group = groups[0][:, None] * (groups[1].max() + 1) + groups[1]
    place = inner[0][:, None] * problem.window[1] + inner[1]
    return group.flatten()[:, None] == group.flatten(), place.flatten()


def _bias_index(problem: Problem) -> Tensor:
    """(N, N) index into a head's flat bias, for pairs that share a window."""
    _, place = _tables(problem)
    wh, ww = problem.window
    x, y = place // ww, place % ww
    return (x - x[:, None] + wh - 1) * (2 * ww - 1) + y - y[:, None] + ww - 1


def _queries(problem: Problem) -> Tensor:
    q = problem.q.flatten(1, 2).to(problem.dtype)
    return q[:, _tables(problem)[1].to(q.device)] if problem.shared_q else q


def _seen(problem: Problem, x: Tensor) -> Tensor:
    """Keys or values (B, N, H, D), zero where the mask hides them, so that a NaN there stays there."""
    x = x.flatten(1, 2).to(problem.dtype)
    return x if problem.key_mask is None else x.where(problem.key_mask.flatten(1)[..., None, None], 0.0)


def _weights(problem: Problem) -> Tensor:
    """(B, H, N, N); a query without keys has zeros."""
    scores = torch.einsum("bqhd,bkhd->bhqk", _queries(problem), _seen(problem, problem.k)) * problem.scale
    visible = _tables(problem)[0].to(scores.device)
    if problem.rel_bias is not None:
        index = _bias_index(problem).to(scores.device).where(visible, 0)
        scores = scores + problem.rel_bias.to(scores.dtype).flatten(1)[:, index]
    if problem.key_mask is not None:
        visible = visible & problem.key_mask.flatten(1)[:, None, None]
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, -1).where(visible.any(-1, keepdim=True), 0.0)


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
