"""routed_attention as an operator of torch.library, and its backends."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..block_sparse import op as block_sparse
from ..block_sparse import reference, sdpa
from ..block_sparse.problem import BackwardProblem, accumulation_dtype
from ..calibration import rates
from ..dispatch import Backend, choose, note, without_autocast
from . import grouped
from .problem import RoutedProblem

OPERATOR = "routed_attention"
OVERHEAD = 1e-3  # seconds that grouping takes before anything is computed
# What a pick costs beside its pairs (copying the query, merging its part), in keys of dense attention: 240 to 320 at N 4096,
# H 8, D 64, float32, 2 CPU threads. So blocks of fewer keys than this are not worth picking one by one.
PICK_KEYS = 250


def relative_cost(share: float, picks: float, keys: int, ratio: float) -> float:
    """Return the time of routed attention in units of dense attention.

    Args: share: of the key blocks that are picked. picks: per query. keys: Nk. ratio: of the block-sparse kernel.
    """
    return share / ratio + PICK_KEYS * picks / max(keys, 1)


def inner(backend: str) -> str:
    """Return the block-sparse backend that the groups run on where `backend` is named: that one, or the fastest."""
    names = {b.name for b in block_sparse.FORWARD} - {"sdpa", "reference"}
    return backend if backend in names else "auto"


def _best_ratio(problem: RoutedProblem) -> tuple[float, float]:
    at = rates(problem.q.device, problem.q.dtype, "forward", problem.multiply_adds)
    return max(ratio for name, ratio in at.ratios.items() if name != "masked"), at.dense


def _grouped_cost(problem: RoutedProblem) -> float:
    ratio, dense = _best_ratio(problem)
    # the queries of a group fill whole rows, so half a row per group is computed for nothing
    B, Nq, H, _ = problem.q.shape
    waste = grouped.ROWS / 2 / max(Nq * problem.share, 1.0)
    picks = problem.share * problem.routes.shape[3]
    cost = relative_cost(problem.share * (1 + waste), picks, problem.k.shape[1], ratio)
    return cost + OVERHEAD * dense / max(problem.multiply_adds, 1)


def _why_not_masked(problem: RoutedProblem) -> str | None:
    if not problem.is_full and problem.mask_elements > sdpa.MAX_MASK_ELEMENTS:  # before the mask is made
        return (
            f"its dense mask would have {problem.mask_elements:,} elements, more than the limit of "
            f"{sdpa.MAX_MASK_ELEMENTS:,}"
        )
    if problem.has_empty_rows:
        return "some query picked no key, for which scaled_dot_product_attention promises no result"
    return sdpa.FORWARD.why_not(problem.masked)


def _masked_cost(problem: RoutedProblem) -> float:
    if problem.is_full:
        return 1.0
    return 1 / rates(problem.q.device, problem.q.dtype, "forward").ratios["masked"]


BACKENDS: tuple[Backend[RoutedProblem], ...] = (
    Backend(
        name="grouped",
        summary="queries grouped by key block, block-sparse",
        why_not=lambda problem: None,
        cost=_grouped_cost,
        run=lambda problem: grouped.attend(problem, "auto"),
    ),
    Backend(
        name="sdpa",
        summary="dense attention under a mask",
        why_not=_why_not_masked,
        cost=_masked_cost,
        run=lambda problem: sdpa.attend(problem.masked),
    ),
    Backend(
        name="reference",
        summary="the definition, slow, for tests",
        why_not=lambda problem: None,
        cost=lambda problem: math.inf,
        run=lambda problem: reference.attend(problem.masked),
    ),
)


def call(problem: RoutedProblem, backend: str) -> tuple[Tensor, Tensor]:
    """Run the operator on a problem. The LSE is an empty tensor unless it is wanted."""
    out, lse = _forward(
        problem.q, problem.k, problem.v, problem.routes, problem.kv_valid, problem.kv_block, problem.scale,
        problem.return_lse, problem.training, backend,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("mmeff::routed_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    kv_valid: Tensor | None,
    kv_block: int,
    scale: float,
    return_lse: bool,
    training: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = RoutedProblem(q, k, v, routes, kv_valid, kv_block, scale, return_lse, training)
    on = inner(backend)
    chosen, reason = choose(OPERATOR, BACKENDS, problem, backend if on == "auto" else "grouped")
    note(OPERATOR, chosen.name, reason, lambda: problem.share)
    B, Nq, H, _ = q.shape
    wanted = return_lse or training
    if 0 in q.shape or 0 in k.shape:
        return torch.zeros_like(q, memory_format=torch.contiguous_format), _lse_like(q, wanted).fill_(-torch.inf)
    with without_autocast(q.device):
        out, lse = chosen.run(problem) if on == "auto" else grouped.attend(problem, on)
    return out.contiguous(), lse.contiguous() if wanted else _lse_like(q, False)


def _lse_like(q: Tensor, wanted: bool) -> Tensor:
    B, Nq, H, _ = q.shape
    return q.new_empty((B, H, Nq) if wanted else (0,), dtype=accumulation_dtype(q.dtype))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse_like(q, rest[-3] or rest[-2])


@torch.library.custom_op("mmeff::routed_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    kv_valid: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    kv_block: int,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = RoutedProblem(q, k, v, routes, kv_valid, kv_block, scale, True, True)
    grads: tuple[Tensor | None, ...]
    if 0 in q.shape or 0 in k.shape:
        grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    else:
        with without_autocast(q.device):
            if backend in ("reference", "sdpa"):
                masked = BackwardProblem(problem.masked, out, lse, dout, dlse, (needs[0], needs[1], needs[2]))
                use_sdpa = backend == "sdpa" and sdpa.BACKWARD.why_not(masked) is None
                grads = (sdpa.backward if use_sdpa else reference.backward)(masked)
            else:
                grads = grouped.backward(problem, out, lse, dout, dlse, needs, inner(backend))
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
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.kv_block, ctx.scale, _, _, ctx.backend = inputs[5:]


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = _backward(*ctx.saved_tensors, dout, dlse, ctx.kv_block, ctx.scale, needs, ctx.backend)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *nothing)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
