"""Scenes and clips: deterministic, disjoint between splits, and answered rightly by an independent reading."""

from __future__ import annotations

import numpy as np
import pytest

from mmeff.tiny import clips, scenes


def test_clips_are_a_function_of_seed_and_index():
    one, labels = clips.sample(1, 2, 4)
    again, same = clips.sample(1, 2, 4)
    assert np.array_equal(one, again)
    assert labels.prompts() == same.prompts()
    assert one.shape == (4, 17, 48, 48, 3)
    assert one.min() >= 0 and one.max() <= 1
    for seed, index in ((1, 3), (2, 2)):
        assert not np.array_equal(one, clips.sample(seed, index, 4)[0])


def test_pooled_clips_are_averages():
    whole, _ = clips.sample(5, 0, 3)
    pooled, _ = clips.sample(5, 0, 3, pooled=True)
    mean = whole.reshape(3, 17, 24, 2, 24, 2, 3).mean(axis=(3, 5))
    assert np.abs(mean - pooled).max() < 1e-5


def test_detector_reads_real_clips():
    video, labels = clips.sample(9, 0, 48)
    score = clips.detect(video).score(labels)
    assert score == {"found": 1.0, "colour": 1.0, "shape": 1.0, "direction": 1.0, "all": 1.0}


@pytest.mark.parametrize("spoil", ["noise", "blank", "still", "reversed"])
def test_detector_rejects_what_is_wrong(spoil):
    video, labels = clips.sample(9, 0, 24)
    if spoil == "noise":
        video = np.random.default_rng(0).uniform(size=video.shape)
    elif spoil == "blank":
        video = np.full_like(video, 0.3)
    elif spoil == "still":
        video = np.repeat(video[:, :1], 17, axis=1)
    else:
        video = video[:, ::-1]
    score = clips.detect(video).score(labels)
    assert score["all"] == 0.0
    assert score["found"] == (1.0 if spoil == "reversed" else 0.0)


def test_detector_refuses_other_shapes():
    with pytest.raises(ValueError, match="24k"):
        clips.detect(np.zeros((1, 2, 30, 30, 3)))


def test_splits_of_clips_share_nothing():
    seen = {}
    for seed in (clips.TRAIN_SEED + 1, clips.GATE_SEED, clips.HELDOUT_SEED):
        for index in range(4):
            for clip in clips.sample(seed, index, 16, frames=1, pooled=True)[0]:
                key = clip.tobytes()
                assert seen.setdefault(key, seed) == seed


def test_scenes_are_a_function_of_seed_and_index():
    a, b = scenes.sample(3, 1, 4), scenes.sample(3, 1, 4)
    assert np.array_equal(a.images, b.images)
    assert not np.array_equal(a.images, scenes.sample(4, 1, 4).images)
    assert a.images.shape == (4, 96, 96, 3)
    assert len({scenes.TRAIN_SEED, scenes.GATE_SEED, scenes.HELDOUT_SEED, scenes.PRUNING_SEED}) == 4


def test_answers_agree_with_the_pixels():
    """Every answer is checked against what is drawn, read from `owner` and the pixels, not from the question's code."""
    drawn = scenes.sample(21, 0, 24)
    draw = np.random.default_rng(0)
    palette = np.array(list(scenes.COLOURS.values()))
    kinds = set()
    for b in range(24):
        ids = [o for o in range(5) if (drawn.owner[b] == o).any()]
        facts = []
        for o in ids:
            mask = drawn.owner[b] == o
            colour = list(scenes.COLOURS)[((drawn.images[b][mask].mean(axis=0) - palette) ** 2).sum(axis=1).argmin()]
            y, x = (axis.mean() for axis in np.nonzero(mask))
            place = f"{'bottom' if y > 47.5 else 'top'} {'right' if x > 47.5 else 'left'}"
            facts.append((colour, scenes.SHAPES[drawn.shape[b, o]], place))
        for q in scenes.ask(drawn, b, draw, 12):
            kinds.add(q.kind)
            words = q.text.split()
            if q.kind == "count":
                assert q.answer == scenes.NUMBERS[len(ids)]
            elif q.kind == "colour_of":
                assert [c for c, s, _ in facts if s == words[4]] == [q.answer]
            elif q.kind == "shape_of":
                assert [s for c, s, _ in facts if c == words[3]] == [q.answer]
            elif q.kind == "exists":
                assert ((words[3], words[4]) in {(c, s) for c, s, _ in facts}) == (q.answer == "yes")
            elif q.kind == "where":
                assert [p for c, s, p in facts if (c, s) == (words[3], words[4])] == [q.answer]
            else:
                here = [(c, s) for c, s, p in facts if p == " ".join(words[5:7])]
                assert len(here) == 1
                assert q.answer == (here[0][0] if q.kind == "colour_at" else here[0][1])
    assert kinds == set(scenes.KINDS)


def test_every_word_is_in_the_vocabulary():
    known = set(scenes.words())
    drawn = scenes.sample(22, 0, 16)
    draw = np.random.default_rng(0)
    for b in range(16):
        for q in scenes.ask(drawn, b, draw, 20):
            assert {*q.text.split(), *q.answer.split()} <= known
