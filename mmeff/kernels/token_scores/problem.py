"""What the token_scores backends are asked: tensors that fit each other, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of token_scores, checked: q (B, R, H, D), the chosen rows, and k (B, Nk, Hk, D)."""

    q: Tensor
    k: Tensor
    positions: Tensor | None  # (B|1, R) integer: the row at p sees keys 0..p
    key_mask: Tensor | None  # (B, Nk) bool
    weights: Tensor | None  # (B|1, H|1, R)
    lse: Tensor | None  # (B, H, R): the caller's; None lets the backend normalise
    scale: float
    keep_lse: bool = True  # a backward pass will want it

    @property
    def B(self) -> int:
        """Batch."""
        return self.q.shape[0]

    @property
    def R(self) -> int:
        """Chosen query rows; may be 0."""
        return self.q.shape[1]

    @property
    def H(self) -> int:
        """Query heads."""
        return self.q.shape[2]

    @property
    def D(self) -> int:
        """Channels of a head."""
        return self.q.shape[3]

    @property
    def Nk(self) -> int:
        """Keys."""
        return self.k.shape[1]

    @property
    def Hk(self) -> int:
        """Key heads; H is a multiple of it."""
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.H // self.Hk

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of scores and sums: float32, or float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class BackwardProblem:
    """The gradients of one call: `grad` is that of the scores, (B, H, Nk) in their dtype.

    lse (B, H, R) is the one that normalised, the caller's or the operator's own. `needs` says which of dq, dk and
    per_row are wanted.
    """

    forward: Problem
    lse: Tensor
    grad: Tensor
    needs: tuple[bool, bool, bool]

    @property
    def centred(self) -> bool:
        """Whether the rows are a softmax over the keys, whose gradient sums to zero; under a given LSE they are not."""
        return self.forward.lse is None


class Gradients(NamedTuple):
    """What a backward pass returns, in the dtype of the scores; None for what was not asked for.

    `per_row` is the gradient of a row's weight before it is reduced to the shape of the weights: sum_j p_rj g_j. The
    gradient of a given LSE is -weight times it.
    """

    dq: Tensor | None  # (B, R, H, D)
    dk: Tensor | None  # (B, Nk, Hk, D)
    per_row: Tensor | None  # (B, H, R)


def make_problem(
    q_rows: Tensor,
    k: Tensor,
    row_positions: Tensor | None,
    key_mask: Tensor | None,
    weights: Tensor | None,
    lse: Tensor | None,
    scale: float,
    *,
    keep_lse: bool = True,
) -> Problem:
    """Bring checked arguments into the shapes that the backends read."""
    if row_positions is not None and row_positions.ndim == 1:
        row_positions = row_positions[None]
    if weights is not None and weights.ndim == 1:
        weights = weights[None, None]
    return Problem(q_rows, k, row_positions, key_mask, weights, lse, scale, keep_lse)


def check(
    q_rows: Tensor,
    k: Tensor,
    row_positions: Tensor | None,
    key_mask: Tensor | None,
    weights: Tensor | None,
    lse: Tensor | None,
    scale: Any,
) -> None:
    """Check that the arguments fit each other; every backend relies on it. Raises TypeError or ValueError."""
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
    optional = (("row_positions", row_positions), ("key_mask", key_mask), ("weights", weights), ("lse", lse))
    for name, given in optional:
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{who}: {name} must be a tensor or None, got {type(given).__name__}; convert it first.")
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
    if lse is not None and (lse.shape != (B, H, R) or lse.dtype not in (torch.float32, torch.float64)):
        raise ValueError(
            f"{who}: lse must be float32 (or float64) of shape (B, H, R) = ({B}, {H}, {R}), got {lse.dtype} "
            f"{tuple(lse.shape)}; pass the natural-log LSE of these rows, as attention returns it with return_lse=True."
        )
    for name, given in optional:
        if given is not None and given.device != k.device:
            raise ValueError(f"{who}: {name} must be on {k.device} like k, got {given.device}; move it there.")
    if scale is not None and (isinstance(scale, Tensor) or not math.isfinite(scale)):
        raise ValueError(f"{who}: scale must be a finite Python float, got {scale!r}; leave it out for 1/sqrt(D).")
