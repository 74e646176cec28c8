"""What every registered method owes: the rules below run over the whole registry, so a new file is covered by being there.

Each rule is also shown to fail on a class made to break it.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import pytest

import mmeff
from mmeff import registry
from mmeff.accelerate import hosts
from mmeff.config import MethodConfig, describe, normalise, option
from mmeff.registry import ROOMS, all_methods, build

METHODS = list(all_methods().values())
STAGES = [room.rsplit(".", 1)[1] for room in ROOMS]


def test_every_room_holds_methods():
    assert {cls.stage for cls in METHODS} >= set(STAGES)


# --- the rules ---------------------------------------------------------------------------------------------------------


def defaults_construct(cls: type[MethodConfig], tmp_path: Path) -> None:
    assert cls() == cls()
    assert hash(cls()) == hash(cls())


def is_frozen_and_keyword_only(cls: type[MethodConfig], tmp_path: Path) -> None:
    assert "__dataclass_params__" in vars(cls), f"{cls.__name__} itself is not decorated with @dataclass"
    fields = dataclasses.fields(cls)
    assert all(f.kw_only for f in fields)
    method = cls()
    for f in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, f.name, getattr(method, f.name))


def travels_through_yaml(cls: type[MethodConfig], tmp_path: Path) -> None:
    names = {f.name for f in dataclasses.fields(cls)}
    for i, method in enumerate([cls(), *_changed(cls)]):
        path = tmp_path / f"{i}.yaml"
        method.to_yaml(path)
        assert build(path) == method
        assert set(method.to_dict()) == {"method", *names}


def names_a_near_match_for_an_unknown_field(cls: type[MethodConfig], tmp_path: Path) -> None:
    for f in dataclasses.fields(cls):
        with pytest.raises(TypeError, match=f"{cls.__name__} has no field '{f.name}z'.*Did you mean.*'{f.name}'"):
            build(cls, **{f"{f.name}z": 1})


def refuses_a_wrong_type(cls: type[MethodConfig], tmp_path: Path) -> None:
    for f in dataclasses.fields(cls):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\.{f.name} must be .*, got <object.* of type object"):
            build(cls, **{f.name: object()})


def documents_its_fields(cls: type[MethodConfig], tmp_path: Path) -> None:
    for f in describe(cls):
        assert f.doc, f"{cls.__name__}.{f.name} does not say what it means"
        assert f.unit or f.source, f"{cls.__name__}.{f.name} has neither a unit nor a source"


def is_named_after_its_class(cls: type[MethodConfig], tmp_path: Path) -> None:
    assert cls.name() == cls.__name__.lower() == normalise(cls.__name__)
    assert registry.get(cls.__name__) is registry.get(cls.name()) is cls


def keeps_clear_of_the_verbs(cls: type[MethodConfig], tmp_path: Path) -> None:
    taken = {"method", *inspect.signature(mmeff.accelerate).parameters, *inspect.signature(mmeff.plan).parameters}
    assert not taken & {f.name for f in dataclasses.fields(cls)}


def says_what_it_is(cls: type[MethodConfig], tmp_path: Path) -> None:
    assert cls.summary().endswith("."), f"the docstring of {cls.__name__} must begin with one sentence on one line"
    assert not cls.summary().startswith(f"{cls.__name__}("), f"{cls.__name__} has no docstring of its own"
    assert cls.source
    assert sys.modules[cls.__module__].__doc__
    assert isinstance(cls.needs_training, bool)


def lives_in_its_room(cls: type[MethodConfig], tmp_path: Path) -> None:
    assert cls.stage in STAGES
    room = f"mmeff.{cls.stage}"
    assert cls.__module__.rpartition(".")[0] == room
    assert getattr(importlib.import_module(room), cls.__name__) is cls


def is_listed(cls: type[MethodConfig], tmp_path: Path) -> None:
    (info,) = (m for m in mmeff.methods() if m.name == cls.name())
    assert (info.config, info.stage, info.source, info.summary) == (cls, cls.stage, cls.source, cls.summary())
    assert info.hosts, f"no host takes methods of stage {cls.stage!r}"


RULES = [
    defaults_construct,
    is_frozen_and_keyword_only,
    travels_through_yaml,
    names_a_near_match_for_an_unknown_field,
    refuses_a_wrong_type,
    documents_its_fields,
    is_named_after_its_class,
    keeps_clear_of_the_verbs,
    says_what_it_is,
    lives_in_its_room,
    is_listed,
]


def _changed(cls: type[MethodConfig]) -> Iterator[MethodConfig]:
    """The default config with one field changed, for every field that a simple change leaves valid."""
    for f in dataclasses.fields(cls):
        old = getattr(cls(), f.name)
        if isinstance(old, bool):
            values: list[Any] = [not old]
        elif isinstance(old, int):
            values = [old + 1, old - 1, old * 2]
        elif isinstance(old, float):
            values = [old / 2, old + 0.125]
        elif isinstance(old, tuple):
            values = [old[::-1], old + old[-1:], tuple(v + 1 if type(v) is int else v for v in old)]
        else:
            values = list(get_args(get_type_hints(cls)[f.name]))  # the other values of a Literal
        for value in values:
            try:
                method = cls().replace(**{f.name: value})
            except (TypeError, ValueError):
                continue
            if method != cls():
                yield method
                break


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_method(cls, rule, tmp_path):
    rule(cls, tmp_path)


# --- each rule can fail ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NoDefault(MethodConfig):
    """Cannot be built from nothing."""

    steps: int


class NotDecorated(MethodConfig):
    """Has a field that is no dataclass field."""

    steps: int = 3


@dataclass(frozen=True, kw_only=True)
class Forgetful(MethodConfig):
    """Loses a field on its way to YAML."""

    mode: Literal["a", "b"] = option("a", "which", source="here")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name()}


@dataclass(frozen=True, kw_only=True)
class TakesAnything(MethodConfig):
    """Checks no types and swallows unknown fields."""

    steps: int = option(3, "how many", unit="steps")

    def __post_init__(self) -> None:
        pass

    @classmethod
    def from_dict(cls, values: Any) -> Any:
        return cls(**{k: v for k, v in values.items() if k == "steps"})


@dataclass(frozen=True, kw_only=True)
class Undocumented(MethodConfig):
    stage: ClassVar[str] = "pruning"
    method: int = 3


@dataclass(frozen=True, kw_only=True)
class Misnamed(MethodConfig):
    """Goes by another name, and has a field without unit and source."""

    stage: ClassVar[str] = "pruning"
    steps: int = option(3, "how many")

    @classmethod
    def name(cls) -> str:
        return "other"


BREAKERS = [
    (defaults_construct, NoDefault),
    (is_frozen_and_keyword_only, NotDecorated),
    (travels_through_yaml, Forgetful),
    (names_a_near_match_for_an_unknown_field, TakesAnything),
    (refuses_a_wrong_type, TakesAnything),
    (documents_its_fields, Undocumented),
    (documents_its_fields, Misnamed),
    (is_named_after_its_class, Misnamed),
    (keeps_clear_of_the_verbs, Undocumented),
    (says_what_it_is, Undocumented),
    (lives_in_its_room, Misnamed),
    (is_listed, NoDefault),
]


@pytest.mark.parametrize(("rule", "cls"), BREAKERS, ids=lambda x: x.__name__)
def test_rule_can_fail(rule, cls, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_methods", {**registry._methods, cls.name(): cls})
    with pytest.raises((AssertionError, pytest.fail.Exception, TypeError, ValueError)):
        rule(cls, tmp_path)


def test_every_rule_has_a_breaker():
    assert {rule for rule, _ in BREAKERS} == set(RULES)


# --- hosts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", hosts(), ids=lambda h: h.name)
def test_host_says_what_it_is(host):
    assert host.stage in STAGES
    assert host.name
    assert host.models
    assert not host.matches(object())


def names_used(source: str) -> set[str]:
    """Every identifier and every string constant of a module, docstrings apart."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.update(node.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            found.update((node.module or "").split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


HOST_FILES = sorted(
    p for room in ROOMS for p in Path(importlib.import_module(f"{room}.hosts").__path__[0]).glob("*.py")
)


@pytest.mark.parametrize("path", HOST_FILES, ids=lambda p: f"{p.parent.parent.name}-{p.stem}")
def test_host_knows_no_method_by_name(path):
    methods = {normalise(cls.__name__) for cls in METHODS}
    assert not methods & {normalise(name) for name in names_used(path.read_text())}


def test_a_host_that_names_a_method_would_be_found():
    assert "fastv" in names_used("from mmeff.pruning.fastv import x")
    assert "FastV" in names_used("if isinstance(method, FastV): pass")
    assert "fastv" in names_used("if method.name() == 'fastv': pass")
