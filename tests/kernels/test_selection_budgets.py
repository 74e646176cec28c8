"""Budgets of a selection: against sorting each group by itself, in Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeff.kernels.selection import (
    SCOPES,
    minmax_cumulative,
    random_k,
    threshold,
    top_k,
    top_k_with_self,
    top_p,
)

property_test = settings(max_examples=40, deadline=None)


shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
axis_sets = st.sampled_from([*SCOPES.values(), (1,), (0, 3), (2, 1)])


@st.composite
def coarse_scores(draw):
    """Few different values, so that ties are common, and some that are no candidates."""
    shape = draw(shapes)
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, -2.0, -math.inf, math.nan])
    flat = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(flat).view(shape)


def groups_of(x, axes):
    """Every group as a list of indices into x, row-major."""
    axes = sorted(a % x.ndim for a in axes)
    rest = [a for a in range(x.ndim) if a not in axes]
    for outer in itertools.product(*(range(x.shape[a]) for a in rest)):
        members = []
        for inner in itertools.product(*(range(x.shape[a]) for a in axes)):
            at = dict(zip(rest, outer, strict=True)) | dict(zip(axes, inner, strict=True))
            members.append(tuple(at[a] for a in range(x.ndim)))
        yield outer, members


def ranked(x, members):
    """Candidates by falling score, ties in order."""
    return sorted((m for m in members if x[m] > -math.inf), key=lambda m: -x[m].item())


def mask_of(x, chosen):
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for index in chosen:
        mask[index] = True
    return mask


@property_test
@given(coarse_scores(), st.integers(0, 7), axis_sets, st.integers(0, 100))
def test_top_k_is_exact_and_takes_the_first_of_equals(x, k, axes, seed):
    want = mask_of(x, [m for _, members in groups_of(x, axes) for m in ranked(x, members)[:k]])
    assert torch.equal(top_k(x, k, axes=axes), want)
    rest = [x.shape[a] for a in range(4) if a not in [b % 4 for b in axes]]
    per_group = torch.randint(-1, 7, rest, generator=torch.Generator().manual_seed(seed))
    want = [m for at, members in groups_of(x, axes) for m in ranked(x, members)[: max(0, int(per_group[at]))]]
    assert torch.equal(top_k(x, per_group, axes=axes), mask_of(x, want))


@property_test
@given(coarse_scores(), st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.75, 1.0]), axis_sets, st.booleans(), st.integers(0, 4))
def test_top_p_follows_the_published_rule(x, p, axes, crossing, at_least):
    x = x.abs().where(x > -math.inf, x) / 4
    want = []
    for _, members in groups_of(x, axes):
        order = ranked(x, members)
        running = torch.tensor([x[m] for m in order]).cumsum(0)
        n = max(int((running <= p).sum()) + crossing, at_least)
        want += order if p == 1 else order[:n]
    assert torch.equal(top_p(x, p, include_crossing=crossing, at_least=at_least, axes=axes), mask_of(x, want))


def test_top_p_of_known_rows():
    p = torch.tensor([0.125, 0.5, 0.25, 0.125])
    assert top_p(p, 0.6).tolist() == [False, True, True, False]
    assert top_p(p, 0.6, include_crossing=False).tolist() == [False, True, False, False]
    assert top_p(p, 0.0).tolist() == [False, True, False, False], "at least one"
    assert top_p(p, 0.0, at_least=3).tolist() == [True, True, True, False]
    assert top_p(p, 0.6, at_least=torch.tensor(4)).all()


def test_p_of_one_takes_everything_whatever_the_rounding():
    g = torch.Generator().manual_seed(0)
    p = torch.softmax(40 * torch.randn(50, 400, generator=g), -1)
    assert (p.sort(-1, descending=True).values.cumsum(-1) > 1).any(), "rounding does pass 1 here"
    assert top_p(p, 1).all()


@pytest.mark.parametrize("t", [0.25, torch.tensor(0.25), torch.tensor([[0.25], [-math.inf], [2.0]])])
def test_threshold(t):
    x = torch.tensor([0.25, 0.2, -math.inf, math.nan]).expand(3, 4)
    want = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(threshold(x, t), want if isinstance(t, torch.Tensor) and t.ndim else want[:1].expand(3, 4))


def minmax_by_hand(x, tau, own, valid, axes):
    """The rule of specs, group by group."""
    chosen = []
    for _, members in groups_of(x, axes):
        exists = [m for m in members if valid[m] and x[m] > -math.inf]
        if not exists:
            continue
        values = torch.tensor([x[m] for m in exists])
        span = values.max() - values.min()
        n = dict(zip(exists, (values - values.min()) / (span if span > 1e-6 else 1.0), strict=True))
        total = sum(n.values()) + 1e-6
        mine = [m for m in exists if own[m]]
        need = max(0.0, tau - sum(n[m] for m in mine) / total)
        order = sorted((m for m in exists if not own[m]), key=lambda m: -n[m].item())
        running, taken = 0.0, []
        for m in order:  # ranks up to and including the first at which the running share reaches the need
            taken.append(m)
            running = running + n[m] / total
            if running >= need:
                break
        chosen += mine + taken
    return mask_of(x, chosen)


@property_test
@given(shapes, st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.25, 0.6, 1.0]), st.sampled_from(list(SCOPES)))
def test_minmax_cumulative_in_every_scope(shape, seed, tau, scope):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    own = torch.arange(shape[3]) == torch.randint(0, shape[3], (shape[2], 1), generator=g)
    valid = torch.rand(shape[0], 1, shape[2], shape[3], generator=g) < 0.8
    x[torch.rand(shape, generator=g) < 0.1] = -torch.inf
    axes = SCOPES[scope]
    want = minmax_by_hand(x, tau, own.expand(shape), valid.expand(shape), axes)
    assert torch.equal(minmax_cumulative(x, tau, own=own, axes=axes, valid=valid), want)
    without = minmax_by_hand(x, tau, own.expand(shape), torch.ones(shape).bool(), axes)
    assert torch.equal(minmax_cumulative(x, tau, own=own, axes=axes), without)


@pytest.mark.parametrize("scope", list(SCOPES))
def test_minmax_cumulative_always_adds_one_that_is_not_its_own(scope):
    x = torch.randn(1, 2, 12, 6, generator=torch.Generator().manual_seed(0))
    own = torch.arange(6) == torch.arange(12)[:, None] // 2
    got = minmax_cumulative(x, 0.0, own=own, axes=SCOPES[scope])
    assert (got & own).sum() == 24, "its own block, every query of every head"
    others = (got & ~own).sum(SCOPES[scope])
    assert (others == 1).all()
    assert minmax_cumulative(torch.zeros_like(x), 0.0, own=own, axes=SCOPES[scope]).sum() == 24 + others.numel()


def test_minmax_cumulative_of_a_known_row():
    x = torch.tensor([[1.0, 5, 3, 2, 4]])  # 0, 1, 0.5, 0.25, 0.75 of 2.5
    own = torch.tensor([[False, False, True, False, False]])  # holds 0.2
    for tau, want in [(0.2, [1, 2]), (0.55, [1, 2]), (0.65, [1, 2, 4]), (0.95, [1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4])]:
        assert minmax_cumulative(x, tau, own=own)[0].nonzero()[:, 0].tolist() == want, tau


@property_test
@given(shapes, st.integers(0, 1000), st.integers(1, 4), st.sampled_from(["query_head", "head_global", "overall"]))
def test_top_k_with_self(shape, seed, k, scope):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    own = (torch.arange(shape[3]) == torch.randint(0, shape[3], (shape[2], 1), generator=g)).expand(shape)
    valid = (torch.rand(shape, generator=g) < 0.8) | own
    valid[:, :, 0] = False  # a query that does not exist
    chosen = []
    for _, members in groups_of(x, SCOPES[scope]):
        queries = {m[:3] for m in members if valid[m]}
        order = sorted((m for m in members if valid[m]), key=lambda m: (not own[m], -x[m].item()))
        chosen += order[: k * len(queries)]
    assert torch.equal(top_k_with_self(x, k, own=own, axes=SCOPES[scope], valid=valid), mask_of(x, chosen))


def test_top_k_with_self_counts_the_own_block():
    x = torch.randn(1, 2, 12, 6, generator=torch.Generator().manual_seed(0))
    own = torch.arange(6) == torch.arange(12)[:, None] // 2
    assert torch.equal(top_k_with_self(x, 1, own=own), own.expand_as(x))
    got = top_k_with_self(x, 3, own=own)
    assert (got.sum(-1) == 3).all() and (got & own).sum() == 24


def test_random_k_is_seeded_fair_and_exact():
    candidates = torch.ones(400, 5, dtype=torch.bool)
    candidates[:, 3] = False
    got = random_k(candidates, 2, generator=torch.Generator().manual_seed(3))
    assert (got.sum(-1) == 2).all() and not got[:, 3].any()
    assert torch.equal(got, random_k(candidates, 2, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(got, random_k(candidates, 2, generator=torch.Generator().manual_seed(4)))
    share = got[:, [0, 1, 2, 4]].float().mean(0)
    assert (share - 0.5).abs().max() < 0.1, "4 standard deviations"
    fewer = random_k(candidates, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fewer, candidates)
