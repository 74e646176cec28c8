"""Pruning at several layers, before the first one among them, on LLaVA: the checks that every family passes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import mmeff
from mmeff.pruning import FastV, PyramidDrop, TransPrune, VisionZip

from . import host_checks as checks
from .conftest import prompts, random_llava
from .small_llava import SmallLlava

FAMILY = SmallLlava()


@pytest.mark.parametrize("schedule", checks.SCHEDULES)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
def test_equals_masked_reference(schedule, search):
    checks.equals_masked_reference(FAMILY, checks.EveryThird(schedule=schedule), **search)


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


def test_layer_0_by_hand_goes_on_at_the_right_position():
    """A loop that asks the cache for its length, as users write it, equals generate()."""
    model, inputs = random_llava(), prompts([9])
    with mmeff.accelerate(model, checks.EveryThird(schedule="0:0.5")):
        whole = checks.generate(model, inputs)
        out = model(**inputs, logits_to_keep=1, use_cache=True)
        said = []
        for step in range(5):
            assert (out.logits[0, -1] - whole.logits[step][0]).abs().max() < 1e-5
            said.append(int(out.logits[0, -1].argmax()))
            out = model(input_ids=torch.tensor([[said[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    assert said == whole.sequences[0, -5:].tolist()


def test_the_encoder_is_seen_under_generate_and_its_beams():
    """generate() runs the encoder before the forward and repeats rows after that; choices are those of a plain forward."""
    model, inputs = random_llava(), FAMILY.prompts()
    with mmeff.accelerate(model, VisionZip(keep=0.25)) as handle:
        model(**inputs, logits_to_keep=1, use_cache=True)
        plain = handle.report().kept[0]
        checks.generate(model, inputs, num_beams=3)
        assert torch.equal(handle.report().kept[0], plain.repeat_interleave(3, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projector_asked_by_a_method_runs_in_float32_and_is_not_taken_for_the_model(dtype):
    from mmeff.pruning._base import Decision

    model, inputs, seen = random_llava().to(dtype), prompts([9, 4]), []
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)

    class Probe(checks.EveryThird):
        needs = frozenset({"encoder", "projector"})

        def decide(self, view):
            encoder = view.encoder()
            x = encoder.features()
            again = encoder.project(x.float())
            assert again.dtype == torch.float32
            seen.append((again - view.embeddings()).abs().max().item())
            assert torch.equal(view.encoder().features(), x)
            return Decision(self.take(view, -view.original.float()))

    with mmeff.accelerate(model, Probe(schedule="0:0.5")):
        checks.generate(model, inputs, max_new_tokens=1)
    assert seen[0] < (1e-5 if dtype == torch.float32 else 0.3)  # bfloat16 rounds embeddings of size 10 to 0.06


@pytest.mark.parametrize(
    "method", [PyramidDrop(schedule="2:0.5"), TransPrune(schedule="2:0.5")], ids=lambda m: m.name()
)
def test_a_layer_is_spared_the_keys_that_scoring_has_projected(method):
    """The layer ahead projects one token's keys in place of all, and computes what it does with its own."""
    model, inputs = SmallLlava.model(), SmallLlava.prompts()
    rows, layer = [], model.model.language_model.layers[2].self_attn.k_proj
    with mmeff.accelerate(model, method) as handle:
        watch = layer.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
        fast = checks.generate(model, inputs, max_new_tokens=1)
        watch.remove()
        report = handle.report()
    assert rows == [inputs["input_ids"].shape[1], 1], "all tokens for scoring, then none but one"
    assert 0 < report.seconds["selection"] < report.seconds["prefill"]

    def own(module, args, output):  # as without what scoring has projected
        return torch.nn.functional.linear(entered[-1], module.weight)

    entered = []
    with mmeff.accelerate(model, method):
        hooks = [
            model.model.language_model.layers[2].input_layernorm.register_forward_hook(
                lambda module, args, output: entered.append(output)
            ),
            layer.register_forward_hook(own),
        ]
        alone = checks.generate(model, inputs, max_new_tokens=1)
        for hook in hooks:
            hook.remove()
    assert (fast.logits[0] - alone.logits[0]).abs().max() < 1e-5


def test_a_layer_is_spared_the_queries_of_text_that_scoring_has_projected():
    """Text stays, so the layer projects the queries of the other tokens alone; unequal rows of text are not taken apart."""
    model, inputs = SmallLlava.model(), SmallLlava.prompts()
    layer = model.model.language_model.layers[2].self_attn.q_proj

    def rows_and_logits(given, spared):
        rows = []
        with mmeff.accelerate(model, TransPrune(schedule="2:0.5")) as handle:
            watch = layer.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
            if not spared:  # put in what the layer would have projected itself, whose norm runs after that of scoring
                norm = model.model.language_model.layers[2].input_layernorm
                entered = []
                hooks = [
                    norm.register_forward_hook(lambda module, args, output: entered.append(output)),
                    layer.register_forward_hook(
                        lambda module, args, output: (
                            torch.nn.functional.linear(entered[-1], module.weight) if len(entered) > 1 else None
                        )
                    ),
                ]
            out = checks.generate(model, given, max_new_tokens=1).logits[0]
            kept = handle.report().kept[2].shape[1]
            for hook in [watch] + ([] if spared else hooks):
                hook.remove()
        return rows, out, kept

    alone = {name: x[:1] for name, x in inputs.items() if name != "pixel_values"}
    real = alone["attention_mask"].bool()
    alone = {name: x[real][None] for name, x in alone.items()}
    images = int((alone["input_ids"] == model.config.image_token_id).sum()) // model.config.image_seq_length
    alone["pixel_values"] = inputs["pixel_values"][:images]
    rows, fast, kept = rows_and_logits(alone, spared=True)
    visual = images * model.config.image_seq_length
    total = alone["input_ids"].shape[1] - visual + kept
    assert 0 < rows[0] < total and rows == [rows[0], total - rows[0]]
    assert (fast - rows_and_logits(alone, spared=False)[1]).abs().max() < 1e-5
    (first, second), _, _ = rows_and_logits(inputs, spared=True)
    assert second > total - rows[0] and first < second, "rows of a batch with unequal text are projected whole"


def test_text_rows_without_weight_are_not_projected():
    model, inputs = SmallLlava.model(), SmallLlava.prompts()
    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Halved(FastV):
        def score(self, view):
            factors = torch.zeros(view.text.shape[0], 1, view.text.shape[1])
            factors[..., ::2] = 0.5
            rows = []
            layer = model.model.language_model.layers[view.point.layer - 1].self_attn.q_proj
            watch = layer.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
            half = view.received("text", weights=factors)
            watch.remove()
            seen["rows"], seen["text"] = rows[0], view.text.shape[1]
            every = view.text_attention(to="visual") * (factors * view.text[:, None])[..., None]
            seen["error"] = (half - every.sum(2)).abs().max()
            return half.sum(1)

    with mmeff.accelerate(model, Halved(schedule="2:0.5")):
        checks.generate(model, inputs, max_new_tokens=1)
    assert seen["rows"] == -(-seen["text"] // 2) < seen["text"]
    assert seen["error"] < 1e-5
