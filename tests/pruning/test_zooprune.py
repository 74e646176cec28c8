"""ZOOPrune against its definition in plain Python, and its sensitivity against the derivative."""

from __future__ import annotations

import math

import pytest
import torch

from mmeff.pruning import ZOOPrune, zooprune

from .input_scene import Scene, by_frame, cosine, kept

SCENE = Scene()
METHOD = ZOOPrune(directions=5)


def unit_vectors(count, width, seed=0):
    found = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()
    return [u / u.square().sum().sqrt() for u in found]


def moved(scene, b, *, directions=5, step=0.01, seed=0):
    found = []
    for x in scene.features[b]:
        lengths = [
            (scene.project(x + step * u) - scene.project(x - step * u)).square().sum().sqrt() / (2 * step)
            for u in unit_vectors(directions, len(x), seed)
        ]
        found.append(float(sum(lengths)) / directions)
    return found


def chosen(scene, b, places, count, **how):
    all_moved = moved(scene, b, **how)
    s = [all_moved[p] for p in places]
    low, high = min(s), max(s)
    s = [(x - low) / (high - low + 1e-8) for x in s]
    z = [scene.embedded[b][p] for p in places]
    picked = []
    for _ in range(count):
        left = [i for i in range(len(places)) if i not in picked]
        value = [s[i] * (1 - max([cosine(z[i], z[j]) for j in picked])) if picked else s[i] for i in left]
        picked.append(left[value.index(max(value))])
    return sorted(picked)


@pytest.mark.parametrize("keep", [0.5, 0.3, 4, 1, 1.0])
def test_follows_the_definition(keep):
    view = SCENE.view(keep=keep)
    for b, found in enumerate(kept(METHOD, view)):
        assert found == chosen(SCENE, b, list(range(SCENE.visual[b])), int(view.counts[b]))


@pytest.mark.parametrize("how", [{"directions": 9}, {"seed": 3}, {"step": 1.0}])
def test_every_field_counts(how):
    wide = Scene(visual=(40, 30, 20))
    view = wide.view(keep=0.5)
    found = kept(METHOD.replace(**how), view)
    expected = [chosen(wide, b, list(range(n)), n // 2, **how) for b, n in enumerate(wide.visual)]
    assert found == expected
    assert found != kept(METHOD, view)


def test_frames_are_problems_of_their_own():
    view = SCENE.view(keep=0.4)
    for b, found in enumerate(kept(METHOD.replace(quota="frame"), view)):
        expected = by_frame(lambda places, k, b=b: chosen(SCENE, b, places, k), int(view.counts[b]), SCENE.frame[b])
        assert found == expected


@pytest.mark.parametrize("quota", ["prompt", "frame"])
def test_a_row_keeps_the_same_alone(quota):
    method = METHOD.replace(quota=quota)
    batch = kept(method, SCENE.view(keep=0.5))
    assert [kept(method, SCENE.view([b], keep=0.5))[0] for b in range(3)] == batch


def test_sensitivity_is_the_length_of_the_derivative():
    features, view = SCENE.features[0][None], SCENE.view([0])
    directions = METHOD.unit_vectors(features)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(5).double())
    found = zooprune.sensitivity(features, directions, 1e-5, view.encoder().project, 6)
    for i, x in enumerate(features[0]):
        jacobian = torch.autograd.functional.jacobian(SCENE.project, x)
        expected = sum(float((jacobian @ u).norm()) for u in directions) / 5
        assert float(found[0, i]) == pytest.approx(expected, rel=1e-6)
        assert float(found[0, i]) != pytest.approx(1.01 * expected, rel=1e-6)


def test_chunks_change_nothing_and_bound_what_is_projected(monkeypatch):
    features = torch.stack([SCENE.features[0], SCENE.features[0].flip(0)])
    directions, sizes = METHOD.unit_vectors(features), []

    def project(x):
        sizes.append(x.shape[:-1].numel() * 6)
        return SCENE.project(x)

    whole = zooprune.sensitivity(features, directions, 0.01, project, 6)
    assert len(sizes) == 1
    monkeypatch.setattr(zooprune, "CHUNK", 300)
    sizes.clear()
    parts = zooprune.sensitivity(features, directions, 0.01, project, 6)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert len(sizes) == 6
    assert max(sizes) <= 300


def test_steps_are_taken_in_float32():
    """A step of 0.01 over hundreds of dimensions is nothing to a bfloat16 of size 1."""
    seen = []
    view = SCENE.view(keep=0.5, dtype=torch.bfloat16)
    inner = view.encoder().projector
    view.encoder().projector = lambda x: (seen.append(x.dtype), inner(x))[1]
    found = kept(METHOD, view)
    assert set(seen) == {torch.float32}
    rounded = Scene()
    rounded.features = [x.bfloat16().double() for x in SCENE.features]
    rounded.embedded = [x.bfloat16().double() for x in SCENE.embedded]
    assert found == kept(METHOD, rounded.view(keep=0.5))


def test_broken_tokens_go_last():
    scene = Scene()
    scene.features[0][:6] = math.nan
    assert kept(METHOD, scene.view([0], keep=7)) == [list(range(6, 13))]


def test_errors_needs_and_budget():
    assert ZOOPrune().needs == {"encoder", "projector"}
    assert (ZOOPrune().directions, ZOOPrune().step) == (64, 0.01)
    for field, value, rule in [
        ("directions", 0, "at least 1"),
        ("step", 0.0, "above 0"),
        ("seed", -1, r"in \[0, 2\*\*63\)"),
    ]:
        with pytest.raises(ValueError, match=rf"ZOOPrune.{field} must be {rule}, got {value}"):
            ZOOPrune(**{field: value})
    assert ZOOPrune().at_budget(1 / 3, 32).points(32)[0].count(576) == 192
