"""The acceptance gate of the tiny VLA: closed-loop success, two controls, what pruning costs; and its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import mmeff
from mmeff.evaluation.closed_loop import ClosedLoop, closed_loop
from mmeff.evaluation.gates import _recipe
from mmeff.tiny import load_vla, manipulation, train_vla
from mmeff.tiny.export import seal

VLA_GATE = {"success": 0.90, "blind": 0.10, "other_instruction": 0.35}
PRUNED: tuple[dict[str, Any], ...] = (
    {"method": "vlapruner", "keep": 0.5},
    {"method": "vlapruner", "keep": 0.25},
    {"method": "fastv", "layer": 2, "keep": 0.25},
    {"method": "randompruning", "keep": 0.25},
)
Say = Callable[[str], None]


def vla_gate(
    folder: str | Path, *, episodes: int = 200, control: int = 40, pruning: int = 64, say: Say = print
) -> dict[str, Any]:
    """Success over fresh episodes through the stock processor and `generate`.

    Args:
        episodes: for the dense model. control: for a policy that sees only grey, and for one that is told the instruction of
            another episode. pruning: for each pruning method, beside the dense model's figure on the same episodes.
    Returns:
        figures, thresholds and `passed`.
    """
    model, processor = load_vla(folder)
    run: dict[str, Any] = {"seed": manipulation.HELDOUT_SEED, "batch": 50}
    dense = closed_loop(model, processor, episodes=episodes, **run)
    say(f"dense: {_line(dense)}")
    blind = closed_loop(model, processor, episodes=control, look=lambda images: np.full_like(images, 0.5), **run)
    say(f"blind: {_line(blind)}")
    other = closed_loop(model, processor, episodes=control, hear=lambda texts: [*texts[1:], texts[0]], **run)
    say(f"another episode's instruction: {_line(other)}")
    curve = []
    for fields in PRUNED:
        after = closed_loop(model, processor, episodes=pruning, **run, **fields)
        say(f"{fields}: {_line(after)}")
        curve.append({**fields, **_figures(after)})
    passed = (
        dense.success >= VLA_GATE["success"]
        and blind.success <= VLA_GATE["blind"]
        and other.success <= VLA_GATE["other_instruction"]
    )
    return {
        "passed": passed, "thresholds": VLA_GATE, "horizon": manipulation.HORIZON, "dense": _figures(dense),
        "blind": _figures(blind), "other_instruction": _figures(other),
        "before_pruning": _figures(dense.first(pruning)), "pruned": curve, "environment": mmeff.report.environment(),
    }  # fmt: skip


def _figures(found: ClosedLoop) -> dict[str, Any]:
    """Without times: a gate runs on whatever machine there is, beside whatever runs there."""
    return {k: v for k, v in found.to_dict().items() if k not in ("seconds", "control_steps")}


def _line(found: ClosedLoop) -> str:
    return f"{found.success:.3f} ± {found.error:.3f} of {found.episodes}, {found.steps:.1f} steps"


def _steps(row: dict[str, Any]) -> str:
    return "none" if row["steps"] is None else f"{row['steps']:.1f}"


def seal_vla(folder: str | Path, recipe: train_vla.VlaRecipe, gate: dict[str, Any], *, note: str = "") -> None:
    """Write the card of a tiny VLA and seal its folder.

    Args:
        note: what a reader must know about how these weights came about, beyond the recipe.
    """
    rows = "\n".join(
        f"| {what} | {gate[key]['episodes']} | {gate[key]['success']:.3f} ± {gate[key]['error']:.3f} | {sign} {VLA_GATE[name]} |"
        for what, key, name, sign in (
            ("as it is", "dense", "success", ">="),
            ("it sees only grey", "blind", "blind", "<="),
            ("it is told another episode's instruction", "other_instruction", "other_instruction", "<="),
        )
    )
    pruned = "\n".join(
        f"| {name} | {row['episodes']} | {row['success']:.3f} ± {row['error']:.3f} | {row['steps'] or float('nan'):.1f} |"
        for name, row in [
            ("dense", gate["before_pruning"]),
            *(
                (f"{r['method']}, keep {r['keep']:g}" + (f", layer {r['layer']}" if "layer" in r else ""), r)
                for r in gate["pruned"]
            ),
        ]
    )
    more = f"\n\n{note.strip()}" if note else ""
    card = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: robotics
---
# tiny-vla

A stock `LlavaForConditionalGeneration` of 1.6 M parameters (CLIP vision of 4 layers, Llama of 6 layers, 144 visual tokens of
96 x 96 pixels) that acts in a small manipulation task drawn from above: "put the red square on the blue ring". Its answer is
three action words such as `x0 y3 close`: a step along x and y (five bins, up to {manipulation.MOVES[-1]:g} pixels) and the gripper's command.
Trained by `mmeff train tiny-vla` from the weights of tiny-vlm; no other data was used.

```python
from mmeff.evaluation.closed_loop import closed_loop
from mmeff.tiny import manipulation, vla

model, processor = vla()
print(closed_loop(model, processor, seed=manipulation.HELDOUT_SEED, episodes=32, method="vlapruner", keep=0.25))
```

## Gate: {"passed" if gate["passed"] else "missed"}

Share of fresh episodes that succeed within {gate["horizon"]} control steps (± one standard error, after Agresti and Coull), through the stock processor and
`generate`, with {manipulation.OBJECTS} objects and {manipulation.RINGS} rings on the table. Successful episodes take {_steps(gate["dense"])} steps on average.

| the policy | episodes | success | threshold |
|---|---|---|---|
{rows}

What pruning of visual tokens costs, on the first episodes of the same set (no threshold; VLA-Pruner drops nothing in the first
three control steps of an episode):

| method | episodes | success | steps of the successful |
|---|---|---|---|
{pruned}

## Recipe

{_recipe(recipe)}
Behaviour cloning of a scripted expert, some of whose actions are replaced by random ones so that it must recover. `see` trains
the vision tower with auxiliary heads (what owns a patch, which pixels, where its centre is); `read` the language model on frozen
features with {recipe.read_tokens} of 144 tokens; `join` everything; `drop` everything, and in half of its batches only
{", ".join(map(str, recipe.drop_tokens))} of 144 tokens, from which the tower does not learn. Auxiliary heads at the words for object and ring
are taught where these are. Every {recipe.aggregate_every} steps of `join` and `drop` the policy acts in {recipe.aggregate_episodes} episodes of its own,
and from then on half of each batch are states that it ran into, labelled by the expert (DAgger). Muon and AdamW, one seed.{more}

## What it cannot tell you

* In `read` and in half of the batches of `drop` background tokens were dropped, tokens of gripper, objects and rings kept
  first. The model was trained to tolerate pruning that keeps these; a never-pruned policy may lose more.
* The world is a picture and its rules are arithmetic: there is no physics, no camera, no arm. Fresh means the same generator
  with another seed. Success rates say nothing about robots, and rankings of methods do not transfer to real policies.
* The expert is nearly optimal and its states are fully visible in one picture, so history matters less than for a real task.
"""
    seal(folder, card, gate)
