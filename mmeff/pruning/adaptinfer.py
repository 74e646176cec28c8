"""AdaptInfer: the prompt's own text-to-text attention says which text tokens speak for the visual ones.

Paper: "AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance", 2025,
arXiv:2508.06084. Code: weiczh02/AdaptInfer-base. At three layers, where attention to the picture shifts, the text tokens
that attend and are attended to most weigh most in the score of each visual token.

Differs:

* text rows alone are scored, without an attention matrix of the whole prompt; batches, padding and several pictures work,
  and rows are independent (the code takes its mean text attention over the whole batch);
* positions stay original, as in the paper's code for Qwen2-VL; its code for LLaVA numbers the survivors anew;
* published keep counts are kept as they are, although their mean over layers is above the budget they are named after
  (146.2 for 128, 82.9 for 64): published budgets are nominal. All other budgets are means over layers, and met;
* a point whose setting is to keep all tokens of the prompt keeps them, where the code drops one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.errors import suggest
from mmeff.pruning._base import LayerPruner, LayerView, check_mean
from mmeff.pruning._schedule import PrunePoint, parse_schedule
from mmeff.registry import register

# Schedules of the published code, by model and nominal budget. It scores with layers 1, 10 and 20 (0, 9 and 19 for
# Qwen2-VL) of either LLaVA, so the layers after them are the first that run on fewer tokens.
_PUBLISHED: dict[str, dict[int | float, str]] = {
    "llava-1.5-7b": {
        128: "2:290,11:72,21:18",
        64: "2:133,11:27,21:3",
        48: "2:80,11:24,21:2",
        32: "2:40,11:12,21:0",
    },
    "llava-1.5-13b": {128: "2:300,11:94,21:30", 64: "2:148,11:40,21:5"},
    # stated as ratios of what each stage found: .7/.9/.3, .5/.6/.3 and .17/.6/.3
    "qwen2-vl-2b": {0.5: "1:0.7,10:0.63,20:0.189", 0.3: "1:0.5,10:0.3,20:0.09", 0.1: "1:0.17,10:0.102,20:0.0306"},
}
_LAYERS = {32: "llava-1.5-7b", 40: "llava-1.5-13b"}
_INITIAL = 576  # visual tokens of LLaVA-1.5
_CHANGES = (1, 10, 20)  # of 32 layers: where attention from text to picture shifts

# What a stage keeps of what it found: published for 128 and for 64 tokens of LLaVA-1.5-7B.
DECAY = ((0.50, 0.25, 0.25), (0.23, 0.20, 0.11))


@register
@dataclass(frozen=True, kw_only=True)
class AdaptInfer(LayerPruner):
    """Keep the visual tokens that matter to the text tokens that matter to each other, in three stages."""

    source: ClassVar[str] = "arXiv:2508.06084; code weiczh02/AdaptInfer-base"

    budget: int | float = option(
        128,
        "mean of visual tokens over the layers: a number as an int, a fraction as a float. On 32 and 40 layers with 576 "
        "tokens, 128, 64, 48 and 32 (128 and 64) stand for the published counts, which keep some more than that",
        unit="tokens or fraction", source="paper, LLaVA-1.5",
    )  # fmt: skip
    initial: int = option(
        _INITIAL, "visual tokens of a prompt that a budget in tokens is meant for", unit="tokens", source="LLaVA-1.5"
    )
    prior: Literal["text", "uniform"] = option(
        "text",
        "what weighs text tokens: attention among them; or nothing, with each head's scores adding up to 1",
        source="code; uniform is its ablation",
    )
    prior_mix: float = option(
        1.0,
        "share of the text prior in the weights, the rest being their mean; in [0, 1]",
        unit="fraction",
        source="code, lb",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.initial >= 1, "initial", "be >= 1 visual token", "pass initial=576 for LLaVA-1.5")
        if isinstance(self.budget, float):
            self.require(
                0 < self.budget <= 1, "budget", "be a fraction in (0, 1] where it is a float", "pass an int for tokens"
            )
        else:
            paper = "pass budget=128 for the paper's setting" if self.initial >= 128 else "pass budget=0.25"
            self.require(
                1 <= self.budget <= self.initial,
                "budget",
                f"be in [1, {self.initial}] visual tokens for this model",
                paper,
            )
        self.require(0 <= self.prior_mix <= 1, "prior_mix", "be in [0, 1]", "1 is the paper's setting")
        self.require(
            self.prior == "text" or self.prior_mix == 1,
            "prior_mix",
            'be 1 with prior="uniform"',
            "there is nothing to mix",
        )

    @classmethod
    def for_model(cls, model: str, budget: int | float | None = None, **fields: Any) -> AdaptInfer:
        """A published schedule, with some fields changed.

        Args:
            model: llava-1.5-7b (budgets 128, 64, 48, 32), llava-1.5-13b (128, 64), or qwen2-vl-2b (0.5, 0.3, 0.1).
            budget: the name of the schedule, in tokens or as a fraction as the authors state it; None is the first.
        Raises: ValueError for a model or budget without a schedule; TypeError for unknown fields.
        """
        found = _PUBLISHED.get(model.lower())
        if found is None:
            raise ValueError(
                f"AdaptInfer.for_model has no published schedule for {model!r}.{suggest(model, _PUBLISHED)} "
                f"Known: {', '.join(_PUBLISHED)}; pass AdaptInfer(budget=0.25) for other models."
            )
        budget = next(iter(found)) if budget is None else budget
        if budget not in found:
            raise ValueError(
                f"AdaptInfer.for_model has no published schedule of budget {budget!r} for {model!r}, only "
                f"{', '.join(map(str, found))}; pass AdaptInfer(budget={budget!r}) for a solved one."
            )
        return cls(budget=budget, schedule=found[budget]).replace(**fields)

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        if isinstance(self.budget, int) and self.initial == _INITIAL and layers in _LAYERS:
            published = _PUBLISHED[_LAYERS[layers]].get(self.budget)
            if published is not None:
                return parse_schedule(published)
        mean = self.budget if isinstance(self.budget, float) else self.budget / self.initial
        at = prune_layers(layers)
        return tuple(
            PrunePoint(layer=layer, keep=keep) for layer, keep in zip(at, solve_keeps(at, mean, layers), strict=True)
        )

    def at_budget(self, mean: float, layers: int) -> AdaptInfer:
        """As the base says: with the budget as a fraction, or a schedule of one's own scaled."""
        if self.schedule:
            return super().at_budget(mean, layers)
        check_mean(type(self).__name__, mean)
        solve_keeps(prune_layers(layers), mean, layers)  # which raises where no setting exists
        return self.replace(budget=float(mean))

    def score(self, view: LayerView) -> Tensor:
        """Attention that text paid to each visual token, weighted by `text_weights` per head and text token (B, V)."""
        if self.prior == "uniform":
            received = view.received("text").masked_fill(~view.present[:, None], 0.0)
            return (received / received.sum(2, keepdim=True).clamp(min=torch.finfo(received.dtype).tiny)).sum(1)
        weights = text_weights(view.text_attention(), view.text, self.prior_mix)
        return view.received("text", weights=weights).sum(1)

    def take(
        self, view: LayerView, scores: Tensor, counts: Tensor | None = None, *, among: Tensor | None = None
    ) -> Tensor:
        """As the base says, with `stage_counts` for `view.counts`."""
        counts = stage_counts(view.counts, view.initial, view.present.sum(1)) if counts is None else counts
        return super().take(view, scores, counts, among=among)


def text_weights(attention: Tensor, text: Tensor, mix: float) -> Tensor:
    """How much each text token speaks for the prompt, (B, H, T): attention it pays to text and gets from later text.

    Args:
        attention: (B, H, T, T) from text row to text column. text: (B, T) bool, False where there is no such token.
        mix: share of these sums in the weights; the rest is their mean over heads and text tokens of the row.
    Numerics: the dtype of `attention`. Absent tokens get 0.
    Source: arXiv:2508.06084; columns of S = M + Mᵀ - diag(M), which need no matrix of their own.
    """
    attention = attention.masked_fill(~(text[:, None, :, None] & text[:, None, None, :]), 0.0)
    weights = attention.sum(3) + attention.sum(2) - attention.diagonal(dim1=2, dim2=3)
    mean = weights.sum((1, 2)) / (text.sum(1) * weights.shape[1]).clamp(min=1)
    return ((1 - mix) * mean[:, None, None] + mix * weights) * text[:, None]


def stage_counts(counts: Tensor, initial: Tensor, present: Tensor) -> Tensor:
    """Tokens kept at a point, (B,): the schedule's, but each point drops one at least unless it is to keep all there were."""
    return torch.where(counts < initial, torch.minimum(counts, present - 1).clamp(min=0), present)


def prune_layers(layers: int) -> tuple[int, ...]:
    """The first layers that run on fewer tokens: those behind layers 1, 10 and 20 of 32, at the same depth of `layers`.

    Raises: ValueError for a model of one layer.
    """
    found = sorted({round(layer * layers / 32) + 1 for layer in _CHANGES})
    if layers < 2:
        raise ValueError(f"AdaptInfer scores with one layer and prunes before the next, got a model of {layers} layer")
    return tuple(layer for layer in found if layer < layers)


def solve_keeps(
    points: Sequence[int], budget_fraction: float, layers: int, decay: Sequence[Sequence[float]] = DECAY
) -> tuple[float, ...]:
    """Fractions of the first visual tokens to keep before each layer of `points`, so that their mean over layers is met.

    Args:
        points: layers, ascending. budget_fraction: the mean over all `layers`, as a fraction of the tokens there were.
        decay: settings of what each stage keeps of what it found, each less than the one before it. Solutions lie on the
            way from keeping all, through these, to keeping nothing. A setting's last factor serves further stages too.
    Raises: ValueError where the layers before the first point hold more than the budget.
    Numerics: bisection in float64 to its last bits. The fractions fall from point to point unless they are all 1 or 0.
    """
    least = points[0] / layers
    if not least <= budget_fraction <= 1:
        raise ValueError(
            f"AdaptInfer prunes first before layer {points[0]} of {layers}, so the mean of visual tokens over layers is in "
            f"[{least:.4g}, 1] of all, got a budget of {budget_fraction:.4g}; raise the budget, or prune earlier through "
            'schedule="layer:keep,..."'
        )
    stages = range(len(points))
    path = [
        [1.0] * len(points),
        *([step[min(i, len(step) - 1)] for i in stages] for step in decay),
        [0.0] * len(points),
    ]
    spans = [b - a for a, b in zip(points, [*points[1:], layers], strict=True)]

    def keeps(t: float) -> tuple[float, ...]:
        i = min(int(t), len(path) - 2)
        keep, found = 1.0, []
        for a, b in zip(path[i], path[i + 1], strict=True):
            keep *= a + (t - i) * (b - a)
            found.append(keep)
        return tuple(found)

    low, high = 0.0, float(len(path) - 1)
    for _ in range(100):
        middle = (low + high) / 2
        mean = (points[0] + sum(n * k for n, k in zip(spans, keeps(middle), strict=True))) / layers
        low, high = (middle, high) if mean > budget_fraction else (low, middle)
    return keeps(high)
