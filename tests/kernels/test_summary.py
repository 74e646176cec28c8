"""Summary tokens: pooled keys and values in the same softmax as the exact blocks."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_close_to_reference

from mmeff.kernels import BlockLayout, block_sparse_attention
from mmeff.kernels.block_sparse import Summary, summary


def problem(seed=0, B=2, Nq=50, Nk=70, H=4, Hk=2, D=24, block=16, dtype=torch.float32, **changes):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, Nq, H, D), (B, Nk, Hk, D), (B, Nk, Hk, D)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    mask = torch.rand(B, H, -(-Nq // block), -(-Nk // block), generator=g) < 0.5
    layout = BlockLayout.from_block_mask(
        mask, q_len=Nq, kv_len=Nk, q_block=block, kv_block=block, allow_empty_rows=True, **changes
    )
    return q, k, v, layout


def plain(q, k, v, layout):
    """One softmax over the visited keys and the means of the other blocks, with autograd, in the dtype of q."""
    B, Nq, H, D = q.shape
    block, nK = layout.kv_block, layout.nK
    k, v = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    used = layout.tokens_in_use()[1].to(q.dtype)[:, :, None, None]

    def pooled(x):
        x = torch.nn.functional.pad(x * used, (0, 0, 0, 0, 0, nK * block - x.shape[1]))
        return x.view(B, nK, block, H, D).sum(2) / layout.kv_valid.clamp(min=1)[:, :, None, None]

    keys, values = torch.cat((k, pooled(k)), 1), torch.cat((v, pooled(v)), 1)
    unvisited = ~layout.block_mask().repeat_interleave(layout.q_block, 2)[:, :, :Nq]
    sees = torch.cat((layout.to_dense_mask(), unvisited.expand(B, H, Nq, nK)), -1)
    bias = torch.cat((torch.zeros(B, k.shape[1]), layout.kv_valid.expand(B, nK).log()), -1).to(q.dtype)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / math.sqrt(D) + bias[:, None, None]
    scores = scores.masked_fill(~sees, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), values), torch.logsumexp(scores, -1)


def results(attend, q, k, v):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v)
    g = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=g).to(out.dtype)).sum()
    loss = loss + (lse * torch.randn(lse.shape, generator=g).to(lse.dtype)).sum()
    return (out, lse, *torch.autograd.grad(loss, (q, k, v)))


@pytest.mark.parametrize("chunk", [1, 2**25])
@pytest.mark.parametrize("padded", [False, True])
def test_against_one_softmax_over_everything(monkeypatch, chunk, padded):
    monkeypatch.setattr(summary, "CHUNK_BYTES", chunk)
    changes = {"kv_valid": torch.tensor([16, 3, 16, 9, 6])} if padded else {}
    q, k, v, layout = problem(**changes)

    def ours(q, k, v):
        return block_sparse_attention(q, k, v, layout, summary=Summary.of_blocks(k, v, layout), return_lse=True)

    actual, same = results(ours, q, k, v), results(lambda *x: plain(*x, layout), q, k, v)
    reference = results(lambda *x: plain(*x, layout), q.double(), k.double(), v.double())
    for name, a, p, r in zip(("out", "lse", "dq", "dk", "dv"), actual, same, reference, strict=True):
        assert_close_to_reference(a, p, r, name=name, times=4.0)  # merged from two parts: two more roundings


def test_summaries_of_single_tokens_are_dense_attention():
    q, k, v, layout = problem(block=1)
    out = block_sparse_attention(q, k, v, layout, summary=Summary.of_blocks(k, v, layout))
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, dense)


def test_a_switched_off_summary_changes_nothing():
    q, k, v, layout = problem()
    full = layout | ~layout
    off = Summary(k[:, :3], v[:, :3] * torch.nan_to_num(torch.tensor(float("inf"))), torch.full((1, 3), -torch.inf))
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, full, summary=off), block_sparse_attention(q, k, v, full)
    )


def test_queries_not_in_use_see_no_summary_either():
    q, k, v, layout = problem(q_valid=torch.tensor([16, 7, 0, 2]))
    out, lse = block_sparse_attention(q, k, v, layout, summary=Summary.of_blocks(k, v, layout), return_lse=True)
    unused = ~layout.tokens_in_use()[0][0]
    assert (out[:, unused] == 0).all() and (lse[:, :, unused] == -torch.inf).all()
    assert lse[:, :, ~unused].isfinite().all()


def test_one_graph_and_a_sound_operator():
    q, k, v, layout = problem()

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, layout, summary=Summary.of_blocks(k, v, layout), backend="gather")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    pooled = Summary.of_blocks(k, v, layout)
    leaves = [x.detach().requires_grad_() for x in (q, pooled.k, pooled.v)]
    torch.library.opcheck(
        torch.ops.mmeff.summary_attention,
        (*leaves, pooled.log_count, pooled.include, layout.q_valid, layout.q_block, 0.2),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 8)}, ValueError, r"summary.k must be \(B, S, Hk, D\) = \(2, S, 2, 24\)"),
        ({"log_count": torch.zeros(5)}, ValueError, r"log_count must be floating-point \(1, S\) or \(B, S\) with S=5"),
        ({"include": torch.ones(1, 1, 3, 5)}, ValueError, r"include must be bool .*torch.float32 \(1, 1, 3, 5\)"),
    ],
)
def test_bad_summaries_are_named(change, error, message):
    q, k, v, layout = problem()
    good = {name: getattr(Summary.of_blocks(k, v, layout), name) for name in ("k", "v", "log_count", "include")}
    with pytest.raises(error, match=message):
        block_sparse_attention(q, k, v, layout, summary=Summary(**{**good, **change}))
    with pytest.raises(TypeError, match="summary must be a Summary, got Tensor"):
        block_sparse_attention(q, k, v, layout, summary=k)
