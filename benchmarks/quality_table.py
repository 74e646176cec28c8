"""The rows of `quality` as a table: means and standard errors of every variant, and rectification against none, prompt by prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .quality import CLOSENESS, DENSE_STEPS, DETECTOR, GUIDANCE, STEPS, Score, read, variants
from .results import Machine

CANNOT_TELL = """\
What this table cannot tell:

* It ranks no method for a real model. This one has 1.1 M parameters and 324 tokens, and runs in blocks of 4 tokens where real
  ones take 64 or 128. A mean over 4 tokens lies closer to each of them than a mean over 128, which favours rectification.
* A table of positions fixes the coarse layout of every clip, so the model leans less on far tokens than a real one: windows
  look better here than they should.
* The clips hold one shape over one flat colour. There is no texture, no camera motion and no change of scene to lose, and a
  shift of the flat colour decides raw PSNR: read it with the corrected PSNR and the detector, never alone.
* PSNR and SSIM say how far a clip is from the dense one of the same noise. A clip can be far and as good: "dense, other
  noise" is what the dense model itself scores against its own clips from other noise.
* The detector picks among six colours, three shapes and four directions; it does not see flicker or soft edges.
* One model, trained once with one seed; standard errors are over prompts and noise alone, and 0 where all clips agree."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One variant over its prompts. Figures are (mean, standard error), None where there are none.

    against_twin: for a rectified variant, over the prompts that both have: `drift_ratio`, its mean drift over the twin's, and
    the mean difference (rectified - twin) of every other figure.
    """

    variant: str
    family: str
    twin: str | None
    method: dict[str, Any] | None
    setting: str
    prompts: int
    density: float | None
    figures: dict[str, list[float] | None]
    against_twin: dict[str, list[float]] | None
    environment: dict[str, str]
    commit: str | None
    date: str


def summarise(path: Path, machine: Machine) -> list[Summary]:
    """Means and standard errors of every variant that has at least two prompts.

    Raises: ValueError if none has.
    """
    which = variants()
    rows = read(path, which)
    found = []
    for variant in which:
        mine = rows[variant.name]
        if len(mine) < 2:
            continue
        densities = [r.density for r in mine.values() if r.density is not None]
        found.append(Summary(
            variant=variant.name, family=variant.family, twin=variant.twin,
            method=None if variant.method is None else variant.method.to_dict(), setting=variant.setting, prompts=len(mine),
            density=float(np.mean(densities)) if densities else None,
            figures={name: _mean([getattr(r, name) for r in mine.values()]) for name in (*DETECTOR, *CLOSENESS)},
            against_twin=_against(mine, rows[variant.twin]) if variant.twin else None,
            environment=machine.environment, commit=machine.commit,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        ))  # fmt: skip
    if not found:
        raise ValueError(f"{path} holds no variant with two prompts; run `python -m benchmarks quality` first")
    return found


def _mean(values: Iterable[float | None]) -> list[float] | None:
    x = np.array([v for v in values if v is not None], dtype=np.float64)
    return None if len(x) < 2 else [float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))]


def _against(mine: dict[int, Score], twin: dict[int, Score]) -> dict[str, list[float]] | None:
    both = sorted(mine.keys() & twin.keys())
    if len(both) < 2:
        return None
    found = {}
    for name in (*DETECTOR, "psnr", "corrected", "ssim"):
        pairs = [(getattr(mine[i], name), getattr(twin[i], name)) for i in both]
        difference = _mean(a - b for a, b in pairs if a is not None and b is not None)
        if difference is not None:
            found[name] = difference
    a, b = (np.array([side[i].drift for i in both], dtype=np.float64) for side in (mine, twin))
    if b.mean() > 0:
        ratio = a.mean() / b.mean()  # of means, and its standard error by the delta method
        found["drift_ratio"] = [ratio, float((a - ratio * b).std(ddof=1) / math.sqrt(len(both)) / b.mean())]
    return found


def write_summary(summaries: Iterable[Summary], path: Path) -> None:
    """Replace the file: its rows are derived from the scores, which stay."""
    path.write_text("".join(json.dumps(asdict(s), ensure_ascii=False, allow_nan=False) + "\n" for s in summaries))


def markdown(summaries: Sequence[Summary]) -> str:
    """The table, rectification against none, and what neither can tell."""
    labels = {"psnr": "PSNR, dB", "corrected": "background-corrected, dB", "ssim": "SSIM", "drift": "background drift"}
    digits = {"psnr": 2, "corrected": 2, "drift": 4}
    names: tuple[str, ...] = (*DETECTOR, *CLOSENESS)
    lines = [
        f"Means and standard errors over prompts; {STEPS} steps, the first {DENSE_STEPS} dense, guidance {GUIDANCE:g}. Density is "
        "the attended share of the pairs in the other steps, as measured.\n",
        *_head("variant", "prompts", "density", *(labels.get(name, name) for name in names)),
    ]
    for s in summaries:
        density = "" if s.density is None else f"{s.density:.3f}"
        cells = [_cell(s.figures[name], digits.get(name, 3)) for name in names]
        lines.append(f"| {' | '.join([s.variant, str(s.prompts), density, *cells])} |")
    pairs = [s for s in summaries if s.against_twin]
    if pairs:
        names = ("drift_ratio", "all", "psnr", "corrected", "ssim")
        lines.append("\nRectification against none, paired by prompt: drift as a ratio, the others as differences.\n")
        lines += _head("variant", "against", "drift ratio", *(labels.get(name, name) for name in names[1:]))
        for s in pairs:
            cells = [_cell((s.against_twin or {}).get(name), digits.get(name, 3)) for name in names]
            lines.append(f"| {' | '.join([s.variant, str(s.twin), *cells])} |")
    return "\n".join([*lines, "", CANNOT_TELL])


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]


def _cell(figure: Sequence[float] | None, digits: int) -> str:
    return "" if figure is None else f"{figure[0]:.{digits}f} ± {figure[1]:.{digits}f}"
