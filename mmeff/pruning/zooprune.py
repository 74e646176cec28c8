"""ZOOPrune: keep visual tokens that the projector is sensitive to, and that are unlike each other.

"ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models", CVPR 2026; code
AIM-SKKU/ZOO-Prune.

For the features x of a token and the projector g, with `directions` random unit vectors u that all tokens share,

    S = mean over u of |g(x + h u) - g(x - h u)| / (2 h)

is a token's sensitivity, brought to [0, 1] over the tokens that compete. The first pick has the largest S; then always the
token with the largest S * (1 - largest cosine to a picked one), cosines between projected features.

Differs: the published code perturbs a low-rank copy of the projector, here it is the projector itself, so scoring costs
2 * `directions` passes of the projector per token: with the defaults a good part of what a short prefill costs. The
directions come from a seed, equal for all prompts; differences are taken in float32, since a step of 0.01 is below the
resolution of half precision. Batches are supported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import Decision, InputPruner, LayerView, Need
from mmeff.pruning._select import cosines, extremes, greedy, pools, row_of, wide
from mmeff.registry import register

CHUNK = 2**25  # values of projected features at a time


@register
@dataclass(frozen=True, kw_only=True)
class ZOOPrune(InputPruner):
    """Keep visual tokens whose projection reacts most to small changes of the features, and that differ."""

    source: ClassVar[str] = "ZOO-Prune (CVPR 2026); code AIM-SKKU/ZOO-Prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"encoder", "projector"})

    directions: int = option(
        64, "random directions in which features are moved", unit="count", source="the published code, m"
    )
    step: float = option(
        0.01, "how far features are moved either way", unit="length in feature space", source="the published code, h"
    )
    seed: int = option(0, "what the directions depend on", unit="non-negative int", source="any will do")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.directions >= 1, "directions", "be at least 1", "the published code has 64")
        self.require(self.step > 0, "step", "be above 0", "the published code has 0.01")
        self.require(0 <= self.seed < 1 << 63, "seed", "be in [0, 2**63)", "pass seed=0")

    def decide(self, view: LayerView) -> Decision:
        encoder, embedded = view.encoder(), view.embeddings()
        features = wide(encoder.features())
        moved = sensitivity(features, self.unit_vectors(features), self.step, encoder.project, embedded.shape[-1])
        pool = pools(view.counts, view.frame, view.present, apart=self.quota == "frame")
        moved = pool.split(moved)
        low, high = extremes(moved, pool.present)
        weight = (moved - low) / (high - low + 1e-8)  # the published guard
        return Decision(pool.join(diverse(weight, pool.split(embedded), pool.counts, pool.present)))

    def unit_vectors(self, features: Tensor) -> Tensor:
        """(directions, Dv) for features (..., Dv), in their dtype; drawn on the CPU, so that devices agree."""
        draw = torch.Generator().manual_seed(self.seed)
        return torch.nn.functional.normalize(
            torch.randn(self.directions, features.shape[-1], generator=draw).to(features), dim=-1
        )


def sensitivity(
    features: Tensor, directions: Tensor, step: float, project: Callable[[Tensor], Tensor], width: int
) -> Tensor:
    """(B, V): mean over directions (m, Dv) of how far the projection of features (B, V, Dv) moves per unit of step.

    width: numbers per projected feature, by which the tokens projected at once are limited.
    """
    moves = step * directions
    at_once = max(1, CHUNK // (2 * len(moves) * max(width, features.shape[-1])))
    found = []
    for x in features.flatten(0, 1).split(at_once):
        ahead, behind = project(torch.stack([x[:, None] + moves, x[:, None] - moves]))
        found.append((ahead - behind).norm(dim=-1).mean(dim=-1) / (2 * step))
    return torch.cat(found).view(features.shape[:2])


def diverse(weight: Tensor, features: Tensor, counts: Tensor, present: Tensor) -> Tensor:
    """Greedy selection (B, V) by weight (B, V) times the cosine distance to the nearest picked of features (B, V, D)."""
    cosine = cosines(features)
    nearest = torch.full_like(weight, -torch.inf)

    def after(best: Tensor) -> Tensor:
        nonlocal nearest
        nearest = torch.maximum(nearest, row_of(cosine, best))
        return weight * (1 - nearest)

    return greedy(weight, counts, present, after)
