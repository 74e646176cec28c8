"""The table and the figure of `digits`: what every family learnt, and the loss curves of its two paths on top of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mmeff.evaluation.pictures import COLOURS, RULE

from .digits import BAR, FAMILIES, KERNEL, REFERENCE, Row, variant
from .plots import AUTO, DPI, _figure, _heading, _title

EARLY = 25  # steps in which the curves of two paths are compared: before rounding has grown


def pairs(rows: Mapping[str, Row]) -> Iterator[tuple[str, Row | None, Row | None]]:
    """Name, kernel row and reference row of every family that has any."""
    for family in FAMILIES:
        ours, theirs = (rows.get(variant(family, path)) for path in (KERNEL, REFERENCE))
        if ours or theirs:
            yield family.name, ours, theirs


UNSEEN = "< 1e-4"  # losses are kept to four decimals


def apart(ours: Row, theirs: Row, steps: int = EARLY) -> float:
    """The largest relative difference of two runs' losses in the first steps."""
    both = list(zip(ours.losses, theirs.losses, strict=True))[:steps]
    return max(abs(a - b) / b for a, b in both)


def markdown(rows: Mapping[str, Row]) -> str:
    """A row per family. Raises: ValueError without rows."""
    if not rows:
        raise ValueError("digits: the file holds no row of the present settings; run `python -m benchmarks digits`.")
    lines = [
        "| family | parameters | held out, kernels | held out, reference | seconds, kernels | seconds, reference | "
        f"first {EARLY} losses apart by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, ours, theirs in pairs(rows):
        parameters = f"{(ours or theirs).parameters / 1e6:.2f} M"  # type: ignore[union-attr]
        difference = (f"{apart(ours, theirs):.1e}" if apart(ours, theirs) else UNSEEN) if ours and theirs else ""
        cells = (name, parameters, _accuracy(ours), _accuracy(theirs), _seconds(ours), _seconds(theirs), difference)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.accuracy:.1%} ± {100 * row.error:.1f}" + ("" if row.accuracy >= BAR else " !")


def _seconds(row: Row | None) -> str:
    return "" if row is None else f"{row.seconds:.0f}"


def draw(rows: Mapping[str, Row], path: Path) -> None:
    """A panel per family: the loss of every step, of the reference wide and pale, of the kernels on top of it."""
    found = list(pairs(rows))
    columns = 4
    lines = -(-len(found) // columns)
    with _figure(12.0, 1.1 + 2.6 * lines) as figure:
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten().tolist()
        for (name, ours, theirs), ax in zip(found, axes, strict=False):
            if theirs:
                ax.plot(theirs.losses, color=AUTO, linewidth=4, label="reference", solid_capstyle="round")
            if ours:
                ax.plot(ours.losses, color=COLOURS[0], linewidth=1, label="kernels")
            said = [f"{label} {_accuracy(row)}" for label, row in (("kernels", ours), ("reference", theirs)) if row]
            _title(ax, name, ", ".join(said))
            ax.set_yscale("log")
            ax.set_yticks([0.6, 1, 2], ["0.6", "1", "2"])
            ax.minorticks_off()
            ax.grid(axis="y", color=RULE, linewidth=0.8)
        for ax in axes[len(found) :]:
            ax.set_visible(False)
        for ax in axes[: len(found)]:
            ax.set_xlabel("step")
        for row in range(lines):
            axes[row * columns].set_ylabel("loss of a batch")
        seen = {line.get_label(): line for ax in axes for line in ax.get_legend_handles_labels()[0]}
        figure.legend(list(seen.values()), [str(x) for x in seen], loc="outside lower left", ncols=2, fontsize=9)
        first = next(iter(rows.values()))
        torch = first.environment.get("torch", "")
        _heading(
            figure, "Handwritten digits, learnt from nothing",
            f"{first.hardware}, torch {torch}; held-out accuracy with its standard error. Tiny models: no family is ranked.",
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
