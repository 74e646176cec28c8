"""The two verbs that meet a model: `accelerate` installs a method, `plan` says what it would do."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from typing import Any

from mmeff.config import MethodConfig
from mmeff.errors import UnsupportedModel, suggest
from mmeff.handle import Handle, HandleStack, Host
from mmeff.registry import all_methods, build
from mmeff.report import Plan

_HOST_PACKAGES = ("mmeff.pruning.hosts", "mmeff.diffusion_attn.hosts", "mmeff.vision_backbones.hosts")
_hosts: list[type[Host]] = []


def hosts() -> list[type[Host]]:
    """Every host: each module of the rooms' `hosts` packages lists its own in `HOSTS`."""
    if not _hosts:
        found: list[type[Host]] = []
        for package in _HOST_PACKAGES:
            module = importlib.import_module(package)
            for info in sorted(pkgutil.iter_modules(module.__path__), key=lambda i: i.name):
                if not info.name.startswith("_"):
                    found.extend(getattr(importlib.import_module(f"{package}.{info.name}"), "HOSTS", ()))
        _hosts.extend(found)  # all or none: a module that cannot be imported must fail each time
    return list(_hosts)


def find_host(model: Any, method: MethodConfig) -> type[Host]:
    """The host that knows this model and takes methods of this stage.

    Raises:
        UnsupportedModel: none does; the message lists what the stage supports.
    """
    known = [host for host in hosts() if host.stage == method.stage]
    for host in known:
        if host.matches(model):
            reason = host.why_not(model, method)
            if reason is not None:
                raise UnsupportedModel(f"{method.name()} cannot act on this {type(model).__name__}: {reason}")
            return host
    others = [host for host in hosts() if host.stage != method.stage and host.matches(model)]
    stages = sorted({host.stage for host in others})
    hint = f" This model takes methods of stage {', '.join(stages)}: {_names(stages)}." if stages else ""
    supported = "; ".join(f"{host.name} ({host.models})" for host in known) or "nothing yet"
    raise UnsupportedModel(
        f"no host of stage {method.stage!r} knows {type(model).__module__}.{type(model).__name__}, "
        f"so {method.name()} cannot be installed. Supported: {supported}.{hint}"
    )


def _names(stages: list[str]) -> str:
    return ", ".join(cls.__name__ for cls in all_methods().values() if cls.stage in stages)


def accelerate(model_or_pipeline: Any, method: Any, **fields: Any) -> Any:
    """Install a method on a model or pipeline.

    Args:
        model_or_pipeline: a transformers vision-language model, a diffusers pipeline or a timm backbone that a host knows.
        method: a config, its class, its name, a YAML path, or a list of these (installed in order).
        fields: config fields that replace defaults; not with a list.
    Returns:
        a `Handle`, or a `HandleStack` for a list. Use it in a `with` block, or call `remove()`.
    Raises:
        UnknownMethod: no method has that name. TypeError, ValueError: a field does not exist or is out of range.
        UnsupportedModel: no host knows the model. AlreadyAccelerated: the stage is taken on this model.
    """
    if isinstance(method, (list, tuple)):
        if fields:
            raise TypeError(
                f"fields ({', '.join(fields)}) are ambiguous for a list of methods; pass configs in the list"
            )
        if not method:
            raise ValueError("accelerate got an empty list of methods; pass at least one")
        installed: list[Handle] = []
        try:
            for one in method:
                installed.append(accelerate(model_or_pipeline, one))
        except BaseException:
            for handle in reversed(installed):
                handle.remove()
            raise
        return HandleStack(installed)
    config = build(method, **fields)
    return Handle(model_or_pipeline, config, find_host(model_or_pipeline, config))


def plan(model_or_pipeline: Any, method: Any, **sizes: Any) -> Plan:
    """Say what a method would do, before anything runs.

    Args:
        sizes: what the host needs: `height`, `width`, `num_frames`, `num_inference_steps` for video; `text_tokens`,
            `images` for vision-language models; `height`, `width`, `batch` for backbones. Names that are fields of the
            method configure it.
    Returns:
        a `Plan` with density, predicted speedup and every reason for a fallback.
    Raises:
        as `accelerate`.
    """
    config = build(method)
    config = config.replace(**{f.name: sizes.pop(f.name) for f in dataclasses.fields(config) if f.name in sizes})
    host = find_host(model_or_pipeline, config)
    _check_sizes(host, config, sizes)
    return host.plan(model_or_pipeline, config, **sizes)


def _check_sizes(host: type[Host], config: MethodConfig, sizes: dict[str, Any]) -> None:
    """Every size must be one that the host takes, and a positive int."""
    taken = inspect.signature(host.plan).parameters.values()
    names = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    anything = any(p.kind is p.VAR_KEYWORD for p in taken)
    for name, value in sizes.items():
        if name not in names and not anything:
            raise TypeError(
                f"a plan for the {host.name} host has no size {name!r}, and {config.name()} has no such field."
                f"{suggest(name, [*names, *config.to_dict()])} Sizes: {', '.join(names)}."
            )
        if type(value) is not int:
            raise TypeError(f"plan needs {name} as an int, got {value!r} of type {type(value).__name__}")
        if value < 1:
            raise ValueError(f"plan needs {name} >= 1, got {value}")
