"""Dense against fast on the same inputs: the same seeds, alternating runs, medians, quality beside speed.

`compare` is the Python verb; `compare_video` and `compare_vlm` do the work for one kind of model; `embedded` is the main job,
which runs both on the models that the library carries.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmeff.accelerate import find_host
from mmeff.config import MethodConfig
from mmeff.evaluation.page import Section, write_page
from mmeff.evaluation.run_folder import RunFolder
from mmeff.registry import build
from mmeff.report import Report, environment

Tick = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found. `columns` and `rows` are the printed table; `measured` every figure; `reports` what ran, by
    variant; `sections` the page; `idle` the methods that accelerated nothing."""

    kind: str
    model: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    measured: dict[str, Any]
    reports: dict[str, Report]
    sections: tuple[Section, ...] = ()
    highlights: tuple[tuple[str, str], ...] = ()
    note: str = ""
    environment: dict[str, str] = field(default_factory=environment)

    @property
    def idle(self) -> tuple[str, ...]:
        """Variants whose method never acted."""
        return tuple(name for name, report in self.reports.items() if name != "dense" and not report.accelerated)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "kind": self.kind, "model": self.model, "note": self.note,
            "table": {"columns": list(self.columns), "rows": [list(r) for r in self.rows]},
            "measured": self.measured, "reports": {k: v.to_dict() for k, v in self.reports.items()},
            "accelerated_nothing": list(self.idle), "environment": self.environment,
        }  # fmt: skip

    def __str__(self) -> str:
        cells = [tuple(map(str, self.columns)), *[tuple("" if c is None else str(c) for c in row) for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        head = [f"{self.model}" + (f" ({self.note})" if self.note else "")]
        idle = [f"accelerated nothing: {', '.join(self.idle)}"] if self.idle else []
        return "\n".join([*head, lines[0], "  ".join("-" * w for w in widths), *lines[1:], *idle])


def compare(
    model_or_pipeline: Any,
    methods: Any,
    inputs: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    processor: Any = None,
    overwrite: bool = False,
    tick: Tick = silent,
    **settings: Any,
) -> Comparison:
    """Run a model dense and with each method on the same inputs.

    Args:
        model_or_pipeline: what `accelerate` takes.
        methods: one method or a list: configs, names, mappings or YAML paths, all of one stage.
        inputs: prompts for a pipeline (a string or a list of strings); for a vision-language model a mapping or a list of
            mappings with `question`, and `images` (PIL images).
        out: a folder for videos, pictures, report.json and report.html; None writes nothing.
        processor: the vision-language model's processor.
        overwrite: replace a finished run in `out`.
        tick: progress callback (what, done, total).
        settings: passed on to `compare_video` or `compare_vlm`; a pipeline needs no processor.
    Returns:
        a `Comparison`; print it for the table.
    Raises:
        as `accelerate`; ValueError for inputs that do not fit the model.
    """
    configs = resolve(methods)
    stages = {config.stage for config in configs}
    if len(stages) != 1:
        raise ValueError(f"compare takes methods of one stage at a time, got {', '.join(sorted(stages))}")
    for config in configs:
        find_host(model_or_pipeline, config)  # complains before any work
    folder = RunFolder(out, overwrite=overwrite) if out is not None else None
    if stages == {"diffusion_attn"}:
        from mmeff.evaluation.compare_video import compare_video

        result = compare_video(model_or_pipeline, configs, inputs, folder=folder, tick=tick, **settings)
    else:
        from mmeff.evaluation.compare_vlm import compare_vlm

        result = compare_vlm(model_or_pipeline, processor, configs, inputs, folder=folder, tick=tick, **settings)
    if folder is not None:
        finish(folder, [result], title=f"Dense against {', '.join(dict.fromkeys(c.name() for c in configs))}")
    return result


def resolve(methods: Any) -> list[MethodConfig]:
    """Configs from one method or a sequence of them.

    Raises:
        ValueError: no method, or the same config twice.
    """
    many = methods if isinstance(methods, Sequence) and not isinstance(methods, str) else [methods]
    configs = [build(method) for method in many]
    if not configs:
        raise ValueError("compare got no method; pass at least one, such as 'radial' or 'fastv'")
    return configs


def variant_names(configs: Sequence[MethodConfig]) -> list[str]:
    """A short distinct name per config: the method, and the fields in which configs of the same method differ."""
    names = []
    for config in configs:
        same = [c for c in configs if type(c) is type(config)]
        if len(same) == 1:
            names.append(config.name())
            continue
        mine = config.to_dict()
        differing = [k for k in mine if len({repr(c.to_dict()[k]) for c in same}) > 1]
        names.append(f"{config.name()} {', '.join(f'{k}={mine[k]}' for k in differing)}".strip())
    if len(set(names)) != len(names):
        raise ValueError(f"compare got the same method twice with the same fields: {', '.join(names)}")
    return names


def slug(name: str) -> str:
    """A variant's name as a file name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


def finish(
    folder: RunFolder, results: Sequence[Comparison], *, title: str, subtitle: str = "", extra: Mapping[str, Any] | None = None,
    sections: Sequence[Section] = (),
) -> None:  # fmt: skip
    """Write report.html, and report.json last."""
    notes = list(dict.fromkeys(f"{r.model}: {r.note}." for r in results if r.note))
    notes += [f"{name} accelerated nothing in this run." for r in results for name in r.idle]
    write_page(
        folder.file("report.html"),
        title=title,
        subtitle=subtitle,
        environment=environment(),
        sections=[*(s for r in results for s in r.sections), *sections],
        notes=notes,
        highlights=[h for r in results for h in r.highlights][:5],
    )
    folder.finish({"comparisons": [r.to_dict() for r in results], **(extra or {}), "environment": environment()})
