"""DivPrune: keep the visual tokens that are most unlike each other.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025 (arXiv 2503.02175);
code vbdi/divprune.

A greedy solution of the max-min diversity problem on the projected features: the first pick is the token whose nearest
neighbour is farthest away by cosine distance, each further one is the token farthest from all that were picked. Neither
attention nor the prompt takes part.

Differs: batches are supported; a token is never picked twice, which the published code does where tokens coincide; with
`quota="frame"` every frame is a problem of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmeff.config import option
from mmeff.pruning._base import Decision, InputPruner, LayerView
from mmeff.pruning._select import max_min_diversity, pools
from mmeff.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class DivPrune(InputPruner):
    """Keep the visual tokens whose projected features are farthest from each other, chosen greedily."""

    source: ClassVar[str] = "arXiv 2503.02175 (CVPR 2025); code vbdi/divprune"

    keep: float | int = option(
        0.098,
        "visual tokens kept: a fraction as a float, a number as an int",
        unit="fraction or tokens",
        source="the published code's ratio",
    )

    def decide(self, view: LayerView) -> Decision:
        pool = pools(view.counts, view.frame, view.present, apart=self.quota == "frame")
        return Decision(pool.join(max_min_diversity(pool.split(view.embeddings()), pool.counts, pool.present)))
