"""FastV: drop the visual tokens that the last prompt token looks at least, early in the language model.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024 (arXiv 2403.06764).

Differs from the published code: scores come from the chosen rows alone, without an attention matrix, so SDPA and flash
attention stay on; batches with padding are supported and rows are independent; positions are kept and the cache is
shortened from the pruning layer on. The paper speaks of the average attention a token receives, its code uses the last
row: both are offered (`rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mmeff.config import option
from mmeff.pruning._base import LayerPruner, LayerView, require_keep
from mmeff.pruning._schedule import PrunePoint
from mmeff.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class FastV(LayerPruner):
    """Keep the visual tokens that receive most attention in one early layer."""

    source: ClassVar[str] = "arXiv 2403.06764 (ECCV 2024); code pkunlp-icler/FastV"

    layer: int = option(2, "first layer that runs without the dropped tokens", unit="layer from 0", source="paper, K")
    keep: float | int = option(
        0.5,
        "visual tokens kept: a fraction as a float, a number as an int",
        unit="fraction or tokens",
        source="paper, 1 - R",
    )
    rows: Literal["last", "text", "all"] = option(
        "last", "whose attention counts: the last prompt token, the text behind the image, or every token",
        unit="query rows", source="code uses the last row; the paper says the average",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 1, "layer", "be at least 1, because layer - 1 supplies the scores", "pass layer=2")
        require_keep(self, "keep")

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        self.require(
            self.layer < layers, "layer", f"be in [1, {layers - 1}] for a model of {layers} layers", "pass layer=2"
        )
        return (PrunePoint(layer=self.layer, keep=self.keep),)

    def why_not_from_cache(self) -> str | None:
        if self.rows == "last":
            return None
        return f'rows="{self.rows}" needs hidden states of the prompt, which are gone by then; pass rows="last"'

    def score(self, view: LayerView) -> torch.Tensor:
        return view.received(self.rows).mean(dim=1)
