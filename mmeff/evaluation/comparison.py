"""What a comparison is made of, whichever model was compared: its result, the names of its variants, its folder and page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmeff.config import MethodConfig
from mmeff.evaluation.page import Section, write_page
from mmeff.evaluation.run_folder import RunFolder
from mmeff.report import Report, environment

Tick = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found. `columns` and `rows` are the printed table; `measured` every figure; `reports` what ran, by
    variant; `sections` the page; `remark` what must be known about the settings; `idle` the methods that accelerated
    nothing."""

    kind: str
    model: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    measured: dict[str, Any]
    reports: dict[str, Report]
    sections: tuple[Section, ...] = ()
    highlights: tuple[tuple[str, str], ...] = ()
    note: str = ""
    remark: str = ""
    environment: dict[str, str] = field(default_factory=environment)

    @property
    def idle(self) -> tuple[str, ...]:
        """Variants whose method never acted."""
        return tuple(name for name, report in self.reports.items() if name != "dense" and not report.accelerated)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "kind": self.kind, "model": self.model, "note": self.note, "remark": self.remark,
            "table": {"columns": list(self.columns), "rows": [list(r) for r in self.rows]},
            "measured": self.measured, "reports": {k: v.to_dict() for k, v in self.reports.items()},
            "accelerated_nothing": list(self.idle), "environment": self.environment,
        }  # fmt: skip

    def __str__(self) -> str:
        cells = [tuple(map(str, self.columns)), *[tuple("" if c is None else str(c) for c in row) for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        head = [f"{self.model}" + (f" ({self.note})" if self.note else ""), *([self.remark] if self.remark else [])]
        idle = [f"accelerated nothing: {', '.join(self.idle)}"] if self.idle else []
        return "\n".join([*head, lines[0], "  ".join("-" * w for w in widths), *lines[1:], *idle])


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
