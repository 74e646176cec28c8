"""The parts of the tab Ask that are HTML: plans of pruning, the answers as they grow, the table. Every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmeff.report import Plan

from .queries import Asked, Reply, Step
from .views import DASH, TIMES, environment_line, text

COLUMNS = (
    ("variant", "what ran"),
    ("tokens at last", "visual tokens at the last layer"),
    ("mean over layers", "visual tokens, mean over the layers of the language model"),
    ("prefill", "from the prompt to the first token, with vision encoder and selection; measured"),
    ("selection", "choosing the tokens, part of prefill; measured"),
    ("decode", "the tokens after the first; measured"),
    ("prefill speedup", "measured: prefill of dense over this one; below 1 is a loss"),
    ("predicted", "of prefill, by the plan, from operations; no measurement"),
    ("whole answer", "speedup of the whole answer over dense, measured"),
    ("KV memory", "keys and values of the prompt, over all layers; counted"),
    ("operations", "of the language model in prefill, as a share of dense; counted"),
)


def plans(found: Mapping[str, Plan]) -> str:
    """One card for each method: what is kept, predicted speedup, cache, and every warning."""
    return f'<div class="mm-plans">{"".join(_plan(name, plan) for name, plan in found.items())}</div>'


def _plan(name: str, plan: Plan) -> str:
    rows = dict(plan.rows)
    facts = [
        (
            "predicted prefill speedup",
            DASH if plan.predicted_speedup is None else f"{plan.predicted_speedup:.2f}{TIMES}",
        ),
        ("prefill operations", rows.get("prefill operations", DASH)),
        ("kept", rows.get("kept", DASH)),
        ("cache", rows.get("cache", DASH)),
    ]
    share = "" if plan.density is None else f"{plan.density:.1%}"
    bar = (
        f'<p class="mm-density"><span class="mm-track" aria-hidden="true"><span style="width:{share.replace(" ", "")}"></span></span>'
        f"<b>{share}</b> of {text(rows.get('visual tokens', '').split(' ')[0])} visual tokens, mean over layers</p>"
        if share else ""
    )  # fmt: skip
    notes = "".join(f'<li class="mm-warn">{text(reason)}</li>' for reason in plan.fallbacks)
    listed = "".join(f"<tr><th scope='row'>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in plan.rows)
    return (
        f'<section class="mm-plan" aria-label="Plan for {text(name)}"><h4>{text(name)}</h4>{bar}<dl>'
        + "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in facts)
        + "</dl>"
        + (f"<ul>{notes}</ul>" if notes else "")
        + f"<details><summary>All of the plan</summary><table>{listed}</table></details></section>"
    )


def progress(at: Step) -> str:
    """Where a run is, in a line."""
    if at.stage == "waiting":
        runs = "run is" if at.before == 1 else "runs are"
        line = f"waiting for your turn: {at.before} {runs} before yours" if at.before else "starting"
    elif at.stage == "loading":
        line = "loading the model, only this once"
    elif at.stage == "warming up":
        line = f"{at.variant}: one untimed token first, only this once"
    elif at.stage == "answering":
        line = f"{at.variant} is answering"
    else:
        line = "answering again in turn, for the times in the table"
    return f'<div class="mm-progress" role="status" aria-live="polite"><div class="mm-line"><b>{text(line)}</b></div></div>'


def talking(names: Sequence[str], at: Step) -> str:
    """The answers side by side while they grow: who is done, who talks, who waits."""
    cards = []
    for name in names:
        said, now = at.texts.get(name), name == at.variant and at.stage == "answering"
        state = "answering" if now else "waits for its turn" if said is None or name == at.variant else "answered"
        words = text(said or "") + ('<span class="mm-caret" aria-hidden="true"></span>' if now else "")
        cards.append(_card(name, words, state, busy=state != "answered"))
    return f'<div class="mm-answers" aria-live="polite">{"".join(cards)}</div>'


def answers(found: Asked) -> str:
    """The answers side by side, each with its time, and whether it says what dense says."""
    dense = found.replies[0]
    cards = []
    for reply in found.replies:
        line = f"{_time(reply.total)}"
        if reply is not dense:
            same = "the same words" if reply.text == dense.text else "other words than dense"
            line += f" · {same}"
        cards.append(_card(reply.name, text(reply.text) or "<i>nothing</i>", line))
    unknown = ""
    if found.unknown:
        words = ", ".join(f"“{word}”" for word in found.unknown)
        unknown = f'<div class="mm-hint">The model has no word {text(words)}; it reads an unknown word there.</div>'
    return f'<div class="mm-answers">{"".join(cards)}</div>{unknown}'


def _card(name: str, words: str, line: str, *, busy: bool = False) -> str:
    kind = "mm-answer mm-dense" if name == "dense" else "mm-answer"
    return (
        f'<section class="{kind}{" mm-busy" if busy else ""}" aria-label="Answer of {text(name)}"><h4>{text(name)}</h4>'
        f"<p>{words}</p><small>{text(line)}</small></section>"
    )


def table(found: Asked) -> str:
    """What was measured and counted, a row for each variant; losses stay losses."""
    heads = "".join(f'<th scope="col" title="{text(why)}">{text(name)}</th>' for name, why in COLUMNS)
    rows = "".join(_row(reply, number == 0) for number, reply in enumerate(found.replies))
    how = (
        "One run of each" if found.rounds == 1 else f"Times are medians of {found.rounds} runs of each, one after the other in turn,"
    )  # fmt: skip
    remarks = "".join(f"<li><b>{text(r.name)}</b> {text(remark)}</li>" for r in found.replies for remark in r.remarks)
    reports = "".join(
        f"<details><summary>What ran: {text(r.name)}</summary><pre>{text(r.report)}</pre></details>" for r in found.replies if r.report
    )  # fmt: skip
    return (
        '<div class="mm-result"><div class="mm-scroll" tabindex="0" role="region" aria-label="Table of measurements">'
        f"<table class='mm-table'><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="mm-where">“{text(found.question)}”. {how} on {text(environment_line(found.environment))}. Predicted counts '
        "operations and is no measurement.</p>"
        + (f"<ul class='mm-remarks'>{remarks}</ul>" if remarks else "")
        + reports
        + "</div>"
    )


def _row(reply: Reply, dense: bool) -> str:
    cells = [
        _number(reply.last), _number(reply.mean), _time(reply.prefill), DASH if reply.selection is None else _time(reply.selection),
        _time(reply.decode), f"1.00{TIMES}" if dense else _speed(reply.prefill_speedup),
        DASH if reply.predicted is None else f"{reply.predicted:.2f}{TIMES}", f"1.00{TIMES}" if dense else _speed(reply.total_speedup),
        DASH if reply.cache_kib is None else _memory(reply.cache_kib),
        DASH if reply.operations is None else f"{reply.operations:.3f}",
    ]  # fmt: skip
    return f'<tr><th scope="row">{text(reply.name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _speed(speedup: float | None) -> str:
    if speedup is None:
        return DASH
    better = "mm-gain" if speedup >= 1.005 else "mm-loss" if speedup <= 0.995 else ""
    return f'<span class="{better}">{speedup:.2f}{TIMES}</span>'


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.5g}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _memory(kib: float) -> str:
    return f"{kib:.0f} KiB" if kib < 10_000 else f"{kib / 1024:.0f} MiB"


def kept_words(words: str, layer: int, layers: int, moment: Any = None) -> str:
    """What the picture of the kept tokens shows."""
    when = f", at {moment}" if moment else ""
    return f'<div class="mm-hint" role="status">Layer {layer} of {layers}{text(when)}: {text(words)} of this picture are there.</div>'
