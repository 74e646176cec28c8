"""NormTopK: keep the visual tokens whose projected features are longest. A control that should lose.

No paper recommends it. The length of a feature says little of what a token shows, and in trained encoders the longest ones
are often outliers in plain background (Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588). A method
that does not beat this control, and `RandomPruning`, has not shown that its scores mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmeff.pruning._base import InputPruner, LayerView
from mmeff.pruning._select import wide
from mmeff.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class NormTopK(InputPruner):
    """Negative control: keep the visual tokens with the largest norm of their projected features."""

    source: ClassVar[str] = "a negative control; no paper"

    def score(self, view: LayerView) -> Tensor:
        return wide(view.embeddings()).norm(dim=-1)
