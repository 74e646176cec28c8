"""How much attention each key receives from chosen query rows, without keeping the attention matrix.

Token pruning ranks visual tokens by it: FastV sums one row, AdaptInfer the text rows, VisionZip the class token. The
softmax runs over every visible key; the caller then looks at the columns it cares about.

Reading order: `reference.py` says what is computed, forward and backward; `op.py` chooses
a backend and registers the operator with PyTorch; `chunked.py` computes a cache-sized chunk at a time, in plain PyTorch
on any device; `triton_impl.py` launches the kernels of `triton_kernels.py` on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from .op import call
from .problem import check

__all__ = ["token_scores"]


def token_scores(
    q_rows: Tensor,
    k: Tensor,
    *,
    row_positions: Tensor | None = None,
    key_mask: Tensor | None = None,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum the attention that each key receives from the given query rows.

    Args:
        q_rows: (B, R, H, D) chosen query rows, heads last, positions already rotated in; one row or all of them.
        k: (B, Nk, Hk, D) all keys; H must be a multiple of Hk, and query head h reads head h // (H / Hk).
        row_positions: (R,) or (B, R) integer positions among the keys; the row at position p sees keys 0..p, so a
            negative position sees none. None lets every row see every key.
        key_mask: (B, Nk) bool, True for keys that may be seen (False for padding). None shows all.
        weights: row weights, (R,) or (B|1, H|1, R). None weighs every row 1, which sums; 1/R averages.
        lse: (B, H, R) natural log of each row's softmax normaliser, from an attention that has it: saves a pass over
            the keys. The rows are then exp(scale q k^T - lse); a row with -inf contributes 0. None normalises over
            the visible keys.
        scale: factor on the scores; None is 1/sqrt(D).
        backend: "auto", "triton", "chunked" or "reference". All of them compute the same thing. A named backend runs
            or raises; it never falls back.

    Returns: (B, H, Nk) float32 (float64 for float64 inputs): sum over rows of weight * softmax(scale q k^T). With
        weights and lse None it adds up to R over the keys, less one for each row that sees no key.
    Raises: ValueError or TypeError for arguments that do not fit each other, BackendUnavailable for a named backend
        that cannot run this problem.
    Numerics: scores, softmax and sums in float32 (float64 for float64 inputs); autocast does not reach inside. Rows
        that see no key contribute 0, never NaN; what a key that no row sees holds does not matter. Differentiable once
        in q_rows, k, weights and lse; the backward pass recomputes the scores. Extra memory is O(H Nk), forward and
        backward, except in "reference".
    Source: FastV (Chen et al., ECCV 2024, arXiv:2403.06764), the received-attention score.
    Differs: any rows, weights and visibility; heads are kept apart for the caller to reduce.
    """
    check(q_rows, k, row_positions, key_mask, weights, lse, scale)
    scale = q_rows.shape[-1] ** -0.5 if scale is None else float(scale)
    return call(q_rows, k, row_positions, key_mask, weights, lse, scale, backend)
