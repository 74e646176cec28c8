"""Neighborhood attention on a GPU: launches the Triton kernels. Triton is imported only when this backend runs."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import tuned
from ..dispatch import Backend
from .problem import BackwardProblem, Gradients, Problem
from .rule import Axis, Rule

Box = tuple[int, int, int]

# (queries, keys, num_warps, num_stages) of a program by padded head width: for 2-byte elements and for 4-byte ones.
# Starting points from FlexAttention's tables for H100; not measured on a GPU. What was measured comes before them, see `tuned`.
FORWARD_BLOCKS = {
    2: {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    4: {16: (64, 32, 4, 3), 32: (64, 32, 4, 3), 64: (64, 32, 4, 3), 128: (32, 32, 4, 2), 256: (16, 32, 4, 2)},
}
BACKWARD_BLOCKS = {
    2: {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    4: {16: (32, 32, 4, 2), 32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 16, 8, 1), 256: (16, 16, 4, 1)},
}
# Speed per visited pair relative to plain dense attention; boxes that windows cross are mostly masked. Not measured.
RATIO = 0.4
# What a call costs before it computes anything, in multiply-adds of dense attention: tens of microseconds.
CALL_OVERHEAD = 3e9
# Scores that exist at a time in the gradient of the extra keys.
EXTRA_SCORES = 64 * 2**20


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return attention within the windows and its log-sum-exp (B, H, N): one kernel."""
    from . import triton_kernels

    B, H, N, D = problem.B, problem.H, problem.N, problem.D
    out = torch.empty(B, N, H, D, dtype=problem.q.dtype, device=problem.q.device)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=problem.q.device)
    call = _Call(problem, "forward")
    with torch.cuda.device_of(out):
        triton_kernels.forward_kernel[(call.boxes(call.queries), B * H, call.classes)](
            *call.tensors, *call.extra, out, lse, *call.tables, *call.strides, *call.extra_strides,
            *call.sizes, problem.T, *call.heads, HAS_EXTRA=problem.T > 0, **call.flags,
        )  # fmt: skip
    return out.view(problem.q.shape), lse


def backward(asked: BackwardProblem) -> Gradients:
    """Recompute the scores tile by tile: a kernel over queries for dq and the bias, one over keys for dk and dv.

    Numerics: sums in float32. The bias is added up atomically, so its last bits vary from run to run; the rest do not.
    """
    from . import triton_kernels

    problem, lse = asked.forward, asked.lse
    assert lse is not None, "why_not asks for it"
    B, H, Hk, N, D = problem.B, problem.H, problem.Hk, problem.N, problem.D
    lse, delta = lse.contiguous(), asked.delta.transpose(1, 2).contiguous()
    dout = asked.dout.reshape(B, N, H, D).contiguous()
    dq = torch.empty(B, N, H, D, dtype=torch.float32, device=dout.device)
    dk, dv = (torch.empty(B, N, Hk, D, dtype=torch.float32, device=dout.device) for _ in range(2))
    dbias = None
    if problem.rel_bias is not None and asked.need_bias:
        dbias = torch.zeros(problem.rel_bias.shape, dtype=torch.float32, device=dout.device)
    call = _Call(problem, "backward")
    with torch.cuda.device_of(dout):
        triton_kernels.dq_kernel[(call.boxes(call.queries), B * H, call.classes)](
            *call.tensors, *call.extra, dout, lse, delta, dq, dbias, *call.tables, *call.strides, *call.extra_strides,
            *call.sizes, problem.T, *call.heads, HAS_EXTRA=problem.T > 0, NEED_BIAS=dbias is not None, **call.flags,
        )  # fmt: skip
        triton_kernels.dkdv_kernel[(call.boxes(call.keys), B * Hk, call.classes)](
            *call.tensors, dout, lse, delta, dk, dv, *call.tables, *call.strides,
            *call.sizes, *call.heads, **call.flags,
        )  # fmt: skip
    dek, dev = _extra_gradients(problem, lse, dout, delta)
    return Gradients(dq.view(problem.q.shape), dk.view(problem.k.shape), dv.view(problem.v.shape), dbias, dek, dev)


def _extra_gradients(
    problem: Problem, lse: Tensor, dout: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Every query sees every extra key: plain dense products, a slice of the queries at a time, in float32."""
    if problem.extra_k is None or problem.extra_v is None:
        return None, None
    B, H, N, T, group = problem.B, problem.H, problem.N, problem.T, problem.H // problem.Hk
    q = problem.q.reshape(B, N, H, -1)
    k, v = (x.float().repeat_interleave(group, 2) for x in (problem.extra_k, problem.extra_v))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, EXTRA_SCORES // (B * H * T))
    for start in range(0, N, step):
        at = slice(start, start + step)
        qs, do = q[:, at].float(), dout[:, at].float()
        scores = torch.einsum("bqhd,bkhd->bhqk", qs, k) * problem.scale
        weights = scores.sub_(lse[:, :, at, None]).exp_()
        dv += torch.einsum("bhqk,bqhd->bkhd", weights, do)
        dscores = (torch.einsum("bqhd,bkhd->bhqk", do, v) - delta[:, :, at, None]) * weights
        dk += torch.einsum("bhqk,bqhd->bkhd", dscores, qs) * problem.scale
    return dk.unflatten(2, (-1, group)).sum(3), dv.unflatten(2, (-1, group)).sum(3)


class _Call:
    """What all kernels take, in their order: the grid as three axes, tables, strides, boxes."""

    def __init__(self, problem: Problem, direction: str) -> None:
        axes = three_axes(problem.rule)
        block_d = max(16, _power_of_2(problem.D))
        n_queries, n_keys, warps, stages = blocks(direction, problem.q)
        self.lengths = tuple(axis.class_length(0) for axis in axes)
        self.queries, self.keys = choose_boxes(axes, n_queries, n_keys)
        self.classes = math.prod(axis.dilation for axis in axes)
        self.tables = _tables(axes, problem.q.device)
        q, k, v = (_rows(x, problem.B, problem.N) for x in (problem.q, problem.k, problem.v))
        bias = None if problem.rel_bias is None else problem.rel_bias.contiguous()
        self.tensors = (q, k, v, bias)
        self.strides = [s for x in (q, k, v) for s in x.stride()[:3]]
        self.extra: tuple[Tensor | None, Tensor | None] = (None, None)
        self.extra_strides = [0] * 6
        if problem.extra_k is not None and problem.extra_v is not None:
            ek, ev = (_rows(x, problem.B, problem.T) for x in (problem.extra_k, problem.extra_v))
            self.extra, self.extra_strides = (ek, ev), [*ek.stride()[:3], *ev.stride()[:3]]
        each = [tuple(getattr(axis, name) for axis in axes) for name in ("length", "dilation", "window")]
        self.sizes = (*each[0], *each[1], *self.lengths, *each[2])
        self.heads = (problem.H, problem.Hk, problem.D, problem.scale)
        self.flags: dict[str, Any] = {
            "HAS_BIAS": bias is not None,
            # the interpreter multiplies bfloat16 wrongly
            "UPCAST": _interpreted() and q.dtype == torch.bfloat16,
            # TF32 holds float16 and bfloat16 values exactly, and float32 ones not
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            **{f"Q{i}": side for i, side in enumerate(self.queries)},
            **{f"K{i}": side for i, side in enumerate(self.keys)},
            "BLOCK_D": block_d,
            "num_warps": warps,
            "num_stages": stages,
        }

    def boxes(self, box: Box) -> int:
        """How many boxes cover the longest class."""
        return math.prod(-(-n // side) for n, side in zip(self.lengths, box, strict=True))


def blocks(direction: str, q: Tensor) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages of a program, "forward" or "backward"."""
    table = FORWARD_BLOCKS if direction == "forward" else BACKWARD_BLOCKS
    measured = tuned.find(f"neighborhood {direction}", q)
    return measured or table[2 if q.element_size() == 2 else 4][max(16, _power_of_2(q.shape[-1]))]


def three_axes(rule: Rule) -> tuple[Axis, ...]:
    """Return the axes of the grid behind as many of length 1 as are missing to three."""
    return (Axis(1, 1, 1, 1, False),) * (3 - len(rule.axes)) + rule.axes


@lru_cache(maxsize=256)
def choose_boxes(axes: tuple[Axis, ...], n_queries: int, n_keys: int) -> tuple[Box, Box]:
    """Return the query box and the key box, sides powers of two, that visit the fewest pairs.

    Equal ones go to the longest last side, whose tokens lie next to each other. Small grids get smaller boxes, but of
    the 16 rows at least that a matrix product needs.
    """
    lengths = [axis.class_length(0) for axis in axes]
    best: tuple[float, Box, Box] | None = None
    for queries in _boxes(lengths, n_queries):
        covered = [-(-n // side) for n, side in zip(lengths, queries, strict=True)]
        spans = [min(n, side + a.window - 1) for n, side, a in zip(lengths, queries, axes, strict=True)]
        for keys in _boxes(lengths, n_keys):
            visited = [-(-span // side) * side for span, side in zip(spans, keys, strict=True)]
            pairs = math.prod(covered) * math.prod(queries) * math.prod(visited)
            if best is None or pairs < best[0]:
                best = pairs, queries, keys
    assert best is not None
    return best[1], best[2]


def _boxes(lengths: list[int], size: int) -> list[Box]:
    """All boxes of `size` positions, longest last side first; sides no longer than they need be, the last one padded."""
    sides = [[2**e for e in range(_power_of_2(n).bit_length())] for n in lengths]
    size = max(16, min(size, math.prod(side[-1] for side in sides)))
    found = []
    for a, b in itertools.product(sides[0], sides[1]):
        last = size // (a * b)
        if last >= 1 and (last <= sides[2][-1] or (a == sides[0][-1] and b == sides[1][-1])):
            found.append((a, b, last))
    return found


@lru_cache(maxsize=64)
def _tables(axes: tuple[Axis, ...], device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(axis_table(axis).to(device) for axis in axes)


def axis_table(axis: Axis) -> Tensor:
    """Return (4, dilation, n) int32 by class and class position: windows of queries, and the queries that see a key.

    lo, hi, and of the queries the first and the one behind the last; 0 where a class has no such position.
    """
    lo, hi = axis.windows()
    table = torch.zeros(4, axis.dilation, axis.class_length(0), dtype=torch.int32)
    for r in range(axis.dilation):
        lo_r, hi_r = (x[r :: axis.dilation].contiguous() for x in (lo, hi))
        j = torch.arange(len(lo_r))
        first, behind = torch.searchsorted(hi_r, j, right=True), torch.searchsorted(lo_r, j, right=True)
        table[:, r, : len(j)] = torch.stack([lo_r, hi_r, first, behind]).to(torch.int32)
    return table


def _rows(x: Tensor, B: int, n: int) -> Tensor:
    """(B, *grid, heads, D) -> (B, n, heads, D), a view where the strides allow it, with D contiguous."""
    x = x.reshape(B, n, *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(problem: Problem) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if problem.q.device.type != "cuda" and not _interpreted():
        return f"Triton kernels run on a CUDA device, and the tensors are on {problem.q.device}"
    if problem.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, got {problem.q.dtype}"
    if max(FORWARD_BLOCKS[2]) < problem.D:
        return f"the kernels take heads of up to {max(FORWARD_BLOCKS[2])} channels, got {problem.D}"
    return None


def _backward_why_not(asked: BackwardProblem) -> str | None:
    if asked.lse is None:
        return "the forward pass did not keep its log-sum-exp"
    return _why_not(asked.forward)


def _cost(problem: Problem) -> float:
    if _interpreted():
        return math.inf
    axes = three_axes(problem.rule)
    queries, keys = choose_boxes(axes, *blocks("forward", problem.q)[:2])
    visited = float(problem.N * problem.T)
    spans = [(a.class_length(0), qs, min(a.class_length(0), qs + a.window - 1), ks)
             for a, qs, ks in zip(axes, queries, keys, strict=True)]  # fmt: skip
    visited += math.prod(a.dilation for a in axes) * math.prod(
        -(-n // qs) * qs * -(-span // ks) * ks for n, qs, span, ks in spans
    )
    dense = problem.N * (problem.N + problem.T)
    return visited / dense / RATIO + CALL_OVERHEAD / (2 * problem.B * problem.H * dense * problem.D)


FORWARD: Backend[Problem] = Backend(
    name="triton",
    summary="boxes of queries and keys, masked pair by pair where windows cross them",
    why_not=_why_not,
    cost=_cost,
    run=run,
)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="triton",
    summary="one kernel over the queries and one over the keys",
    why_not=_backward_why_not,
    cost=lambda asked: _cost(asked.forward),
    run=backward,
)
