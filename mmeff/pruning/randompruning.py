"""RandomPruning: keep visual tokens by lot. The control that every method has to beat.

A token's lot is a hash (the finaliser of splitmix64, Steele et al., OOPSLA 2014) of the seed, of the prompt's digest and of
the token's place among the prompt's visual tokens. So a prompt draws the same whatever it is batched with and for all its
beams, prompts draw differently, later prune points keep a part of what earlier ones kept, and no generator has a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import LayerPruner, LayerView, require_keep
from mmeff.pruning._schedule import PrunePoint
from mmeff.registry import register

GOLDEN, FIRST, SECOND = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""splitmix64's constants as signed 64-bit integers, whose products wrap as those of unsigned ones do."""


@register
@dataclass(frozen=True, kw_only=True)
class RandomPruning(LayerPruner):
    """Control: keep visual tokens drawn at random, the same for equal prompts and seeds."""

    source: ClassVar[str] = "a control; no paper"
    least_layer: ClassVar[int] = 0

    layer: int = option(
        0, "first layer that runs without the dropped tokens", unit="layer from 0", source="0 is before the language model"
    )  # fmt: skip
    keep: float | int = option(
        0.25,
        "visual tokens kept: a fraction as a float, a number as an int",
        unit="fraction or tokens",
        source="a common setting of the comparisons in this field",
    )
    seed: int = option(0, "what the draw depends on besides the prompt", unit="non-negative int", source="any will do")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 0, "layer", "be at least 0", "0 prunes before the language model")
        self.require(0 <= self.seed < 1 << 63, "seed", "be in [0, 2**63)", "pass seed=0")
        require_keep(self, "keep")

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        return (PrunePoint(layer=self.layer, keep=self.keep),)

    def why_not_from_cache(self) -> None:
        return None

    def score(self, view: LayerView) -> Tensor:
        return lots(self.seed, view.digest, view.original)


def lots(seed: int, digest: Tensor, index: Tensor) -> Tensor:
    """(B, V) float32 in [0, 1), uniform: a hash of the seed, each row's digest (B,) int64 and each index (B, V) int64.

    Numerics: multiples of 2**-24, exact on every device.
    """
    row = mix(mix(digest.long() ^ seed) + GOLDEN)
    return shifted(mix(row[:, None] + (index.long() + 1) * GOLDEN), 40).float() * 2.0**-24


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: a bijection of int64 in which every bit of x changes about half of the result's."""
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left, which `>>` of a signed integer does not give."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
