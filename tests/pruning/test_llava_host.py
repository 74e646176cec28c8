"""Pruning inside LLaVA equals the full-length model in which the dropped columns are hidden, in every way it is used.

Tolerance 1e-5 on logits of order 10: both sides are float32 and differ in the order of sums only (measured 1e-6).
"""

from __future__ import annotations

import copy

import pytest
import torch

import mmeff
from mmeff.errors import AlreadyAccelerated, NothingAccelerated, UnsupportedModel
from mmeff.pruning import FastV

# Pads of 11, 24 and 0 make one row's padding overlap another row's image.
TEXTS = [18, 5, 29]


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 6, "do_sample": False, **kwargs}
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **kwargs)


def assert_same_run(fast, slow, *, atol=1e-5):
    assert torch.equal(fast.sequences, slow.sequences)
    for step, (a, b) in enumerate(zip(fast.logits, slow.logits, strict=True)):
        difference = (a - b).abs().max().item()
        assert difference <= atol, f"step {step}: logits differ by {difference}"


def our_hooks(model):
    """Hooks of this library on any module (transformers keeps capture hooks of its own)."""
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return [h for h in hooks if getattr(h, "__module__", "").startswith("mmeff")]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ["last", "text", "all"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_batch_with_padding_equals_masked_reference(tools, attention, rows, search):
    model = tools.llava(attention=attention)
    reference = tools.llava(attention="eager")
    inputs = tools.prompts(TEXTS)
    with mmeff.accelerate(model, FastV(layer=2, keep=0.5, rows=rows)) as handle:
        fast = generate(model, inputs, **search)
        report = handle.report()
    beams = search.get("num_beams", 1)
    kept = report.kept[2][::beams]
    assert kept.shape == (3, tools.VISUAL // 2)
    hidden = {2: tools.dropped(inputs, kept)}
    with tools.Reference(reference, hidden):
        slow = generate(reference, inputs, **search)
    assert_same_run(fast, slow)
    plain = generate(reference, inputs, **search)
    assert (plain.logits[0] - fast.logits[0]).abs().max() > 0.1, "pruning changed nothing: the test could not fail"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_row_equals_the_row_alone(tools, attention):
    model = tools.llava(attention=attention)
    inputs = tools.prompts(TEXTS)
    with mmeff.accelerate(model, FastV(layer=2, keep=0.25)) as handle:
        together = generate(model, inputs)
        kept = handle.report().kept[2]
        for b in range(3):
            real = inputs["attention_mask"][b].bool()
            alone = {k: inputs[k][b][real][None] for k in ("input_ids", "attention_mask")}
            one = generate(model, {**alone, "pixel_values": inputs["pixel_values"][b : b + 1]})
            assert torch.equal(one.sequences[0, -6:], together.sequences[b, -6:])
            assert (one.logits[0][0] - together.logits[0][b]).abs().max() < 1e-5
            assert torch.equal(handle.report().kept[2][0], kept[b])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("texts", [TEXTS, [18, 18 + 16, 18]])
def test_rows_with_different_numbers_of_images(tools, attention, texts):
    """Unequal keep counts are filled up with tokens that nothing looks at; [18, 34, 18] leaves no padding at all."""
    model, reference = tools.llava(attention=attention), tools.llava(attention="eager")
    inputs = tools.prompts(texts, images=[2, 1, 2] if texts != TEXTS else [2, 1, 3])
    with mmeff.accelerate(model, FastV(layer=2, keep=0.5)) as handle:
        fast = generate(model, inputs)
        kept = handle.report().kept[2]
    assert (kept == -1).any(), "the shorter row must be marked"
    with tools.Reference(reference, {2: tools.dropped(inputs, kept)}):
        assert_same_run(fast, generate(reference, inputs))


def test_cache_is_shorter_from_the_layer_on(tools):
    model = tools.llava()
    inputs = tools.prompts([9])
    with mmeff.accelerate(model, FastV(layer=3, keep=4)) as handle:
        out = generate(model, inputs)
        lengths = [layer.get_seq_length() for layer in out.past_key_values.layers]
    full = inputs["input_ids"].shape[1] + 5
    assert lengths == [full, full, full, full - 12, full - 12]
    report = handle.report()
    assert report.tokens["kept from layer 3 on"] == 4
    assert report.tokens["mean over layers"] == round((3 * 16 + 2 * 4) / 5, 1)
    assert {"prefill", "decode", "selection", "vision encoder"} <= set(report.seconds)


def test_without_cache(tools):
    """use_cache=False runs the whole prompt again each step; the first step must prune exactly as with a cache."""
    model = tools.llava()
    inputs = tools.prompts(TEXTS)
    with mmeff.accelerate(model, FastV(layer=2, keep=0.5)):
        cached = generate(model, inputs, max_new_tokens=1)
        plain = generate(model, inputs, max_new_tokens=1, use_cache=False)
    assert (cached.logits[0] - plain.logits[0]).abs().max() < 1e-5


def test_second_turn_on_a_pruned_cache(tools):
    """Text after a pruned prompt: nothing is pruned again, and the dropped columns stay hidden."""
    model, reference = tools.llava(), tools.llava(attention="eager")
    inputs = tools.prompts(TEXTS)
    with mmeff.accelerate(model, FastV(layer=2, keep=0.5)) as handle:
        first = generate(model, inputs)
        hidden = {2: tools.dropped(inputs, handle.report().kept[2])}
        more = torch.randint(5, 48, (3, 4), generator=torch.Generator().manual_seed(9))
        turn = {
            "input_ids": torch.cat([first.sequences, more], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 10, dtype=torch.long)], dim=1),
        }
        fast = generate(model, turn, past_key_values=copy.deepcopy(first.past_key_values))
    with tools.Reference(reference, hidden):
        before = generate(reference, inputs)
        assert_same_run(first, before)
        assert_same_run(fast, generate(reference, turn, past_key_values=before.past_key_values))


def test_remove_restores_bit_identical_output(tools):
    model = tools.llava()
    inputs = tools.prompts(TEXTS)
    before = generate(model, inputs)
    state = dict(model.__dict__)
    handle = mmeff.accelerate(model, FastV())
    assert our_hooks(model)
    changed = generate(model, inputs)
    handle.remove()
    handle.remove()
    after = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert not torch.equal(before.logits[0], changed.logits[0])
    assert set(model.__dict__) == set(state)
    assert not our_hooks(model)


def test_keeping_everything_is_the_identity(tools):
    model = tools.llava()
    inputs = tools.prompts(TEXTS)
    before = generate(model, inputs)
    with mmeff.accelerate(model, FastV(keep=1.0)):
        after = generate(model, inputs)
    assert torch.equal(before.sequences, after.sequences)
    assert (before.logits[0] - after.logits[0]).abs().max() < 1e-5


def test_disabled_handle_is_dense(tools):
    model = tools.llava()
    inputs = tools.prompts(TEXTS)
    before = generate(model, inputs)
    with mmeff.accelerate(model, FastV()) as handle:
        handle.enabled = False
        assert torch.equal(generate(model, inputs).logits[0], before.logits[0])


def test_plain_forward_runs_dense_and_leaving_says_so(tools):
    model = tools.llava()
    inputs = tools.prompts(TEXTS)
    with pytest.raises(NothingAccelerated, match="logits of every prompt token"), mmeff.accelerate(model, FastV()):
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_plain_forward_for_the_last_logits_prunes(tools):
    model = tools.llava()
    with mmeff.accelerate(model, FastV()) as handle:
        model(**tools.prompts(TEXTS), logits_to_keep=1, use_cache=True)
        assert handle.report().accelerated


def test_static_cache_is_refused(tools):
    model = tools.llava()
    with mmeff.accelerate(model, FastV()), pytest.raises(UnsupportedModel, match='cache_implementation="dynamic"'):
        generate(model, tools.prompts(TEXTS), cache_implementation="static", disable_compile=True)


def test_chunked_prefill_is_refused(tools):
    model = tools.llava()
    with mmeff.accelerate(model, FastV()), pytest.raises(ValueError, match="prefill_chunk_size=7"):
        generate(model, tools.prompts(TEXTS), prefill_chunk_size=7)


def test_a_pruned_cache_does_not_outlive_its_handle(tools):
    model = tools.llava()
    inputs = tools.prompts([9])
    with mmeff.accelerate(model, FastV()):
        out = generate(model, inputs)
    with pytest.raises(RuntimeError, match="pruned by a handle that has been removed"):
        generate(model, {"input_ids": out.sequences}, past_key_values=out.past_key_values)


def test_two_models_do_not_share_anything(tools):
    one, two = tools.llava(seed=0), tools.llava(seed=1)
    inputs = tools.prompts(TEXTS)
    with mmeff.accelerate(one, FastV(layer=1, keep=2)) as a, mmeff.accelerate(two, FastV(layer=3, keep=9)) as b:
        generate(one, inputs)
        generate(two, inputs)
        assert a.report().kept[1].shape[1] == 2
        assert b.report().kept[3].shape[1] == 9


def test_second_method_of_the_stage_is_refused(tools):
    model = tools.llava()
    with mmeff.accelerate(model, FastV()), pytest.raises(AlreadyAccelerated, match="remove"):
        mmeff.accelerate(model, FastV(keep=0.25))
    assert not our_hooks(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 0}, r"FastV.layer must be at least 1.*got 0"),
        ({"keep": 0.0}, r"FastV.keep must be a fraction in \(0, 1\]"),
        ({"keep": 0}, r"at least 1 token"),
        ({"keep": 1.5}, r"fraction"),
    ],
)
def test_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        FastV(**fields)


def test_layer_beyond_the_model(tools):
    with pytest.raises(ValueError, match=r"FastV.layer must be in \[1, 4\] for a model of 5 layers"):
        mmeff.accelerate(tools.llava(), FastV(layer=5))


def test_unknown_model_lists_what_is_supported():
    with pytest.raises(UnsupportedModel, match="LlavaForConditionalGeneration"):
        mmeff.accelerate(torch.nn.Linear(2, 2), FastV())


def test_plan_counts_tokens(tools):
    plan = mmeff.plan(tools.llava(), "fastv", layer=3, keep=4, text_tokens=10)
    assert dict(plan.rows)["kept"] == "4 from layer 3 on"
    assert plan.density == pytest.approx((3 * 16 + 2 * 4) / (5 * 16))
    assert plan.predicted_speedup > 1
