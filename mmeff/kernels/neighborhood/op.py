"""neighborhood_attention as an operator of torch.library, so that compiled and exported graphs keep it whole.

The backend is chosen inside the operator, with real tensors at hand, and by the backward pass for itself: it needs
nothing of the forward pass but the output and, on a GPU, the log-sum-exp, which every backend gives alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, choose, note, without_autocast
from . import blocks, native, reference, tiles, triton_impl
from .problem import BackwardProblem, Problem
from .rule import Axis, Rule

OPERATOR = "neighborhood_attention"
# In the order of explain_neighborhood(); equal costs go to the first.
FORWARD: tuple[Backend[Problem], ...] = (
    triton_impl.FORWARD, tiles.DENSE_FORWARD, tiles.PARTITIONED_FORWARD, blocks.FORWARD, native.FORWARD, tiles.FORWARD,
    reference.FORWARD,
)  # fmt: skip
BACKWARD: tuple[Backend[BackwardProblem], ...] = (
    triton_impl.BACKWARD, tiles.DENSE_BACKWARD, tiles.PARTITIONED_BACKWARD, blocks.BACKWARD, native.BACKWARD, tiles.BACKWARD,
    reference.BACKWARD,
)  # fmt: skip


def call(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Run the operator on a problem. The LSE is an empty tensor unless it is wanted."""
    tensors = (problem.q, problem.k, problem.v, problem.rel_bias, problem.extra_k, problem.extra_v)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    # the backward pass of the Triton kernels reads the LSE; the others compute it again faster than they keep it
    with_lse = problem.with_lse or (training and (problem.q.device.type != "cpu" or backend == "triton"))
    axes = problem.rule.axes
    each = [[getattr(axis, name) for axis in axes] for name in ("window", "stride", "dilation", "causal")]
    return forward_op(*tensors, *each, problem.scale, with_lse, backend)


def density(rule: Rule, T: int) -> float:
    """Return the attended fraction of the query-key pairs with T extra keys, 0 to 1."""
    return (rule.pairs + rule.N * T) / (rule.N * (rule.N + T))


def _rule(
    grid: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], causal: Sequence[bool]
) -> Rule:
    return Rule(tuple(Axis(*each) for each in zip(grid, window, stride, dilation, causal, strict=True)))


@torch.library.custom_op("mmeff::neighborhood_attention", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return out like q and the log-sum-exp (B, H, *grid), which is empty unless with_lse."""
    rule = _rule(q.shape[1:-2], window, stride, dilation, causal)
    problem = Problem(q, k, v, rule, rel_bias, extra_k, extra_v, scale, with_lse)
    chosen, reason = choose(OPERATOR, FORWARD, problem, backend)
    note(OPERATOR, chosen.name, reason, partial(density, rule, problem.T))
    with without_autocast(q.device):
        out, lse = chosen.run(problem)
    if lse is None:
        return out.contiguous(), q.new_empty(0, dtype=problem.dtype)
    return out.contiguous(), lse.reshape(problem.B, problem.H, *rule.grid).contiguous()


@forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    B, *grid, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, *grid) if with_lse else (0,), dtype=wide)


@torch.library.custom_op("mmeff::neighborhood_attention_backward", mutates_args=())
def backward_op(
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, rel_bias, extra_k and extra_v; an empty tensor where `needs` says no."""
    rule = _rule(q.shape[1:-2], window, stride, dilation, causal)
    forward = Problem(q, k, v, rule, rel_bias, extra_k, extra_v, scale, False)
    problem = BackwardProblem(forward, dout, delta, lse.flatten(2) if lse.numel() else None, needs[3])
    with without_autocast(q.device):
        found = choose(f"{OPERATOR} backward", BACKWARD, problem, backend)[0].run(problem)
    inputs = (q, k, v, rel_bias, extra_k, extra_v)
    grads = (found.q, found.k, found.v, found.rel_bias, found.extra_k, found.extra_v)
    a, b, c, d, e, f = (
        x.to(like.dtype).contiguous() if need and like is not None else q.new_empty(0)
        for x, like, need in zip(grads, inputs, needs, strict=True)
    )
    return a, b, c, d, e, f


@backward_op.register_fake
def _(
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e, f = (
        x.new_empty(x.shape) if need and x is not None else q.new_empty(0)
        for x, need in zip((q, k, v, rel_bias, extra_k, extra_v), needs, strict=True)
    )
    return a, b, c, d, e, f


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, stride, dilation, causal, scale, _, ctx.backend = inputs
    ctx.rule = (window, stride, dilation, causal, scale)
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, out, lse = ctx.saved_tensors
    wide = torch.promote_types(out.dtype, torch.float32)
    if dout is None:
        dout = torch.zeros_like(out)
    delta = (dout.to(wide) * out.to(wide)).sum(-1)  # (B, *grid, H)
    if dlse is not None and dlse.ndim > 1:  # not the placeholder of an LSE that was not kept
        delta = delta - dlse.movedim(1, -1)
    needs = [bool(need) for need in ctx.needs_input_grad[:6]]
    grads = backward_op(dout, delta.flatten(1, -2), lse, *tensors, *ctx.rule, needs, ctx.backend)
    needed = [x if need else None for x, need in zip(grads, needs, strict=True)]
    return (*needed, *[None] * (len(ctx.needs_input_grad) - 6))


forward_op.register_autograd(_differentiate, setup_context=_setup_context)
