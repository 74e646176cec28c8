"""Pruning inside Qwen3-VL, below and behind its DeepStack levels, equals the masked full-length model."""

from __future__ import annotations

import pytest

import mmeff
from mmeff.pruning import FastV

from . import host_checks as checks
from . import qwen_checks
from .small_qwen_vl import SmallQwen

FAMILY = SmallQwen("qwen3_vl")
IMAGES = SmallQwen("qwen3_vl", [[(2,), (6, 10), (3,), (4, 4), (3,)], [(1,), (4, 2), (5,)]])
VIDEOS = SmallQwen("qwen3_vl", [[(2,), (2, 6, 6), (3,)], [(1,), (1, 4, 2), (5,), (3, 2, 4), (2,)]])


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
def test_equals_masked_reference(schedule, search):
    checks.equals_masked_reference(FAMILY, checks.EveryThird(schedule=schedule), **search)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [FAMILY, VIDEOS])
def test_two_stages_of_attention_scores(family, attention):
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"), attention=attention)


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
def test_rows_equal_rows_alone(schedule):
    checks.rows_equal_rows_alone(FAMILY, checks.EveryThird(schedule=schedule))


def test_rows_alone_by_attention_scores():
    checks.rows_equal_rows_alone(FAMILY, FastV(schedule="1:0.6,3:0.2"))


def test_scores_equal_eager_attention():
    checks.scores_equal_eager_attention(FAMILY)


def test_remove_restores():
    checks.remove_restores(FAMILY)


def test_remove_restores_deepstack():
    """Whatever stood on the instance before, nothing or somebody's wrapper, stands there again."""
    model = FAMILY.model()
    decoder = model.model.language_model
    before = set(decoder.__dict__)
    mmeff.accelerate(model, FastV()).remove()
    assert set(decoder.__dict__) == before

    stock, seen = decoder._deepstack_process, []

    def wrapper(*args):
        seen.append(args[0].shape[1])
        return stock(*args)

    decoder._deepstack_process = wrapper
    with mmeff.accelerate(model, FastV(layer=1, keep=0.25)):
        checks.generate(model, FAMILY.prompts(), max_new_tokens=1)
    assert decoder._deepstack_process is wrapper
    assert len(seen) == 2
    assert seen[1] < seen[0], "the second level must see the shortened prompt"


def test_keeping_everything_is_the_identity():
    checks.keeping_everything_is_the_identity(FAMILY)


@pytest.mark.parametrize("search", [{}, {"num_beams": 1}, {"num_beams": 3}])
@pytest.mark.parametrize("family", [FAMILY, IMAGES, VIDEOS])
def test_places(family, search):
    qwen_checks.places_are_right(family, **search)


@pytest.mark.parametrize("layer", [0, 2])
def test_encoder(layer):
    qwen_checks.encoder_is_what_ran(FAMILY, layer)


@pytest.mark.parametrize("family", [FAMILY, IMAGES, VIDEOS])
def test_encoder_under_generate(family):
    qwen_checks.encoder_is_what_ran(family, 2, num_beams=2)


def test_second_turn_on_a_pruned_cache():
    qwen_checks.second_turn(FAMILY)


@pytest.mark.parametrize("family", [FAMILY, IMAGES, VIDEOS])
def test_shortened_prompt_equals_pruning_at_layer_0(family):
    qwen_checks.shortened_prompt_equals_pruning_at_layer_0(family)


def test_places_that_cannot_be_told():
    qwen_checks.places_that_cannot_be_told(FAMILY)


def test_encoder_needs_pixels():
    qwen_checks.encoder_needs_pixels(FAMILY)


def test_plan_counts_what_runs():
    qwen_checks.plan_counts_what_runs("qwen3_vl")


def test_second_turn_with_a_picture():
    qwen_checks.second_picture("qwen3_vl")


def test_by_hand():
    qwen_checks.by_hand("qwen3_vl")


def test_processor_prompt():
    qwen_checks.processor_prompt("qwen3_vl")
