"""Selection against loops: top-k by rows and groups, shares, pools, and greedy picking with and without a rule of its own."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeff.pruning._select import cosines, extremes, greedy, max_min_diversity, pools, share, top_k

from .input_scene import cosine, largest
from .input_scene import shares as listed_shares


class Case(NamedTuple):
    """Rows with holes: absent entries lie anywhere, not only behind the others."""

    scores: torch.Tensor
    present: torch.Tensor
    frame: torch.Tensor
    counts: torch.Tensor


@st.composite
def cases(draw, ties=True):
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    make = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scores = torch.randn(batch, width, generator=make, dtype=torch.float64)
    if ties and draw(st.booleans()):
        scores = scores.round()
    present = torch.rand(batch, width, generator=make) < draw(st.sampled_from([0.5, 0.9, 1.0]))
    scores = scores.masked_fill(torch.rand(batch, width, generator=make) < draw(st.sampled_from([0, 0.3])), math.nan)
    frame = torch.randint(0, 4, (batch, width), generator=make)
    counts = torch.randint(0, width + 2, (batch,), generator=make)
    return Case(scores, present, frame, counts)


def places_of(row):
    return row.nonzero()[:, 0].tolist()


def best_of(scores, places, count):
    """The first `count` of places by score, NaN last, the earlier of equal ones."""
    value = [-math.inf if math.isnan(scores[p]) else scores[p] for p in places]
    return {places[i] for i in largest(value, count)}


@settings(max_examples=150, deadline=None)
@given(cases())
def test_top_k_of_rows(case):
    got = top_k(case.scores, case.counts, case.present)
    for b in range(len(got)):
        expected = best_of(case.scores[b].tolist(), places_of(case.present[b]), int(case.counts[b]))
        assert set(places_of(got[b])) == expected


@settings(max_examples=150, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_top_k_of_groups(case, random):
    counts = torch.tensor([[random.randrange(5) for _ in range(4)] for _ in case.scores])
    got = top_k(case.scores, counts, case.present, groups=case.frame.masked_fill(~case.present, 99))
    for b in range(len(got)):
        expected = set()
        for g in range(4):
            places = places_of(case.present[b] & (case.frame[b] == g))
            expected |= best_of(case.scores[b].tolist(), places, int(counts[b, g]))
        assert set(places_of(got[b])) == expected


def test_top_k_tells_float64_scores_apart():
    """In float32 both would be equal, and the first would win."""
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert top_k(scores, torch.tensor([1]), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[False, True]]


def test_top_k_orders_infinities_above_nan():
    scores = torch.tensor([[math.nan, -math.inf, 0.0, math.inf]])
    for count, expected in enumerate([[3], [2, 3], [1, 2, 3], [0, 1, 2, 3]], 1):
        assert places_of(top_k(scores, torch.tensor([count]), torch.ones(1, 4, dtype=torch.bool))[0]) == expected


def test_top_k_takes_present_nan_before_absent_entries():
    present = torch.tensor([[False, False, True, True]])
    got = top_k(torch.tensor([[5.0, math.nan, math.nan, math.nan]]), torch.tensor([1]), present)
    assert places_of(got[0]) == [2]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_shares_add_up_and_fit(case):
    got = share(case.counts, case.frame, case.present)
    for b in range(len(got)):
        frame = case.frame[b][case.present[b]].tolist()
        count = min(int(case.counts[b]), len(frame))
        expected = listed_shares(count, frame) if frame else []
        assert got[b].tolist() == expected + [0] * (got.shape[1] - len(expected))
        assert sum(expected) == count
        assert all(k <= frame.count(g) for g, k in enumerate(expected))


def test_shares_follow_the_sizes_of_frames():
    frame = torch.tensor([[0] * 6 + [1] * 3 + [2] * 1])
    present = torch.ones(1, 10, dtype=torch.bool)
    assert share(torch.tensor([5]), frame, present).tolist() == [[3, 2, 0]]  # 3, 1.5 and 0.5: the earlier half wins


@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans())
def test_pools_come_apart_and_together(case, apart):
    pool = pools(case.counts, case.frame, case.present, apart=apart)
    shares = share(case.counts, case.frame, case.present)
    batch, width = case.present.shape
    groups = len(pool.row) // batch
    numbers = torch.arange(batch * width).view(batch, width)
    for i, (b, places, present, count) in enumerate(
        zip(pool.row.tolist(), pool.place, pool.present, pool.counts, strict=True)
    ):
        assert b == i // groups
        inside = case.present[b] & (case.frame[b] == i % groups) if apart else case.present[b]
        assert places[present].tolist() == places_of(inside)
        assert count == (shares[b, i % groups] if apart else case.counts[b])
        assert torch.equal(pool.split(numbers)[i][present], numbers[b][inside])
    filled = numbers.masked_fill(~case.present, 0)
    assert torch.equal(pool.join(pool.split(numbers)), filled)
    deep = torch.stack([numbers, -numbers], -1).double()
    assert torch.equal(pool.join(pool.split(deep)), torch.stack([filled, -filled], -1).double())


@settings(max_examples=100, deadline=None)
@given(cases())
def test_greedy_with_fixed_values_is_top_k(case):
    got = greedy(case.scores, case.counts, case.present, lambda best: case.scores)
    assert torch.equal(got, top_k(case.scores, case.counts, case.present))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_greedy_values_may_depend_on_the_last_pick(case):
    """Rule: each pick is the candidate nearest behind the last one, round and round."""
    width = case.present.shape[1]
    index = torch.arange(width)
    got = greedy(
        -index.float().expand(len(case.present), -1),
        case.counts,
        case.present,
        lambda best: -((index - best - 1) % width).float(),
    )
    for b in range(len(got)):
        assert places_of(got[b]) == places_of(case.present[b])[: int(case.counts[b])]


def scattered(x, places, count):
    """Greedy max-min by cosine distance in plain Python."""
    distance = {(i, j): 1 - cosine(x[i], x[j]) for i in places for j in places if i != j}
    picked = []
    while len(picked) < min(count, len(places)):
        left = [i for i in places if i not in picked]
        value = [min([distance[i, j] for j in picked or places if j != i], default=math.inf) for i in left]
        picked.append(left[value.index(max(value))])
    return sorted(picked)


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(2, 6))
def test_diversity(case, dim):
    draw = torch.Generator().manual_seed(dim)
    x = torch.randn(*case.present.shape, dim, generator=draw, dtype=torch.float64)
    got = max_min_diversity(x.masked_fill(~case.present[..., None], math.nan), case.counts, case.present)
    for b in range(len(got)):
        assert places_of(got[b]) == scattered(x[b], places_of(case.present[b]), int(case.counts[b]))


def test_diversity_of_the_published_sizes_is_quick_enough():
    """2880 tokens of five tiles, 640 of them kept; a loop over all pairs in Python would take minutes."""
    x = torch.randn(1, 2880, 32, generator=torch.Generator().manual_seed(0))
    present = torch.ones(1, 2880, dtype=torch.bool)
    many = max_min_diversity(x, torch.tensor([640]), present)
    few = max_min_diversity(x, torch.tensor([64]), present)
    assert int(many.sum()) == 640
    assert not (few & ~many).any()  # greedy picks are nested
    nearest = (1 - cosines(x[:, many[0]])[0]).fill_diagonal_(2).amin(1)
    assert nearest.min() > (1 - cosines(x[:, :640])[0]).fill_diagonal_(2).amin(1).min()


def test_cosines_with_oneself_and_with_nothing():
    x = torch.tensor([[[0.1, 0.2, 0.7], [0.0, 0.0, 0.0], [3.0, 1.0, 2.0]]])
    found = cosines(x)[0]
    assert found.diagonal().tolist() == [1.0, 0.0, 1.0]
    assert found[0, 2] == pytest.approx(cosine(x[0, 0], x[0, 2]), rel=1e-6)
    many = cosines(torch.randn(2, 101, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert torch.equal(many, many.transpose(1, 2))
    assert cosines(x.bfloat16()).dtype == torch.float32
    assert cosines(x.double()).dtype == torch.float64


def test_extremes_look_at_what_is_there():
    x = torch.tensor([[5.0, 1.0, math.nan, 9.0], [2.0, 2.0, 2.0, 7.0]])
    present = torch.tensor([[True, True, True, False], [True, False, False, True]])
    low, high = extremes(x, present)
    assert low.tolist() == [[1.0], [2.0]]
    assert high.tolist() == [[5.0], [7.0]]
