"""What is printed at the end of a run: a line per row, bars and what ran short of them, and the entries of the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rows import Row

COLUMNS = ("part", "what", "ours", "beside", "value", "bar")
WIDTH = 74  # of a name; the file has it in full


STYLES = {"skipped": "dim", "failed": "red", "wrong": "red"}


def lines(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], str | None]]:
    """The cells of every row and their style; what passed the gate is one line."""
    found: list[tuple[tuple[str, ...], str | None]] = []
    passed = [row for row in rows if row.part == "gate" and row.status == "measured"]
    if passed:
        worst = max((row.figures.get("of_allowed", 0.0) for row in passed), default=0.0)
        found.append((("gate", f"{len(passed)} checks passed", "", "", f"{worst:.2f} of the error allowed", ""), None))
    for row in rows:
        if row.part != "gate" or row.status != "measured":
            found.append((_cells(row), "yellow" if row.missed else STYLES.get(row.status)))
    return found


def _cells(row: Row) -> tuple[str, ...]:
    what = row.name if len(row.name) <= WIDTH else f"{row.name[: WIDTH - 3]}..."
    if row.status != "measured":
        return (row.part, what, "", "", f"{row.status}: {str(row.reason)[:110]}", "")
    x = row.figures
    if row.part == "sweep":
        best = "none" if x["best"] is None else "x".join(map(str, x["best"]))
        gain = "" if x["gain"] is None else f"{x['gain']:.2f} x the table"
        return (row.part, what, best, seconds(x["fallback_seconds"]), gain, "")
    ours, beside = seconds(x.get("seconds")), seconds(x.get("dense_seconds"))
    bar = f"{x['bar']:.3g}{' !' if row.missed else ''}" if "bar" in x else ""
    value = number(x["value"]) + x["unit"] if x["value"] >= 1e9 else f"{number(x['value'])} {x['unit']}"
    if "estimated" in x:
        value += f" ({x['estimated']['value']:.2f} estimated for all layers)"
    return (row.part, what, ours, beside, value, bar)


def seconds(value: Any) -> str:
    """Milliseconds of a number, of a spread's median, or of the prefill among several phases."""
    if isinstance(value, dict):
        value = value.get("p50", value.get("prefill"))
    return "" if value is None else f"{1e3 * value:.4g} ms"


def number(value: float) -> str:
    """Three digits, with a prefix where it is large."""
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
