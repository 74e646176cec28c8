"""Acceptance gates of the tiny models, and the cards that state their figures.

A gate runs on the exported folder, loaded as a user loads it. It records figures whether or not they pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmeff
from mmeff.evaluation.questions import ask_motions, ask_scenes
from mmeff.tiny import (
    clips,
    load_video,
    load_vlm,
    motions,
    scenes,
    train_video,
    train_video_vlm,
    train_vlm,
    video_vlm_model,
    vlm_model,
)  # fmt: skip
from mmeff.tiny.export import seal

KEEP = 0.25
VLM_GATE = {"exact_match": 0.90, "random_cost": 0.12, "selected_cost": 0.04}
VIDEO_VLM_GATE = {"exact_match": 0.85, "direction": 0.80}
Say = Callable[[str], None]


def class_attention(net: Any, pixels: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """The quarter of the visual tokens that the class token of the feature layer attends to most (head mean)."""
    tower = net.model.vision_tower
    seen: list[torch.Tensor] = []
    attention = tower.encoder.layers[net.config.vision_feature_layer].self_attn

    def capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        heads = module.num_heads
        q = module.q_proj(hidden[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
        k = module.k_proj(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        seen.append(weights.mean(dim=1)[:, 0, 1:])

    hook = attention.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        tower(pixels)
    finally:
        hook.remove()
    return seen[-1].topk(round(KEEP * vlm_model.VISUAL), dim=1).indices.sort(dim=1).values


def vlm_gate(folder: str | Path, *, held_out: int = 2000, pruning: int = 1536, say: Say = print) -> dict[str, Any]:
    """Exact match on held-out questions, and what pruning to a quarter of the tokens costs.

    A model whose tower has no class token is judged without that token's attention.

    Args:
        held_out: questions for the accuracy gate. pruning: questions for each pruning figure.
    Returns:
        figures, thresholds and `passed`.
    """
    model, processor = load_vlm(folder)
    held = ask_scenes(model, processor, seed=scenes.HELDOUT_SEED, count=held_out)
    say(f"held out: {held.exact_match:.4f} of {held.questions}")
    with torch.inference_mode():
        dense = train_vlm.evaluate(model, seed=scenes.PRUNING_SEED, count=pruning)
        randomly = train_vlm.evaluate(
            model,
            seed=scenes.PRUNING_SEED,
            count=pruning,
            policy=train_vlm.random_tokens(round(KEEP * vlm_model.VISUAL)),
        )
        by_class = (
            train_vlm.evaluate(model, seed=scenes.PRUNING_SEED, count=pruning, policy=class_attention)
            if model.config.vision_feature_select_strategy == "default" else None
        )  # fmt: skip
    say(
        f"at the input: dense {dense['exact_match']:.4f}, random {randomly['exact_match']:.4f}"
        + (f", class token {by_class['exact_match']:.4f}" if by_class else "")
    )
    before = ask_scenes(model, processor, seed=scenes.PRUNING_SEED, count=pruning)
    with mmeff.accelerate(model, "fastv", layer=2, keep=KEEP):
        after = ask_scenes(model, processor, seed=scenes.PRUNING_SEED, count=pruning)
    say(f"FastV at layer 2: {after.exact_match:.4f}, dense on the same questions {before.exact_match:.4f}")
    costs = {
        "random_cost": dense["exact_match"] - randomly["exact_match"],
        **({"class_token_cost": dense["exact_match"] - by_class["exact_match"]} if by_class else {}),
        "fastv_cost": before.exact_match - after.exact_match,
    }
    best = min(cost for name, cost in costs.items() if name != "random_cost")
    passed = (
        held.exact_match >= VLM_GATE["exact_match"]
        and costs["random_cost"] >= VLM_GATE["random_cost"]
        and best <= VLM_GATE["selected_cost"]
    )
    return {
        "passed": passed, "thresholds": VLM_GATE, "keep": KEEP, "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": {"questions": held.questions, "exact_match": held.exact_match, "kinds": held.kinds},
        "input_dense": dense, "input_random": randomly, **({"input_class_token": by_class} if by_class else {}),
        "fastv": {"questions": after.questions, "exact_match": after.exact_match, "kinds": after.kinds},
        "fastv_dense": {"questions": before.questions, "exact_match": before.exact_match},
        "costs": costs, "environment": mmeff.report.environment(),
    }  # fmt: skip


def video_vlm_gate(folder: str | Path, *, held_out: int = 1500, pruning: int = 512, say: Say = print) -> dict[str, Any]:
    """Exact match on held-out questions about clips, overall and on directions; and, without a threshold, what pruning costs.

    Args:
        held_out: questions for the gate. pruning: questions for each pruning figure.
    Returns:
        figures, thresholds and `passed`.
    """
    model, processor = load_vlm(folder)
    held = ask_motions(model, processor, seed=motions.HELDOUT_SEED, count=held_out)
    say(f"held out: {held.exact_match:.4f} of {held.questions}, direction {held.kinds['direction']:.4f}")
    some = train_video_vlm.random_tokens(round(KEEP * video_vlm_model.VISUAL))
    with torch.inference_mode():
        dense = train_video_vlm.evaluate(model, seed=motions.PRUNING_SEED, count=pruning)
        randomly = train_video_vlm.evaluate(model, seed=motions.PRUNING_SEED, count=pruning, policy=some)
    say(f"at the input: dense {dense['exact_match']:.4f}, random {randomly['exact_match']:.4f}")
    before = ask_motions(model, processor, seed=motions.PRUNING_SEED, count=pruning)
    with mmeff.accelerate(model, "fastv", layer=2, keep=KEEP):
        after = ask_motions(model, processor, seed=motions.PRUNING_SEED, count=pruning)
    say(f"FastV at layer 2: {after.exact_match:.4f}, dense on the same questions {before.exact_match:.4f}")
    figures = {"exact_match": held.exact_match, "direction": held.kinds["direction"]}
    return {
        "passed": all(figures[name] >= least for name, least in VIDEO_VLM_GATE.items()),
        "thresholds": VIDEO_VLM_GATE, "keep": KEEP,
        "held_out": {"questions": held.questions, "exact_match": held.exact_match, "kinds": held.kinds},
        "input_dense": dense, "input_random": randomly,
        "fastv": {"questions": after.questions, "exact_match": after.exact_match, "kinds": after.kinds},
        "fastv_dense": {"questions": before.questions, "exact_match": before.exact_match},
        "costs": {
            "random_cost": dense["exact_match"] - randomly["exact_match"],
            "fastv_cost": before.exact_match - after.exact_match,
        },
        "environment": mmeff.report.environment(),
    }  # fmt: skip


def video_gate(
    folder: str | Path, *, count: int = 64, batch: int = 16, steps: int = 20, guidance: float = 2.0, say: Say = print
) -> dict[str, Any]:
    """The detector's score on fresh prompts through the stock pipeline call, and PSNR against density for one policy."""
    from mmeff.evaluation.metrics import psnr

    pipeline = load_video(folder)
    _, labels = clips.sample(clips.HELDOUT_SEED, 0, count, frames=1, pooled=True)
    prompts = labels.prompts()

    def run() -> np.ndarray:
        parts = []
        for start in range(0, count, batch):
            part = prompts[start : start + batch]
            noise = [torch.Generator().manual_seed(clips.HELDOUT_SEED + start + i) for i in range(len(part))]
            parts.append(
                pipeline(
                    part, height=clips.SIZE, width=clips.SIZE, num_frames=clips.FRAMES, num_inference_steps=steps,
                    guidance_scale=guidance, generator=noise, output_type="np",
                ).frames
            )  # fmt: skip
        return np.concatenate(parts)

    dense = run()
    score = clips.detect(dense).score(labels)
    say(f"dense: {score}")
    sparse = []
    for fields in ({**TINY_RADIAL, "decay": 1.0, "drop_below": 8}, TINY_RADIAL):
        with mmeff.accelerate(pipeline, "radial", **fields, dense_steps=steps // 4) as handle:
            video = run()
            density = handle.report().density
        figure = {
            **fields, "density": density, "psnr": float(np.mean([psnr(a, b).mean for a, b in zip(video, dense, strict=True)])),
            "score": clips.detect(video).score(labels),
        }  # fmt: skip
        say(f"Radial: {figure}")
        sparse.append(figure)
    falls = sparse[0]["psnr"] > sparse[-1]["psnr"] and sparse[0]["density"] > sparse[-1]["density"]
    passed = all(score[name] >= least for name, least in train_video.GATE.items()) and falls
    return {
        "passed": passed, "thresholds": train_video.GATE, "prompts": count, "steps": steps, "guidance": guidance,
        "dense": score, "radial": sparse, "psnr_falls_with_density": falls, "environment": mmeff.report.environment(),
    }  # fmt: skip


# Radial for the tiny grid of 9 x 6 x 6 tokens: blocks and the dropping constant scaled to 36 tokens a frame.
TINY_RADIAL: dict[str, Any] = {"block": 4, "dense_layers": 0, "drop_below": 32, "decay": 0.2}


def seal_vlm(folder: str | Path, recipe: train_vlm.VlmRecipe, gate: dict[str, Any]) -> None:
    """Write the card of a tiny VLM and seal its folder."""
    kinds = "\n".join(f"| {k} | {v:.3f} |" for k, v in gate["held_out"]["kinds"].items())
    costs, held = gate["costs"], gate["held_out"]
    card = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny-vlm

A stock `LlavaForConditionalGeneration` of 1.6 M parameters (CLIP vision of 4 layers, Llama of 6 layers, 144 visual tokens of
96 x 96 pixels) that answers seven kinds of questions about generated scenes. Trained from scratch by
`mmeff train tiny-vlm`; no other data was used.

## Gate: {"passed" if gate["passed"] else "missed"}

| figure | value | threshold |
|---|---|---|
| exact match, {held["questions"]} held-out questions through `generate` | {held["exact_match"]:.3f} | >= {VLM_GATE["exact_match"]} |
| cost of random pruning at the input to {KEEP:.0%} ({gate["input_random"]["questions"]} questions) | {costs["random_cost"]:.3f} | >= {VLM_GATE["random_cost"]} |
| cost of the class token's attention at the input to {KEEP:.0%} | {costs["class_token_cost"]:.3f} | the better of these two <= {VLM_GATE["selected_cost"]} |
| cost of FastV at layer 2 to {KEEP:.0%} ({gate["fastv"]["questions"]} questions) | {costs["fastv_cost"]:.3f} | |

| kind of question | exact match |
|---|---|
{kinds}

## Recipe

{_recipe(recipe)}
Stage 1 trains the vision tower with auxiliary heads (patch labels, object masks, patch positions, object centres, a
multi-label head on the class token); stage 2 the language model on frozen features with {recipe.read_tokens} of 144 tokens;
stage 3 everything together. Muon and AdamW, one seed.

## What it cannot tell you

* In stage 2 and in half of the batches of stage 3 the language model saw only {", ".join(map(str, sorted({recipe.read_tokens, *recipe.join_tokens})))} of
  144 tokens, those on objects first. The model was trained to tolerate pruning that keeps objects.
* Held-out means the same generator with another seed: there is no distribution shift.
* It has 144 tokens and 128 channels: neither its speed nor its ranking of methods transfers to real models. Use it to
  check code and the shape of cost curves.
"""
    seal(folder, card, gate)


def seal_video_vlm(folder: str | Path, recipe: train_video_vlm.VideoVlmRecipe, gate: dict[str, Any]) -> None:
    """Write the card of a tiny video VLM and seal its folder."""
    held, costs = gate["held_out"], gate["costs"]
    dense, randomly = gate["input_dense"], gate["input_random"]
    kinds = "\n".join(f"| {k} | {v:.3f} | {dense[k]:.3f} | {randomly[k]:.3f} |" for k, v in held["kinds"].items())
    seen = ", ".join(map(str, sorted({recipe.read_tokens, *recipe.join_tokens})))
    card = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
---
# tiny-video-vlm

A stock `LlavaForConditionalGeneration` of 1.6 M parameters (CLIP vision of 4 layers, Llama of 6 layers) that answers eight
kinds of questions about clips of {motions.FRAMES} frames of {motions.SIZE} x {motions.SIZE} pixels with one to three shapes, each still or moving.
Every frame is one image of the prompt, {video_vlm_model.PER_FRAME} visual tokens behind its word `frame1` ... `frame{motions.FRAMES}`; {video_vlm_model.VISUAL} in all. The vision tower sees single frames:
only the language model can compare them. Trained by `mmeff train tiny-video-vlm` from the weights of tiny-vlm; no other data
was used.

Load it with `mmeff.tiny.video_vlm()`; the processor's chat template, or `mmeff.tiny.motions.prompt`, writes the prompt.

## Gate: {"passed" if gate["passed"] else "missed"}

| figure | value | threshold |
|---|---|---|
| exact match, {held["questions"]} held-out questions through `generate` | {held["exact_match"]:.3f} | >= {VIDEO_VLM_GATE["exact_match"]} |
| exact match on directions (five answers) | {held["kinds"]["direction"]:.3f} | >= {VIDEO_VLM_GATE["direction"]} |
| cost of random pruning at the input to {KEEP:.0%} ({gate["input_random"]["questions"]} questions) | {costs["random_cost"]:.3f} | none |
| cost of FastV at layer 2 to {KEEP:.0%} ({gate["fastv"]["questions"]} questions) | {costs["fastv_cost"]:.3f} | none |

| kind of question | held out | pruning split, dense | pruning split, random {KEEP:.0%} at the input |
|---|---|---|---|
{kinds}

## Data

`mmeff.tiny.motions.sample(seed, index, ...)` draws every clip and question; a split is a seed: training {motions.TRAIN_SEED} + the recipe's
seed, gate while training {motions.GATE_SEED}, held out {motions.HELDOUT_SEED}, pruning {motions.PRUNING_SEED}.

## Recipe

{_recipe(recipe)}
Stage 1 trains the vision tower on single frames with auxiliary heads; it then stays as it is. Stages 2 to 4 train the language
model and the projector; linear heads behind language layer {recipe.motion_layer} ask every visual token on an object how far that object has come
and which way it moves. All heads are dropped. Muon and AdamW, one seed.

## What it cannot tell you

* In stages 2 and 3 and in half of the batches of stage 4 the language model saw only {seen} of {video_vlm_model.VISUAL} tokens, those on
  objects first. The model was trained to tolerate pruning that keeps objects.
* The motion heads made the first {recipe.motion_layer} language layers write motion into the visual tokens. In a real model it may sit elsewhere.
* Held-out means the same generator with another seed: there is no distribution shift.
* Its speed and its ranking of methods do not transfer to real models. Use it to check code and the shape of cost curves.
"""
    seal(folder, card, gate)


def seal_video(folder: str | Path, recipe: train_video.VideoRecipe, gate: dict[str, Any]) -> None:
    """Write the card of a tiny video model and seal its folder."""
    rows = "\n".join(f"| {k} | {v:.3f} | >= {train_video.GATE[k]} |" for k, v in gate["dense"].items())
    sparse = "\n".join(
        f"| {r['decay']} | {r['drop_below']} | {r['density']:.3f} | {r['psnr']:.1f} | {r['score']['all']:.3f} |"
        for r in gate["radial"]
    )
    card = f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# tiny-video

A stock `WanPipeline` of 1.1 M transformer parameters that draws 17 frames of 48 x 48 pixels from prompts such as
"a red square moving left" (6 colours, 3 shapes, 4 directions). Trained from scratch by `mmeff train tiny-video`; no other
data was used.

Load it with `mmeff.tiny.video_pipeline()`. Wan places tokens by relative embedding only, and a model this small needs to know
where it is: `transformer/position_table.safetensors` holds one vector per token position, which the loader adds behind the
patch embedding. `WanPipeline.from_pretrained` alone loads and runs the folder, but draws nothing without the table.
The VAE is a linear codec with weights set by hand (2 x 2 pixel averages, two frames per latent frame); the text encoder maps
every word to a fixed random vector.

## Gate: {"passed" if gate["passed"] else "missed"}

{gate["prompts"]} fresh prompts and noise seeds, {gate["steps"]} steps, guidance {gate["guidance"]}, judged by a detector that does not see
the prompt. PSNR to the dense clips falls with density: {"yes" if gate["psnr_falls_with_density"] else "no"}.

| right | share | threshold |
|---|---|---|
{rows}

Radial in blocks of {TINY_RADIAL["block"]} tokens, the first quarter of the steps dense:

| decay | drop_below | density | PSNR to dense, dB | all right |
|---|---|---|---|---|
{sparse}

## Recipe

{_recipe(recipe)}
Flow matching, velocity loss, Muon and AdamW, one seed. Single latent frames first, then whole clips.

## What it cannot tell you

* The position table fixes the coarse layout, so the model depends less on long-range attention than a real one.
* Top-k policies shift its flat backgrounds, which raw PSNR punishes: look at the detector and at PSNR after correcting the
  background as well.
* Held-out means the same generator with another seed. Rankings of methods do not transfer to real models.
"""
    seal(folder, card, gate)


def _recipe(recipe: Any) -> str:
    from dataclasses import asdict

    return "\n".join(
        ["| field | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in asdict(recipe).items() if v != ""), ""]
    )
