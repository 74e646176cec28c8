"""Block-sparse attention by Triton kernels, for NVIDIA GPUs: what they can run, their work plans and their launches.

A *plan* cuts the rows of a layout into items, one program each (or one per tile of a large block). Rows much longer than
the mean, such as text queries that see everything, become several items, so that no program runs long after the others
have finished; the pieces' results are merged afterwards. Items run in the order of their (batch, key head), longest first
within each: programs that run at the same time then read the same keys and values, which stay in the L2 cache, and the
last ones to start are short. Making a plan waits for the device once; the layout keeps it.

triton_kernels.py holds the kernels, triton_configs.py their tile sizes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration import cost
from ..dispatch import Backend
from ..layout import BlockLayout
from .problem import BackwardProblem, Problem
from .triton_configs import Config, config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_D = 256
# Rows longer than so many times the mean are cut into pieces of about that length ...
LONG_ROW = 4
# ... unless that is no more than a few entries, where merging would cost more than it evens out.
MIN_PIECE = 8
# Seconds of a call that computes nothing: checks, plan look-up and launches, in Python. A guess, not measured.
OVERHEAD = {"forward": 6e-5, "backward": 1.5e-4}
# Pairs per second relative to 64-token blocks, for which the calibrated ratio stands: 128-token blocks fill the tensor
# cores better (0.7 against 0.5 of dense attention in comparable kernels), narrower ones leave them idle.
BLOCK_SPEED = {128: 1.4, 64: 1.0, 32: 0.5, 0: 0.25}
# Options of the compiler for every kernel: said explicitly, because Triton is about to change its default.
OPTIONS = {"enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# -------------------------------------------------------------------- plans


@dataclass(frozen=True, eq=False)
class Plan:
    """Work items of one kernel over one layout."""

    items: Tensor  # (n, 4) int32: row, piece, pieces of the row, first slot of the row (-1: one piece, needs no slot)
    long_rows: Tensor  # (m, 4) int32: the rows in several pieces, as (row, 0, pieces, first slot)
    slots: int  # pieces of all long rows: buffers for their results
    row_mask: int  # 0: every block of rows is in use to its last token; 1: all but the last one; 2: not so
    col_mask: int


def make_plan(layout: BlockLayout, n: Tensor, heads_per_kv: int) -> Plan:
    """Cut rows into items and put them in order. Waits for the device once.

    Args:
        layout: whose blocks the rows are.
        n: (B|1, H', blocks) entries that each row visits.
        heads_per_kv: consecutive heads of n that read the same keys and values.
    """
    B, H, blocks = n.shape
    n = n.reshape(-1).long()
    rows = torch.arange(n.shape[0], device=n.device)
    largest = (LONG_ROW * n.sum() / max(n.shape[0], 1)).ceil().clamp(min=MIN_PIECE)
    pieces = (n / largest).ceil().long().clamp(min=1)
    long = pieces > 1
    slot = torch.where(long, (pieces * long).cumsum(0) - pieces, -1)
    masks = [
        _mask(layout.q_valid, layout.q_len, layout.q_block),
        _mask(layout.kv_valid, layout.kv_len, layout.kv_block),
    ]
    counts = torch.stack([pieces.sum(), (pieces * long).sum(), long.sum(), *masks])
    total, slots, n_long, row_mask, col_mask = counts.tolist()

    row = torch.repeat_interleave(rows, pieces, output_size=total)
    piece = torch.arange(total, device=n.device) - (pieces.cumsum(0) - pieces)[row]
    order = torch.argsort(n[row] / pieces[row], descending=True, stable=True)
    owner = row // (blocks * heads_per_kv)
    order = order[torch.argsort(owner[order], stable=True)]
    items = torch.stack((row, piece, pieces[row], slot[row]), 1)[order]
    first = torch.argsort(~long, stable=True)[:n_long]  # the long rows; a boolean index would wait for the device again
    long_rows = torch.stack((first, torch.zeros_like(first), pieces[first], slot[first]), 1)
    return Plan(items.int().contiguous(), long_rows.int().contiguous(), slots, row_mask, col_mask)


def _mask(valid: Tensor, length: int, block: int) -> Tensor:
    """Return how much masking blocks need, as in Plan: a tensor, so that nothing waits for it yet."""
    in_sequence = (length - torch.arange(0, length, block, device=valid.device)).clamp(max=block)
    return torch.where((valid == in_sequence).all(), int(length % block != 0), 2)


def _row_plan(layout: BlockLayout, group: int) -> Plan:
    """The plan of the kernels that walk query blocks."""
    return layout.derived(
        ("triton rows", group),
        lambda layout: make_plan(layout, layout.n_visited[layout.row_of], min(group, layout.row_of.shape[1])),
    )


def _column_plan(layout: BlockLayout, group: int) -> Plan:
    """The plan of the kernel that walks key blocks, over `layout.transpose()`. One item serves a group of query heads."""

    def build(layout: BlockLayout) -> Plan:
        turned = layout.transpose()
        n = turned.n_visited[turned.row_of]
        return make_plan(turned, n if n.shape[1] == 1 else n.unflatten(1, (-1, group)).sum(2), 1)

    return layout.derived(("triton columns", group), build)


# -------------------------------------------------------------------- launches


@dataclass(frozen=True, eq=False)
class Launch:
    """What every kernel over a layout is given, and how many programs it takes."""

    plan: Plan
    shared: int  # (batch, head) pairs that share an item
    tables: dict[str, Any]  # lists and lengths of the layout
    sizes: dict[str, Any]  # tile sizes and other constants of the compilation
    options: dict[str, Any]  # of the compiler

    @property
    def work(self) -> dict[str, Any]:
        """Arguments that say which item a program takes."""
        return {name: self.tables[name] for name in ("items", "n_items", "HX", "GX", "shared", "blocks", "lists_h")}

    @property
    def programs(self) -> int:
        """Programs over all items."""
        return int(self.plan.items.shape[0] * self.shared * self.sizes["ROW_SUBS"])

    def buffer(self, like: Tensor, *channels: int) -> Tensor:
        """Return room for the results of all pieces, float32."""
        shape = (self.plan.slots * self.shared, self.sizes["ROW_BLOCK"], *channels)
        return torch.empty(shape, dtype=torch.float32, device=like.device)


def prepare(layout: BlockLayout, plan: Plan, q: Tensor, B: int, heads: tuple[int, int], config: Config) -> Launch:
    """Gather the arguments of a kernel that walks the rows of `layout` by `plan`.

    Args:
        q: for dtype and head width. B: batch.
        heads: (HX, GX), heads that share each item where the layout's lists are shared by all heads.
    """
    lists_b, lists_h, blocks = layout.row_of.shape
    HX, GX = heads if lists_h == 1 else (1, 1)
    shared = (B if lists_b == 1 else 1) * HX * GX
    D, bounds, none = q.shape[-1], layout.bounds, layout.row_start
    if bounds is not None:
        axes = bounds.q_bounds.shape[0]
    else:
        axes = 0 if layout.bitmap is not None and layout.bitmap.shape[0] else -1
    row_subs, col_subs = -(-layout.q_block // config.rows), -(-layout.kv_block // config.cols)
    tables = {
        "items": plan.items, "n_items": plan.items.shape[0], "HX": HX, "GX": GX, "shared": shared,
        "row_of": layout.row_of.contiguous(), "row_start": layout.row_start, "n_partial": layout.n_partial,
        "n_full": layout.n_full, "partial_start": layout.partial_start, "col_idx": layout.col_idx,
        "bitmap": none if layout.bitmap is None else layout.bitmap.contiguous().view(torch.uint8),
        "row_bounds": none if bounds is None else bounds.q_bounds.contiguous(),
        "col_bounds": none if bounds is None else bounds.k_bounds.contiguous(),
        "row_valid": layout.q_valid.contiguous(), "row_valid_b": layout.nQ if layout.q_valid.shape[0] > 1 else 0,
        "col_valid": layout.kv_valid.contiguous(), "col_valid_b": layout.nK if layout.kv_valid.shape[0] > 1 else 0,
        "n_rows": layout.q_len, "n_cols": layout.kv_len, "blocks": blocks, "lists_b": lists_b, "lists_h": lists_h,
    }  # fmt: skip
    sizes = {
        "D": D, "BD": _padded(D), "ROW_BLOCK": layout.q_block, "COL_BLOCK": layout.kv_block, "ROW_TILE": config.rows,
        "COL_TILE": config.cols, "ROW_SUBS": row_subs, "COL_SUBS": col_subs,
        "ROW_MASK": plan.row_mask or int(row_subs * config.rows != layout.q_block),
        "COL_MASK": plan.col_mask or int(col_subs * config.cols != layout.kv_block),
        "AXES": axes, "PRECISION": _precision(q.dtype), "SPLIT": plan.slots > 0,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages, **OPTIONS}
    return Launch(plan, shared, tables, sizes, options)


def attend(problem: Problem, config: Config | None = None) -> tuple[Tensor, Tensor | None]:
    """Return attention over the visited blocks, and its log-sum-exp where it is wanted.

    Args:
        config: tile sizes to run with; None takes the tuned or the tabulated ones.
    """
    from . import triton_kernels

    B, Nq, H, D = problem.q.shape
    q, k, v = (_readable(x) for x in (problem.q, problem.k, problem.v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((B, H, Nq) if problem.want_lse else 0, dtype=torch.float32, device=q.device)
    layout, group = problem.layout, H // problem.Hk
    config = config or _config("forward", q, layout)
    launch = prepare(layout, _row_plan(layout, group), q, B, (problem.Hk, group), config)
    piece_out, piece_lse = launch.buffer(q, D), launch.buffer(q)
    with _on(q.device):
        triton_kernels.forward[(launch.programs,)](
            q=q, k=k, v=v, out=out, lse=lse, piece_out=piece_out, piece_lse=piece_lse, H=H, group=group,
            # never 0, because a masked score of -inf times 0 would be NaN; this small it is as good as 0
            scale=max(abs(problem.scale) * math.log2(math.e), 1e-30), NEGATE=problem.scale < 0,
            WANT_LSE=problem.want_lse, **_strides(q=q, k=k, v=v), **launch.tables, **launch.sizes, **launch.options,
        )  # fmt: skip
        if launch.plan.slots:
            _finish(
                triton_kernels.merge, launch, H, piece_out=piece_out, piece_lse=piece_lse, out=out, lse=lse,
                WANT_LSE=problem.want_lse,
            )  # fmt: skip
    return out.to(problem.q.dtype), lse if problem.want_lse else None


def backward(
    problem: BackwardProblem, configs: dict[str, Config] | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k and v that are needed.

    Args:
        configs: tile sizes to run "dq" and "dkdv" with; what is not named takes the tuned or the tabulated ones.

    Numerics: scores are computed again from q, k and the log-sum-exp, whichever backend returned it. Sums in float32, in
        an order that depends on nothing but the shapes and the layout, so that gradients are reproducible bit by bit.
    """
    from . import triton_kernels

    forward, layout, configs = problem.forward, problem.layout, configs or {}
    B, Nq, H, D = forward.q.shape
    Hk, group = forward.Hk, H // forward.Hk
    q, k, v, out = (_readable(x) for x in (forward.q, forward.k, forward.v, problem.out))
    dout = q.new_zeros(()).expand(q.shape) if problem.dout is None else _readable(problem.dout)
    lse = problem.lse.contiguous()
    delta = torch.empty((B, H, Nq), dtype=torch.float32, device=q.device)
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((q, k, v), problem.needs, strict=True)
    )
    reads = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta, "scale": forward.scale, "H": H}
    strides = _strides(q=q, k=k, v=v, do=dout)
    with _on(q.device):
        if problem.needs[0] or problem.needs[1]:
            _delta(problem, out, dout, delta)
        if dq is not None:
            config = configs.get("dq") or _config("dq", q, layout)
            launch = prepare(layout, _row_plan(layout, group), q, B, (Hk, group), config)
            pieces = launch.buffer(q, D)
            triton_kernels.dq[(launch.programs,)](
                grad=dq, piece_grad=pieces, group=group, **reads, **strides, **launch.tables, **launch.sizes,
                **launch.options,
            )  # fmt: skip
            if launch.plan.slots:
                _finish(triton_kernels.add_pieces, launch, H, piece_grad=pieces, grad=dq)
        if dk is not None or dv is not None:
            turned = layout.transpose()
            config = configs.get("dkdv") or _config("dkdv", q, turned)
            launch = prepare(turned, _column_plan(layout, group), q, B, (Hk, 1), config)
            piece_dk, piece_dv = (launch.buffer(q, D) if x is not None else lse for x in (dk, dv))
            triton_kernels.dkdv[(launch.programs,)](
                grad_k=q if dk is None else dk, grad_v=q if dv is None else dv, piece_dk=piece_dk, piece_dv=piece_dv,
                Hk=Hk, GROUP=group, NEED_DK=dk is not None, NEED_DV=dv is not None, **reads, **strides,
                **launch.tables, **launch.sizes, **launch.options,
            )  # fmt: skip
            for grad, pieces in ((dk, piece_dk), (dv, piece_dv)):
                if launch.plan.slots and grad is not None:
                    # items are per key head, where lists are per query head
                    _finish(triton_kernels.add_pieces, launch, Hk, lists_h=-(-launch.tables["lists_h"] // group),
                            piece_grad=pieces, grad=grad)  # fmt: skip
    dtype = forward.q.dtype
    return tuple(None if x is None else x.to(dtype) for x in (dq, dk, dv))  # type: ignore[return-value]


def _delta(problem: BackwardProblem, out: Tensor, dout: Tensor, delta: Tensor) -> None:
    from . import triton_kernels

    B, H, Nq = delta.shape
    dlse = delta if problem.dlse is None else problem.dlse
    rows = 32
    triton_kernels.delta[(B * H * -(-Nq // rows),)](
        out=out, dout=dout, dlse=dlse, result=delta, n_rows=Nq, H=H, **_strides(o=out, do=dout),
        dl_b=dlse.stride(0), dl_h=dlse.stride(1), dl_n=dlse.stride(2), D=out.shape[-1], BD=_padded(out.shape[-1]),
        ROW_TILE=rows, HAS_DOUT=problem.dout is not None, HAS_DLSE=problem.dlse is not None,
        **OPTIONS,
    )  # fmt: skip


def _finish(kernel: Any, launch: Launch, H: int, **arguments: Any) -> None:
    """Run the kernel that puts the pieces of long rows together."""
    rows = launch.plan.long_rows
    work = launch.work | {"items": rows, "n_items": rows.shape[0], "H": H, "n_rows": launch.tables["n_rows"]}
    sizes = {name: launch.sizes[name] for name in ("D", "BD", "ROW_BLOCK", "ROW_TILE", "ROW_SUBS")}
    kernel[(rows.shape[0] * launch.shared * sizes["ROW_SUBS"],)](**(work | sizes | arguments | OPTIONS))


def _config(kernel: str, q: Tensor, layout: BlockLayout) -> Config:
    return config(kernel, q, layout.q_block, layout.kv_block)


def _readable(x: Tensor) -> Tensor:
    """Return x as the kernels can read it: copied only if its strides would overflow 32 bits within a tile."""
    if interpreted() and x.dtype == torch.bfloat16:
        x = x.float()  # the interpreter has no bfloat16 matrix products
    return x if 128 * x.stride(1) + MAX_D * x.stride(3) < 2**31 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"{name}_{axis}": stride for name, x in tensors.items() for axis, stride in zip("bnhd", x.stride(), strict=True)
    }


def _padded(D: int) -> int:
    """Channels of a tile: a power of two, and no fewer than a matrix product takes."""
    return max(16, 1 << (D - 1).bit_length())


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "tf32"  # says nothing about narrower inputs
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# -------------------------------------------------------------------- what dispatch and tuning ask


def why_not(problem: Problem) -> str | None:
    """Return why the kernels cannot run a problem, or None."""
    q, name = problem.q, str(problem.q.dtype).removeprefix("torch.")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if q.dtype not in DTYPES:
        return f"its kernels compute in float16, bfloat16 and float32, not in {name}"
    if problem.D > MAX_D:
        return f"its kernels hold heads of at most {MAX_D} channels, and these have {problem.D}"
    if interpreted():
        return None
    if q.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the tensors are on {q.device}"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs, and this PyTorch is built for AMD's"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        has = ".".join(map(str, capability))
        return f"it needs compute capability 8.0 or higher, and {torch.cuda.get_device_name(q.device)} has {has}"
    return None


def _cost(problem: Problem, direction: str, multiply_adds: int) -> float:
    if interpreted():
        return math.inf
    layout = problem.layout
    narrowest = min(layout.q_block, layout.kv_block)
    speed = next(factor for block, factor in BLOCK_SPEED.items() if narrowest >= block)
    return cost(
        "triton", layout.block_density / speed, OVERHEAD[direction], device=problem.q.device, dtype=problem.q.dtype,
        direction=direction, multiply_adds=multiply_adds,
    )  # fmt: skip


def kernels_of(problem: Problem) -> Iterator[tuple[str, int, int, Callable[[Config], tuple[Tensor, ...]]]]:
    """Yield what can be tuned: kernel, block of its rows and of its columns, and how to run it with a config.

    The backward kernels run on gradients of their own making, and only where the problem is for training.
    """
    layout = problem.layout

    def forward(config: Config) -> tuple[Tensor, ...]:
        return tuple(x for x in attend(problem, config) if x is not None)

    yield "forward", layout.q_block, layout.kv_block, forward
    if not problem.training:
        return
    out, lse = attend(problem)
    assert lse is not None
    dout = torch.randn_like(out)

    def runs(kernel: str, needs: tuple[bool, bool, bool]) -> Callable[[Config], tuple[Tensor, ...]]:
        gradients = BackwardProblem(problem, out, lse, dout, None, needs)
        return lambda config: tuple(x for x in backward(gradients, {kernel: config}) if x is not None)

    yield "dq", layout.q_block, layout.kv_block, runs("dq", (True, False, False))
    yield "dkdv", layout.kv_block, layout.q_block, runs("dkdv", (False, True, True))


SUMMARY = "Triton kernels over the visited blocks"
FORWARD = Backend(
    name="triton",
    summary=SUMMARY,
    why_not=why_not,
    cost=lambda problem: _cost(problem, "forward", problem.multiply_adds),
    run=attend,
)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="triton",
    summary=SUMMARY,
    why_not=lambda problem: why_not(problem.forward),
    cost=lambda problem: _cost(problem.forward, "backward", problem.multiply_adds),
    run=backward,
)
