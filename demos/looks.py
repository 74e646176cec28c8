"""What a visitor asks of two backbones, checked before anything runs, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmeff.report import environment

if TYPE_CHECKING:
    from PIL.Image import Image

STOCK, OURS = "as timm runs it", "window attention by mmeff"
HOW = (STOCK, OURS)
DIRECTIONS, STRENGTH = "main directions as colours", "strength"
COLOURED = (DIRECTIONS, STRENGTH)
PIXELS = (64, 512)  # least and most of a side
MOST_BATCH = 8  # pictures at once


@dataclass(frozen=True, kw_only=True)
class Look:
    """A picture and two models with how they run.

    `size` in pixels, 0 for what each model is made for; `batch` pictures at once for the speed, 0 leaves that out; `coloured`
    how maps are drawn: their three main directions as red, green and blue, or their norm over the channels.
    """

    image: Image | None
    models: tuple[str, str]
    how: tuple[str, str] = (STOCK, STOCK)
    size: int = 0
    batch: int = 1
    coloured: str = DIRECTIONS

    def check(self) -> None:
        """Raises: ValueError: something is missing or beyond the demo's limits."""
        if self.image is None:
            raise ValueError("there is no picture to look at; choose an example, or upload one")
        for name in self.models:
            if not isinstance(name, str) or not name.strip() or len(name) > 80:
                raise ValueError(f"a model must be a name that timm knows, such as nat_mini, got {str(name)[:80]!r}")
            if ":" in name or "/" in name or "\\" in name:
                raise ValueError(
                    f"a model must be one of timm's own names; addresses such as {name!r} are not followed"
                )
        for how in self.how:
            if how not in HOW:
                raise ValueError(f"how a model runs must be {' or '.join(map(repr, HOW))}, got {str(how)[:80]!r}")
        low, high = PIXELS
        if type(self.size) is not int or (self.size and not low <= self.size <= high):
            raise ValueError(
                f"pixels must be a whole number in [{low}, {high}], or 0 for the model's own, got {self.size!r}"
            )
        if type(self.batch) is not int or not 0 <= self.batch <= MOST_BATCH:
            raise ValueError(f"pictures at once must be a whole number in [0, {MOST_BATCH}], got {self.batch!r}")
        if self.coloured not in COLOURED:
            raise ValueError(
                f"maps must be drawn by {' or '.join(map(repr, COLOURED))}, got {str(self.coloured)[:80]!r}"
            )


@dataclass(frozen=True, kw_only=True)
class At:
    """Where a run is. `before` runs are ahead while it waits; `model` is being loaded or looks."""

    stage: Literal["waiting", "loading", "looking", "timing"]
    before: int = 0
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One model and what it made of the picture.

    `random` weights know no `classes`, which are (name, probability) otherwise; `size` height and width it was shown; `gmacs`
    multiply-adds of one picture in thousand millions, counted; `maps` a picture per stage with its shape (C, H, W);
    `milliseconds` of a batch, median with its 20th and 80th percentile; `speedup` over the other model, paired within
    rounds; `ran` what the window attention ran on, and why where it stayed with timm.
    """

    name: str
    how: str
    random: bool
    classes: tuple[tuple[str, float], ...]
    size: tuple[int, int]
    parameters: int
    gmacs: float
    image: Image = field(repr=False)
    maps: tuple[tuple[Image, tuple[int, ...]], ...] = field(repr=False)
    milliseconds: tuple[float, float, float] | None = None
    speedup: float | None = None
    ran: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without pictures."""
        return {
            "name": self.name, "how": self.how, "random_weights": self.random, "classes": [list(one) for one in self.classes],
            "size": list(self.size), "parameters": self.parameters, "gmacs": self.gmacs, "maps": [list(s) for _, s in self.maps],
            "milliseconds": None if self.milliseconds is None else list(self.milliseconds), "speedup": self.speedup,
            "ran": list(self.ran),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a run came to: both models in the order asked; `rounds` of timing; `apart` how far the outputs of one model that
    ran both ways lie apart, relative to their norm."""

    seen: tuple[Seen, Seen]
    batch: int
    rounds: int
    apart: float | None = None
    environment: dict[str, str] = field(default_factory=environment)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without pictures."""
        return {
            "models": [one.to_dict() for one in self.seen], "batch": self.batch, "rounds": self.rounds,
            "outputs_apart": self.apart, "environment": self.environment,
        }  # fmt: skip
