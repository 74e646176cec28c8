"""Both experiments of training under a sparse attention run, resume, compare what they say, and can miss their claim."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mmeff.registry import build
from mmeff.tiny import clips, train_sparse, train_video, video_model

RADIAL = build("radial", **train_sparse.LONG_RADIAL, dense_steps=0)
VMOBA = build("vmoba", **train_sparse.START_VMOBA)
LITTLE = {"frame_steps": 1, "clip_steps": 1}


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_stretched_clip_has_that_many_times_the_tokens_and_stays_inside(times):
    frames = clips.stretched(times)
    assert (frames + 1) // 2 == times * video_model.GRID[0]
    videos, _ = clips.sample(clips.TUNE_SEED, 0, 8, frames=frames)
    paper = videos[:, :1, :1, :1]
    for edge in (videos[:, :, 0], videos[:, :, -1], videos[:, :, :, 0], videos[:, :, :, -1]):
        assert np.abs(edge - paper[:, :, 0]).max() < 1e-6
    assert clips.detect(videos).found.all()


def test_stretched_needs_a_positive_factor():
    with pytest.raises(ValueError, match="times must be >= 1"):
        clips.stretched(0)


def test_fine_tuning_has_clips_of_its_own():
    seeds = [clips.TRAIN_SEED, clips.GATE_SEED, clips.HELDOUT_SEED, clips.TUNE_SEED, clips.TUNE_HELDOUT_SEED]
    assert len(set(seeds)) == len(seeds)


def test_long_compares_two_runs(tmp_path, monkeypatch):
    full = train_sparse.long_recipe
    short = {"frames": 9, "held_out": 2, "held_out_levels": 1, "batch": 2}
    monkeypatch.setattr(train_sparse, "long_recipe", lambda *a, **k: replace(full(*a, **k), **short))
    folders = (tmp_path / "work", tmp_path / "out")
    assert train_sparse.long(2, RADIAL, *folders, steps=2, only="dense") is None
    assert not (tmp_path / "out" / train_sparse.COMPARISON).exists()
    found = train_sparse.long(2, RADIAL, *folders, steps=2)
    assert found == json.loads((tmp_path / "out" / train_sparse.COMPARISON).read_text())
    assert found["tuned_sparse_over_tuned_dense"] == found["tuned_sparse"] / found["tuned_dense"]
    assert found["untuned_sparse"] != found["untuned_dense"]
    assert found["passed"] == (found["below_untuned"] and found["within"])
    configs = [json.loads((tmp_path / "work" / w / "config.json").read_text()) for w in train_sparse.WHICH]
    assert configs[0].pop("method")["method"] == "radial" and configs[1].pop("method") is None
    assert configs[0] == configs[1]  # the same clips, noise and steps
    assert (tmp_path / "out" / "curve.png").stat().st_size > 0


def test_the_claim_can_be_missed(tmp_path):
    """Figures that contradict the claim are reported as a miss."""
    from mmeff.pipelines.finetune_results import Finetuned

    def run(method, untuned, final):
        recipe = train_sparse.long_recipe(4, method).to_dict()
        rows = [{"step": 0, "held_out": untuned}, {"step": 400, "held_out": final}]
        return Finetuned(
            folder=tmp_path, steps=400, rows=rows, final=final, report=method and {"density": 0.25, "layers": {"0": {}, "1": {}}}, model="m", note="",
            data={}, recipe=recipe,
        )  # fmt: skip

    def passed(sparse, dense):
        done = {"sparse": run(RADIAL, *sparse), "dense": run(None, *dense)}
        return train_sparse._compare_long(4, RADIAL, done, tmp_path)["passed"]

    assert passed((0.10, 0.0524), (0.14, 0.050))
    assert not passed((0.10, 0.0526), (0.14, 0.050))
    assert not passed((0.05, 0.0520), (0.14, 0.050))


def test_from_start_judges_both_models(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sparse, "HELD_OUT", 2)
    monkeypatch.setattr(train_video, "evaluate", lambda student, *, count, seed: {"all": 0.0})
    recipe = train_sparse.start_recipe(**LITTLE)
    found = train_sparse.from_start(VMOBA, tmp_path / "work", tmp_path / "out", recipe=recipe, prompts=1)
    losses = found["held_out"]
    assert losses["trained sparse"]["under sparse"] != losses["trained sparse"]["under dense"]
    assert found["ratio"] == losses["trained sparse"]["under sparse"] / losses["trained dense"]["under dense"]
    assert (tmp_path / "out" / "sparse" / "model_index.json").exists()
    assert "vmoba" in (tmp_path / "out" / "README.md").read_text()


def test_a_method_changes_what_is_trained_and_single_frames_stay_dense(tmp_path):
    frames_only = train_video.VideoRecipe(frame_steps=2, clip_steps=0, frame_batch=2)
    both = train_video.VideoRecipe(frame_steps=1, clip_steps=1, frame_batch=2, clip_batch=2)
    for recipe, same in ((frames_only, True), (both, False)):
        name = str(recipe.clip_steps)
        dense = train_video.train(recipe, tmp_path / f"dense{name}")
        sparse = train_video.train(recipe, tmp_path / f"sparse{name}", method=VMOBA)
        a, b = dense.net.blocks[0].ffn.net[2].weight, sparse.net.blocks[0].ffn.net[2].weight
        assert bool((a == b).all()) == same
        assert type(sparse.net.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_schedules_that_count_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no denoising steps"):
        train_video.train(train_video.VideoRecipe(**LITTLE), tmp_path / "w", method=replace(RADIAL, dense_steps=1))
    assert not (tmp_path / "w").exists()
