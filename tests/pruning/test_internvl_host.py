"""Pruning inside InternVL, with pictures of several tiles and videos, equals the full-length model with hidden columns."""

from __future__ import annotations

import pytest
import torch

import mmeff
from mmeff.errors import UnsupportedModel
from mmeff.pruning import FastV, VisionZip

from . import host_checks as checks
from . import packed_checks, tile_checks
from .small_internvl import SmallInternVL

FAMILY = SmallInternVL()
NORMED = SmallInternVL(qk_norm=True)


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


@pytest.mark.parametrize("family", [FAMILY, NORMED])
@pytest.mark.parametrize("layer", [0, 2])
def test_encoder(family, layer):
    tile_checks.encoder_is_what_ran(family, layer, class_token=True)


def test_encoder_under_generate():
    tile_checks.encoder_is_what_ran(FAMILY, 1, class_token=True, num_beams=2)


def test_second_turn_on_a_pruned_cache():
    packed_checks.second_turn_hides_what_was_dropped(FAMILY)


def test_second_turn_with_a_picture():
    more = SmallInternVL([[4, ("image", 2), 5], [4, ("image", 1), 3], [2, ("video", 2), 4]])
    tile_checks.second_turn_with_a_picture(FAMILY, more)


def test_shortened_prompt_equals_pruning_at_layer_0():
    tile_checks.shortened_prompt_equals_pruning_at_layer_0(FAMILY)


def test_places_that_cannot_be_told():
    tile_checks.places_that_cannot_be_told(FAMILY, "must be whole tiles of 3 x 3")
    # as many as a tile has, of two tiles
    with pytest.raises(ValueError, match="others between those of a tile"):
        short = tile_checks.shortened(
            FAMILY, torch.arange(0, 9).expand(3, -1) + torch.arange(9) // 8 * 3 * torch.tensor([[1], [0], [1]])
        )
        tile_checks.look(FAMILY.model(), short, lambda v: v)


@pytest.mark.parametrize("beams", [1, 3])
def test_ready_made_features(beams):
    tile_checks.features_passed_in_equal_pixels(FAMILY, beams=beams)


def test_by_hand():
    tile_checks.by_hand(FAMILY)


def test_class_token_methods_run():
    """VisionZip reads the class token's attention, merges before the projector and embeds what that makes of it."""
    model, inputs = FAMILY.model(), FAMILY.prompts()
    plain = checks.generate(model, inputs)
    with mmeff.accelerate(model, VisionZip(keep=0.5)) as handle:
        fast = checks.generate(model, inputs)
        assert (handle.report().kept[0] >= 0).sum(1).tolist() == [14, 4, 18]  # of 27, 9 and 36
    assert (plain.logits[0] - fast.logits[0]).abs().max() > 0.1


def test_tiles_of_another_size():
    """The encoder stretches its positions to the tiles that come, and the tokens of a tile follow their size."""
    from mmeff.pruning.hosts.internvl import tile_side

    model = FAMILY.model()
    assert tile_side(model, 32) == 4
    ids = torch.tensor([[1, *[4] * 32, 2, 20, 21]])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    view = tile_checks.look(model, inputs, lambda v: v)
    assert view.frame[0].tolist() == [0] * 16 + [1] * 16
    assert view.place[0].tolist() == [[y, x] for _ in range(2) for y in range(4) for x in range(4)]


def test_a_row_without_a_picture():
    family = SmallInternVL([[2, ("image", 2), 4], [6], [1, ("image", 1), 3]])
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"))


def test_other_encoders_are_refused():
    from transformers import CLIPVisionConfig, InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    eyes = CLIPVisionConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = InternVLConfig(vision_config=eyes, text_config=Qwen2Config(**FAMILY.text()))
    with pytest.raises(UnsupportedModel, match='of type "clip_vision_model"'):
        mmeff.accelerate(InternVLForConditionalGeneration(config), FastV())


def processed(texts, **given):
    """What the family's own processor makes."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    words = tile_checks.tokenizer(
        start_image_token="<img>", end_image_token="</img>", video_token="<video>", context_image_token="<IMG_CONTEXT>"
    )
    size = {"height": 24, "width": 24}
    images = GotOcr2ImageProcessor(size=size)
    processor = InternVLProcessor(images, words, InternVLVideoProcessor(size=size), image_seq_length=9)
    return dict(processor(text=texts, padding=True, return_tensors="pt", **given))


def test_processor_prompt():
    draw = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, h, w), generator=draw, dtype=torch.uint8) for h, w in ((24, 48), (24, 24))]
    video = torch.randint(0, 256, (2, 3, 30, 20), generator=draw, dtype=torch.uint8)
    texts = ["w10 <IMG_CONTEXT> w11 w12 w13", "<video> w10 w20 <IMG_CONTEXT> w30"]
    inputs = processed(texts, images=images, videos=[video])
    assert inputs["pixel_values"].shape[0] == 3 + 2 + 1
    family = SmallInternVL([[("image", 3)], [("video", 2), ("image", 1)]])
    tile_checks.places_are_right(family, inputs, num_beams=2)
    family.prompts = lambda: inputs
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"))


def test_plan_counts_what_runs():
    draw = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (3, 40, 70), generator=draw, dtype=torch.uint8)
    inputs = processed(["w10 <IMG_CONTEXT> <IMG_CONTEXT> w11"], images=[picture, picture])
    tiles = len(inputs["pixel_values"]) // 2
    assert tiles > 3
    said = tile_checks.plan_counts_what_runs(FAMILY, inputs, images=2, height=40, width=70)
    assert said == f"{18 * tiles} (2 x {tiles} tiles x 9)"
    said = tile_checks.plan_counts_what_runs(FAMILY, FAMILY.make([[1, ("video", 3), 4]]), frames=3)
    assert said == "27 (3 frames x 9)"
    assert "assumed" in dict(mmeff.plan(FAMILY.model(), FastV()).rows)["visual tokens"]
