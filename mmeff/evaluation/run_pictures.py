"""Pictures of one accelerated run beside its dense one: where frames differ, and which layers and steps were sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmeff.evaluation.pictures import RULE, as_picture, chart, density_shades, titles
from mmeff.report import Report
from mmeff.video_io import to_uint8

LEAST = 8 / 255  # the darkest difference that a scale reaches; below it two videos look equal and the map says so


def difference(a: Any, b: Any) -> np.ndarray:
    """How far two videos are apart at every pixel: the largest difference over R, G and B.

    Args: a, b: (T, H, W, 3) of one shape, uint8 or float in [0, 1].
    Returns: float32 (T, H, W) in [0, 1].
    Raises: ValueError for different shapes.
    """
    x, y = to_uint8(a), to_uint8(b)
    if x.shape != y.shape:
        raise ValueError(f"difference needs two videos of one shape, got {x.shape} and {y.shape}")
    apart = np.abs(x.astype(np.int16) - y.astype(np.int16)).max(-1)
    return (apart / 255).astype(np.float32)


def difference_video(a: Any, b: Any) -> np.ndarray:
    """The heat map of every frame, on one scale: black where two videos are equal, bright where they differ most.

    Args, Raises: as `difference`.
    Returns: uint8 (T, H, W, 3).
    """
    apart = difference(a, b)
    return _heat(apart / scale_of(apart))


def difference_map(a: Any, b: Any, *, frame: int = 0, title: str = "") -> Image.Image:
    """Draw the heat map of one frame with its scale, which is that of the whole video.

    Args:
        a, b: as `difference`. frame: which frame, from 0. title: one line over the map.
    Raises: ValueError as `difference`, and for a frame that is not there.
    """
    if not 0 <= frame < len(a):
        raise ValueError(f"frame must be in [0, {len(a) - 1}], got {frame}")
    apart = difference(a, b)
    top = scale_of(apart)
    here = apart[frame]
    H, W = here.shape
    with chart(4.6, 3.45 * min(max(H / W, 0.4), 1.5) + 0.75) as (figure, axes):
        picture = axes.imshow(here, cmap="inferno", vmin=0, vmax=top, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
        bar.set_label("largest difference over R, G, B; 1 is black to white")
        bar.outline.set_edgecolor(RULE)
        equal = float((here == 0).mean())
        note = f"mean {here.mean():.3f}, largest {here.max():.3f}; {equal:.0%} of the pixels are equal"
        titles(axes, title or f"Difference in frame {frame}", note)
        return as_picture(figure)


def scale_of(apart: np.ndarray) -> float:
    """The top of the colour scale for differences: the largest of them, and never so small that rounding glows."""
    return max(float(apart.max(initial=0.0)), LEAST)


def _heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8 colours, one more axis of 3."""
    from matplotlib import colormaps

    table = (np.asarray(colormaps["inferno"](np.linspace(0, 1, 256)))[:, :3] * 255).round().astype(np.uint8)
    return table[(np.clip(values, 0, 1) * 255).round().astype(np.uint8)]


def schedule_map(report: Report, *, title: str = "") -> Image.Image:
    """Draw what each layer did at each denoising step: dense, or sparse at the layer's density.

    Args:
        report: of a run with steps. title: one line over the map.
    Raises: ValueError for a report without steps.

    A report counts calls by layer and by step, not by both. Where a layer or a step was sparse only in part, the map shows the
    share that its layer and its step have together, and says so.
    """
    if not report.steps or not report.layers:
        raise ValueError("schedule_map needs the report of a run with denoising steps, got one without")
    layers, steps = sorted(report.layers), sorted(report.steps)
    by_layer = np.array([_acted(report.layers[layer]) for layer in layers])
    by_step = np.array([_acted(report.steps[step]) for step in steps])
    # sparse layers are sparse in every step that is not dense as a whole, and the other way round
    whole_layer, whole_step = by_layer / max(by_layer.max(), 1e-9), by_step / max(by_step.max(), 1e-9)
    acted = np.outer(whole_layer, whole_step)
    exact = bool(np.isin(acted.round(6), (0, 1)).all())
    densities = np.array([float(report.layers[layer].get("density", 1.0)) for layer in layers])
    values = acted * densities[:, None] + (1 - acted)
    with chart(6.6, min(1.9 + 0.22 * len(layers), 7.5)) as (figure, axes):
        picture = axes.imshow(values, cmap=density_shades(), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_xlabel("denoising step")
        axes.set_ylabel("layer")
        axes.set_xticks(_ticks(len(steps)), [str(steps[i]) for i in _ticks(len(steps))])
        axes.set_yticks(_ticks(len(layers)), [str(layers[i]) for i in _ticks(len(layers))])
        axes.set_xticks(np.arange(len(steps) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(layers) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.02)
        bar.set_label("share of pairs computed")
        bar.outline.set_edgecolor(RULE)
        dense = int((by_step == 0).sum())
        note = f"{dense} of {len(steps)} steps dense; where sparse, {densities[by_layer > 0].mean() if by_layer.any() else 1:.1%} of the pairs"
        titles(axes, title or "Density by layer and step", note + ("" if exact else "; mixed cells are estimated"))
        return as_picture(figure)


def _acted(counts: Mapping[str, Any]) -> float:
    """The share of calls in which the method acted."""
    calls = sum(counts.get(kind, 0) for kind in ("sparse", "full", "dense"))
    return (counts.get("sparse", 0) + counts.get("full", 0)) / calls if calls else 0.0


def _ticks(count: int, most: int = 12) -> list[int]:
    return list(range(0, count, max(1, math.ceil(count / most))))
