"""The rows of `backbones` as tables, one per size, and a figure: how long a model takes, relative to swin_tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmeff.evaluation.pictures import COLOURS, INK, PAPER, RULE

from . import plots
from .backbones import ANCHORS, PLAIN, Row, Side, names

COLUMNS = (
    "model", "parameters, M", "ms", "images/s", "memory, MiB", "Swin's time over ours", "ConvNeXt's", "its plain form's",
)  # fmt: skip
CANNOT_TELL = """\
What these tables cannot tell: how good a model is (weights are random); anything about a GPU; training. A ratio is the median of
paired rounds, with the 20th and the 80th percentile; above 1 the model of the row is faster. Swin and ConvNeXt are those of timm
with the nearest number of parameters, Swin with windows of 7 at every size. Large models have one or two rounds. An exclamation mark says that a bar is missed."""


def by_size(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows under a heading per size, batch and machine; in it by family, as the full suite has them."""
    order = {name: place for place, name in enumerate(names())}
    found: dict[str, list[Row]] = {}
    for row in rows:
        batch = "" if row.batch == 1 else f", {row.batch} at once"
        found.setdefault(f"{row.height} x {row.width}{batch}; {row.hardware}", []).append(row)
    for of_size in found.values():
        of_size.sort(key=lambda row: order.get(row.model, len(order)))
    return found


def cells(row: Row) -> list[str]:
    """One row for people. A tilde stands where others used the processor."""
    if row.ours is None:
        return [row.model, *[""] * (len(COLUMNS) - 2), f"cannot run: {row.reason}".replace("|", "/")]
    seconds = row.ours.seconds
    start = [
        row.model,
        f"{row.ours.parameters / 1e6:.1f}",
        ("~" if row.disturbed else "") + _with_range({p: 1e3 * x for p, x in seconds.items()}, ".0f"),
        f"{row.batch / seconds['p50']:.2f}",
        "" if row.ours.memory is None else f"{row.ours.memory / 2**20:.0f}",
    ]
    return start + [_ratio(row, row.peer(name)) for name in (*ANCHORS, PLAIN)]


def _with_range(values: dict[str, float], form: str) -> str:
    """A median with its percentiles, of which a single round has none."""
    middle, low, high = (format(values[p], form) for p in ("p50", "p20", "p80"))
    return middle if values["p20"] == values["p80"] else f"{middle} ({low} to {high})"


def _ratio(row: Row, peer: Side | None) -> str:
    if peer is None or peer.ratio is None:
        return ""
    bar = row.missed(peer)
    text = _with_range(peer.ratio, ".2f")
    return text if bar is None else f"{text} ! below {bar:.2f}"


def markdown(rows: Sequence[Row]) -> str:
    """The tables, and what they cannot tell. Raises ValueError if there are no rows."""
    if not rows:
        raise ValueError("there are no rows of backbones; run `python -m benchmarks backbones` first")
    lines = []
    for heading, of_size in by_size(rows).items():
        lines += [f"**{heading}**", "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(cells(row))} |" for row in of_size] + [""]
    if any(row.disturbed for row in rows):
        lines += ["A tilde: others used the processor meanwhile, so trust the ratios rather than the times.", ""]
    return "\n".join([*lines, CANNOT_TELL])


# ---------------------------------------------------------------- the figure


def relative(rows: Sequence[Row]) -> list[tuple[Row, float, float, float]]:
    """Time over that of swin_tiny, and its 20th and 80th percentile, for rows of one size, batch and machine.

    Paired within rounds for models whose peer is swin_tiny; larger ones over the Swin of their class, and that one over
    swin_tiny. Models for whose class the latter is not measured are left out.
    """
    links = {"swin_tiny": 1.0}
    for row in rows:
        peer = row.peer("swin")
        if row.model.startswith("swin_") and peer is not None and peer.ratio is not None:
            links[row.model] = 1 / peer.ratio["p50"]
    found = []
    for row in rows:
        peer = row.peer("swin")
        if row.model == "swin_tiny" or row.ours is None or peer is None or peer.ratio is None or peer.name not in links:
            continue
        link = links[peer.name]
        low, middle, high = (link / peer.ratio[p] for p in ("p80", "p50", "p20"))
        found.append((row, middle, low, high))
    return found


def draw(rows: Sequence[Row], path: Path, side: int = 512) -> None:
    """Draw the time of every model of the latest machine at side x side pixels, relative to swin_tiny.

    Raises: ValueError if the rows hold none.
    """
    square = [r for r in rows if (r.height, r.width) == (side, side) and r.ours is not None]
    square = [r for r in square if (r.hardware, r.batch) == (square[-1].hardware, square[-1].batch)]
    found = relative(square)
    if not found:
        raise ValueError(
            f"no model was measured at {side} x {side}; run `python -m benchmarks backbones --size {side}`"
        )
    families = list(dict.fromkeys(row.model.partition("_")[0] for row, *_ in found))
    ordered = sorted(found, key=lambda f: (families.index(f[0].model.partition("_")[0]), f[1]))[::-1]
    with plots._figure(8.5, 1.5 + 0.24 * len(ordered)) as figure:
        ax = figure.subplots()
        ax.axvline(1, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
        for y, (row, middle, low, high) in enumerate(ordered):
            colour = COLOURS[families.index(row.model.partition("_")[0]) % len(COLOURS)]
            # a single round is its own spread, but for rounding
            ax.errorbar(
                middle, y, xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]], color=colour, marker="o", markersize=6.5, elinewidth=1,
                capsize=2.5, markeredgecolor=PAPER, markeredgewidth=0.6, zorder=3,
            )  # fmt: skip
            plain = row.peer(PLAIN)
            if plain is not None and plain.ratio is not None:
                ax.plot(
                    middle * plain.ratio["p50"], y, marker="o", markersize=6, fillstyle="none", color=colour, zorder=2
                )
        ax.set_xscale("log", base=2)
        plots._plain_ticks(ax.xaxis)
        ax.set_yticks(range(len(ordered)), [row.model for row, *_ in ordered])
        ax.set_ylim(-0.7, len(ordered) - 0.3)
        ax.grid(axis="x", color=RULE, linewidth=0.8)
        ax.set_xlabel("time relative to swin_tiny; hollow: the plain form of the same model")
        first = ordered[0][0]
        versions = ", ".join(
            f"{n} {first.environment[n]}" for n in ("torch", "timm", "mmeff") if n in first.environment
        )
        batch = "one picture" if first.batch == 1 else f"{first.batch} pictures"
        plots._heading(
            figure,
            f"Time of {batch} of {side} x {side} pixels",
            f"{first.hardware}; {versions}; paired medians, p20 to p80",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=plots.DPI)
