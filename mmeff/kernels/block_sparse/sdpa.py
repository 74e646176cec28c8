"""Dense attention by PyTorch, with the layout as a boolean mask: exact, and the fastest way for small problems."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Backend
from ..layout import BlockLayout
from .problem import Problem

# Bool elements, so also bytes, of the mask that a layout may keep for reuse; PyTorch makes a float copy at each call.
MAX_MASK_ELEMENTS = 64 * 2**20
# Dense attention with a mask runs at this fraction of its plain speed (1 CPU core, N 4096, float32: 0.68).
MASKED_RATIO = 0.7


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return scaled_dot_product_attention under the layout's mask, or without a mask where the layout is full."""
    layout = problem.layout
    mask = None if layout.is_full else layout.derived("dense_mask", BlockLayout.to_dense_mask)
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=problem.scale, enable_gqa=problem.Hk < problem.H
    )
    return out.transpose(1, 2), None


def _why_not(problem: Problem) -> str | None:
    layout = problem.layout
    if problem.return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
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


def _cost(problem: Problem) -> float:
    return 1.0 if problem.layout.is_full else 1 / MASKED_RATIO


BACKEND = Backend(
    name="sdpa",
    summary="dense attention, masked by the layout unless it is full",
    why_not=_why_not,
    cost=_cost,
    run=run,
)
