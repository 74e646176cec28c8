"""Merge attention over disjoint sets of keys into attention over their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import without_autocast


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention results over disjoint key sets, exactly, by their log-sum-exps.

    Args:
        outputs: each (B, N, H, D), the attention of the same queries over one set of keys; one dtype.
        lses: each (B, H, N), natural log, of the scaled scores of that set; -inf where a query saw none of its keys.

    Returns: out (B, N, H, D) in the dtype of the outputs, and lse (B, H, N) float32 (float64 for float64).
    Raises: ValueError or TypeError for sequences that do not fit each other.
    Numerics: accumulates in float32 (float64 for float64). A set with LSE -inf contributes nothing, whatever its
        output holds, NaN included; where every set has -inf, out is 0 and lse -inf, with gradient 0. Differentiable in
        outputs and lses.
    Source: FlashAttention (Dao et al., 2022, arXiv:2205.14135), the rescaling of partial softmaxes.
    Differs: any number of sets at once.
    """
    _check(outputs, lses)
    with without_autocast(outputs[0].device):
        dtype = torch.promote_types(torch.promote_types(outputs[0].dtype, lses[0].dtype), torch.float32)
        stacked = torch.stack([x.to(dtype) for x in lses])
        top = stacked.detach().amax(0)
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = torch.exp(stacked - top)
        total = weights.sum(0)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        lse = (top + total.log()).masked_fill(empty, -torch.inf)
        out = torch.zeros_like(outputs[0], dtype=dtype)
        for x, weight in zip(outputs, weights / total, strict=True):
            weight = weight.transpose(1, 2)[..., None]
            out = out + weight * x.to(dtype).masked_fill(weight == 0, 0.0)
        return out.to(outputs[0].dtype), lse


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    who = "merge_attention"
    if isinstance(outputs, Tensor) or isinstance(lses, Tensor):
        raise TypeError(f"{who}: outputs and lses must be sequences of tensors, got a tensor; pass lists.")
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"{who}: outputs and lses must be non-empty and equally long, got {len(outputs)} outputs and {len(lses)} "
            "lses; pass one LSE per output (block_sparse_attention returns both with return_lse=True)."
        )
    first = outputs[0]
    if first.ndim != 4 or not first.is_floating_point():
        raise ValueError(
            f"{who}: outputs must be floating-point (B, N, H, D), got {first.dtype} {tuple(first.shape)}; heads are "
            "second to last."
        )
    B, N, H, _ = first.shape
    for i, (x, lse) in enumerate(zip(outputs, lses, strict=True)):
        if x.shape != first.shape or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{who}: outputs must share shape, dtype and device, got {x.dtype} {tuple(x.shape)} on {x.device} at "
                f"{i} but {first.dtype} {tuple(first.shape)} on {first.device} at 0; they must be of the same queries."
            )
        if lse.shape != (B, H, N) or not lse.is_floating_point() or lse.device != first.device:
            raise ValueError(
                f"{who}: lses[{i}] must be floating-point (B, H, N) = {(B, H, N)} on {first.device}, got {lse.dtype} "
                f"{tuple(lse.shape)} on {lse.device}; heads come before tokens in an LSE."
            )
