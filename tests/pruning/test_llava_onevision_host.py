"""Pruning in LLaVA-OneVision equals the full-length model with hidden columns; shrunk grids, several pictures, videos."""

from __future__ import annotations

import pytest

import mmeff
from mmeff.errors import UnsupportedModel
from mmeff.pruning import FastV, VisionZip

from . import host_checks as checks
from . import packed_checks as packed
from .small_llava_onevision import SmallLlavaOnevision

FAMILY = SmallLlavaOnevision()


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
def test_equals_masked_reference(schedule, search):
    checks.equals_masked_reference(FAMILY, checks.EveryThird(schedule=schedule), **search)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_stages_of_attention_scores(attention):
    checks.equals_masked_reference(FAMILY, FastV(schedule="1:0.6,3:0.2"), attention=attention)


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
def test_rows_equal_rows_alone(schedule):
    checks.rows_equal_rows_alone(FAMILY, checks.EveryThird(schedule=schedule, quota="frame"))


def test_scores_equal_eager_attention():
    checks.scores_equal_eager_attention(FAMILY)


def test_remove_restores():
    checks.remove_restores(FAMILY)


def test_keeping_everything_is_the_identity():
    checks.keeping_everything_is_the_identity(FAMILY)


def test_second_turn():
    packed.second_turn_hides_what_was_dropped(FAMILY)


@pytest.mark.parametrize("beams", [1, 2])
def test_places(beams):
    packed.tokens_lie_where_they_are(FAMILY, beams=beams)


@pytest.mark.parametrize("beams", [1, 2])
def test_encoder(beams):
    packed.encoder_signals_belong_to_their_tokens(FAMILY, class_token=False, beams=beams)


def test_shortened_prompts():
    packed.shortened_prompt_equals_pruning_at_layer_0(FAMILY)


@pytest.mark.parametrize("beams", [1, 3])
def test_ready_made_features(beams):
    packed.features_passed_in_equal_pixels(FAMILY, beams=beams)


def test_methods_of_a_class_token_are_refused():
    with pytest.raises(UnsupportedModel, match="needs the class token"):
        mmeff.accelerate(FAMILY.model(), VisionZip())


def test_features_of_videos_alone_leave_the_encoder_half_blind():
    """Pictures as pixels and videos ready-made: the encoder saw some, so a method that looks at it must not go on."""
    model, inputs = FAMILY.model(), FAMILY.prompts()
    rest = {k: v for k, v in inputs.items() if k != "pixel_values_videos"}
    encoded = {"video": packed.encode(model, inputs)["video"]}
    with (
        pytest.raises(ValueError, match="video features were passed in ready-made"),
        mmeff.accelerate(model, VisionZip(rows="all")),
    ):
        checks.generate(model, {**rest, "mm_encoder_outputs": encoded})
    with mmeff.accelerate(model, FastV(layer=1)):
        ready = checks.generate(model, {**rest, "mm_encoder_outputs": {"video": packed.encode(model, inputs)["video"]}})
        checks.assert_same_run(ready, checks.generate(model, inputs))


def test_another_aspect_ratio_at_the_call():
    """generate() hands `vision_aspect_ratio` on to the packing, which then shrinks nothing and needs more tokens."""

    class Whole(SmallLlavaOnevision):
        shrink_beyond = 9

    model, inputs = FAMILY.model(), Whole().make([[1, (40, 32), 9]])
    with mmeff.accelerate(model, checks.EveryThird(schedule="1:0.5")) as handle:
        checks.generate(model, inputs, vision_aspect_ratio="anyres_max_9")
        assert handle.report().tokens["visual tokens per prompt"] == 25 + 10 * 8


def test_plan():
    assert packed.plan_counts_what_runs(FAMILY, [[1, "video", 9]], frames=2) == "18 (2 x 9, and 1 newline that stays)"
    said = packed.plan_counts_what_runs(FAMILY, [[1, (40, 32), 9]], height=40, width=32)
    assert said == "67 (1 x (25 + 42 of 4 tiles), and 7 newlines that stay)"
    rows = [[1, (40, 32), 4, (40, 32), 9]]
    said = packed.plan_counts_what_runs(FAMILY, rows, images=2, height=40, width=32)
    assert said == "50 (2 x 25, and 2 newlines that stay)"


def test_processor():
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    square = {"height": 20, "width": 20}
    images = LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=FAMILY.pinpoints)
    processor = LlavaOnevisionProcessor(
        images, packed.tokenizer(), LlavaOnevisionVideoProcessor(size=square), num_image_tokens=25,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    packed.what_the_processor_makes_is_pruned(FAMILY, processor)
