"""The C form of neighborhood_attention: against the rule in float64, at every width of head, and what it promises besides."""

from __future__ import annotations

import pytest
import torch
from neighborhood_oracle import CASES, attend_with, check, results, tensors

from mmeff.errors import BackendUnavailable
from mmeff.kernels.dispatch import record
from mmeff.kernels.neighborhood import explain_neighborhood, native, neighborhood_attention

pytestmark = pytest.mark.skipif(native._build().library is None, reason=str(native._build().reason))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_cases(case, bias):
    grid, *rule = CASES[case]
    check("native", rule, tensors(grid, rule[0], bias=bias), with_lse=bias)


@pytest.mark.parametrize("D", [1, 16, 20, 33, 64, 100])
def test_any_width_of_a_head(D):
    check("native", [(3, 4), (1, 2), (2, 1), (False, False)], tensors((7, 6), (3, 4), D=D, bias=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check("native", [(5, 4), (1, 2), (1, 3), (False, False)], tensors((7, 13), (5, 4), bias=True, dtype=dtype))


@pytest.mark.parametrize("Hk", [1, 2, 4])
def test_grouped_queries(Hk):
    check("native", [(3, 5), (1, 1), (1, 1), (False, True)], tensors((6, 7), (3, 5), Hk=Hk, bias=True))


def test_the_largest_window():
    rule = [(16, 16), (1, 1), (1, 1), (False, False)]
    check("native", rule, tensors((17, 18), (16, 16), B=1, H=1, Hk=1, bias=True))


def test_views_are_read_where_they_lie_and_nothing_beyond():
    """A map in the middle of NaN, and one query, key and value tensor: neither may change a bit."""
    qkv = torch.randn(2, 9, 8, 3, 2, 16)
    q, k, v = qkv.unbind(3)
    want = neighborhood_attention(*(x.contiguous() for x in (q, k, v)), 3, dilation=(1, 2), backend="native")
    assert torch.equal(neighborhood_attention(q, k, v, 3, dilation=(1, 2), backend="native"), want)
    poisoned = torch.full((4, 11, 12, 3, 4, 16), torch.nan)
    poisoned[1:3, 1:10, 2:10, :, 1:3] = qkv
    views = poisoned[1:3, 1:10, 2:10, :, 1:3].unbind(3)
    assert torch.equal(neighborhood_attention(*views, 3, dilation=(1, 2), backend="native"), want)


def test_the_number_of_threads_changes_nothing():
    inputs = tensors((9, 8), (3, 3), bias=True)
    rule = [(3, 3), (1, 1), (2, 1), (False, False)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(attend_with("native", rule), inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, want in found[0].items():
            assert torch.equal(other[name], want), name


def test_a_bias_without_gradient():
    q, k, v, bias, *_ = tensors((6, 7), (3, 3), bias=True)
    q.requires_grad_()
    (out,) = torch.autograd.grad(neighborhood_attention(q, k, v, 3, rel_bias=bias, backend="native").sum(), [q])
    (want,) = torch.autograd.grad(neighborhood_attention(q, k, v, 3, rel_bias=bias, backend="tiles").sum(), [q])
    torch.testing.assert_close(out, want)


def test_made_in_inference_mode_and_used_in_training():
    native.windows.cache_clear()
    q, k, v, bias, *_ = tensors((6, 9), (3, 3), bias=True)
    with torch.inference_mode():
        neighborhood_attention(q, k, v, 3, rel_bias=bias, backend="native")
    bias.requires_grad_()
    neighborhood_attention(q, k, v, 3, rel_bias=bias, backend="native").sum().backward()
    assert bias.grad is not None and bias.grad.isfinite().all()


def test_large_scores_do_not_overflow():
    q, k, v, *_ = tensors((5, 6), (3, 3))
    out, lse = neighborhood_attention(q * 1e4, k * 1e4, v, 3, return_lse=True, backend="native")
    assert out.isfinite().all() and lse.isfinite().all()
    want = neighborhood_attention(q.double() * 1e4, k.double() * 1e4, v.double(), 3, backend="reference")
    # one key decides; where two are close, scores of 1e8 differ by the rounding of their size
    assert ((out - want).abs().amax(-1) < 1e-5).double().mean() > 0.95


def test_auto_takes_it_for_sliding_windows():
    q, k, v, *_ = tensors((28, 28), (7, 7), B=1, D=32)
    with record() as calls:
        neighborhood_attention(q, k, v, 7)
    assert [c.backend for c in calls] == ["native"]


def test_what_it_refuses(monkeypatch):
    q, k, v, _, ek, ev = tensors((17, 17), (3, 3), T=2, B=1)
    with pytest.raises(BackendUnavailable, match="no place for extra keys"):
        neighborhood_attention(q, k, v, 3, extra_k=ek, extra_v=ev, backend="native")
    with pytest.raises(BackendUnavailable, match="at most 256 keys, and these have 289"):
        neighborhood_attention(q, k, v, 17, backend="native")
    with pytest.raises(BackendUnavailable, match=r"q is torch\.float64"):
        neighborhood_attention(q.double(), k.double(), v.double(), 3, backend="native")
    wide = torch.randn(1, 5, 1, 300)
    with pytest.raises(BackendUnavailable, match="and these have 300"):
        neighborhood_attention(wide, wide, wide, 3, backend="native")
    monkeypatch.setenv("MMEFF_NATIVE", "0")
    row = next(r for r in explain_neighborhood(q, k, v, 3).rows if r.backend == "native")
    assert not row.usable and "MMEFF_NATIVE=0" in row.reason
