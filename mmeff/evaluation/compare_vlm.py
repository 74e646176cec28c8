"""Compare answers of a vision-language model: dense and pruned, with prefill, decode and selection timed apart."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import mmeff
from mmeff.config import MethodConfig
from mmeff.evaluation.compare_vlm_page import pages
from mmeff.evaluation.comparison import Comparison, Tick, silent, variant_names
from mmeff.evaluation.metrics import latency
from mmeff.evaluation.page import Section
from mmeff.evaluation.questions import answer
from mmeff.evaluation.run_folder import RunFolder
from mmeff.handle import describe_model, model_note
from mmeff.report import Report

PHASES = ("vision encoder", "prefill", "selection", "decode")
COLUMNS = (
    "variant", "median s", "speedup", "prefill s", "selection s", "decode s", "tokens at last", "mean over layers",
    "prefill operations", "cache KiB", "same answer",
)  # fmt: skip
# What a report counts, by the name that it has for a run without pruning.
COUNTED = {
    "kept at last": "visual tokens per prompt", "mean over layers": "visual tokens per prompt",
    "prefill operations, of dense": None, "cache of the prompt, KiB": "cache of the prompt, dense, KiB",
}  # fmt: skip


def checked_cases(processor: Any, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The inputs as a list. Raises ValueError as `compare_vlm` says."""
    cases = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if processor is None:
        raise ValueError(
            "comparing answers needs the model's processor; pass processor=AutoProcessor.from_pretrained(...)"
        )
    if not cases:
        raise ValueError("compare needs at least one question with an image, got none")
    for case in cases:
        if not str(case.get("question", "")).strip():
            raise ValueError(f"every input needs a question that is not empty, got keys {sorted(case)}")
        if not case.get("images"):
            raise ValueError(
                f"the question {case['question']!r} has no image: visual tokens are what is pruned; pass images=[...]"
            )
    return cases


def compare_vlm(
    model: Any,
    processor: Any,
    methods: Sequence[MethodConfig],
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    remark: str = "",
    folder: RunFolder | None = None,
    tick: Tick = silent,
) -> Comparison:
    """Answer every question dense and with each method, one question at a time.

    Args:
        processor: the model's own. methods: configs of stage pruning.
        inputs: mappings with `question` and `images`, a list of PIL images.
        new_tokens: tokens generated at most. repeats: timed runs per variant and question; the median is reported.
        remark: what the reader must know about the settings, such as their common budget.
        folder: where pictures go; None writes nothing.
    Raises:
        ValueError: no input, a question without an image, or no processor.
    """
    cases = checked_cases(processor, inputs)
    names = ["dense", *variant_names(methods)]
    configs = dict(zip(names, [methods[0], *methods], strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    phases: dict[str, dict[str, list[float]]] = {name: {p: [] for p in PHASES} for name in names}
    said: dict[str, list[str]] = {name: [""] * len(cases) for name in names}
    reports: dict[str, Report] = {}
    kept: dict[str, list[Any]] = {name: [] for name in names}
    places: dict[str, list[Any]] = {name: [] for name in names}
    counted: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    total, done = len(cases) * len(names) * (repeats + 1), 0

    def run(name: str, case: Mapping[str, Any]) -> tuple[str, float, Report]:
        with mmeff.accelerate(model, configs[name]) as handle:
            handle.enabled = name != "dense"
            began = time.perf_counter()
            text = answer(model, processor, [list(case["images"])], [str(case["question"])], new_tokens=new_tokens)[0]
            spent = time.perf_counter() - began
            report = handle.report()
            handle.enabled = False  # the comparison reports a method that never acted; it does not stop here
        return text, spent, report

    for i, case in enumerate(cases):
        for turn in range(repeats + 1):  # the first turn warms up
            for name in names if turn % 2 == 0 else reversed(names):
                said[name][i], spent, report = run(name, case)
                done += 1
                tick(f"{name}: {case['question']}", done, total)
                if turn == 0:
                    continue
                seconds[name].append(spent)
                for phase in PHASES:
                    phases[name][phase].append(report.seconds.get(phase, 0.0))
                reports[name] = report
        for name in names[1:]:
            kept[name].append(reports[name].kept)
            places[name].append(reports[name].places)
            counted[name].append(reports[name].tokens)
    measured: dict[str, dict[str, Any]] = {}
    for name in names:
        spent_in = {phase: float(np.median(values)) for phase, values in phases[name].items()}
        spent_in["prefill"] = max(0.0, spent_in["prefill"] - spent_in["selection"])
        measured[name] = {
            "latency": latency(seconds[name]),
            "speedup": float(np.median([d / s for d, s in zip(seconds["dense"], seconds[name], strict=True)])),
            "phases": spent_in,
            "tokens": {
                k: round(float(np.mean([c[k] for c in counted[name] if k in c])), 4 if "operations" in k else 1)
                for k in reports[name].tokens
            },
            "answers": said[name],
            "same_answer": float(np.mean([a == b for a, b in zip(said[name], said["dense"], strict=True)])),
        }
    everything: dict[str, Any] = next((measured[n]["tokens"] for n in names[1:] if measured[n]["tokens"]), {})
    rows = tuple(_row(name, measured[name], everything) for name in names)
    sections: tuple[Section, ...] = ()
    if folder is not None:
        sections = pages(
            folder, cases, measured, reports, kept, places, columns=COLUMNS, rows=rows, model=model, remark=remark
        )
    best = min(names[1:], key=lambda n: measured[n]["latency"].median)
    return Comparison(
        kind="vlm", model=describe_model(model), note=model_note(model), remark=remark, columns=COLUMNS, rows=rows,
        measured={"settings": {"new_tokens": new_tokens, "repeats": repeats,
                               "questions": [c["question"] for c in cases]}, "variants": measured},
        reports=reports, sections=sections,
        highlights=((f"{measured[best]['speedup']:.2f}x", f"{best}: whole answer against dense, measured"),),
    )  # fmt: skip


def _row(name: str, figures: dict[str, Any], everything: dict[str, Any]) -> tuple[Any, ...]:
    """A row of the table; what dense keeps is known from `everything`, the counts of a run with pruning."""
    phases, tokens = figures["phases"], figures["tokens"]
    if name == "dense":
        counts = [everything.get(whole) if whole else 1.0 if everything else None for whole in COUNTED.values()]
    else:
        counts = [tokens.get(kept) for kept in COUNTED]
    return (
        name, f"{figures['latency'].median:.4f}", f"{figures['speedup']:.2f}x", f"{phases['prefill']:.4f}",
        f"{phases['selection']:.4f}", f"{phases['decode']:.4f}", *counts[:2],
        None if counts[2] is None else f"{counts[2]:.3f}", counts[3], f"{figures['same_answer']:.0%}",
    )  # fmt: skip
