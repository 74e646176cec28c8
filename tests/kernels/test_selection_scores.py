"""Scores of a selection: against plain loops in float64, and with padding full of NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_close_to_reference

from mmeff.kernels.permute import padded_tiles
from mmeff.kernels.selection import (
    antidiagonal_scores,
    block_self_similarity,
    causal_blocks,
    key_scores,
    pool,
    pooled_probabilities,
    pooled_scores,
    query_scores,
    scores,
    top_k,
)


def tensors(B, Nq, Nk, H, Hk, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((B, Nq, H, D), (B, Nk, Hk, D))]


def blocks_of(x, block, valid=None):
    """The tokens of each block in use, one list of tensors (tokens, H, D) per batch row."""
    n = -(-x.shape[1] // block)
    rows = []
    for b in range(x.shape[0]):
        parts = [x[b, i * block : (i + 1) * block] for i in range(n)]
        if valid is not None:
            parts = [part[: max(0, int(c))] for part, c in zip(parts, valid.expand(x.shape[0], n)[b], strict=True)]
        rows.append(parts)
    return rows


def pool_by_hand(x, block, valid=None):
    means = [[p.mean(0) if len(p) else torch.zeros_like(x[0, 0]) for p in row] for row in blocks_of(x, block, valid)]
    return torch.stack([torch.stack(row) for row in means])


def repeated(k, H):
    return k.repeat_interleave(H // k.shape[2], 2)


def products(q, k):
    return torch.einsum("bqhd,bkhd->bhqk", q, repeated(k, q.shape[2]))


def check(function, plain, *inputs, name=""):
    """function(*inputs) against plain in float64, judged by plain in the dtype of the inputs."""
    reference = plain(*(x.double() for x in inputs))
    same_dtype = plain(*(x.float() if x.dtype.itemsize < 4 else x for x in inputs))  # scores are float32 at least
    assert_close_to_reference(function(*inputs), same_dtype, reference, name=name)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [(1, 1), (16, 16), (17, 40), (7, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 8, 20, 24])
def test_pool_divides_by_true_counts(dtype, N):
    x, _ = tensors(2, N, 1, 3, 1, 5, dtype)
    check(lambda x: pool(x, 8), lambda x: pool_by_hand(x, 8), x)


@pytest.mark.parametrize("batch", [1, 2])
def test_pool_honours_valid_counts_and_ignores_padding(batch):
    x, _ = tensors(2, 20, 1, 3, 1, 5)
    valid = torch.tensor([[8, 0, 99], [3, 1, -2]])[:batch]
    for b in range(2):
        for i, count in enumerate(valid.expand(2, 3)[b].tolist()):
            x[b, i * 8 + max(0, count) : (i + 1) * 8] = torch.nan
    x.requires_grad_()
    got = pool(x, 8, valid)
    torch.testing.assert_close(got, pool_by_hand(x.detach(), 8, valid))
    assert got[0, 1].eq(0).all(), "a block without tokens"
    got.sum().backward()
    assert x.grad.isfinite().all() and x.grad[0, 8:16].eq(0).all()
    if batch == 1:
        assert torch.equal(pool(x, 8, valid[0].int()), got)


def test_pool_takes_padded_tiles():
    order = padded_tiles((3, 5), (2, 2))
    x, _ = tensors(1, 15, 1, 2, 1, 4)
    means = pool(order(x), 4, order.valid)
    assert torch.allclose(means[0, -1], x[0, -1]), "the last tile holds one token"
    weighted = (means * order.valid[:, None, None]).sum(1)
    torch.testing.assert_close(weighted, x.sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("Nq", "Nk"), LENGTHS)
@pytest.mark.parametrize("Hk", [1, 2, 4])
def test_pooled_query_and_key_scores(dtype, Nq, Nk, Hk):
    q, k = tensors(2, Nq, Nk, 4, Hk, 6, dtype)
    scale = 6**-0.5
    check(
        lambda q, k: pooled_scores(q, k, 8, 16),
        lambda q, k: products(pool_by_hand(q, 8), pool_by_hand(k, 16)) * scale,
        q,
        k,
        name="pooled",
    )
    check(lambda q, k: query_scores(q, k, 16), lambda q, k: products(q, pool_by_hand(k, 16)), q, k, name="query")
    check(lambda q, k: key_scores(q, k, 8), lambda q, k: products(pool_by_hand(q, 8), k) * scale, q, k, name="key")


def test_scale_is_honoured():
    q, k = tensors(1, 20, 20, 2, 2, 4)
    for score in (lambda **s: pooled_scores(q, k, 8, 8, **s), lambda **s: key_scores(q, k, 8, **s)):
        torch.testing.assert_close(score(scale=3.0), score() * 6)
    torch.testing.assert_close(query_scores(q, k, 8, scale=None), query_scores(q, k, 8) / 2)
    sharp = antidiagonal_scores(q, k, 8, 4, scale=50.0)
    assert sharp.amax(-1).mean() > antidiagonal_scores(q, k, 8, 4).amax(-1).mean()
    sharp = pooled_probabilities(q, k, 8, 8, scale=50.0)
    assert sharp.amax(-1).mean() > pooled_probabilities(q, k, 8, 8).amax(-1).mean()


def test_key_blocks_without_tokens_are_no_candidates():
    q, k = tensors(1, 16, 24, 2, 1, 4)
    k[:, 8:16] = torch.nan
    valid = torch.tensor([[8, 0, 8]])
    for got in (pooled_scores(q, k, 8, 8, kv_valid=valid), query_scores(q, k, 8, kv_valid=valid)):
        assert got[..., 1].eq(-torch.inf).all() and got[..., [0, 2]].isfinite().all()
        assert not top_k(got, 3)[..., 1].any()
    shares = pooled_probabilities(q, k, 8, 8, kv_valid=valid)
    assert shares[..., 1].eq(0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, 2, 2))


def test_query_padding_is_ignored():
    q, k = tensors(1, 16, 16, 2, 1, 4)
    q[:, 10:] = torch.nan
    valid = torch.tensor([8, 2])
    want = pooled_scores(q[:, :10], k, 8, 8)
    assert torch.equal(pooled_scores(q, k, 8, 8, q_valid=valid), want)
    assert torch.equal(key_scores(q, k, 8, q_valid=valid), key_scores(q[:, :10], k, 8))
    want = pooled_probabilities(q[:, :10], k, 8, 8)
    assert torch.equal(pooled_probabilities(q, k, 8, 8, q_valid=valid), want)


def shares_by_hand(q, k, q_block, kv_block, isolated, mask, run):
    """As the published rule reads: exponentials, pooled ones times the tokens of their block."""
    scale = q.shape[-1] ** -0.5
    q_means = pool_by_hand(q, q_block)
    counts = torch.tensor([len(p) for p in blocks_of(k, kv_block)[0]], dtype=q.dtype)
    visual = (products(q_means, pool_by_hand(k, kv_block)) * scale).exp() * counts
    alone = (products(q_means, isolated) * scale).exp() * mask[:, None, None].to(q.dtype)
    parts = [visual, *(alone[..., i : i + run].sum(-1, keepdim=True) for i in range(0, alone.shape[-1], run))]
    return torch.cat(parts, -1) / (visual.sum(-1, keepdim=True) + alone.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [None, 4, 3])
def test_probabilities_with_isolated_keys(dtype, run):
    q, k = tensors(2, 20, 36, 4, 2, 6, dtype)
    _, isolated = tensors(2, 1, 7, 4, 2, 6, dtype, seed=1)
    mask = torch.arange(7) < torch.tensor([[7], [5]])

    def ours(q, k, isolated):
        return pooled_probabilities(q, k, 8, 16, isolated=isolated, isolated_mask=mask, isolated_block=run)

    def plain(q, k, isolated):
        return shares_by_hand(q, k, 8, 16, isolated, mask, run or 7)

    check(ours, plain, q, k, isolated)
    got = ours(q, k, isolated)
    assert got.shape[-1] == 3 + {None: 1, 4: 2, 3: 3}[run]
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))


def test_masked_isolated_keys_may_hold_anything():
    q, k = tensors(1, 16, 16, 2, 2, 4)
    _, isolated = tensors(1, 1, 5, 2, 2, 4, seed=1)
    want = pooled_probabilities(q, k, 8, 8, isolated=isolated[:, :3])
    isolated[:, 3:] = torch.nan
    got = pooled_probabilities(q, k, 8, 8, isolated=isolated, isolated_mask=torch.arange(5)[None] < 3)
    torch.testing.assert_close(got, want)


def test_blocks_of_one_token_give_exact_attention():
    q, k = tensors(2, 9, 12, 4, 2, 6)
    exact = torch.softmax(products(q, k) * 6**-0.5, -1)
    torch.testing.assert_close(pooled_probabilities(q, k, 1, 1), exact)
    got = pooled_probabilities(q, k[:, :8], 1, 1, isolated=k[:, 8:], isolated_block=1)
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(antidiagonal_scores(q, k, 1, 1), exact)
    in_blocks = torch.stack([exact[..., i : i + 4].sum(-1) for i in (0, 4, 8)], -1)
    in_blocks = torch.stack([in_blocks[..., i : i + 4, :].mean(-2) for i in (0, 4, 8)], -2)
    torch.testing.assert_close(antidiagonal_scores(q, k, 4, 1), in_blocks)


def test_rows_without_any_key_are_zero():
    q, k = tensors(1, 16, 16, 2, 2, 4)
    assert pooled_probabilities(q, k, 8, 8, kv_valid=torch.zeros(2, dtype=torch.int32)).eq(0).all()


def antidiagonals_by_hand(q, k, block, stride, offset=None):
    """Pair by pair, with the last token standing in for those a short group lacks."""
    B, Nq, H, D = q.shape
    k = repeated(k, H)
    Nk = k.shape[1]
    rows, cols = -(-Nq // stride), -(-Nk // stride)
    score = q.new_zeros(B, H, rows, cols)
    for m, n, s in itertools.product(range(rows), range(cols), range(stride)):
        a = q[:, min(m * stride + s, Nq - 1)]
        b = k[:, min(n * stride + stride - 1 - s, Nk - 1)]
        score[:, :, m, n] += (a * b).sum(-1) * D**-0.5 / stride
    size = [[min(stride, N - i * stride) for i in range(count)] for N, count in ((Nq, rows), (Nk, cols))]
    weight = score.exp() * torch.tensor(size[1], dtype=q.dtype)
    if offset is not None:
        for m, n in itertools.product(range(rows), range(cols)):
            if n * stride > offset + m * stride + stride - 1:
                weight[:, :, m, n] = 0
    weight = weight / weight.sum(-1, keepdim=True)
    out = q.new_zeros(B, H, -(-Nq // block), -(-Nk // block))
    for m, n in itertools.product(range(rows), range(cols)):
        i, j = m * stride // block, n * stride // block
        out[:, :, i, j] += weight[:, :, m, n] * size[0][m] / min(block, Nq - i * block)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("Nq", "Nk"), LENGTHS)
@pytest.mark.parametrize("offset", [None, 0, 9])
def test_antidiagonal_scores(dtype, Nq, Nk, offset):
    q, k = tensors(2, Nq, Nk, 4, 2, 6, dtype)
    check(
        lambda q, k: antidiagonal_scores(q, k, 8, 4, offset=offset),
        lambda q, k: antidiagonals_by_hand(q, k, 8, 4, offset),
        q,
        k,
    )
    got = antidiagonal_scores(q, k, 8, 4, offset=offset)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
    if offset is not None:
        visible = causal_blocks(*got.shape[2:], 8, 8, offset).visible
        assert got.masked_select(~visible).eq(0).all()


def test_chunks_of_antidiagonals_change_nothing(monkeypatch):
    q, k = tensors(1, 60, 50, 4, 2, 6)
    want = antidiagonal_scores(q, k, 8, 4, offset=3)
    monkeypatch.setattr(scores, "CHUNK_BYTES", 1)
    torch.testing.assert_close(antidiagonal_scores(q, k, 8, 4, offset=3), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_similarity_is_the_mean_cosine(dtype):
    x, _ = tensors(2, 20, 1, 3, 1, 5, dtype)

    def plain(x):
        rows = []
        for row in blocks_of(x, 8):
            unit = [p / p.norm(dim=-1, keepdim=True) for p in row]
            rows.append(torch.stack([torch.einsum("ihd,jhd->hij", u, u).mean((1, 2)) for u in unit], -1))
        return torch.stack(rows)

    check(lambda x: block_self_similarity(x, 8), plain, x)


def test_self_similarity_of_known_blocks():
    x = torch.zeros(1, 12, 1, 2)
    x[0, :4, 0] = torch.tensor([3.0, 4.0])  # parallel
    x[0, 4:8, 0] = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # cancel out; the last four are zero
    torch.testing.assert_close(block_self_similarity(x, 4), torch.tensor([[[1.0, 0, 0]]]))
    x[0, 2:4] = torch.nan
    torch.testing.assert_close(block_self_similarity(x, 4, torch.tensor([2, 1, 0])), torch.tensor([[[1.0, 1, 0]]]))


def test_autocast_does_not_reach_inside():
    q, k = tensors(1, 40, 40, 4, 2, 16)
    calls = [
        lambda: pooled_scores(q, k, 8, 8),
        lambda: query_scores(q, k, 8),
        lambda: key_scores(q, k, 8),
        lambda: pooled_probabilities(q, k, 8, 8, isolated=k[:, :3]),
        lambda: antidiagonal_scores(q, k, 8, 4),
    ]
    for call in calls:
        want = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), want)
