"""The wrapper for lmms-eval, against a stand-in of the parts of that package that it touches."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from mmeff.errors import BackendUnavailable, NothingAccelerated, UnsupportedModel
from mmeff.evaluation import lmms_eval as wrapper
from mmeff.evaluation.questions import answer, picture
from mmeff.tiny import scenes


class Lmms:
    is_simple = True

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        values = dict(pair.split("=", 1) for pair in arg_string.split(",") if pair)
        return cls(**values, **(additional_config or {}))


class Llava(Lmms):
    """As lmms-eval's models are: the torch model in `_model`, reached by the property `model`."""

    is_simple = False

    def __init__(self, pretrained, batch_size="1"):
        from mmeff import tiny

        self.pretrained, self.batch_size = pretrained, batch_size
        self._model, self.processor = tiny.vlm(device="cpu")

    @property
    def model(self):
        return self._model

    def generate_until(self, requests):
        return answer(self.model, self.processor, [r[0] for r in requests], [r[1] for r in requests], new_tokens=2)

    def generate_until_multi_round(self, requests):
        return self.generate_until(requests)

    def loglikelihood(self, requests):
        return [(0.0, True)]


class Remote(Lmms):
    model = "gpt"


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@pytest.fixture
def lmms(monkeypatch):
    parts = {name: ModuleType(name) for name in (
        "lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2", "lmms_eval.api", "lmms_eval.api.model"
    )}  # fmt: skip
    parts["lmms_eval.models"].get_model = lambda name, force_simple=False: {"llava_hf": Llava, "remote": Remote}[name]
    parts["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    parts["lmms_eval.api.model"].lmms = Lmms
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)


def requests():
    drawn = scenes.sample(24_000, 0, 2)
    return [([picture(image)], "what color is the cross ?") for image in drawn.images]


def test_a_model_is_accelerated_and_says_what_ran(lmms, tmp_path):
    lm = wrapper.accelerated("llava_hf", "fastv", keep=0.5, arguments={"pretrained": "x"}, out=tmp_path / "ran.json")
    assert isinstance(lm, Llava) and lm.is_simple is False and type(lm).__name__ == "AcceleratedLlava"
    assert len(lm.generate_until(requests())) == 2
    ran = json.loads((tmp_path / "ran.json").read_text())
    assert ran["method"]["method"] == "fastv" and ran["calls"]["sparse"] > 0


def test_a_method_that_never_acts_is_no_silent_success(lmms):
    lm = wrapper.accelerated("llava_hf", "fastv", arguments={"pretrained": "x"})
    lm.mmeff_handle.enabled = False
    with pytest.raises(NothingAccelerated):
        lm.generate_until(requests())


def test_likelihoods_of_pruned_prompts_are_refused(lmms):
    lm = wrapper.accelerated("llava_hf", "fastv", arguments={"pretrained": "x"})
    with pytest.raises(ValueError, match="fastv drops tokens of the prompt"):
        lm.loglikelihood([])


def test_the_command_line_of_lmms_eval_builds_it(lmms):
    found = wrapper.manifests()
    assert found.model_id == "mmeff" and found.chat_class_path == "mmeff.evaluation.lmms_eval.Chat"
    for name, simple in (("Chat", False), ("Simple", True)):
        entrance = getattr(wrapper, name)
        assert issubclass(entrance, Lmms) and entrance.is_simple is simple
    lm = wrapper.Chat.create_from_arg_string(
        "mmeff_model=llava_hf,mmeff_method=fastv,pretrained=x", {"batch_size": "4"}
    )
    assert isinstance(lm, Llava) and lm.batch_size == "4" and lm.mmeff_handle.method.name() == "fastv"
    with pytest.raises(ValueError, match="needs mmeff_method in --model_args"):
        wrapper.Chat.create_from_arg_string("mmeff_model=llava_hf,pretrained=x")


def test_models_that_cannot_be_reached_are_refused(lmms):
    with pytest.raises(UnsupportedModel, match=r"remote must hold a model of transformers in \.model, got str"):
        wrapper.accelerated("remote", "fastv")


def test_without_lmms_eval_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(BackendUnavailable, match="needs lmms-eval"):
        wrapper.accelerated("llava_hf", "fastv")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        wrapper.Nothing  # noqa: B018
