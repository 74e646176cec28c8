"""Routed attention as block-sparse attention: queries grouped by the key block they picked.

All queries of one head that picked one key block are copied next to each other into rows of `ROWS` queries, the last row of a
group filled up. Such a row visits exactly one key block, so any block-sparse backend computes it densely. A query sits in
as many rows as it has picks; its partial outputs are merged by their log-sum-exps. The backward pass feeds the *merged*
output and log-sum-exp to the block-sparse backward, whose weights exp(score - lse) are then those of the whole softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_sparse import op as block_sparse
from ..block_sparse.problem import BackwardProblem, Problem, accumulation_dtype
from ..dispatch import choose, note
from ..layout import BlockLayout
from .problem import RoutedProblem

ROWS = 64  # queries in a row
# Bytes of queries copied at a time.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}


@dataclass(frozen=True, eq=False)
class Group:
    """Some heads of the problem, grouped."""

    queries: slice  # of the flat (B, H, Nq)
    pair: Tensor  # (P,) place of each pick in the padded rows, picks of a query next to each other
    query: Tensor  # (P,) its query, counted from the first of `queries`; ascending
    bags: Tensor  # (queries + 1,) where the picks of each query begin
    slots: Tensor  # (S,) query in the flat (B, H, Nq) of each place in the rows; any where nobody sits
    layout: BlockLayout  # over the S places and the flat key blocks


def attend(problem: RoutedProblem, backend: str) -> tuple[Tensor, Tensor]:
    """Return the output (B, Nq, H, D) and the log-sum-exp (B, H, Nq) of all picks together.

    backend: the one of block-sparse attention that computes the groups, or "auto".
    """
    B, Nq, H, D = problem.q.shape
    dtype = accumulation_dtype(problem.q.dtype)
    qf = problem.q.transpose(1, 2).reshape(-1, D)
    kf, vf = (_flat_blocks(x, problem.kv_block) for x in (problem.k, problem.v))
    out = torch.zeros(B * H * Nq, D, dtype=dtype, device=qf.device)
    lse = torch.full((B * H * Nq,), -torch.inf, dtype=dtype, device=qf.device)
    for group in _groups(problem):
        q = qf[group.slots][None, :, None]
        part = Problem(q, kf, vf, group.layout, problem.scale, True)
        chosen, reason = choose(block_sparse.OPERATOR, block_sparse.FORWARD, part, backend)
        note(block_sparse.OPERATOR, chosen.name, f"within routed_attention, {reason}", lambda: problem.share)
        po, pl = chosen.run(part)
        pl = pl[0, 0, group.pair]
        top = torch.full_like(lse[group.queries], -torch.inf).scatter_reduce_(0, group.query, pl, "amax")
        top = top.masked_fill_(top == -torch.inf, 0.0)  # queries whose blocks hold no key in use
        weight = torch.exp(pl - top[group.query])
        total = torch.zeros_like(top).index_add_(0, group.query, weight)
        share = weight / total.masked_fill(total == 0, 1.0)[group.query]
        out[group.queries] = _sum_picks(po, group, share)
        lse[group.queries] = top + total.log()  # -inf where nothing was seen
    return (
        out.view(B, H, Nq, D).transpose(1, 2).to(problem.q.dtype).contiguous(),
        lse.view(B, H, Nq),
    )


def backward(
    problem: RoutedProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k and v from the merged output and log-sum-exp."""
    B, Nq, H, D = problem.q.shape
    dtype = accumulation_dtype(problem.q.dtype)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(-1, D)

    qf, of, dof = flat(problem.q), flat(out), None if dout is None else flat(dout)
    lf, dlf = lse.reshape(-1), None if dlse is None else dlse.reshape(-1)
    kf, vf = (_flat_blocks(x, problem.kv_block) for x in (problem.k, problem.v))
    dq = torch.zeros(qf.shape, dtype=dtype, device=qf.device) if needs[0] else None
    dk, dv = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) if need else None
        for x, need in ((kf, needs[1]), (vf, needs[2]))
    )
    for group in _groups(problem):

        def rows(x: Tensor, slots: Tensor = group.slots) -> Tensor:
            return x[slots][None, :, None]

        part = BackwardProblem(
            Problem(rows(qf), kf, vf, group.layout, problem.scale, True, True),
            rows(of),
            lf[group.slots][None, None],
            None if dof is None else rows(dof),
            None if dlf is None else dlf[group.slots][None, None],
            (needs[0], needs[1], needs[2]),
        )
        run = choose(f"{block_sparse.OPERATOR} backward", block_sparse.BACKWARD, part, backend)[0].run
        pq, pk, pv = run(part)
        if dq is not None:
            dq[group.queries] = _sum_picks(pq, group, None)
        if dk is not None:
            dk += pk
        if dv is not None:
            dv += pv
    grads = (
        None if dq is None else dq.view(B, H, Nq, D).transpose(1, 2),
        *(None if x is None else _from_flat_blocks(x, problem.k.shape) for x in (dk, dv)),
    )
    return tuple(None if x is None else x.to(problem.q.dtype).contiguous() for x in grads)


def _sum_picks(rows: Tensor, group: Group, weights: Tensor | None) -> Tensor:
    """Sum what the picks of each query hold: rows (1, S, 1, D) -> (queries, D). A bag of embeddings is just that."""
    rows = rows[0, :, 0].to(accumulation_dtype(rows.dtype))
    return F.embedding_bag(
        group.pair, rows, group.bags, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _groups(problem: RoutedProblem) -> Iterator[Group]:
    """Group the picks of as many heads at a time as may be copied at once."""
    B, Nq, H, D = problem.q.shape
    Hk, nK = problem.k.shape[2], problem.routes.shape[3]
    device = problem.q.device
    # (B, H, nK, Nq): picks come out sorted by head and key block
    picks = problem.routes.transpose(2, 3).expand(B, H, nK, Nq).reshape(B * H, nK, Nq)
    copied = picks.sum((1, 2)) * D * problem.q.element_size()
    chunk = torch.cumsum(copied, 0) // CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    sizes = torch.unique_consecutive(chunk, return_counts=True)[1].tolist()
    kv_valid = problem.counts()[:, None].expand(B, Hk, nK).reshape(1, -1).contiguous()
    first = 0
    for heads in sizes:
        head, block, query = picks[first : first + heads].nonzero(as_tuple=True)
        head = head + first
        group = (head - first) * nK + block
        count = torch.bincount(group, minlength=heads * nK)
        rows = -(-count // ROWS)
        row_end = rows.cumsum(0)
        n_rows = int(row_end[-1])
        first += heads
        if not n_rows:
            continue
        rank = torch.arange(group.shape[0], device=device) - (count.cumsum(0) - count)[group]
        pair = (row_end - rows)[group] * ROWS + rank
        row_group = torch.repeat_interleave(torch.arange(heads * nK, device=device), rows)
        row_rank = torch.arange(n_rows, device=device) - (row_end - rows)[row_group]
        flat_head = row_group // nK + first - heads
        kv_head = flat_head // H * Hk + flat_head % H * Hk // H
        every = torch.ones(n_rows, dtype=torch.int32, device=device)
        layout = BlockLayout(
            q_len=n_rows * ROWS, kv_len=B * Hk * nK * problem.kv_block, q_block=ROWS, kv_block=problem.kv_block,
            row_start=torch.arange(n_rows, device=device), n_partial=torch.zeros_like(every), n_full=every,
            col_idx=(kv_head * nK + row_group % nK).to(torch.int32),
            row_of=torch.arange(n_rows, device=device)[None, None],
            q_valid=(count[row_group] - row_rank * ROWS).clamp(max=ROWS).to(torch.int32)[None],
            kv_valid=kv_valid,
        )  # fmt: skip
        at = head * Nq + query
        slots = torch.zeros(n_rows * ROWS, dtype=torch.int64, device=device).index_copy_(0, pair, at)
        # the place of a pick among those of its query is how many key blocks before it the query picked too
        queries = slice((first - heads) * Nq, first * Nq)
        chosen = picks[first - heads : first]
        bags = F.pad(chosen.sum(1).flatten().cumsum(0), (1, 0))
        earlier = chosen.cumsum(1, dtype=torch.int16 if nK < 2**15 else torch.int32)[
            head - (first - heads), block, query
        ]
        sorted_at = bags[at - queries.start] + earlier.long() - 1
        pair = torch.empty_like(pair).index_copy_(0, sorted_at, pair)
        query = torch.empty_like(at).index_copy_(0, sorted_at, at - queries.start)
        yield Group(queries, pair, query, bags, slots, layout)


def _flat_blocks(x: Tensor, block: int) -> Tensor:
    """(B, N, H, D) -> (1, B * H * nK * block, 1, D): the heads one after the other, the last block of each filled up."""
    B, N, H, D = x.shape
    nK = -(-N // block)
    out = x.new_zeros(B, H, nK * block, D)
    out[:, :, :N] = x.transpose(1, 2)
    return out.view(1, -1, 1, D)


def _from_flat_blocks(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo _flat_blocks: (B, N, H, D)."""
    B, N, H, D = shape
    return x.view(B, H, -1, D)[:, :, :N].transpose(1, 2)
