"""The report of a run: a page with tables and plots, and the same figures as CSV or Parquet.

Everything is read from the folder of the run, so a report can be made while the run goes on, on another machine, or again.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from mmeff.errors import BackendUnavailable
from mmeff.evaluation.evaluate import Run, duration
from mmeff.evaluation.measures import measure
from mmeff.evaluation.page import Figure, Listing, Section, Table, Videos, write_page
from mmeff.evaluation.pictures import COLOURS, INK, MARKERS, MUTED, RULE, as_picture, chart, titles
from mmeff.evaluation.rows import DONE, RESULT
from mmeff.evaluation.scores import Scores, score
from mmeff.report import environment
from mmeff.video_io import replacing

SHOWN_FAILURES = 200
SHOWN_CATEGORIES = 40
SHOWN_VIDEOS = 4


def write_report(
    run: Run, *, out: str | os.PathLike[str] | None = None, parquet: bool = False,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Scores, list[Path]]:  # fmt: skip
    """Score a run and write report.html, scores.csv, units.csv and scores.json.

    Args:
        run: of `evaluate` or `look`. out: a folder that exists; the run's own by default.
        parquet: units.parquet too. tick: called while videos are measured.
    Returns: the scores, and the files.
    Raises: BackendUnavailable: Parquet without pyarrow. ValueError: nothing was recorded yet. OSError: `out` cannot be written to.
    """
    if parquet:
        _pyarrow()
    if not run.merged.rows:
        raise ValueError(f"{run.folder} has no results yet; run `mmeff eval` into it first")
    folder = run.folder if out is None else Path(out)
    measured, notes = measure(run, tick=tick)
    scores = score(run, measures=measured)
    notes = [*scores.notes, *notes]
    files = [
        _write(folder / "scores.csv", _csv(*score_table(scores))),
        _write(folder / "units.csv", _csv(*unit_table(run, scores))),
        _write(
            folder / "scores.json",
            json.dumps({**scores.to_dict(), "notes": notes}, indent=1, allow_nan=False, default=str),
        ),
    ]
    if parquet:
        files.append(_parquet(folder / "units.parquet", *unit_table(run, scores)))
    files.append(_page(run, scores, notes, folder / "report.html"))
    return scores, files


# ---------------------------------------------------------------- tables


def score_table(scores: Scores) -> tuple[list[str], list[list[Any]]]:
    """One row per variant and metric: columns and rows, numbers as they are."""
    columns = [
        "variant",
        "category",
        "metric",
        "mean",
        "low",
        "high",
        "units",
        "difference",
        "difference low",
        "difference high",
        "p",
    ]
    rows: list[list[Any]] = []
    for v in scores.variants:
        for metric, e in v.metrics.items():
            d = v.against.get(metric)
            rows.append(
                [
                    v.name,
                    "",
                    metric,
                    e.mean,
                    e.low,
                    e.high,
                    e.count,
                    *([d.mean, d.low, d.high, d.p] if d else [None] * 4),
                ]
            )
        for category, e in v.categories.items():
            rows.append([v.name, category, scores.main, e.mean, e.low, e.high, e.count, *[None] * 4])
        if v.seconds is not None:
            rows.append([v.name, "", "seconds", v.seconds, None, None, v.done, *[None] * 4])
        if v.speedup is not None:
            rows.append([v.name, "", "speedup", v.speedup, None, None, v.done, *[None] * 4])
    return columns, rows


def unit_table(run: Run, scores: Scores) -> tuple[list[str], list[list[Any]]]:
    """One row per unit: what was asked, what came out, its metrics and its seconds."""
    metrics = scores.metrics
    columns = [*RESULT, *metrics, "seconds", "seconds of reading", "batch", "worker", "host"]
    names = {v["hash"]: v["name"] for v in run.config["variants"]}
    rows = []
    for row in run.merged.rows:
        found = scores.values[names[row["hash"]]].get(row["sample"], {})
        plain = [json.dumps(v, ensure_ascii=False) if isinstance(v := row.get(c), list | dict) else v for c in RESULT]
        spent = row.get("seconds", {})
        rows.append(
            [
                *plain,
                *(found.get(m) for m in metrics),
                spent.get("model"),
                spent.get("read"),
                row.get("batch"),
                row["worker"],
                row["host"],
            ]
        )
    return columns, rows


def summary(scores: Scores) -> tuple[list[str], list[list[Any]]]:
    """The table for people: one row per variant."""
    metrics = scores.metrics
    first = scores.variants[0].name
    columns = ["variant", "units", "failed", *metrics]
    if scores.main and len(scores.variants) > 1:
        columns.append(f"{scores.main} against {first}")
    columns += ["median s", "speedup"]
    rows = []
    for v in scores.variants:
        row: list[Any] = [v.name, v.done, v.failed, *(str(v.metrics[m]) if m in v.metrics else None for m in metrics)]
        if scores.main and len(scores.variants) > 1:
            row.append(str(v.against[scores.main]) if scores.main in v.against else None)
        row += [None if v.seconds is None else f"{v.seconds:.4g}", None if v.speedup is None else f"{v.speedup:.2f}x"]
        rows.append(row)
    return columns, rows


def _csv(columns: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> Path:
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")
    return path


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BackendUnavailable(
            f"Parquet needs pyarrow, which is not installed ({error}); pip install 'mmeff[ray]', or use the CSV files"
        ) from error
    return pyarrow


def _parquet(path: Path, columns: list[str], rows: list[list[Any]]) -> Path:
    pyarrow = _pyarrow()
    table = pyarrow.table({c: [row[i] for row in rows] for i, c in enumerate(columns)})
    with replacing(path) as partial:
        pyarrow.parquet.write_table(table, partial)
    return path


# ---------------------------------------------------------------- page


def _page(run: Run, scores: Scores, notes: list[str], path: Path) -> Path:
    columns, rows = summary(scores)
    model = run.config["model"]["arguments"].get("source", run.config["model"]["function"])
    dataset = run.config["dataset"]
    figures = []
    if scores.main and any(v.seconds for v in scores.variants):
        figures.append(
            Figure(image=pareto(scores), alt=f"{scores.main} against seconds per unit, one point per variant")
        )
    if any(v.categories for v in scores.variants):
        figures.append(Figure(image=category_bars(scores), alt=f"{scores.main} by category and variant"))
    sections = [
        Section(
            heading="Results",
            tables=[
                Table(
                    columns=columns, rows=rows,
                    note="In brackets 95 % intervals: Wilson's for shares, bootstrapped for others. Against the first variant: the mean "
                    "of paired differences. Seconds are medians per unit in the model, without the first unit of each worker; speedup "
                    "is the median over samples.",
                )
            ],
            figures=figures,
        )
    ]  # fmt: skip
    if any(v.categories for v in scores.variants):
        sections.append(_categories(scores))
    videos = _videos(run)
    if videos:
        sections.append(Section(heading="Videos", videos=videos))
    sections.append(_failures(run))
    sections.append(_work(run))
    write_page(
        path,
        title=f"{model} on {dataset['name']}",
        subtitle=f"{dataset['samples']} samples, {len(scores.variants)} variants",
        environment=run.merged.sessions[-1]["environment"] if run.merged.sessions else environment(),
        sections=sections,
        notes=notes,
        highlights=[
            (str(v.metrics[scores.main]), f"{v.name}: {scores.main}")
            for v in scores.variants
            if scores.main in v.metrics
        ][:5],
    )
    return path


def _categories(scores: Scores) -> Section:
    names = list(dict.fromkeys(c for v in scores.variants for c in v.categories))
    rows = [[c, *(str(v.categories[c]) if c in v.categories else None for v in scores.variants)] for c in names]
    return Section(
        heading="By category",
        tables=[Table(columns=["category", *(v.name for v in scores.variants)], rows=rows, caption=scores.main)],
    )


def _failures(run: Run) -> Section:
    failed = run.merged.failed
    if not failed:
        return Section(heading="Failures", paragraphs=["No unit failed."])
    kinds = Counter((row.get("stage", ""), row["reason"].split(":", 1)[0]) for row in failed)
    rows = [[row["sample"], row["method"], row.get("stage", ""), row["reason"]] for row in failed[:SHOWN_FAILURES]]
    more = f"The first {SHOWN_FAILURES} of {len(failed)}; units.csv has all." if len(failed) > SHOWN_FAILURES else ""
    return Section(
        heading="Failures",
        tables=[
            Table(columns=["stage", "error", "units"], rows=[[*kind, count] for kind, count in kinds.most_common()]),
            Table(columns=["sample", "variant", "stage", "reason"], rows=rows, note=more),
        ],
    )


def _work(run: Run) -> Section:
    """Who did the work, and what the run is."""
    by_worker: dict[str, list[dict[str, Any]]] = {}
    for row in run.merged.rows:
        by_worker.setdefault(f"{row['worker']} on {row['host']}", []).append(row)
    rows = []
    for worker, done in sorted(by_worker.items()):
        spent = [row.get("seconds", {}) for row in done]
        rows.append(
            [
                worker,
                len(done),
                duration(sum(s.get("model", 0.0) for s in spent)),
                duration(sum(s.get("read", 0.0) for s in spent)),
            ]
        )
    counts = f"{len(run.merged.sessions)} starts of workers; {run.merged.repeated} units done twice; {run.merged.torn} torn lines skipped."
    return Section(
        heading="Who did the work",
        paragraphs=[counts],
        tables=[Table(columns=["worker", "units", "in the model", "reading"], rows=rows)],
        listings=[Listing(title="Configuration", text=json.dumps(run.config, indent=1, ensure_ascii=False))],
    )


def _videos(run: Run) -> list[Videos]:
    """The variants' videos of the first few samples that all of them made."""
    made: dict[str, dict[str, Path]] = {}
    for row in run.merged.rows:
        path = run.folder / row["artifact"] if row["status"] == DONE and row.get("artifact") else None
        if path is not None and path.is_file():
            made.setdefault(row["sample"], {})[row["method"]] = path
    names = [v["name"] for v in run.config["variants"]]
    whole = [(sample, paths) for sample, paths in made.items() if len(paths) == len(names)]
    return [
        Videos(paths=[paths[n] for n in names], labels=names, caption=f"sample {sample}", pixelated=True)
        for sample, paths in whole[:SHOWN_VIDEOS]
    ]


# ---------------------------------------------------------------- plots


def pareto(scores: Scores) -> Image.Image:
    """Quality against seconds per unit; a line joins the variants that no other one beats in both."""
    points = [
        (v.name, v.seconds, v.metrics[scores.main]) for v in scores.variants if v.seconds and scores.main in v.metrics
    ]
    if not points:  # the first variant has no PSNR to itself
        raise ValueError(f"a Pareto plot needs seconds and {scores.main} of at least one variant")
    with chart(6.6, 4.0) as (figure, axes):
        best = [p for p in points if not any(q[1] < p[1] and q[2].mean > p[2].mean for q in points)]
        axes.plot(*zip(*sorted((p[1], p[2].mean) for p in best), strict=True), color=RULE, linewidth=1.5, zorder=1)
        for i, (name, seconds, e) in enumerate(points):
            axes.errorbar(
                [seconds], [e.mean], yerr=[[e.mean - e.low], [e.high - e.mean]], color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], markersize=7, capsize=3, linewidth=0, elinewidth=1, label=name,
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.grid(color=RULE, linewidth=0.8)
        axes.set_xlabel("median seconds per unit in the model")
        axes.set_ylabel(scores.main)
        titles(axes, "Quality against time", "upper left is better; bars are 95 % intervals")
        figure.legend(loc="outside lower center", ncols=min(len(points), 4))
        return as_picture(figure)


def category_bars(scores: Scores) -> Image.Image:
    """The main metric by category, one bar per variant."""
    names = list(dict.fromkeys(c for v in scores.variants for c in v.categories))[:SHOWN_CATEGORIES]
    shown = [v for v in scores.variants if v.categories]
    with chart(6.6, 1.2 + 0.16 * len(names) * (len(shown) + 1)) as (figure, axes):
        height = 0.8 / len(shown)
        for i, v in enumerate(shown):
            places = [row + (i - (len(shown) - 1) / 2) * height for row in range(len(names))]
            found = [v.categories.get(c) for c in names]
            axes.barh(
                places,
                [0 if e is None else e.mean for e in found],
                height=0.9 * height,
                color=COLOURS[i % len(COLOURS)],
                label=v.name,
            )
            bars = [(p, e) for p, e in zip(places, found, strict=True) if e is not None]
            axes.errorbar(
                [e.mean for _, e in bars], [p for p, _ in bars],
                xerr=[[e.mean - e.low for _, e in bars], [e.high - e.mean for _, e in bars]],
                color=INK, linewidth=0, elinewidth=0.8, capsize=1.5,
            )  # fmt: skip
        axes.set_yticks(range(len(names)), names, color=MUTED)
        axes.invert_yaxis()
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.set_xlabel(scores.main)
        titles(axes, "By category", "bars are 95 % intervals")
        figure.legend(loc="outside lower center", ncols=min(len(shown), 4))
        return as_picture(figure)
