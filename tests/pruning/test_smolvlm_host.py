"""Pruning inside SmolVLM, with split pictures, whole ones and videos, equals the full-length model with hidden columns."""

from __future__ import annotations

import pytest
import torch

import mmeff
from mmeff.errors import UnsupportedModel
from mmeff.pruning import FastV, VisionZip

from . import host_checks as checks
from . import packed_checks, tile_checks
from .small_smolvlm import FAKE, SmallSmolVLM

FAMILY = SmallSmolVLM()


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
def test_equals_masked_reference(schedule, search):
    checks.equals_masked_reference(FAMILY, checks.EveryThird(schedule=schedule, quota="frame"), **search)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_stages_of_attention_scores(attention):
    checks.equals_masked_reference(FAMILY, FastV(schedule="1:0.6,3:0.2"), attention=attention)


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
def test_rows_equal_rows_alone(schedule):
    checks.rows_equal_rows_alone(FAMILY, checks.EveryThird(schedule=schedule))


def test_scores_equal_eager_attention():
    checks.scores_equal_eager_attention(FAMILY)


def test_remove_restores():
    checks.remove_restores(FAMILY)


def test_keeping_everything_is_the_identity():
    checks.keeping_everything_is_the_identity(FAMILY)


@pytest.mark.parametrize("search", [{}, {"num_beams": 1}, {"num_beams": 3}])
def test_places(search):
    tile_checks.places_are_right(FAMILY, **search)


@pytest.mark.parametrize("layer", [0, 2])
def test_encoder(layer):
    tile_checks.encoder_is_what_ran(FAMILY, layer)


def test_encoder_under_generate():
    tile_checks.encoder_is_what_ran(FAMILY, 1, num_beams=2)


def test_encoder_of_padded_tiles_is_refused():
    """The model hides padding inside a tile from the other patches; its attention is not recomputed for that."""
    inputs = FAMILY.prompts()
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].clone()
    inputs["pixel_attention_mask"][0, 0, -4:] = 0
    with pytest.raises(ValueError, match="tiles without padding"):
        tile_checks.look(FAMILY.model(), inputs, lambda v: v.encoder(), needs=frozenset({"encoder"}))
    padded = SmallSmolVLM()
    padded.prompts = lambda: inputs
    checks.equals_masked_reference(padded, FastV(layer=1, keep=0.5))


def test_second_turn_on_a_pruned_cache():
    packed_checks.second_turn_hides_what_was_dropped(FAMILY)


def test_second_turn_with_a_picture():
    more = SmallSmolVLM([[4, ("image", 1, 2), 5], [4, ("image", 0, 0), 3], [2, ("video", 2), 4]])
    tile_checks.second_turn_with_a_picture(FAMILY, more)


def test_shortened_prompt_equals_pruning_at_layer_0():
    tile_checks.shortened_prompt_equals_pruning_at_layer_0(FAMILY)


def test_places_that_cannot_be_told():
    tile_checks.places_that_cannot_be_told(FAMILY, "must be whole tiles of 3 x 3")
    family = SmallSmolVLM([[2, ("image", 1, 2), 4]])
    short = tile_checks.shortened(
        family, torch.tensor([[0, 1, 2, 3, 4, 5, 9, 10, 11]])
    )  # as many as a tile has, of two
    del short["position_ids"]
    with pytest.raises(ValueError, match="others between those of a tile"):
        tile_checks.look(family.model(), short, lambda v: v)


@pytest.mark.parametrize("beams", [1, 3])
def test_ready_made_features(beams):
    tile_checks.features_passed_in_equal_pixels(FAMILY, beams=beams)


def test_by_hand():
    tile_checks.by_hand(FAMILY)


def test_a_row_without_a_picture():
    family = SmallSmolVLM([[2, ("image", 1, 2), 4], [6], [1, ("image", 0, 0), 3]])
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"))


def test_methods_of_a_class_token_are_refused():
    with pytest.raises(UnsupportedModel, match="needs the class token"):
        mmeff.accelerate(FAMILY.model(), VisionZip())


def test_markers_stay():
    """Everything that is no visual token is still in the cache when all visual tokens but one are gone."""
    model, inputs = FAMILY.model(), FAMILY.row(FAMILY.prompts(), 0)
    with mmeff.accelerate(model, FastV(layer=1, keep=1)):
        cache = model(**inputs, logits_to_keep=1, use_cache=True).past_key_values
        cols = cache.layers[1].cols[0].tolist()
    ids = inputs["input_ids"][0]
    others = (ids != 4).nonzero()[:, 0].tolist()
    assert len(cols) == len(others) + 1
    assert set(others) < set(cols)
    assert (ids == FAKE).sum() == 4


@pytest.fixture
def processor(monkeypatch):
    """The family's own, without the package that spells out how many frames a video has."""
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    monkeypatch.setattr(processing_smolvlm, "DEFAULT_VIDEO_INTRO", "w10 {frame_count} w11 ")
    sizes = {"size": {"longest_edge": 144}, "max_image_size": {"longest_edge": 36}}
    places = {f"place_{y}{x}": f"<row_{y}_col_{x}>" for y in range(1, 5) for x in range(1, 5)}
    words = tile_checks.tokenizer(
        fake_image_token="<fake>", global_image_token="<global-img>", line="\n", image_token="<image>",
        video_token="<video>", end_of_utterance_token="<end>", **places,
    )  # fmt: skip
    assert words.image_token_id == 4
    return SmolVLMProcessor(SmolVLMImageProcessor(**sizes), words, SmolVLMVideoProcessor(**sizes), image_seq_len=9)


def picture(height, width, *frames):
    draw = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (*frames, 3, height, width), generator=draw, dtype=torch.uint8)


def test_processor_prompt(processor):
    inputs = dict(processor(
        text=["w30 <image> w31 w32 w33", "w30 <image> w32 w33 <image> w34"],
        images=[[picture(20, 80)], [picture(30, 30), picture(80, 20)]], padding=True, return_tensors="pt",
    ))  # fmt: skip
    family = SmallSmolVLM([[("image", 1, 4)], [("image", 4, 4), ("image", 4, 1)]])
    assert inputs["pixel_values"].shape[:2] == (2, 17 + 5)
    tile_checks.places_are_right(family, inputs, num_beams=2)
    family.prompts = lambda: inputs
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"))


def test_processor_video(processor):
    from transformers.video_utils import VideoMetadata

    inputs = dict(processor(
        text=["<video> w31 w32 w33"], videos=[[picture(20, 30, 3)]], padding=True, return_tensors="pt",
        video_metadata=[[VideoMetadata(total_num_frames=3, fps=2.0, frames_indices=[0, 1, 2], duration=1.5)]],
    ))  # fmt: skip
    family = SmallSmolVLM([[("video", 3)]])
    family.prompts = lambda: inputs
    tile_checks.places_are_right(family, inputs)
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"))


def test_plan_counts_what_runs(processor):
    one = picture(20, 50)
    inputs = dict(processor(text=["w30 <image> <image> w31"], images=[[one, one]], padding=True, return_tensors="pt"))
    said = tile_checks.plan_counts_what_runs(FAMILY, inputs, images=2, height=20, width=50)
    assert said == "162 (2 x 9 tiles x 9)"
    said = tile_checks.plan_counts_what_runs(FAMILY, FAMILY.make([[1, ("video", 3), 4]]), frames=3)
    assert said == "27 (3 frames x 9)"
    assert "17 tiles x 9; pass height and width" in dict(mmeff.plan(FAMILY.model(), FastV()).rows)["visual tokens"]
