"""What training CaCoVID leaves behind: the policy, its rewards, a curve and a card.

config.json  policy.safetensors    the policy, for `CaCoVID(policy=folder)`
log.jsonl  curve.png  README.md    every logged figure, the picture of them, and what was trained on what
training.json                      the same for programs; written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmeff.pipelines.finetune_results import series
from mmeff.pruning._cacovid_policy import Policy
from mmeff.report import environment

SUMMARY = "training.json"
LINES = {  # figure: label, colour
    "token_reward": ("token masks", "#0072b2"),
    "frame_reward": ("frame masks", "#56b4e9"),
    "content_reward": ("content mask", "#999999"),
    "held_out": ("held out, policy", "#d55e00"),
}
FLAT = {"even": ("held out, spread evenly", "#009e73"), "all": ("held out, all tokens", "#000000")}


@dataclass(frozen=True, kw_only=True)
class TrainedPolicy:
    """A finished training of CaCoVID's policy: where it is, what was logged, and what was trained on what."""

    folder: Path
    rows: list[dict[str, Any]]
    model: str
    note: str
    data: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(question, mean probability per token of held-out answers), by question; 0 is the policy before training."""
        return series(self.rows, "held_out")

    def figure(self, name: str) -> float:
        """The last logged value of a figure, such as "held_out", "held_out_exact", "even" or "all"."""
        return series(self.rows, name)[-1][1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = ("held_out", "even", "all")
        last = {n: self.figure(n) for name in names for n in (name, f"{name}_exact")}
        return {
            "model": self.model, "note": self.note, "data": self.data, "recipe": self.recipe, "held_out": last,
            "curve": self.held_out, "environment": environment(),
        }  # fmt: skip


def check_out(out: Path) -> None:
    """Raise ValueError unless `out` is free: absent, empty, or an earlier result."""
    if out.is_dir() and (not any(out.iterdir()) or (out / SUMMARY).is_file()):
        return
    if out.exists():
        raise ValueError(f"{out} exists and holds something else than a trained policy; choose another folder")


def write_result(done: TrainedPolicy, policy: Policy) -> None:
    """Write the result folder, whole or not at all."""
    draft = done.folder.with_name(done.folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    policy.save(draft)
    (draft / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done.rows))
    draw_curves(draft / "curve.png", done.rows, title=f"CaCoVID's policy for {done.model}")
    (draft / "README.md").write_text(card(done))
    (draft / SUMMARY).write_text(json.dumps(done.to_dict(), indent=1) + "\n")
    if done.folder.exists():
        shutil.rmtree(done.folder)
    os.replace(draft, done.folder)


def draw_curves(path: Path, rows: Iterable[Mapping[str, Any]], *, title: str) -> None:
    """Draw rewards of training masks (thin) and held-out figures (marked) over the questions, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(rows)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (label, colour) in LINES.items():
        points = series(rows, name)
        if points:
            steps, values = zip(*points, strict=True)
            style: dict[str, Any] = {"marker": "o", "linewidth": 1.8} if name == "held_out" else {"linewidth": 0.9}
            axes.plot(steps, values, color=colour, label=label, markersize=4, **style)
    for name, (label, colour) in FLAT.items():
        points = series(rows, name)
        if points:
            axes.axhline(points[-1][1], color=colour, label=label, linewidth=0.9, linestyle="--")
    axes.set_xlabel("questions")
    axes.set_ylabel("how right the answers are, 0 to 1")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def card(done: TrainedPolicy) -> str:
    """The README of a policy: what it was trained on, what it gives beside an even spread, how to load it."""
    keep = done.recipe["held_out_keep"]
    table = "\n".join(
        f"| {label} | {done.figure(name):.4f} | {done.figure(name + '_exact'):.4f} |"
        for name, label in (
            ("all", "all"), ("even", f"{keep:g}, spread evenly"), ("held_out", f"{keep:g}, by this policy"),
        )
    )  # fmt: skip
    untrained = done.held_out[0][1]
    fields = "\n".join(f"| {k} | {v} |" for k, v in done.recipe.items())
    data = "\n".join(f"| {k} | {v} |" for k, v in done.data.items())
    return f"""# A CaCoVID policy for {done.model}

Trained on {done.recipe["questions"]} questions, by the reward "{done.recipe["reward"]}" of the frozen model's answers.
{f"{chr(10)}Note: {done.note}.{chr(10)}" if done.note else ""}
```python
mmeff.accelerate(model, "cacovid", policy=folder, keep={keep:g})
```

## Held-out questions

Probability per token of the right answer, and share of answers of which every token was the most likely one.
Before training the policy's probability was {untrained:.4f}.

| video tokens kept | probability | exact |
|---|---|---|
{table}

![rewards](curve.png)

## Questions

| | |
|---|---|
{data}

## Recipe

| field | value |
|---|---|
{fields}
"""
