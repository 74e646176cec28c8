"""Neighborhood attention in plain PyTorch: tiles of queries, each with the box of keys that holds all their windows.

`plan.py` cuts the grid. All tiles that share a mask are one batch for dense attention, taken in chunks whose gathered
keys stay in cache. Where the windows tile the grid, or cover it, tile and box are the windows themselves and no mask is
left: the backends "dense" and "partitioned" are those cuts under their own names, and run where nothing is masked.

Heads are split where one tile of all heads would leave the cache. The backward pass gathers again, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Backend
from .chunk import attend, attend_backward
from .plan import Combination, Plan, Sizes, choose_tiles, dense_work, make_plan
from .problem import BackwardProblem, Gradients, Problem

# Bytes that one chunk may gather and compute, on CPU per thread; see block_sparse/gather.py, where they were measured.
CHUNK_BYTES_PER_THREAD = 2 * 2**20
CHUNK_BYTES_DEVICE = 256 * 2**20
# What a call costs before its first tile, in multiply-adds (1 CPU core: about 0.2 ms).
CALL_OVERHEAD = 1e7


class Gathered:
    """Copies rows next to each other, into the same memory every time: it stays in cache, and is never allocated anew.

    A chunk must be used up before the next is gathered.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows  # (parts, n, heads, D)
        self.buffer = rows.new_empty(0)

    def __call__(self, part: int, index: Tensor) -> Tensor:
        """Return rows at index (c, t) as (c, t, heads, D)."""
        rows, n = self.rows[part].flatten(1), index.numel()
        if len(self.buffer) < n:
            self.buffer = rows.new_empty(n, rows.shape[1])
        gathered = torch.index_select(rows, 0, index.flatten(), out=self.buffer[:n])
        return gathered.view(*index.shape, *self.rows.shape[2:])


def run(problem: Problem, *, unmasked: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return attention within the windows, and its log-sum-exp (B, H, N) if asked for.

    unmasked: cut only where the windows of a tile are the same; the rule must allow it.
    """
    plan = _plan(problem, unmasked)
    parts, size = _split(problem, plan, backward=False)
    q, k, v = (Gathered(x) for x in _rows(problem, parts))
    B, N, H, D = problem.B, problem.N, problem.H, problem.D
    # one row more than there are tokens: the repeated queries of short tiles write there
    out = q.rows.new_empty(parts, B * N + 1, H // parts, D)
    lse = q.rows.new_empty(parts, B * N + 1, H // parts, dtype=problem.dtype) if problem.with_lse else None
    for combination in plan.combinations():
        for part in range(parts):
            bias = _bias(problem, combination, part, parts)
            for queries, to, keys in combination.chunks(B, problem.T, size):
                chunk = (q(part, queries), k(part, keys), v(part, keys))
                out_c, lse_c = attend(*chunk, bias, problem.scale, problem.with_lse)
                out[part].index_copy_(0, to.flatten(), out_c.flatten(0, 1))
                if lse is not None and lse_c is not None:
                    lse[part].index_copy_(0, to.flatten(), lse_c.flatten(0, 1))
    result = _join(out[:, :-1], problem.q)
    return result, None if lse is None else _join(lse[:, :-1, :, None], problem.q).reshape(B, N, H).transpose(1, 2)


def backward(asked: BackwardProblem, *, unmasked: bool = False) -> Gradients:
    """Return the gradients; weights are computed again per chunk, so the log-sum-exp of the forward is not needed.

    Numerics: gradients of keys and of the relative bias are summed in the wide dtype, chunk after chunk in one order on
    CPU; elsewhere the sums for keys are atomic.
    """
    problem, need_bias = asked.forward, asked.need_bias
    plan = _plan(problem, unmasked)
    parts, size = _split(problem, plan, backward=True)
    q, k, v = (Gathered(x) for x in _rows(problem, parts))
    B, N, dtype = problem.B, problem.N, problem.dtype
    # a last row of zeros, so that the repeated queries of short tiles pass nothing on
    do, delta = (
        Gathered(F.pad(_split_heads(x.reshape(B * N, problem.H, -1), parts), (0, 0, 0, 0, 0, 1)))
        for x in (asked.dout, asked.delta)
    )
    dq = torch.empty_like(do.rows, dtype=dtype)
    dk, dv = (torch.zeros_like(x.rows, dtype=dtype) for x in (k, v))
    dbias = None
    if problem.rel_bias is not None and need_bias:
        dbias = torch.zeros_like(problem.rel_bias, dtype=dtype, memory_format=torch.contiguous_format)
    for combination in plan.combinations():
        for part in range(parts):
            bias = _bias(problem, combination, part, parts)
            dbias_c: Tensor | None = None
            for queries, to, keys in combination.chunks(B, problem.T, size):
                chunk = (q(part, queries), k(part, keys), v(part, keys))
                grads = (do(part, to), delta(part, to)[..., 0])
                dq_c, dk_c, dv_c, db = attend_backward(*chunk, bias, problem.scale, *grads, need_bias)
                dq[part].index_copy_(0, to.flatten(), dq_c.flatten(0, 1))
                dk[part].index_add_(0, keys.flatten(), dk_c.flatten(0, 1))
                dv[part].index_add_(0, keys.flatten(), dv_c.flatten(0, 1))
                if db is not None:
                    dbias_c = db if dbias_c is None else dbias_c.add_(db)
            if dbias is not None and dbias_c is not None:
                heads = _heads(problem, part, parts)
                dbias[heads] += combination.collect_bias(dbias_c[..., : plan.keys])
    dek = dev = None
    if problem.extra_k is not None and problem.extra_v is not None:
        dek, dev = (_join(x[:, B * N :], problem.extra_k).clone() for x in (dk, dv))
    return Gradients(
        _join(dq[:, :-1], problem.q),
        _join(dk[:, : B * N], problem.k),
        _join(dv[:, : B * N], problem.v),
        dbias,
        dek,
        dev,
    )


def _plan(problem: Problem, unmasked: bool) -> Plan:
    tile, _ = choose_tiles(problem.rule, _sizes(problem), unmasked)
    return make_plan(problem.rule, tile, problem.rel_bias is not None, problem.q.device)


def _sizes(problem: Problem) -> Sizes:
    bias = problem.rel_bias is not None
    return Sizes(problem.B, problem.H, problem.Hk, problem.D, problem.T, bias, problem.q.device.type)


def _split(problem: Problem, plan: Plan, *, backward: bool) -> tuple[int, int]:
    """Return into how many parts to split the heads, and how many tiles of a part to take at a time."""
    on_cpu = problem.q.device.type == "cpu"
    budget = CHUNK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else CHUNK_BYTES_DEVICE
    keys, group = plan.keys + problem.T, problem.H // problem.Hk
    per_head = 2 * keys * problem.D * problem.q.element_size()
    if problem.with_lse or backward:
        per_head += (
            2 * keys * problem.D + (2 if backward else 1) * group * plan.queries * keys
        ) * problem.dtype.itemsize
    fits = [g for g in range(1, problem.Hk + 1) if problem.Hk % g == 0 and g * per_head <= budget]
    heads = max(fits, default=1)
    return problem.Hk // heads, max(1, budget // (heads * per_head))


def _rows(problem: Problem, parts: int) -> tuple[Tensor, ...]:
    """Return q, k and v as rows of tokens (parts, n, heads / parts, D); extra keys are the rows behind the grid's."""
    B, N = problem.B, problem.N
    q, k, v = (x.reshape(B * N, x.shape[-2], -1) for x in (problem.q, problem.k, problem.v))
    if problem.extra_k is not None and problem.extra_v is not None:
        k = torch.cat([k, problem.extra_k.flatten(0, 1)])
        v = torch.cat([v, problem.extra_v.flatten(0, 1)])
    return tuple(_split_heads(x, parts) for x in (q, k, v))


def _split_heads(x: Tensor, parts: int) -> Tensor:
    """(n, heads, D) -> (parts, n, heads / parts, D), contiguous."""
    return x.unflatten(1, (parts, -1)).transpose(0, 1).contiguous()


def _join(x: Tensor, like: Tensor) -> Tensor:
    """Undo _split_heads, in the shape of `like` but for the last axis; contiguous."""
    return x.transpose(0, 1).reshape(*like.shape[:-1], x.shape[-1])


def _heads(problem: Problem, part: int, parts: int) -> slice:
    heads = problem.H // parts
    return slice(part * heads, (part + 1) * heads)


def _bias(problem: Problem, combination: Combination, part: int, parts: int) -> Tensor | None:
    """Return what is added to the scores of these tiles, (H / parts or 1, Tq, U + T), or None for nothing."""
    visible = combination.visible()
    if problem.rel_bias is not None:
        index = combination.bias_index()
        heads = problem.rel_bias[_heads(problem, part, parts)].flatten(1)
        bias = heads.index_select(1, index.flatten()).view(-1, *index.shape)
        if visible is not None:
            bias.masked_fill_(~visible, -torch.inf)
    elif visible is not None:
        bias = problem.q.new_zeros(1, *visible.shape).masked_fill_(~visible, -torch.inf)
    else:
        return None
    return F.pad(bias, (0, problem.T)) if problem.T else bias


def _cost(problem: Problem, *, unmasked: bool = False) -> float:
    _, work = choose_tiles(problem.rule, _sizes(problem), unmasked)
    return (work + CALL_OVERHEAD) / dense_work(_sizes(problem), problem.N)


def _dense_why_not(problem: Problem) -> str | None:
    for number, axis in enumerate(problem.rule.axes):
        if axis.causal:
            return f"axis {number} is causal"
        if not axis.covers:
            return (
                f"the window must cover every axis, but on axis {number} window {axis.window} x dilation {axis.dilation} "
                f"is less than {axis.length} tokens"
            )
    return None


def _partitioned_why_not(problem: Problem) -> str | None:
    for number, axis in enumerate(problem.rule.axes):
        if axis.causal:
            return f"axis {number} is causal"
        if not axis.partitions and not axis.covers:
            return (
                f"the windows must tile or cover every axis, but axis {number} has window {axis.window}, stride "
                f"{axis.stride} and dilation {axis.dilation} on {axis.length} tokens"
            )
    return None


def _backends(
    name: str, summary: str, why_not: Callable[[Problem], str | None], unmasked: bool
) -> tuple[Backend[Problem], Backend[BackwardProblem]]:
    cost = partial(_cost, unmasked=unmasked)
    return (
        Backend(name=name, summary=summary, why_not=why_not, cost=cost, run=partial(run, unmasked=unmasked)),
        Backend(
            name=name,
            summary=summary,
            why_not=lambda asked: why_not(asked.forward),
            cost=lambda asked: cost(asked.forward),
            run=partial(backward, unmasked=unmasked),
        ),
    )


FORWARD, BACKWARD = _backends(
    "tiles", "tiles of queries with the box of keys around their windows", lambda problem: None, unmasked=False
)
DENSE_FORWARD, DENSE_BACKWARD = _backends(
    "dense", "every window covers its class: dense attention per class", _dense_why_not, unmasked=True
)
PARTITIONED_FORWARD, PARTITIONED_BACKWARD = _backends(
    "partitioned", "the windows tile the grid: dense attention per window", _partitioned_why_not, unmasked=True
)
