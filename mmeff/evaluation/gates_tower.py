"""The card of a tiny VLM that sees through one of our vision backbones; its gate is `mmeff.evaluation.gates.vlm_gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmeff.evaluation.gates import KEEP, VLM_GATE
from mmeff.tiny import train_vlm
from mmeff.tiny.export import seal


def seal_tower(folder: str | Path, recipe: train_vlm.VlmRecipe, gate: dict[str, Any]) -> None:
    """Write the card and seal the folder."""
    costs, held, tower = gate["costs"], gate["held_out"], recipe.tower
    kinds = "\n".join(f"| {k} | {v:.3f} |" for k, v in held["kinds"].items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in vars(recipe).items())
    seen = ", ".join(map(str, sorted({recipe.read_tokens, *recipe.join_tokens})))
    card = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny-vlm-{tower}

A stock `LlavaForConditionalGeneration` of {gate["parameters"] / 1e6:.1f} M parameters that answers seven kinds of questions about generated scenes.
It sees through a small member of the family of `{tower}`: one of its feature maps, 144 visual tokens of 96 x 96 pixels; the
language model is a Llama of 6 layers. Trained from scratch by `mmeff train tiny-vlm --tower {tower}`; no other data was used.

transformers builds the tower as a timm model, whose name `mmeff` registers:

    import mmeff.vision_backbones
    model = LlavaForConditionalGeneration.from_pretrained(folder)

## Gate: {"passed" if gate["passed"] else "missed"}

| figure | value | threshold |
|---|---|---|
| exact match, {held["questions"]} held-out questions through `generate` | {held["exact_match"]:.3f} | >= {VLM_GATE["exact_match"]} |
| cost of random pruning at the input to {KEEP:.0%} ({gate["input_random"]["questions"]} questions) | {costs["random_cost"]:.3f} | >= {VLM_GATE["random_cost"]} |
| cost of FastV at layer 2 to {KEEP:.0%} ({gate["fastv"]["questions"]} questions) | {costs["fastv_cost"]:.3f} | <= {VLM_GATE["selected_cost"]} |

| kind of question | exact match |
|---|---|
{kinds}

## Recipe

| field | value |
|---|---|
{rows}

Stage 1 trains the tower with auxiliary heads (patch labels, object masks, patch positions, object centres, a multi-label head on
the mean token); stage 2 the language model on features of a tower that stays as it is, with {recipe.read_tokens} of 144 tokens; stage 3
everything together. Muon and AdamW, one seed.

## What it cannot tell you

* In stage 2 and in half of the batches of stage 3 the language model saw only {seen} of 144 tokens, those on objects first.
  The model was trained to tolerate pruning that keeps objects.
* Held-out means the same generator with another seed: there is no distribution shift.
* The tower has two stages at most and 128 channels. It shows that a family works as a tower, not how good it is as one, and ranks
  neither families nor methods.
"""
    seal(folder, card, gate)
