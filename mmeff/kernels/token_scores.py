"""How much attention each key receives from chosen query rows, without keeping the attention matrix.

Token pruning ranks visual tokens by it: FastV sums one row, AdaptInfer the text rows, VisionZip the class token. The
softmax runs over every visible key; the caller then looks at the columns it cares about.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import without_autocast

# Bytes of scores that exist at a time. Rows are taken in chunks of this size, at least one row of every head.
CHUNK_BYTES = 64 * 2**20


def token_scores(
    q_rows: Tensor,
    k: Tensor,
    *,
    row_positions: Tensor | None = None,
    key_mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Sum the attention that each key receives from the given query rows.

    Args:
        q_rows: (B, R, H, D) chosen query rows, heads last, positions already rotated in.
        k: (B, Nk, Hk, D) all keys; H must be a multiple of Hk, and query head h reads head h // (H / Hk).
        row_positions: (R,) or (B, R) integer positions among the keys; the row at position p sees keys 0..p, so a
            negative position sees none. None lets every row see every key.
        key_mask: (B, Nk) bool, True for keys that may be seen (False for padding). None shows all.
        weights: row weights, (R,) or (B|1, H|1, R). None weighs every row 1, which sums; 1/R averages.
        scale: factor on the scores; None is 1/sqrt(D).

    Returns: (B, H, Nk) float32 (float64 for float64 inputs): sum over rows of weight * softmax(scale q k^T). With
        weights None it adds up to R over the keys, less one for each row that sees no key.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: scores, softmax and sums in float32 (float64 for float64 inputs); autocast does not reach inside. Rows
        that see no key contribute 0, never NaN; what a hidden key holds does not matter. Differentiable, though a
        gradient needs all chunks of scores kept.
    Source: FastV (Chen et al., ECCV 2024, arXiv:2403.06764), the received-attention score.
    Differs: any rows, weights and visibility; heads are kept apart for the caller to reduce.
    """
    B, R, H, D, Nk, Hk = _check(q_rows, k, row_positions, key_mask, weights, scale)
    scale = D**-0.5 if scale is None else float(scale)
    group = H // Hk
    dtype = torch.float64 if q_rows.dtype == torch.float64 else torch.float32
    with without_autocast(k.device):
        # heads of a group lie next to their key head, so that keys are never repeated
        q = (q_rows.to(dtype) * scale).unflatten(2, (Hk, group)).permute(0, 2, 3, 1, 4)  # (B, Hk, group, R, D)
        kt = k.to(dtype).permute(0, 2, 3, 1).contiguous()  # (B, Hk, D, Nk)
        w = None if weights is None else _weights_5d(weights.to(dtype), B, Hk, group, R)
        total = kt.new_zeros(B, Hk, group, Nk)
        step = max(1, CHUNK_BYTES // (B * H * Nk * dtype.itemsize))
        for start in range(0, R, step):
            rows = slice(start, min(start + step, R))
            scores = torch.matmul(q[:, :, :, rows].reshape(B, Hk, -1, D), kt).view(B, Hk, group, -1, Nk)
            visible = _visible(row_positions, key_mask, rows, Nk, k.device)
            if visible is not None:
                sees = visible.any(-1, keepdim=True)
                # rows that see nothing keep their scores, because a softmax of nothing is NaN, and are blanked below
                scores = scores.masked_fill(~visible & sees, -torch.inf)
            received = torch.softmax(scores, -1)
            if visible is not None:
                received = received.masked_fill(~sees, 0.0)
            if w is not None:
                received = received * w[..., rows, None]
            total = total + received.sum(3)
        return total.flatten(1, 2)


def _weights_5d(weights: Tensor, B: int, Hk: int, group: int, R: int) -> Tensor:
    """(R,) or (B|1, H|1, R) -> (B|1, Hk|1, group|1, R)."""
    if weights.ndim == 1:
        return weights.view(1, 1, 1, R)
    if weights.shape[1] == 1:
        return weights[:, :, None]
    return weights.unflatten(1, (Hk, group))


def _visible(
    row_positions: Tensor | None, key_mask: Tensor | None, rows: slice, Nk: int, device: torch.device
) -> Tensor | None:
    """Return which keys the rows see, broadcastable to (B, Hk, group, rows, Nk) bool, or None for all."""
    keys = None if key_mask is None else key_mask[:, None, None, None]
    if row_positions is None:
        return keys
    causal = torch.arange(Nk, device=device) <= row_positions[..., rows, None]  # (rows, Nk) or (B, rows, Nk)
    if causal.ndim == 3:
        causal = causal[:, None, None]
    return causal if keys is None else causal & keys


def _check(
    q_rows: Tensor,
    k: Tensor,
    row_positions: Tensor | None,
    key_mask: Tensor | None,
    weights: Tensor | None,
    scale: float | None,
) -> tuple[int, int, int, int, int, int]:
    who = "token_scores"
    for name, x in (("q_rows", q_rows), ("k", k)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{who}: {name} must be a floating-point tensor, got {got}; cast or convert it first.")
        if x.ndim != 4:
            raise ValueError(
                f"{who}: {name} must be (B, N, H, D), got shape {tuple(x.shape)}; heads are second to last."
            )
    B, R, H, D = q_rows.shape
    Bk, Nk, Hk, Dk = k.shape
    if Bk != B or Dk != D or q_rows.dtype != k.dtype or q_rows.device != k.device:
        raise ValueError(
            f"{who}: q_rows and k must agree in batch, head width, dtype and device, got q_rows {q_rows.dtype} "
            f"{tuple(q_rows.shape)} on {q_rows.device} and k {k.dtype} {tuple(k.shape)} on {k.device}; "
            "cast or move one of them."
        )
    if 0 in (B, H, D, Nk, Hk) or H % Hk:
        raise ValueError(
            f"{who}: the query heads must be a multiple of the key heads and no dimension but R empty, got q_rows "
            f"{tuple(q_rows.shape)} and k {tuple(k.shape)}; pass the keys with the heads of the model."
        )
    if row_positions is not None:
        integer = not (row_positions.is_floating_point() or row_positions.is_complex())
        if row_positions.shape not in ((R,), (B, R)) or not integer or row_positions.dtype == torch.bool:
            raise ValueError(
                f"{who}: row_positions must be integers of shape (R,) = ({R},) or (B, R) = ({B}, {R}), got "
                f"{row_positions.dtype} {tuple(row_positions.shape)}; give one key position per row of q_rows."
            )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (B, Nk)):
        raise ValueError(
            f"{who}: key_mask must be bool of shape (B, Nk) = ({B}, {Nk}), True for visible keys, got "
            f"{key_mask.dtype} {tuple(key_mask.shape)}; pass attention_mask.bool()."
        )
    if weights is not None:
        wanted = weights.shape == (R,) or (
            weights.ndim == 3 and weights.shape[0] in (1, B) and weights.shape[1] in (1, H) and weights.shape[2] == R
        )
        if not wanted or not weights.is_floating_point():
            raise ValueError(
                f"{who}: weights must be floating-point of shape (R,) = ({R},) or (B|1, H|1, R) = ({B}|1, {H}|1, {R}), "
                f"got {weights.dtype} {tuple(weights.shape)}; for weights per batch row pass w[:, None]."
            )
    for name, given in (("row_positions", row_positions), ("key_mask", key_mask), ("weights", weights)):
        if given is not None and given.device != k.device:
            raise ValueError(f"{who}: {name} must be on {k.device} like k, got {given.device}; move it there.")
    if scale is not None and (isinstance(scale, Tensor) or not math.isfinite(scale)):
        raise ValueError(f"{who}: scale must be a finite Python float, got {scale!r}; leave it out for 1/sqrt(D).")
    return B, R, H, D, Nk, Hk
