"""Charts that fit the page: drawn once wide and once narrow, as SVG whose colours are those of the theme, light or dark.

Style and fonts are those of `mmeff.evaluation.pictures`; text stays text, so that it scales and can be selected. The browser
shows the drawing that fits its width.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .results import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = 7.8, 3.9  # inches; text is of the same size in both
MOST_LINES, MOST_BARS = 8, 36
# What stands for each colour of the house style in the page, and the series on a dark ground, where they must be lighter.
THEME = {
    "#1c2128": "var(--mm-ink)", "#5a6472": "var(--mm-muted)", "#d9dee5": "var(--mm-rule)",
    "#ffffff": "var(--mm-card)",
}  # fmt: skip
DARK = {
    "#0072b2": "#4db2ec", "#d55e00": "#ff8a3d", "#009e73": "#2fc99c", "#cc79a7": "#e5a0c6", "#e69f00": "#f5b93a",
    "#56b4e9": "#8fd0f7", "#6b4fa3": "#a58de0", "#7a7a7a": "#a8a8a8",
}  # fmt: skip
STYLE = (
    "<style>.mm-chart{margin:0}.mm-chart svg{width:100%;height:auto;display:block}.mm-chart .mm-narrow{display:none}"
    "@media(max-width:640px){.mm-chart .mm-wide{display:none}.mm-chart .mm-narrow{display:block}}"
    ".mm-chart figcaption{margin-bottom:.6em}.mm-chart figcaption strong{display:block;font-size:1.05em}"
    ".mm-chart figcaption small{color:var(--mm-muted);font-size:.85em}"
    + ".mm-chart{" + "".join(f"--mm-{c[1:]}:{c};" for c in DARK) + "}"
    + ".dark .mm-chart{" + "".join(f"--mm-{c[1:]}:{lit};" for c, lit in DARK.items()) + "}</style>"
)  # fmt: skip


def figure(draw: Callable[[Axes, bool], None], *, height: float, label: str, title: str = "", caption: str = "") -> str:
    """A drawing as HTML.

    Args:
        draw: puts everything into the axes; told whether they are narrow. height: inches of the drawing.
        label: what it shows, for those who cannot see it. title: above it; caption: below the title, in small letters.
    """
    drawings = "".join(
        f'<div class="mm-{name}">{_svg(draw, width, height, label)}</div>'
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    )
    above = f"<strong>{html.escape(title)}</strong>" if title else ""
    above += f"<small>{html.escape(caption)}</small>" if caption else ""
    return f'{STYLE}<figure class="mm-chart"><figcaption>{above}</figcaption>{drawings}</figure>'


def _svg(draw: Callable[[Axes, bool], None], width: float, height: float, label: str) -> str:
    import matplotlib

    from mmeff.evaluation.pictures import chart

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), chart(width, height) as (drawing, axes):
        drawing.set_facecolor("none")
        axes.set_facecolor("none")
        draw(axes, width == NARROW)
        drawing.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', svg, count=1)
    svg = re.sub(r"('DejaVu Sans'|DejaVu Sans)(, sans-serif)?", "inherit", svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    for colour in DARK:
        svg = svg.replace(colour, f"var(--mm-{colour[1:]})")
    return svg


# ---------------------------------------------------------------- benchmark rows


def of_figures(figures: Sequence[Figure], *, heading: str) -> str:
    """The figures of one metric on one machine: curves where they have a place on an axis, bars where they have none.

    Losses are drawn like gains, on the other side of the line at which nothing is gained.
    """
    if not figures:
        return "<p>No rows fit this choice; take back a filter.</p>"
    first = figures[0]
    cases = list(dict.fromkeys(f.case for f in figures))
    about = [first.hardware, first.versions, first.kind, f"{first.better}er is better" if first.better else ""]
    about.append(next((f"error bars: {f.spread}" for f in figures if f.spread), ""))
    draw: Callable[[Axes, bool], None] = _Lines(figures)
    height = 4.2
    if len(cases) > 1 or len({f.x for f in figures if f.x is not None}) < 2:
        draw = _Bars(figures[:MOST_BARS], cases)
        height = 0.9 + 0.27 * len(draw.figures) + 0.3 * draw.groups
        about.append("orange: a loss" if any(f.loss for f in draw.figures) else "")
        if len(figures) > MOST_BARS:
            about.append(f"the first {MOST_BARS} of {len(figures)} are drawn, all are in the table")
    caption = "; ".join(part for part in about if part)
    caption = f"{cases[0]}. {caption}." if len(cases) == 1 else f"{caption}."
    return figure(draw, height=height, label=f"{heading}. {caption}", title=heading, caption=caption)


class _Lines:
    """A curve per method over the axis of its figures; those without a place on it are levels."""

    def __init__(self, figures: Sequence[Figure]) -> None:
        self.figures = figures

    def __call__(self, axes: Axes, narrow: bool) -> None:
        from mmeff.evaluation.pictures import COLOURS, INK, MARKERS, RULE

        curves = _by_method(self.figures)
        levels = [name for name, of in curves.items() if of[0].x is None or (name == "dense" and len(of) == 1)]
        for i, (name, points) in enumerate((n, of) for n, of in curves.items() if n not in levels):
            pale = i >= MOST_LINES
            axes.errorbar(
                [f.x or 0.0 for f in points], [f.value for f in points], yerr=_errors(points), label=None if pale else name,
                color=RULE if pale else COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=3 if pale else 5.5,
                linewidth=1.4 if pale else 1.7, elinewidth=1, capsize=2.5, zorder=2 if pale else 3,
            )  # fmt: skip
        for i, name in enumerate(levels):
            axes.axhline(curves[name][0].value, color=INK, linewidth=1.1, linestyle=(0, (5 - 3 * i, 3)), zorder=1, label=name)  # fmt: skip
        first = self.figures[0]
        if first.neutral is not None:
            axes.axhline(first.neutral, color=INK, linewidth=0.9, zorder=1)
        places = sorted(f.x for f in self.figures if f.x)
        if places[-1] > 7 * places[0] and "left out" not in next(f.axis for f in self.figures if f.axis):
            axes.set_xscale("log", base=2)
            _ticks(axes, places, 4 if narrow else 8)
        axes.set_xlabel(next(f.axis for f in self.figures if f.axis))
        axes.set_ylabel(first.metric)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        _legend(axes, narrow)


class _Bars:
    """A bar per method, under a heading per case where there are several."""

    def __init__(self, figures: Sequence[Figure], cases: Sequence[str]) -> None:
        self.figures = sorted(figures, key=lambda f: cases.index(f.case))
        self.groups = len({f.case for f in figures}) if len(cases) > 1 else 0

    def __call__(self, axes: Axes, narrow: bool) -> None:
        from mmeff.evaluation.pictures import COLOURS, INK, MUTED, RULE

        y, ticks, labels, case = 0.0, [], [], None
        start = self.figures[0].neutral or 0.0
        for f in self.figures:
            if self.groups and f.case != case:
                case = f.case
                y += 1.1
                heading = axes.annotate(
                    _cut(case, 62 if narrow else 125), (0.012, y - 0.95), xycoords=("figure fraction", "data"), fontsize=8,
                    color=MUTED, va="center", annotation_clip=False,
                )  # fmt: skip
                heading.set_in_layout(False)  # it may reach over the bars
            axes.barh(
                y, f.value - start, left=start, height=0.66, color=COLOURS[1] if f.loss else COLOURS[0],
                xerr=_errors([f]), error_kw={"elinewidth": 1, "capsize": 2.5, "ecolor": INK},
            )  # fmt: skip
            at = "" if f.x is None else f", {f.x:.3g} %" if f.axis.endswith("%") else f", {f.x:.4g}"
            labels.append(_cut(f.method, (18 if narrow else 44) - len(at)) + at)
            ticks.append(y)
            y += 1
        far = max(max(f.high or f.value, f.value, start) for f in self.figures)
        near = min(min(f.low or f.value, f.value, start) for f in self.figures)
        for place, f in zip(ticks, self.figures, strict=True):
            end = max(f.high or f.value, f.value, start)
            axes.text(end + 0.015 * (far - near), place, f"{f.value:.3g}", va="center", fontsize=8.5, color=INK)
        axes.set_yticks(ticks, labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(y - 0.4, -0.6)
        room = far - near
        axes.set_xlim(near - (0.03 * room if near < start else 0), far + (0.2 if narrow else 0.1) * room)
        axes.axvline(start, color=INK, linewidth=0.9)
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(self.figures[0].metric)


# ---------------------------------------------------------------- answers against tokens


def answers(figures: Sequence[Figure], *, method: str, tokens: float | None) -> str:
    """Exact match against visual tokens: the curve of one method before those of the others, dense as a level.

    Args: method: whose curve is coloured. tokens: the mean over layers of this run, marked.
    """

    def draw(axes: Axes, narrow: bool) -> None:
        from mmeff.evaluation.pictures import COLOURS, INK, RULE

        for name, points in _by_method(figures).items():
            x, y = [f.x or 0.0 for f in points], [f.value for f in points]
            style: dict[str, Any] = {"color": RULE, "marker": "o", "markersize": 2.5, "linewidth": 1.3, "zorder": 1}
            if name == "dense":
                axes.axhline(y[0], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1, label="dense")
                continue
            if name == method:
                style |= {"color": COLOURS[0], "markersize": 6, "linewidth": 2, "zorder": 4, "label": name}
                axes.errorbar(x, y, yerr=_errors(points), elinewidth=1, capsize=2.5, **style)
                continue
            if name == "random":
                style |= {
                    "color": COLOURS[1],
                    "marker": "s",
                    "markersize": 4,
                    "zorder": 3,
                    "label": "random tokens, the control",
                }
            axes.plot(x, y, **style)
        if tokens is not None:
            axes.axvline(tokens, color=COLOURS[2], linewidth=1.8, zorder=3, label=f"this run: {tokens:.4g} tokens")
        axes.set_xscale("log", base=2)
        _ticks(axes, [f.x for f in figures if f.x], 4 if narrow else 6)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_xlabel("visual tokens, mean over layers")
        axes.set_ylabel("exact match, %")
        _legend(axes, narrow)

    caption = (
        f"Measured before, on {figures[0].count} about generated scenes per point. Pale: the other methods. A tiny model ranks no "
        "method for a real one."
    )
    label = f"Exact match against visual tokens for {method}"
    return figure(draw, height=3.7, label=label, title="Accuracy against tokens", caption=caption)


# ---------------------------------------------------------------- parts


def _by_method(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """The figures of every method, along the axis."""
    found: dict[str, list[Figure]] = {}
    for f in figures:
        found.setdefault(f.method, []).append(f)
    return {name: sorted(of, key=lambda f: f.x or 0.0) for name, of in found.items()}


def _errors(figures: Sequence[Figure]) -> list[list[float]] | None:
    """Lengths of the error bars, (2, N), or None where no figure has any."""
    if not any(f.low is not None and f.high is not None for f in figures):
        return None
    low = [max(0.0, f.value - f.low) if f.low is not None else 0.0 for f in figures]
    high = [max(0.0, f.high - f.value) if f.high is not None else 0.0 for f in figures]
    return [low, high]


def _legend(axes: Axes, narrow: bool) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        columns = (1 if max(map(len, names)) > 22 else 2) if narrow else 4
        axes.figure.legend(handles, names, loc="outside lower left", ncols=min(len(names), columns), fontsize=8.5)


def _ticks(axes: Axes, places: Sequence[float], most: int) -> None:
    """Ticks of a logarithmic axis at the figures themselves, as far as they lie apart; the first and the last among them."""
    near: list[list[float]] = []
    for place in sorted(places):
        if near and place < 1.25 * near[-1][0]:
            near[-1].append(place)
        else:
            near.append([place])
    apart = [max(group, key=group.count) for group in near]
    if len(apart) > most:
        step = (len(apart) - 1) / (most - 1)
        apart = [apart[round(i * step)] for i in range(most)]
    axes.set_xticks(apart, [f"{x:,.3g}" if x < 1e3 else f"{x:,.0f}" for x in apart])
    axes.minorticks_off()


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip(" ,") + "…"
