"""block_sparse_attention as an operator of torch.library, so that compiled and exported graphs keep it whole.

The operator sees tensors and numbers only: a layout goes in as its lists and is recognised by them on the other side,
where the backend is chosen with real tensors at hand. Forward and backward choose apart from each other: every backend
gives the same log-sum-exp, and a backward pass needs nothing else of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, choose, note, without_autocast
from ..layout.identity import layout_of, lists_of
from . import gather, native, reference, sdpa, triton_impl
from .problem import BackwardProblem, Problem, accumulation_dtype

OPERATOR = "block_sparse_attention"
# In the order of explain(); equal costs go to the first.
FORWARD: tuple[Backend[Problem], ...] = (
    triton_impl.FORWARD, native.FORWARD, gather.FORWARD, sdpa.FORWARD, reference.FORWARD,
)  # fmt: skip
BACKWARD: tuple[Backend[BackwardProblem], ...] = (
    triton_impl.BACKWARD, native.BACKWARD, gather.BACKWARD, sdpa.BACKWARD, reference.BACKWARD,
)  # fmt: skip


def call(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Run the operator on a problem. The LSE is an empty tensor unless it is wanted."""
    layout = problem.layout
    out, lse = _forward(
        problem.q, problem.k, problem.v, *lists_of(layout), layout.q_block, layout.kv_block, problem.scale,
        problem.return_lse, problem.training, backend,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("mmeff::block_sparse_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    n_partial: Tensor,
    n_full: Tensor,
    col_idx: Tensor,
    row_of: Tensor,
    q_valid: Tensor,
    kv_valid: Tensor,
    bitmap: Tensor | None,
    q_bounds: Tensor | None,
    k_bounds: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    return_lse: bool,
    training: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lists = (row_start, n_partial, n_full, col_idx, row_of, q_valid, kv_valid, bitmap, q_bounds, k_bounds)
    layout = layout_of(lists, q_len=q.shape[1], kv_len=k.shape[1], q_block=q_block, kv_block=kv_block)
    problem = Problem(q, k, v, layout, scale, return_lse, training)
    chosen, reason = choose(OPERATOR, FORWARD, problem, backend)
    note(OPERATOR, chosen.name, reason, lambda: layout.density)
    if problem.is_empty:
        out, lse = _like_out(q), _like_lse(q, problem.want_lse)
        return out.zero_(), lse.fill_(-torch.inf)
    with without_autocast(q.device):
        out, maybe_lse = chosen.run(problem)
    lse = _like_lse(q, False) if maybe_lse is None or not problem.want_lse else maybe_lse.contiguous()
    return out.contiguous(), lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return_lse, training = rest[-3], rest[-2]
    return _like_out(q), _like_lse(q, return_lse or training)


def _like_out(q: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _like_lse(q: Tensor, wanted: bool) -> Tensor:
    B, N, H, _ = q.shape
    return q.new_empty((B, H, N) if wanted else (0,), dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("mmeff::block_sparse_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    n_partial: Tensor,
    n_full: Tensor,
    col_idx: Tensor,
    row_of: Tensor,
    q_valid: Tensor,
    kv_valid: Tensor,
    bitmap: Tensor | None,
    q_bounds: Tensor | None,
    k_bounds: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = (row_start, n_partial, n_full, col_idx, row_of, q_valid, kv_valid, bitmap, q_bounds, k_bounds)
    layout = layout_of(lists, q_len=q.shape[1], kv_len=k.shape[1], q_block=q_block, kv_block=kv_block)
    forward = Problem(q, k, v, layout, scale, True, True)
    problem = BackwardProblem(forward, out, lse, dout, dlse, (needs[0], needs[1], needs[2]))
    grads: tuple[Tensor | None, ...]
    if forward.is_empty:
        grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    else:
        with without_autocast(q.device):
            grads = choose(f"{OPERATOR} backward", BACKWARD, problem, backend)[0].run(problem)
    dq, dk, dv = (
        x.new_empty(0) if grad is None or not need else grad.contiguous()
        for x, grad, need in zip((q, k, v), grads, needs, strict=True)
    )
    return dq, dk, dv


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[-2]
    dq, dk, dv = (x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v), needs, strict=True))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:13], *output)
    ctx.q_block, ctx.kv_block, ctx.scale, _, _, ctx.backend = inputs[13:]


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    nothing = (None,) * (len(ctx.needs_input_grad) - 3)
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    *inputs, out, lse = ctx.saved_tensors
    grads = _backward(*inputs, out, lse, dout, dlse, ctx.q_block, ctx.kv_block, ctx.scale, needs, ctx.backend)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *nothing)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
