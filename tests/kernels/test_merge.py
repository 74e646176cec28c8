"""merge_attention: exact over any split, safe where nothing was seen, differentiable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_reference, plain_attention

from mmeff.kernels import merge_attention


def pieces(dtype, n, N=17, Nk=40, seed=0):
    """n partial results over random disjoint key sets, some of them empty for some queries, and their union."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, size, 3, 24, generator=g).to(dtype) for size in (N, Nk, Nk))
    part_of = torch.randint(0, n, (2, 3, N, Nk), generator=g)
    part_of = torch.where(torch.rand(2, 3, N, 1, generator=g) < 0.3, part_of[..., :1], part_of)
    results = [plain_attention(q, k, v, part_of == p) for p in range(n)]
    whole = plain_attention(q, k, v, torch.ones(N, Nk, dtype=torch.bool))
    exact = plain_attention(q.double(), k.double(), v.double(), torch.ones(N, Nk, dtype=torch.bool))
    return [out for out, _ in results], [lse for _, lse in results], whole, exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_merging_parts_gives_the_whole(dtype, n):
    outs, lses, whole, exact = pieces(dtype, n)
    assert n == 1 or any(lse.isinf().any() for lse in lses), "the case must hold queries that a part left empty"
    out, lse = merge_attention(outs, lses)
    assert_close_to_reference(out, whole[0], exact[0], name="out")
    assert_close_to_reference(lse, whole[1], exact[1], name="lse")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.permutations(range(4)), st.integers(1, 3))
def test_order_and_grouping_do_not_matter(seed, order, cut):
    outs, lses, _, _ = pieces(torch.float64, 4, seed=seed)
    want = merge_attention(outs, lses)
    got = merge_attention([outs[i] for i in order], [lses[i] for i in order])
    first = merge_attention(outs[:cut], lses[:cut])
    nested = merge_attention([first[0], *outs[cut:]], [first[1], *lses[cut:]])
    for a in (got, nested):
        torch.testing.assert_close(a, want, rtol=1e-9, atol=1e-12)


def test_queries_that_saw_nothing_anywhere():
    outs = [torch.zeros(1, 3, 1, 4, requires_grad=True) for _ in range(2)]
    lses = [torch.tensor([[[-torch.inf, 0.5, -torch.inf]]], requires_grad=True) for _ in range(2)]
    out, lse = merge_attention(outs, lses)
    assert torch.equal(lse[0, 0].isinf(), torch.tensor([True, False, True]))
    assert out.eq(0).all() and not lse.isnan().any()
    (out.sum() + lse[0, 0, 1]).backward()
    for x in outs + lses:
        assert x.grad.isfinite().all()
    assert lses[0].grad[0, 0].tolist() == [0, 0.5, 0]


def test_the_output_of_a_part_that_saw_nothing_is_ignored():
    good = torch.randn(1, 2, 1, 4)
    lse = torch.zeros(1, 1, 2)
    poison = torch.full_like(good, torch.nan).requires_grad_()
    out, merged = merge_attention([good, poison], [lse, torch.full_like(lse, -torch.inf)])
    assert torch.equal(out, good) and torch.equal(merged, lse)
    out.sum().backward()
    assert poison.grad.eq(0).all()


def test_huge_scores_do_not_overflow():
    out, lse = merge_attention([torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)], [torch.full((1, 1, 1), 5000.0)] * 2)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 0.5))
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 5000.0 + 0.6931472))


def test_gradcheck():
    outs, lses, _, _ = pieces(torch.float64, 3, N=3, Nk=6)
    empty = [lse.isinf() for lse in lses]
    finite = [lse.masked_fill(e, 0.0).requires_grad_() for lse, e in zip(lses, empty, strict=True)]

    def merge(*x):
        return merge_attention(x[:3], [lse.masked_fill(e, -torch.inf) for lse, e in zip(x[3:], empty, strict=True)])

    assert torch.autograd.gradcheck(merge, (*(o.requires_grad_() for o in outs), *finite))


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (torch.ones(2, 1, 3, 1, 4), torch.ones(2, 1, 1, 3), TypeError, "must be sequences of tensors, got a tensor"),
        ([], [], ValueError, "non-empty and equally long, got 0 outputs and 0"),
        ([torch.ones(1, 3, 1, 4)], [], ValueError, "got 1 outputs and 0 lses"),
        ([torch.ones(3, 1, 4)], [torch.ones(1, 3)], ValueError, r"\(B, N, H, D\), got torch.float32 \(3, 1, 4\)"),
        ([torch.ones(1, 3, 2, 4)], [torch.ones(1, 3, 2)], ValueError, r"\(B, H, N\) = \(1, 2, 3\).*got.*\(1, 3, 2\)"),
        (
            [torch.ones(1, 3, 1, 4), torch.ones(1, 2, 1, 4)],
            [torch.ones(1, 1, 3), torch.ones(1, 1, 2)],
            ValueError,
            r"must share shape.*\(1, 2, 1, 4\) on cpu at 1 but .*\(1, 3, 1, 4\)",
        ),
    ],
)
def test_bad_arguments_are_named(outs, lses, error, message):
    with pytest.raises(error, match=message):
        merge_attention(outs, lses)
