"""token_scores as an operator of torch.library, so that compiled and exported graphs keep it whole.

The backend is chosen inside the operator, with real tensors at hand, and by the backward pass for itself: it needs
nothing of the forward pass but the log-sum-exp, which every backend gives alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, choose, note, without_autocast
from . import chunked, reference, triton_impl
from .problem import BackwardProblem, Problem, make_problem

OPERATOR = "token_scores"
# Equal costs go to the first.
FORWARD: tuple[Backend[Problem], ...] = (triton_impl.FORWARD, chunked.FORWARD, reference.FORWARD)
BACKWARD: tuple[Backend[BackwardProblem], ...] = (triton_impl.BACKWARD, chunked.BACKWARD, reference.BACKWARD)


def call(
    q_rows: Tensor,
    k: Tensor,
    row_positions: Tensor | None,
    key_mask: Tensor | None,
    weights: Tensor | None,
    lse: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    """Run the operator on checked arguments and return the scores."""
    differentiated = (q_rows, k) if weights is None else (q_rows, k, weights)
    keep_lse = lse is None and torch.is_grad_enabled() and any(x.requires_grad for x in differentiated)
    return _forward(q_rows, k, row_positions, key_mask, weights, lse, scale, backend, keep_lse)[0]


@torch.library.custom_op("mmeff::token_scores", mutates_args=())
def _forward(
    q_rows: Tensor,
    k: Tensor,
    row_positions: Tensor | None,
    key_mask: Tensor | None,
    weights: Tensor | None,
    lse: Tensor | None,
    scale: float,
    backend: str,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the scores and the LSE that the backward pass needs; an empty one where there is none, or the caller gave it."""
    problem = make_problem(q_rows, k, row_positions, key_mask, weights, lse, scale, keep_lse=keep_lse)
    chosen, reason = choose(OPERATOR, FORWARD, problem, backend)
    note(OPERATOR, chosen.name, reason)
    with without_autocast(k.device):
        scores, own = chosen.run(problem)
    return scores, own if keep_lse else scores.new_empty(0)


@_forward.register_fake
def _(
    q_rows: Tensor,
    k: Tensor,
    row_positions: Tensor | None,
    key_mask: Tensor | None,
    weights: Tensor | None,
    lse: Tensor | None,
    scale: float,
    backend: str,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    B, R, H, _ = q_rows.shape
    dtype = torch.float64 if q_rows.dtype == torch.float64 else torch.float32
    scores = k.new_empty(B, H, k.shape[1], dtype=dtype)
    return scores, scores.new_empty((B, H, R) if keep_lse else 0)


@torch.library.custom_op("mmeff::token_scores_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q_rows: Tensor,
    k: Tensor,
    row_positions: Tensor | None,
    key_mask: Tensor | None,
    weights: Tensor | None,
    lse: Tensor,
    lse_given: bool,
    scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q_rows, k, weights and lse; an empty tensor where `needs` says no."""
    need_q, need_k, need_weights, need_lse = needs
    forward = make_problem(q_rows, k, row_positions, key_mask, weights, lse if lse_given else None, scale)
    problem = BackwardProblem(forward, lse, grad, (need_q, need_k, need_weights or need_lse))
    with without_autocast(k.device):
        got = choose(f"{OPERATOR} backward", BACKWARD, problem, backend)[0].run(problem)
    dweights = dlse = None
    if got.per_row is not None and weights is not None and need_weights:
        dweights = got.per_row.sum_to_size(weights.shape)
    if got.per_row is not None and need_lse:
        dlse = -got.per_row if forward.weights is None else -got.per_row * forward.weights

    wanted = (
        (got.dq if need_q else None, q_rows),
        (got.dk if need_k else None, k),
        (dweights, weights),
        (dlse, lse),
    )
    dq, dk, dw, dl = (
        grad.new_empty(0) if x is None or like is None else x.to(like.dtype).contiguous() for x, like in wanted
    )
    return dq, dk, dw, dl


@_backward.register_fake
def _(
    grad: Tensor,
    q_rows: Tensor,
    k: Tensor,
    row_positions: Tensor | None,
    key_mask: Tensor | None,
    weights: Tensor | None,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (q_rows, k, grad if weights is None else weights, lse)
    dq, dk, dweights, dlse = (
        x.new_empty(x.shape) if need else grad.new_empty(0) for x, need in zip(inputs, rest[-1], strict=True)
    )
    return dq, dk, dweights, dlse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_rows, k, row_positions, key_mask, weights, lse, ctx.scale, ctx.backend, _ = inputs
    ctx.lse_given = lse is not None
    ctx.save_for_backward(q_rows, k, row_positions, key_mask, weights, output[1] if lse is None else lse)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_q, need_k, _, _, need_weights, need_lse, *_ = ctx.needs_input_grad
    needs = [need_q, need_k, need_weights, need_lse]
    *inputs, lse = ctx.saved_tensors
    grads = _backward(grad, *inputs, lse, ctx.lse_given, ctx.scale, ctx.backend, needs)
    dq, dk, dweights, dlse = (x if need else None for x, need in zip(grads, needs, strict=True))
    return dq, dk, None, None, dweights, dlse, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
