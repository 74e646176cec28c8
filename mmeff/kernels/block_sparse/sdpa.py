"""Dense attention by PyTorch, with the layout as a boolean mask: exact, and the fastest way for small problems."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration import cost
from ..dispatch import Backend
from ..layout import BlockLayout
from .problem import BackwardProblem, Problem, accumulation_dtype

# Bool elements, so also bytes, of the mask that a layout may keep for reuse; PyTorch makes a float copy at each call.
MAX_MASK_ELEMENTS = 64 * 2**20
OVERHEAD = 5e-5  # seconds of a call that computes nothing


def attend(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return scaled_dot_product_attention under the layout's mask, or without a mask where the layout is full."""
    mask = _mask(problem.layout)
    q, k, v = (x.transpose(1, 2) for x in (problem.q, *problem.without_padding()))
    if problem.want_lse:
        k, v = (_per_query_head(x, problem) for x in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=_additive(mask, q.dtype), scale=problem.scale
        )
        return out.transpose(1, 2), lse
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=problem.scale, enable_gqa=problem.Hk < problem.H
    )
    return out.transpose(1, 2), None


def backward(problem: BackwardProblem) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k and v from PyTorch's own backward of dense attention."""
    forward = problem.forward
    assert problem.dout is not None
    q, k, v = (x.transpose(1, 2) for x in (forward.q, *forward.without_padding()))
    k, v = (_per_query_head(x, forward) for x in (k, v))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        problem.dout.transpose(1, 2), q, k, v, problem.out.transpose(1, 2), problem.lse.to(accumulation_dtype(q.dtype)), 0.0, False,
        attn_mask=_additive(_mask(forward.layout), q.dtype), scale=forward.scale,
    )  # fmt: skip
    if forward.Hk < forward.H:
        dk, dv = (x.unflatten(1, (forward.Hk, -1)).sum(2) for x in (dk, dv))
    return tuple(x.transpose(1, 2) if need else None for x, need in zip((dq, dk, dv), problem.needs, strict=True))  # type: ignore[return-value]


def _mask(layout: BlockLayout) -> Tensor | None:
    return None if layout.is_full else layout.derived("dense_mask", BlockLayout.to_dense_mask)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _per_query_head(x: Tensor, problem: Problem) -> Tensor:
    group = problem.H // problem.Hk
    return x if group == 1 else x.repeat_interleave(group, 1)


def _why_not(problem: Problem) -> str | None:
    layout = problem.layout
    if problem.want_lse and problem.q.device.type != "cpu":
        what = "the log-sum-exp" if problem.return_lse else "the log-sum-exp that the backward pass reads"
        return f"scaled_dot_product_attention does not return {what}"
    if layout.is_full:
        return None
    B, H, Nq, Nk = layout.shape
    if B * H * Nq * Nk > MAX_MASK_ELEMENTS:
        return (
            f"its dense mask would have {B} x {H} x {Nq} x {Nk} = {B * H * Nq * Nk:,} elements, more than the limit of "
            f"{MAX_MASK_ELEMENTS:,}"
        )
    if layout.has_empty_rows:
        return "the layout has empty rows, for which scaled_dot_product_attention promises no result"
    return None


def _why_not_backward(problem: BackwardProblem) -> str | None:
    if problem.dlse is not None or problem.dout is None:
        return "scaled_dot_product_attention has no gradient of the log-sum-exp"
    return _why_not(problem.forward)


def _cost(problem: Problem, direction: str = "forward", multiply_adds: int | None = None) -> float:
    macs = problem.multiply_adds if multiply_adds is None else multiply_adds
    if problem.layout.is_full:
        return 1.0
    return cost(
        "masked", 1.0, OVERHEAD, device=problem.q.device, dtype=problem.q.dtype, direction=direction, multiply_adds=macs
    )


SUMMARY = "dense attention, masked by the layout unless it is full"
FORWARD = Backend(name="sdpa", summary=SUMMARY, why_not=_why_not, cost=_cost, run=attend)
BACKWARD = Backend(
    name="sdpa",
    summary=SUMMARY,
    why_not=_why_not_backward,
    cost=lambda problem: _cost(problem.forward, "backward", problem.multiply_adds),
    run=backward,
)
