"""Block-sparse attention on CPUs in C: `native.c`, compiled at first use and called with plain pointers.

This file decides what the C code does: which (batch, key head) pairs are packed at a time, in which order their work items
start, and by which passes gradients are computed. Neither that nor the number of threads changes a result: every sum is
made by one thread, in the order of the blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration import cost
from ..dispatch import Backend
from ..layout import BlockLayout
from ..native_build import Build, build
from .problem import BackwardProblem, Problem

HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Bytes of packed keys and values at a time and per thread: a few heads, so that threads do not wait for each other often.
PACKED_BYTES_PER_THREAD = 16 * 2**20
# Work space up to this size is kept from call to call, per thread.
KEPT_BYTES_PER_THREAD = 32 * 2**20
HUGE_PAGE = 2 * 2**20
OVERHEAD = 1e-4  # seconds of a call that computes nothing
# Measured at N 1024, D 64 with AVX-512: keys are packed in vectors of their block, so that blocks of fewer keys waste
# lanes, and a mask costs about this part of a block.
FEWEST_KEYS = 12
MASK_COST = 0.25


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Call(ctypes.Structure):
    """`Call` of native.c, field by field."""

    _fields_ = [
        *_fields(ctypes.c_int64, "B H Hk D q_len kv_len q_block kv_block dtype threads"),
        ("scale", ctypes.c_double),
        *_fields(_Tensor, "q k v out dout dq dk dv"),
        *_fields(ctypes.c_void_p, "lse dlse"),
        *_fields(ctypes.c_void_p, "row_start row_of partial_start n_partial n_full col_idx q_valid kv_valid"),
        *_fields(ctypes.c_int64, "row_stride_B row_stride_H q_valid_stride kv_valid_stride"),
        *_fields(ctypes.c_void_p, "bitmap q_bounds k_bounds"),
        ("axes", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "col_start col_row col_slab"),
        *_fields(ctypes.c_int64, "col_stride_B col_stride_H"),
        *_fields(ctypes.c_int64, "first_pair pairs n_items n_col_items fused"),
        *_fields(ctypes.c_void_p, "items col_items workspace"),
    ]


def _lists(layout: BlockLayout) -> dict[str, Tensor | None]:
    """The tensors of a layout by the names of `_Call`, contiguous."""
    names = ("row_start", "row_of", "partial_start", "n_partial", "n_full", "col_idx", "q_valid", "kv_valid", "bitmap")
    tensors = {name: getattr(layout, name) for name in names}
    if layout.bounds is not None:
        tensors |= {"q_bounds": layout.bounds.q_bounds, "k_bounds": layout.bounds.k_bounds}
    return {name: None if x is None else x.contiguous() for name, x in tensors.items()}


def attend(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return attention over the visited blocks, and its log-sum-exp if it is wanted.

    Numerics: float32, with weights relative to a running maximum; bfloat16 products on processors that have them.
    """
    q, layout = problem.q, problem.layout
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(problem.B, problem.H, layout.q_len, dtype=torch.float32) if problem.want_lse else None
    call = _call(problem, out=out, lse=lse)
    packed = 8 * layout.nK * layout.kv_block * problem.D
    size = max(1, call.threads * PACKED_BYTES_PER_THREAD // packed)
    for wave in _waves(layout, problem.B, problem.H, problem.Hk, size):
        call.first_pair, call.pairs = wave.first, wave.pairs
        call.items, call.n_items = wave.rows.data_ptr(), wave.rows.numel()
        _run("mmeff_forward", call)
    return out, lse


def backward(problem: BackwardProblem) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return those gradients of q, k and v that are needed.

    Numerics: float32 throughout; dk and dv of a group sum over its heads before they are rounded. The result depends
    neither on the number of threads nor on which passes computed it.
    """
    forward, layout = problem.forward, problem.layout
    B, H, Hk = forward.B, forward.H, forward.Hk
    inputs = (forward.q, forward.k, forward.v)
    grads = tuple(
        torch.empty(x.shape, dtype=x.dtype) if need else None for x, need in zip(inputs, problem.needs, strict=True)
    )
    lse = problem.lse.to(torch.float32).contiguous()
    dlse = None if problem.dlse is None else problem.dlse.to(torch.float32).contiguous()
    columns: Columns = layout.derived("native columns", _columns)
    call = _call(forward, out=problem.out, lse=lse)
    call.dout, call.dlse = _tensor(problem.dout), _address(dlse)
    call.dq, call.dk, call.dv = map(_tensor, grads)
    call.col_start, call.col_row, call.col_slab = (x.data_ptr() for x in (columns.start, columns.row, columns.slab))
    lB, lH, _ = layout.row_of.shape
    call.col_stride_B, call.col_stride_H = _shared_stride(lB, lH * layout.nK), _shared_stride(lH, layout.nK)

    packed = 4 * forward.D * (3 * layout.nK * layout.kv_block + 3 * H // Hk * layout.q_len)
    size = max(call.threads, call.threads * PACKED_BYTES_PER_THREAD // packed // call.threads * call.threads)
    for wave in _waves(layout, B, H, Hk, size):
        call.first_pair, call.pairs = wave.first, wave.pairs
        call.items, call.n_items = wave.rows.data_ptr(), wave.rows.numel()
        call.col_items, call.n_col_items = wave.columns.data_ptr(), wave.columns.numel()
        call.fused = is_fused(wave.work, call.threads)
        _run("mmeff_backward", call)
    return grads  # type: ignore[return-value]


def is_fused(work: Sequence[int], threads: int) -> bool:
    """Whether to give each thread whole heads, which saves two of seven products but may leave threads without work.

    Args:
        work: visited blocks of each (batch, key head) pair. threads: that share them.
    """
    loads = [0] * threads
    for n in work:  # what a thread that comes free takes next
        loads[loads.index(min(loads))] += n
    return 5 * max(loads) * threads <= 7 * sum(work)


class Columns(NamedTuple):
    """The visited blocks by key block: those of key block n of a (batch, head) of the layout lie from start[n] on."""

    start: Tensor  # (layout batch * layout heads * nK + 1,) int64
    row: Tensor  # (E,) int32 query block, ascending
    slab: Tensor  # (E,) int64 row of the bitmap; -1 for a full block


def _columns(layout: BlockLayout) -> Columns:
    B, H, nQ = layout.row_of.shape
    entries = layout.entries(layout.row_of.reshape(-1))
    column = entries.row // nQ * layout.nK + entries.col
    order = torch.argsort(column, stable=True)  # the entries run over ascending query blocks
    count = torch.bincount(column, minlength=B * H * layout.nK)
    return Columns(
        torch.nn.functional.pad(count.cumsum(0), (1, 0)),
        (entries.row % nQ)[order].to(torch.int32),
        entries.slab.masked_fill(entries.full, -1)[order],
    )


class Wave(NamedTuple):
    """Neighbouring (batch, key head) pairs that are packed at the same time."""

    first: int
    pairs: int
    rows: Tensor  # ((pair, head of the group, query block), flattened), in the order in which to start them
    columns: Tensor  # ((pair, key block), flattened), likewise
    work: tuple[int, ...]  # visited blocks of each pair


def _waves(layout: BlockLayout, B: int, H: int, Hk: int, size: int) -> list[Wave]:
    """Cut the (batch, key head) pairs into waves of at most `size`.

    Long rows start first, so that none is left over in the end; rows of about the same length stay in the order of heads,
    which share their keys.
    """
    size = min(size, B * Hk)

    def start_order(visited: Tensor) -> Tensor:
        length = (2 * visited.clamp(min=1).log2()).ceil()
        return torch.argsort(length.reshape(-1), descending=True, stable=True)

    def plan(layout: BlockLayout) -> list[Wave]:
        lB, lH, nQ = layout.row_of.shape
        by_row = layout.n_visited[layout.row_of].expand(B, H, nQ).reshape(B * Hk, -1)
        by_column = layout.derived("native columns", _columns).start.diff().view(lB, lH, -1).expand(B, H, -1)
        by_column = by_column.unflatten(1, (Hk, -1)).sum(2).view(B * Hk, -1)
        return [
            Wave(first, r.shape[0], start_order(r), start_order(c), tuple(r.sum(1).tolist()))
            for first, r, c in zip(range(0, B * Hk, size), by_row.split(size), by_column.split(size), strict=True)
        ]

    return layout.derived(("native waves", B, H, Hk, size), plan)


def _call(problem: Problem, out: Tensor, lse: Tensor | None) -> _Call:
    layout = problem.layout
    lists = layout.derived("native lists", _lists)
    call = _Call(
        B=problem.B, H=problem.H, Hk=problem.Hk, D=problem.D, q_len=layout.q_len, kv_len=layout.kv_len,
        q_block=layout.q_block, kv_block=layout.kv_block, dtype=DTYPES[problem.q.dtype],
        threads=torch.get_num_threads(), scale=problem.scale,
        q=_tensor(problem.q), k=_tensor(problem.k), v=_tensor(problem.v), out=_tensor(out), lse=_address(lse),
        row_stride_B=_shared_stride(layout.row_of.shape[0], layout.row_of.shape[1] * layout.nQ),
        row_stride_H=_shared_stride(layout.row_of.shape[1], layout.nQ),
        q_valid_stride=_shared_stride(layout.q_valid.shape[0], layout.nQ),
        kv_valid_stride=_shared_stride(layout.kv_valid.shape[0], layout.nK),
        axes=0 if layout.bounds is None else layout.bounds.q_bounds.shape[0],
    )  # fmt: skip
    for name, x in lists.items():
        setattr(call, name, _address(x))
    return call


def _tensor(x: Tensor | None) -> _Tensor:
    return _Tensor() if x is None else _Tensor(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _shared_stride(size: int, stride: int) -> int:
    """The stride of an axis of a contiguous tensor, or 0 where its one element serves all."""
    return 0 if size == 1 else stride


class _Workspace(threading.local):
    """Memory that a Python thread keeps from call to call: fresh pages cost as much as packing into them."""

    memory = torch.empty(0, dtype=torch.uint8)


_workspace = _Workspace()


def _run(name: str, call: _Call) -> None:
    """Call a function of native.c with the memory that it says it needs."""
    library = _build().library
    assert library is not None, "why_not was not asked"
    assert ctypes.sizeof(_Call) == library.mmeff_call_bytes(), "_Call is not the Call of native.c"
    bytes_needed, function = getattr(library, f"{name}_bytes"), getattr(library, name)
    bytes_needed.restype, function.restype = ctypes.c_int64, None
    size = bytes_needed(ctypes.byref(call))
    memory = _workspace.memory
    if memory.numel() < size:
        memory = _huge(size)
        if size <= KEPT_BYTES_PER_THREAD * call.threads:
            _workspace.memory = memory
    call.workspace = memory.data_ptr()
    function(ctypes.byref(call))


def _huge(size: int) -> Tensor:
    """Return uninitialised memory, in large pages if the system gives them.

    Packed blocks are visited in any order, and pages of 4 KiB then cost a miss of the address cache per visit.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages: small ones then
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def unavailable() -> str | None:
    """Return why there are no native kernels on this machine, or None. Compiles them if nobody did yet."""
    return _build().reason


def _build() -> Build:
    return build(HERE / "native.c", HERE / "native_simd.h")


def _why_not(problem: Problem) -> str | None:
    q = problem.q
    if q.device.type != "cpu":
        return f"it runs on CPUs only, and q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"it computes in float32, for float32, bfloat16 and float16 inputs, and q is {q.dtype}"
    return _build().reason


def _cost(problem: Problem, direction: str = "forward", multiply_adds: int | None = None) -> float:
    macs = problem.multiply_adds if multiply_adds is None else multiply_adds
    layout, q = problem.layout, problem.q
    share = layout.block_density * max(1.0, FEWEST_KEYS / layout.kv_block) * max(1.0, 2 / layout.q_block)
    share *= 1 + MASK_COST * layout.partial_share
    return cost("native", share, OVERHEAD, device=q.device, dtype=q.dtype, direction=direction, multiply_adds=macs)


SUMMARY = "computes the visited blocks only, in C"
FORWARD: Backend[Problem] = Backend(name="native", summary=SUMMARY, why_not=_why_not, cost=_cost, run=attend)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="native",
    summary=SUMMARY,
    why_not=lambda problem: _why_not(problem.forward),
    cost=lambda problem: _cost(problem.forward, "backward", problem.multiply_adds),
    run=backward,
)
