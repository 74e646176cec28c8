"""What every pruner inside a language model is made of: where it prunes, how it scores, which tokens it takes.

A method only decides. It is given a `LayerView`, through which it can ask for attention that was paid to the visual
tokens, and returns scores; hosts do the rest (gathering, masks, caches, positions).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from mmeff.config import MethodConfig

Rows = Literal["last", "text", "all"]


@dataclass(frozen=True, kw_only=True)
class PrunePoint:
    """Before layer `layer` runs, keep `keep` of the prompt's visual tokens.

    `keep` is a fraction of the visual tokens that the prompt had at first when it is a float, and a number of tokens per
    row when it is an int. Layers are counted from 0.
    """

    layer: int
    keep: float | int

    def count(self, visual: int) -> int:
        """Tokens kept of `visual` original ones."""
        return min(visual, self.keep) if isinstance(self.keep, int) else min(visual, round(self.keep * visual))


class LayerView(Protocol):
    """The layer before a prune point, as a method sees it. Shapes: B rows, H heads, V visual tokens still present (the
    largest row; rows with fewer are padded at the end)."""

    point: PrunePoint
    present: torch.Tensor  # (B, V) bool: False where a row has no such token
    original: torch.Tensor  # (B, V) index of each token among the row's original visual tokens

    def received(self, rows: Rows) -> torch.Tensor:
        """Softmax attention (B, H, V) float32 that chosen query rows paid to each visual token, summed over the rows.

        rows: "last" the last token of the prompt; "text" every text token behind the last visual one; "all" every real
        token. The softmax runs over all visible keys, as in the model, before it is restricted to visual ones.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TokenPruner(MethodConfig):
    """Base of methods that drop visual tokens inside the language model."""

    stage: ClassVar[str] = "pruning"

    @abstractmethod
    def points(self, layers: int) -> tuple[PrunePoint, ...]:
        """Where and how much to prune in a model of `layers` layers, in ascending order of layers.

        Raises:
            ValueError: a point lies outside the model.
        """

    @abstractmethod
    def score(self, view: LayerView) -> torch.Tensor:
        """Scores (B, V); the highest are kept."""

    def select(self, scores: torch.Tensor, counts: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Keep each row's highest scores.

        Args:
            scores: (B, V). counts: (B,) how many to keep. present: (B, V) bool.
        Returns:
            bool (B, V), True where kept. Ties go to the earlier token.
        """
        return top_k(scores, counts, present)


def top_k(scores: torch.Tensor, counts: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Per-row top-k with a k per row, without host synchronisation.

    Args:
        scores: (B, V). counts: (B,) integers. present: (B, V) bool; absent entries are never taken.
    Returns:
        bool (B, V). NaN scores rank last; ties go to the smaller index.
    """
    ranked = scores.float().nan_to_num(nan=float("-inf")).masked_fill(~present, float("-inf"))
    order = ranked.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < counts[:, None]) & present
