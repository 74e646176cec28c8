"""Two experiments of training under a sparse attention, small enough for one CPU core: what they claim, they measure.

* `long`: the embedded tiny video model gets clips several times longer than it was trained on. An adapter is tuned under
  Radial, and another one dense, on the same clips from the same seed. Compared: the held-out loss untuned and tuned. The claim:
  tuned under the method is below untuned under the method, and within 5 % of tuned dense.
* `from_start`: the recipe of the tiny video model, shorter, with VMoBA installed while whole clips are trained, and its dense
  twin. Every model is then judged under both attentions.

Long clips. Length is counted in tokens: 35 and 71 frames make 2 and 4 times the latent frames of 17. The same way is spread
over all of them, so that shapes stay inside: longer clips are slower ones. The time coordinate of the position table is
interpolated to the new length (see `video_model.PositionTable`); Wan's rotary embedding runs on to distances that the model
never saw. Both hold for tuned and untuned alike.

Runs resume from their folders, and the two runs of an experiment may be made by two processes (`only`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmeff import tiny
from mmeff.accelerate import accelerate
from mmeff.diffusion_attn._base import SparseAttention
from mmeff.pipelines.finetune import FinetuneRecipe, Progress, finetune, held_out_loss
from mmeff.pipelines.finetune_data import ClipSize, GeneratedClips
from mmeff.pipelines.finetune_models import trainable
from mmeff.pipelines.finetune_results import Finetuned, draw_curves
from mmeff.report import environment
from mmeff.tiny import clips, train_video, video_model
from mmeff.tiny.export import export_video
from mmeff.training import logged

# Radial on frames of 6 x 6 tokens: three blocks to a frame, and the dropping constant scaled as the frame is; the first layer
# dense, as the authors have it.
LONG_RADIAL: dict[str, Any] = {"block": 12, "drop_below": 32, "decay": 0.2, "dense_layers": 1}
# VMoBA on the grid 9 x 6 x 6: chunks of one frame, of a quarter of all frames, and of a third of the frames of a quarter.
START_VMOBA: dict[str, Any] = {"chunks": ((1,), (3, 3), (3, 3, 3))}
HELD_OUT = 64  # clips that models trained from the start are judged on
WITHIN = 1.05  # tuned under the method against tuned dense
COMPARISON = "comparison.json"
Which = Literal["sparse", "dense"]
WHICH: tuple[Which, ...] = ("sparse", "dense")


# -------------------------------------------------------------------- longer clips


def long_recipe(times: int, method: SparseAttention | None, *, steps: int = 400, seed: int = 0) -> FinetuneRecipe:
    """The recipe of both runs; only the method differs."""
    return FinetuneRecipe(
        method=method, lora_rank=32, steps=steps, batch=4, lr=3e-3, warmup=10, constant=0.5, seed=seed,
        frames=clips.stretched(times), height=clips.SIZE, width=clips.SIZE, sigma_std=1.2, text_tokens=16,
        held_out=16, held_out_levels=4, held_out_every=50, checkpoint_every=25,
    )  # fmt: skip


def long(
    times: int,
    method: SparseAttention,
    folder: str | Path,
    out: str | Path,
    *,
    steps: int = 400,
    seed: int = 0,
    only: Which | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Any] | None:
    """Tune on clips `times` longer, under the method and dense, and compare.

    Args:
        times: how many times the tokens. folder: of the two runs. out: of the results.
        only: make one of the two runs, for a second process to make the other.
        progress: gives the callback of a run by its name.
    Returns: what was written to `comparison.json`; None where `only` left nothing to compare.
    """
    done: dict[str, Finetuned] = {}
    for which in WHICH if only is None else (only,):
        recipe = long_recipe(times, method if which == "sparse" else None, steps=steps, seed=seed)
        tick = None if progress is None else progress(which)
        pipeline = tiny.video_pipeline()
        done[which] = finetune(
            pipeline, GeneratedClips(), recipe, Path(folder) / which, out=Path(out) / which, progress=tick
        )
    return None if only is not None else _compare_long(times, method, done, Path(out))


def _compare_long(times: int, method: SparseAttention, done: dict[str, Finetuned], out: Path) -> dict[str, Any]:
    sparse, dense = done["sparse"], done["dense"]
    ratio = sparse.final / dense.final
    layers = [] if sparse.report is None else sorted(int(layer) for layer in sparse.report["layers"])
    always = sorted(method.dense_layer_ids(len(layers)))
    found = {
        "times": times, "frames": sparse.recipe["frames"], "tokens": times * math.prod(video_model.GRID),
        "method": method.to_dict(), "density": None if sparse.report is None else sparse.report["density"],
        "dense_layers": always, "layers": len(layers),
        "steps": sparse.steps, "untuned_sparse": sparse.untuned, "tuned_sparse": sparse.final,
        "untuned_dense": dense.untuned, "tuned_dense": dense.final, "tuned_sparse_over_tuned_dense": ratio,
        "below_untuned": sparse.final < sparse.untuned, "within": ratio <= WITHIN,
        "passed": sparse.final < sparse.untuned and ratio <= WITHIN, "environment": environment(),
    }  # fmt: skip
    title = f"tiny-video on clips {times} times longer ({found['frames']} frames)"
    draw_curves(out / "curve.png", {method.name(): sparse.rows, "dense": dense.rows}, title=title)
    table = f"""# {title}

Held-out velocity loss, {sparse.recipe["held_out"]} generated clips at {sparse.recipe["held_out_levels"]} noise levels each, the same noise for all. Adapters of rank
{sparse.recipe["lora_rank"]}, {sparse.steps} steps of {sparse.recipe["batch"]} clips, one seed; both runs saw the same clips and noise.

| attention | density | untuned | tuned |
|---|---|---|---|
| {method.name()} | {found["density"]:.3f} | {sparse.untuned:.5f} | {sparse.final:.5f} |
| dense | 1 | {dense.untuned:.5f} | {dense.final:.5f} |

Density is that of the sparse layers, {len(layers) - len(always)} of {len(layers)}; layers kept dense: {", ".join(map(str, always)) or "none"}.

* Tuned under the method below untuned under the method: **{"yes" if found["below_untuned"] else "no"}**.
* Tuned under the method against tuned dense: {ratio:.3f}; at most {WITHIN}: **{"yes" if found["within"] else "no"}**.

![losses](curve.png)

Longer clips are slower ones: the same way is spread over more frames, and the time coordinate of the position table is
interpolated. {tiny.NOTE[0].upper()}{tiny.NOTE[1:]}.
"""
    return _write(out, found, table)


# -------------------------------------------------------------------- from the start


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A model that was trained under one attention: its losses, and what it does under both."""

    rows: list[dict[str, Any]]
    held_out: dict[str, float]  # by attention, "sparse" and "dense"
    detector: dict[str, float]  # under the attention it was trained with


def start_recipe(*, frame_steps: int = 400, clip_steps: int = 700, seed: int = 1) -> train_video.VideoRecipe:
    """The tiny model's recipe, shortened to a quarter of an hour of one core."""
    return replace(train_video.VideoRecipe(seed=seed), frame_steps=frame_steps, clip_steps=clip_steps)


def from_start(
    method: SparseAttention,
    folder: str | Path,
    out: str | Path,
    *,
    recipe: train_video.VideoRecipe,
    only: Which | None = None,
    prompts: int = 64,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Any] | None:
    """Train the tiny model from nothing under the method, and its dense twin, and judge both.

    Args: as `long`; recipe: of both runs; prompts: fresh ones that the detector judges.
    Returns: what was written to `comparison.json`; None where `only` left nothing to compare.
    """
    folder, out = Path(folder), Path(out)
    judged: dict[str, Judged] = {}
    for which in WHICH if only is None else (only,):
        own = method if which == "sparse" else None
        tick = None if progress is None else progress(which)
        student = train_video.train(recipe, folder / which, method=own, progress=tick)
        export_video(student, out / which)
        (out / which / "README.md").write_text(
            f"# tiny-video trained from nothing under {'dense attention' if own is None else own.name()}\n\n"
            f"{tiny.NOTE[0].upper()}{tiny.NOTE[1:]}. See comparison.json beside this folder.\n"
        )
        if only is None:
            with train_video.under(student, own):
                score = train_video.evaluate(student, count=prompts, seed=clips.HELDOUT_SEED)
            losses = _held_out(out / which, method)
            judged[which] = Judged(rows=logged(folder / which), held_out=losses, detector=score)
    return None if only is not None else _compare_start(method, recipe, judged, out, prompts)


def _held_out(folder: Path, method: SparseAttention) -> dict[str, float]:
    """The held-out loss of an exported model, under the method and dense."""
    model, data = trainable(tiny.load_video(folder)), GeneratedClips()
    recipe = FinetuneRecipe(batch=16, held_out=HELD_OUT, text_tokens=16, held_out_levels=4)
    data.prepare(model, ClipSize(frames=clips.FRAMES, height=clips.SIZE, width=clips.SIZE), recipe.held_out, folder)
    dense = held_out_loss(model, data.held_out(), recipe)
    with accelerate(model.transformer, method):
        return {"sparse": held_out_loss(model, data.held_out(), recipe), "dense": dense}


def _compare_start(
    method: SparseAttention, recipe: train_video.VideoRecipe, judged: dict[str, Judged], out: Path, prompts: int
) -> dict[str, Any]:
    sparse, dense = judged["sparse"], judged["dense"]
    found = {
        "method": method.to_dict(), "recipe": vars(recipe), "prompts": prompts,
        "held_out": {"trained " + k: {"under " + j: v for j, v in m.held_out.items()} for k, m in judged.items()},
        "detector": {"trained " + k: m.detector for k, m in judged.items()},
        "ratio": sparse.held_out["sparse"] / dense.held_out["dense"], "environment": environment(),
    }  # fmt: skip
    title = f"tiny-video trained from nothing under {method.name()}"
    draw_curves(out / "curve.png", {method.name(): sparse.rows, "dense": dense.rows}, title=title)
    names = (("sparse", method.name()), ("dense", "dense"))
    rows = "\n".join(
        f"| {name} | {judged[k].held_out['sparse']:.5f} | {judged[k].held_out['dense']:.5f} | "
        f"{judged[k].detector['all']:.3f} |"
        for k, name in names
    )
    table = f"""# {title}

{recipe.frame_steps} steps on single latent frames (dense: a frame is too short to be sparse in), {recipe.clip_steps} on whole clips, from the
same seed on the same clips. Held-out velocity loss at fixed noise on {HELD_OUT} clips; the detector judges {prompts} generated clips under
the attention of training. Training never repeats a clip, so its loss curve is one of unseen clips too.

| trained under | held out, under {method.name()} | held out, dense | detector, all right |
|---|---|---|---|
{rows}

Trained and run under {method.name()} against trained and run dense: {found["ratio"]:.3f}.

![losses](curve.png)

{tiny.NOTE[0].upper()}{tiny.NOTE[1:]}.
"""
    return _write(out, found, table)


def _write(out: Path, found: dict[str, Any], table: str) -> dict[str, Any]:
    (out / "README.md").write_text(table)
    (out / COMPARISON).write_text(json.dumps(found, indent=1) + "\n")
    return found
