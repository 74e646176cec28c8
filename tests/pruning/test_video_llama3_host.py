"""Pruning inside VideoLLaMA3, with pictures and thinned videos of different sizes, equals the masked full-length model."""

from __future__ import annotations

import pytest
import torch

import mmeff
from mmeff.errors import NothingAccelerated, UnsupportedModel
from mmeff.pruning import FastV, VisionZip

from . import host_checks as checks
from . import packed_checks, tile_checks
from .small_video_llama3 import SmallVideoLlama3

FAMILY = SmallVideoLlama3()
FULL = SmallVideoLlama3(thin=False)  # generate() of the stock model takes no beams with thinned videos
MERGED = SmallVideoLlama3(image_merge=2)
IMAGES = SmallVideoLlama3([[2, ("image", 4, 6), 3, ("image", 2, 4), 3], [1, ("image", 2, 4), 5]])
VIDEOS = SmallVideoLlama3([[2, ("video", 2, 6, 4), 3], [1, ("video", 1, 4, 2), 5, ("video", 3, 2, 8), 2]])


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
@pytest.mark.parametrize(("family", "search"), [(FAMILY, {}), (FULL, {"num_beams": 3})])
def test_equals_masked_reference(family, search, schedule):
    checks.equals_masked_reference(family, checks.EveryThird(schedule=schedule, quota="frame"), **search)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [FAMILY, IMAGES, VIDEOS])
def test_two_stages_of_attention_scores(family, attention):
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"), attention=attention)


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
def test_rows_equal_rows_alone(schedule):
    checks.rows_equal_rows_alone(FAMILY, checks.EveryThird(schedule=schedule))


def test_scores_equal_eager_attention():
    checks.scores_equal_eager_attention(FAMILY)


def test_remove_restores():
    checks.remove_restores(FAMILY)


def test_keeping_everything_is_the_identity():
    checks.keeping_everything_is_the_identity(FAMILY)


@pytest.mark.parametrize("search", [{}, {"num_beams": 1}])
@pytest.mark.parametrize("family", [FAMILY, IMAGES, VIDEOS, MERGED])
def test_places(family, search):
    tile_checks.places_are_right(family, **search)


def test_places_of_beams():
    tile_checks.places_are_right(FULL, num_beams=3)


@pytest.mark.parametrize("family", [FAMILY, MERGED])
@pytest.mark.parametrize("layer", [0, 2])
def test_encoder(family, layer):
    tile_checks.encoder_is_what_ran(family, layer)


@pytest.mark.parametrize(("family", "beams"), [(IMAGES, 1), (VIDEOS, 1), (FULL, 2)])
def test_encoder_under_generate(family, beams):
    tile_checks.encoder_is_what_ran(family, 1, num_beams=beams)


def test_second_turn_on_a_pruned_cache():
    packed_checks.second_turn_hides_what_was_dropped(FAMILY)


def test_second_turn_with_a_picture():
    more = SmallVideoLlama3([[4, ("image", 2, 6), 5], [4, ("image", 2, 2), 3], [2, ("video", 2, 4, 4), 4]])
    tile_checks.second_turn_with_a_picture(FAMILY, more)


@pytest.mark.parametrize("family", [FAMILY, IMAGES, VIDEOS])
def test_shortened_prompt_equals_pruning_at_layer_0(family):
    tile_checks.shortened_prompt_equals_pruning_at_layer_0(family)


def test_own_compression_equals_pruning_at_layer_0():
    """The model's own route, a stricter video_compression_mask and fewer ids at the same positions, is the same run."""
    model, inputs = VIDEOS.model(), VIDEOS.prompts()
    with mmeff.accelerate(model, checks.EveryThird(schedule="0:0.4")) as handle:
        fast = checks.generate(model, inputs)
        kept = handle.report().kept[0]
    short = tile_checks.shortened(VIDEOS, kept)
    short.pop("mm_encoder_outputs")
    mask = inputs["video_compression_mask"].clone()
    stays = ~checks.dropped_columns(VIDEOS.visual(model, inputs), kept)
    mask[inputs["video_compression_mask"]] = stays[VIDEOS.visual(model, inputs)]
    short |= {k: v for k, v in inputs.items() if k not in short} | {"video_compression_mask": mask}
    slow = checks.generate(model, short)
    for a, b in zip(fast.logits, slow.logits, strict=True):
        assert (a - b).abs().max() < 1e-5
    view = tile_checks.look(model, short, lambda v: v)
    for b, row in enumerate(VIDEOS.cells()):
        expected = [row[k] for k in kept[b].tolist() if k >= 0]
        assert view.place[b, view.present[b]].tolist() == [[c.row, c.column] for c in expected]


def test_places_that_cannot_be_told():
    tile_checks.places_that_cannot_be_told(FAMILY, "pass image_grid_thw and image_merge_sizes")
    short, inputs = tile_checks.shortened(FAMILY, torch.arange(4).expand(3, -1)), FAMILY.prompts()
    short |= {k: v for k, v in inputs.items() if "grid" in k or "merge" in k}
    with pytest.raises(ValueError, match="the image tokens of a prompt must be those of its grids, got 8 for 48"):
        tile_checks.look(FAMILY.model(), short, lambda v: v)


@pytest.mark.parametrize(("family", "beams"), [(FAMILY, 1), (FULL, 3)])
def test_ready_made_features(family, beams):
    tile_checks.features_passed_in_equal_pixels(family, beams=beams)


def test_by_hand():
    tile_checks.by_hand(FAMILY)


def test_a_call_for_all_logits_runs_dense():
    """The model knows no logits_to_keep, so that only generate() or the caller can say that the last logits are enough."""
    model, inputs = FAMILY.model(), FAMILY.prompts()
    plain = model(**inputs).logits
    with (
        pytest.raises(NothingAccelerated, match="logits of every prompt token were asked for"),
        mmeff.accelerate(model, FastV(layer=1, keep=0.5)),
    ):
        assert torch.equal(model(**inputs).logits, plain)


def test_a_row_without_a_picture():
    family = SmallVideoLlama3([[2, ("image", 2, 4), 4], [6], [1, ("video", 2, 4, 4), 3]])
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"))


def test_methods_of_a_class_token_are_refused():
    with pytest.raises(UnsupportedModel, match="needs the class token"):
        mmeff.accelerate(FAMILY.model(), VisionZip())


def processed(texts, images, videos, **sizes):
    """What the family's own processor makes; videos stand still in part, so that it drops tokens."""
    from transformers import VideoLlama3ImageProcessor, VideoLlama3Processor, VideoLlama3VideoProcessor
    from transformers.video_utils import VideoMetadata

    words = tile_checks.tokenizer(
        a="a",
        b="b",
        image_token="<image>",
        video_token="<video>",
        time="Time",
        **{f"t{i}": f"{i}.0s:" for i in range(3)},
    )
    assert (words.image_token_id, words.video_token_id) == (3, 4)
    pixels = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 16384}}
    processor = VideoLlama3Processor(VideoLlama3ImageProcessor(**pixels), words, VideoLlama3VideoProcessor(**pixels))
    seen = [VideoMetadata(total_num_frames=len(v), fps=1.0, frames_indices=list(range(len(v)))) for v in videos]
    given = {"videos": videos, "video_metadata": seen} if videos else {}
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt", **given))
    inputs.pop("video_metadata", None)
    return inputs


def picture(*size):
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.uint8)


def test_processor_prompt():
    video = picture(1, 3, 16, 32).repeat(3, 1, 1, 1)
    video[1, :, 8:] = picture(3, 8, 32)  # its upper half stands still
    video[2, :, :, 8:16] = 0
    texts = ["w20 <image> w30 <image> w31 w32", "w20 <video> w30 <image> w40"]
    inputs = processed(texts, [picture(3, 16, 24), picture(3, 8, 17), picture(3, 9, 8)], [video])
    mask = inputs["video_compression_mask"].view(3, 8)
    assert mask.sum(1).tolist() == [8, 4, 5]
    family = SmallVideoLlama3([[("image", 4, 6), ("image", 2, 4)], [("video", 3, 4, 8), ("image", 2, 2)]])
    family.left = lambda item: mask.tolist() if item[0] == "video" else [[True] * (item[1] * item[2])]
    family.prompts = lambda: inputs
    tile_checks.places_are_right(family, inputs)
    tile_checks.encoder_is_what_ran(family, 1)
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"))


def test_plan_counts_what_runs():
    inputs = processed(["w20 <image> <image> w30"], [picture(3, 22, 41)] * 2, [])
    said = tile_checks.plan_counts_what_runs(FAMILY, inputs, images=2, height=22, width=41)
    assert said == "120 (2 x 6 x 10, each 4 x 4 pixels)"
    inputs = processed(["w20 <video> w30"], None, [picture(3, 3, 23, 33)])  # every part moves
    said = tile_checks.plan_counts_what_runs(FAMILY, inputs, frames=3, height=23, width=33)
    assert said == "36 (3 x 3 x 4, each 8 x 8 pixels; before the compression of what stands still)"
    assert "pass height and width" in dict(mmeff.plan(FAMILY.model(), FastV()).rows)["visual tokens"]
