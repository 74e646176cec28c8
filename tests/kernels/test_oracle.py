"""The comparator itself: it accepts what PyTorch computes and rejects small mistakes."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close_to_reference, plain_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def results(request):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, 2, 24).to(request.param) for _ in range(3))
    mask = torch.rand(1, 2, 50, 50) < 0.5
    mask[..., 0] = True
    plain = plain_attention(q, k, v, mask)[0]
    reference = plain_attention(q.double(), k.double(), v.double(), mask)[0]
    return q, k, v, mask, plain, reference


def test_accepts_plain_pytorch(results):
    *_, plain, reference = results
    assert_close_to_reference(plain, plain, reference)


def test_rejects_one_attended_key_too_many(results):
    q, k, v, mask, plain, reference = results
    wrong = mask.clone()
    scores = (q[0, 0, 0] @ k[0, :, 0].T).float()
    wrong[0, 0, 0, scores.masked_fill(mask[0, 0, 0], -torch.inf).argmax()] = True  # a hidden key that would matter
    out = plain_attention(q, k, v, wrong)[0]
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_reference(out, plain, reference)


def test_rejects_one_perturbed_element(results):
    *_, plain, reference = results
    out = plain.clone()
    out[0, 7, 1, 3] += 0.1
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_reference(out, plain, reference)


def test_rejects_a_wrong_scale_of_one_percent_in_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, 2, 24) for _ in range(3))
    mask = torch.ones(50, 50, dtype=torch.bool)
    plain, reference = plain_attention(q, k, v, mask)[0], plain_attention(q.double(), k.double(), v.double(), mask)[0]
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_reference(plain_attention(q, k, v, mask, 24**-0.5 * 1.01)[0], plain, reference)


def test_rejects_nan_infinity_dtype_and_shape():
    reference = torch.tensor([1.0, 2.0, -torch.inf], dtype=torch.float64)
    plain = reference.float()
    for wrong, message in (
        (torch.tensor([1.0, torch.nan, -torch.inf]), "NaN"),
        (torch.tensor([1.0, 2.0, -1e30]), "infinities"),
        (torch.tensor([-torch.inf, 2.0, -torch.inf]), "infinities"),
        (torch.tensor([1.0, 2.0, torch.inf]), "infinities"),
        (plain.bfloat16(), "dtype"),
        (plain[:2], "shape"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_close_to_reference(wrong, plain, reference)
