"""Routed attention: every query, in every head, picks its own key blocks.

A BlockLayout gives a whole block of queries one list of key blocks. Where each query has a list of its own, the queries are
grouped by the key block they picked instead: `grouped.py` turns the problem into block-sparse attention over the groups and
merges what the groups of a query found. `op.py` makes it one operator with a gradient. A routing that is the same for
whole regions of queries (BiFormer) is a BlockLayout, and faster as one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import Explanation, judge
from . import op
from .problem import RoutedProblem


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    kv_block: int,
    kv_valid: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each query to the key blocks that it picked, in one softmax over all of them.

    Args:
        q: (B, Nq, H, D) queries, heads last.
        k, v: (B, Nk, Hk, D) keys and values; H must be a multiple of Hk, and query head h reads head h // (H / Hk).
        routes: (B|1, H|1, Nq, nK) bool, the key blocks that each query attends to; nK = ceil(Nk / kv_block).
        kv_block: tokens in a key block; the last one may be shorter.
        kv_valid: (nK,) or (B|1, nK) integers, tokens in use at the start of each key block; what follows them is padding,
            is never attended and may hold anything. None uses every token.
        scale: factor on the scores; None is 1/sqrt(D).
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: "auto", "grouped" (queries grouped by key block, through block_sparse_attention), "sdpa" (dense under a
            mask) or "reference"; or "triton", "native" or "gather", which is "grouped" on that backend of
            block_sparse_attention. A named backend runs or raises; it never falls back.

    Returns: out (B, Nq, H, D) in the dtype of q; with return_lse also the natural-log LSE, (B, H, Nq) float32 (float64
        for float64 inputs). Both carry gradients; the choice of blocks does not.
    Raises: ValueError or TypeError for arguments that do not fit each other, BackendUnavailable for a named backend
        that cannot run this problem.
    Numerics: as block_sparse_attention; the parts of a query are merged in float32. A query without picks gives output 0
        and LSE -inf, with gradient 0. Memory grows with the picks: "grouped" copies a query once per pick, a bounded number
        of heads at a time.
    Source: VMoBA (arXiv:2506.23858) and MoBA (arXiv:2502.13189) compute selected chunks this way.
    Differs: any lengths, GQA, a differentiable LSE, no separate branch for a query's own chunk.
    """
    problem = _check(q, k, v, routes, kv_valid, kv_block, scale, return_lse)
    out, lse = op.call(problem, backend)
    return (out, lse) if return_lse else out


def explain_routed(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *, kv_block: int, kv_valid: Tensor | None = None
) -> Explanation:
    """Tabulate which backends can run this routed_attention call, why not, and which one auto takes."""
    problem = _check(q, k, v, routes, kv_valid, kv_block, None, False)
    return Explanation(op.OPERATOR, str(problem), judge(op.BACKENDS, problem))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    kv_valid: Tensor | None,
    kv_block: int,
    scale: float | None,
    return_lse: bool,
) -> RoutedProblem:
    who = "routed_attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4 or 0 in x.shape[2:]:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{who}: {name} must be floating-point (B, N, H, D) with heads and channels, got {got}.")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{who}: q, k and v must share dtype and device, got q {q.dtype} on {q.device} and {name} {x.dtype} on "
                f"{x.device}; cast or move {name}."
            )
    B, Nq, H, D = q.shape
    if v.shape != k.shape or k.shape[0] != B or k.shape[3] != D or H % k.shape[2]:
        raise ValueError(
            f"{who}: k and v must be (B, Nk, Hk, D) = ({B}, Nk, Hk, {D}) with Hk dividing H={H}, got k {tuple(k.shape)} and "
            f"v {tuple(v.shape)}."
        )
    if not isinstance(kv_block, int) or isinstance(kv_block, bool) or kv_block < 1:
        raise ValueError(f"{who}: kv_block must be an int >= 1 (tokens), got {kv_block!r}.")
    nK = -(-k.shape[1] // kv_block)
    if not isinstance(routes, Tensor) or routes.dtype != torch.bool:
        got = f"a {routes.dtype} tensor" if isinstance(routes, Tensor) else type(routes).__name__
        raise TypeError(f"{who}: routes must be a bool tensor, True where a query picks a key block, got {got}.")
    fits = routes.ndim == 4 and routes.shape[0] in (1, B) and routes.shape[1] in (1, H)
    if not fits or routes.shape[2:] != (Nq, nK) or routes.device != q.device:
        raise ValueError(
            f"{who}: routes must be (B|1, H|1, Nq, nK) = ({B}|1, {H}|1, {Nq}, {nK}) on {q.device}, where nK = ceil(Nk / "
            f"kv_block) = ceil({k.shape[1]} / {kv_block}), got {tuple(routes.shape)} on {routes.device}."
        )
    if kv_valid is not None:
        kv_valid = _check_valid(who, kv_valid, B, nK, q.device)
    if scale is not None and (isinstance(scale, Tensor) or not math.isfinite(scale)):
        raise ValueError(f"{who}: scale must be a finite Python float, got {scale!r}; leave it out for 1/sqrt(D).")
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return RoutedProblem(
        q, k, v, routes, kv_valid, kv_block, D**-0.5 if scale is None else float(scale), bool(return_lse), training
    )


def _check_valid(who: str, valid: Tensor, B: int, nK: int, device: torch.device) -> Tensor:
    if not isinstance(valid, Tensor) or valid.dtype not in (torch.int32, torch.int64):
        got = str(valid.dtype) if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"{who}: kv_valid must be an int32 or int64 tensor of token counts, got {got}; cast it.")
    if valid.ndim == 1:
        valid = valid[None]
    if valid.ndim != 2 or valid.shape[0] not in (1, B) or valid.shape[1] != nK or valid.device != device:
        raise ValueError(
            f"{who}: kv_valid must be (nK,) = ({nK},) or (B|1, nK) = ({B}|1, {nK}) on {device}, the tokens in use of each "
            f"key block, got {tuple(valid.shape)} on {valid.device}."
        )
    return valid.to(torch.int32)
