"""What must hold of the arguments of the neighborhood operators, each rule with its own message."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .rule import Axis, Rule

PerAxis = int | bool | Sequence[int] | Sequence[bool]  # one value, or one for each axis of the grid


def check_tokens(who: str, name: str, x: Tensor) -> None:
    """Check that x is a grid of tokens with heads. Raises TypeError or ValueError."""
    check_float(who, name, x)
    if x.ndim not in (4, 5, 6) or 0 in x.shape:
        raise ValueError(
            f"{who}: {name} must be (B, *grid, H, D) with one to three grid axes and no empty dimension, got shape "
            f"{tuple(x.shape)}; heads are second to last, and a flat sequence is unflattened to its grid first."
        )


def check_qkv(who: str, q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Check the tensors against each other. Raises TypeError or ValueError."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None:
            check_tokens(who, name, x)
            check_like(who, name, x, "q", q)
    if v is not None and v.shape != k.shape:
        raise ValueError(
            f"{who}: k and v must have the same shape (B, *grid, Hk, D), got k {tuple(k.shape)} and v {tuple(v.shape)}; "
            "value heads of another width are not supported."
        )
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{who}: q and k must agree in batch, grid and head width, got q {tuple(q.shape)} and k {tuple(k.shape)}; "
            "keys outside the grid are passed as extra_k and extra_v, or check that the tensors are heads-last."
        )
    check_heads(who, q.shape[-2], k.shape[-2])


def check_float(who: str, name: str, x: Tensor) -> None:
    """Check that x is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who}: {name} must be a floating-point tensor, got {got}; cast or convert it first.")


def check_like(who: str, name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Check that x has dtype and device of y."""
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"{who}: {name} must share dtype and device with {other}, got {name} {x.dtype} on {x.device} and {other} "
            f"{y.dtype} on {y.device}; cast or move {name}."
        )


def check_heads(who: str, H: int, Hk: int) -> None:
    """Check that every key head serves equally many query heads."""
    if H % Hk:
        raise ValueError(
            f"{who}: the query heads must be a multiple of the key/value heads, got H={H} and Hk={Hk}; pass the k "
            "and v heads of the model unrepeated, or repeated to H."
        )


def check_rule(
    who: str, grid: Sequence[int], window: PerAxis, stride: PerAxis, dilation: PerAxis, causal: PerAxis
) -> Rule:
    """Check the parameters of each axis and return the rule. Raises TypeError or ValueError."""
    n = len(grid)
    windows, strides, dilations = (
        _integers(who, name, x, n) for name, x in (("window", window), ("stride", stride), ("dilation", dilation))
    )
    flags = (causal,) * n if isinstance(causal, bool) else causal
    if not isinstance(flags, Sequence) or len(flags) != n or not all(isinstance(x, bool) for x in flags):
        raise TypeError(
            f"{who}: causal must be True, False or {n} of them, one for each axis of the grid {tuple(grid)}, got "
            f"{causal!r}."
        )
    for axis, (L, w, s, d) in enumerate(zip(grid, windows, strides, dilations, strict=True)):
        if w < 1:
            raise ValueError(f"{who}: window must be at least 1 on every axis, got {w} on axis {axis}; see {windows}.")
        if d < 1:
            raise ValueError(
                f"{who}: dilation must be at least 1 on every axis, got {d} on axis {axis}; 1 is a window without gaps."
            )
        if w * d > L:
            raise ValueError(
                f"{who}: window * dilation must fit into the grid, got {w} * {d} = {w * d} on axis {axis} with {L} "
                f"tokens of the grid {tuple(grid)}; pass a window of at most {L // d} there, or pad the input."
            )
        if not 1 <= s <= w:
            raise ValueError(
                f"{who}: stride must be between 1 and the window, got stride {s} and window {w} on axis {axis}; 1 moves "
                f"the window with every query, {w} makes separate windows."
            )
    return Rule(tuple(Axis(*each) for each in zip(grid, windows, strides, dilations, map(bool, flags), strict=True)))


def _integers(who: str, name: str, value: PerAxis, n: int) -> tuple[int, ...]:
    given = (value,) * n if isinstance(value, int) else value
    whole = isinstance(given, Sequence) and all(isinstance(x, int) and not isinstance(x, bool) for x in given)
    if not whole:
        raise TypeError(f"{who}: {name} must be an integer or a sequence of {n} integers, got {value!r}.")
    if len(given) != n:
        raise ValueError(
            f"{who}: {name} must be one integer or {n}, one for each axis of the grid, got {len(given)}: {value!r}."
        )
    return tuple(given)


def check_rel_bias(who: str, rel_bias: Tensor | None, q: Tensor, rule: Rule) -> None:
    """Check shape, dtype and device of the relative bias, if there is one."""
    if rel_bias is None:
        return
    check_float(who, "rel_bias", rel_bias)
    wanted = (q.shape[-2], *rule.bias_shape)
    if rel_bias.shape != wanted:
        raise ValueError(
            f"{who}: rel_bias must be (H, 2 * window - 1 for each axis) = {wanted}, got {tuple(rel_bias.shape)}; a "
            "Swin table is reshaped to its axes, flipped on each of them, and brought to heads first."
        )
    if rel_bias.dtype not in (q.dtype, torch.promote_types(q.dtype, torch.float32)) or rel_bias.device != q.device:
        raise ValueError(
            f"{who}: rel_bias must be float32 or in the dtype of q, and on its device, got {rel_bias.dtype} on "
            f"{rel_bias.device} for q {q.dtype} on {q.device}; cast or move it."
        )


def check_extra(who: str, extra_k: Tensor | None, extra_v: Tensor | None, k: Tensor) -> None:
    """Check the extra keys and values, if there are any."""
    if extra_k is None and extra_v is None:
        return
    if extra_k is None or extra_v is None:
        missing = "extra_k" if extra_k is None else "extra_v"
        raise ValueError(f"{who}: extra_k and extra_v come together, got no {missing}; pass both or neither.")
    for name, x in (("extra_k", extra_k), ("extra_v", extra_v)):
        check_float(who, name, x)
        check_like(who, name, x, "k", k)
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (k.shape[0], *k.shape[-2:]) or 0 in x.shape:
            raise ValueError(
                f"{who}: {name} must be (B, T, Hk, D) = ({k.shape[0]}, T, {k.shape[-2]}, {k.shape[-1]}) with T of at "
                f"least 1, got {tuple(x.shape)}; leave out extra_k and extra_v where there are no extra keys."
            )
    if extra_k.shape != extra_v.shape:
        raise ValueError(
            f"{who}: extra_k and extra_v must have the same shape, got {tuple(extra_k.shape)} and "
            f"{tuple(extra_v.shape)}; every extra key needs its value."
        )


def check_scale(who: str, scale: float | None, q: Tensor) -> float:
    """Return the factor on the scores."""
    D = q.shape[-1]
    if scale is None:
        return float(D**-0.5)
    if isinstance(scale, Tensor) or not math.isfinite(scale):
        raise ValueError(
            f"{who}: scale must be a finite Python float, got {scale!r}; leave it out for 1/sqrt(D) = {D**-0.5:.4g}, "
            "or multiply q by a learned scale first."
        )
    return float(scale)
