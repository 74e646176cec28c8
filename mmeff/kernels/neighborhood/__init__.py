"""Neighborhood attention in one to three dimensions: every query attends to a window of the grid around it.

One rule covers sliding windows (stride 1), Swin's and MaxViT's windows (stride = window), MaxViT's grid and DiNAT
(dilation), the strided windows of GNA, and causal axes. Reading order: `rule.py` says which keys a query sees,
`reference.py` what is computed; `plan.py` and `tiles.py` cut the grid into dense tiles, in plain PyTorch on any device
(`chunk.py` computes a tile); `native.py` and `native.c` give every query its own small window, on CPUs; `triton_impl.py`
launches the kernels of `triton_kernels.py` on a GPU; `op.py` chooses and registers the operator with PyTorch; `unfused.py`
has the two halves apart, for methods that change the weights between.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Explanation, judge
from . import op
from .checks import PerAxis, check_extra, check_qkv, check_rel_bias, check_rule, check_scale
from .problem import Problem
from .unfused import na_scores, na_values

__all__ = ["explain_neighborhood", "na_scores", "na_values", "neighborhood_attention"]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: PerAxis = False,
    rel_bias: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each token of a grid to the window of tokens around it, and to extra keys.

    Args:
        q: (B, *grid, H, D) queries, heads last; the grid has one to three axes.
        k, v: (B, *grid, Hk, D) keys and values; H must be a multiple of Hk, and query head h reads head h // (H / Hk).
        window: keys per axis, one number or one for each axis; window * dilation must fit into the axis. At a border
            the window shifts inward and keeps its size. An even window reaches one further to the left.
        stride: queries that share a window, in groups of this many per axis, at most the window. stride = window on a
            grid that it divides is attention within separate windows.
        dilation: distance between the keys of a window; a query at i sees only keys that equal i modulo the dilation.
        causal: see no key behind the query on this axis; early queries then see fewer than `window`.
        rel_bias: (H, 2 window - 1, ...), one axis per axis of the grid, added to the scaled scores at index
            (key - query) / dilation + window - 1; in the dtype of q or in float32. Swin's table runs the other way.
        extra_k, extra_v: (B, T, Hk, D) keys and values outside the grid, text for instance, that every query sees in the
            same softmax; no bias is added to them.
        scale: factor on q k^T; None is 1/sqrt(D).
        return_lse: also return the log-sum-exp of the scores, to be merged by `merge_attention`.
        backend: "auto", "triton", "dense", "partitioned", "blocks", "native", "tiles" or "reference". auto takes the one
            expected to be fastest; all of them compute the same thing. A named backend runs or raises; it never falls back. The
            backward pass uses the same name, or chooses for itself under "auto".

    Returns: out (B, *grid, H, D) in the dtype of q; with return_lse also the natural-log LSE, (B, H, *grid) float32
        (float64 for float64 inputs). Both carry gradients, to q, k, v, rel_bias, extra_k and extra_v; once.
    Raises: ValueError or TypeError for arguments that do not fit each other, BackendUnavailable for a named backend
        that cannot run this problem.
    Numerics: softmax and sums in float32 (float64 for float64 inputs); autocast does not reach inside. Every query sees
        itself, so no row is empty. Keys next to a window may be read with it and weighed 0, so that a NaN in them
        spreads a little further than the window. Scores are never all kept: the backward pass computes them again. Gradients add up in
        one order on CPU; on a GPU "triton" adds the gradient of rel_bias atomically in float32, and "tiles" those of k
        and v, so that their last bits vary from run to run.
    Source: NAT (Hassani et al., CVPR 2023, arXiv:2204.07143), DiNAT (Hassani and Shi, 2022, arXiv:2209.15001), GNA
        (Hassani et al., 2025, arXiv:2504.16922) for the stride; windows and bias agree with natten 0.15 for odd windows.
    Differs: rel_bias, gone from natten since 0.20, with its gradient; extra keys share the softmax instead of being
        merged; the LSE is differentiable; a window of 1 is allowed and lets an axis attend within its own slice.
    """
    problem = _problem(
        q, k, v, window, stride, dilation, causal, rel_bias, extra_k, extra_v, scale, return_lse
    )  # fmt: skip
    out, lse = op.call(problem, backend)
    return (out, lse) if return_lse else out


def explain_neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: PerAxis = False,
    rel_bias: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Tabulate which backends can run this neighborhood_attention call, why not, and which one auto takes.

    Args: as for neighborhood_attention.
    Returns: an Explanation; print it, or read `.rows` and `.chosen`. Nothing is computed.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    """
    problem = _problem(
        q, k, v, window, stride, dilation, causal, rel_bias, extra_k, extra_v, scale, return_lse
    )  # fmt: skip
    return Explanation(op.OPERATOR, str(problem), judge(op.FORWARD, problem))


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    causal: PerAxis,
    rel_bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> Problem:
    who = op.OPERATOR
    check_qkv(who, q, k, v)
    rule = check_rule(who, q.shape[1:-2], window, stride, dilation, causal)
    check_rel_bias(who, rel_bias, q, rule)
    check_extra(who, extra_k, extra_v, k)
    return Problem(q, k, v, rule, rel_bias, extra_k, extra_v, check_scale(who, scale, q), bool(return_lse))
