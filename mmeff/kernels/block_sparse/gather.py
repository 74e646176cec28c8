"""Block-sparse attention in plain PyTorch: gather the visited key blocks, then attend to them densely.

Rows of query blocks are sorted into buckets that visit equally many key blocks, so that a chunk of a bucket is one
batch without padding. A chunk copies its key and value blocks next to each other; chunks are small enough for those
copies to stay in cache, which is where the speed comes from. Rows whose blocks are all full need no mask. When all
heads of a group share their lists (grouped-query attention), their queries are stacked on one copy of the keys.

The backward pass gathers again, chunk by chunk, and takes the weights from the scores and the log-sum-exp.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration import cost
from ..dispatch import Backend
from ..layout import BlockLayout
from .problem import BackwardProblem, Problem, accumulation_dtype

# Bytes of gathered keys, values and scores that one chunk may hold. On CPU per thread, and best within the L2 cache
# (fastest of 1..64 MiB, N 4096, D 64, one thread of an EPYC with 1 MiB of L2); elsewhere few and large launches win.
CHUNK_BYTES_PER_THREAD = 2 * 2**20
CHUNK_BYTES_DEVICE = 256 * 2**20
# Memory that a thread keeps for each of a call's tensors, if they are no larger.
KEPT_BYTES = 32 * 2**20
# Seconds that a call takes before it computes anything (1 CPU core).
OVERHEAD = 4e-4
# What the mask of a partial block adds to its time (N 12480, H 4, D 64, float32: 3.4 times that of a full block).
MASK_COST = 2.4


_kept = threading.local()


@dataclass(frozen=True, eq=False)
class Bucket:
    """Rows that visit equally many key blocks and need the same treatment."""

    n: int  # key blocks per row
    masked: bool  # some entry is partial, or short within the list: a mask is needed
    tail: bool  # the last entry is the short last key block, to be cut off at the end of the sequence: no mask for that
    rows: Tensor  # (R,) row in the flat (B, heads, nQ) of the queries
    base: Tensor  # (R,) base row of the layout
    kv_offset: Tensor  # (R,) first block of this row's batch and key head in the flat (B, Hk, nK)


@dataclass(frozen=True, eq=False)
class Plan:
    """The buckets of one layout at one batch and head count."""

    layout: BlockLayout
    heads: int  # heads the query rows are listed for: Hk when a group is stacked, else H
    stack: int  # query heads stacked on one gathered copy of keys: the group size, or 1
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Part of a bucket, with the addresses of what it reads."""

    rows: Tensor  # (c,)
    blocks: Tensor  # (c, n) block in the flat (B, Hk, nK)
    keys: int  # keys in use of the n * kv_block gathered ones
    mask: Tensor | None  # (c, q_block, keys) bool


def attend(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return attention over the visited blocks, and its log-sum-exp if asked for."""
    plan, q, scale = _plan_of(problem), problem.q, problem.scale
    layout, D = plan.layout, q.shape[-1]
    dtype = accumulation_dtype(q.dtype)
    qb, kb, vb = _blocks_of(problem, plan)
    keys, values = _Gathered(kb), _Gathered(vb)
    # rows that visit nothing keep these; where every row is in a bucket, zeroing is spared
    out = _scratch("out", qb.shape, qb)
    if sum(bucket.rows.shape[0] for bucket in plan.buckets) < qb.shape[0]:
        out.zero_()
    lse = qb.new_full(qb.shape[:-1], -torch.inf, dtype=dtype) if problem.want_lse else None
    per_key = 2 * D * q.element_size()
    if lse is not None:
        per_key += 2 * D * dtype.itemsize + plan.stack * layout.q_block * dtype.itemsize
    for chunk in _chunks(plan, per_key):
        qc, kc, vc = qb.index_select(0, chunk.rows), keys(chunk), values(chunk)
        if lse is None:
            oc = _attend(qc, kc, vc, chunk.mask, scale)
        else:
            weights, total, lse_c = _softmax(qc.to(dtype), kc.to(dtype), chunk.mask, scale)
            oc = torch.bmm(weights, vc.to(dtype)).div_(total).view_as(qc).to(q.dtype)
            lse.index_copy_(0, chunk.rows, lse_c)
        out.index_copy_(0, chunk.rows, oc)
    out = _from_blocks(out, q.shape)
    if lse is not None:
        lse = _from_blocks(lse[..., None], q.shape)[..., 0].transpose(1, 2).contiguous()
    if layout.has_padding:
        unused = ~layout.tokens_in_use()[0]
        out = out.masked_fill_(unused[:, :, None, None], 0.0)
        lse = None if lse is None else lse.masked_fill_(unused[:, None], -torch.inf)
    return out, lse


def _plan_of(problem: Problem) -> Plan:
    key = ("gather", problem.B, problem.H, problem.Hk)
    return problem.layout.derived(key, lambda layout: make_plan(layout, problem.B, problem.H, problem.Hk))


def _blocks_of(problem: Problem, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in blocks; what lies where no token is in use is finite."""
    layout, q = problem.layout, problem.q
    k, v = problem.without_padding()
    if layout.has_padding:
        q = q.masked_fill(~layout.tokens_in_use()[0][:, :, None, None], 0.0)
    return (
        _to_blocks(q, layout.q_block, plan.stack, "q"),
        _to_blocks(k, layout.kv_block, 1, "k"),
        _to_blocks(v, layout.kv_block, 1, "v"),
    )


def make_plan(layout: BlockLayout, B: int, H: int, Hk: int) -> Plan:
    """Sort the rows into buckets. Synchronises with the device once; the layout keeps the result."""
    group, nQ, nK = H // Hk, layout.nQ, layout.nK
    base = layout.row_of
    stack = 1
    if base.shape[1] == 1:
        stack = group
    elif group > 1:
        per_group = base.view(-1, Hk, group, nQ)
        if bool((per_group == per_group[:, :, :1]).all()):
            base, stack = per_group[:, :, 0], group
    heads = H // stack
    base = base.expand(B, heads, nQ).reshape(-1)

    n, masked = layout.n_visited[base], layout.n_partial[base] > 0
    tail = torch.zeros_like(masked)
    if layout.has_padding:
        entries = layout.entries(base)
        short = layout.kv_valid.expand(B, nK)[entries.row // (heads * nQ), entries.col] < layout.kv_block
        masked = masked | (torch.zeros_like(n).index_add_(0, entries.row, short.long()) > 0)
    elif layout.kv_len % layout.kv_block and layout.col_idx.numel():
        # full entries ascend, so the short last key block can only be the last entry of a row
        last = layout.col_idx[(layout.row_start[base] + n - 1).clamp(min=0)]
        tail = (n > 0) & (last == nK - 1) & ~masked
    kind, order = torch.sort((n * 2 + masked) * 2 + tail, stable=True)
    kinds, counts = torch.unique_consecutive(kind, return_counts=True)

    head = order // nQ
    kv_head = head // heads * Hk + head % heads * Hk // heads
    buckets = []
    parts = [x.split(counts.tolist()) for x in (order, base[order], kv_head * nK)]
    for code, rows, base_rows, offsets in zip(kinds.tolist(), *parts, strict=True):
        bucket = Bucket(code // 4, bool(code // 2 % 2), bool(code % 2), rows, base_rows, offsets)
        if bucket.n:  # rows that visit nothing keep the initial 0 and -inf
            buckets.append(bucket)
    return Plan(layout, heads, stack, tuple(buckets))


def _chunks(plan: Plan, bytes_per_key: int) -> Iterator[Chunk]:
    """Cut the buckets into chunks of a bounded size and address their blocks."""
    layout = plan.layout
    on_cpu = layout.device.type == "cpu"
    budget = CHUNK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else CHUNK_BYTES_DEVICE
    for bucket in plan.buckets:
        keys = bucket.n * layout.kv_block
        if bucket.tail:
            keys -= layout.nK * layout.kv_block - layout.kv_len
        size = max(1, budget // (keys * bytes_per_key))
        slots = torch.arange(bucket.n, device=layout.device)
        parts = (x.split(size) for x in (bucket.rows, bucket.base, bucket.kv_offset))
        for rows, base, kv_offset in zip(*parts, strict=True):
            cols = layout.col_idx[layout.row_start[base, None] + slots]
            mask = _mask(plan, rows, base, cols) if bucket.masked else None
            yield Chunk(rows, cols + kv_offset[:, None], keys, mask)


def _mask(plan: Plan, rows: Tensor, base: Tensor, cols: Tensor) -> Tensor:
    """Return (c, q_block, n * kv_block) bool: what partial entries say, and the tokens in use for all."""
    layout = plan.layout
    c, n = cols.shape
    slots = torch.arange(n, device=cols.device)
    mask = cols.new_ones((c, n, layout.q_block, layout.kv_block), dtype=torch.bool)
    partial = slots < layout.n_partial[base, None]
    if layout.bitmap is not None or layout.bounds is not None:
        q_blocks = (rows % layout.nQ)[:, None].expand(c, n)
        slabs = (layout.partial_start[base, None] + slots)[partial]
        mask[partial] = layout.slabs(q_blocks[partial], cols.long()[partial], slabs)
    if layout.has_padding or layout.kv_len % layout.kv_block:
        batch = rows // (plan.heads * layout.nQ) if layout.kv_valid.shape[0] > 1 else torch.zeros_like(rows)
        used = torch.arange(layout.kv_block, device=cols.device) < layout.kv_valid[batch[:, None], cols][..., None]
        mask &= used[:, :, None]
    return mask.transpose(1, 2).reshape(c, layout.q_block, n * layout.kv_block)


def backward(problem: BackwardProblem) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Recompute the weights of each chunk and push the gradients of out and LSE through them."""
    forward, dout, needs = problem.forward, problem.dout, problem.needs
    plan, q, k, v, scale = _plan_of(forward), forward.q, forward.k, forward.v, forward.scale
    layout, D = plan.layout, q.shape[-1]
    dtype = accumulation_dtype(q.dtype)
    qb, kb, vb = _blocks_of(forward, plan)
    keys, values = _Gathered(kb), _Gathered(vb)
    shift = problem.shift()
    lse = problem.lse.masked_fill(problem.lse == -torch.inf, torch.inf)  # weights of 0 for queries without keys
    dout = q.new_zeros(q.shape) if dout is None else dout
    if layout.has_padding:
        unused = ~layout.tokens_in_use()[0]
        dout = dout.masked_fill(unused[:, :, None, None], 0.0)
        lse, shift = lse.masked_fill(unused[:, None], torch.inf), shift.masked_fill(unused[:, None], 0.0)
    dob = _to_blocks(dout, layout.q_block, plan.stack, "dout")
    lb = _to_blocks(lse.transpose(1, 2)[..., None], layout.q_block, plan.stack, "lse")
    sb = _to_blocks(shift.transpose(1, 2)[..., None], layout.q_block, plan.stack, "shift")
    # float32 sums: a key block collects from many rows, and half-precision additions would lose the small ones
    dq, dk, dv = (
        torch.zeros_like(x, dtype=dtype) if need else None for x, need in zip((qb, kb, vb), needs, strict=True)
    )
    per_key = 2 * D * (q.element_size() + 2 * dtype.itemsize) + 2 * plan.stack * layout.q_block * dtype.itemsize
    for chunk in _chunks(plan, per_key):
        qc, kc, vc = (x.to(dtype) for x in (qb.index_select(0, chunk.rows), keys(chunk), values(chunk)))
        qc, lc, sc, do = (
            x.flatten(1, 2) for x in (qc, *(y.index_select(0, chunk.rows).to(dtype) for y in (lb, sb, dob)))
        )
        weights = torch.bmm(qc * scale, kc.transpose(1, 2)).sub_(lc).exp_()
        if chunk.mask is not None:
            weights.view(len(chunk.rows), plan.stack, layout.q_block, -1).masked_fill_(~chunk.mask[:, None], 0.0)
        if dv is not None:
            _scatter_add(dv, chunk, torch.bmm(weights.transpose(1, 2), do))
        dscores = torch.bmm(do, vc.transpose(1, 2)).sub_(sc).mul_(weights).mul_(scale)
        if dq is not None:
            dq.index_copy_(0, chunk.rows, torch.bmm(dscores, kc).view(-1, *qb.shape[1:]))
        if dk is not None:
            _scatter_add(dk, chunk, torch.bmm(dscores.transpose(1, 2), qc))
    return (
        None if dq is None else _from_blocks(dq, q.shape).to(q.dtype),
        None if dk is None else _from_blocks(dk, k.shape).to(k.dtype),
        None if dv is None else _from_blocks(dv, v.shape).to(v.dtype),
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend within a chunk: q (c, stack, q_block, D) to k, v (c, keys, D)."""
    if mask is None:
        out = F.scaled_dot_product_attention(q.flatten(1, 2)[:, None], k[:, None], v[:, None], scale=scale)
        return out.view_as(q)
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
    # a query that its bitmaps leave without keys: 0, whatever the kernel made of it
    return out.masked_fill(~mask.any(-1)[:, None, :, None], 0.0)


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's weights before division (c, stack * q_block, keys), their sums, and the log-sum-exp.

    The caller divides by the sums where that is cheapest. Rows without a key get weights 0, sum 1 and LSE -inf.
    """
    c, stack, block, _ = q.shape
    scores = torch.bmm(q.flatten(1, 2) * scale, k.transpose(1, 2))
    if mask is not None:
        scores.view(c, stack, block, -1).masked_fill_(~mask[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    if mask is not None:
        top = top.masked_fill(top == -torch.inf, 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).view(c, stack, block)
    return weights, total.masked_fill(total == 0, 1.0), lse


class _Gathered:
    """Copies the blocks of a chunk next to each other, into the same memory every time.

    The memory stays in cache and saves an allocation per chunk; a chunk must be used up before the next is gathered.
    """

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks.flatten(1)
        self.D = blocks.shape[-1]
        self.buffer = self.blocks.new_empty(0)

    def __call__(self, chunk: Chunk) -> Tensor:
        """(B * Hk * nK, 1, kv_block, D) -> (c, keys, D)."""
        index = chunk.blocks.reshape(-1)
        if self.buffer.shape[0] < index.shape[0]:
            self.buffer = self.blocks.new_empty(index.shape[0], self.blocks.shape[1])
        gathered = torch.index_select(self.blocks, 0, index, out=self.buffer[: index.shape[0]])
        return gathered.view(chunk.blocks.shape[0], -1, self.D)[:, : chunk.keys]


def _scatter_add(blocks: Tensor, chunk: Chunk, grad: Tensor) -> None:
    """Add gradients (c, keys, D) to the blocks that the chunk gathered."""
    c, n = chunk.blocks.shape
    cut = n * blocks.shape[2] - chunk.keys
    if cut:
        grad = F.pad(grad, (0, 0, 0, cut))
    blocks.flatten(1).index_add_(0, chunk.blocks.reshape(-1), grad.reshape(c * n, -1))


def _scratch(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Return memory for this call that a later call on this thread uses again.

    Fresh memory costs a page fault every 4 KiB, which for short rows is a tenth of the time.
    """
    n = math.prod(shape)
    if like.device.type != "cpu" or n * like.element_size() > KEPT_BYTES:
        return like.new_empty(shape)
    kept = _kept.__dict__
    key = f"{name} {like.dtype}"
    if key not in kept or kept[key].shape[0] < n:
        with torch.inference_mode(False):
            kept[key] = torch.empty(n, dtype=like.dtype)
    return kept[key][:n].view(shape)


def _to_blocks(x: Tensor, block: int, stack: int, name: str) -> Tensor:
    """(B, N, H, D) -> (B * H / stack * nBlocks, stack, block, D), the short last block filled with zeros."""
    B, N, H, D = x.shape
    whole, rest = divmod(N, block)
    out = _scratch(name, (B, H // stack, whole + bool(rest), stack, block, D), x)
    heads = x.unflatten(2, (H // stack, stack))
    out[:, :, :whole] = heads[:, : whole * block].unflatten(1, (whole, block)).permute(0, 3, 1, 4, 2, 5)
    if rest:
        out[:, :, whole, :, :rest] = heads[:, whole * block :].permute(0, 2, 3, 1, 4)
        out[:, :, whole, :, rest:] = 0
    return out.flatten(0, 2)


def _from_blocks(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo _to_blocks: return (B, N, H, x.shape[-1]) for the given (B, N, H, D), in memory of its own."""
    B, N, H, _ = shape
    _, stack, block, D = x.shape
    x = x.view(B, H // stack, -1, stack, block, D).permute(0, 2, 4, 1, 3, 5)
    whole, rest = divmod(N, block)
    out = x.new_empty(B, N, H, D)
    heads = out.unflatten(2, (H // stack, stack))
    heads[:, : whole * block].unflatten(1, (whole, block)).copy_(x[:, :whole])
    if rest:
        heads[:, whole * block :].copy_(x[:, whole, :rest])
    return out


def _cost(problem: Problem, direction: str = "forward", multiply_adds: int | None = None) -> float:
    macs = problem.multiply_adds if multiply_adds is None else multiply_adds
    layout, q = problem.layout, problem.q
    # below 16 tokens a block is dearer to fetch than to compute
    share = layout.block_density * max(1.0, 16 / layout.kv_block) * max(1.0, 16 / layout.q_block)
    share *= 1 + MASK_COST * layout.partial_share
    return cost("gather", share, OVERHEAD, device=q.device, dtype=q.dtype, direction=direction, multiply_adds=macs)


SUMMARY = "computes the visited blocks only, in PyTorch"
FORWARD: Backend[Problem] = Backend(
    name="gather", summary=SUMMARY, why_not=lambda problem: None, cost=_cost, run=attend
)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="gather",
    summary=SUMMARY,
    why_not=lambda problem: None,
    cost=lambda problem: _cost(problem.forward, "backward", problem.multiply_adds),
    run=backward,
)
