"""The committed benchmark rows as figures that a page can filter: read once, never measured here, every one with its machine.

A results file holds rows of one benchmark, each complete in itself; `result_rows.py` knows their kinds. What was measured and
what was predicted stay apart, losses stay in, and rows that say why something could not run are kept as such.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

Kind = Literal["measured", "predicted"]
TITLES = {
    "cpu": "Kernels against PyTorch, CPU",
    "cuda": "Kernels against PyTorch, GPU",
    "video": "Video transformers: speed of attention",
    "quality": "Video quality against density",
    "pruning-tiny-vlm": "Answers about pictures, tokens dropped",
    "pruning-tiny-video-vlm": "Answers about clips, tokens dropped",
    "prefill": "Prefill of a scaled-down 7B",
    "acting-tiny-vla": "Robot tasks, tokens dropped",
    "backbones": "Vision backbones: speed and memory",
    "digits": "Backbones learning digits",
    "roofline": "What the processor could do at most",
    "h200": "Everything on an NVIDIA H200",
}
UNRECORDED = "machine not recorded: only answers and counts, which do not depend on it"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one row.

    Fields: `value` of `metric` for `method` in `case`, from `low` to `high` as `spread` says; `x` where it is a point of a
    curve over `axis`; `neutral` the value at which nothing is gained or lost, where there is one; `better` "high" or "low";
    `count` what it is a figure of; the rest says where it comes from.
    """

    topic: str
    kind: Kind = "measured"
    metric: str
    case: str
    method: str
    value: float
    low: float | None = None
    high: float | None = None
    spread: str = ""
    x: float | None = None
    axis: str = ""
    neutral: float | None = None
    better: Literal["high", "low", ""] = ""
    count: str = ""
    hardware: str = UNRECORDED
    device: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""

    @property
    def loss(self) -> bool:
        """Whether it is on the wrong side of `neutral`."""
        if self.neutral is None or not self.better:
            return False
        return self.value < self.neutral if self.better == "high" else self.value > self.neutral


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What a row says could not be measured, and why."""

    topic: str
    what: str
    reason: str


class Results:
    """All figures of a folder of results files.

    Args: folder: of `*.jsonl`; None for the rows that come with the library.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else rows_folder()
        self.figures: list[Figure] = []
        self.skipped: list[Skipped] = []
        self.problems: list[str] = []
        if self.folder is not None and self.folder.is_dir():
            for path in sorted(self.folder.glob("*.jsonl")):
                if not path.stem.endswith("-summary"):  # derived from the rows of another file
                    self._read(path)

    def _read(self, path: Path) -> None:
        from .result_rows import figures_of

        rows = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                rows.append(row)
            except ValueError:
                self.problems.append(f"{path.name}, line {number}, is no JSON object and was left out")
        try:
            figures, skipped = figures_of(path.stem, rows)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.problems.append(f"{path.name} is of no kind that this page knows ({type(error).__name__}: {error})")
            return
        self.figures += figures
        self.skipped += skipped

    @property
    def note(self) -> str:
        """What a reader must know where rows are missing; empty where all is well."""
        if not self.figures and not self.problems:
            where = "in this installation" if self.folder is None else f"in the folder {self.folder.name!r}"
            return f"No benchmark rows were found {where}. `python -m benchmarks` in a checkout of mmeff makes them."
        return " ".join(f"{problem}." for problem in self.problems)

    @property
    def topics(self) -> list[tuple[str, str]]:
        """(title, name) of the files that have figures, as a drop-down takes them."""
        found = {f.topic for f in self.figures}
        return [(title, name) for name, title in TITLES.items() if name in found] + sorted(
            (name, name) for name in found - TITLES.keys()
        )

    def choices(self, field: str, **chosen: Any) -> list[str]:
        """The values that a field takes among the figures of the fields already chosen, in their order."""
        return list(dict.fromkeys(str(getattr(f, field)) for f in self.select(**chosen)))

    def select(self, *, cases: Sequence[str] = (), methods: Sequence[str] = (), **chosen: str) -> list[Figure]:
        """The figures with these values; no cases or no methods means all of them.

        Args: chosen: topic, kind, metric, hardware.
        """
        return [
            f
            for f in self.figures
            if all(getattr(f, name) == value for name, value in chosen.items())
            and (not cases or f.case in cases)
            and (not methods or f.method in methods)
        ]

    def skipped_of(self, topic: str) -> list[Skipped]:
        """What could not be measured for a file."""
        return [s for s in self.skipped if s.topic == topic]


def rows_folder() -> Path | None:
    """Where the committed rows lie: inside an installed package, or beside it in a checkout; None where they are not."""
    here = Path(__file__).resolve().parent
    for folder in (here / "rows", here.parent / "benchmarks" / "results"):
        if folder.is_dir():
            return folder
    return None


COLUMNS = ("method", "at", "value", "from", "to", "metric", "case", "kind", "machine", "of", "date")


def table(figures: Iterable[Figure]) -> list[list[Any]]:
    """Rows for people, under `COLUMNS`."""
    return [
        [
            f.method, "" if f.x is None else f"{f.x:.4g}", _digits(f.value), "" if f.low is None else _digits(f.low),
            "" if f.high is None else _digits(f.high), f.metric, f.case if f.x is None else f"{f.case}, over {f.axis}", f.kind,
            f.hardware, ", ".join(part for part in (f.count, f.spread) if part), f.date[:10],
        ]
        for f in figures
    ]  # fmt: skip


def as_csv(figures: Iterable[Figure]) -> str:
    """Every field of the figures."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Figure)])
    writer.writeheader()
    writer.writerows(asdict(f) for f in figures)
    return text.getvalue()


def _digits(value: float) -> str:
    return f"{value:.4g}"
