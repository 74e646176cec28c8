"""Clips of moving shapes: deterministic, and answered rightly by a reading of the pixels that knows no labels."""

from __future__ import annotations

import numpy as np
import pytest

from mmeff.tiny import motions, scenes

PALETTE = np.array(list(scenes.COLOURS.values()))


def read(video: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Colour, shape and path (F, 2) of every object whose colour no other object has, from pixels alone."""
    dimmed = np.clip(video @ PALETTE.T / (PALETTE**2).sum(axis=1), 0.85, 1.0)  # (F, h, w, colours)
    distance = np.linalg.norm(video[..., None, :] - dimmed[..., None] * PALETTE, axis=-1)
    nearest = np.where(distance.min(axis=-1) < 0.15, distance.argmin(axis=-1), -1)
    found = []
    for c, colour in enumerate(scenes.COLOURS):
        masks = nearest == c
        if masks.sum(axis=(1, 2)).min() < 25:  # a clutter dot has up to 13 pixels, an object at least 35
            continue
        path = np.array([[np.median(axis) + 0.5 for axis in np.nonzero(mask)] for mask in masks])
        found.append((colour, _shape(masks, path), path))
    return found


def _shape(masks: np.ndarray, path: np.ndarray) -> str:
    """The shape whose template overlaps the masks best, over sizes and small shifts."""
    best = {}
    for s, shape in enumerate(scenes.SHAPES):
        overlaps = []
        for radius in np.linspace(*motions.RADIUS, 4):
            for shift in (-2.0, -1.0, 0.0, 1.0):  # the median pixel of a triangle is not its centre
                for frame in (0, 3, 7):
                    rows, columns, cover = scenes.coverage(s, path[frame] + [shift, 0], radius, size=motions.SIZE)
                    template = np.zeros(masks.shape[1:], dtype=bool)
                    template[rows, columns] = cover > 0.5
                    overlaps.append((template & masks[frame]).sum() / (template | masks[frame]).sum())
        best[shape] = max(overlaps)
    return max(best, key=lambda shape: best[shape])


def way(path: np.ndarray) -> str:
    dy, dx = path[-1] - path[0]
    if max(abs(dy), abs(dx)) < 5:
        return "still"
    return ("up" if dy < 0 else "down") if abs(dy) > abs(dx) else ("left" if dx < 0 else "right")


def place(point: np.ndarray) -> str:
    return f"{'bottom' if point[0] > 24 else 'top'} {'right' if point[1] > 24 else 'left'}"


def test_clips_are_a_function_of_seed_and_index():
    a, b = motions.sample(3, 1, 4), motions.sample(3, 1, 4)
    assert np.array_equal(a.videos, b.videos) and np.array_equal(a.path, b.path)
    for seed, index in ((4, 1), (3, 2)):
        assert not np.array_equal(a.videos, motions.sample(seed, index, 4).videos)
    assert a.videos.shape == (4, 8, 48, 48, 3) and a.videos.dtype == np.float32
    assert a.videos.min() >= 0 and a.videos.max() <= 1
    assert len({motions.TRAIN_SEED, motions.GATE_SEED, motions.HELDOUT_SEED, motions.PRUNING_SEED}) == 4


def test_the_curriculum_draws_single_objects():
    assert (motions.sample(5, 0, 16, most=1).count == 1).all()
    assert set(motions.sample(5, 0, 32).count) == {1, 2, 3}
    with pytest.raises(ValueError, match=r"most must be in \[1, 3\] objects, got 4"):
        motions.sample(5, 0, 2, most=4)


def test_objects_stay_inside_move_straight_and_never_meet():
    drawn = motions.sample(6, 0, 32)
    for b in range(32):
        n = drawn.count[b]
        path, radius = drawn.path[b, :n], drawn.radius[b, :n]
        assert (path > radius[:, None, None]).all() and (path < motions.SIZE - radius[:, None, None]).all()
        assert np.abs(np.diff(path, n=2, axis=1)).max() < 1e-4
        for i in range(n):
            for j in range(i):
                assert np.linalg.norm(path[i] - path[j], axis=1).min() > radius[i] + radius[j]


def test_answers_agree_with_the_pixels():
    drawn = motions.sample(31, 0, 40)
    draw, kinds, read_clips = np.random.default_rng(0), {}, 0
    for b in range(40):
        if len(set(drawn.colour[b, : drawn.count[b]])) < drawn.count[b]:
            continue  # `read` tells objects apart by colour
        facts = read(drawn.videos[b])
        read_clips += 1
        for q in motions.ask(drawn, b, draw, 12):
            words = q.text.split()
            if q.kind == "count":
                right = [motions.NUMBERS[len(facts)]]
            elif q.kind == "exists":
                right = ["yes" if (words[3], words[4]) in {(c, s) for c, s, _ in facts} else "no"]
            elif q.kind == "direction":
                right = [way(p) for c, s, p in facts if (c, s) == (words[4], words[5])]
            elif q.kind in ("where_first", "where_last"):
                end = 0 if q.kind == "where_first" else -1
                right = [place(p[end]) for c, s, p in facts if (c, s) == (words[3], words[4])]
            elif q.kind == "colour_of":
                right = [c for c, s, _ in facts if s == words[4]]
            else:
                right = [c if q.kind == "colour_moving" else s for c, s, p in facts if way(p) == words[4]]
            assert right == [q.answer], (b, q, facts)
            kinds.setdefault(q.kind, set()).add(q.answer)
    assert read_clips > 20
    assert set(kinds) == set(motions.KINDS)
    assert kinds["direction"] == set(motions.MOTIONS)
    assert kinds["where_first"] == kinds["where_last"] == set(scenes.QUADRANTS)


def test_a_wrong_answer_would_be_noticed():
    """The reading disagrees with clips played backwards: it does follow the motion."""
    drawn = motions.sample(32, 0, 12, most=1)
    for b in range(12):
        ((_, _, forward),) = read(drawn.videos[b])
        ((_, _, backward),) = read(drawn.videos[b, ::-1])
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still"}
        assert way(forward) == list(motions.MOTIONS)[drawn.motion[b, 0]] == opposite[way(backward)]


def test_frames_are_scenes():
    drawn = motions.sample(7, 0, 2)
    frames = drawn.frames(np.array([1, 5]))
    assert len(frames) == 4
    assert np.array_equal(frames.images[3], drawn.videos[1, 5])
    assert np.array_equal(frames.owner[2], drawn.owner[1, 1])
    assert np.array_equal(frames.centre[1], drawn.path[0, :, 5])


def test_every_word_is_in_the_vocabulary_and_ids_extend_those_of_scenes():
    known = motions.words()
    assert known[: len(scenes.words())] == scenes.words()
    drawn, draw = motions.sample(8, 0, 16), np.random.default_rng(0)
    for b in range(16):
        for q in motions.ask(drawn, b, draw, 20):
            assert {*q.text.split(), *q.answer.split()} <= set(known)


def test_prompt_refuses_frames_without_a_word():
    assert motions.prompt("where ?", 2) == "frame1 <image> frame2 <image> where ?"
    with pytest.raises(ValueError, match=r"frames must be in \[1, 8\], got 9"):
        motions.prompt("where ?", 9)
