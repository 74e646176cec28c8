"""What can be measured on generated videos: how close to the first variant's, how steady, how smoothly they move.

Measured on the mp4 files as they were written, which is what is watched and what other tools get. H.264 rounds, so PSNR between
two nearly equal videos stops growing somewhere above 45 dB. Each file, and each pair, is measured once and kept beside the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mmeff.errors import MediaError
from mmeff.evaluation.evaluate import Run
from mmeff.evaluation.metrics import SSIM_WINDOW, psnr, ssim
from mmeff.evaluation.rows import DONE, RowWriter, parsed
from mmeff.video_io import read

FOLDER = "measures"  # in the folder of the run
FLICKER, SMOOTHNESS = "steadiness", "motion smoothness"
PSNR, SSIM, LPIPS = "PSNR to first", "SSIM to first", "LPIPS to first"
ON_FILES = "Videos are measured as the files that were written: H.264 rounds, so that PSNR stops growing somewhere above 45 dB."
FLOW_SIDE = 8  # pixels a frame must have on both sides for the flow's coarsest level


def measure(
    run: Run, *, tick: Callable[[int, int], None] = lambda done, total: None
) -> tuple[dict[str, dict[str, dict[str, float]]], list[str]]:
    """Measure every video of a run that was not measured before.

    Returns: metrics by variant and sample, and notes on what could not be measured.
    Raises: CannotRecord: the folder of the run takes no more results.
    """
    hashes = {v["hash"]: v["name"] for v in run.config["variants"]}
    videos: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in hashes.values()}
    for row in run.merged.rows:
        if row["status"] == DONE and row.get("artifact"):
            videos[hashes[row["hash"]]][row["sample"]] = row
    if not any(videos.values()):
        return {}, []
    known, (first, *others) = _known(run.folder), list(videos)
    lpips, why_not = _lpips()
    jobs = [(name, sample) for name in videos for sample in videos[name]]
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in videos}
    notes = [ON_FILES]
    if why_not and others:
        notes.append(why_not)
    unreadable = 0
    writer: RowWriter | None = (
        None  # opened when there is something to keep: a report may be made of a read-only folder
    )
    try:
        for i, (name, sample) in enumerate(jobs):
            row, reference = videos[name][sample], videos[first].get(sample) if name != first else None
            key = f"{row['sha256']} {reference['sha256'] if reference else '-'} {lpips is not None}"
            if key not in known:
                try:
                    known[key] = _measured(run.folder, row, reference, lpips)
                except MediaError:
                    unreadable += 1
                    known[key] = {}
                    continue
                writer = writer or RowWriter(run.folder / FOLDER, "measures")
                writer.append([{"kind": "measure", "key": key, "values": known[key]}])
            found[name][sample] = {k: v if v is not None else np.inf for k, v in known[key].items()}
            tick(i + 1, len(jobs))
    finally:
        if writer is not None:
            writer.close()
    if unreadable:
        notes.append(f"{unreadable} videos of the run are gone or damaged, and were not measured.")
    return found, notes


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    known = {}
    for path in sorted((folder / FOLDER).glob("rows/*.jsonl")):
        with path.open("rb") as file:
            known.update({row["key"]: row["values"] for row in parsed(file) if row is not None})
    return known


def _measured(
    folder: Path, row: Mapping[str, Any], reference: Mapping[str, Any] | None, lpips: Callable[..., float] | None
) -> dict[str, float | None]:
    """All that can be measured on one video; None stands for infinity, which JSON does not have."""
    frames = read(folder / row["artifact"]).frames
    values: dict[str, float] = {}
    if len(frames) > 1:
        values[FLICKER] = steadiness(frames)
    if len(frames) > 2 and min(frames.shape[1:3]) >= FLOW_SIDE:
        values[SMOOTHNESS] = motion_smoothness(frames)
    if reference is not None:
        other = read(folder / reference["artifact"]).frames
        if other.shape == frames.shape:
            values[PSNR] = psnr(other, frames).mean
            if min(frames.shape[1:3]) >= SSIM_WINDOW:
                values[SSIM] = ssim(other, frames).mean
            if lpips is not None:
                values[LPIPS] = lpips(other, frames)
    return {name: None if np.isinf(value) else float(value) for name, value in values.items()}


def steadiness(frames: np.ndarray) -> float:
    """1 for a video that does not flicker: one minus the mean absolute difference of successive frames.

    Args: frames: (T, H, W, 3) uint8, at least two.
    Returns: a number in [0, 1]. Motion counts as flicker, so it compares videos of one prompt, and says little by itself.
    Source: temporal flickering of VBench, arXiv:2311.17982, there on static scenes only.
    """
    if len(frames) < 2:
        raise ValueError(f"steadiness needs at least two frames, got {len(frames)}")
    steps = [np.abs(b.astype(np.int16) - a.astype(np.int16)).mean() for a, b in pairwise(frames)]
    return float(1 - np.mean(steps) / 255)


def motion_smoothness(frames: np.ndarray) -> float:
    """1 for motion that goes on as it began: every other frame is predicted from its neighbours by optical flow.

    Args: frames: (T, H, W, 3) uint8, at least three frames of 8 x 8 pixels.
    Returns: one minus the mean absolute error of the predicted frames, in [0, 1].
    Numerics: Farneback's dense flow between the neighbours, half of which moves each to the middle; their mean is the prediction.
    Source: the idea of VBench's motion smoothness, arXiv:2311.17982.
    Differs: VBench predicts with a learned interpolation model; figures of the two do not compare.
    """
    import cv2

    if len(frames) < 3 or min(frames.shape[1:3]) < FLOW_SIDE:
        raise ValueError(
            f"motion_smoothness needs at least 3 frames of {FLOW_SIDE}x{FLOW_SIDE} pixels, got {frames.shape}"
        )
    errors = []
    H, W = frames.shape[1:3]
    y, x = np.mgrid[0:H, 0:W].astype(np.float32)
    for t in range(1, len(frames) - 1, 2):
        before, after = frames[t - 1], frames[t + 1]
        grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (before, after)]
        flow = cv2.calcOpticalFlowFarneback(grey[0], grey[1], None, 0.5, 3, 15, 3, 5, 1.2, 0)
        u, v = flow[..., 0] / 2, flow[..., 1] / 2
        early = cv2.remap(before, x - u, y - v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        late = cv2.remap(after, x + u, y + v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        predicted = (early.astype(np.float32) + late.astype(np.float32)) / 2
        errors.append(np.abs(predicted - frames[t].astype(np.float32)).mean())
    return float(1 - np.mean(errors) / 255)


def _lpips() -> tuple[Callable[[np.ndarray, np.ndarray], float] | None, str]:
    """LPIPS where the weights of its network are on this machine, and otherwise why not. Nothing is downloaded."""
    import torch

    folder = Path(os.environ.get("TORCH_HOME", Path(torch.hub.get_dir()).parent)) / "hub" / "checkpoints"
    if not any(folder.glob("alexnet-owt-*.pth")):
        return None, f"LPIPS was left out: the weights of AlexNet are not in {folder.name} of torch's hub folder."
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="mean").eval()

    @torch.inference_mode()
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        sides = [torch.from_numpy(np.ascontiguousarray(v)).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (a, b)]
        total = sum(float(network(x[None], y[None])) for x, y in zip(*sides, strict=True))
        return total / len(a)

    return distance, ""
