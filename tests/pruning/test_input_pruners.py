"""The methods that rank tokens one by one before the language model, and the controls, against plain Python."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeff.pruning import VTCCLS, DivPrune, NormTopK, RandomPruning, UniformPruning
from mmeff.pruning.randompruning import lots

from .input_scene import Scene, by_frame, cosine, kept, largest

SCENE = Scene()
KEEPS = [0.5, 0.3, 4, 1, 1.0]


def norms(b, places, count):
    return largest([math.sqrt(sum(x * x for x in SCENE.embedded[b][i].tolist())) for i in places], count)


def class_attention(b, places, count, layers=(2,)):
    return largest([sum(float(SCENE.by_class[n][b][i]) for n in layers) for i in places], count)


def scattered(b, places, count):
    x = SCENE.embedded[b]
    distance = {(i, j): 1 - cosine(x[i], x[j]) for i in places for j in places if i != j}
    picked = []
    for _ in range(count):
        left = [i for i in places if i not in picked]
        others = picked or places
        value = [min([distance[i, j] for j in others if j != i], default=math.inf) for i in left]
        picked.append(left[value.index(max(value))])
    return sorted(places.index(i) for i in picked)


def spaced(b, places, count):
    if count == 1:
        return [(len(places) - 1) // 2]
    return [math.floor(i * (len(places) - 1) / (count - 1) + 0.5) for i in range(count)]


def splitmix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def lot(seed, digest, index):
    """RandomPruning's hash with Python's integers."""
    row = splitmix((splitmix((digest ^ seed) % 2**64) + 0x9E3779B97F4A7C15) % 2**64)
    return (splitmix((row + (index + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24


def drawn(b, places, count, seed=0):
    return largest([lot(seed, int(SCENE.digest[b]), i) for i in places], count)


ORACLES = [
    (NormTopK(), norms),
    (VTCCLS(), class_attention),
    (VTCCLS(start=0), lambda b, places, count: class_attention(b, places, count, (0, 1, 2))),
    (VTCCLS(start=-3), lambda b, places, count: class_attention(b, places, count, (1, 2))),
    (DivPrune(), scattered),
    (UniformPruning(), spaced),
    (RandomPruning(), drawn),
    (RandomPruning(seed=12), lambda b, places, count: drawn(b, places, count, 12)),
]


def names(value):
    return value.name() if hasattr(value, "name") else None


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("method", "oracle"), ORACLES, ids=names)
def test_keeps_what_the_definition_says(method, oracle, keep):
    view = SCENE.view(keep=keep)
    found = kept(method, view)
    for b, n in enumerate(SCENE.visual):
        assert found[b] == oracle(b, list(range(n)), view.point.count(n))


@pytest.mark.parametrize(("method", "oracle"), ORACLES, ids=names)
def test_every_frame_keeps_its_share(method, oracle):
    view = SCENE.view(keep=0.4)
    found = kept(method.replace(quota="frame"), view)
    for b in range(len(SCENE.visual)):
        expected = by_frame(lambda places, k, b=b: oracle(b, places, k), int(view.counts[b]), SCENE.frame[b])
        assert found[b] == expected
    assert found != kept(method, view), "the frames of this scene must matter"


@pytest.mark.parametrize("quota", ["prompt", "frame"])
@pytest.mark.parametrize(("method", "oracle"), ORACLES, ids=names)
def test_a_row_keeps_the_same_alone(method, oracle, quota):
    method = method.replace(quota=quota)
    batch = kept(method, SCENE.view(keep=0.4))
    for b in range(len(SCENE.visual)):
        assert kept(method, SCENE.view([b], keep=0.4)) == [batch[b]]


@pytest.mark.parametrize(("method", "oracle"), ORACLES[:5], ids=names)
def test_another_scene_keeps_others(method, oracle):
    """The oracles above can fail: with other values they name other tokens."""
    view = Scene(seed=1).view(keep=0.5)
    assert any(row != oracle(b, list(range(SCENE.visual[b])), len(row)) for b, row in enumerate(kept(method, view)))


def test_nan_scores_go_last():
    scene = Scene()
    scene.embedded[0][:6] = math.nan  # of 13 tokens, of which 7 and then 9 stay
    for method in (NormTopK(), DivPrune()):
        assert kept(method, scene.view(keep=7))[0] == list(range(6, 13))
        assert kept(method, scene.view([0], keep=9))[0] == [0, 1, *range(6, 13)]


# ---- VTCCLS


@pytest.mark.parametrize(
    ("start", "layers", "expected"),
    [
        (0.5, 24, (12, 23)),
        (0.5, 2, (0, 1)),
        (0.99, 24, (22, 23)),
        (-10, 24, (14, 23)),
        (-99, 4, (0, 3)),
        (3, 5, (3, 4)),
    ],
)
def test_layers_of_the_sum(start, layers, expected):
    assert VTCCLS(start=start).summed(layers) == range(*expected)


def test_a_sum_without_layers_is_refused():
    with pytest.raises(
        ValueError,
        match=r"VTCCLS.start must leave a layer before the last of this encoder's 4, got 3; pass at most 2\.",
    ):
        kept(VTCCLS(start=3), SCENE.view())
    with pytest.raises(ValueError, match=r"VTCCLS.start must be in \[0, 1\) as a fraction of the depth, got 1.0"):
        VTCCLS(start=1.0)


# ---- DivPrune


def test_copies_of_a_token_are_picked_last_and_once():
    scene = Scene(visual=(8, 8, 8))
    scene.embedded[0][4:] = scene.embedded[0][:4]
    assert kept(DivPrune(), scene.view(keep=8))[0] == list(range(8))
    first = {i % 4 for i in kept(DivPrune(), scene.view(keep=4))[0]}
    assert len(first) == 4


def test_half_precision_is_compared_in_float32():
    view = SCENE.view(keep=6, dtype=torch.bfloat16)
    wider = SCENE.view(keep=6, dtype=torch.bfloat16)
    wider._embedded = wider._embedded.float()
    for method in (DivPrune(), NormTopK()):
        assert kept(method, view) == kept(method, wider)


# ---- controls


def test_draws_differ_between_prompts_and_seeds_and_are_nested():
    wide = Scene(visual=(200, 200, 200), texts=(3, 3, 3))
    first, second, third = map(set, kept(RandomPruning(), wide.view(keep=0.5)))
    other = set(kept(RandomPruning(seed=1), wide.view(keep=0.5))[0])
    for a, b in ((first, second), (first, third), (first, other)):
        assert 30 < len(a & b) < 70  # independent draws share a quarter of all: 50
    assert set(kept(RandomPruning(), wide.view(keep=0.25))[0]) < first


def test_a_draw_depends_on_the_original_place_alone():
    """Behind an earlier prune point the same tokens have the same lots."""
    view = SCENE.view(keep=4)
    scores = RandomPruning().score(view)
    view.original = view.original * 2 + 1
    moved = RandomPruning().score(view)
    assert torch.equal(moved[:, :3], scores[:, 1:7:2])


def test_lots_are_uniform():
    index = torch.arange(20000)[None].expand(3, -1)
    scores = lots(5, torch.tensor([0, 1, -(1 << 63)]), index)
    assert scores.dtype == torch.float32
    assert scores.min() >= 0
    assert scores.max() < 1
    for row in scores:
        counted = torch.histc(row, 20, 0, 1)
        assert ((counted - 1000).square() / 1000).sum() < 43.8  # chi squared, 19 degrees of freedom, p = 0.001
    assert torch.corrcoef(scores).sub(torch.eye(3)).abs().max() < 0.03
    assert torch.corrcoef(torch.stack([scores[0, 1:], scores[0, :-1]]))[0, 1].abs() < 0.03


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60))
def test_uniform_places_are_even(n, count):
    count = min(n, count)
    scene = Scene(visual=(n, 5), texts=(2, 2), frames=(1, 1), dim=2)
    view = scene.view(keep=1.0)
    view.counts = torch.tensor([count, 3])
    found, short = kept(UniformPruning(), view)
    assert short == [0, 2, 4]
    assert found == spaced(0, list(range(n)), count)
    gaps = {b - a for a, b in pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("cls", [RandomPruning, UniformPruning])
def test_controls_prune_where_they_are_told(cls):
    assert [(p.layer, p.keep) for p in cls().points(8)] == [(0, 0.25)]
    assert [(p.layer, p.keep) for p in cls(layer=3, keep=7).points(8)] == [(3, 7)]
    assert [(p.layer, p.keep) for p in cls(schedule="0:0.5,4:0.25").points(8)] == [(0, 0.5), (4, 0.25)]
    for field, value, message in [
        ("layer", -1, "must be at least 0, got -1; 0 prunes before the language model."),
        ("keep", 0.0, r"must be a fraction in \(0, 1\] or a number of tokens, got 0.0"),
        ("keep", 0, "must be at least 1 token when it is an int, got 0"),
    ]:
        with pytest.raises(ValueError, match=rf"{cls.__name__}\.{field} {message}"):
            cls(**{field: value})
    with pytest.raises(ValueError, match=f"{cls.__name__} prunes before layers of at least 0 and at most 7"):
        cls(layer=8).points(8)


def test_seeds_are_checked():
    with pytest.raises(ValueError, match=r"RandomPruning.seed must be in \[0, 2\*\*63\), got -1; pass seed=0\."):
        RandomPruning(seed=-1)


@pytest.mark.parametrize("cls", [NormTopK, VTCCLS, DivPrune, RandomPruning, UniformPruning])
def test_budgets(cls):
    """Before layer 0 the mean over layers is what is kept."""
    (point,) = cls().at_budget(0.125, 32).points(32)
    assert (point.layer, point.keep) == (0, pytest.approx(0.125))
    assert isinstance(point.keep, float)
    for mean in (0.0, 1.01, math.nan):
        with pytest.raises(ValueError, match=rf"a budget for {cls.__name__} must be a fraction .* got {mean}"):
            cls().at_budget(mean, 32)


def test_published_settings():
    assert DivPrune().points(32)[0].count(576) == 56
    assert VTCCLS(keep=64).points(32)[0].count(576) == 64
