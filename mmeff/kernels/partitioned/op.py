"""partitioned_attention as an operator of torch.library, so that compiled and exported graphs keep it whole.

The backend is chosen inside the operator, with real tensors at hand. The C kernel has no backward pass: gradients come from
PyTorch's products, whatever ran forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..dispatch import Backend, choose, note, without_autocast
from . import native, reference, windows
from .problem import BackwardProblem, Partition, Problem

OPERATOR = "partitioned_attention"
# In the order of explain_partitioned(); equal costs go to the first.
FORWARD: tuple[Backend[Problem], ...] = (native.FORWARD, windows.FORWARD, reference.FORWARD)
BACKWARD: tuple[Backend[BackwardProblem], ...] = (windows.BACKWARD, reference.BACKWARD)


def call(problem: Problem, backend: str) -> Tensor:
    """Run the operator on a problem.

    Windows are small and layers are many, so what the dispatcher costs shows. It is passed by where nobody watches.
    """
    tensors = (problem.q, problem.k, problem.v, problem.rel_bias)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    watched = tracing or is_in_torch_dispatch_mode()
    if not (training or watched) and type(problem.q) is Tensor and type(problem.k) is Tensor:
        return _forward(problem, backend)
    return forward_op(
        problem.q, problem.k, problem.v, problem.rel_bias, problem.key_mask, problem.window, problem.partition,
        problem.shift, problem.scale, backend,
    )  # fmt: skip


def _forward(problem: Problem, backend: str) -> Tensor:
    if (
        backend == "auto" and native.FORWARD.why_not(problem) is None
    ):  # then auto takes it, and the table would cost as much
        chosen, reason = native.FORWARD, "auto: the C kernel is faster wherever it runs"
    else:
        chosen, reason = choose(OPERATOR, FORWARD, problem, backend)
    note(OPERATOR, chosen.name, reason, lambda: problem.density)
    if not torch.is_autocast_enabled(problem.q.device.type):
        return cast(Tensor, chosen.run(problem)).contiguous()
    with without_autocast(problem.q.device):
        return cast(Tensor, chosen.run(problem)).contiguous()


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    key_mask: Tensor | None,
    window: Sequence[int],
    partition: str,
    shift: Sequence[int],
    scale: float,
) -> Problem:
    (wh, ww), (sh, sw) = window, shift
    return Problem(q, k, v, (wh, ww), cast(Partition, partition), (sh, sw), rel_bias, key_mask, scale)


@torch.library.custom_op("mmeff::partitioned_attention", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    key_mask: Tensor | None,
    window: Sequence[int],
    partition: str,
    shift: Sequence[int],
    scale: float,
    backend: str,
) -> Tensor:
    """Return out like k, contiguous."""
    return _forward(_problem(q, k, v, rel_bias, key_mask, window, partition, shift, scale), backend)


@forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    key_mask: Tensor | None,
    window: Sequence[int],
    partition: str,
    shift: Sequence[int],
    scale: float,
    backend: str,
) -> Tensor:
    return k.new_empty(k.shape)


@torch.library.custom_op("mmeff::partitioned_attention_backward", mutates_args=())
def backward_op(
    out: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    key_mask: Tensor | None,
    window: Sequence[int],
    partition: str,
    shift: Sequence[int],
    scale: float,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and rel_bias; an empty tensor for a bias that needs none."""
    forward = _problem(q, k, v, rel_bias, key_mask, window, partition, shift, scale)
    problem = BackwardProblem(forward, out, dout, need_bias)
    with without_autocast(q.device):
        found = choose(f"{OPERATOR} backward", BACKWARD, problem, backend)[0].run(problem)
    dq, dk, dv = (x.to(q.dtype).contiguous() for x in (found.q, found.k, found.v))
    if found.rel_bias is None or rel_bias is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, found.rel_bias.to(rel_bias.dtype).contiguous()


@backward_op.register_fake
def _(
    out: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    key_mask: Tensor | None,
    window: Sequence[int],
    partition: str,
    shift: Sequence[int],
    scale: float,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = rel_bias.new_empty(rel_bias.shape) if need_bias and rel_bias is not None else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, rel_bias, key_mask, *ctx.rule, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, rel_bias, key_mask, output)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out = ctx.saved_tensors
    # "native" has no backward pass of its own; auto chooses the one there is
    backend = "reference" if ctx.backend == "reference" else "auto"
    *grads, dbias = backward_op(out, dout, *tensors, *ctx.rule, bool(ctx.needs_input_grad[3]), backend)
    return (*grads, dbias if ctx.needs_input_grad[3] else None, *[None] * 6)


forward_op.register_autograd(_differentiate, setup_context=_setup_context)
