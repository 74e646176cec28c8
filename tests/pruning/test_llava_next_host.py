"""Pruning in LLaVA-NeXT equals the full-length model in which the dropped columns are hidden; tiles and newlines are found."""

from __future__ import annotations

import pytest
import torch

import mmeff
from mmeff.errors import UnsupportedModel
from mmeff.pruning import FastV, VisionZip

from . import host_checks as checks
from . import packed_checks as packed
from .small_llava_next import SmallLlavaNext

FAMILY = SmallLlavaNext()


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


def test_a_quota_by_frame_keeps_a_share_of_every_tile():
    model, inputs = FAMILY.model(), FAMILY.make([FAMILY.rows[1]])
    with mmeff.accelerate(model, checks.EveryThird(schedule="1:0.25", quota="frame")) as handle:
        checks.generate(model, inputs)
        kept = handle.report().kept[1][0].tolist()
    frames = [t.frame for _, t in sorted(FAMILY.table(inputs, [FAMILY.rows[1]])[0].items()) if not t.marker]
    assert [sum(frames[k] == f for k in kept) for f in range(5)] == [4, 3, 3, 3, 3]  # of 16, and of 4 x 3 in each tile


def test_shortened_prompts():
    packed.shortened_prompt_equals_pruning_at_layer_0(FAMILY)


@pytest.mark.parametrize("beams", [1, 3])
def test_ready_made_features(beams):
    packed.features_passed_in_equal_pixels(FAMILY, beams=beams)


def test_ready_made_features_without_sizes_are_refused():
    model, inputs = FAMILY.model(), FAMILY.prompts()
    given = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": packed.encode(model, inputs)}
    with (
        pytest.raises(ValueError, match="got none; pass image_sizes, together"),
        mmeff.accelerate(model, FastV(layer=1)),
    ):
        model(**given, logits_to_keep=1)


def test_features_that_are_not_whole_pictures_are_refused():
    model, inputs = FAMILY.model(), FAMILY.make([FAMILY.rows[0]])
    encoded = packed.encode(model, inputs)
    encoded["image"].pooler_output = [x[:-3] for x in encoded["image"].pooler_output]
    ids = torch.cat([inputs["input_ids"][:, :1], inputs["input_ids"][:, 4:]], dim=1)
    given = {"input_ids": ids, "mm_encoder_outputs": encoded, "image_sizes": inputs["image_sizes"]}
    with (
        pytest.raises(ValueError, match="got 31 for 34 that sizes and config make"),
        mmeff.accelerate(model, FastV(layer=1)),
    ):
        model(**given, logits_to_keep=1)


def test_methods_of_the_encoder_need_pixels():
    model, inputs = FAMILY.model(), FAMILY.prompts()
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match=r"which did not run.*pass pixel values"), mmeff.accelerate(model, VisionZip()):
        checks.generate(model, {**rest, "mm_encoder_outputs": packed.encode(model, inputs)})


def test_a_tower_whose_class_token_is_no_patch_is_refused():
    model = FAMILY.model()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModel, match='"full" for a tower with a class token'):
        mmeff.accelerate(model, FastV())


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((32, 20), "64 (1 x (16 + 48 of 4 tiles), and 8 newlines that stay)"),
        ((8, 32), "32 (1 x (16 + 16 of 2 tiles), and 2 newlines that stay)"),
    ],
)
def test_plan(size, said):
    assert packed.plan_counts_what_runs(FAMILY, [[1, size, 9]], height=size[0], width=size[1]) == said


def test_plan_of_several_pictures():
    rows = [[1, (32, 20), 4, (32, 20), 5]]
    said = packed.plan_counts_what_runs(FAMILY, rows, images=2, height=32, width=20)
    assert said == "128 (2 x (16 + 48 of 4 tiles), and 16 newlines that stay)"


def test_processor():
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    square = {"height": 16, "width": 16}
    images = LlavaNextImageProcessor(size=square, crop_size=square, image_grid_pinpoints=FAMILY.pinpoints)
    processor = LlavaNextProcessor(
        images,
        packed.tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    packed.what_the_processor_makes_is_pruned(FAMILY, processor)
