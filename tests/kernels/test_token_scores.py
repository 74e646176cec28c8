"""token_scores: column sums of the attention of chosen rows, against the whole matrix."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_reference

from mmeff.kernels import token_scores


def tensors(B, R, Nk, H, Hk, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((B, R, H, D), (B, Nk, Hk, D))]


def whole_matrix(q, k, visible=None, weights=None, scale=None):
    """The same in the dtype of q, with the attention matrix in memory; visible broadcastable to (B, H, R, Nk)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("brhd,bkhd->bhrk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    received = torch.softmax(scores, -1).nan_to_num(0.0)
    if weights is not None:
        received = received * weights[..., None]
    return received.sum(2)


def check(q, k, visible=None, weights=None, scale=None, **arguments):
    got = token_scores(q, k, weights=weights, scale=scale, **arguments)
    wide = torch.promote_types(q.dtype, torch.float32)  # scores are float32 whatever the inputs are
    plain = whole_matrix(q.to(wide), k.to(wide), visible, weights, scale)
    assert_close_to_reference(got, plain, whole_matrix(q.double(), k.double(), visible, weights, scale))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("R", "Nk"), [(1, 1), (1, 200), (17, 127), (129, 129), (5, 17)])
def test_sums_over_rows(dtype, R, Nk):
    check(*tensors(2, R, Nk, 4, 4, 24, dtype))


@pytest.mark.parametrize("Hk", [1, 2, 4])
@pytest.mark.parametrize("per_batch", [False, True])
def test_grouped_queries_positions_padding_and_weights_together(Hk, per_batch):
    q, k = tensors(2, 13, 50, 4, Hk, 40)
    g = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 50, (2, 13) if per_batch else (13,), generator=g)
    key_mask = torch.rand(2, 50, generator=g) < 0.8
    weights = torch.rand(2, 4, 13, generator=g)
    causal = torch.arange(50) <= positions[..., None]
    visible = (causal[:, None] if per_batch else causal) & key_mask[:, None, None]
    check(q, k, visible, weights, row_positions=positions, key_mask=key_mask)


@pytest.mark.parametrize("shape", [(13,), (1, 1, 13), (2, 1, 13), (1, 4, 13), (2, 4, 13)])
@pytest.mark.parametrize("Hk", [2, 4])
def test_weights_broadcast(shape, Hk):
    q, k = tensors(2, 13, 30, 4, Hk, 24)
    check(q, k, weights=torch.rand(shape, generator=torch.Generator().manual_seed(0)))


def test_scale_is_honoured():
    q, k = tensors(1, 5, 30, 2, 2, 24)
    check(q, k, scale=0.9)


def test_rows_that_see_nothing_contribute_zero():
    q, k = tensors(2, 3, 20, 2, 1, 24)
    positions = torch.tensor([-1, 4, 19])
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    key_mask[0, :5] = False  # row 1 of batch 0 sees nothing either
    key_mask[1] = False
    q.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        got = token_scores(q, k, row_positions=positions, key_mask=key_mask)
        got[..., 7].sum().backward()
    torch.testing.assert_close(got.sum(-1), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert got[1].eq(0).all()
    assert q.grad[1].eq(0).all() and q.grad[0, :2].eq(0).all() and q.grad[0, 2].ne(0).any()


def test_hidden_keys_may_hold_anything():
    q, k = tensors(2, 3, 20, 2, 1, 24)
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    key_mask[:, 12:] = False
    want = token_scores(q, k, key_mask=key_mask)
    k[:, 12:] = torch.nan
    got = token_scores(q, k, key_mask=key_mask)
    assert torch.equal(got, want) and got[..., 12:].eq(0).all()


def test_a_row_at_position_p_sees_keys_up_to_and_including_p():
    q, k = tensors(1, 1, 10, 1, 1, 8)
    got = token_scores(q, k, row_positions=torch.tensor([6]))
    assert got[0, 0, 6] > 0 and got[0, 0, 7:].eq(0).all()


def test_no_rows_give_zeros():
    q, k = tensors(2, 0, 10, 4, 2, 8)
    assert torch.equal(token_scores(q, k), torch.zeros(2, 4, 10))


def test_chunks_of_rows_change_nothing(monkeypatch):
    module = importlib.import_module("mmeff.kernels.token_scores")
    q, k = tensors(2, 13, 30, 4, 2, 24)
    positions, weights = torch.arange(13) * 2, torch.rand(2, 4, 13)
    want = token_scores(q, k, row_positions=positions, weights=weights)
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 4 * 30 * 4 * 3)  # three rows at a time
    torch.testing.assert_close(token_scores(q, k, row_positions=positions, weights=weights), want)


def test_autocast_does_not_reach_inside():
    q, k = tensors(1, 5, 30, 2, 2, 24)
    want = token_scores(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_scores(q, k), want)


def test_gradcheck():
    q, k = (x.requires_grad_() for x in tensors(1, 3, 5, 2, 1, 3, torch.float64))
    positions = torch.tensor([-1, 2, 4])
    assert torch.autograd.gradcheck(lambda q, k: token_scores(q, k, row_positions=positions), (q, k))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 20), st.integers(1, 60), st.sampled_from([1, 2, 4]), st.booleans())
def test_columns_add_up_to_the_number_of_rows(seed, R, Nk, Hk, causal):
    q, k = tensors(2, R, Nk, 4, Hk, 8, seed=seed)
    positions = torch.randint(0, Nk, (R,), generator=torch.Generator().manual_seed(seed)) if causal else None
    total = token_scores(q, k, row_positions=positions).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, R))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_rows": torch.ones(2, 3, 4, 8).long()}, TypeError, "q_rows must be a floating-point tensor, got torch.int"),
        ({"k": torch.ones(10, 2, 8)}, ValueError, r"k must be \(B, N, H, D\), got shape \(10, 2, 8\)"),
        ({"k": torch.ones(2, 10, 2, 6)}, ValueError, r"agree in batch, head width.*\(2, 10, 2, 6\)"),
        ({"k": torch.ones(2, 10, 3, 8)}, ValueError, r"multiple of the key heads.*\(2, 10, 3, 8\)"),
        ({"row_positions": torch.ones(3)}, ValueError, r"integers of shape \(R,\) = \(3,\).*torch.float32"),
        ({"row_positions": torch.ones(4).long()}, ValueError, r"\(B, R\) = \(2, 3\), got torch.int64 \(4,\)"),
        ({"key_mask": torch.ones(2, 10)}, ValueError, r"bool of shape \(B, Nk\) = \(2, 10\).*torch.float32"),
        ({"key_mask": torch.ones(1, 10).bool()}, ValueError, r"\(2, 10\).*torch.bool \(1, 10\)"),
        ({"weights": torch.ones(2, 3)}, ValueError, r"\(2\|1, 4\|1, 3\), got torch.float32 \(2, 3\); .* w\[:, None\]"),
        ({"weights": torch.ones(3).long()}, ValueError, "weights must be floating-point"),
        ({"weights": torch.ones(3, device="meta")}, ValueError, "weights must be on cpu like k, got meta"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite Python float, got inf"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"q_rows": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 10, 2, 8), **change}
    with pytest.raises(error, match=message):
        token_scores(arguments.pop("q_rows"), arguments.pop("k"), **arguments)
