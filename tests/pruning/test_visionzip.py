"""VisionZip against its definition in plain Python: dominant tokens, targets, who joins them, and what becomes of them."""

from __future__ import annotations

import math

import pytest
import torch

from mmeff.pruning import VisionZip

from .input_scene import LAYERS, Scene, by_frame, cosine, kept, largest, shares

SCENE = Scene()
METHOD = VisionZip(contextual=0.4)


def zipped(b, places, count, *, contextual=0.4, layer=-2, rows="class", scene=SCENE):
    """{place: mean of who joined, or None for dominant tokens} of `count` tokens kept of row b."""
    scores = (scene.by_class if rows == "class" else scene.by_all)[layer % LAYERS][b]
    m = round(contextual * count)
    dominant = [places[i] for i in largest([scores[p] for p in places], count - m)]
    rest = [p for p in places if p not in dominant]
    targets = rest[:: max(1, len(rest) // m)][:m] if m else []
    joined = {t: [] for t in targets}
    keys = scene.keys[layer % LAYERS][b]
    for p in rest:
        if m and p not in targets:
            likeness = [cosine(keys[p], keys[t]) for t in targets]
            joined[targets[likeness.index(max(likeness))]].append(p)
    return dict.fromkeys(dominant) | joined


def features_of(b, target, joined, scene=SCENE):
    x = [row.tolist() for row in scene.features[b]]
    width = range(len(x[0]))
    mean = [sum(x[p][d] for p in joined) / max(1, len(joined)) for d in width]
    return torch.tensor([x[target][d] + mean[d] for d in width], dtype=torch.float64)


def check(method, view, scene=SCENE, **how):
    decision = method.decide(view)
    found = kept(method, view)
    embedded = view.embeddings()
    merged = 0
    for b in range(3):
        expected = zipped(b, list(range(scene.visual[b])), int(view.counts[b]), scene=scene, **how)
        assert found[b] == sorted(expected)
        for place, joined in expected.items():
            if joined is None:
                assert torch.equal(decision.hidden[b, place], embedded[b, place])
            else:
                wanted = scene.project(features_of(b, place, joined, scene))
                torch.testing.assert_close(decision.hidden[b, place], wanted, rtol=1e-12, atol=1e-12)
                assert not torch.allclose(decision.hidden[b, place], embedded[b, place])
                merged += len(joined)
    assert not decision.hidden.isnan().any()
    return merged


@pytest.mark.parametrize("keep", [0.5, 0.4, 5, 7])
def test_follows_the_definition(keep):
    assert check(METHOD, SCENE.view(keep=keep)) > 0 or keep == 7


@pytest.mark.parametrize("how", [{"rows": "all"}, {"layer": 0}, {"layer": -1, "rows": "all"}, {"contextual": 1.0}])
def test_every_field_counts(how):
    check(METHOD.replace(**how), SCENE.view(keep=0.5), **how)
    with pytest.raises(AssertionError):
        check(METHOD, SCENE.view(keep=0.5), **how)


def test_another_scene_is_told_apart():
    """The comparison can fail on what tokens became, not only on which stay."""
    view = SCENE.view(keep=0.5)
    view.encoder().inputs = view.encoder().inputs + 1e-6
    with pytest.raises(AssertionError):
        check(METHOD, view)


@pytest.mark.parametrize("quota", ["prompt", "frame"])
def test_a_row_is_the_same_alone(quota):
    method = METHOD.replace(quota=quota)
    batch = method.decide(SCENE.view(keep=0.6))
    for b, n in enumerate(SCENE.visual):
        alone = method.decide(SCENE.view([b], keep=0.6))
        assert torch.equal(alone.keep[0], batch.keep[b, :n])
        places = alone.keep[0]
        torch.testing.assert_close(alone.hidden[0, places], batch.hidden[b, :n][places], rtol=1e-12, atol=1e-12)


def test_frames_are_zipped_one_by_one():
    view = SCENE.view(keep=0.6)
    found = kept(METHOD.replace(quota="frame"), view)
    decision = METHOD.replace(quota="frame").decide(view)
    for b in range(3):
        expected, count = {}, int(view.counts[b])

        def choose(places, k, b=b, expected=expected):
            expected.update(zipped(b, places, k))
            return [i for i, p in enumerate(places) if p in expected]

        assert found[b] == by_frame(choose, count, SCENE.frame[b])
        assert sum(shares(count, SCENE.frame[b].tolist())) == count == len(expected)
        for place, joined in expected.items():
            if joined is not None:
                wanted = SCENE.project(features_of(b, place, joined))
                torch.testing.assert_close(decision.hidden[b, place], wanted, rtol=1e-12, atol=1e-12)


def test_without_contextual_tokens_nothing_is_merged():
    view = SCENE.view(keep=0.5)
    decision = METHOD.replace(contextual=0.0).decide(view)
    assert decision.hidden is None
    for b, n in enumerate(SCENE.visual):
        assert decision.keep[b].nonzero()[:, 0].tolist() == largest(SCENE.by_class[2][b], int(view.counts[b]))
        assert not decision.keep[b, n:].any()


def test_contextual_tokens_may_round_to_none_in_some_rows():
    check(METHOD.replace(contextual=0.2), SCENE.view(keep=0.25), contextual=0.2)  # 13, 7 and 10 tokens: 1, 0 and 0
    check(METHOD.replace(contextual=0.05), SCENE.view(keep=0.25), contextual=0.05)  # none anywhere


def test_keeping_all_merges_nobody():
    view = SCENE.view(keep=1.0)
    decision = METHOD.decide(view)
    assert torch.equal(decision.keep, view.present)
    check(METHOD, view)


def test_broken_keys_join_the_first_target_and_hurt_nobody():
    scene = Scene()
    view = scene.view(keep=0.5)
    broken = sorted(set(range(13)) - set(zipped(0, list(range(13)), 6)))[0]
    view.encoder().key[2][0, broken] = math.nan
    scene.keys[2][0][broken] = torch.zeros(3, dtype=torch.float64)
    decision, clean = METHOD.decide(view), METHOD.decide(SCENE.view(keep=0.5))
    assert torch.equal(decision.keep, clean.keep)
    assert not decision.hidden.isnan().any()
    target = min(p for p, joined in zipped(0, list(range(13)), 6).items() if joined is not None)
    joined = [*zipped(0, list(range(13)), 6)[target]]
    wanted = SCENE.project(features_of(0, target, sorted({*joined, broken})))
    torch.testing.assert_close(decision.hidden[0, target], wanted, rtol=1e-12, atol=1e-12)


def test_half_precision_stays_half_precision():
    decision = METHOD.decide(SCENE.view(keep=0.5, dtype=torch.bfloat16))
    assert decision.hidden.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keep", "dominant", "contextual"), [(192, 162, 30), (128, 108, 20), (64, 54, 10), (1 / 3, 162, 30)]
)
def test_published_budgets(keep, dominant, contextual):
    scene = Scene(visual=(576,), texts=(3,), frames=(1,))
    view = scene.view(keep=keep)
    method = VisionZip(keep=keep)
    decision = method.decide(view)
    changed = (decision.hidden != view.embeddings()).any(-1) & decision.keep
    assert int(decision.keep.sum()) == dominant + contextual
    assert int(changed.sum()) == contextual
    best = set(largest(scene.by_class[2][0], dominant))
    assert best <= set(decision.keep[0].nonzero()[:, 0].tolist())


def test_needs_follow_the_fields():
    assert VisionZip.needs == VisionZip().needs == {"encoder", "class token", "projector"}
    assert VisionZip(rows="all").needs == {"encoder", "projector"}
    assert VisionZip(contextual=0.0).needs == {"encoder", "class token"}
    assert VisionZip(rows="all").replace(rows="class").needs == VisionZip.needs


def test_errors_and_budget():
    with pytest.raises(
        ValueError, match=r"VisionZip.contextual must be in \[0, 1\], got 1.5; the published share is 0.15625\."
    ):
        VisionZip(contextual=1.5)
    with pytest.raises(
        ValueError, match=r"VisionZip.layer must be a layer of this encoder, which has 4, got -5; pass layer=-2"
    ):
        VisionZip(layer=-5).decide(SCENE.view())
    with pytest.raises(ValueError, match=r"VisionZip.keep must be a fraction in \(0, 1\]"):
        VisionZip(keep=1.5)
    assert VisionZip(keep=64).at_budget(0.25, 32).points(32)[0].count(576) == 144
