"""Attention within windows in plain PyTorch: windows become the batch of dense attention. Any device, and the backward pass.

A map is cut into windows by one copy of a view; the seam of a shift and the key mask only concern some windows, but make a
mask for all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Backend
from .problem import BackwardProblem, Gradients, Problem

# Throughput per pair relative to dense attention of many tokens: copies, and products of 49 tokens (1 CPU core).
RATIO = 0.3
CALL_OVERHEAD = 1e7  # multiply-adds that pass before the first window (1 CPU core: about 0.2 ms)


def run(problem: Problem) -> Tensor:
    """Return the output in the shape of k.

    Numerics: those of scaled_dot_product_attention.
    """
    q, k, v = _windows(problem)
    added, visible = _mask(problem)
    # on CPU a bias may be wider than half-precision q; elsewhere one dtype is wanted
    if added is not None and q.device.type != "cpu":
        added = added.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=problem.scale)
    if problem.key_mask is not None and visible is not None:
        out = out.where(visible.any(-1, keepdim=True), 0.0)
    return to_map(out, problem)


def backward(asked: BackwardProblem) -> Gradients:
    """Return the gradients; weights are computed again, all windows at once.

    Numerics: products and sums in the wide dtype; the gradient of the bias adds up over windows first.
    """
    problem, wide = asked.forward, asked.forward.dtype
    q, k, v = (x.to(wide) for x in _windows(problem))
    do, out = (to_windows(x, problem).to(wide) for x in (asked.dout, asked.out))
    scores = torch.matmul(q * problem.scale, k.mT)
    added, visible = _mask(problem)
    if added is not None:
        scores += added
    weights = torch.softmax(scores, -1)
    if problem.key_mask is not None and visible is not None:
        weights = weights.where(visible.any(-1, keepdim=True), 0.0)
    dv = torch.matmul(weights.mT, do)
    delta = (do * out).sum(-1, keepdim=True)
    dscores = torch.matmul(do, v.mT).sub_(delta).mul_(weights)
    dq = torch.matmul(dscores, k).mul_(problem.scale)
    dk = torch.matmul(dscores.mT, q).mul_(problem.scale)
    if problem.shared_q:
        dq = dq.unflatten(0, (problem.B, -1)).sum(1).transpose(1, 2).reshape(problem.q.shape)
    else:
        dq = to_map(dq, problem)
    dbias = None
    if problem.rel_bias is not None and asked.need_bias:
        index = bias_index(problem.window, dscores.device).flatten()
        dbias = dscores.new_zeros(problem.H, problem.rel_bias[0].numel())
        dbias = dbias.index_add_(1, index, dscores.sum(0).flatten(1)).view(problem.rel_bias.shape)
    return Gradients(dq, to_map(dk, problem), to_map(dv, problem), dbias)


# ---------------------------------------------------------------- windows


def to_windows(x: Tensor, problem: Problem) -> Tensor:
    """(B, Hg, Wg, H, D) -> (B * windows, H, N, D)."""
    (Hg, Wg), (wh, ww) = problem.grid, problem.window
    if problem.partition == "grid":
        x = x.unflatten(2, (ww, Wg // ww)).unflatten(1, (wh, Hg // wh)).permute(0, 2, 4, 5, 1, 3, 6)
    else:
        if any(problem.shift):
            x = x.roll((-problem.shift[0], -problem.shift[1]), (1, 2))
        x = x.unflatten(2, (Wg // ww, ww)).unflatten(1, (Hg // wh, wh)).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(-1, problem.H, problem.N, x.shape[-1])


def to_map(x: Tensor, problem: Problem) -> Tensor:
    """Undo to_windows; contiguous."""
    (Hg, Wg), (wh, ww) = problem.grid, problem.window
    x = x.reshape(problem.B, Hg // wh, Wg // ww, problem.H, wh, ww, -1)
    if problem.partition == "grid":
        return x.permute(0, 4, 1, 5, 2, 3, 6).reshape(problem.B, Hg, Wg, problem.H, -1)
    x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(problem.B, Hg, Wg, problem.H, -1)
    return x.roll(problem.shift, (1, 2)) if any(problem.shift) else x


def bias_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """(N, N) index of a pair of a window's tokens into a head's flat bias, (2 wh - 1) * (2 ww - 1) long."""
    rows, columns = (torch.arange(n, device=device) for n in window)
    x, y = rows.repeat_interleave(window[1]), columns.repeat(window[0])
    return (x - x[:, None] + window[0] - 1) * (2 * window[1] - 1) + y - y[:, None] + window[1] - 1


def _windows(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    k, v = problem.k, problem.v
    if problem.key_mask is not None:  # a NaN in a key that nobody may see must not come through
        seen = problem.key_mask[..., None, None]
        k, v = k.where(seen, 0.0), v.where(seen, 0.0)
    k, v = to_windows(k, problem), to_windows(v, problem)
    if not problem.shared_q:
        return to_windows(problem.q, problem), k, v
    q = problem.q.flatten(1, 2).transpose(1, 2)  # (B, H, N, D)
    return q.repeat_interleave(k.shape[0] // problem.B, 0), k, v


def _mask(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Return what is added to the scores, broadcast to (B * windows, H, N, N), and which pairs attend; None for nothing and
    for all. A query without keys gets zeros in place of -inf: its weights are thrown away."""
    device = problem.k.device
    visible = None
    if any(problem.shift):
        rows, columns = (axis.side.to(device) for axis in problem.axes())
        side = (2 * rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (windows, N)
        visible = (side[:, :, None] == side[:, None])[:, None].repeat(problem.B, 1, 1, 1)
    if problem.key_mask is not None:
        mask = problem.key_mask.expand(problem.B, *problem.grid)[..., None, None]
        seen = to_windows(mask.expand(*mask.shape[:3], problem.H, 1), problem)[:, :1].mT  # (B * windows, 1, 1, N)
        visible = seen if visible is None else visible & seen
    added = None
    if problem.rel_bias is not None:
        index = bias_index(problem.window, device)
        flat = problem.rel_bias.flatten(1).to(torch.promote_types(problem.rel_bias.dtype, problem.q.dtype))
        added = flat.index_select(1, index.flatten()).view(1, problem.H, *index.shape)
    if visible is not None:
        hidden = ~visible
        if problem.key_mask is not None:
            hidden = hidden & visible.any(-1, keepdim=True)
        base = problem.q.new_zeros(()) if added is None else added
        added = torch.where(hidden, -torch.inf, base)
    return added, visible


# ---------------------------------------------------------------- the backend


def _cost(problem: Problem) -> float:
    dense = 2 * problem.B * problem.H * problem.D * (problem.grid[0] * problem.grid[1]) ** 2
    return problem.density / RATIO + CALL_OVERHEAD / dense


SUMMARY = "windows as the batch of scaled_dot_product_attention"
FORWARD: Backend[Problem] = Backend(name="sdpa", summary=SUMMARY, why_not=lambda problem: None, cost=_cost, run=run)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="sdpa",
    summary="windows as the batch of matrix products",
    why_not=lambda asked: None,
    cost=lambda asked: _cost(asked.forward),
    run=backward,
)
