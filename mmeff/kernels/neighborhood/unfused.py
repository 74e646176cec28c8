"""The two halves of neighborhood attention apart: scores of each window, and sums of values under given weights.

For methods that do something to the weights in between (OverLoCK makes them from the input, SegMAN adds to them). Plain
PyTorch that gathers every window, in chunks of queries; several chunks are recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .checks import (
    PerAxis,
    check_float,
    check_heads,
    check_like,
    check_qkv,
    check_rel_bias,
    check_rule,
    check_scale,
    check_tokens,
)
from .rule import Rule

# Bytes of gathered keys or values that exist at a time; at least one query of every sample.
CHUNK_BYTES = 64 * 2**20


def na_scores(
    q: Tensor,
    k: Tensor,
    window: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: PerAxis = False,
    rel_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the scores of each query with the keys of its window, before the softmax.

    Args: as for neighborhood_attention.
    Returns: (B, H, *grid, K) in the dtype of q, with K the product of the window: scale q k^T + rel_bias, keys in row-major
        order over the axes of the window; -inf for keys that a causal axis hides.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: in the dtype of q, with the sums as PyTorch makes them. Differentiable any number of times.
    Source: NAT (Hassani et al., CVPR 2023, arXiv:2204.07143), its unfused kernels "QK".
    Differs: strides, causal axes and even windows; grouped queries.
    """
    who = "na_scores"
    check_qkv(who, q, k, None)
    rule = check_rule(who, q.shape[1:-2], window, stride, dilation, causal)
    check_rel_bias(who, rel_bias, q, rule)
    factor = check_scale(who, scale, q)
    index, visible, offset = _slots(rule, q.device)
    Hk, N = k.shape[-2], rule.N
    queries = (q * factor).reshape(q.shape[0], N, Hk, -1, q.shape[-1])  # (B, N, Hk, group, D)
    keys = k.reshape(k.shape[0], N, Hk, -1)

    def chunk(queries: Tensor, keys: Tensor, rel_bias: Tensor | None, rows: Tensor) -> Tensor:
        scores = torch.einsum("bnhgd,bnkhd->bhgnk", queries[:, rows], keys[:, index[rows]]).flatten(1, 2)
        if rel_bias is not None:
            scores = scores + rel_bias.flatten(1)[:, offset[rows]].to(scores.dtype)
        return scores if visible is None else scores.masked_fill(~visible[rows], -torch.inf)

    parts = [_run(chunk, queries, keys, rel_bias, rows) for rows in _chunks(rule, keys)]
    return torch.cat(parts, 2).unflatten(2, rule.grid)


def na_values(
    weights: Tensor,
    v: Tensor,
    window: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: PerAxis = False,
) -> Tensor:
    """Sum the values of each query's window under given weights.

    Args:
        weights: (B, H, *grid, K) with K the product of the window, in the order of na_scores; any numbers. What
            stands at keys that a causal axis hides counts for nothing.
        v: (B, *grid, Hk, D) values; H must be a multiple of Hk.
        window, stride, dilation, causal: as for neighborhood_attention.
    Returns: (B, *grid, H, D) in the dtype of v.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: in the dtype of v, with the sums as PyTorch makes them. Differentiable any number of times.
    Source: NAT (Hassani et al., CVPR 2023, arXiv:2204.07143), its unfused kernels "AV"; OverLoCK (Lou and Yu, CVPR 2025,
        arXiv:2502.20087) gives them weights of its own.
    Differs: strides, causal axes and even windows; grouped queries.
    """
    who = "na_values"
    check_tokens(who, "v", v)
    rule = check_rule(who, v.shape[1:-2], window, stride, dilation, causal)
    check_float(who, "weights", weights)
    check_like(who, "weights", weights, "v", v)
    index, visible, _ = _slots(rule, v.device)
    B, Hk, N, K = v.shape[0], v.shape[-2], rule.N, index.shape[1]
    if weights.ndim != v.ndim or (weights.shape[0], *weights.shape[2:]) != (B, *rule.grid, K):
        raise ValueError(
            f"{who}: weights must be (B, H, *grid, K) = ({B}, H, {', '.join(map(str, rule.grid))}, {K}) with K the "
            f"product of the window, got {tuple(weights.shape)}; heads come before the grid, as na_scores returns them."
        )
    check_heads(who, weights.shape[1], Hk)
    flat = weights.flatten(2, -2).unflatten(1, (Hk, -1))  # (B, Hk, group, N, K)
    values = v.reshape(B, N, Hk, -1)

    def chunk(flat: Tensor, values: Tensor, _: None, rows: Tensor) -> Tensor:
        w = flat[:, :, :, rows]
        if visible is not None:
            w = w.masked_fill(~visible[rows], 0.0)
        return torch.einsum("bhgnk,bnkhd->bnhgd", w, values[:, index[rows]])

    parts = [_run(chunk, flat, values, None, rows) for rows in _chunks(rule, values)]
    return torch.cat(parts, 1).flatten(2, 3).unflatten(1, rule.grid)


def _run(chunk: Callable[..., Tensor], a: Tensor, b: Tensor, c: Tensor | None, rows: Tensor) -> Tensor:
    """Compute a chunk; where there are several, keep its inputs for the backward pass instead of its windows."""
    if len(rows) < b.shape[1] and torch.is_grad_enabled():
        out = checkpoint(chunk, a, b, c, rows, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(out, Tensor)
        return out
    return chunk(a, b, c, rows)


def _chunks(rule: Rule, keys: Tensor) -> tuple[Tensor, ...]:
    window = 1
    for axis in rule.axes:
        window *= axis.window
    per_query = keys[:, 0].numel() * window * keys.element_size()
    rows = torch.arange(rule.N, device=keys.device)
    return rows.split(max(1, CHUNK_BYTES // per_query))


def _slots(rule: Rule, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the window of each token as a list: tokens (N, K), visible (N, K) or None for all, bias index (N, K)."""
    index, visible, offset = rule.axes[0].slots()
    for axis, size in zip(rule.axes[1:], rule.bias_shape[1:], strict=True):
        j, seen, o = axis.slots()

        def pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return left[:, None, :, None], right[None, :, None, :]

        def flat(x: Tensor) -> Tensor:
            return x.flatten(2, 3).flatten(0, 1)

        left, right = pair(index, j)
        index = flat(left * axis.length + right)
        left, right = pair(visible, seen)
        visible = flat(left & right)
        left, right = pair(offset, o)
        offset = flat(left * size + right)
    hides = any(axis.causal for axis in rule.axes)
    return index.to(device), visible.to(device) if hides else None, offset.to(device)
