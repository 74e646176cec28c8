"""Selections: forced sets by definition, granularity, and that no part waits for the device or takes bad input.

Scores and budgets have files of their own.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from mmeff.kernels import BlockLayout, block_sparse_attention
from mmeff.kernels.permute import gilbert_permutation
from mmeff.kernels.selection import (
    SCOPES,
    antidiagonal_scores,
    block_self_similarity,
    blocks_holding,
    causal_blocks,
    columns,
    diagonal,
    first_frame,
    key_scores,
    local,
    minmax_cumulative,
    neighbours,
    pool,
    pooled_probabilities,
    pooled_scores,
    query_scores,
    random_k,
    share_group,
    share_rows,
    sink,
    stripe_layout,
    text,
    threshold,
    top_k,
    top_k_with_self,
    top_p,
)

property_test = settings(max_examples=40, deadline=None)


def tensors(B, Nq, Nk, H, Hk, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((B, Nq, H, D), (B, Nk, Hk, D))]


def repeated(k, H):
    return k.repeat_interleave(H // k.shape[2], 2)


def products(q, k):
    return torch.einsum("bqhd,bkhd->bhqk", q, repeated(k, q.shape[2]))


# ---------------------------------------------------------------- forced sets


@property_test
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 7), st.integers(0, 2))
def test_local_and_diagonal_hold_the_own_positions(nQ, nK, q_block, kv_block, offset, width):
    want = torch.zeros(nQ, nK, dtype=torch.bool)
    for i, j in itertools.product(range(nQ), range(nK)):
        own = {(offset + t) // kv_block for t in range(i * q_block, (i + 1) * q_block)}
        want[i, j] = any(abs(j - o) <= width for o in own)
    sizes = {"q_block": q_block, "kv_block": kv_block, "offset": offset}
    assert torch.equal(local(nQ, nK, width, **sizes), want[None, None])
    assert torch.equal(diagonal(nQ, nK, **sizes), local(nQ, nK, 0, **sizes))


def test_the_diagonal_leaves_no_row_empty():
    for N, q_block, kv_block in itertools.product((1, 17, 64), (16, 5), (16, 7)):
        mask = diagonal(-(-N // q_block), -(-N // kv_block), q_block=q_block, kv_block=kv_block)
        layout = BlockLayout.from_block_mask(mask, q_len=N, kv_len=N, q_block=q_block, kv_block=kv_block)
        assert torch.eye(N, dtype=torch.bool).le(layout.to_dense_mask()[0, 0]).all(), "every token sees itself"


def test_columns_sink_and_first_frame():
    assert columns(5, [0, -1]).tolist() == [[[[True, False, False, False, True]]]]
    assert columns(5, slice(3, None)).flatten().tolist() == [False] * 3 + [True] * 2
    marked = torch.tensor([False, True, False])
    assert torch.equal(columns(3, marked).flatten(), marked)
    assert columns(3, marked, device="meta").device.type == "meta"
    assert sink(4, 2).flatten().tolist() == [True, True, False, False] and sink(2, 5).all() and not sink(2, 0).any()
    got = first_frame(4, 5, 2)
    assert got.shape == (1, 1, 4, 5) and got.sum() == 4 and got[0, 0, :2, :2].all()


def test_text_blocks_straddle():
    got = text(21, 6, q_block=8, kv_block=4)[0, 0]  # text from token 15: query block 1, key block 3
    assert got.shape == (3, 6)
    assert got[0].tolist() == [False] * 3 + [True] * 3 and got[1:].all()
    assert not text(21, 0, q_block=8, kv_block=4).any()


def test_forced_sets_combine_with_a_budget():
    q, k = tensors(2, 40, 40, 4, 2, 8)
    picked = top_k(pooled_scores(q, k, 8, 8), 1)
    mask = picked | diagonal(5, 5) | sink(5) | text(40, 3, q_block=8, kv_block=8)
    assert mask.shape == (2, 4, 5, 5) and picked.le(mask).all() and mask[:, :, 4].all() and mask[..., 0].all()
    layout = BlockLayout.from_block_mask(mask, q_len=40, kv_len=40, q_block=8, kv_block=8)
    assert torch.equal(layout.block_mask(), mask)


@property_test
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_blocks_holding(N, block, seed):
    tokens = torch.rand(2, N, generator=torch.Generator().manual_seed(seed)) < 0.2
    got = blocks_holding(tokens, block)
    assert got.tolist() == [[any(row[i : i + block]) for i in range(0, N, block)] for row in tokens.tolist()]


@pytest.mark.parametrize("grid", [(7,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("permuted", [False, True])
def test_neighbours_share_touching_tokens(grid, permuted):
    N, block = math.prod(grid), 4
    order = gilbert_permutation(grid)
    position = order.inverse if permuted else None
    where = order.inverse.tolist() if permuted else list(range(N))
    n = -(-(N + 6) // block)
    want = torch.eye(n, dtype=torch.bool)
    points = list(itertools.product(*map(range, grid)))
    for (a, x), (b, y) in itertools.product(enumerate(points), repeat=2):
        if max(abs(u - v) for u, v in zip(x, y, strict=True)) <= 1:
            want[where[a] // block, where[b] // block] = True
    got = neighbours(grid, block, position=position, length=N + 6)
    assert torch.equal(got[0, 0], want) and not want.all()
    short = neighbours(grid, block, position=position)
    m = -(-N // block)
    assert torch.equal(short[0, 0], want[:m, :m])


@property_test
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.integers(0, 15))
def test_causal_blocks(Nq, Nk, q_block, kv_block, offset):
    sees = torch.arange(Nk) <= offset + torch.arange(Nq)[:, None]
    nQ, nK = -(-Nq // q_block), -(-Nk // kv_block)
    got = causal_blocks(nQ, nK, q_block, kv_block, offset, q_len=Nq, kv_len=Nk)
    for i, j in itertools.product(range(nQ), range(nK)):
        part = sees[i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
        assert got.visible[0, 0, i, j] == part.any() and got.full[0, 0, i, j] == part.all()
    whole = causal_blocks(nQ, nK, q_block, kv_block, offset)
    same = causal_blocks(nQ, nK, q_block, kv_block, offset, q_len=nQ * q_block, kv_len=nK * kv_block)
    assert torch.equal(whole.visible, same.visible) and torch.equal(whole.full, same.full)


# ---------------------------------------------------------------- granularity and sharing


def test_a_stripe_layout_attends_to_the_selected_keys():
    q, k = tensors(1, 20, 30, 2, 2, 8)
    selected = top_k(key_scores(q, k, 8), 5)
    layout = stripe_layout(selected, q_len=20, q_block=8)
    assert (layout.kv_block, layout.kv_len, layout.q_block) == (1, 30, 8)
    dense = selected.repeat_interleave(8, 2)[:, :, :20]
    assert torch.equal(layout.to_dense_mask(), dense)
    out = block_sparse_attention(q, k, k, layout)
    want = torch.softmax((products(q, k) * 8**-0.5).masked_fill(~dense, -torch.inf), -1)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", want, k))
    assert torch.equal(blocks_holding(selected, 10)[0, 0, 0], selected[0, 0, 0].view(3, 10).any(-1))
    with pytest.raises(ValueError, match="stripe_layout: selected must be"):
        stripe_layout(selected[0], q_len=20, q_block=8)
    empty = torch.zeros(3, 30, dtype=torch.bool)
    assert stripe_layout(empty, q_len=20, q_block=8, allow_empty_rows=True).density == 0


def test_share_group():
    x = torch.tensor([1.0, 2, 3, -math.inf]).view(1, 4, 1, 1)
    assert share_group(x, 2, "sum").flatten().tolist() == [3, -math.inf]
    assert share_group(x, 2, "max").flatten().tolist() == [2, 3]
    assert share_group(x > 2, 2, "any").flatten().tolist() == [False, True]
    assert torch.equal(share_group(x, 4, "sum"), x)


def test_rows_shared_over_a_group_cost_nothing():
    q, k = tensors(2, 24, 24, 4, 2, 8)
    mask = top_k(share_group(pooled_scores(q, k, 8, 8), 2, "sum"), 2)
    layout = BlockLayout.from_block_mask(mask, q_len=24, kv_len=24, q_block=8, kv_block=8)
    wide = share_rows(layout, 4)
    assert torch.equal(wide.block_mask(), mask.repeat_interleave(2, 1))
    assert wide.col_idx.data_ptr() == layout.col_idx.data_ptr()


# ---------------------------------------------------------------- no waiting for the device


def every_part(q, k):
    """Call everything that a method calls at every step."""
    B, N, H, D = q.shape
    valid = torch.full((B, 5), 8, device=q.device)
    block = pooled_scores(q, k, 8, 8, q_valid=valid, kv_valid=valid)
    shares = pooled_probabilities(q, k, 8, 8, isolated=k[:, :5], isolated_mask=k[:, :5, 0, 0] > 0, isolated_block=2)
    strided = antidiagonal_scores(q, k, 8, 4, offset=0)
    routed, stripes = query_scores(q, k, 8, kv_valid=valid), key_scores(q, k, 8)
    own = torch.arange(5, device=q.device) == torch.arange(N, device=q.device)[:, None] // 8
    forced = diagonal(5, 5, device=q.device) | sink(5, device=q.device) | local(5, 5, 1, device=q.device)
    forced = forced | text(N, 3, q_block=8, kv_block=8, device=q.device) | first_frame(5, 5, 2, device=q.device)
    masks = [
        top_k(block, 2) | forced & causal_blocks(5, 5, 8, 8, device=q.device).visible,
        top_k(block, valid[:, :1, None].int(), axes=(-1,)),
        top_p(shares, 0.5, at_least=2),
        top_p(strided, 0.9, axes=(1, -1)),
        threshold(strided, strided.mean(-1, keepdim=True)),
        top_k(stripes, 7),
        blocks_holding(stripes > 0, 8),
        share_group(block > 0, 2, "any"),
        block_self_similarity(q, 8, valid) > 0.5,
        *(minmax_cumulative(routed, 0.25, own=own, axes=axes) for axes in SCOPES.values()),
        top_k_with_self(routed, 2, own=own, axes=(-2, -1)),
    ]
    assert all(mask.dtype == torch.bool for mask in masks)
    return masks


def test_no_part_depends_on_values_on_the_way():
    with FakeTensorMode():  # refuses .item(), nonzero and every other look at a value
        q, k = torch.empty(2, 40, 4, 8), torch.empty(2, 40, 2, 8)
        with pytest.raises(DynamicOutputShapeException):
            (q > 0).nonzero()
        with pytest.raises(DataDependentOutputException):
            q.sum().item()
        shapes_of_fakes = [mask.shape for mask in every_part(q, k)]
    assert shapes_of_fakes == [mask.shape for mask in every_part(*tensors(2, 40, 40, 4, 2, 8))]


@pytest.mark.gpu
def test_the_device_is_never_waited_for():
    q, k = (x.cuda() for x in tensors(2, 40, 40, 4, 2, 8))
    want = every_part(q.cpu(), k.cpu())
    every_part(q, k)  # what the first call of a library allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = every_part(q, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [mask.shape for mask in got] == [mask.shape for mask in want]


def test_batch_rows_and_heads_are_independent():
    q, k = tensors(3, 40, 40, 4, 2, 8)
    want = every_part(q, k)
    q[1], k[2] = 1e3, torch.nan
    for got, mask in zip(every_part(q, k), want, strict=True):
        if mask.shape[0] == 3:
            assert torch.equal(got[0], mask[0])


# ---------------------------------------------------------------- bad input

Q, K = tensors(2, 16, 24, 4, 2, 8)
S = torch.zeros(2, 4, 3, 5)
OWN = torch.zeros(3, 5, dtype=torch.bool)
G = torch.Generator()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pool(Q[0], 8), ValueError, r"pool: x must be \(B, N, H, D\).*got shape \(16, 4, 8\)"),
        (lambda: pool(Q.long(), 8), TypeError, r"x must be a floating-point tensor, got torch.int64"),
        (lambda: pool(Q[:, :0], 8), ValueError, r"no empty dimension"),
        (lambda: pool(Q, 0), ValueError, r"block must be >= 1 \(tokens\), got 0"),
        (lambda: pool(Q, 8.0), TypeError, r"block must be an int \(tokens\), got float 8.0"),
        (
            lambda: pool(Q, 8, torch.ones(2, 3).int()),
            ValueError,
            r"valid must be \(blocks,\) = \(2,\) or.*got \(2, 3\)",
        ),
        (lambda: pool(Q, 8, torch.ones(2)), TypeError, r"valid must be an int32 or int64 tensor.*got torch.float32"),
        (lambda: pooled_scores(Q, K[:1], 8, 8), ValueError, r"must agree in batch.*\(2, 16, 4, 8\).*\(1, 24, 2, 8\)"),
        (lambda: pooled_scores(Q, K.half(), 8, 8), ValueError, r"dtype and device, got q torch.float32.*torch.float16"),
        (lambda: pooled_scores(Q[:, :, :3], K, 8, 8), ValueError, r"multiple of those of k, got 3 and 2"),
        (
            lambda: pooled_scores(Q, K, 8, 8, scale=math.nan),
            ValueError,
            r"scale must be a finite Python float, got nan",
        ),
        (lambda: query_scores(Q, K, 8, scale=S), ValueError, r"query_scores: scale must be a finite"),
        (lambda: key_scores(Q, K, True), TypeError, r"block must be an int \(tokens\), got bool True"),
        (
            lambda: pooled_probabilities(Q, K, 8, 8, isolated_block=4),
            ValueError,
            r"isolated_mask and isolated_block describe isolated keys, but isolated is None",
        ),
        (
            lambda: pooled_probabilities(Q, K, 8, 8, isolated=Q[:, :3]),
            ValueError,
            r"isolated must have the 2 heads of k, got 4",
        ),
        (
            lambda: pooled_probabilities(Q, K, 8, 8, isolated=K[:, :3], isolated_mask=torch.ones(2, 4).bool()),
            ValueError,
            r"isolated_mask must be bool of shape \(B\|1, T\) = \(2\|1, 3\).*got torch.bool \(2, 4\)",
        ),
        (
            lambda: pooled_probabilities(Q, K, 8, 8, isolated=K[:, :3], isolated_block=0),
            ValueError,
            r"isolated_block must be >= 1",
        ),
        (lambda: antidiagonal_scores(Q, K, 8, 3), ValueError, r"stride must divide block = 8, got 3"),
        (lambda: antidiagonal_scores(Q, K, 8, 4, offset=-1), ValueError, r"offset must be >= 0"),
        (lambda: top_k(S.long(), 1), TypeError, r"scores must be a floating-point tensor, got torch.int64"),
        (lambda: top_k(S[..., :0], 1), ValueError, r"no empty one, got shape \(2, 4, 3, 0\)"),
        (lambda: top_k(S, -1), ValueError, r"k must be >= 0 \(entries\), got -1"),
        (lambda: top_k(S, 0.5), TypeError, r"k must be an int \(entries\), got float 0.5"),
        (lambda: top_k(S, torch.ones(3, 4).int()), ValueError, r"k must broadcast to the groups, \(2, 4, 3\)"),
        (
            lambda: top_k(S, torch.ones(3)),
            TypeError,
            r"k must be an int or an int32 or int64 tensor, got torch.float32",
        ),
        (lambda: top_k(S, 1, axes=(-1, 3)), ValueError, r"axes must be a tuple of different axes.*got \(-1, 3\)"),
        (lambda: top_k(S, 1, axes=(4,)), ValueError, r"in \[-4, 4\), got \(4,\)"),
        (lambda: top_k(S, 1, axes=-1), ValueError, r"axes must be a tuple.*got -1"),
        (lambda: top_p(S, 1.5), ValueError, r"p must be in \[0, 1\], a share of the total, got 1.5"),
        (lambda: top_p(S, True), TypeError, r"p must be a float in \[0, 1\], got bool True"),
        (lambda: top_p(S, 0.5, at_least=-1), ValueError, r"at_least must be >= 0"),
        (
            lambda: threshold(S, torch.zeros(4)),
            ValueError,
            r"t must broadcast to the scores, \(2, 4, 3, 5\).*got \(4,\)",
        ),
        (lambda: threshold(S, math.nan), TypeError, r"t must be a number or a tensor, got float nan"),
        (lambda: minmax_cumulative(S, -0.1, own=OWN), ValueError, r"tau must be in \[0, 1\].*got -0.1"),
        (lambda: minmax_cumulative(S, 0.1, own=OWN.long()), TypeError, r"own must be a bool tensor, got a torch.int64"),
        (
            lambda: minmax_cumulative(S, 0.1, own=OWN, valid=OWN[:2]),
            ValueError,
            r"valid must broadcast to \(2, 4, 3, 5\).*got \(2, 5\)",
        ),
        (
            lambda: top_k_with_self(S, 2, own=OWN, axes=SCOPES["block"]),
            ValueError,
            r"axes must contain the last one.*got \(-3, -2\)",
        ),
        (lambda: top_k_with_self(S, 0, own=OWN), ValueError, r"k must be >= 1 \(blocks per query\), got 0"),
        (lambda: random_k(S, 1, generator=G), TypeError, r"candidates must be a bool tensor.*got a torch.float32"),
        (lambda: random_k(S > 0, 1, generator=3), TypeError, r"generator must be a torch.Generator, got int"),
        (lambda: local(3, 3, -1), ValueError, r"local: width must be >= 0 \(blocks to each side\), got -1"),
        (lambda: diagonal(0, 3), ValueError, r"nQ must be >= 1 \(query blocks\), got 0"),
        (lambda: columns(3, [3]), ValueError, r"blocks must lie in \[-3, 3\), got 3"),
        (lambda: columns(3, [1.0]), TypeError, r"blocks must be integers, a slice or a bool tensor, got 1.0"),
        (lambda: columns(3, torch.tensor([1])), ValueError, r"bool of shape \(nK,\) = \(3,\), got torch.int64 \(1,\)"),
        (lambda: sink(3, -1), ValueError, r"sink: n must be >= 0"),
        (lambda: first_frame(3, 3, -1), ValueError, r"first_frame: blocks must be >= 0"),
        (lambda: text(8, 9, q_block=4, kv_block=4), ValueError, r"text_len must be <= length = 8 tokens, got 9"),
        (lambda: blocks_holding(S, 4), TypeError, r"tokens must be a bool tensor.*got torch.float32"),
        (lambda: neighbours((2, 2, 2, 2), 4), ValueError, r"grid must have 1 to 3 extents"),
        (lambda: neighbours((2, 2), 4, length=3), ValueError, r"length must be >= 4"),
        (
            lambda: neighbours((2, 2), 4, position=torch.zeros(3).long()),
            ValueError,
            r"\(N,\) = \(4,\).*got torch.int64",
        ),
        (lambda: causal_blocks(2, 2, 8, 8, q_len=17), ValueError, r"q_len must make 2 blocks of 8 tokens, got 17"),
        (lambda: causal_blocks(2, 2, 8, 8, -1), ValueError, r"offset must be >= 0"),
        (lambda: share_group(S, 2, "mean"), ValueError, r"how must be one of 'sum', 'max', 'any', got 'mean'"),
        (lambda: share_group(S, 2, "any"), TypeError, r"how='any' needs a bool mask, got torch.float32"),
        (lambda: share_group(S > 0, 2, "sum"), TypeError, r"how='sum' needs floating-point scores, got torch.bool"),
        (lambda: share_group(S, 3, "sum"), ValueError, r"H a multiple of Hk = 3, got shape \(2, 4, 3, 5\)"),
    ],
)
def test_bad_input_is_refused_with_its_values(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_share_rows_refuses_heads_that_do_not_fit():
    layout = BlockLayout.from_block_mask(torch.ones(1, 2, 1, 1).bool(), q_len=4, kv_len=4, q_block=4, kv_block=4)
    with pytest.raises(ValueError, match="H must be a multiple of the layout's 2 heads, got 3"):
        share_rows(layout, 3)
