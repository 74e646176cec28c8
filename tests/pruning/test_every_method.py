"""Every registered pruner on LLaVA, Qwen2.5-VL and Qwen3-VL: what it keeps is what an independent view of the stock model says,
and the pruned model equals the full-length one with the dropped columns hidden.

The independent view is made of eager attention matrices and hidden states that the stock model returns, brought to float64;
that a method's own rule is right is settled in its own test file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmeff
from mmeff.pruning import (
    VTCCLS,
    AdaptInfer,
    CaCoVID,
    CDPruner,
    Debiased,
    DivPrune,
    FastV,
    NormTopK,
    PyramidDrop,
    RandomPruning,
    SparseVLM,
    TransPrune,
    UniformPruning,
    VisionZip,
    VLAPruner,
    ZOOPrune,
)  # fmt: skip
from mmeff.pruning._base import Transition
from mmeff.pruning._cacovid_policy import Policy
from mmeff.registry import all_methods

from . import host_checks as checks
from .fake_view import FakeView
from .small_llava import SmallLlava
from .small_qwen_vl import SmallQwen

FAMILIES = {"llava": SmallLlava(), "qwen2.5-vl": SmallQwen("qwen2_5_vl"), "qwen3-vl": SmallQwen("qwen3_vl")}
EXACT = 1e-5

# In the language model of five layers.
INSIDE = {
    "adaptinfer": AdaptInfer(schedule="1:0.6,3:0.2"),
    "adaptinfer-uniform": AdaptInfer(schedule="2:0.3", prior="uniform"),
    "adaptinfer-mixed": AdaptInfer(schedule="2:0.3", prior_mix=0.5),
    "fastv": FastV(keep=0.4),
    "pyramiddrop": PyramidDrop(schedule="1:0.6,2:0.4,4:0.2"),
    "sparsevlm": SparseVLM(schedule="1:0.6,3:0.25", recycle=0.0),
    "sparsevlm-2": SparseVLM(schedule="1:0.6,3:0.25", version="v2", heads=2),
    "transprune": TransPrune(schedule="2:0.6,3:0.4"),
    "debiased": Debiased(inner=FastV(keep=0.4), rate=0.05),
    "randompruning": RandomPruning(schedule="0:0.7,2:0.3"),
    "uniformpruning": UniformPruning(schedule="0:0.7,2:0.3"),
}
BEFORE = {
    "divprune": DivPrune(keep=0.4),
    "cdpruner": CDPruner(keep=0.4),
    "normtopk": NormTopK(keep=0.4),
    "zooprune": ZOOPrune(keep=0.4),
}
CLASS_TOKEN = {"vtccls": VTCCLS(keep=0.4), "visionzip": VisionZip(keep=0.4, contextual=0.0)}
ELSEWHERE = {VLAPruner, CaCoVID}  # below, with a history and with a policy


def test_the_whole_registry_is_here():
    here = {type(m) for table in (INSIDE, BEFORE, CLASS_TOKEN) for m in table.values()} | ELSEWHERE
    assert here == {cls for cls in all_methods().values() if cls.stage == "pruning"}


def cases() -> list[Any]:
    both = [(f, n, m) for f in FAMILIES for n, m in (INSIDE | BEFORE).items()]
    return [pytest.param(FAMILIES[f], m, id=f"{f}-{n}") for f, n, m in both] + [
        pytest.param(FAMILIES["llava"], m, id=f"llava-{n}") for n, m in CLASS_TOKEN.items()
    ]


@pytest.mark.parametrize(("family", "method"), cases())
def test_equals_the_masked_full_length_model(family, method):
    checks.equals_masked_reference(family, method)


@pytest.mark.parametrize(("family", "method"), cases())
def test_every_row_equals_the_row_alone(family, method):
    checks.rows_equal_rows_alone(family, method)


# ---------------------------------------------------------------- kept sets from the stock model


class Stock:
    """One eager forward of the stock model, and what its layers and sublayers did."""

    def __init__(self, family: Any) -> None:
        model = family.model(attention="eager")
        self.inputs = family.prompts()
        self.visual = family.visual(model, self.inputs)
        self.real = self.inputs["attention_mask"].bool()
        self.moved: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        self.rotary: Any = None
        layers = checks.language(model).layers
        for i, layer in enumerate(layers):
            layer.self_attn.register_forward_hook(self._hook(i, "attention"), with_kwargs=True)
            layer.mlp.register_forward_hook(self._hook(i, "mlp"), with_kwargs=True)
        layers[0].register_forward_pre_hook(self._keep_rotary, with_kwargs=True)
        with torch.no_grad():
            out = model(**self.inputs, output_attentions=True, output_hidden_states=True)
        self.attentions, self.hidden = out.attentions, out.hidden_states

    def _keep_rotary(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rotary = kwargs["position_embeddings"]

    def _hook(self, index: int, kind: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).double()
            y = (output[0] if isinstance(output, tuple) else output).double()
            cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            self.moved[index, kind] = (y.norm(dim=-1) / x.norm(dim=-1), cosine)

        return hook

    def view(self, method: Any, layer: int, keep: float) -> FakeView:
        place = (~self.visual).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(self.visual.sum(1).max())]
        moved = {}
        for index in range(layer):
            moved[index] = tuple(
                Transition(ratio=ratio.nan_to_num(), cosine=cosine.nan_to_num(), real=self.real, visual=place)
                for ratio, cosine in (self.moved[index, "attention"], self.moved[index, "mlp"])
            )
        view = FakeView(
            visual=self.visual, real=self.real, layer=layer, layers=len(self.attentions), keep=keep, state=method.new_state(),
            before=self.attentions[layer - 1].double() if layer else None, next=self.attentions[layer].double(),
            embedded=self.hidden[0].double(), entering=self.hidden[layer].double(), rotary=self.rotary, moved=moved,
        )  # fmt: skip
        view.text_ids = lambda: self.inputs["input_ids"].gather(1, view._text_slots)
        return view


FROM_STOCK = {
    "adaptinfer": AdaptInfer(schedule="2:0.4"),
    "adaptinfer-uniform": AdaptInfer(schedule="2:0.4", prior="uniform"),
    "fastv-last": FastV(schedule="2:0.4"),
    "fastv-text": FastV(schedule="3:0.4", rows="text"),
    "fastv-all": FastV(schedule="1:0.4", rows="all"),
    "pyramiddrop": PyramidDrop(schedule="2:0.4"),
    "sparsevlm": SparseVLM(schedule="2:0.4", recycle=0.0),
    "sparsevlm-2": SparseVLM(schedule="2:0.4", version="v2", heads=2),
    "transprune": TransPrune(schedule="3:0.4"),
    "divprune": DivPrune(keep=0.4),
    "normtopk": NormTopK(keep=0.4),
}


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request):
    return FAMILIES[request.param], Stock(FAMILIES[request.param])


@pytest.mark.parametrize("name", FROM_STOCK)
def test_kept_is_what_float64_says_of_the_stock_model(stock, name):
    (family, seen), method = stock, FROM_STOCK[name]
    (point,) = method.points(len(seen.attentions))
    view = seen.view(method, point.layer, point.keep)
    expected = method.decide(view).keep
    model = family.model()
    with mmeff.accelerate(model, method) as handle:
        checks.generate(model, seen.inputs, max_new_tokens=1)
        kept = handle.report().kept[point.layer]
    for b in range(len(expected)):
        assert kept[b][kept[b] >= 0].tolist() == expected[b].nonzero()[:, 0].tolist()
    first = torch.arange(expected.shape[1]) < view.counts[:, None]
    assert not torch.equal(expected, first), "the first tokens were kept: any score would do"


# ---------------------------------------------------------------- with a history, with a policy


@pytest.mark.parametrize("name", FAMILIES)
def test_a_history_of_actions(name):
    """Nothing is dropped while the history fills; then the pruned model is the masked one, until the episode ends."""
    family = FAMILIES[name]
    model, inputs = family.model(), family.prompts()
    method = VLAPruner(keep=0.4, layer=2, action_layer=3, window=2)
    with mmeff.accelerate(model, method) as handle:
        for _ in range(2):
            checks.generate(model, inputs, max_new_tokens=3)
            assert (handle.report().kept[2] >= 0).sum(1).tolist() == family.visual(model, inputs).sum(1).tolist()
        fast = checks.generate(model, inputs, max_new_tokens=3)
        kept = handle.report().kept[2]
        handle.reset_episode()
        checks.generate(model, inputs, max_new_tokens=3)
        assert handle.report().kept[2].shape[1] > kept.shape[1]
    reference = family.model(attention="eager")
    hidden = {2: checks.dropped_columns(family.visual(reference, inputs), kept)}
    with checks.MaskedReference(checks.language(reference).layers, hidden):
        checks.assert_same_run(fast, checks.generate(reference, inputs, max_new_tokens=3))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_action_looks_at_is_what_eager_attention_says(name):
    family = FAMILIES[name]
    model, inputs = family.model(), family.prompts()
    visual, told = family.visual(model, inputs), []

    class Told(VLAPruner):
        def observe(self, state, attention, *, prefill):
            told.append((attention.clone(), prefill))
            super().observe(state, attention, prefill=prefill)

    with mmeff.accelerate(model, Told(keep=0.4, layer=2, action_layer=3)):
        checks.generate(model, inputs, max_new_tokens=3)
    eager = family.model(attention="eager")
    out = eager.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert [prefill for _, prefill in told] == [True, False, False]
    for (attention, _), step in zip(told, out.attentions, strict=True):
        newest = step[3][:, :, -1].double().mean(1)
        for b in range(len(visual)):
            expected = newest[b, : visual.shape[1]][visual[b]]
            assert (attention[b, : len(expected)] - expected).abs().max() < EXACT
            assert not attention[b, len(expected) :].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy(name, tmp_path):
    family = FAMILIES[name]
    model = family.model()
    policy = Policy.from_layer(checks.language(model).layers[0], model.config.get_text_config())
    policy.save(tmp_path)
    method = CaCoVID(keep=0.4, policy=str(tmp_path))
    checks.equals_masked_reference(family, method)
    checks.rows_equal_rows_alone(family, method)


def test_a_history_of_another_size_is_refused_and_an_episode_begins_anew():
    from .conftest import prompts

    model = FAMILIES["llava"].model()
    with mmeff.accelerate(model, VLAPruner(keep=0.5, layer=2, action_layer=3, window=1)) as handle:
        checks.generate(model, prompts([5, 9]), max_new_tokens=2)
        with pytest.raises(ValueError, match="reset_episode"):
            checks.generate(model, prompts([5, 9], images=[2, 1]), max_new_tokens=2)
        handle.reset_episode()
        checks.generate(model, prompts([5, 9], images=[2, 1]), max_new_tokens=2)


def test_methods_without_a_history_say_so():
    model = FAMILIES["llava"].model()
    with mmeff.accelerate(model, FastV()) as handle, pytest.raises(TypeError, match="no episode to reset"):
        handle.reset_episode()
        checks.generate(model, FAMILIES["llava"].prompts())


def test_a_history_needs_a_cache():
    model = FAMILIES["llava"].model()
    with mmeff.accelerate(model, VLAPruner(layer=2, action_layer=3)), pytest.raises(ValueError, match="use_cache=True"):
        checks.generate(model, FAMILIES["llava"].prompts(), use_cache=False)


def test_a_report_says_that_padding_cannot_be_told():
    model = FAMILIES["llava"].model()
    with mmeff.accelerate(model, Debiased(inner=FastV(keep=0.4), rate=0.05)) as handle:
        checks.generate(model, FAMILIES["llava"].prompts())
    (remark,) = handle.report().remarks
    assert "padding" in remark and remark in str(handle.report())
