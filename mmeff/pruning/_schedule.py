"""Where and how much to prune: prune points, their grammar, and fractions that meet a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class PrunePoint:
    """Before layer `layer` runs, keep `keep` of the prompt's visual tokens.

    `keep` is a fraction of the visual tokens that the prompt had at first when it is a float, and a number of tokens per
    row when it is an int; both may be 0, which drops all. Layers are counted from 0; at layer 0 nothing has run yet.
    """

    layer: int
    keep: float | int

    def count(self, visual: int) -> int:
        """Tokens kept of `visual` original ones.

        Raises: ValueError for a number of tokens above those that a prompt has; prompts without any are left alone.
        """
        if isinstance(self.keep, float):
            return round(self.keep * visual)
        if 0 < visual < self.keep:
            raise ValueError(
                f"before layer {self.layer} the method is to keep {self.keep} visual tokens of a prompt that has {visual}; "
                "lower the number, or give a fraction such as 0.25"
            )
        return min(visual, self.keep)


def parse_schedule(text: str) -> tuple[PrunePoint, ...]:
    """Prune points from "layer:keep,layer:keep"; a keep with a dot or exponent is a fraction, another one a number of tokens.

    Raises: ValueError for text of another form.
    """
    points = []
    for part in text.split(","):
        layer, _, keep = (x.strip() for x in part.partition(":"))
        try:
            points.append(PrunePoint(layer=int(layer), keep=int(keep) if keep.lstrip("+-").isdigit() else float(keep)))
        except ValueError:
            raise ValueError(
                f'a schedule is "layer:keep" pairs such as "2:0.5,10:0.25" or "2:288,10:64", got {part.strip()!r} in {text!r}'
            ) from None
    return tuple(points)


def check_points(who: str, points: tuple[PrunePoint, ...], *, least: int, layers: int | None = None) -> None:
    """Raise ValueError unless layers ascend inside the model, and keeps do not grow and are in range."""
    stated = ", ".join(f"{p.layer}:{p.keep}" for p in points)
    for p in points:
        if not (0.0 <= p.keep <= 1.0 if isinstance(p.keep, float) else p.keep >= 0):
            raise ValueError(
                f"{who} keeps a fraction in [0, 1] or a number of tokens >= 0 at each layer, got {p.keep} before layer {p.layer}"
            )
        if p.layer < least or (layers is not None and p.layer >= layers):
            end = "" if layers is None else f" and at most {layers - 1}, for a model of {layers} layers"
            why = ", because the layer before supplies the scores" if least else ""
            raise ValueError(
                f"{who} prunes before layers of at least {least}{why}{end}; got layer {p.layer} in {stated}"
            )
    for a, b in pairwise(points):
        if b.layer <= a.layer:
            raise ValueError(f"the layers of {who} must ascend, got {stated}; write them in order, each once")
        if isinstance(a.keep, float) == isinstance(b.keep, float) and b.keep > a.keep:
            raise ValueError(f"{who} cannot bring dropped tokens back, but its keeps grow: {stated}; let them fall")


def scale_to_mean(points: list[tuple[int, float]], mean: float, layers: int) -> list[tuple[int, float]] | None:
    """Points whose fractions are min(1, s * fraction), with s such that the mean over layers is `mean`; None if none is.

    Solved exactly: as s grows, fractions reach 1 one after another, the largest first, and in between the mean is linear.
    """
    ends = [layer for layer, _ in points[1:]] + [layers]
    spans = sorted(((keep, end - layer) for (layer, keep), end in zip(points, ends, strict=True)), reverse=True)
    wanted = mean * layers - points[0][0]  # layers' worth of tokens behind the first point
    if wanted < -1e-9:
        return None
    full = 0
    for i, (keep, span) in enumerate(spans):
        rest = math.fsum(k * n for k, n in spans[i:])
        scale = max(0.0, wanted - full) / rest if rest else 0.0
        if scale * keep <= 1.0 + 1e-9:  # so none of the rest is above 1
            break
        full += span
    else:
        return None
    found = [(layer, min(1.0, scale * keep)) for layer, keep in points]
    reached = math.fsum(min(1.0, scale * keep) * span for keep, span in spans)
    return found if abs(reached - wanted) <= 1e-6 else None  # a rest of zeros cannot make up what lacks
