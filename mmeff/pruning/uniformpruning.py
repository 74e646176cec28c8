"""UniformPruning: keep visual tokens at even distances. The control that knows nothing of the picture.

Of n tokens in the order of the prompt (rows of an image from the top, frames of a video one after another), those at the
rounded places of k even steps from the first to the last. It says what resolution alone is worth: a method that chooses by
content has to beat it on questions whose answer lies anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import Decision, LayerPruner, LayerView, require_keep
from mmeff.pruning._schedule import PrunePoint
from mmeff.pruning._select import pools
from mmeff.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class UniformPruning(LayerPruner):
    """Control: keep evenly spaced visual tokens."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 0, "layer", "be at least 0", "0 prunes before the language model")
        require_keep(self, "keep")

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        return (PrunePoint(layer=self.layer, keep=self.keep),)

    def why_not_from_cache(self) -> None:
        return None

    def decide(self, view: LayerView) -> Decision:
        pool = pools(view.counts, view.frame, view.present, apart=self.quota == "frame")
        return Decision(pool.join(evenly(pool.counts, pool.present)))


def evenly(counts: Tensor, present: Tensor) -> Tensor:
    """(B, V) bool: of each row's n present entries, min(count, n) at even distances from the first to the last.

    Place i of k is i * (n - 1) / (k - 1), halves rounded up; of one alone it is the middle one. Integers throughout.
    """
    width = present.shape[1]
    n = present.sum(dim=1, keepdim=True)
    k = torch.minimum(counts[:, None], n)
    i = torch.arange(width, device=present.device)
    step = (k - 1).clamp(min=1)
    place = torch.where(k == 1, (n - 1) // 2, (2 * i * (n - 1) + step) // (2 * step))
    chosen = present.new_zeros(len(present), width + 1)  # the last column takes the places beyond k
    chosen = chosen.scatter_(1, torch.where(i < k, place, width), True)
    rank = (present.cumsum(dim=1) - 1).clamp(min=0)
    return chosen.gather(1, rank) & present
