"""Attention within separate windows of an image: MaxViT's windows and grid, Swin's shifted windows, DaViT's and GC ViT's.

`neighborhood_attention` states unshifted windows and the grid as well (stride = window, dilation = length / window). What it
cannot state stands here: keys that a mask hides, which is how a map of any size is padded; the seam of Swin's shift; queries
that all windows share; and a kernel that reads the map where it lies, which is the speed of it. Reading order: `problem.py`
says what a window holds, `reference.py` what is computed; `windows.py` in plain PyTorch on any device, `native.py` and
`native.c` on CPUs; `op.py` chooses and registers the operator with PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import suggest
from ..dispatch import Explanation, judge
from . import op
from .problem import Partition, Problem

__all__ = ["explain_partitioned", "partitioned_attention"]


def partitioned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    partition: Literal["window", "grid"] = "window",
    shift: int | Sequence[int] = 0,
    rel_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend within separate windows of a map, each token to the tokens of its own window.

    Args:
        q: (B, H, W, heads, D) queries of a map of H rows and W columns, heads last; or (B, *window, heads, D), queries that
            every window of an image shares (GC ViT). Any strides.
        k, v: (B, H, W, heads, D) keys and values, as many heads as q.
        window: rows and columns of a window, one number or two; they must divide the map. Pad a map that they do not
            divide, and hide the padding with key_mask.
        partition: "window" cuts the map into boxes of neighbours, "grid" takes tokens H / window rows and W / window columns
            apart, so that each window spans the map (MaxViT).
        shift: rows and columns at which the first window begins, less than the window. What is left before it joins the
            far end of the map in one window, but nothing sees across that seam (Swin). Only for "window".
        rel_bias: (heads, 2 window - 1, 2 window - 1), added to the scaled scores at index (key - query) + window - 1, where
            neighbours in a window are 1 apart; in the dtype of q or in float32. Swin's table runs the other way.
        key_mask: (B, H, W) or (1, H, W) bool, True where a key may be seen; None hides none.
        scale: factor on q k^T; None is 1/sqrt(D).
        backend: "auto", "native", "sdpa" or "reference". auto takes the one expected to be fastest; a named backend runs or
            raises, and never falls back. "native" has no backward pass: gradients are then computed as under "auto".

    Returns: out (B, H, W, heads, D) in the dtype of q, contiguous. It carries gradients to q, k, v and rel_bias; once.
    Raises: ValueError or TypeError for arguments that do not fit each other, BackendUnavailable for a named backend that
        cannot run this problem.
    Numerics: softmax and sums in float32 (float64 for float64 inputs); autocast does not reach inside. A query that sees no
        key gives 0 and passes nothing back. What hidden keys and values hold does not matter, NaN included.
    Source: Swin (Liu et al., ICCV 2021, arXiv:2103.14030), MaxViT (Tu et al., ECCV 2022, arXiv:2204.01697), GC ViT
        (Hatamizadeh et al., ICML 2023, arXiv:2206.09959).
    Differs: the map is never rolled or padded here; -inf across a seam, where Swin adds -100.
    """
    return op.call(_problem(q, k, v, window, partition, shift, rel_bias, key_mask, scale), backend)


def explain_partitioned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    partition: Literal["window", "grid"] = "window",
    shift: int | Sequence[int] = 0,
    rel_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Explanation:
    """Tabulate which backends can run this partitioned_attention call, why not, and which one auto takes.

    Args: as for partitioned_attention.
    Returns: an Explanation; print it, or read `.rows` and `.chosen`. Nothing is computed.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    """
    problem = _problem(q, k, v, window, partition, shift, rel_bias, key_mask, scale)
    return Explanation(op.OPERATOR, str(problem), judge(op.FORWARD, problem))


# ---------------------------------------------------------------- what must hold


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    partition: Partition,
    shift: int | Sequence[int],
    rel_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
) -> Problem:
    who = op.OPERATOR
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_map(who, name, x, q)
    if partition not in get_args(Partition):
        raise ValueError(
            f"{who}: partition must be 'window' or 'grid', got {partition!r}.{suggest(str(partition), get_args(Partition))}"
        )
    windows, shifts = _pair(who, "window", window, 1), _pair(who, "shift", shift, 0)
    if k.shape != v.shape:
        raise ValueError(f"{who}: k and v must have the same shape, got k {tuple(k.shape)} and v {tuple(v.shape)}.")
    B, H, W, heads, D = k.shape
    if q.shape != k.shape and q.shape != (B, *windows, heads, D):
        raise ValueError(
            f"{who}: q must be (B, H, W, heads, D) like k, {tuple(k.shape)}, or one window that all share, "
            f"{(B, *windows, heads, D)}, got {tuple(q.shape)}."
        )
    for axis, length, w, s in zip(("rows", "columns"), (H, W), windows, shifts, strict=True):
        if length % w:
            raise ValueError(
                f"{who}: the window must divide the map, got a window of {w} {axis} on {length} of the map {H} x {W}; pad "
                f"the map to {math.ceil(length / w) * w} {axis} and hide the padding with key_mask."
            )
        if s >= w:
            raise ValueError(f"{who}: shift must be less than the window, got {s} of {w} {axis}; window // 2 is usual.")
    if partition == "grid" and any(shifts):
        raise ValueError(f"{who}: shift must be 0 with partition='grid', got {shifts}; a grid has no seam to move.")
    _check_bias(who, rel_bias, q, (heads, 2 * windows[0] - 1, 2 * windows[1] - 1))
    _check_mask(who, key_mask, k)
    if scale is not None and (isinstance(scale, Tensor) or not math.isfinite(scale)):
        raise ValueError(f"{who}: scale must be a finite Python float, got {scale!r}; leave it out for 1/sqrt(D).")
    return Problem(
        q, k, v, windows, partition, shifts, rel_bias, key_mask, D**-0.5 if scale is None else float(scale)
    )  # fmt: skip


def _check_map(who: str, name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who}: {name} must be a floating-point tensor, got {got}; cast or convert it first.")
    if x.ndim != 5 or 0 in x.shape:
        raise ValueError(
            f"{who}: {name} must be (B, H, W, heads, D) without an empty dimension, got shape {tuple(x.shape)}; heads are "
            "second to last, and a flat sequence is unflattened to its map first."
        )
    if x.dtype != q.dtype or x.device != q.device:
        raise ValueError(
            f"{who}: {name} must share dtype and device with q, got {x.dtype} on {x.device} and {q.dtype} on {q.device}; "
            f"cast or move {name}."
        )


def _pair(who: str, name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) for x in pair):
        raise TypeError(f"{who}: {name} must be an integer or two, for rows and columns, got {value!r}.")
    if min(pair) < least:
        raise ValueError(f"{who}: {name} must be at least {least} along rows and columns, got {value!r}.")
    return pair


def _check_bias(who: str, bias: Tensor | None, q: Tensor, wanted: tuple[int, int, int]) -> None:
    if bias is None:
        return
    if bias.shape != wanted:
        raise ValueError(
            f"{who}: rel_bias must be (heads, 2 * window - 1 for rows and columns) = {wanted}, got {tuple(bias.shape)}; a "
            "Swin table is reshaped to its axes, flipped on both, and brought to heads first."
        )
    if bias.dtype not in (q.dtype, torch.promote_types(q.dtype, torch.float32)) or bias.device != q.device:
        raise ValueError(
            f"{who}: rel_bias must be float32 or in the dtype of q, and on its device, got {bias.dtype} on {bias.device} "
            f"for q {q.dtype} on {q.device}; cast or move it."
        )


def _check_mask(who: str, mask: Tensor | None, k: Tensor) -> None:
    if mask is None:
        return
    if (
        mask.dtype != torch.bool
        or mask.ndim != 3
        or mask.shape[0] not in (1, k.shape[0])
        or mask.shape[1:] != k.shape[1:3]
    ):
        raise ValueError(
            f"{who}: key_mask must be bool of shape (B or 1, H, W) = ({k.shape[0]} or 1, {k.shape[1]}, {k.shape[2]}), got "
            f"{mask.dtype} {tuple(mask.shape)}; True marks keys that may be seen."
        )
    if mask.device != k.device:
        raise ValueError(f"{who}: key_mask must be on the device of k, got {mask.device} and {k.device}; move it.")
