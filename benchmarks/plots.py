"""Figures of a results file: speedup against sparsity, a panel per dtype and block size, and one figure of all the rest;
one of quality against density, one of time against the length of a video, and one of answers against visual tokens.

A point of speed is a median of paired ratios, with a bar from the 20th to the 80th percentile. Losses are drawn like gains.
A point of quality is a mean over prompts, with its standard error.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmeff.evaluation.pictures import COLOURS, INK, MARKERS, MUTED, PAPER, RULE

from .results import Row, latest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .acting_table import Summary as Acted
    from .pruning_table import Summary as Pruned
    from .quality_table import Summary
    from .video import Line

# Backends keep their colour and marker in every figure. "auto" is drawn wide and pale: it lies on top of another.
LOOKS = {
    name: (COLOURS[i], MARKERS[i]) for i, name in enumerate(("native", "gather", "sdpa", "triton", "tiles", "grouped"))
}
AUTO = "#b8c0cb"
DPI = 160
HEAD = 0.6  # inches above the panels, for the two lines of _head
MOST_PANELS = 3  # side by side


def draw(rows: list[Row], folder: Path, stem: str) -> list[Path]:
    """Draw what the rows hold, and return the files written: PNG, in `folder`, named after `stem`.

    Raises: ValueError if no row is measured.
    """
    measured = [r for r in latest(rows) if r.status == "measured"]
    if not measured:
        raise ValueError("plot: the file holds no measured row; run `python -m benchmarks kernels` first.")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    machines = sorted({r.hardware for r in measured})
    for hardware in machines:
        of_machine = [r for r in measured if r.hardware == hardware]
        name = stem if len(machines) == 1 else f"{stem}-{_slug(hardware)}"
        curves = [r for r in of_machine if _is_on_a_curve(r)]
        for peer, direction in sorted({(r.peer, r.direction) for r in curves}):
            path = folder / f"{name}-{_slug(peer)}-{_slug(direction)}.png"
            _sparsity([r for r in curves if (r.peer, r.direction) == (peer, direction)], path)
            written.append(path)
        others = [r for r in of_machine if not _is_on_a_curve(r)]
        if others:
            path = folder / f"{name}-operators.png"
            _operators(others, path)
            written.append(path)
    return written


def _is_on_a_curve(row: Row) -> bool:
    return row.operator == "block_sparse_attention" and row.what.startswith("random")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---------------------------------------------------------------- speedup against sparsity


def _sparsity(rows: list[Row], path: Path) -> None:
    """One panel per shape, dtype and block size; one line per backend."""
    panels = sorted({_panel(r) for r in rows})
    columns = min(len(panels), MOST_PANELS)
    lines = -(-len(panels) // columns)
    top = max(r.ratio["p80"] for r in rows if r.ratio)
    bottom = min(r.ratio["p20"] for r in rows if r.ratio)
    with _figure(1.2 + 3.7 * columns, 1.1 + 3.3 * lines) as figure:
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten().tolist()
        for panel, ax in zip(panels, axes, strict=False):
            _curves(ax, [r for r in rows if _panel(r) == panel])
            ax.set_ylim(min(0.5, bottom / 1.3), max(2.2, top * 1.4))
            shape, dtype, block = panel
            _title(ax, f"{dtype}, {block}-token blocks", shape)
            ax.set_xlabel("blocks left out (%)")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        for row in range(lines):
            axes[row * columns].set_ylabel(f"speedup over {_peer(rows[0])}")
        seen = {line.get_label(): line for ax in axes for line in ax.get_legend_handles_labels()[0]}
        figure.legend(
            list(seen.values()), [str(x) for x in seen], loc="outside lower left", ncols=len(seen), fontsize=9
        )
        _head(figure, f"Block-sparse attention, {rows[0].direction}", rows[0])
        figure.savefig(path, dpi=DPI)


def _panel(row: Row) -> tuple[str, str, int]:
    s = row.shape
    heads = f"H {s['H']}" + (f"/{s['Hk']}" if s["Hk"] != s["H"] else "")
    return f"B {s['B']}, N {s['N']}, {heads}, D {s['D']}", row.dtype, row.block or 0


def _curves(ax: Axes, rows: list[Row]) -> None:
    ax.set_yscale("log", base=2)
    ax.axhline(1, color=INK, linewidth=0.9, zorder=1)
    sparsities = sorted({_sparsity_of(r) for r in rows})
    grid = [i / 2 for i in range(2 * min(round(max(sparsities, default=0)), 98) + 1)]
    ax.plot(
        grid,
        [100 / (100 - x) for x in grid],
        "--",
        color=MUTED,
        linewidth=1,
        label="in proportion to the work",
        zorder=1,
    )
    for i, backend in enumerate(sorted({r.backend for r in rows}, key=lambda name: (name != "auto", name))):
        points = sorted((_sparsity_of(r), r.ratio) for r in rows if r.backend == backend and r.ratio)
        x, y = [p[0] for p in points], [p[1]["p50"] for p in points]
        bars = [[p[1]["p50"] - p[1]["p20"] for p in points], [p[1]["p80"] - p[1]["p50"] for p in points]]
        colour, marker = LOOKS.get(backend, (COLOURS[-1 - i % 2], MARKERS[-1]))
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6, "zorder": 3}
        if backend == "auto":
            style = {"color": AUTO, "marker": "o", "markersize": 11, "linewidth": 7, "zorder": 2}
        ax.plot(x, y, label=backend, solid_capstyle="round", **style)
        if backend != "auto":
            ax.errorbar(x, y, bars, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5, zorder=3)
            for a, b in zip(x, y, strict=True):
                ax.annotate(
                    f"{b:.3g}", (a, b), (0, 7), textcoords="offset points", ha="center", fontsize=7.5, color=colour
                )
    ax.set_xticks(sparsities, [f"{x:.3g}" for x in sparsities])
    ax.set_xlim(min(sparsities) - 7, max(sparsities) + 7)
    _plain_ticks(ax.yaxis)
    ax.grid(axis="y", color=RULE, linewidth=0.8)


def _sparsity_of(row: Row) -> float:
    """Percent of the blocks that are left out."""
    return round(100 * (1 - (row.block_density or 0.0)), 1)


# ---------------------------------------------------------------- all other operators


def _operators(rows: list[Row], path: Path) -> None:
    """One line per case, backend and peer, grouped by operator."""
    rows = sorted(rows, key=lambda r: (r.operator, r.what, r.dtype, r.direction, r.peer, r.backend))
    peers = sorted({r.peer for r in rows})
    with _figure(10.5, 1.7 + 0.46 * len(rows)) as figure:
        ax = figure.subplots()
        ax.set_xscale("log", base=2)
        ax.axvline(1, color=INK, linewidth=0.9)
        labels = []
        for y, row in enumerate(rows):
            assert row.ratio is not None
            ratio, colour = row.ratio, COLOURS[peers.index(row.peer) % len(COLOURS)]
            ax.plot([1, ratio["p50"]], [y, y], color=colour, linewidth=1.4, alpha=0.45, zorder=2)
            bars = [[ratio["p50"] - ratio["p20"]], [ratio["p80"] - ratio["p50"]]]
            marker = MARKERS[peers.index(row.peer) % len(MARKERS)]
            ax.errorbar(ratio["p50"], y, xerr=bars, fmt=marker, color=colour, markersize=6, capsize=2.5, zorder=3,
                        label=_peer(row))  # fmt: skip
            above = ratio["p50"] >= 1
            ax.annotate(f"{ratio['p50']:.3g}", (ratio["p80"] if above else ratio["p20"], y), (7 if above else -7, 0),
                        textcoords="offset points", ha="left" if above else "right", va="center", fontsize=8.5, color=INK)  # fmt: skip
            ran = row.backend if row.ran in (None, row.backend) else f"{row.backend}: {row.ran}"
            labels.append(
                f"{row.operator.replace('_', ' ')}, {row.dtype}, {row.direction} ({ran})\n{row.what}; {_panel(row)[0]}"
            )
        ax.set_yticks(range(len(rows)), labels, fontsize=7.5)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        values = [v for r in rows if r.ratio for v in r.ratio.values()]
        ax.set_xlim(min(0.5, min(values) / 1.5), max(2.2, max(values) * 1.7))
        _plain_ticks(ax.xaxis)
        ax.grid(axis="x", color=RULE, linewidth=0.8)
        ax.set_xlabel("speedup: the peer's time over ours")
        seen = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(list(seen.values()), list(seen), loc="outside lower left", ncols=len(seen), fontsize=9)
        _head(figure, "Other operators", rows[0])
        figure.savefig(path, dpi=DPI)


# ---------------------------------------------------------------- quality against density


_PANELS = (
    ("all", "everything right", "share of the clips, by the detector"),
    ("shape", "right shape", "share of the clips, by the detector"),
    ("drift", "background drift", "shift of the flat colour, of 1"),
    ("corrected", "background-corrected PSNR", "dB, to dense with the same noise"),
    ("psnr", "PSNR", "dB, to dense with the same noise"),
    ("ssim", "SSIM", "to dense with the same noise"),
)


def quality(summaries: list[Summary], path: Path) -> None:
    """Draw every figure against density: a line per method, dashed and hollow where it is rectified.

    Raises: ValueError without a variant that has a density.
    """
    sparse = [s for s in summaries if s.density is not None]
    if not sparse:
        raise ValueError("quality: no sparse variant was measured; run `python -m benchmarks quality` without --only")
    families = list(dict.fromkeys(s.family for s in sparse))
    with _figure(12.0, 8.2) as figure:
        for ax, (name, title, unit) in zip(figure.subplots(2, 3).flatten().tolist(), _PANELS, strict=True):
            for s in summaries:
                if s.density is None:
                    _level(ax, s, name)
            for i, family in enumerate(families):
                for rectified in (False, True):
                    line = [s for s in sparse if s.family == family and (s.twin is not None) == rectified]
                    _line(ax, line, name, f"{family}, rectified" if rectified else family, i)
            _title(ax, title, unit)
            ax.set_xlabel("density where the method acts")
            ax.grid(axis="y", color=RULE, linewidth=0.8)
        found = [ax.get_legend_handles_labels() for ax in figure.axes]
        seen = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
        figure.legend(list(seen.values()), list(seen), loc="outside lower left", ncols=6, fontsize=9)
        prompts = sorted({s.prompts for s in summaries})
        count = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
        subtitle = (
            f"{count} prompts per point, bars are standard errors. A tiny model: it ranks no method for a real one."
        )
        _heading(figure, "Quality against density on the tiny video model", subtitle)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


def _level(ax: Axes, summary: Summary, name: str) -> None:
    """Dense, and its floor from other noise: a horizontal line with its standard error as a band."""
    value = summary.figures[name]
    if value is None:
        return
    dashes: Any = "-" if summary.variant == "dense" else (0, (2, 2))
    ax.axhline(value[0], color=INK, linewidth=1.1, linestyle=dashes, label=summary.variant, zorder=1)
    ax.axhspan(value[0] - value[1], value[0] + value[1], color=INK, alpha=0.08, linewidth=0, zorder=0)


def _line(ax: Axes, summaries: list[Summary], name: str, label: str, i: int) -> None:
    points = sorted((s.density, *value) for s in summaries if s.density is not None and (value := s.figures[name]))
    if not points:
        return
    x, y, errors = zip(*points, strict=True)
    hollow = label.endswith("rectified")
    ax.errorbar(
        x, y, errors, label=label, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5.5,
        linewidth=1.5, linestyle="--" if hollow else "-", markerfacecolor=PAPER if hollow else None, elinewidth=1, capsize=2.5,
        zorder=3,
    )  # fmt: skip


# ---------------------------------------------------------------- time against the length of a video


def scaling(lines: list[Line], fits: list[Line], path: Path) -> Path:
    """Draw the time of attention against the tokens, and Radial's against the blocks it computes; return `path`.

    Args: lines and fits: those of the kinds "scaling" and "fit" that `video` wrote, on one machine at one size of frame.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    exponents = {fit.method: fit.figures["exponent"] for fit in fits}
    blocks: list[int] = []
    with _figure(10.5, 4.7) as figure:
        left, right = figure.subplots(1, 2)
        for i, (name, exponent) in enumerate(exponents.items()):
            points = sorted((x.figures["tokens"], x.figures) for x in lines if x.method == name)
            style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 6, "linewidth": 1.6}
            tokens, seconds = [n for n, _ in points], [statistics.median(x["seconds"]) for _, x in points]
            left.plot(tokens, seconds, label=f"{name}, exponent {exponent:.2f}", **style)
            if name == "radial":
                blocks = [x["blocks"] for _, x in points]
                middle = statistics.median(s / b for s, b in zip(seconds, blocks, strict=True))
                right.plot(blocks, [b * middle for b in blocks], "--", color=MUTED, label="in proportion to the blocks")
                right.plot(blocks, seconds, label=name, **style)
        for ax, what in ((left, "tokens of the video"), (right, "blocks that Radial computes, of both heads")):
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlabel(what)
            ax.set_ylabel("seconds per call")
            ax.grid(color=RULE, linewidth=0.8)
            ax.legend(fontsize=9)
            ax.yaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
        lengths = {x.figures["tokens"]: x.figures["frames"] for x in lines}
        left.set_xticks(list(lengths), [f"{n:,}\n{F} frames" for n, F in lengths.items()])
        right.set_xticks(blocks, [f"{b:,}" for b in blocks])
        (H, W), heads, dim = lines[0].sizes["frame"], lines[0].sizes["heads"], lines[0].sizes["head_dim"]
        _head(
            figure, f"Attention of a video of {H} x {W} tokens per frame, {heads} heads x {dim}, float32", lines[0],
            how="medians over the rounds",
        )  # fmt: skip
        figure.savefig(path, dpi=DPI)
    return path


# ---------------------------------------------------------------- answers against visual tokens


def pruning(summaries: list[Pruned], path: Path) -> None:
    """Draw exact match against the mean of visual tokens over layers: a panel per group of methods, the others pale behind.

    Raises: ValueError without a method that was measured.
    """
    from .pruning_table import GROUPS

    ran = [s for s in summaries if s.accuracy is not None and s.budget is not None]
    if not ran:
        raise ValueError("pruning: no method was measured; run `python -m benchmarks pruning` without --only")
    dense = next((s for s in summaries if s.budget is None and s.accuracy is not None), None)
    curves = {
        label: sorted((s for s in ran if s.label == label), key=_budget)
        for label in dict.fromkeys(s.label for s in ran)
    }
    groups = [g for g in GROUPS if any(s.group == g for s in ran)]
    budgets = sorted({_budget(s) for s in ran})
    with _figure(11.0, 4.1 * -(-len(groups) // 2) + 0.6) as figure:
        axes = figure.subplots(-(-len(groups) // 2), 2, squeeze=False, sharex=True, sharey=True).flatten().tolist()
        for ax, group in zip(axes, groups, strict=False):
            ax.set_xscale("log", base=2)
            if dense is not None and dense.accuracy is not None:
                mean, error = dense.accuracy
                ax.axhline(mean, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
                ax.axhspan(mean - error, mean + error, color=INK, alpha=0.08, linewidth=0, zorder=0)
                ax.annotate("dense", (0, mean), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                            fontsize=8, color=INK)  # fmt: skip
            mine = [label for label, line in curves.items() if line[0].group == group]
            for label, line in curves.items():
                if label not in mine:
                    ax.plot([_budget(s) for s in line], [s.accuracy[0] for s in line if s.accuracy], color=RULE, linewidth=1.4,
                            marker="o", markersize=2.5, zorder=1)  # fmt: skip
            for i, label in enumerate(mine):
                points = [
                    (_budget(s) * (1 + 0.03 * (i - (len(mine) - 1) / 2)), *s.accuracy)
                    for s in curves[label]
                    if s.accuracy
                ]
                x, y, bars = zip(*points, strict=True)
                ax.errorbar(
                    x, y, bars, label=label, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=6,
                    linewidth=1.7, elinewidth=1, capsize=2.5, markeredgecolor=PAPER, markeredgewidth=0.6, zorder=3,
                )  # fmt: skip
            ax.set_title(group, loc="left", fontsize=10.5, fontweight="bold", color=INK)
            ax.legend(loc="best", fontsize=8.5, frameon=True, facecolor=PAPER, edgecolor="none", framealpha=0.85)
            ax.set_xticks(budgets, [f"{100 * b:g}%" for b in budgets])
            ax.minorticks_off()
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("visual tokens, mean over layers")
            ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
            ax.grid(axis="y", color=RULE, linewidth=0.8)
        for ax in axes[len(groups) :]:
            ax.set_visible(False)
        for ax in axes[::2]:
            ax.set_ylabel("exact match")
        counts = sorted({s.questions for s in ran})
        count = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        subtitle = f"{count} questions per point, bars are standard errors; pale lines are the other panels'. It ranks no method for a real model."
        _heading(figure, f"Answers against visual tokens on {ran[0].model}", subtitle)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


def acting(summaries: list[Acted], path: Path) -> None:
    """Draw success against the fraction of visual tokens kept: a panel per layer that methods prune before."""
    ran = [s for s in summaries if s.layer is not None]
    if not ran:
        raise ValueError("acting: no method was measured; run `python -m benchmarks acting` without --only")
    dense = next((s for s in summaries if s.layer is None), None)
    layers = sorted({s.layer or 0 for s in ran}, reverse=True)
    labels = list(dict.fromkeys(s.label for s in ran))
    with _figure(11.0, 4.3) as figure:
        axes = figure.subplots(1, len(layers), squeeze=False, sharex=True, sharey=True).flatten().tolist()
        for ax, layer in zip(axes, layers, strict=True):
            ax.set_xscale("log", base=2)
            if dense is not None:
                mean, error = dense.success
                ax.axhline(mean, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
                ax.axhspan(mean - error, mean + error, color=INK, alpha=0.08, linewidth=0, zorder=0)
            for i, label in enumerate(labels):
                line = sorted((s.keep or 0.0, *s.success) for s in ran if (s.layer, s.label) == (layer, label))
                if not line:
                    continue
                x, y, bars = zip(*line, strict=True)
                ax.errorbar(x, y, bars, label=label, color=COLOURS[i], marker=MARKERS[i], markersize=6, linewidth=1.7,
                            elinewidth=1, capsize=2.5, markeredgecolor=PAPER, markeredgewidth=0.6, zorder=3)  # fmt: skip
            ax.set_title(f"pruned before layer {layer} of 6", loc="left", fontsize=10.5, fontweight="bold", color=INK)
            keeps = sorted({s.keep or 0.0 for s in ran})
            ax.set_xticks(keeps, [f"{100 * k:g}%" for k in keeps])
            ax.minorticks_off()
            ax.set_xlabel("visual tokens kept from there on")
            ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
            ax.grid(axis="y", color=RULE, linewidth=0.8)
        axes[0].set_ylabel("episodes that succeed")
        axes[0].legend(
            loc="lower right", fontsize=8.5, frameon=True, facecolor=PAPER, edgecolor="none", framealpha=0.85
        )
        counts = sorted({s.episodes for s in ran})
        subtitle = f"{counts[0]} episodes per point, bars are standard errors, the dashed line is dense. It ranks no method for a real robot."
        _heading(figure, f"Success in closed loop against visual tokens on {ran[0].model}", subtitle)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


def _budget(summary: Pruned) -> float:
    return summary.budget or 0.0


# ---------------------------------------------------------------- style


def _peer(row: Row) -> str:
    names = {"sdpa": "dense attention (SDPA)", "cudnn": "dense attention (cuDNN)", "flash": "dense attention (flash)"}
    return names.get(row.peer, f"{row.peer} at the same layout")


def _head(
    figure: Figure, title: str, row: Row | Line, how: str = "medians, bars from the 20th to the 80th percentile"
) -> None:
    versions = ", ".join(
        f"{name} {row.environment[name]}" for name in ("torch", "triton", "mmeff") if name in row.environment
    )
    _heading(figure, title, f"{row.hardware}; {versions}; {how}")


def _heading(figure: Figure, title: str, subtitle: str) -> None:
    height = figure.get_figheight()
    figure.text(
        0.12 / figure.get_figwidth(), 1 - 0.1 / height, title, fontsize=12.5, fontweight="bold", color=INK, va="top"
    )
    figure.text(0.12 / figure.get_figwidth(), 1 - 0.38 / height, subtitle, fontsize=8.5, color=MUTED, va="top")


def _title(ax: Axes, title: str, subtitle: str) -> None:
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=20)
    ax.annotate(subtitle, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=MUTED)


def _plain_ticks(axis: Any) -> None:
    """Powers of two as plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure in the house style; no pyplot, which would keep it alive and pick a backend for the user."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: Any = {
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK,
        "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.facecolor": PAPER, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "legend.frameon": False, "figure.facecolor": PAPER,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, rect=(0, 0, 1, 1 - HEAD / height))
        figure = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(figure)
        yield figure
