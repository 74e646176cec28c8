"""Attention of one batch of tiles to the keys gathered for them, forward and backward: plain dense algebra.

Shapes: q (c, Tq, H, D) for c tiles of Tq queries; k and v (c, U, Hk, D); bias, added to the scaled scores and -inf
where a query does not see a key, (H, Tq, U) or (1, Tq, U). Every query sees at least one key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return out (c, Tq, H, D) in the dtype of q, and the log-sum-exp (c, Tq, H) in the wide one if asked for."""
    H, Hk = q.shape[2], k.shape[2]
    # on CPU a bias may be wider than half-precision q; elsewhere SDPA wants one dtype
    if not with_lse and (bias is None or bias.dtype == q.dtype or q.device.type == "cpu"):
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if bias is None else bias[None]
        out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, scale=scale, enable_gqa=Hk < H)
        return out.transpose(1, 2), None
    qs, ks, vs = _stack(q, Hk), _stack(k, Hk), _stack(v, Hk)
    scores = _scores(qs, ks, bias, scale, H)
    weights = torch.softmax(scores, -1)
    out = _unstack(torch.bmm(weights, vs), H, q.shape[0]).to(q.dtype)
    if not with_lse:
        return out, None
    # the largest weight is exp(top - lse), at least 1 / U: one cheap pass instead of a second exponential
    lse = scores.amax(-1) - weights.amax(-1).log()
    return out, _unstack(lse[..., None], H, q.shape[0])[..., 0]


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dout: Tensor, delta: Tensor, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Recompute the weights and push gradients through them.

    dout is like q and delta (c, Tq, H) as in problem.Implementation; queries for which both are 0 contribute nothing.
    Returns, in the wide dtype, dq (c, Tq, H, D), dk and dv (c, U, Hk, D), and if needed the gradient of the bias summed
    over the tiles, (H, Tq, U).
    """
    c, Tq, H, _ = q.shape
    Hk, U = k.shape[2], k.shape[1]
    qs, ks, vs = _stack(q, Hk), _stack(k, Hk), _stack(v, Hk)
    do = _stack(dout, Hk)
    weights = torch.softmax(_scores(qs, ks, bias, scale, H), -1)
    dv = torch.bmm(weights.transpose(1, 2), do)
    dscores = torch.bmm(do, vs.transpose(1, 2)).sub_(_stack(delta[..., None], Hk)).mul_(weights)
    dbias = dscores.view(c, H, Tq, U).sum(0) if need_bias else None
    dq = torch.bmm(dscores, ks).mul_(scale)
    dk = torch.bmm(dscores.transpose(1, 2), qs).mul_(scale)
    return _unstack(dq, H, c), _unstack(dk, Hk, c), _unstack(dv, Hk, c), dbias


def _stack(x: Tensor, Hk: int) -> Tensor:
    """(c, n, heads, D) -> (c * Hk, heads / Hk * n, D), wide and contiguous: the heads of a group above each other."""
    c, n, heads, D = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).transpose(1, 2).reshape(c * Hk, heads // Hk * n, D)


def _unstack(x: Tensor, heads: int, c: int) -> Tensor:
    """Undo _stack: return (c, n, heads, D)."""
    return x.view(c, heads, -1, x.shape[-1]).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, H: int) -> Tensor:
    scores = torch.bmm(q * scale, k.transpose(1, 2))  # (c * Hk, group * Tq, U)
    if bias is not None:
        scores.view(-1, H, *bias.shape[1:]).add_(bias)
    return scores
