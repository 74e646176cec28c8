"""What must hold for the arguments of a selection, and what to tell users when it does not.

Shapes, dtypes and devices only: looking at values would wait for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def count(who: str, name: str, value: object, unit: str, *, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{who}: {name} must be an int ({unit}), got {type(value).__name__} {value!r}; pass a number.")
    if value < least:
        raise ValueError(f"{who}: {name} must be >= {least} ({unit}), got {value}; pass a larger number.")
    return value


def tokens(who: str, name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who}: {name} must be a floating-point tensor, got {got}; cast or convert it first.")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"{who}: {name} must be (B, N, H, D) with no empty dimension, got shape {tuple(x.shape)}; heads are second "
            "to last."
        )
    return x


def queries_and_keys(who: str, q: object, k: object, *, k_name: str = "k") -> None:
    q, k = tokens(who, "q", q), tokens(who, k_name, k)
    same = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.dtype == k.dtype and q.device == k.device
    if not same:
        raise ValueError(
            f"{who}: q and {k_name} must agree in batch, head width, dtype and device, got q {q.dtype} "
            f"{tuple(q.shape)} on {q.device} and {k_name} {k.dtype} {tuple(k.shape)} on {k.device}; cast or move one."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{who}: the heads of q must be a multiple of those of {k_name}, got {q.shape[2]} and {k.shape[2]}; pass "
            "the keys with the key heads of the model."
        )


def scale_factor(who: str, scale: object, default: float) -> float:
    if scale is None:
        return default
    if isinstance(scale, Tensor) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"{who}: scale must be a finite Python float, got {scale!r}; leave it out for the default.")
    return float(scale)


def valid_counts(who: str, name: str, valid: object, B: int, n: int, device: torch.device) -> Tensor:
    if not isinstance(valid, Tensor) or valid.dtype not in (torch.int32, torch.int64):
        got = str(valid.dtype) if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"{who}: {name} must be an int32 or int64 tensor of token counts, got {got}; cast it.")
    if valid.ndim == 1:
        valid = valid[None]
    if valid.ndim != 2 or valid.shape[0] not in (1, B) or valid.shape[1] != n or valid.device != device:
        raise ValueError(
            f"{who}: {name} must be (blocks,) = ({n},) or (B|1, blocks) = ({B}|1, {n}) on {device}, the tokens in use "
            f"of each block, got {tuple(valid.shape)} on {valid.device}; count the blocks with ceil(N / block)."
        )
    return valid


def score_tensor(who: str, x: object, name: str = "scores") -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who}: {name} must be a floating-point tensor, got {got}; convert it first.")
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"{who}: {name} must have at least one axis and no empty one, got shape {tuple(x.shape)}.")
    return x


def bool_mask(who: str, name: str, mask: object, like: Tensor) -> Tensor:
    """A bool mask broadcastable to `like`, expanded to its shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a {mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{who}: {name} must be a bool tensor, got {got}; compare it, e.g. mask > 0.")
    fits = mask.ndim <= like.ndim and all(
        m in (1, s) for m, s in zip(reversed(mask.shape), reversed(like.shape), strict=False)
    )
    if not fits or mask.device != like.device:
        raise ValueError(
            f"{who}: {name} must broadcast to {tuple(like.shape)} on {like.device}, got {tuple(mask.shape)} on "
            f"{mask.device}; give it the axes of the scores, of size 1 where it is shared."
        )
    return mask.expand(like.shape)


def axis_set(who: str, axes: object, ndim: int) -> tuple[int, ...]:
    """The axes counted from 0, ascending."""
    fits = isinstance(axes, tuple) and axes and all(isinstance(a, int) and -ndim <= a < ndim for a in axes)
    found = tuple(sorted({a % ndim for a in axes})) if fits and isinstance(axes, tuple) else ()
    if not found or not isinstance(axes, tuple) or len(found) != len(axes):
        raise ValueError(
            f"{who}: axes must be a tuple of different axes in [{-ndim}, {ndim}), got {axes!r}; (-1,) budgets each row."
        )
    return found


def fraction(who: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{who}: {name} must be a float in [0, 1], got {type(value).__name__} {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{who}: {name} must be in [0, 1], a share of the total, got {value}; 1 takes everything.")
    return float(value)
