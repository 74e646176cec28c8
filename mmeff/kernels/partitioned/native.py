"""Attention within windows on CPUs in C: `native.c`, compiled at first use and called with plain pointers.

It reads a map where it lies, so that nothing is rolled, cut into windows or copied back; forward only.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend
from ..native_build import Build, build
from .problem import Partition, Problem, places

HERE = Path(__file__).parent
SOURCES = (HERE / "native.c", HERE.parent / "block_sparse" / "native_simd.h")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Windows of one head that a thread takes at a time: enough to spread the bias once for, few enough to share out.
RUN = 16
MOST_CALLS = 256  # geometries whose structures a Python thread keeps
# Throughput per pair relative to dense attention of many tokens (1 CPU core, 7 x 7 windows, D 32).
RATIO = 0.9
CALL_OVERHEAD = 2e6  # multiply-adds that pass before the first window


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 5)]


class _Call(ctypes.Structure):
    """`Call` of native.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "D")),
        ("window", ctypes.c_int64 * 2),
        ("windows", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("dtype", "shared_q", "run", "threads")),
        ("scale", ctypes.c_double),
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        ("bias", ctypes.c_void_p),
        ("place", ctypes.c_void_p * 2),
        ("side", ctypes.c_void_p * 2),
        ("key_mask", ctypes.c_void_p),
        ("key_mask_stride", ctypes.c_int64 * 3),
        ("workspace", ctypes.c_void_p),
    ]


def run(problem: Problem) -> Tensor:
    """Return the output in the shape of k, contiguous.

    Numerics: float32 for every dtype it takes; each row's weights are relative to its own maximum. Neither the number of
    threads nor the batch changes a result.
    """
    out = torch.empty(problem.k.shape, dtype=problem.q.dtype)
    q, k, v = problem.q, problem.k, problem.v
    # these two are kept alive until the call returns
    bias = None if problem.rel_bias is None else problem.rel_bias.to(torch.float32).contiguous()
    mask = None if problem.key_mask is None else problem.key_mask.expand(problem.B, *problem.grid)
    threads = torch.get_num_threads()
    key = (
        q.shape,
        k.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        problem.window,
        problem.partition,
        problem.shift,
        q.dtype,
        threads,
    )
    library = _build().library
    assert library is not None, "why_not was not asked"
    call = _kept.calls.get(key)
    if call is None:
        if len(_kept.calls) >= MOST_CALLS:
            _kept.calls.clear()
        call = _kept.calls[key] = _call(problem, out, threads)
        size = library.mmeff_partitioned_bytes(ctypes.byref(call))
        if _kept.memory.numel() < size:
            _kept.memory = torch.empty(size, dtype=torch.uint8)
    call.q.data, call.k.data, call.v.data, call.out.data = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    call.scale, call.bias = problem.scale, None if bias is None else bias.data_ptr()
    call.key_mask = None if mask is None else mask.data_ptr()
    if mask is not None:
        call.key_mask_stride = (ctypes.c_int64 * 3)(*mask.stride())
    call.workspace = _kept.memory.data_ptr()
    library.mmeff_partitioned(ctypes.byref(call))
    return out


def _call(problem: Problem, out: Tensor, threads: int) -> _Call:
    """What does not change as long as shapes, strides and threads do not."""
    tables = [
        _tables(length, window, problem.partition, shift)
        for length, window, shift in zip(problem.grid, problem.window, problem.shift, strict=True)
    ]
    windows = [length // window for length, window in zip(problem.grid, problem.window, strict=True)]
    share = -(-problem.B * windows[0] * windows[1] * problem.H // (4 * threads))  # four items for every thread
    call = _Call(
        B=problem.B, H=problem.H, D=problem.D, window=(ctypes.c_int64 * 2)(*problem.window),
        windows=(ctypes.c_int64 * 2)(*windows), dtype=DTYPES[problem.q.dtype], shared_q=problem.shared_q,
        run=max(1, min(RUN, share)), threads=threads,
        q=_tensor(problem.q), k=_tensor(problem.k), v=_tensor(problem.v), out=_tensor(out),
        place=(ctypes.c_void_p * 2)(*(position.data_ptr() for position, _ in tables)),
        side=(ctypes.c_void_p * 2)(*(side.data_ptr() for _, side in tables)),
    )  # fmt: skip
    call.tables = tables  # which it points into
    return call


def unavailable() -> str | None:
    """Return why there is no native kernel on this machine, or None. Compiles it if nobody did yet."""
    return _build().reason


@lru_cache(maxsize=256)
def _tables(length: int, window: int, partition: Partition, shift: int) -> tuple[Tensor, Tensor]:
    found = places(length, window, partition, shift)
    return found.position.contiguous(), found.side.to(torch.uint8).contiguous()


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), (ctypes.c_int64 * 5)(*x.stride()))


class _Kept(threading.local):
    """What a Python thread keeps from call to call: filled-in structures, which cost more than small windows do, and a few
    hundred kilobytes of work space for each thread of the kernel."""

    def __init__(self) -> None:
        self.calls: dict[Any, _Call] = {}
        self.memory = torch.empty(0, dtype=torch.uint8)


_kept = _Kept()


def _build() -> Build:
    found = build(*SOURCES)
    if found.library is not None:
        _check(found.library)
    return found


@lru_cache(maxsize=1)
def _check(library: ctypes.CDLL) -> None:
    assert ctypes.sizeof(_Call) == library.mmeff_call_bytes(), "_Call is not the Call of native.c"
    library.mmeff_partitioned_bytes.restype = ctypes.c_int64
    library.mmeff_partitioned.restype = None


def _why_not(problem: Problem) -> str | None:
    q = problem.q
    if q.device.type != "cpu":
        return f"it runs on CPUs only, and q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"it computes in float32, for float32, bfloat16 and float16 inputs, and q is {q.dtype}"
    return _build().reason


def _cost(problem: Problem) -> float:
    dense = 2 * problem.B * problem.H * problem.D * (problem.grid[0] * problem.grid[1]) ** 2
    return problem.density / RATIO + CALL_OVERHEAD / dense


FORWARD: Backend[Problem] = Backend(
    name="native", summary="windows where they lie, in C", why_not=_why_not, cost=_cost, run=run
)
