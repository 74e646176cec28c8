"""The rows of `acting` as a table and a figure: success of every method, layer and fraction, against dense and FastV."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .acting import BATCH, DENSE, MODEL, Row, read, variants
from .results import Machine

CANNOT_TELL = """\
What this table cannot tell:

* It ranks no method for a real robot. This policy has 1.6 M parameters and sees one drawn picture of 144 tokens; it was trained
  to tolerate pictures of which tokens were dropped.
* VLA-Pruner looks at all tokens in the first three control steps of an episode, for its history; the mean counts that.
* Errors are over episodes, the same ones for every method; differences are paired by episode. One model, one seed."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One variant over its episodes. Figures are (mean, standard error); steps: of the successful episodes.

    against_dense, against_fastv: mean difference of success, episode by episode; FastV is that of the same layer and fraction.
    """

    model: str
    variant: str
    label: str
    layer: int | None
    keep: float | None
    setting: str
    episodes: int
    success: list[float]
    steps: float | None
    counts: dict[str, float]
    seconds: dict[str, float]
    against_dense: list[float] | None
    against_fastv: list[float] | None
    environment: dict[str, str]
    commit: str | None


def summarise(path: Path, machine: Machine) -> list[Summary]:
    """Figures of every variant that acted. Raises ValueError if none did."""
    which = variants()
    rows = read(path, which)
    won = {v.name: _won(rows[v.name]) for v in which}
    found = []
    for v in which:
        mine, of = won[v.name], list(rows[v.name].values())
        if not mine:
            continue
        steps = [t for row in of for t in row.taken if t is not None]
        twin = f"FastV, layer {v.layer}, {100 * (v.keep or 0):g}%"
        found.append(Summary(
            model=MODEL, variant=v.name, label=v.label, layer=v.layer, keep=v.keep, setting=v.setting, episodes=len(mine),
            success=_rate(list(mine.values())), steps=float(np.mean(steps)) if steps else None, counts=_mean(of, "counts"),
            seconds=_mean(of, "seconds"), against_dense=None if v.label == DENSE else _difference(mine, won[DENSE]),
            against_fastv=None if v.label in (DENSE, "FastV") else _difference(mine, won[twin]),
            environment=machine.environment, commit=machine.commit,
        ))  # fmt: skip
    if not found:
        raise ValueError(f"{path} holds no episodes; run `python -m benchmarks acting` first")
    return found


def _won(rows: Mapping[int, Row]) -> dict[int, int]:
    return {b * BATCH + i: int(taken is not None) for b, row in rows.items() for i, taken in enumerate(row.taken)}


def _rate(won: Sequence[int]) -> list[float]:
    """Rate, and its error by Agresti and Coull's estimate, which is not 0 at 0 % and 100 %."""
    rate = (sum(won) + 2) / (len(won) + 4)
    return [sum(won) / len(won), math.sqrt(rate * (1 - rate) / (len(won) + 4))]


def _difference(mine: Mapping[int, int], other: Mapping[int, int]) -> list[float] | None:
    x = np.array([mine[i] - other[i] for i in sorted(mine.keys() & other.keys())], dtype=np.float64)
    return None if len(x) < 2 else [float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))]


def _mean(rows: Sequence[Row], what: str) -> dict[str, float]:
    return {name: float(np.mean([getattr(row, what)[name] for row in rows])) for name in getattr(rows[0], what)}


def write_summary(summaries: Sequence[Summary], path: Path) -> None:
    """Replace the file: its rows are derived from the episodes, which stay."""
    path.write_text("".join(json.dumps(asdict(s), ensure_ascii=False, allow_nan=False) + "\n" for s in summaries))


def markdown(summaries: Sequence[Summary]) -> str:
    """The table, and what it cannot tell."""
    columns = (
        "method", "before layer", "kept", "episodes", "success, %", "against dense", "against FastV", "steps",
        "tokens, mean over layers and steps",
    )  # fmt: skip
    lines = [
        "Success in percent with standard errors; differences are paired by episode.\n",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for s in summaries:
        cells = (
            s.label, "" if s.layer is None else str(s.layer), "" if s.keep is None else f"{100 * s.keep:g} %", str(s.episodes),
            _cell(s.success), _cell(s.against_dense, "+"), _cell(s.against_fastv, "+"),
            "" if s.steps is None else f"{s.steps:.1f}", f"{s.counts['mean']:.1f}" if s.counts else "144",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", CANNOT_TELL])


def _cell(figure: Sequence[float] | None, sign: str = "") -> str:
    return "" if figure is None else f"{100 * figure[0]:{sign}.1f} ± {100 * figure[1]:.1f}"
