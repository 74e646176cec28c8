"""Forms for methods: a component for every field of a config, with its meaning and unit, and the config read back from them.

Fields that name files or models are left out, and refused where a program sends them: a visitor must not make the server
open anything.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Literal

import yaml

from mmeff.config import FieldInfo, MethodConfig, describe
from mmeff.errors import UnknownMethod
from mmeff.registry import GROUP, ROOMS, all_methods, get, import_methods

Shape = Literal["check", "choice", "whole", "number", "method", "word", "list"]
CLOSED_UNITS = ("path", "name")  # of fields that name a file, a folder or a model
MAX_TEXT = 300  # characters of a field that is written as text
DEPTH = 3  # methods inside methods


def methods_of(stage: str) -> dict[str, type[MethodConfig]]:
    """Every registered method of a stage by name.

    Only the stage's own room is imported where no other package brings methods: the page must not wait for libraries that it
    does not show.
    """
    room = f"mmeff.{stage}"
    if room in ROOMS and not entry_points(group=GROUP):
        found = {cls.name(): cls for cls in import_methods(room).values()}
    else:
        found = all_methods()
    return {name: cls for name, cls in sorted(found.items()) if cls.stage == stage}


def open_fields(cls: type[MethodConfig]) -> list[FieldInfo]:
    """The fields that visitors may set."""
    return [info for info in describe(cls) if info.unit not in CLOSED_UNITS]


def shape_of(cls: type[MethodConfig], name: str) -> Shape:
    """How a field is entered: as a tick, a choice, a number, another method, a word, or a list in YAML."""
    options = _options(cls, name)
    if any(isinstance(option, type) and issubclass(option, MethodConfig) for option in options):
        return "method"
    if len(options) == 1:
        if options[0] is bool:
            return "check"
        if options[0] is int:
            return "whole"
        if options[0] is float:
            return "number"
        if options[0] is str:
            return "word"
        if typing.get_origin(options[0]) is Literal:
            return "choice"
    return "list"


def choices_of(cls: type[MethodConfig], name: str) -> list[Any]:
    """What a field of shape "choice" or "method" may be; "" stands for none."""
    options = _options(cls, name)
    if shape_of(cls, name) == "method":
        inner = next(option for option in options if isinstance(option, type) and issubclass(option, MethodConfig))
        names = [
            other for other, found in methods_of(cls.stage).items() if issubclass(found, inner) and found is not cls
        ]
        return [*([""] if type(None) in options else []), *names]
    return list(typing.get_args(options[0]))


def shown(cls: type[MethodConfig], name: str, value: Any) -> Any:
    """A field's value as its component holds it."""
    shape = shape_of(cls, name)
    if shape == "method":
        return "" if value is None else value.name() if isinstance(value, MethodConfig) else str(value)
    if shape == "list":
        return "" if value is None else _flow(value)
    return value


def entered(cls: type[MethodConfig], name: str, value: Any) -> Any:
    """A field's value from what its component holds.

    Raises: ValueError for text that is no YAML or too long.
    """
    shape = shape_of(cls, name)
    if shape == "method":
        return value or None
    if shape == "whole" and isinstance(value, float) and value.is_integer():
        return int(value)
    if shape == "list":
        text = "" if value is None else str(value)
        if len(text) > MAX_TEXT:
            raise ValueError(f"{cls.__name__}.{name} must be at most {MAX_TEXT} characters, got {len(text)}")
        try:
            return yaml.safe_load(text) if text.strip() else None
        except yaml.YAMLError as error:
            raise ValueError(
                f"{cls.__name__}.{name} must be a number or a list such as [1, 2], got {text!r}"
            ) from error
    if value is None and shape in ("whole", "number"):
        raise ValueError(f"{cls.__name__}.{name} must be a number, got an empty field")
    return value


def config_from(method: Any, stage: str) -> MethodConfig:
    """A config from what a visitor sent: a method's name, or a mapping with `method` and fields.

    Raises: UnknownMethod, TypeError, ValueError: as `mmeff.registry.build`; ValueError also for fields that visitors may not
        set, and for a method of another stage.
    """
    values = {"method": method} if isinstance(method, str) else method
    if not isinstance(values, Mapping) or not isinstance(values.get("method"), str):
        raise TypeError(
            f'a method must be a name, or a mapping such as {{"method": "radial", "decay": 0.2}}, got {_short(method)}'
        )
    config = _checked(values, depth=DEPTH)
    if config.stage != stage:
        raise ValueError(f"{config.name()} is a method of stage {config.stage}, and this runs methods of stage {stage}")
    return config


def _checked(values: Mapping[str, Any], depth: int) -> MethodConfig:
    if len(str(values["method"])) > 80:
        raise UnknownMethod(f"no method is called {_short(values['method'])}")
    cls = get(str(values["method"]))
    closed = {info.name for info in describe(cls)} - {info.name for info in open_fields(cls)}
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name == "method":
            continue
        if name in closed:
            raise ValueError(
                f"{cls.__name__}.{name} names something on the server and cannot be set in the demo; leave it out"
            )
        if (
            name in {f.name for f in dataclasses.fields(cls)}
            and shape_of(cls, name) == "method"
            and value not in (None, "")
        ):
            inner = {"method": value} if isinstance(value, str) else value
            if not isinstance(inner, Mapping) or not isinstance(inner.get("method"), str) or not depth:
                raise TypeError(f"{cls.__name__}.{name} must be a method's name or a mapping, got {_short(value)}")
            value = _checked(inner, depth - 1)
        fields[str(name)] = None if value == "" and _shape_or_none(cls, name) == "method" else value
    return cls.from_dict(fields)


def _shape_or_none(cls: type[MethodConfig], name: str) -> Shape | None:
    """The shape of a field, None where the method has no such field."""
    return shape_of(cls, name) if name in {f.name for f in dataclasses.fields(cls)} else None


def _options(cls: type[MethodConfig], name: str) -> tuple[Any, ...]:
    hint = typing.get_type_hints(cls)[name]
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _flow(value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("...").strip()


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


# ---------------------------------------------------------------- components


class Form:
    """The components of one method's fields, made inside the Gradio block that is open.

    `components` are in the order of `names`; `read` turns their values into the config.
    """

    def __init__(
        self, cls: type[MethodConfig], values: Mapping[str, Any] | None = None, *, visible: bool = True
    ) -> None:
        import gradio as gr

        self.method = cls
        self.names = [info.name for info in open_fields(cls)]
        self.components: list[Any] = []
        with gr.Accordion(
            f"{cls.__name__} settings", open=False, visible=visible, elem_classes="mm-form"
        ) as self.group:
            gr.Markdown(f"{cls.summary()} *{cls.source}*", elem_classes="mm-summary")
            with gr.Row(elem_classes="mm-fields"):
                self.components += [component(cls, info, (values or {}).get(info.name)) for info in open_fields(cls)]

    def values(self, preset: Mapping[str, Any] | None = None) -> list[Any]:
        """What the components show for the class's defaults, with those of `preset` in their place."""
        preset = preset or {}
        return [shown(self.method, info.name, preset.get(info.name, info.default)) for info in open_fields(self.method)]

    def read(self, values: Sequence[Any]) -> MethodConfig:
        """The config that the components hold.

        Raises: TypeError, ValueError: the message names the field.
        """
        fields = {name: entered(self.method, name, value) for name, value in zip(self.names, values, strict=True)}
        return config_from({"method": self.method.name(), **fields}, self.method.stage)


def component(cls: type[MethodConfig], info: FieldInfo, value: Any = None) -> Any:
    """The Gradio component of one field."""
    import gradio as gr

    label = info.name.replace("_", " ") + (f" ({info.unit})" if info.unit else "")
    common: dict[str, Any] = {"label": label, "info": info.doc, "min_width": 150, "elem_classes": "mm-field"}
    start = shown(cls, info.name, info.default if value is None else value)
    shape = shape_of(cls, info.name)
    if shape == "check":
        return gr.Checkbox(value=start, **common)
    if shape == "choice":
        return gr.Dropdown(choices=choices_of(cls, info.name), value=start, **common)
    if shape == "method":
        choices = [("none", "") if name == "" else name for name in choices_of(cls, info.name)]
        return gr.Dropdown(choices=choices, value=start, **common)
    if shape in ("whole", "number"):
        return gr.Number(value=start, precision=0 if shape == "whole" else None, **common)
    return gr.Textbox(value=start, max_lines=1, max_length=MAX_TEXT, **common)
