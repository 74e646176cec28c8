"""Neighborhood attention on CPUs in C: `native.c`, compiled at first use and called with plain pointers.

For windows of up to 256 keys, where tiles of queries would compute several times the pairs that count. The C code reads
queries, keys and values where they lie, so that nothing is gathered; what depends on the rule is made here, once per
rule: where the window of each coordinate begins, and which window of the table of biases it uses.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import Backend
from ..native_build import Build, build
from .plan import Sizes, dense_work
from .problem import BackwardProblem, Gradients, Problem
from .rule import Rule, outer

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_KEYS = 256  # of a window; MOST_KEYS in native.c
MOST_VECS = 16  # of a head; MOST_VECS in native.c
HIDDEN = -1e30  # added to the score of a key that is not seen: its weight is exactly 0
LOG2E = math.log2(math.e)
# The time of a call in the units of plan.py: multiply-adds of dense attention on one core. Measured with AVX-512 at D 32 and 64,
# windows of 9 to 169 keys.
KEY_WORK = 1.2  # one multiply-add of a product with one key,
DILATED = 1.5  # and as a factor on it where the keys of a window lie apart
SCORE_WORK = 20  # one exponential, and summing across
QUERY_WORK = 400  # one query of one head
CAST_WORK = 6  # one element that has to be converted or padded
TABLE_WORK = 60  # one element of the table of biases
CALL_WORK = 3e6
PARTS_PER_THREAD = 8  # so that a thread that was held up leaves work to others


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("b", ctypes.c_int64),
        ("axis", ctypes.c_int64 * 3),
        ("h", ctypes.c_int64),
    ]


class _Call(ctypes.Structure):
    """`Call` of native.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "Hk")),
        ("length", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("vecs", "keys", "table_head", "threads", "rows_at_a_time")),
        ("scale", ctypes.c_double),
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        *((name, _Tensor) for name in ("dout", "dq", "dk", "dv")),
        ("delta", ctypes.c_void_p),
        ("dtable", ctypes.c_void_p),
        ("dtable_head", ctypes.c_int64),
        ("first", ctypes.c_void_p * 3),
        ("kind", ctypes.c_void_p * 3),
        ("order", ctypes.c_void_p * 3),
        *((name, ctypes.c_void_p) for name in ("key_slot", "value_slot", "grad_slot", "table")),
    ]


@dataclass(frozen=True, eq=False)
class Windows:
    """What native.c needs to know of a rule; axes are three, missing ones in front.

    A coordinate's *kind* is how many steps of the dilation its window begins before it: queries of one kind see the same
    offsets. It is given as its place in the table.
    """

    first: tuple[Tensor, ...]  # per axis (L,) int64: coordinate of the first key
    kind: tuple[Tensor, ...]  # per axis (L,) int64
    order: tuple[Tensor, ...]  # per axis (L,) int64: coordinates class by class, so that neighbours share their keys
    steps: (
        Tensor  # (3, keys rounded up) int64: tokens along each axis from the first key to each; 0 for what is filled up
    )
    bias_index: Tensor  # (kinds * keys,) int64: place of each pair in a head's relative bias
    hidden: Tensor  # (kinds, keys) bool
    kinds: int
    keys: int
    filled: int  # keys rounded up


@lru_cache(maxsize=64)
def windows(rule: Rule, bias: bool, lanes: int) -> Windows:
    """Cut a rule into what native.c reads; kept, because the layers of a network share rules.

    bias: whether kinds must tell offsets apart; without one, and without causal axes, all windows are of one kind.
    """
    with torch.inference_mode(False):  # what is made in inference mode must serve training later
        return _windows(rule, bias, lanes)


def _windows(rule: Rule, bias: bool, lanes: int) -> Windows:
    front = 3 - len(rule.axes)
    keys = math.prod(axis.window for axis in rule.axes)
    filled = -(-keys // lanes) * lanes
    first, kind, order = ([torch.zeros(1, dtype=torch.long)] * front for _ in range(3))
    offsets: list[Tensor] = []
    hidden: list[Tensor] = []
    steps: list[Tensor] = []
    kinds = 1
    for axis in reversed(rule.axes):
        i = torch.arange(axis.length)
        lo, _ = axis.windows()
        first.insert(front, lo * axis.dilation + i % axis.dilation)
        order.insert(front, torch.cat([i[r :: axis.dilation] for r in range(axis.dilation)]))
        several = bias or axis.causal
        number = axis.window if several else 1
        kind.insert(front, (i // axis.dilation - lo if several else torch.zeros_like(i)) * kinds * filled)
        kinds *= number
        behind = torch.arange(number)[:, None]
        slot = torch.arange(axis.window)
        offsets.insert(0, slot - behind + axis.window - 1)
        hidden.insert(0, (slot > behind) if axis.causal else torch.zeros(number, axis.window, dtype=torch.bool))
        steps.insert(0, slot * axis.dilation)
    grid_steps = torch.stack([x.flatten() for x in torch.meshgrid(*steps, indexing="ij")])
    return Windows(
        tuple(first),
        tuple(kind),
        tuple(order),
        F.pad(grid_steps, (0, filled - keys, front, 0)),
        outer(offsets, rule.bias_shape).flatten(),
        ~outer([~x for x in hidden]),
        kinds,
        keys,
        filled,
    )


def attend(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return attention within the windows, and its log-sum-exp (B, H, *grid) if it is wanted.

    Numerics: float32. A query's result depends neither on the number of threads nor on other queries.
    """
    asked = _Asked(problem)
    out = torch.empty(asked.q.shape, dtype=torch.float32)
    lse = torch.empty(problem.B, problem.H, *problem.rule.grid) if problem.with_lse else None
    call = asked.call
    call.out, call.lse = _tensor(out), None if lse is None else lse.data_ptr()
    _library().mmeff_na_forward(ctypes.byref(call))
    return out[..., : problem.D].to(problem.q.dtype), lse


def backward(asked: BackwardProblem) -> Gradients:
    """Return the gradients; weights are computed again, so the log-sum-exp of the forward is not needed.

    Numerics: float32. The order of the sums does not depend on the number of threads.
    """
    problem, packed = asked.forward, _Asked(asked.forward)
    w, call = packed.windows, packed.call
    dout, delta = _readable(asked.dout, packed.lanes), asked.delta.float().contiguous()
    dq = torch.empty(packed.q.shape, dtype=torch.float32)
    dk, dv = (torch.zeros(packed.k.shape, dtype=torch.float32) for _ in range(2))
    dtable = None
    if problem.rel_bias is not None and asked.need_bias:
        dtable = torch.zeros(problem.B, problem.H, w.kinds, w.filled)
        call.dtable, call.dtable_head = dtable.data_ptr(), dtable.stride(1)
    call.dout, call.dq, call.dk, call.dv = map(_tensor, (dout, dq, dk, dv))
    call.delta = delta.data_ptr()
    slots = packed.slots(dk)
    call.grad_slot = slots.data_ptr()
    _library().mmeff_na_backward(ctypes.byref(call))
    dbias = None
    if problem.rel_bias is not None and dtable is not None:
        dbias = torch.zeros(problem.H, problem.rel_bias[0].numel())
        dbias.index_add_(1, w.bias_index, dtable.sum(0)[..., : w.keys].flatten(1))
        dbias = dbias.view(problem.rel_bias.shape)
    D = problem.D
    return Gradients(dq[..., :D], dk[..., :D], dv[..., :D], dbias, None, None)


class _Asked:
    """A problem as native.c reads it, and the tensors that its pointers lead to, which must live as long."""

    def __init__(self, problem: Problem) -> None:
        self.lanes: int = _library().mmeff_na_lanes()
        self.windows = w = windows(problem.rule, problem.rel_bias is not None, self.lanes)
        self.q, self.k, self.v = (_readable(x, self.lanes) for x in (problem.q, problem.k, problem.v))
        self.table = _table(problem, w)
        self.key_slot, self.value_slot = self.slots(self.k), self.slots(self.v)
        grid = problem.rule.grid
        length = (1,) * (3 - len(grid)) + grid
        rows, threads = problem.B * problem.H * length[0] * length[1], torch.get_num_threads()
        self.call = _Call(
            B=problem.B, H=problem.H, Hk=problem.Hk, length=(ctypes.c_int64 * 3)(*length),
            vecs=self.q.shape[-1] // self.lanes, keys=w.keys, table_head=0 if len(self.table) == 1 else self.table.stride(0),
            threads=threads, rows_at_a_time=max(1, rows // (PARTS_PER_THREAD * threads)), scale=problem.scale,
            q=_tensor(self.q), k=_tensor(self.k), v=_tensor(self.v),
            first=_pointers(w.first), kind=_pointers(w.kind), order=_pointers(w.order),
            key_slot=self.key_slot.data_ptr(), value_slot=self.value_slot.data_ptr(), table=self.table.data_ptr(),
        )  # fmt: skip

    def slots(self, like: Tensor) -> Tensor:
        """Elements from the first key of a window to each, in a tensor with these strides."""
        return (self.windows.steps * torch.tensor(list(_tensor(like).axis))[:, None]).sum(0)


def _table(problem: Problem, w: Windows) -> Tensor:
    """What is added to the scores of each kind of window, (heads or 1, kinds, keys rounded up), in units of log 2."""
    if problem.rel_bias is None:
        table = torch.zeros(1, w.kinds, w.keys)
    else:
        flat = problem.rel_bias.detach().float().flatten(1) * LOG2E
        table = flat.index_select(1, w.bias_index).view(-1, w.kinds, w.keys)
    return F.pad(table.masked_fill_(w.hidden, HIDDEN), (0, w.filled - w.keys), value=HIDDEN)


def _readable(x: Tensor, lanes: int) -> Tensor:
    """As float32 with whole vectors of channels side by side; the tensor itself where it is that already."""
    x = x.detach().float()
    if x.shape[-1] % lanes:
        x = F.pad(x, (0, -x.shape[-1] % lanes))
    return x if x.stride(-1) == 1 else x.contiguous()


def _tensor(x: Tensor) -> _Tensor:
    b, *axes, h, _ = x.stride()
    return _Tensor(x.data_ptr(), b, (ctypes.c_int64 * 3)(*[0] * (3 - len(axes)), *axes), h)


def _pointers(tensors: tuple[Tensor, ...]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * 3)(*(x.data_ptr() for x in tensors))


@lru_cache(maxsize=1)
def _check(library: ctypes.CDLL) -> None:
    assert ctypes.sizeof(_Call) == library.mmeff_na_call_bytes(), "_Call is not the Call of native.c"
    library.mmeff_na_forward.restype = library.mmeff_na_backward.restype = None


def _library() -> ctypes.CDLL:
    library = _build().library
    assert library is not None, "why_not was not asked"
    _check(library)
    return library


def _build() -> Build:
    return build(HERE / "native.c", HERE.parent / "block_sparse" / "native_simd.h")


def _why_not(problem: Problem) -> str | None:
    q = problem.q
    if q.device.type != "cpu":
        return f"it runs on CPUs only, and q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"it computes in float32, for float32, bfloat16 and float16 inputs, and q is {q.dtype}"
    if problem.T:
        return "it has no place for extra keys"
    keys = math.prod(axis.window for axis in problem.rule.axes)
    if keys > MOST_KEYS:
        return f"it is for windows of at most {MOST_KEYS} keys, and these have {keys}"
    reason = _build().reason
    if reason is not None:
        return reason
    widest: int = MOST_VECS * _library().mmeff_na_lanes()
    if widest < problem.D:
        return f"heads may have at most {widest} channels here, and these have {problem.D}"
    return None


def _cost(problem: Problem) -> float:
    rule, D = problem.rule, problem.D
    keys = math.prod(axis.window for axis in rule.axes)
    lanes = _library().mmeff_na_lanes()
    key_work = KEY_WORK * (DILATED if any(axis.dilation > 1 for axis in rule.axes) else 1)
    per_query = -(-keys // lanes) * lanes * (2 * D * key_work + SCORE_WORK) + QUERY_WORK
    copied = sum(x.numel() for x in (problem.q, problem.k, problem.v) if x.dtype != torch.float32 or D % lanes)
    work = problem.B * problem.H * problem.N * per_query + copied * CAST_WORK + CALL_WORK
    bias = problem.rel_bias is not None
    if bias:
        work += problem.H * keys**2 * TABLE_WORK
    return work / dense_work(Sizes(problem.B, problem.H, problem.Hk, D, 0, bias, "cpu"), problem.N)


def _backward_cost(asked: BackwardProblem) -> float:
    pairs, threads = asked.forward.B * asked.forward.Hk, torch.get_num_threads()
    idle = -(-pairs // threads) * threads / pairs  # a key head is one thread's
    return _cost(asked.forward) * idle


SUMMARY = "every query with its own window, in C"
FORWARD: Backend[Problem] = Backend(name="native", summary=SUMMARY, why_not=_why_not, cost=_cost, run=attend)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="native",
    summary=SUMMARY,
    why_not=lambda asked: _why_not(asked.forward),
    cost=_backward_cost,
    run=backward,
)
