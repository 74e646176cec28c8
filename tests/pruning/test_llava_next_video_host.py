"""Pruning in LLaVA-NeXT-Video equals the full-length model with hidden columns; pictures and videos in either order."""

from __future__ import annotations

import pytest

from mmeff.pruning import FastV

from . import host_checks as checks
from . import packed_checks as packed
from .small_llava_next_video import SmallLlavaNextVideo

FAMILY = SmallLlavaNextVideo()


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
    packed.encoder_signals_belong_to_their_tokens(FAMILY, class_token=True, beams=beams)


def test_shortened_prompts():
    packed.shortened_prompt_equals_pruning_at_layer_0(FAMILY)


@pytest.mark.parametrize("beams", [1, 3])
def test_ready_made_features(beams):
    packed.features_passed_in_equal_pixels(FAMILY, beams=beams)


@pytest.mark.parametrize("mode", ["max", "conv"])
def test_other_ways_of_pooling_lay_tokens_out_alike(mode):
    class Pooled(SmallLlavaNextVideo):
        def model(self, *, attention="sdpa", seed=0):
            return super().model(attention=attention, seed=seed, spatial_pool_mode=mode)

    packed.tokens_lie_where_they_are(Pooled())
    checks.equals_masked_reference(Pooled(), checks.EveryThird(schedule="2:0.5"))


def test_plan():
    assert packed.plan_counts_what_runs(FAMILY, [[1, "video", 9]], frames=3) == "12 (3 x 4)"
    said = packed.plan_counts_what_runs(FAMILY, [[1, (32, 20), 9]], height=32, width=20)
    assert said == "64 (1 x (16 + 48 of 4 tiles), and 8 newlines that stay)"


def test_processor():
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    square = {"height": 16, "width": 16}
    images = LlavaNextImageProcessor(size=square, crop_size=square, image_grid_pinpoints=FAMILY.pinpoints)
    videos = LlavaNextVideoVideoProcessor(size=square, crop_size=square)
    processor = LlavaNextVideoProcessor(
        videos,
        images,
        packed.tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    packed.what_the_processor_makes_is_pruned(FAMILY, processor)
