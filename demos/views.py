"""The parts of the page that are HTML: plans, progress, the player, the table. Every text of a visitor or a model is escaped.

What moves in them is in `static/demo.js`, which gives the element `<mm-player>` its controls.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mmeff.report import Plan

from .wishes import Progress, Result, Variant

DASH, TIMES, ABOUT = "\u2013", "\u00d7", "\u2248"


def text(value: Any) -> str:
    """Escaped, for between tags and inside attributes."""
    return html.escape(str(value), quote=True)


def banner(note: str) -> str:
    """What must be known about a model before its figures are read; nothing where there is nothing to say."""
    if not note:
        return ""
    return f'<div class="mm-banner" role="note"><strong>Tiny model.</strong> This is {text(note)}.</div>'


def error_box(message: str) -> str:
    """Something that keeps a run from starting."""
    return f'<div class="mm-error" role="alert">{text(message)}</div>'


def hint(message: str) -> str:
    """A quiet line, where nothing is to be shown yet."""
    return f'<div class="mm-hint">{text(message)}</div>'


def plans(found: Mapping[str, Plan]) -> str:
    """One card for each method: density, predicted speedup, what runs dense, and every reason for a fallback."""
    return f'<div class="mm-plans">{"".join(_plan(name, plan) for name, plan in found.items())}</div>'


def _plan(name: str, plan: Plan) -> str:
    rows = dict(plan.rows)
    facts = [
        ("predicted speedup", DASH if plan.predicted_speedup is None else f"{plan.predicted_speedup:.2f}{TIMES}"),
        ("dense steps", rows.get("dense steps", DASH)),
        ("dense layers", rows.get("dense layers", DASH)),
        ("attention's share", rows.get("self-attention's share", DASH).split(" of ")[0]),
    ]
    notes = [value for key, value in plan.rows if key == "note"]
    warnings = "".join(f'<li class="mm-warn">{text(reason)}</li>' for reason in plan.fallbacks)
    warnings += "".join(f"<li>{text(note)}</li>" for note in notes)
    listed = "".join(f"<tr><th scope='row'>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in plan.rows)
    bar = _bar(plan.density)
    return (
        f'<section class="mm-plan" aria-label="Plan for {text(name)}"><h4>{text(name)}</h4>{bar}<dl>'
        + "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in facts)
        + "</dl>"
        + (f"<ul>{warnings}</ul>" if warnings else "")
        + f"<details><summary>All of the plan</summary><table>{listed}</table></details></section>"
    )


def _bar(density: float | None) -> str:
    if density is None:
        return '<p class="mm-density">no sparse attention at these sizes</p>'
    share = f"{density:.1%}"
    return (
        f'<p class="mm-density"><span class="mm-track" aria-hidden="true"><span style="width:{density * 100:.1f}%"></span></span>'
        f"<b>{share}</b> of the pairs where sparse</p>"
    )


def progress(at: Progress) -> str:
    """Where a run is, as a card with one bar."""
    done = at.step / at.steps if at.steps else 0.0
    if at.stage == "waiting":
        line = "waiting for your turn" if at.before else "starting"
        line += f": {at.before} {'run is' if at.before == 1 else 'runs are'} before yours" if at.before else ""
    elif at.stage == "loading":
        line = "loading the model, only this once"
    elif at.stage == "warming up":
        line = f"{at.variant}: two untimed steps first, only this once"
    elif at.stage == "running":
        line = f"{at.variant}: step {at.step} of {at.steps}"
    elif at.stage == "measuring":
        line = "comparing with dense"
    else:
        line = at.stage
    finished = at.variants if at.stage == "measuring" else max(at.number - 1, 0)
    overall = (finished + (done if at.stage == "running" else 0)) / at.variants if at.variants else 0.0
    which = f"{at.number} of {at.variants}" if at.number else ""
    return (
        f'<div class="mm-progress" role="status" aria-live="polite"><div class="mm-line"><b>{text(line)}</b>'
        f"<span>{text(which)}</span><span>{at.seconds:.1f} s</span></div>"
        f'<div class="mm-track" role="progressbar" aria-label="Progress of the run" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{overall * 100:.0f}"><span style="width:{overall * 100:.1f}%"></span></div></div>'
    )


def empty(kind: str) -> str:
    """What is to come, before the first run."""
    made = "the dense video and each method's, in step" if kind == "video" else "the dense picture and each method's"
    return (
        f'<div class="mm-empty"><b>Nothing has run yet</b>Generate shows {made}, from the same noise: time, speedup, '
        "closeness to dense, where they differ, and which layers and steps were sparse.</div>"
    )


def stopped(message: str) -> str:
    """A run that was cancelled."""
    return f'<div class="mm-hint mm-stopped" role="status">{text(message)}</div>'


def player(result: Result) -> str:
    """All videos of a result under one control, or its pictures side by side."""
    panels = [
        {
            "name": variant.name, "src": variant.files["media"], "difference": variant.files.get("difference", ""),
            "line": _line(variant, number == 0, result.variants[0].earlier is not None),
        }
        for number, variant in enumerate(result.variants)
    ]  # fmt: skip
    width, height = result.size
    spec = {
        "kind": result.kind, "frames": result.frames, "fps": result.fps, "width": width, "height": height,
        "pixelated": height < 160, "prompt": result.prompt, "panels": panels,
    }  # fmt: skip
    return f'<mm-player data-spec="{text(json.dumps(spec))}"></mm-player>'


def _line(variant: Variant, dense: bool, then: bool) -> str:
    if dense:
        return f"{variant.seconds:.2f} s"
    return f"{variant.seconds:.2f} s · {ABOUT if then else ''}{variant.speedup:.2f}{TIMES}"


COLUMNS = (
    ("variant", "what ran"),
    ("time", "the whole pipeline call, once, on this machine"),
    ("speedup", "measured: time of dense over this time; below 1 is a loss"),
    ("predicted", "by the plan, from operations; no measurement"),
    ("density", "share of the attention's pairs that were computed where the method acted"),
    ("PSNR dB", "to the dense result of the same noise, in dB"),
    ("corrected dB", "PSNR after removing the shift of the background colour"),
    ("SSIM", "structural similarity to dense; 1 is equal"),
    ("dense steps", "denoising steps in which no layer was sparse"),
)
FILES = {"media": "", "pair": "side by side", "recipe": "recipe", "config": "config", "image": "first frame"}


def table(result: Result) -> str:
    """What was measured, a row for each variant; losses stay losses. Below it what to download, and what ran."""
    heads = "".join(f'<th scope="col" title="{text(why)}">{text(name)}</th>' for name, why in COLUMNS)
    rows = _rows(result)
    sizes = f"{result.size[0]} {TIMES} {result.size[1]}" + (f", {result.frames} frames" if result.frames > 1 else "")
    remarks = "".join(
        f"<li><b>{text(variant.name)}</b> {text(remark)}</li>"
        for variant in result.variants
        for remark in variant.remarks
    )
    reports = "".join(
        f"<details><summary>What ran: {text(variant.name)}</summary><pre>{text(variant.report)}</pre></details>"
        for variant in result.variants if variant.report
    )  # fmt: skip
    return (
        '<div class="mm-result"><div class="mm-scroll" tabindex="0" role="region" aria-label="Table of measurements">'
        f'<table class="mm-table"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="mm-where">“{text(result.prompt)}”, seed {result.seed}, {text(sizes)}. One run of each on '
        f"{text(environment_line(result.environment))}{_earlier(result)}. Predicted counts operations and is no measurement.</p>"
        + f'<div class="mm-files">{"".join(map(_files, result.variants))}</div>'
        + (f'<ul class="mm-remarks">{remarks}</ul>' if remarks else "")
        + reports
        + "</div>"
    )


def _earlier(result: Result) -> str:
    earlier = result.variants[0].earlier
    return "" if earlier is None else f"; dense was measured {ago(earlier)} ago, for an earlier comparison"


def _rows(result: Result) -> str:
    then = result.variants[0].earlier is not None
    return "".join(_row(variant, number == 0, then) for number, variant in enumerate(result.variants))


def _row(variant: Variant, dense: bool, then: bool) -> str:
    earlier = "" if variant.earlier is None else f"<small>{text(ago(variant.earlier))} ago</small>"
    time = f"{variant.seconds:.2f} s{earlier}"
    if dense:
        cells = [time, f"1.00{TIMES}", DASH, "100%", DASH, DASH, DASH, _of(variant)]
    else:
        cells = [
            time,
            _speed(variant.speedup, then=then),
            DASH if variant.predicted is None else f"{variant.predicted:.2f}{TIMES}",
            DASH if variant.density is None else f"{variant.density:.1%}",
            "equal" if variant.psnr is None else f"{variant.psnr:.1f}",
            "equal" if variant.corrected_psnr is None else f"{variant.corrected_psnr:.1f}",
            DASH if variant.ssim is None else f"{variant.ssim:.3f}",
            _of(variant),
        ]
    return f'<tr><th scope="row">{text(variant.name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _files(variant: Variant) -> str:
    links = "".join(
        f'<a href="{text(variant.files[what])}" download aria-label="download {text(variant.name)}, {text(label or "the result")}">'
        f"{text(label or variant.files[what].rsplit('.', 1)[1])}</a>"
        for what, label in FILES.items() if what in variant.files
    )  # fmt: skip
    return f"<span><b>{text(variant.name)}</b>{links}</span>"


def _speed(speedup: float, then: bool) -> str:
    """A measured speedup; one against a dense run of another moment is marked, and neither praised nor blamed."""
    if then:
        return f'<span title="against a dense run of an earlier moment">{ABOUT}{speedup:.2f}{TIMES}</span>'
    better = "mm-gain" if speedup >= 1.005 else "mm-loss" if speedup <= 0.995 else ""
    return f'<span class="{better}">{speedup:.2f}{TIMES}</span>'


def _of(variant: Variant) -> str:
    return f"{variant.dense_steps} of {variant.steps}"


def ago(seconds: float) -> str:
    """How long ago, in one unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def environment_line(found: Mapping[str, str]) -> str:
    """Hardware and versions, on one line."""
    where = found.get("gpu") or found.get("cpu", "an unknown machine")
    count = found.get("threads", "") if "gpu" not in found else ""
    threads = f", {count} thread{'' if count == '1' else 's'}" if count else ""
    versions = [f"{name} {found[name]}" for name in ("torch", "mmeff") if name in found]
    return ", ".join([where + threads, *versions])


def header(found: Mapping[str, str]) -> str:
    """The top of the page."""
    return (
        '<header class="mm-header"><div><h1>mmeff</h1>'
        "<p>The same video, picture and answer, dense and fast, side by side: what a method gains, and what it costs."
        f'</p></div><div class="mm-chips">{chips([environment_line(found)])}</div></header>'
    )


def chips(words: Iterable[str]) -> str:
    """Short facts in a row."""
    return "".join(f'<span class="mm-chip">{text(word)}</span>' for word in words)
