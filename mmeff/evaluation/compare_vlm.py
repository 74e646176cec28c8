"""Compare answers of a vision-language model: dense and pruned, with prefill, decode and selection timed apart."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import mmeff
from mmeff.config import MethodConfig
from mmeff.evaluation.comparison import Comparison, Tick, silent, slug, variant_names
from mmeff.evaluation.metrics import latency
from mmeff.evaluation.page import Figure, Listing, Section, Table
from mmeff.evaluation.pictures import kept_overlay, time_split
from mmeff.evaluation.questions import answer
from mmeff.evaluation.run_folder import RunFolder
from mmeff.handle import describe_model, model_note
from mmeff.report import Report

PHASES = ("vision encoder", "prefill", "selection", "decode")
COLUMNS = (
    "variant",
    "median s",
    "speedup",
    "prefill s",
    "selection s",
    "decode s",
    "visual tokens",
    "mean over layers",
    "same answer",
)


def compare_vlm(
    model: Any,
    processor: Any,
    methods: Sequence[MethodConfig],
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    folder: RunFolder | None = None,
    tick: Tick = silent,
) -> Comparison:
    """Answer every question dense and with each method, one question at a time.

    Args:
        processor: the model's own. methods: configs of stage pruning.
        inputs: mappings with `question` and `images`, a list of PIL images.
        new_tokens: tokens generated at most. repeats: timed runs per variant and question; the median is reported.
        folder: where pictures go; None writes nothing.
    Raises:
        ValueError: no input, a question without an image, or no processor.
    """
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
    names = ["dense", *variant_names(methods)]
    configs = dict(zip(names, [methods[0], *methods], strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    phases: dict[str, dict[str, list[float]]] = {name: {p: [] for p in PHASES} for name in names}
    said: dict[str, list[str]] = {name: [""] * len(cases) for name in names}
    reports: dict[str, Report] = {}
    kept: dict[str, list[Any]] = {name: [] for name in names}
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
                k: round(float(np.mean([c[k] for c in counted[name] if k in c])), 1) for k in reports[name].tokens
            },
            "answers": said[name],
            "same_answer": float(np.mean([a == b for a, b in zip(said[name], said["dense"], strict=True)])),
        }
    dense_tokens = next(
        (measured[n]["tokens"]["visual tokens per prompt"] for n in names[1:] if measured[n]["tokens"]), None
    )
    rows = tuple(_row(name, measured[name], dense_tokens) for name in names)
    sections: tuple[Section, ...] = ()
    if folder is not None:
        sections = _pages(folder, cases, names, measured, reports, kept, rows, model)
    best = min(names[1:], key=lambda n: measured[n]["latency"].median)
    return Comparison(
        kind="vlm", model=describe_model(model), note=model_note(model), columns=COLUMNS, rows=rows,
        measured={"settings": {"new_tokens": new_tokens, "repeats": repeats,
                               "questions": [c["question"] for c in cases]}, "variants": measured},
        reports=reports, sections=sections,
        highlights=((f"{measured[best]['speedup']:.2f}x", f"{best}: whole answer against dense, measured"),),
    )  # fmt: skip


def _row(name: str, figures: dict[str, Any], dense_tokens: Any) -> tuple[Any, ...]:
    tokens, phases = figures["tokens"], figures["phases"]
    left = [v for k, v in tokens.items() if k.startswith("kept from")]
    return (
        name, f"{figures['latency'].median:.4f}", f"{figures['speedup']:.2f}x", f"{phases['prefill']:.4f}",
        f"{phases['selection']:.4f}", f"{phases['decode']:.4f}",
        dense_tokens if name == "dense" else (left[-1] if left else None),
        dense_tokens if name == "dense" else tokens.get("mean over layers"), f"{figures['same_answer']:.0%}",
    )  # fmt: skip


def _pages(
    folder: RunFolder, cases: Sequence[Mapping[str, Any]], names: list[str], measured: dict[str, Any],
    reports: dict[str, Report], kept: dict[str, list[Any]], rows: tuple[tuple[Any, ...], ...], model: Any,
) -> tuple[Section, ...]:  # fmt: skip
    figures = []
    grid = visual_grid(model)
    for name in names[1:]:
        for i, case in enumerate(cases[:6]):
            for layer, positions in kept[name][i].items():
                if grid is None:
                    continue
                per_image = grid[0] * grid[1]
                for n, image in enumerate(case["images"]):
                    mine = np.asarray(positions[0])
                    mine = mine[(mine >= n * per_image) & (mine < (n + 1) * per_image)] - n * per_image
                    picture = kept_overlay(as_seen(image, model), mine, grid)
                    folder.write_image(f"pictures/kept-{slug(name)}-{i}-{n}-layer{layer}.png", picture)
                    words = f"“{case['question']}”: dense “{measured['dense']['answers'][i]}”, {name} “{measured[name]['answers'][i]}”"
                    figures.append(
                        Figure(image=picture, alt=f"Image with the tokens that {name} dropped darkened",
                               caption=f"{words}. {len(mine)} of {per_image} tokens from layer {layer} on.")
                    )  # fmt: skip
    split = {name: {k: v for k, v in measured[name]["phases"].items() if v} for name in names}
    picture = time_split(split, title="Time of one answer")
    folder.write_image("pictures/vlm-time.png", picture)
    figures.append(Figure(image=picture, alt="Seconds in vision encoder, prefill, selection and decode per variant"))
    answers = Table(
        columns=("question", *names),
        rows=[(c["question"], *(measured[n]["answers"][i] for n in names)) for i, c in enumerate(cases)],
        caption="Answers",
    )
    return (
        Section(
            heading="Vision-language: dense and pruned answers",
            paragraphs=[
                f"{describe_model(model)}, one question at a time. Prefill is without the selection of tokens, which stands apart."
            ],
            tables=[Table(columns=COLUMNS, rows=rows), answers],
            figures=figures,
            listings=[Listing(title=f"What ran: {n}", text=str(reports[n])) for n in names[1:]],
        ),
    )


def visual_grid(model: Any) -> tuple[int, int] | None:
    """Rows and columns of visual tokens of one image, where they are a plain grid."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None or not hasattr(vision, "image_size") or not hasattr(vision, "patch_size"):
        return None
    side = int(vision.image_size) // int(vision.patch_size)
    return side, side


def as_seen(image: Any, model: Any) -> Any:
    """The square centre of an image, which is what CLIP's preprocessing shows the model."""
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    size = int(model.config.vision_config.image_size)
    return image.crop((left, top, left + side, top + side)).resize((size, size))
