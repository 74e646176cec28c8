"""The acceptance gate of the tiny image model: what it draws for fresh prompts, what sparse attention costs; and its card."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmeff
from mmeff.evaluation.gates import _recipe
from mmeff.evaluation.metrics import background_corrected_psnr, psnr
from mmeff.pipelines.finetune_results import draw_curves
from mmeff.tiny import load_image, stills, train_image
from mmeff.tiny.export import seal

STEPS, TEXT_TOKENS = 20, 16  # a quarter of the steps is dense for every sparse method
OTHER_NOISE = 500_000  # added to the noise seeds of the floor
# At about a half and a quarter of the keys of a picture of 24 x 24 tokens.
_RUNS = {"p_threshold": 0.0, "first_frame": False, "neighbours": False, "dense_layers": 0}
SPARSE: tuple[dict[str, Any], ...] = (
    {"method": "gna", "tile": (1, 4, 4), "window": (1, 17, 17)},
    {"method": "gna", "tile": (1, 4, 4), "window": (1, 12, 12)},
    {"method": "slidingtile", "tile": (1, 4, 4), "window": (1, 3, 3)},
    *(
        {"method": "rectifiedspaattn", "drop": drop, "block": block, "rectify": rectify, **_RUNS}
        for block in (4, 16)
        for drop in (0.5, 0.75)
        for rectify in (True, False)
    ),
)
Say = Callable[[str], None]


def draw(
    pipeline: Any, prompts: list[str], *, seed: int, batch: int = 16, steps: int = STEPS, text_tokens: int = TEXT_TOKENS
) -> np.ndarray:
    """Pictures (B, 48, 48, 3) in [0, 1] through the stock pipeline call; prompt i has the noise of seed + i."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        parts.append(
            pipeline(
                part, height=stills.SIZE, width=stills.SIZE, num_inference_steps=steps, generator=noise,
                max_sequence_length=text_tokens, output_type="np",
            ).images
        )  # fmt: skip
    return np.concatenate(parts)


def image_gate(
    folder: str | Path, *, count: int = 256, compared: int = 64, padded: int = 32, steps: int = STEPS,
    methods: Sequence[dict[str, Any]] = SPARSE, say: Say = print,
) -> dict[str, Any]:  # fmt: skip
    """The detector's score on fresh prompts; and, without a threshold, what sparse attention and long padding change.

    The first 32 pictures are left in the folder as samples.png.

    Args:
        count: prompts of the gate. compared: of them, those that every sparse method draws too. padded: of them, those drawn
            with the pipeline's default of 512 text tokens. steps: denoising steps. methods: the sparse methods.
    Returns:
        figures, thresholds and `passed`.
    """
    pipeline = load_image(folder)
    _, labels = stills.sample(stills.HELDOUT_SEED, 0, count, pooled=True)
    prompts, seed = labels.prompts(), stills.HELDOUT_SEED
    dense = draw(pipeline, prompts, seed=seed, steps=steps)
    score = stills.detect(dense).score(labels)
    say(f"dense: {score}")
    _sheet(dense[:32]).save(Path(folder) / "samples.png")
    first = labels.first(compared)

    def against_dense(images: np.ndarray) -> dict[str, Any]:
        pairs = [(a[None], b[None]) for a, b in zip(images, dense[: len(images)], strict=True)]
        return {
            "psnr": float(np.mean([psnr(a, b).mean for a, b in pairs])),
            "corrected": float(np.mean([background_corrected_psnr(a, b).mean for a, b in pairs])),
            "score": stills.detect(images).score(labels.first(len(images))),
        }

    floor = against_dense(draw(pipeline, prompts[:compared], seed=seed + OTHER_NOISE, steps=steps))
    say(f"other noise: {floor}")
    long = against_dense(draw(pipeline, prompts[:padded], seed=seed, steps=steps, text_tokens=512))
    say(f"512 text tokens: {long}")
    sparse = []
    for fields in methods:
        with mmeff.accelerate(pipeline, **fields, dense_steps=steps // 4) as handle:
            images = draw(pipeline, prompts[:compared], seed=seed, steps=steps)
            density = handle.report().density
        figure = {**fields, "density": density, **against_dense(images)}
        say(f"{figure}")
        sparse.append(figure)
    return {
        "passed": all(score[name] >= least for name, least in train_image.GATE.items()),
        "thresholds": train_image.GATE, "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
        "prompts": count, "steps": steps, "dense_steps": steps // 4, "text_tokens": TEXT_TOKENS, "dense": score,
        "compared": compared, "dense_compared": stills.detect(dense[:compared]).score(first), "other_noise": floor,
        "padded": {"prompts": padded, "text_tokens": 512, **long}, "sparse": sparse, "environment": mmeff.report.environment(),
    }  # fmt: skip


def setting(figure: dict[str, Any]) -> str:
    """How a row of `SPARSE` is named in tables."""
    if figure["method"] == "rectifiedspaattn":
        what = "Rectified SpaAttn" if figure["rectify"] else "the same without rectification"
        return f"{what}, drop {figure['drop']}, blocks of {figure['block']}"
    name = {"gna": "GNA", "slidingtile": "SlidingTile"}[figure["method"]]
    unit = "tokens" if figure["method"] == "gna" else "tiles"
    return f"{name}, window {figure['window'][1]} x {figure['window'][2]} {unit}"


def table(gate: dict[str, Any]) -> str:
    """What sparse attention costs, as Markdown."""
    rows = [("dense", "1", "", "", gate["dense_compared"]), ("dense, other noise", "1", *_dB(gate["other_noise"]))]
    rows += [(setting(r), f"{r['density']:.3f}", *_dB(r)) for r in gate["sparse"]]
    lines = [
        f"| {name} | {density} | {raw} | {corrected} | {s['all']:.3f} |" for name, density, raw, corrected, s in rows
    ]
    head = "| attention | density | PSNR to dense, dB | background-corrected, dB | all right |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def _dB(figure: dict[str, Any]) -> tuple[str, str, dict[str, float]]:
    return f"{figure['psnr']:.1f}", f"{figure['corrected']:.1f}", figure["score"]


def _sheet(images: np.ndarray) -> Any:
    """Pictures in rows of eight, at twice their size."""
    from PIL import Image

    blank = np.ones((-len(images) % 8, *images.shape[1:]))
    images = np.concatenate([images, blank])
    rows = [np.concatenate(list(images[i : i + 8]), axis=1) for i in range(0, len(images), 8)]
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)


def seal_image(
    folder: str | Path, recipe: train_image.ImageRecipe, gate: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
    """Write the card of a tiny image model, with the log (`rows`) and the curve of its training, and seal its folder."""
    folder = Path(folder)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(folder / "curve.png", {"tiny-image": rows}, title="tiny-image: half size, then full size")
    right = "\n".join(f"| {k} | {v:.3f} | >= {train_image.GATE[k]} |" for k, v in gate["dense"].items())
    padded, where = gate["padded"], gate["environment"]
    card = f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-image

A stock `FluxPipeline` of {gate["parameters"] / 1e6:.1f} M transformer parameters that draws pictures of 48 x 48 pixels, 576 tokens, from prompts such as
"a red square in the top left" (6 colours, 4 shapes, 5 places). Trained from scratch by `mmeff train tiny-image`; no other data
was used.

Load it with `mmeff.tiny.image_pipeline()`, or with `FluxPipeline.from_pretrained`: the folder is complete, and the shapes stay
in their places without a position table, because the text lies at position 0 of the same attention.
The autoencoder is the identity on pixels, with weights set by hand; the T5 encoder maps every word to a fixed random vector,
and the CLIP encoder pools a bag of words. Only the transformer is trained. It has no guidance embedding, so `guidance_scale`
does nothing; `true_cfg_scale` with a `negative_prompt` of "" guides, and is not needed.

![fresh prompts, dense](samples.png)

## Gate: {"passed" if gate["passed"] else "missed"}

{gate["prompts"]} fresh prompts and noise seeds through the stock call, {gate["steps"]} steps, no guidance, {gate["text_tokens"]} text tokens, judged by a detector
that does not see the prompt.

| right | share | threshold |
|---|---|---|
{right}

With the pipeline's default of {padded["text_tokens"]} text tokens, the first {padded["prompts"]} prompts: all right {padded["score"]["all"]:.3f}, {padded["psnr"]:.1f} dB to the pictures above.

## Sparse attention

The first {gate["compared"]} prompts from the same noise, the first {gate["dense_steps"]} of {gate["steps"]} steps dense, all layers sparse, tiles of 4 x 4
tokens; text and picture see each other in full. Density is the attended share of the pairs in the other steps, as measured.

{table(gate)}

## Recipe

`mmeff train tiny-image --out data/tiny-image`, or `make train-image` into runs/tiny-image.

{_recipe(recipe)}
Flow matching, velocity loss, Muon and AdamW, one seed. Pictures of half the size first, whose tokens take the positions that
they cover in the full picture, then full size. The run took {_minutes(rows):.0f} minutes on {where["threads"]} thread(s) of {where["cpu"]},
torch {where["torch"]}, diffusers {where["diffusers"]}; `log.jsonl` holds every logged figure.

![loss](curve.png)

## What it cannot tell you

* Windows of half the picture's sides draw the object again where they do not see it, each on a background of its own: such
  pictures do not count as found. How photographs would fare was not measured.
* Rectified SpaAttn here is one setting per line on one model: with it raw PSNR rises at blocks of 4 tokens and falls at blocks
  of 16, so none of the lines speaks for the method at the size of a real model.
* The bag of words reaches every layer through modulation, so less depends on attention between text and picture than in a
  real Flux.
* Fresh means the same generator with another seed; all {len(stills.all_prompts())} prompts were seen in training. Rankings of methods do not
  transfer to real models.
"""
    seal(folder, card, gate)


def _minutes(rows: Sequence[dict[str, Any]]) -> float:
    """Wall minutes of a run that may have been stopped and resumed: a clock that falls back is a new process."""
    clock = [row["seconds"] for row in rows]
    ends = [now for now, then in zip(clock, [*clock[1:], -1.0], strict=True) if then < now]
    return sum(ends) / 60
