"""Pruning out of the cache at the first decoded token: equal to the full-length model in which the dropped columns are hidden
from that token on, and the prompt itself is read as by the unpruned model.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mmeff
from mmeff.errors import NothingAccelerated, UnsupportedModel
from mmeff.pruning import Debiased, FastV, PyramidDrop, SparseVLM, VisionZip
from mmeff.pruning._base import Decision, LayerView
from mmeff.registry import all_methods

from . import host_checks as checks
from .conftest import IMAGE, dropped_columns, prompts, random_llava
from .small_llava import SmallLlava
from .small_qwen_vl import SmallQwen

FAMILIES = {"llava": SmallLlava(), "qwen2.5-vl": SmallQwen("qwen2_5_vl")}


@dataclass(frozen=True, kw_only=True)
class EveryThird(checks.EveryThird):
    def why_not_from_cache(self) -> None:
        return None


METHODS = {
    "last": FastV(schedule="1:0.6,3:0.2", when="decode"),
    "next": PyramidDrop(schedule="2:0.4", when="decode"),
    "fixed": EveryThird(schedule="0:0.75,1:0.5,3:0.2", when="decode"),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


class DecodingReference(checks.MaskedReference):
    """Hides columns in passes of one token only."""

    @staticmethod
    def _hook(hidden: torch.Tensor) -> Any:
        hide = checks.MaskedReference._hook(hidden)
        return lambda module, args, kwargs: hide(module, args, kwargs) if args[0].shape[1] == 1 else None


def hidden_columns(family, model, inputs, kept, beams=1):
    visual = family.visual(model, inputs)
    return {layer: checks.dropped_columns(visual, columns[::beams]) for layer, columns in kept.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_model_whose_columns_are_hidden_from_the_first_decoded_token_on(family, name, search, attention):
    model, reference, inputs = family.model(attention=attention), family.model(attention="eager"), family.prompts()
    method = METHODS[name]
    with mmeff.accelerate(model, method) as handle:
        fast = checks.generate(model, inputs, **search)
        kept = handle.report().kept
    hidden = hidden_columns(family, reference, inputs, kept, search.get("num_beams", 1))
    visual = family.visual(reference, inputs)
    for point in method.points(5):
        left = (visual & ~hidden[point.layer]).sum(1).tolist()
        assert left == [point.count(n) for n in visual.sum(1).tolist()]
    with DecodingReference(checks.language(reference).layers, hidden):
        checks.assert_same_run(fast, checks.generate(reference, inputs, **search))
    plain = checks.generate(reference, inputs, **search)
    assert max((a - b).abs().max() for a, b in zip(plain.logits, fast.logits, strict=True)) > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_rows_without_padding_that_keep_different_numbers(name):
    """The model makes no mask for such prompts, and filler must be hidden all the same."""
    model, reference = random_llava(), random_llava(attention="eager")
    inputs = prompts([18, 34, 18], images=[2, 1, 2])
    with mmeff.accelerate(model, METHODS[name]) as handle:
        fast = checks.generate(model, inputs)
        hidden = {layer: dropped_columns(inputs, kept) for layer, kept in handle.report().kept.items()}
    with DecodingReference(reference.model.language_model.layers, hidden):
        checks.assert_same_run(fast, checks.generate(reference, inputs))


@pytest.mark.parametrize("name", METHODS)
def test_chunks_of_a_prompt_make_no_difference(family, name):
    model, inputs = family.model(), family.prompts()
    length = inputs["input_ids"].shape[1]
    with mmeff.accelerate(model, METHODS[name]) as handle:
        whole = checks.generate(model, inputs)
        kept = handle.report().kept
        for size in (7, length - 1):  # the latter leaves a chunk of a single token
            checks.assert_same_run(checks.generate(model, inputs, prefill_chunk_size=size), whole)
            assert all(torch.equal(handle.report().kept[layer], kept[layer]) for layer in kept)
        assert (whole.logits[1] - checks.generate(family.model(), inputs).logits[1]).abs().max() > 0.1


def test_beams_and_chunks(family):
    model, inputs = family.model(), family.prompts()
    with mmeff.accelerate(model, METHODS["last"]):
        whole = checks.generate(model, inputs, num_beams=3)
        checks.assert_same_run(checks.generate(model, inputs, num_beams=3, prefill_chunk_size=16), whole)


@pytest.mark.parametrize("name", METHODS)
def test_every_row_equals_the_row_alone(family, name):
    checks.rows_equal_rows_alone(family, METHODS[name])


@pytest.mark.parametrize(
    ("method", "layer"), [(FastV(layer=2, keep=5, when="decode"), 1), (PyramidDrop(schedule="2:5", when="decode"), 2)]
)
def test_kept_is_what_the_last_row_of_eager_attention_says(family, method, layer):
    model, stock, inputs = family.model(), family.model(attention="eager"), family.prompts()
    visual = family.visual(model, inputs)
    if int(visual.sum(1).min()) < 5:
        method = method.replace(schedule="2:2")
    seen = stock(**inputs, output_attentions=True).attentions[layer][:, :, -1].double().mean(1)
    with mmeff.accelerate(model, method) as handle:
        checks.generate(model, inputs, max_new_tokens=2)
        kept = handle.report().kept[2]
    for b in range(len(visual)):
        best = seen[b, visual[b]].topk(kept.shape[1]).indices.sort().values
        assert kept[b].tolist() == best.tolist()


def test_losses_and_logits_of_the_prompt_are_those_of_the_unpruned_model(family):
    model, inputs = family.model(), family.prompts()
    asked = {"labels": inputs["input_ids"], "output_hidden_states": True}
    plain = model(**inputs, **asked)
    with mmeff.accelerate(model, METHODS["last"]) as handle:
        found = model(**inputs, **asked)
        assert torch.equal(found.loss, plain.loss) and torch.equal(found.logits, plain.logits)
        assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, plain.hidden_states, strict=True))
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=found.past_key_values)
        assert handle.report().accelerated == 4


def test_loops_by_hand_with_two_conversations():
    """Two caches take turns; each is evicted for its own prompt, and positions go on where it ended."""
    model, ours = random_llava(), [prompts([9]), prompts([5], images=[2], seed=4)]
    with mmeff.accelerate(model, METHODS["fixed"]):
        wholes = [checks.generate(model, inputs) for inputs in ours]
        outs = [model(**inputs, use_cache=True) for inputs in ours]
        for step in range(5):
            for i, whole in enumerate(wholes):
                assert (outs[i].logits[0, -1] - whole.logits[step][0]).abs().max() < 1e-5
                token = outs[i].logits[:, -1:].argmax(-1)
                outs[i] = model(input_ids=token, past_key_values=outs[i].past_key_values)


def test_a_second_picture_leaves_the_first_ones_tokens_alone():
    """In the second turn only the new picture is pruned; the reference hides the columns of both turns, each from its time on."""
    model, reference = random_llava(), random_llava(attention="eager")
    first, third = prompts([9, 4]), prompts([6, 6], seed=5)
    method = METHODS["last"]
    picture = {"image": model.get_image_features(pixel_values=third["pixel_values"], return_dict=True)}

    def turns(model, before, after, **options):
        with before():
            one = checks.generate(model, first)
        kept = handle.report().kept if model is not reference else None
        ids = torch.cat([one.sequences, third["input_ids"]], dim=1)
        mask = torch.nn.functional.pad(
            first["attention_mask"], (0, ids.shape[1] - first["input_ids"].shape[1]), value=1
        )
        with after():
            two = checks.generate(
                model, {"input_ids": ids, "attention_mask": mask}, past_key_values=one.past_key_values,
                mm_encoder_outputs=picture, **options,
            )  # fmt: skip
        return one, two, ids, kept

    with mmeff.accelerate(model, method) as handle:
        one, two, ids, kept = turns(model, nullcontext, nullcontext)
        again = turns(model, nullcontext, nullcontext, prefill_chunk_size=5)
        checks.assert_same_run(again[1], two)
        new = handle.report().kept
    old = {layer: dropped_columns(first, columns) for layer, columns in kept.items()}
    late = torch.cat([torch.zeros_like(one.sequences), third["input_ids"]], dim=1)
    both = {}
    for layer, columns in new.items():
        both[layer] = dropped_columns({"input_ids": late}, columns)
        both[layer][:, : old[layer].shape[1]] |= old[layer]
    layers = reference.model.language_model.layers

    def second():
        stack = ExitStack()
        stack.enter_context(checks.MaskedReference(layers, old))
        stack.enter_context(DecodingReference(layers, both))
        return stack

    slow = turns(reference, lambda: DecodingReference(layers, old), second)
    checks.assert_same_run(two, slow[1])
    assert (late == IMAGE).sum() == 32


def test_the_cache_falls_at_the_first_decoded_token_and_the_report_says_so():
    model, inputs = random_llava(), prompts([9])
    with mmeff.accelerate(model, FastV(layer=3, keep=4, when="decode")) as handle:
        out = model(**inputs, use_cache=True)
        cache, full = out.past_key_values, inputs["input_ids"].shape[1]
        assert [layer.get_seq_length() for layer in cache.layers] == [full] * 5
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [full + 1] * 3 + [full - 11] * 2
        tokens = handle.report().tokens
    assert tokens["kept from layer 3 on"] == 4 and tokens["prefill operations, of dense"] == 1
    assert tokens["cache of the prompt, KiB"] == round((5 * full - 24) * 2 * 2 * 8 * 4 / 1024, 1)


def test_plan_promises_no_faster_prefill():
    model = random_llava()
    early, late = (mmeff.plan(model, FastV(layer=3, keep=4, when=when)) for when in ("prefill", "decode"))
    assert early.predicted_speedup > 1 and late.predicted_speedup == 1
    rows = dict(late.rows)
    assert rows["prefill operations"] == "1.000 of dense" and "read densely" in rows["pruned"]
    assert rows["cache"] == f"{dict(early.rows)['cache']} once decoding has begun"


@pytest.mark.parametrize("cls", [cls for cls in all_methods().values() if cls.stage == "pruning"])
def test_every_method_is_served_or_refused_with_its_reason(cls):
    model, inputs = random_llava(), prompts([9, 4])
    method = cls(when="decode")
    reason = method.why_not_from_cache()
    if reason is not None:
        with pytest.raises(UnsupportedModel, match=r"after the prompt has been read, and .*gone"):
            mmeff.accelerate(model, method)
        return
    with mmeff.accelerate(model, method) as handle:
        checks.generate(model, inputs, max_new_tokens=3)
        assert handle.report().accelerated


@pytest.mark.parametrize(
    "method",
    [
        FastV(rows="text", when="decode"),
        SparseVLM(when="decode"),
        VisionZip(when="decode"),
        Debiased(inner=FastV(rows="all"), when="decode"),
    ],
)
def test_methods_that_need_the_prompt_are_refused(method):
    with pytest.raises(UnsupportedModel, match="gone by then"):
        mmeff.accelerate(random_llava(), method)


def test_a_wrapped_method_leaves_the_options_to_its_wrapper():
    for fields in ({"when": "decode"}, {"cache": "static"}):
        with pytest.raises(ValueError, match="of Debiased itself"):
            Debiased(inner=FastV(**fields))


def test_a_method_that_asks_for_what_is_gone():
    class Asks(EveryThird):
        def decide(self, view: LayerView) -> Decision:
            return Decision(view.embeddings().sum(-1) > 0)

    model = random_llava()
    with pytest.raises(UnsupportedModel, match="which are gone"), mmeff.accelerate(model, Asks(when="decode")):
        checks.generate(model, prompts([9]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_new_tokens": 1}, "no token has been decoded"),
        ({"use_cache": False}, "no cache that visual tokens could leave"),
    ],
)
def test_where_nothing_can_be_evicted(options, reason):
    model, inputs = random_llava(), prompts([9])
    with pytest.raises(NothingAccelerated, match=reason), mmeff.accelerate(model, METHODS["last"]):
        checks.generate(model, inputs, **options)


def test_switched_off_is_dense_and_text_alone_is_said():
    model, inputs = random_llava(), prompts([9])
    plain = checks.generate(model, inputs)
    text = {"input_ids": torch.arange(5, 19)[None]}
    with mmeff.accelerate(model, METHODS["last"]) as handle:
        checks.generate(model, text)
        assert handle.report().fallbacks == {"the prompt has no image or video": 1}
        handle.enabled = False
        checks.assert_same_run(checks.generate(model, inputs), plain, atol=0.0)
        handle.enabled = True
        assert not torch.equal(checks.generate(model, inputs).logits[1], plain.logits[1])


def test_a_cache_that_was_cropped_before_decoding_stays_dense():
    model, inputs = random_llava(), prompts([9])
    with mmeff.accelerate(model, METHODS["last"]) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-2)
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert any("cropped" in reason for reason in handle.report().fallbacks) and not handle.report().accelerated
        handle.enabled = False  # nothing was to be accelerated
