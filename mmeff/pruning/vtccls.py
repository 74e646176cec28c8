"""VTCCLS: keep the visual tokens that the class token of the vision encoder looks at, summed over layers.

"[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs" (arXiv 2412.05819); code THU-MIG/VTC-CLS.

A token's score is the sum over encoder layers `start:-1`, as Python slices, of the class token's attention to it, mean
over heads; the last layer is left out, because LLaVA does not use its output. Published budgets on LLaVA-1.5-7B are 256,
128 and 64 of 576 tokens.

Differs: the published code takes `start` from the command line and names no default; here it is the middle of the encoder.
It drops tokens before the projector, here they are dropped behind it, which comes to the same. Scores need no attention
matrix, and batches are supported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import InputPruner, LayerView, Need
from mmeff.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class VTCCLS(InputPruner):
    """Keep the visual tokens that the vision encoder's class token attends to most over several layers."""

    source: ClassVar[str] = "arXiv 2412.05819; code THU-MIG/VTC-CLS"
    needs: ClassVar[frozenset[Need]] = frozenset({"encoder", "class token"})

    start: float | int = option(
        0.5,
        "first encoder layer of the sum, which ends before the last one: a fraction of the depth as a float, or a layer, "
        "negative from the end",
        unit="fraction, or layer from 0",
        source="the sum is the published code's; it names no default",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.start, float):
            self.require(0 <= self.start < 1, "start", "be in [0, 1) as a fraction of the depth", "pass start=0.5")

    def score(self, view: LayerView) -> Tensor:
        encoder = view.encoder()
        return torch.stack([encoder.received(i, "class") for i in self.summed(encoder.layers)]).sum(dim=0)

    def summed(self, layers: int) -> range:
        """The encoder layers of the sum, for an encoder of `layers` layers.

        Raises: ValueError if none is left.
        """
        if isinstance(self.start, float):
            first = min(int(self.start * layers), max(0, layers - 2))  # shallow encoders keep one layer
        else:
            first = range(layers)[self.start :].start
        self.require(
            first < layers - 1,
            "start",
            f"leave a layer before the last of this encoder's {layers}",
            f"pass at most {layers - 2}",
        )
        return range(first, layers - 1)
