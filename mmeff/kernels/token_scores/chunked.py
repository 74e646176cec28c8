"""token_scores in plain PyTorch: a chunk of the scores at a time, small enough for the last-level cache.

A chunk is some rows of some key heads of one sequence. The query heads of a group are stacked on their key head, so
that keys are never repeated, and where keys have the dtype of the scores they are read in place, never copied. Inside a
chunk PyTorch's softmax runs even under a given LSE, because it is twice as fast on CPU as an exponential and what is
between the two is one factor per row; factors and weights are applied by the vector-matrix product that sums the rows.
On CPU, where looking at positions and masks costs nothing, keys beyond the last position of a chunk are not computed,
and only the keys that its rows disagree about are masked.

The backward pass recomputes the chunks and keeps nothing but the inputs and the log-sum-exp in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import Backend
from .problem import BackwardProblem, Gradients, Problem

# Bytes of scores in one chunk, which exist twice: before and after the softmax. On CPU per thread, up to a limit: of 1/4, 1/2,
# 1, 2 and 8 MiB on two threads of an EPYC with 32 MiB of L3 (float32; 63 rows of 16 heads on 208 to 640 keys, 32 and 256 rows
# of 32 heads on 2880), 2 took 10 to 15 % less than 8 throughout, and less ones lost at 256 rows. Elsewhere few and large
# launches win.
CHUNK_BYTES_PER_THREAD = 2 * 2**20
CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_DEVICE = 256 * 2**20


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the column sums, and the log-sum-exp that normalises each row over the keys it sees."""
    B, R, Hk, group, Nk = problem.B, problem.R, problem.Hk, problem.group, problem.Nk
    total = problem.k.new_zeros(B, Hk, group, Nk, dtype=problem.dtype)
    lse = problem.k.new_full((B, Hk, group, R), -torch.inf, dtype=problem.dtype)
    given = None if problem.lse is None else _never_minus_inf(problem.lse.to(problem.dtype).unflatten(1, (Hk, group)))
    for chunk in _chunks(problem, given):
        p, own = chunk.softmax(problem, with_lse=given is not None or problem.keep_lse)
        if own is not None:
            lse[chunk.rows] = own
        weights = p.new_ones(p.shape[:-1]) if own is None or given is None else torch.exp(own - given[chunk.rows])
        if chunk.weights is not None:
            weights = weights * chunk.weights
        columns = torch.bmm(weights.flatten(0, 1)[:, None], p.flatten(0, 1))
        total[chunk.b, chunk.heads, :, : chunk.keys] += columns.view(*p.shape[:2], chunk.keys)
    return total.flatten(1, 2), lse.flatten(1, 2)


def backward(problem: BackwardProblem) -> Gradients:
    """Recompute each chunk and push the gradient of the column sums through it."""
    forward, centred = problem.forward, problem.centred
    need_q, need_k, need_rows = problem.needs
    B, R, D, Hk, group, Nk = forward.B, forward.R, forward.D, forward.Hk, forward.group, forward.Nk
    lse = _never_minus_inf(problem.lse.to(forward.dtype).unflatten(1, (Hk, group)))
    grad = problem.grad.unflatten(1, (Hk, group))
    blank = forward.k.new_zeros
    dq = blank(B, Hk, group, R, D, dtype=forward.dtype) if need_q else None
    dk = blank(B, Hk, Nk, D, dtype=forward.dtype) if need_k else None
    per_row = blank(B, Hk, group, R, dtype=forward.dtype)
    for chunk in _chunks(forward, lse, blank_keys=True):
        here = chunk.rows
        p, own = chunk.softmax(forward)
        assert own is not None
        g = grad[chunk.b, chunk.heads, :, : chunk.keys]
        factor = None if centred else torch.exp(own - lse[here])
        if need_rows or centred:
            expected = torch.bmm(p.flatten(0, 1), g.flatten(0, 1)[..., None]).view(own.shape)
            per_row[here] = expected if factor is None else expected * factor
        if not (need_q or need_k):
            continue
        dscores = p.mul_(g[:, :, None] - expected[..., None] if centred else g[:, :, None]).flatten(1, 2)
        # factors of a row go onto q and dq, which are smaller than the scores
        weights = torch.ones_like(own) if factor is None else factor
        weights = (weights if chunk.weights is None else weights * chunk.weights)[..., None]
        if dq is not None:
            dq[here] = torch.bmm(dscores, chunk.k).view(*own.shape, D) * (weights * forward.scale)
        if dk is not None:  # chunk.q is scaled
            dk_chunk = dk[chunk.b, chunk.heads, : chunk.keys]
            dk_chunk.baddbmm_(dscores.transpose(1, 2), (chunk.q * weights).flatten(1, 2))
    return Gradients(
        dq=None if dq is None else dq.flatten(1, 2).transpose(1, 2),
        dk=None if dk is None else dk.transpose(1, 2),
        per_row=per_row.flatten(1, 2) if need_rows else None,
    )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows `r` of key heads `heads` of sequence `b`, and the first `keys` keys; none of its rows sees a later one."""

    b: int
    heads: slice
    r: slice
    keys: int
    agreed: int  # the first keys, on which the row positions agree: all rows reach them
    q: Tensor  # (heads, group, rows, D), scaled
    k: Tensor  # (heads, keys, D)
    weights: Tensor | None  # (heads|1, group|1, rows)
    key_mask: Tensor | None  # (keys,) bool, None if all are visible
    buffer: Tensor  # (2, ...) memory for the scores and their softmax, reused by every chunk

    @property
    def rows(self) -> tuple[int, slice, slice, slice]:
        """Where these rows are in a (B, Hk, group, R, ...) tensor."""
        return self.b, self.heads, slice(None), self.r

    def softmax(self, problem: Problem, *, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return the softmax of the scores, (heads, group, rows, keys), and their log-sum-exp, (heads, group, rows).

        Rows that see nothing give 0 and -inf. Without `with_lse` it may be None, which saves two looks at all scores.
        """
        h, group, rows, _ = self.q.shape
        flat, out = self.buffer[:, : h * group * rows * self.keys].view(2, h, group * rows, self.keys)
        scores = torch.bmm(self.q.flatten(1, 2), self.k.transpose(1, 2), out=flat).view(h, group, rows, self.keys)
        if problem.positions is not None and self.agreed < self.keys:
            positions = problem.positions[min(self.b, len(problem.positions) - 1), self.r]
            unseen = torch.arange(self.agreed, self.keys, device=scores.device) > positions[:, None]
            scores[..., self.agreed :].masked_fill_(unseen, -torch.inf)
        if self.key_mask is not None:
            scores.masked_fill_(~self.key_mask, -torch.inf)
        p = torch.softmax(scores, -1, out=out.view(scores.shape))
        every_row_sees = self.key_mask is None and self.agreed > 0  # the first key, at least
        if every_row_sees and not with_lse:
            return p, None
        top = scores.amax(-1)
        if every_row_sees:
            return p, top - p.amax(-1).log()
        blind = top == -torch.inf
        p.masked_fill_(blind[..., None], 0.0)
        return p, (top - p.amax(-1).log()).masked_fill_(blind, -torch.inf)


def _chunks(problem: Problem, lse: Tensor | None, *, blank_keys: bool = False) -> Iterator[Chunk]:
    """Cut the problem into chunks.

    Rows whose LSE (B, Hk, group, R) is known to be +inf see nothing and are read as 0, and so, with `blank_keys`, are
    keys that no row sees: whatever they hold, 0 * NaN would let it out.
    """
    B, R, Hk, group, Nk = problem.B, problem.R, problem.Hk, problem.group, problem.Nk
    if R == 0:
        return
    on_cpu = problem.k.device.type == "cpu"
    on_threads = min(CHUNK_BYTES_PER_THREAD * torch.get_num_threads(), CHUNK_BYTES_CPU)
    budget = on_threads if on_cpu else CHUNK_BYTES_DEVICE
    per_row = group * Nk * problem.dtype.itemsize
    heads_step = min(Hk, max(1, budget // (per_row * R)))
    rows_step = min(R, max(1, budget // per_row))
    buffer = problem.k.new_empty(2, heads_step * group * rows_step * Nk, dtype=problem.dtype)
    weights = None if problem.weights is None else _grouped_weights(problem.weights.to(problem.dtype), Hk, group)
    for b in range(B):
        reach = None if problem.positions is None else problem.positions[min(b, len(problem.positions) - 1)]
        mask = None if problem.key_mask is None else problem.key_mask[b]
        if on_cpu and mask is not None and bool(mask.all()):
            mask = None
        seen = _seen_by_any_row(reach, mask, Nk) if blank_keys else None
        for head in range(0, Hk, heads_step):
            heads = slice(head, min(head + heads_step, Hk))
            k = problem.k[b, :, heads].transpose(0, 1).to(problem.dtype)
            if seen is not None:
                k = k.masked_fill(~seen[:, None], 0.0)
            for row in range(0, R, rows_step):
                r = slice(row, min(row + rows_step, R))
                agreed, keys = _span(reach[r], Nk, on_cpu) if reach is not None else (Nk, Nk)
                if keys == 0:
                    continue  # none of these rows sees anything
                q = problem.q[b, r].unflatten(1, (Hk, group))[:, heads].permute(1, 2, 0, 3).to(problem.dtype)
                q = (q * problem.scale).contiguous()
                if lse is not None:
                    q = q.masked_fill(lse[b, heads, :, r, None] == torch.inf, 0.0)
                w = None if weights is None else _at(weights, b, heads)[..., r]
                yield Chunk(b, heads, r, keys, agreed, q, k[:, :keys], w, None if mask is None else mask[:keys], buffer)


def _span(reach: Tensor, Nk: int, on_cpu: bool) -> tuple[int, int]:
    """How many first keys all of these rows reach, and how many any of them does; off CPU without looking."""
    if not on_cpu:
        return 0, Nk
    low, high = torch.aminmax(reach)
    return min(max(int(low) + 1, 0), Nk), min(max(int(high) + 1, 0), Nk)


def _seen_by_any_row(reach: Tensor | None, mask: Tensor | None, Nk: int) -> Tensor | None:
    """(Nk,) bool, or None for all."""
    if reach is None:
        return mask
    reached = torch.arange(Nk, device=reach.device) <= reach.amax()
    return reached if mask is None else reached & mask


def _grouped_weights(weights: Tensor, Hk: int, group: int) -> Tensor:
    """(B|1, H|1, R) -> (B|1, Hk|1, group|1, R)."""
    return weights[:, :, None] if weights.shape[1] == 1 else weights.unflatten(1, (Hk, group))


def _at(weights: Tensor, b: int, heads: slice) -> Tensor:
    """The weights of one sequence and some key heads, where a dimension of 1 is shared."""
    weights = weights[min(b, len(weights) - 1)]
    return weights if len(weights) == 1 else weights[heads]


def _never_minus_inf(lse: Tensor) -> Tensor:
    """+inf for -inf, so that a row that saw nothing gives exp(score - inf) = 0 and not exp(-inf + inf) = NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _cost(problem: Problem) -> float:
    # CPU: 0.50, 0.59 and 0.63 of scaled_dot_product_attention for 1, 32 and 256 rows (one thread, N 2880, 32 heads, D 128).
    # Elsewhere the scores pass through memory a few times, where fused attention never writes them: an estimate.
    return 0.6 if problem.k.device.type == "cpu" else 2.0


FORWARD: Backend[Problem] = Backend(
    name="chunked",
    summary="cache-sized chunks of the scores in PyTorch",
    why_not=lambda problem: None,
    cost=_cost,
    run=run,
)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="chunked",
    summary="cache-sized chunks of the scores in PyTorch",
    why_not=lambda problem: None,
    cost=lambda problem: _cost(problem.forward),
    run=backward,
)
