"""Prune points: their grammar, what they refuse, and fractions that meet a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmeff.config import option
from mmeff.pruning._base import InputPruner, LayerPruner
from mmeff.pruning._schedule import PrunePoint, check_points, parse_schedule, scale_to_mean


def points_of(text):
    return [(p.layer, p.keep) for p in parse_schedule(text)]


def mean_over_layers(points, layers):
    """By a loop over layers, as a reader would count."""
    total, now = 0.0, 1.0
    for layer in range(layers):
        now = dict(points).get(layer, now)
        total += now
    return total / layers


@st.composite
def schedules(draw, least=0):
    """(points, layers) with ascending layers and fractions that do not grow."""
    layers = draw(st.integers(least + 1, 40))
    places = sorted(draw(st.sets(st.integers(least, layers - 1), min_size=1, max_size=4)))
    keeps = sorted(draw(st.lists(st.floats(0.01, 1.0), min_size=len(places), max_size=len(places))), reverse=True)
    return list(zip(places, keeps, strict=True)), layers


@dataclass(frozen=True, kw_only=True)
class Inside(LayerPruner):
    """A method inside the language model."""

    where: str = option("2:0.5", "its points", unit="schedule")

    def default_points(self, layers):
        return parse_schedule(self.where)


@dataclass(frozen=True, kw_only=True)
class Anywhere(Inside):
    """One that needs no layer before it."""

    least_layer: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class Before(InputPruner):
    """A method before the language model."""


# ---- grammar


def test_fractions_and_numbers():
    assert points_of("2:0.5, 10 : 0.25") == [(2, 0.5), (10, 0.25)]
    assert points_of("2:288,10:64,20:0") == [(2, 288), (10, 64), (20, 0)]
    assert [type(keep) for _, keep in points_of("1:1,2:1.0,3:1e-1")] == [int, float, float]


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":0.5", "a:0.5", "2:x", "2:0.5,", "2:0.5:3", "2.5:0.5", "2:+-5", "2:²"]
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match=r'a schedule is "layer:keep" pairs such as .*, got .* in '):
        parse_schedule(text)


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_text_gives_the_points_back(case):
    points, _ = case
    assert points_of(",".join(f"{layer}:{keep!r}" for layer, keep in points)) == points


def test_counts():
    assert PrunePoint(layer=2, keep=0.25).count(576) == 144
    assert PrunePoint(layer=2, keep=1 / 3).count(576) == 192
    assert PrunePoint(layer=2, keep=64).count(576) == 64
    assert PrunePoint(layer=2, keep=64).count(64) == 64
    assert PrunePoint(layer=2, keep=64).count(0) == 0  # a prompt without images
    assert PrunePoint(layer=2, keep=0).count(576) == PrunePoint(layer=2, keep=0.0).count(576) == 0
    with pytest.raises(
        ValueError, match="before layer 2 the method is to keep 64 visual tokens of a prompt that has 63"
    ):
        PrunePoint(layer=2, keep=64).count(63)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:1.5", r"M keeps a fraction in \[0, 1\] or a number of tokens >= 0 at each layer, got 1.5 before layer 2"),
        ("2:-1", "got -1 before layer 2"),
        ("2:nan", "got nan before layer 2"),
        (
            "0:0.5",
            "M prunes before layers of at least 1, because the layer before supplies the scores and at most 7, for a",
        ),
        ("8:0.5", "got layer 8 in 8:0.5"),
        ("4:0.5,2:0.5", "the layers of M must ascend, got 4:0.5, 2:0.5; write them in order, each once"),
        ("2:0.5,2:0.25", "the layers of M must ascend"),
        ("2:0.25,4:0.5", "M cannot bring dropped tokens back, but its keeps grow: 2:0.25, 4:0.5; let them fall"),
        ("2:64,4:65", "M cannot bring dropped tokens back"),
    ],
)
def test_points_out_of_range(text, message):
    with pytest.raises(ValueError, match=message):
        check_points("M", parse_schedule(text), least=1, layers=8)


@settings(max_examples=50, deadline=None)
@given(schedules(least=1))
def test_points_in_range_pass(case):
    points, layers = case
    check_points("M", tuple(PrunePoint(layer=x, keep=k) for x, k in points), least=1, layers=layers)


def test_schedules_are_checked_when_they_are_written():
    with pytest.raises(
        ValueError, match=r"Inside prunes before layers of at least 1, because .*; got layer 0 in 0:0.5"
    ):
        Inside(schedule="0:0.5")
    assert Anywhere(schedule="0:0.5").points(4) == (PrunePoint(layer=0, keep=0.5),)
    with pytest.raises(ValueError, match="and at most 3, for a model of 4 layers; got layer 4"):
        Inside(schedule="4:0.5").points(4)


# ---- budgets


@settings(max_examples=300, deadline=None)
@given(schedules(), st.floats(0.0, 1.0))
def test_scaled_points_hit_the_mean(case, mean):
    points, layers = case
    found = scale_to_mean(points, mean, layers)
    if mean * layers < points[0][0] - 1e-6:
        assert found is None
        return
    assume(mean * layers >= points[0][0])
    assert [layer for layer, _ in found] == [layer for layer, _ in points]
    assert mean_over_layers(found, layers) == pytest.approx(mean, abs=1e-9)
    scales = {round(new / old, 9) for (_, new), (_, old) in zip(found, points, strict=True) if new < 1 - 1e-12}
    assert len(scales) <= 1 or max(scales) - min(scales) < 1e-6 * max(scales)  # one factor for all that are not full
    for (_, new), (_, old) in zip(found, points, strict=True):
        assert 0 <= new <= 1
        if new >= 1 - 1e-12 and scales:
            assert old * max(scales) >= 1 - 1e-6


def test_scaling_is_exact_where_numbers_are_small():
    """Of 8 layers, 2 see all and 6 see a half of 1.0: a mean of 0.625."""
    assert scale_to_mean([(2, 1.0)], 0.625, 8) == [(2, 0.5)]
    assert scale_to_mean([(2, 1e-12)], 0.625, 8) == [(2, pytest.approx(0.5))]
    assert scale_to_mean([(2, 0.5), (4, 0.0)], 0.5, 8) == [(2, 1.0), (4, 0.0)]
    assert scale_to_mean([(2, 0.5), (4, 0.0)], 0.51, 8) is None
    assert scale_to_mean([(2, 0.5)], 0.25, 8) == [(2, 0.0)]
    assert scale_to_mean([(2, 0.5)], 1.0, 8) == [(2, 1.0)]


@settings(max_examples=100, deadline=None)
@given(schedules(least=1), st.floats(0.01, 1.0))
def test_methods_reach_a_budget(case, mean):
    points, layers = case
    assume(mean * layers >= points[0][0])
    method = Inside(schedule=",".join(f"{layer}:{keep!r}" for layer, keep in points)).at_budget(mean, layers)
    found = [(p.layer, p.keep) for p in method.points(layers)]
    assert all(isinstance(keep, float) for _, keep in found)
    assert mean_over_layers(found, layers) == pytest.approx(mean, abs=1e-9)


def test_numbers_of_tokens_give_proportions():
    method = Inside(where="2:300,6:100").at_budget(0.5, 10)
    (_, first), (_, second) = [(p.layer, p.keep) for p in method.points(10)]
    assert first / second == pytest.approx(3)
    assert 2 + 4 * first + 4 * second == pytest.approx(5)
    assert Inside(where="2:300,6:0").at_budget(0.5, 10).schedule == "2:0.75,6:0.0"
    with pytest.raises(
        ValueError,
        match=r"Inside cannot be set to a budget from fractions and numbers of tokens at once, got 2:300, 6:0.25",
    ):
        Inside(where="2:300,6:0.25").at_budget(0.5, 10)


def test_the_published_example_of_equal_budgets():
    """FastV at K=2 needs 98 of 576 tokens for a mean of 128 over 32 layers."""
    (point,) = Inside(where="2:0.5").at_budget(128 / 576, 32).points(32)
    assert point.count(576) == 98


def test_budgets_out_of_reach():
    with pytest.raises(
        ValueError,
        match=r"Inside prunes first before layer 4 of 10, so the mean .* is at least 0.4 of all, got a budget of 0.3; raise",
    ):
        Inside(where="4:0.5,6:0.25").at_budget(0.3, 10)
    with pytest.raises(
        ValueError,
        match=r"Inside drops all visual tokens before layer 6 of 10, so their mean .* is at most 0.6 .* lower the",
    ):
        Inside(where="4:0.5,6:0.0").at_budget(0.7, 10)
    assert Inside(where="4:0.5,6:0.25").at_budget(0.4, 10).schedule == "4:0.0,6:0.0"


@pytest.mark.parametrize("mean", [0.0, -0.1, 1.1, math.nan, 64])
@pytest.mark.parametrize("cls", [Inside, Before])
def test_a_budget_is_a_fraction(cls, mean):
    with pytest.raises(
        ValueError, match=rf"a budget for {cls.__name__} must be a fraction of .* in \(0, 1\], got {mean}"
    ):
        cls().at_budget(mean, 10)


def test_before_the_language_model_the_mean_is_what_is_kept():
    assert Before(keep=64).at_budget(0.125, 10).points(10) == (PrunePoint(layer=0, keep=0.125),)
    assert Before().at_budget(1, 10).keep == 1.0


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.0, r"Before.keep must be a fraction in \(0, 1\] or a number of tokens, got 0.0; pass keep=0.25\."),
        (1.5, r"Before.keep must be a fraction in \(0, 1\]"),
        (math.nan, r"Before.keep must be a fraction in \(0, 1\]"),
        (0, r"Before.keep must be at least 1 token when it is an int, got 0; pass keep=0.25 for a fraction\."),
    ],
)
def test_keeps_are_checked(keep, message):
    with pytest.raises(ValueError, match=message):
        Before(keep=keep)
