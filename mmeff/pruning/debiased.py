"""Debiased: any pruner that ranks tokens by attention, with two habits of attention taken out of its scores.

The published code is intcomp/attention-bias. In a causal language model later visual tokens receive more attention than
earlier ones whatever they show, and so do tokens that show nothing but the padding around a picture that was made square.

* Position: a score is multiplied by exp(-rate * i), with i the index of the token in its picture, row by row from 0; in
  effect the trend of mean attention over positions is divided out. `table` gives the weights themselves instead.
* Padding: tokens whose area is padding by more than `padding` never stay. Where fewer others are left than the budget
  asks for, only those stay. Where the host cannot tell what is padding, positions alone are debiased, and its report
  says so.

The rate belongs to a method and the layers where it looks: `for_method` has the published ones, and it can be fitted to
attention measured on a data set. FastV was published with a table that falls to 0.358 at index 575; the rate here is the
exponential through that point.

Differs: i counts in each picture, tile or video frame, where the published code knows one picture; SparseVLM is wrapped
without its recycling, which would merge tokens by scores of its own; batches are supported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmeff.config import normalise, option
from mmeff.errors import suggest
from mmeff.pruning._base import Decision, LayerView, Need, TokenPruner
from mmeff.pruning._schedule import PrunePoint
from mmeff.registry import all_methods, register

_SHIPPED = "tables shipped with intcomp/attention-bias"

# By the method that is wrapped: rate, padding, and the inner method, None for methods that are not in this library.
_PRESETS: dict[str, tuple[float, float, dict[str, Any] | None]] = {
    "fastv": (0.00179, 0.5, {"method": "fastv"}),
    "sparsevlm": (0.0023, 0.3, {"method": "sparsevlm", "recycle": 0.0}),
    "pyramiddrop": (0.004, 0.3, {"method": "pyramiddrop"}),
    "himap": (0.0022, 0.3, None),
    "tokencarve": (0.0017, 0.3, None),
}


@register
@dataclass(frozen=True, kw_only=True)
class Debiased(TokenPruner):
    """Another pruner whose attention scores are freed of their preference for late tokens and for padding.

    The inner method says where and how much to prune, over which quota, and what it needs. It must rank tokens by scores,
    none of them negative: methods that choose tokens jointly or merge them cannot be wrapped.
    """

    source: ClassVar[str] = "code intcomp/attention-bias"

    inner: TokenPruner = option(  # noqa: RUF009 - a field like the others
        "fastv", "the method whose scores are weighed", unit="method", source="one of the published"
    )
    rate: float = option(
        0.00179,
        "how fast the weight exp(-rate * i) falls with the index i of a token in its picture; 0 leaves positions alone",
        unit="per token",
        source=f"through the last entry of FastV's table, {_SHIPPED}",
    )
    table: tuple[float, ...] = option(
        (),
        "weights of the indices in place of the exponential",
        unit="factors",
        source="FastV has a table as published",
    )
    padding: float = option(
        0.5,
        "share of a token's area that may be padding; tokens with more never stay, 1 lets all stay",
        unit="fraction",
        source="published for FastV; 0.3 for the other methods",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner.ranks():
            can = [c.__name__ for c in all_methods().values() if issubclass(c, TokenPruner) and c().ranks()]
            self.require(
                False,
                "inner",
                "be a method that ranks tokens by scores and keeps the highest",
                "methods that choose tokens jointly, or merge some, have no scores to weigh; of those in this library "
                f"{', '.join(can)} can be wrapped as they are",
            )
        self.require(self.quota == "prompt", "quota", "be left at 'prompt'", "set the quota of the inner method")
        for field, plain in (("cache", "dynamic"), ("when", "prefill")):
            self.require(
                getattr(self.inner, field) == plain,
                "inner",
                f"be left at {field}={plain!r}",
                f"set {field} of {type(self).__name__} itself",
            )
        self.require(math.isfinite(self.rate), "rate", "be finite", "published rates lie between 0.0017 and 0.004")
        self.require(0 <= self.padding <= 1, "padding", "be in [0, 1]", "published are 0.3 and 0.5")
        if self.table:
            default = type(self).__dataclass_fields__["rate"].default
            self.require(
                self.rate == default, "rate", f"be left at {default} where a table is given", "drop one of both"
            )
            wrong = [x for x in self.table if not 0 <= x < math.inf]
            if wrong:
                raise ValueError(
                    f"Debiased.table must hold finite weights >= 0, got {wrong[0]} among {len(self.table)}."
                )

    @classmethod
    def for_method(cls, method: str, **fields: Any) -> Debiased:
        """The published setting for a method, with some fields changed.

        Args:
            method: one of fastv, sparsevlm, pyramiddrop (or pdrop), himap, tokencarve. The last two are not in this
                library: give the `inner` that stands for them.
        Raises: ValueError for a method without a setting, or without an inner one; TypeError for unknown fields.
        """
        wanted = normalise(method)
        found = _PRESETS.get("pyramiddrop" if wanted == "pdrop" else wanted)
        if found is None:
            raise ValueError(
                f"Debiased has no published setting for {method!r}.{suggest(wanted, list(_PRESETS))} "
                f"Known: {', '.join(_PRESETS)}; for others pass inner= and a rate fitted to their attention."
            )
        rate, padding, inner = found
        if inner is None and "inner" not in fields:
            raise ValueError(f"{method} is not in this library; pass inner= with the method that takes its rate.")
        fields = {"inner": inner, "padding": padding, **fields}
        if "table" not in fields:
            fields.setdefault("rate", rate)
        return cls.from_dict(fields)

    # ---------------------------------------------------------------- the scores

    def score(self, view: LayerView) -> Tensor:
        scores = self.inner.score(view)
        return scores * self._weights(view, scores.dtype)

    def decide(self, view: LayerView) -> Decision:
        """The highest weighed scores among the tokens that are not padding; fewer than the budget where those are fewer."""
        shows = view.present if view.padded is None else view.present & (view.padded <= self.padding)
        return Decision(self.inner.take(view, self.score(view), among=shows))

    def _weights(self, view: LayerView, dtype: torch.dtype) -> Tensor:
        """(B, V) weights by position. Raises: ValueError for a picture with more tokens than the table."""
        raster = view.raster.masked_fill(~view.present, 0)
        if not self.table:
            return torch.exp(-self.rate * raster.to(dtype))
        last = (
            int(raster.max()) if raster.numel() else 0
        )  # on a GPU an index out of range would not come back as an error
        if last >= len(self.table):
            raise ValueError(
                f"Debiased.table must have a weight for every token of a picture, got {len(self.table)} for one with at "
                f"least {last + 1} tokens; fit a table for this size, or pass a rate instead."
            )
        return torch.tensor(self.table, dtype=dtype, device=raster.device)[raster]

    def remark(self, view: LayerView) -> str | None:
        if view.padded is None and self.padding < 1:
            return "the host cannot tell padding from picture for this model, so scores are debiased by position alone"
        return self.inner.remark(view)

    # ---------------------------------------------------------------- what the inner method says; `needs` differs by instance

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self.inner.needs

    def why_not_from_cache(self) -> str | None:
        return self.inner.why_not_from_cache()

    def points(self, layers: int) -> tuple[PrunePoint, ...]:
        return self.inner.points(layers)

    def at_budget(self, mean: float, layers: int) -> Debiased:
        return self.replace(inner=self.inner.at_budget(mean, layers))

    def watches(self, layers: int) -> frozenset[int]:
        return self.inner.watches(layers)

    def observes(self, layers: int) -> int | None:
        return self.inner.observes(layers)

    def new_state(self) -> Any:
        return self.inner.new_state()

    def observe(self, state: Any, attention: Tensor, *, prefill: bool) -> None:
        self.inner.observe(state, attention, prefill=prefill)

    def reset_episode(self, state: Any) -> None:
        self.inner.reset_episode(state)
