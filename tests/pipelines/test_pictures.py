"""Pipelines of pictures under `VideoGenerator`: clips of one frame, and settings that mean nothing to them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmeff.errors import MediaError
from mmeff.evaluation.adapters import Videos
from mmeff.pipelines import Clip, Recipe, VideoGenerator, repeat

NOISE, OTHER = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), dtype=np.uint8)


def test_a_picture_and_its_yaml_each_make_it_again(tmp_path):
    method = {"method": "gna", "window": (1, 12, 12), "dense_steps": 1}
    with VideoGenerator("tiny-image", method, device="cpu", dtype="float32") as generator:
        clip = generator.generate("a red ring in the center", seed=4, num_inference_steps=2, out=tmp_path / "a.png")
        assert generator.makes_pictures and clip.frames.shape == (1, 48, 48, 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), clip.frames[0])
    assert Recipe.read(tmp_path / "a.yaml") == Recipe.read(tmp_path / "a.png") == clip.recipe
    assert clip.recipe.model == "tiny-image" and "tiny model" in clip.recipe.note
    assert {f.name for f in tmp_path.iterdir()} == {"a.png", "a.yaml"}
    for file in ("a.png", "a.yaml"):
        assert np.array_equal(repeat(tmp_path / file, device="cpu").frames, clip.frames)


def test_what_a_distilled_model_would_ignore_is_refused_before_anything_runs(monkeypatch):
    with VideoGenerator("tiny-image", device="cpu", dtype="float32") as generator:
        clip = generator.generate("a red ring", num_inference_steps=1)
        assert "guidance_scale" not in clip.recipe.settings
        monkeypatch.setattr(generator, "_call", lambda *a: pytest.fail("it ran"))
        with pytest.raises(ValueError, match=r"no guidance embedding, so guidance_scale=3\.0 would change nothing"):
            generator.generate("a red ring", guidance_scale=3.0)
        with pytest.raises(ValueError, match=r"only with true_cfg_scale > 1, and it is 1\.0"):
            generator.generate("a red ring", negative_prompt="blue")
        with pytest.raises(ValueError, match=r"only with true_cfg_scale > 1, and it is 0\.5"):
            generator.generate("a red ring", negative_prompt="blue", true_cfg_scale=0.5)
        with pytest.raises(ValueError, match=r"only with true_cfg_scale > 1, and it is 1\.0"):
            Videos(generator, negative_prompt="blue", true_cfg_scale=None)
        with pytest.raises(ValueError, match="no guidance embedding"):
            VideoGenerator(generator.pipe, defaults={"guidance_scale": 3.0})
        with pytest.raises(ValueError, match="no guidance embedding"):
            Videos(generator, guidance_scale=3.0)


def test_a_negative_prompt_is_heard_where_the_true_scale_is_above_one():
    with VideoGenerator("tiny-image", device="cpu", dtype="float32") as generator:
        one, other = (
            generator.generate("a red ring", negative_prompt=text, true_cfg_scale=4.0, num_inference_steps=2)
            for text in ("a blue square", "a green star")
        )
    assert not np.array_equal(one.frames, other.frames)


def test_a_picture_keeps_the_image_that_it_came_from(tmp_path):
    recipe = Recipe(model="", prompt="p", seed=1, fps=8)
    clip = Clip(frames=NOISE[None], seconds=1.0, recipe=recipe, image=Image.fromarray(OTHER))
    clip.save(tmp_path / "a.png")
    assert Recipe.read(tmp_path / "a.png").image == "a-input.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a-input.png")), OTHER)


def test_several_frames_are_no_picture(tmp_path):
    clip = Clip(frames=np.stack([NOISE, OTHER]), seconds=1.0, recipe=Recipe(model="", prompt="p", seed=1, fps=8))
    with pytest.raises(ValueError, match=r"a clip of 2 frames is a video, whose name must end in \.mp4"):
        clip.save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    Image.fromarray(NOISE).save(tmp_path / "b.png")
    with pytest.raises(MediaError, match="holds no recipe"):
        Recipe.read(tmp_path / "b.png")


def test_a_layout_of_all_of_a_picture_is_reported_as_such():
    """One frame is all that Radial sees in full; the report says that no call was sparse."""
    radial = {"method": "radial", "dense_steps": 0, "dense_layers": 0}
    with VideoGenerator("tiny-image", radial, device="cpu", dtype="float32") as generator:
        clip = generator.generate("a red ring in the center", num_inference_steps=1)
        dense = generator.generate("a red ring in the center", num_inference_steps=1, dense=True)
    assert clip.reports[0].calls == {"sparse": 0, "full": 5, "dense": 0}
    assert np.array_equal(clip.frames, dense.frames)
