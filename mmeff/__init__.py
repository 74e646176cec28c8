"""mmeff: faster vision-language models and video diffusion transformers, without retraining, honestly measured.

import mmeff
handle = mmeff.accelerate(model_or_pipeline, method)   # install; `with` removes it again
mmeff.plan(model_or_pipeline, method, **sizes)         # what would happen
mmeff.compare(model_or_pipeline, methods, inputs)      # dense against fast, with quality and time
mmeff.methods()                                        # everything that can be installed
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmeff import errors as errors
from mmeff.accelerate import accelerate, plan
from mmeff.handle import Handle
from mmeff.report import Plan, Report

if TYPE_CHECKING:
    from mmeff.evaluation.compare import compare as compare

__version__ = "0.1.0"
__all__ = ["Handle", "MethodInfo", "Plan", "Report", "accelerate", "compare", "methods", "plan"]


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """One registered method, as `methods()` lists it."""

    name: str
    config: type
    stage: str
    hosts: tuple[str, ...]
    summary: str
    source: str
    needs_training: bool


def methods() -> list[MethodInfo]:
    """Every registered method: the library's own and those of installed plugins."""
    from mmeff.accelerate import hosts
    from mmeff.registry import all_methods

    return [
        MethodInfo(
            name=name,
            config=cls,
            stage=cls.stage,
            hosts=tuple(host.name for host in hosts() if host.stage == cls.stage),
            summary=cls.summary(),
            source=cls.source,
            needs_training=cls.needs_training,
        )
        for name, cls in all_methods().items()
    ]


def __getattr__(name: str) -> Any:
    if name == "compare":  # pulls in torch and the model libraries; everything above is light
        return import_module("mmeff.evaluation.compare").compare
    raise AttributeError(f"module 'mmeff' has no attribute {name!r}")
