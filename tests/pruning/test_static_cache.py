"""Pruning on a cache of fixed size: equal to the masked full-length model, in layers that are allocated shorter."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import mmeff
from mmeff.errors import UnsupportedModel
from mmeff.pruning import FastV, VLAPruner
from mmeff.pruning.hosts._static_ledger import PrunedStaticLayer

from . import host_checks as checks
from .conftest import prompts, random_llava
from .small_llava import SmallLlava
from .small_qwen_vl import SmallQwen

FAMILIES = {"llava": SmallLlava(), "qwen2.5-vl": SmallQwen("qwen2_5_vl")}
STATIC = {"cache_implementation": "static", "disable_compile": True}
MIXED = "0:0.75,1:0.5,3:0.2"


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
def test_equals_masked_reference(family, schedule):
    checks.equals_masked_reference(family, checks.EveryThird(schedule=schedule, cache="static"), **STATIC)


@pytest.mark.parametrize("search", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams(family, search):
    checks.equals_masked_reference(family, checks.EveryThird(schedule=MIXED, cache="static"), **STATIC, **search)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ["last", "all"])
def test_two_stages_of_attention_scores(family, attention, rows):
    method = FastV(schedule="1:0.6,3:0.2", rows=rows, cache="static")
    checks.equals_masked_reference(family, method, attention=attention, **STATIC)


def test_every_row_equals_the_row_alone(family):
    model, inputs = family.model(), family.prompts()
    with mmeff.accelerate(model, FastV(schedule="1:0.6,3:0.2", cache="static")) as handle:
        together = checks.generate(model, inputs, **STATIC)
        kept = handle.report().kept
        for b in range(len(inputs["input_ids"])):
            one = checks.generate(model, family.row(inputs, b), **STATIC)
            assert (one.logits[-1][0] - together.logits[-1][b]).abs().max() < 1e-5
            for layer, alone in handle.report().kept.items():
                assert torch.equal(alone[0], kept[layer][b][kept[layer][b] >= 0])


@pytest.mark.parametrize("images", [[1, 1, 1], [2, 1, 2]])
@pytest.mark.parametrize("schedule", ["2:0.5", MIXED])
def test_prompts_without_padding(images, schedule):
    """transformers makes no mask for them; rows that keep fewer tokens need one all the same."""
    model, inputs = random_llava(), prompts([18, 18 if images == [1, 1, 1] else 34, 18], images=images)
    with mmeff.accelerate(model, checks.EveryThird(schedule=schedule)):
        grown = checks.generate(model, inputs)
    with mmeff.accelerate(model, checks.EveryThird(schedule=schedule, cache="static")):
        checks.assert_same_run(checks.generate(model, inputs, **STATIC), grown)


def talk(model, cache):
    """Two rows about a picture, text, and another picture, on one cache."""
    first, third = prompts([9, 4]), prompts([6, 6], seed=5)
    one = checks.generate(model, first, past_key_values=cache)
    ids = torch.cat([one.sequences, torch.tensor([[7, 8], [9, 6]])], dim=1)
    mask = torch.nn.functional.pad(first["attention_mask"], (0, 7), value=1)
    two = checks.generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    ids = torch.cat([two.sequences, third["input_ids"]], dim=1)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    picture = {"image": model.get_image_features(pixel_values=third["pixel_values"], return_dict=True)}
    three = checks.generate(
        model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache, mm_encoder_outputs=picture
    )
    return one, two, three


@pytest.mark.parametrize("schedule", ["2:0.5", MIXED])
def test_turns_on_one_cache_which_is_as_good_as_new_after_a_reset(schedule):
    model = random_llava()
    with mmeff.accelerate(model, checks.EveryThird(schedule=schedule)) as handle:
        grown = talk(model, DynamicCache())
        acted = handle.report().accelerated
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    with mmeff.accelerate(model, checks.EveryThird(schedule=schedule, cache="static")) as handle:
        for _ in range(2):
            handle.reset()
            for a, b in zip(talk(model, cache), grown, strict=True):
                checks.assert_same_run(a, b)
            assert handle.report().accelerated == acted == 2 * (3 if schedule == "2:0.5" else 5)
            cache.reset()


def test_a_prompt_without_pictures_runs_dense_on_a_cache_that_was_reset():
    model = random_llava()
    inputs = {"input_ids": torch.arange(5, 19)[None], "attention_mask": torch.ones(1, 14, dtype=torch.long)}
    plain = checks.generate(model, inputs)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
    with mmeff.accelerate(model, checks.EveryThird(schedule=MIXED, cache="static")):
        checks.generate(model, prompts([9]), past_key_values=cache)
        cache.reset()
        checks.assert_same_run(checks.generate(model, inputs, past_key_values=cache), plain)


def test_layers_are_allocated_shorter_and_the_report_says_how_much():
    model, inputs = random_llava(), prompts([9, 4])
    with mmeff.accelerate(model, checks.EveryThird(schedule="0:0.75,3:0.25", cache="static")) as handle:
        cache = checks.generate(model, inputs, **STATIC).past_key_values
        report = handle.report()
    full = inputs["input_ids"].shape[1] + 4  # the last token is not read
    places = [layer.keys.shape[2] for layer in cache.layers]
    assert places == [full - 4] * 3 + [full - 12] * 2
    assert cache.get_seq_length() == full
    allocated = sum(2 * layer.keys[0].numel() * 4 for layer in cache.layers) / 1024
    assert report.tokens["cache of fixed size, KiB"] == round(allocated, 1)
    assert report.tokens["cache of fixed size, dense, KiB"] == round(allocated * 5 * full / sum(places), 1)


def test_a_layer_that_was_allocated_before_keeps_its_size():
    model, inputs = random_llava(), prompts([9, 4])
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=60)
    cache.early_initialization(2, config.num_key_value_heads, 8, torch.float32, torch.device("cpu"))
    with mmeff.accelerate(model, checks.EveryThird(schedule=MIXED, cache="static")):
        usual = checks.generate(model, inputs, **STATIC)
        checks.assert_same_run(checks.generate(model, inputs, past_key_values=cache), usual)
    assert {layer.keys.shape[2] for layer in cache.layers} == {60}


def test_the_map_moves_with_the_rows():
    """Beams of one prompt may have drawn different tokens; every key holds its column's number."""
    layer = PrunedStaticLayer.adopt(StaticLayer(max_cache_len=9), attached=lambda: True, speaks_for_all=True)
    cols = torch.tensor([[0, 2, 4, 5], [0, 1, 3, 5]])
    layer.append(0, cols, torch.tensor([[True] * 4, [True, True, False, True]]), 6, complete=False)
    layer.update(*[cols[:, None, :, None].float()] * 2)
    layer.update(*[torch.full((2, 1, 1, 1), 6.0)] * 2)
    assert layer.get_seq_length() == 7 and layer.keys.shape[2] == 7 and layer.get_max_length() == 9
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.cols[:, :5].float(), layer.keys[:, 0, :5, 0])
    assert layer.cols.tolist() == [[0, 1, 3, 5, 6, 7, 8]] * 2
    seen = layer.restrict(torch.arange(9)[None, None, None] < 7)
    assert seen[:, 0, 0].tolist() == [[True, True, False, True, True, False, False]] * 2
    assert torch.equal(layer.restrict(torch.where(torch.arange(9) < 7, 0.0, -1e9)[None, None, None]) == 0, seen)


def test_what_is_refused():
    model, inputs = random_llava(), prompts([9])
    with mmeff.accelerate(model, FastV(cache="static")):
        with pytest.raises(UnsupportedModel, match=r'got DynamicCache .*cache_implementation="static"'):
            checks.generate(model, inputs)
        with pytest.raises(UnsupportedModel, match="got no cache"):
            model(**inputs, logits_to_keep=1)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
        checks.generate(model, inputs, past_key_values=cache, max_new_tokens=2)
        model.config.text_config._attn_implementation = "flash_attention_2"
        with pytest.raises(UnsupportedModel, match="flash_attention_2 does not have"):
            model(**inputs, past_key_values=StaticCache(config=model.config.text_config, max_cache_len=60))
        model.config.text_config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="pruned by a handle that has been removed"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    with mmeff.accelerate(model, FastV()), pytest.raises(UnsupportedModel, match='set cache="static"'):
        checks.generate(model, inputs, **STATIC)
    with pytest.raises(UnsupportedModel, match="follows what every decoded token looks at"):
        mmeff.accelerate(model, VLAPruner(layer=2, action_layer=3, cache="static"))
    with pytest.raises(ValueError, match=r'FastV.when must be "prefill" with cache="static"'):
        FastV(cache="static", when="decode")
