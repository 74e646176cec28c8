"""How a config writes the size of a window so that it serves any resolution: tokens, a fraction of the axis, or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mmeff.diffusion_attn._base import Grid

Extent = int | float | Literal["all"]
Window = tuple[Extent, Extent, Extent]
AXES = ("F", "H", "W")


def normal(window: Window) -> Window:
    """Spell the whole axis "all", which may also be written -1. Anything else is left for `check` to judge."""
    F, H, W = ("all" if type(extent) is int and extent == -1 else extent for extent in window)
    return (F, H, W)


def check(who: str, window: Window, unit: str) -> None:
    """Raise ValueError unless every extent is a count >= 1, a fraction in (0, 1] or "all"."""
    for axis, extent in zip(AXES, window, strict=True):
        if extent == "all" or (0 < extent <= 1 if isinstance(extent, float) else extent >= 1):
            continue
        raise ValueError(
            f"{who} must hold numbers of {unit} >= 1, fractions of the axis in (0, 1], or 'all' (-1), got {extent!r} along "
            f"{axis} in {window}; 1 is one of the {unit}, 1.0 the whole axis."
        )


def resolve(window: Window, lengths: Sequence[int]) -> Grid:
    """Return the extents for axes of these lengths: a fraction is rounded, half up, to at least 1."""
    F, H, W = (
        n if extent == "all" else max(1, int(extent * n + 0.5)) if isinstance(extent, float) else extent
        for extent, n in zip(window, lengths, strict=True)
    )
    return (F, H, W)
