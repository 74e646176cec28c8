"""The main job: the models that the library carries, dense and fast, on a page.

Everything here is also reachable piece by piece: `compare` for one model, `ask_scenes` for accuracy.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

import mmeff
from mmeff import tiny
from mmeff.evaluation.compare_video import compare_video
from mmeff.evaluation.compare_vlm import compare_vlm
from mmeff.evaluation.comparison import Comparison, Tick, finish, silent
from mmeff.evaluation.gates import TINY_RADIAL
from mmeff.evaluation.metrics import latency
from mmeff.evaluation.page import Figure, Section, Table
from mmeff.evaluation.pictures import CurvePoint, accuracy_curve
from mmeff.evaluation.questions import ask_scenes
from mmeff.evaluation.run_folder import RunFolder
from mmeff.kernels import block_sparse_attention, record
from mmeff.registry import build
from mmeff.tiny import clips, stills, train_vlm, vlm_model
from mmeff.video_io import read_image

PROMPTS = (
    "a red square moving left",
    "a cyan ring moving down",
    "a yellow cross moving right",
    "a blue square moving up",
)
VIDEO: dict[str, Any] = {
    "height": clips.SIZE, "width": clips.SIZE, "num_frames": clips.FRAMES, "num_inference_steps": 20,
    "guidance_scale": 2.0, "max_sequence_length": 16,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "height": stills.SIZE, "width": stills.SIZE, "num_inference_steps": 20, "max_sequence_length": 16
}  # fmt: skip
DEFAULTS = {"tiny-video": VIDEO, "tiny-image": IMAGE}  # settings of the pipeline call, by embedded model
KEEPS = (0.5, 0.25, 0.125, 0.0625)
CURVE_SEED = 15_000  # a split of the generated scenes that no gate looks at


def run(
    out: str | os.PathLike[str], *, overwrite: bool = False, questions: int = 256, tick: Tick = silent
) -> list[Comparison]:
    """Run both embedded models into a folder.

    Args:
        out: the folder; questions: how many each point of the accuracy curve is measured on.
    Returns:
        the comparisons; videos, pictures, report.json and report.html are in `out`.
    """
    folder = RunFolder(out, overwrite=overwrite)
    began = time.perf_counter()
    radial = build("radial", **TINY_RADIAL, dense_steps=VIDEO["num_inference_steps"] // 4)
    pipeline = tiny.video_pipeline()
    video = compare_video(pipeline, [radial], PROMPTS, folder=folder, tick=tick, **VIDEO)
    del pipeline
    model, processor = tiny.vlm()
    vlm = compare_vlm(
        model,
        processor,
        [build("fastv", layer=2, keep=0.25)],
        sample_questions(),
        new_tokens=3,
        repeats=5,
        folder=folder,
        tick=tick,
    )
    curve, points = accuracy_section(model, processor, folder, questions=questions, tick=tick)
    kernel, figures = kernel_section(tick=tick)
    results = [video, vlm]
    finish(
        folder, results, title="mmeff: dense and fast, side by side",
        subtitle="The embedded tiny models on this machine. Made by `mmeff compare`.",
        extra={"accuracy": points, "attention": figures, "seconds": round(time.perf_counter() - began, 1)},
        sections=[curve, kernel],
    )  # fmt: skip
    return results


def sample_questions() -> list[dict[str, Any]]:
    """The sample pictures that come with the library, with a question each."""
    folder = tiny.data_folder() / "samples"
    asked = {
        "scene-1.jpg": "what color is the cross ?",
        "scene-2.png": "where is the yellow circle ?",
        "scene-3.png": "how many objects are there ?",
    }
    return [{"images": [read_image(folder / name)], "question": question} for name, question in asked.items()]


def accuracy_section(
    model: Any, processor: Any, folder: RunFolder, *, questions: int, tick: Tick
) -> tuple[Section, list[dict[str, Any]]]:
    """Accuracy against tokens kept: FastV at two layers, and random tokens at the input as the control."""
    variants = [(layer, keep) for layer in (1, 2) for keep in KEEPS]
    total = len(variants) + len(KEEPS) + 1
    tick("accuracy: dense", 0, total)
    dense = ask_scenes(model, processor, seed=CURVE_SEED, count=questions)
    points, measured = [], [{"policy": "dense", "tokens": 144, "exact_match": dense.exact_match, "kinds": dense.kinds}]
    for n, (layer, keep) in enumerate(variants):
        tick(f"accuracy: FastV before layer {layer}, {keep:.4g} kept", n + 1, total)
        with mmeff.accelerate(model, "fastv", layer=layer, keep=keep) as handle:
            found = ask_scenes(model, processor, seed=CURVE_SEED, count=questions)
            tokens = float(handle.report().tokens[f"kept from layer {layer} on"])
        policy = f"FastV before layer {layer}"
        points.append(CurvePoint(policy=policy, tokens=tokens, accuracy=found.exact_match, questions=found.questions))
        measured.append({"policy": policy, "tokens": tokens, "exact_match": found.exact_match, "kinds": found.kinds})
    for n, keep in enumerate(KEEPS):
        tick(f"accuracy: random tokens at the input, {keep:.4g} kept", len(variants) + 1 + n, total)
        tokens = round(keep * vlm_model.VISUAL)
        control = train_vlm.evaluate(model, seed=CURVE_SEED, count=questions, policy=train_vlm.random_tokens(tokens))
        policy, asked = "random tokens at the input", int(control["questions"])
        points.append(CurvePoint(policy=policy, tokens=tokens, accuracy=control["exact_match"], questions=asked))
        measured.append({"policy": policy, "tokens": tokens, "exact_match": control["exact_match"], "questions": asked})
    tick("accuracy", total, total)
    level = CurvePoint(policy="dense", tokens=144, accuracy=dense.exact_match, questions=dense.questions)
    picture = accuracy_curve(points, dense=level)
    folder.write_image("pictures/accuracy.png", picture)
    section = Section(
        heading="Accuracy against visual tokens",
        paragraphs=[
            f"{questions} fresh questions about generated scenes, answered through `generate`; bars are one standard error. "
            "In training the model saw prompts with background tokens dropped, so it tolerates that better than a real one may; random "
            "tokens, dropped before the language model, are the control."
        ],
        figures=[Figure(image=picture, alt="Exact match against visual tokens kept, one line per pruning layer")],
        tables=[
            Table(
                columns=("policy", "tokens kept", "exact match", "standard error"),
                rows=[("dense", 144, f"{dense.exact_match:.3f}", f"{dense.error:.3f}")]
                + [(p.policy, p.tokens, f"{p.accuracy:.3f}", f"{p.standard_error:.3f}") for p in points],
            )
        ],
    )
    return section, [{"questions": questions, **m} for m in measured]


def kernel_section(*, tick: Tick) -> tuple[Section, list[dict[str, Any]]]:
    """Attention alone at grids of real videos, one head: this is where time is saved, and where it is not."""
    rows, figures = [], []
    cases = [((5, 30, 52), 128), ((9, 30, 52), 128), ((21, 30, 52), 128)]
    for n, (grid, block) in enumerate(cases):
        tick(f"attention alone, grid {grid}", n, len(cases))
        radial: Any = build("radial", block=block, dense_steps=0, dense_layers=0, decay=0.2)
        tokens = int(np.prod(grid))
        layout = radial.layout(grid=grid)
        q, k, v = (torch.randn(1, tokens, 1, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
        dense_s, sparse_s = [], []
        with torch.inference_mode():
            for turn in range(4):
                began = time.perf_counter()
                torch.nn.functional.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                )
                middle = time.perf_counter()
                with record() as calls:
                    block_sparse_attention(q, k, v, layout)
                if turn:
                    dense_s.append(middle - began)
                    sparse_s.append(time.perf_counter() - middle)
        speedup = float(np.median([a / b for a, b in zip(dense_s, sparse_s, strict=True)]))
        backend = ", ".join(dict.fromkeys(c.backend for c in calls))
        figures.append({
            "grid": grid, "tokens": tokens, "block": block, "density": layout.density, "backend": backend,
            "dense": latency(dense_s).to_dict(), "sparse": latency(sparse_s).to_dict(), "speedup": speedup,
        })  # fmt: skip
        rows.append((f"{grid[0]} x {grid[1]} x {grid[2]}", tokens, f"{layout.density:.3f}", backend,
                     f"{latency(dense_s).median:.3f}", f"{latency(sparse_s).median:.3f}", f"{speedup:.2f}x"))  # fmt: skip
    tick("attention alone", len(cases), len(cases))
    section = Section(
        heading="Attention alone at the grid of a 480p video",
        paragraphs=[
            "One head of 64 channels in float32 on this machine's CPU, median of 3 alternating runs: PyTorch's dense attention "
            "against the Radial layout. The tiny video above has 324 tokens, far too few for sparsity to pay."
        ],
        tables=[Table(columns=("grid", "tokens", "density", "backend", "dense s", "sparse s", "speedup"), rows=rows)],
    )
    return section, figures


__all__ = ["PROMPTS", "VIDEO", "run", "sample_questions"]
