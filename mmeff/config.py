"""The base of every method's config: frozen, keyword-only, validated, and able to travel through YAML.

A method's config class is also its entry in the registry and the object that decides. Fields are declared with `option`,
so that the CLI, the docs table and the demo can show what a field means, its unit and where its default comes from.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mmeff.errors import suggest

ConfigT = TypeVar("ConfigT", bound="MethodConfig")


def option(default: Any, doc: str, *, unit: str = "", source: str = "") -> Any:
    """Declare a config field with its meaning, unit and the source of its default."""
    return dataclasses.field(default=default, metadata={"doc": doc, "unit": unit, "source": source})


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method. Subclasses set the class variables and call `super().__post_init__()` before their own checks.

    Raises:
        TypeError: a value of another type than its field declares.
        ValueError: a value out of range (raised by the subclass through `require`).
    """

    stage: ClassVar[str] = ""  # the room: "pruning", "diffusion_attn" or "vision_backbones"
    source: ClassVar[str] = ""  # the paper, and the code whose behaviour is the reference
    needs_training: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerce(getattr(self, field.name), hints[field.name])
            if not _matches(value, hints[field.name]):
                raise TypeError(
                    f"{type(self).__name__}.{field.name} must be {_spell(hints[field.name])}, "
                    f"got {value!r} of type {type(value).__name__}"
                )
            object.__setattr__(self, field.name, value)

    def require(self, condition: bool, field: str, rule: str, advice: str = "") -> None:
        """Raise ValueError `Class.field must <rule>, got <value>; <advice>.` unless `condition` holds."""
        if not condition:
            tail = f"; {advice}" if advice else ""
            raise ValueError(f"{type(self).__name__}.{field} must {rule}, got {getattr(self, field)!r}{tail}.")

    @classmethod
    def name(cls) -> str:
        """The method's name in the CLI, YAML and reports: the class name in lower case."""
        return cls.__name__.lower()

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n", 1)[0]

    def replace(self: ConfigT, **fields: Any) -> ConfigT:
        """A copy with some fields changed; unknown names raise TypeError with near matches."""
        check_fields(type(self), fields)
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """`{"method": name, field: value, ...}` of plain YAML types."""
        return {"method": self.name(), **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The config as YAML text; written to `path` too where one is given."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Build from a mapping; a `method` key, where present, must name this class."""
        values = dict(values)
        stated = values.pop("method", cls.name())
        if normalise(str(stated)) != cls.name():
            raise ValueError(
                f"{cls.__name__}.from_dict got a config of method {stated!r}; use mmeff.registry.build instead"
            )
        check_fields(cls, values)
        return cls(**values)


def check_fields(cls: type[MethodConfig], fields: Mapping[str, Any]) -> None:
    """Raise TypeError for names that are not fields of `cls`, with near matches and the full list."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise TypeError(f"{cls.__name__} has no field {name!r}.{suggest(name, known)} Fields: {', '.join(known)}.")


@dataclass(frozen=True, kw_only=True)
class FieldInfo:
    """One config field, for help texts and forms."""

    name: str
    type: str
    default: Any
    doc: str
    unit: str
    source: str


def describe(cls: type[MethodConfig]) -> list[FieldInfo]:
    """Every field of a method with its type, default, meaning, unit and source."""
    hints = typing.get_type_hints(cls)
    return [
        FieldInfo(
            name=f.name,
            type=_spell(hints[f.name]),
            default=None if f.default is MISSING else _plain(f.default),
            doc=f.metadata.get("doc", ""),
            unit=f.metadata.get("unit", ""),
            source=f.metadata.get("source", ""),
        )
        for f in dataclasses.fields(cls)
    ]


def normalise(name: str) -> str:
    """The spelling under which method names are compared: lower case, without separators."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def _plain(value: Any) -> Any:
    if isinstance(value, MethodConfig):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _coerce(value: Any, hint: Any) -> Any:
    """Convert what YAML and the command line cannot say otherwise.

    Lists become tuples, integers floats, and names and mappings other methods' configs, where the field asks for them.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, (str, Mapping)) and any(isinstance(o, type) and issubclass(o, MethodConfig) for o in options):
        from mmeff.registry import build  # which imports this module

        return build(value)
    inner = next((typing.get_args(o) for o in options if typing.get_origin(o) is tuple), None)
    if isinstance(value, (list, tuple)) and inner:
        hints = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return (
            tuple(_coerce(v, h) for v, h in zip(value, hints, strict=True))
            if len(hints) == len(value)
            else tuple(value)
        )
    if type(value) is int and float in options and int not in options:
        return float(value)
    return value


def _matches(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in args)
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(_matches(v, a) for v, a in zip(value, args, strict=True))
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return type(value) is hint
    return hint is Any or isinstance(value, hint)


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple:
        return "tuple of " + ", ".join("..." if a is Ellipsis else _spell(a) for a in args)
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
