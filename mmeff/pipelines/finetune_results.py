"""What a fine-tuning leaves behind: weights in their library's own format, the losses, a curve and a card.

pytorch_lora_weights.safetensors   an adapter, for `pipeline.load_lora_weights(folder)`
transformer/                       or, where every weight was trained, the transformer
method.yaml                        the method it was trained under, for `mmeff.accelerate(pipeline, "method.yaml")`
log.jsonl  curve.png  README.md    every logged loss, the picture of them, and what was trained on what
finetune.json                      the same for programs; written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmeff.report import environment

SUMMARY = "finetune.json"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A finished training.

    Fields: `folder` the result; `steps` of the run; `rows` what was logged; `final` the held-out loss of the result;
    `report` what the method did while training, None where it was dense; `model`, `note`, `data`, `recipe` what was
    trained on what.
    """

    folder: Path
    steps: int
    rows: list[dict[str, Any]]
    final: float
    report: dict[str, Any] | None
    model: str
    note: str
    data: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(step, held-out loss), by step; step 0 is the model before training."""
        return series(self.rows, "held_out")

    @property
    def untuned(self) -> float:
        """The held-out loss before training, under the same method."""
        return self.held_out[0][1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.model, "note": self.note, "data": self.data, "recipe": self.recipe, "steps": self.steps,
            "held_out": {"untuned": self.untuned, "tuned": self.final, "curve": self.held_out},
            "report": self.report, "environment": environment(),
        }  # fmt: skip


def series(rows: Iterable[Mapping[str, Any]], figure: str) -> list[tuple[int, float]]:
    """(step, value) of one logged figure, by step. A run that was resumed logs some steps twice; the last one counts."""
    return sorted({int(row["step"]): float(row[figure]) for row in rows if figure in row}.items())


def check_out(out: Path) -> None:
    """Raise ValueError unless `out` is free: absent, empty, or an earlier result."""
    if out.is_dir() and (not any(out.iterdir()) or (out / SUMMARY).is_file()):
        return
    if out.exists():
        raise ValueError(f"{out} exists and holds something else than a result of fine-tuning; choose another folder")


def write_result(done: Finetuned, pipeline: Any, adapter: str | None) -> None:
    """Write the result folder, whole or not at all. `adapter` names the adapter, None means every weight was trained."""
    folder = done.folder
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if adapter is None:
        _save_transformer(pipeline, draft)
    else:
        from peft import get_peft_model_state_dict

        transformer = pipeline.transformer
        type(pipeline).save_lora_weights(
            draft,
            transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=adapter),
            transformer_lora_adapter_metadata=transformer.peft_config[adapter].to_dict(),
        )
    method = done.recipe["method"]
    if method is not None:
        import yaml

        (draft / "method.yaml").write_text(yaml.safe_dump(method, sort_keys=False))
    (draft / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done.rows))
    draw_curves(draft / "curve.png", {_label(method): done.rows}, title=f"Fine-tuning of {done.model}")
    (draft / "README.md").write_text(card(done, adapter is not None))
    (draft / SUMMARY).write_text(json.dumps(done.to_dict(), indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(draft, folder)


def _save_transformer(pipeline: Any, folder: Path) -> None:
    from mmeff.tiny.video_model import save_table

    pipeline.transformer.save_pretrained(folder / "transformer", safe_serialization=True)
    table = getattr(pipeline.transformer, "mmeff_position_table", None)  # of the tiny model; it is no weight
    if table is not None:
        save_table(folder, table)


def _label(method: Mapping[str, Any] | None) -> str:
    return "dense" if method is None else str(method["method"])


def draw_curves(path: Path, runs: Mapping[str, Iterable[Mapping[str, Any]]], *, title: str) -> None:
    """Draw the training loss (thin) and the held-out loss (marked) of some runs over their steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (label, rows) in enumerate(runs.items()):
        rows, colour = list(rows), _COLOURS[i % len(_COLOURS)]
        for name, style in (
            ("loss", {"linewidth": 0.8, "alpha": 0.45}),
            ("held_out", {"linewidth": 1.8, "marker": "o"}),
        ):
            points = series(rows, name)
            if points:
                what = "training" if name == "loss" else "held out"
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, color=colour, label=f"{label}, {what}", markersize=4, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("velocity loss (mean squared error)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:  # a run of a few steps has logged nothing yet
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def card(done: Finetuned, is_adapter: bool) -> str:
    """The README of a result: what was trained on what, what it gave, how to load it."""
    recipe, data, method = done.recipe, done.data, done.recipe["method"]
    fields = "\n".join(f"| {k} | {v} |" for k, v in recipe.items() if k != "method")
    under = (
        "dense attention"
        if method is None
        else f"`{method['method']}` ({', '.join(f'{k} {v}' for k, v in method.items() if k != 'method')})"
    )
    what = (
        f"A low-rank adapter (rank {recipe['lora_rank']}) of {done.model}"
        if is_adapter
        else f"All weights of {done.model}, fine-tuned"
    )
    density = (
        "" if done.report is None else f"\nMean density of the layers that the method served: {_density(done.report)}."
    )
    clips = "\n".join(f"| {k} | {v} |" for k, v in data.items())
    curve = "\n".join(f"| {step} | {value:.5f} |" for step, value in done.held_out)
    load = (
        "pipeline.load_lora_weights(folder)"
        if is_adapter
        else 'pipeline.transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")'
    )
    if not is_adapter and done.note:
        load += "\nmmeff.tiny.video_model.attach_if_present(pipeline, folder)  # its position table"
    if method is not None:
        load += '\nmmeff.accelerate(pipeline, f"{folder}/method.yaml")'
    return f"""# {what}

Trained under {under} by flow matching (velocity loss), {recipe["steps"]} steps of {recipe["batch"] * recipe["accumulate"]} clips of
{recipe["frames"]} frames, {recipe["height"]} x {recipe["width"]} pixels.{density}
{f"{chr(10)}Note: {done.note}.{chr(10)}" if done.note else ""}
```python
{load}
```

## Held-out loss

Velocity loss on {recipe["held_out"]} clips that were not trained on, each at {recipe["held_out_levels"]} noise levels, with fixed noise, under
the attention named above. Step 0 is the model before training.

| step | loss |
|---|---|
{curve}

![losses](curve.png)

## Clips

| | |
|---|---|
{clips}

## Recipe

| field | value |
|---|---|
{fields}
"""


def _density(report: Mapping[str, Any]) -> str:
    found = report.get("density")
    return "not known" if found is None else f"{found:.3f}"
