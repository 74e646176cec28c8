"""TransPrune: drop the visual tokens that layers change least and that the instruction looks at least.

"TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", CVPR 2026.

Two scores. The transition (TTV) of a token in a sublayer is how much the sublayer's output adds to it, times how far that
turns it, the latter against all other tokens of the sequence:

    TTV = |out| / |in| * softmax over the sequence of (1 - cos(in, out))

with `in` the normalised input and `out` the output before the residual. Those of the attention and the feed-forward sublayer
of every layer since the first watched one are added up. The second score (IGA) is the attention that the instruction's
rows would pay to the token in the next layer. A token's score is its share of either, added.

Published for 32 layers: watch layers 7 to 12 (counted from 1), keep 0.875, 0.625 and 0.125 of the tokens after layers 7,
9 and 12. Differs: other depths prune after the same fractions of their layers; positions are kept, where the published code
counts the survivors anew; batches with padding are supported, and padding takes no part in the softmax; the attention
comes from the instruction's rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import LayerPruner, LayerView, Transition
from mmeff.pruning._schedule import PrunePoint
from mmeff.registry import register

PAPER_LAYERS = (7, 9, 12)  # of 32, as first layers that run without the dropped tokens, from 0


@register
@dataclass(frozen=True, kw_only=True)
class TransPrune(LayerPruner):
    """Keep the visual tokens that layers change most and that the instruction attends to most, in three steps."""

    source: ClassVar[str] = "TransPrune (CVPR 2026) and its published code"

    keep: tuple[float, float, float] = option(
        (0.875, 0.625, 0.125),
        "share of the first visual tokens that stays from 7/32, 9/32 and 12/32 of the layers on",
        unit="fractions",
        source="the published code",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            all(0 <= k <= 1 for k in self.keep) and sorted(self.keep, reverse=True) == list(self.keep),
            "keep",
            "be fractions in [0, 1] that do not grow",
            "the published code has (0.875, 0.625, 0.125)",
        )

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        found: list[PrunePoint] = []
        for at, keep in zip(PAPER_LAYERS, self.keep, strict=True):
            last = found[-1].layer if found else 0
            found.append(PrunePoint(layer=max(last + 1, round(at * layers / 32)), keep=keep))
        return tuple(found)

    def watches(self, layers: int) -> frozenset[int]:
        """Every layer from the one before the first prune point to the one before the last."""
        points = self.points(layers)
        return frozenset(range(points[0].layer - 1, points[-1].layer))

    def score(self, view: LayerView) -> Tensor:
        moved = torch.zeros((), device=view.present.device)
        for layer in sorted(self.watches(view.layers)):
            if layer < view.point.layer:
                attention, feed_forward = view.transitions(layer)
                moved = moved + transition(attention) + transition(feed_forward)
        # the mean over heads; the mean over rows differs from their sum by a factor that shares do not see
        looked_at = view.received("text", where="next").mean(dim=1)
        return shares(moved, view.present) + shares(looked_at, view.present)


def transition(sublayer: Transition) -> Tensor:
    """TTV (B, V) of one sublayer, for the tokens that are visual in the view; undefined for absent ones."""
    turned = (1 - sublayer.cosine).masked_fill(~sublayer.real, float("-inf")).softmax(dim=1)
    return (sublayer.ratio * turned).gather(1, sublayer.visual)


def shares(scores: Tensor, present: Tensor) -> Tensor:
    """Scores (B, V) over their sum among the present tokens of the row; 0 for absent ones, and where the sum is 0."""
    scores = scores.masked_fill(~present, 0.0)
    total = scores.sum(dim=1, keepdim=True)
    return scores / total.where(total != 0, 1.0)
