"""Attention to summary tokens: one pooled key and value that stand for a whole block of tokens.

A summary of `count` tokens takes part in the softmax with `log(count)` added to its score, as `count` equal keys would.
Together with the exact blocks of a layout this is one softmax over all keys, some of them summarised: the two parts are
computed apart and merged by their log-sum-exps, which is exact. There are few summaries, so theirs is dense attention in
chunks of queries; scores are never kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import without_autocast
from ..layout import BlockLayout
from .problem import Problem, accumulation_dtype

# Bytes of scores that exist at a time.
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True, eq=False)
class Summary:
    """Pooled keys and values that queries attend to beside their blocks.

    Args:
        k, v: (B, S, Hk, D) summary keys and values.
        log_count: (B|1, S) floating-point, log of the tokens that each one stands for; -inf switches one off.
        include: (B|1, H|1, nQ, S) bool, which summaries each query block sees; None shows all to all.
    """

    k: Tensor
    v: Tensor
    log_count: Tensor
    include: Tensor | None = None

    @classmethod
    def of_blocks(cls, k: Tensor, v: Tensor, layout: BlockLayout) -> Summary:
        """Summarise each key block by its means, for the query blocks that do not visit it.

        Args: k, v (B, Nk, Hk, D) and the layout, as for block_sparse_attention.
        Returns: one summary per key block, with the true counts; gradients reach k and v.
        """
        used = layout.tokens_in_use()[1]
        count = layout.kv_valid
        pad = layout.nK * layout.kv_block - layout.kv_len

        def pooled(x: Tensor) -> Tensor:
            x = torch.nn.functional.pad(x.masked_fill(~used[:, :, None, None], 0.0), (0, 0, 0, 0, 0, pad))
            sums = x.unflatten(1, (layout.nK, layout.kv_block)).sum(2, dtype=accumulation_dtype(x.dtype))
            return (sums / count[:, :, None, None].clamp(min=1)).to(x.dtype)

        return cls(pooled(k), pooled(v), count.to(accumulation_dtype(k.dtype)).log(), ~layout.block_mask())


def check(problem: Problem, summary: Summary) -> None:
    """Raise ValueError or TypeError unless the summary fits the problem."""
    who = "block_sparse_attention"
    if not isinstance(summary, Summary):
        raise TypeError(f"{who}: summary must be a Summary, got {type(summary).__name__}; see Summary.of_blocks.")
    B, S = problem.B, summary.k.shape[1]
    for name, x in (("k", summary.k), ("v", summary.v)):
        if x.shape != (B, S, problem.Hk, problem.D) or x.dtype != problem.q.dtype or x.device != problem.q.device:
            raise ValueError(
                f"{who}: summary.{name} must be (B, S, Hk, D) = ({B}, S, {problem.Hk}, {problem.D}) {problem.q.dtype} on "
                f"{problem.q.device}, like k and v, got {x.dtype} {tuple(x.shape)} on {x.device}."
            )
    if summary.log_count.shape not in ((1, S), (B, S)) or not summary.log_count.is_floating_point():
        raise ValueError(
            f"{who}: summary.log_count must be floating-point (1, S) or (B, S) with S={S}, B={B}, got "
            f"{summary.log_count.dtype} {tuple(summary.log_count.shape)}."
        )
    if summary.include is not None:
        b, h, n, s = summary.include.shape if summary.include.ndim == 4 else (0, 0, 0, 0)
        fits = b in (1, B) and h in (1, problem.H) and (n, s) == (problem.layout.nQ, S)
        if not fits or summary.include.dtype != torch.bool:
            raise ValueError(
                f"{who}: summary.include must be bool (B|1, H|1, nQ, S) = ({B}|1, {problem.H}|1, {problem.layout.nQ}, "
                f"{S}), got {summary.include.dtype} {tuple(summary.include.shape)}."
            )


def attend(problem: Problem, summary: Summary) -> tuple[Tensor, Tensor]:
    """Return attention to the summaries alone, (B, Nq, H, D), and its log-sum-exp, (B, H, Nq)."""
    layout = problem.layout
    out, lse = _forward(
        problem.q,
        summary.k,
        summary.v,
        summary.log_count,
        summary.include,
        layout.q_valid,
        layout.q_block,
        problem.scale,
    )
    return out, lse


class _Chunk(NamedTuple):
    rows: slice  # queries
    q: Tensor  # (B, Hk, group, rows, D)
    bias: Tensor  # (B|1, Hk|1, group|1, rows, S), -inf where nothing is seen


def _chunks(
    q: Tensor, Hk: int, log_count: Tensor, include: Tensor | None, q_valid: Tensor, q_block: int
) -> Iterator[_Chunk]:
    B, Nq, H, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    S = log_count.shape[1]
    heads_first = q.unflatten(2, (Hk, H // Hk)).permute(0, 2, 3, 1, 4)
    blocks = max(1, CHUNK_BYTES // (B * H * q_block * max(S, 1) * dtype.itemsize))
    slots = torch.arange(q_block, device=q.device)
    for first in range(0, q_valid.shape[1], blocks):
        at = slice(first, first + blocks)
        rows = slice(first * q_block, min(Nq, (first + blocks) * q_block))
        used = (slots < q_valid[:, at, None]).flatten(1)[:, : rows.stop - rows.start]  # (B|1, rows)
        bias = log_count.to(dtype)[:, None, None, :].expand(-1, 1, used.shape[1], S)
        seen = used[:, None, :, None]
        if include is not None:
            seen = seen & include[:, :, at].repeat_interleave(q_block, 2)[:, :, : used.shape[1]]
        bias = (
            bias.masked_fill(~seen, -torch.inf)
            if seen.shape[0] <= bias.shape[0]
            else torch.where(seen, bias, -torch.inf)
        )
        bias = bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (Hk, H // Hk))
        yield _Chunk(rows, heads_first[:, :, :, rows].to(dtype), bias)


@torch.library.custom_op("mmeff::summary_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor,
    include: Tensor | None,
    q_valid: Tensor,
    q_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, Nq, H, D = q.shape
    dtype = accumulation_dtype(q.dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H, Nq), dtype=dtype)
    with without_autocast(q.device):
        kt, vh = k.to(dtype).permute(0, 2, 3, 1)[:, :, None], v.to(dtype).permute(0, 2, 1, 3)[:, :, None]
        for chunk in _chunks(q, k.shape[2], log_count, include, q_valid, q_block):
            scores = torch.matmul(chunk.q * scale, kt) + chunk.bias
            part = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - part.masked_fill(part == -torch.inf, 0.0)[..., None])
            result = torch.matmul(weights, vh)  # (B, Hk, group, rows, D)
            out[:, chunk.rows] = result.flatten(1, 2).transpose(1, 2).to(q.dtype)
            lse[:, :, chunk.rows] = part.flatten(1, 2)
    return out, lse


@_forward.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, Nq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Nq), dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("mmeff::summary_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor,
    include: Tensor | None,
    q_valid: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    q_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    Hk = k.shape[2]
    dtype = accumulation_dtype(q.dtype)

    def grouped(x: Tensor) -> Tensor:  # (B, N, H, D) -> (B, Hk, group, N, D)
        return x.to(dtype).unflatten(2, (Hk, -1)).permute(0, 2, 3, 1, 4)

    dq = q.new_empty(q.shape)
    with without_autocast(q.device):
        kh, vh = (x.to(dtype).permute(0, 2, 1, 3)[:, :, None] for x in (k, v))
        dk, dv = torch.zeros_like(kh), torch.zeros_like(vh)
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2) - dlse  # (B, H, Nq)
        for chunk in _chunks(q, Hk, log_count, include, q_valid, q_block):
            part, shift = (x[:, :, chunk.rows].unflatten(1, (Hk, -1))[..., None] for x in (lse, delta))
            scores = torch.matmul(chunk.q * scale, kh.transpose(-1, -2)) + chunk.bias
            weights = torch.exp(scores - part.masked_fill(part == -torch.inf, 0.0))
            do = grouped(dout[:, chunk.rows])
            dv += torch.matmul(weights.transpose(-1, -2), do).sum(2, keepdim=True)
            dscores = torch.where(weights > 0, weights * (torch.matmul(do, vh.transpose(-1, -2)) - shift), 0.0) * scale
            dq[:, chunk.rows] = torch.matmul(dscores, kh).flatten(1, 2).transpose(1, 2).to(q.dtype)
            dk += torch.matmul(dscores.transpose(-1, -2), chunk.q).sum(2, keepdim=True)
    dk, dv = (x[:, :, 0].transpose(1, 2).to(k.dtype).contiguous() for x in (dk, dv))
    return dq, dk, dv


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.q_block, ctx.scale = inputs[6:]


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _backward(*ctx.saved_tensors, dout, dlse, ctx.q_block, ctx.scale)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
