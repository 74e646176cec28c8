"""PyramidDrop: half of the visual tokens stay at each quarter of the model's depth, ranked by the end of the prompt.

Paper: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
CVPR 2025, arXiv:2410.17247. Code: Cooperx521/PyramidDrop.

Differs: positions stay original, where the code numbers the survivors anew; stages are fractions of the depth, so that
models other than 32 layers have them at the same places; a fraction of the tokens is rounded, not rounded down; the
paper also trains with the pyramid, here it is for inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import LayerPruner, LayerView
from mmeff.pruning._schedule import PrunePoint
from mmeff.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(LayerPruner):
    """Drop visual tokens in stages over the depth of the model, by what the prompt's last token would attend to next."""

    source: ClassVar[str] = "arXiv:2410.17247 (CVPR 2025); code Cooperx521/PyramidDrop"

    stages: tuple[float, ...] = option(
        (0.25, 0.5, 0.75),
        "how deep each stage ends, ascending in (0, 1): its tokens are dropped before the layer there",
        unit="fraction of layers", source="code, layers 8, 16 and 24 of 32",
    )  # fmt: skip
    keep: tuple[float, ...] = option(
        (0.5, 0.25, 0.125),
        "visual tokens left after each stage, of those there were at first",
        unit="fraction",
        source="paper, λ = 0.5",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = all(a < b for a, b in pairwise((0.0, *self.stages, 1.0)))
        self.require(
            bool(self.stages) and ascending,
            "stages",
            "ascend in (0, 1)",
            "pass stages=(0.25, 0.5, 0.75) for the paper's",
        )
        self.require(
            len(self.keep) == len(self.stages), "keep", f"have a fraction for each of {len(self.stages)} stages"
        )
        falling = all(a >= b for a, b in pairwise((1.0, *self.keep, 0.0)))
        self.require(
            falling, "keep", "be fractions in [0, 1] that do not grow", "pass keep=(0.5, 0.25, 0.125) for the paper's"
        )

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        """The stages of a model of `layers` layers; where a shallow model brings two to one layer, the later one counts."""
        if layers < 2:
            raise ValueError(f"PyramidDrop drops tokens between layers, got a model of {layers} layer")
        found = {
            min(max(round(depth * layers), 1), layers - 1): keep
            for depth, keep in zip(self.stages, self.keep, strict=True)
        }
        return tuple(PrunePoint(layer=layer, keep=keep) for layer, keep in found.items())

    def why_not_from_cache(self) -> None:
        return None

    def score(self, view: LayerView) -> Tensor:
        """Attention (B, V) that the prompt's last token would pay in the layer ahead, mean over heads."""
        return view.received("last", where="next").mean(dim=1)
