"""Any model of lmms-eval, accelerated: its tasks, prompts and scores stay those of lmms-eval.

    lm = accelerated("llava_hf", "fastv", keep=0.25, arguments={"pretrained": "llava-hf/llava-1.5-7b-hf"})
    lmms_eval.simple_evaluate(model=lm, tasks=["mvbench"])

Or on its command line, through the entry point `mmeff` of the group `lmms_eval.models`; what begins with `mmeff_` is for this
library, and the rest for the model:

    python -m lmms_eval --model mmeff --tasks mvbench \\
        --model_args mmeff_model=llava_hf,mmeff_method=fastv,mmeff_keep=0.25,pretrained=llava-hf/llava-1.5-7b-hf

lmms-eval is imported when it is used and is no dependency. Source: lmms_eval/models/registry_v2.py and lmms_eval/api/model.py.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import mmeff
from mmeff.errors import BackendUnavailable, UnsupportedModel
from mmeff.evaluation.run_folder import to_plain
from mmeff.registry import build
from mmeff.video_io import replacing

PREFIX = "mmeff_"

_log = logging.getLogger(__name__)


def accelerated(
    model: str, method: Any, *, arguments: Mapping[str, Any] | None = None, out: str | os.PathLike[str] = "",
    force_simple: bool = False, **fields: Any,
) -> Any:  # fmt: skip
    """Build a model of lmms-eval with methods installed on it.

    Args:
        model: its name in lmms-eval, such as "llava_hf". method, fields: as `mmeff.accelerate`.
        arguments: what its class takes, as in `--model_args`.
        out: a JSON file that says what ran, written after every batch of requests; none by default.
        force_simple: lmms-eval's choice between its two kinds of models.
    Returns:
        an object of the model's own class, or rather of a subclass: anything that lmms-eval does with one it does with this.
    Raises:
        BackendUnavailable: lmms-eval is not installed. UnsupportedModel: the object has no model of transformers in `.model`.
        UnknownMethod, TypeError, ValueError: as `mmeff.accelerate`.
    """
    config = build(method, **fields)  # a misspelt method must not cost a model load
    models = _lmms_eval("lmms_eval.models")
    base = models.get_model(model, force_simple) if force_simple else models.get_model(model)
    lm = _accelerated_class(base)(**(arguments or {}))
    inner = getattr(lm, "model", None)
    if not hasattr(inner, "generate"):
        raise UnsupportedModel(
            f"lmms-eval's {model} must hold a model of transformers in .model, got {type(inner).__name__}; models behind an "
            "API, or in another engine, cannot be accelerated from here"
        )
    lm.mmeff_handle = mmeff.accelerate(inner, config)
    lm.mmeff_out = Path(out) if out else None
    return lm


def _accelerated_class(base: Any) -> Any:
    """A subclass that checks, after every batch of requests, that the method really acted."""

    class Accelerated(base):
        mmeff_handle: Any = None
        mmeff_out: Path | None = None

        def generate_until(self, requests: Any) -> Any:
            return self._mmeff_ran(super().generate_until(requests))

        def generate_until_multi_round(self, requests: Any) -> Any:
            return self._mmeff_ran(super().generate_until_multi_round(requests))

        def loglikelihood(self, requests: Any) -> Any:
            if self.mmeff_handle.method.stage == "pruning":
                raise ValueError(
                    f"{self.mmeff_handle.method.name()} drops tokens of the prompt, so the likelihood of a text cannot be read "
                    "off its outputs; choose a task that generates, such as one with options to answer by letter"
                )
            return self._mmeff_ran(super().loglikelihood(requests))

        def _mmeff_ran(self, answers: Any) -> Any:
            self.mmeff_handle.check()
            report = self.mmeff_handle.report()
            _log.info("%s", report)
            if self.mmeff_out is not None:
                with replacing(self.mmeff_out) as partial:
                    partial.write_text(json.dumps(to_plain(report), indent=1) + "\n", "utf-8")
            return answers

    Accelerated.__name__ = f"Accelerated{base.__name__}"
    Accelerated.__qualname__ = Accelerated.__name__
    return Accelerated


def from_arguments(given: Mapping[str, Any], *, force_simple: bool = False) -> Any:
    """`accelerated` from the flat arguments of lmms-eval's command line.

    Raises: ValueError: mmeff_model or mmeff_method is missing. Else as `accelerated`.
    """
    own = {name.removeprefix(PREFIX): value for name, value in given.items() if name.startswith(PREFIX)}
    rest = {name: value for name, value in given.items() if not name.startswith(PREFIX)}
    missing = [PREFIX + name for name in ("model", "method") if not own.get(name)]
    if missing:
        raise ValueError(
            f"--model mmeff needs {' and '.join(missing)} in --model_args, got {', '.join(given) or 'nothing'}; for example "
            "mmeff_model=llava_hf,mmeff_method=fastv,pretrained=llava-hf/llava-1.5-7b-hf"
        )
    model, method, out = own.pop("model"), own.pop("method"), own.pop("out", "")
    return accelerated(model, method, arguments=rest, out=out, force_simple=force_simple, **own)


def manifests() -> Any:
    """What the entry point `mmeff` of lmms-eval's group `lmms_eval.models` gives: its name and its two classes."""
    registry = _lmms_eval("lmms_eval.models.registry_v2")
    here = __name__
    return registry.ModelManifest(model_id="mmeff", simple_class_path=f"{here}.Simple", chat_class_path=f"{here}.Chat")


def _entrance(name: str) -> Any:
    """The class that lmms-eval builds by name. What it gives back is of the class of the model inside."""
    base = _lmms_eval("lmms_eval.api.model").lmms
    simple = name == "Simple"

    def new(cls: Any, **given: Any) -> Any:
        return from_arguments(given, force_simple=simple)

    return type(name, (base,), {"__new__": new, "__module__": __name__, "is_simple": simple})


def __getattr__(name: str) -> Any:
    """`Simple` and `Chat` derive from a class of lmms-eval, so they are made when they are asked for."""
    if name in ("Simple", "Chat"):
        return _entrance(name)
    raise AttributeError(f"module {__name__} has no attribute {name!r}")


def _lmms_eval(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"this needs lmms-eval, which cannot be imported here ({error}); install it beside mmeff: pip install lmms-eval"
        ) from error
