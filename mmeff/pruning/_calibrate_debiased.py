"""Fit the position weights of `Debiased` to attention measured on a data set: mean per position, then a log-linear trend.

trend = Trend.empty()
for view in views:                                   # of the inner method's prune point, over many prompts
    trend = accumulate(trend, inner.score(view), view.raster, view.present)
method = to_config(trend, inner)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmeff.pruning._base import TokenPruner
from mmeff.pruning.debiased import Debiased


class Trend(NamedTuple):
    """Attention seen so far by raster index: its sum (P,) float64, and the number of tokens it is of, (P,) int64."""

    total: Tensor
    seen: Tensor

    @classmethod
    def empty(cls) -> Trend:
        return cls(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.long))


def accumulate(trend: Trend, scores: Tensor, raster: Tensor, present: Tensor) -> Trend:
    """The trend with further prompts in it; it grows with the largest picture.

    Args:
        scores: (B, V) attention that tokens received. raster: (B, V) index of each in its picture. present: (B, V) bool,
        the tokens that count; leave out those of padding.
    """
    places = raster[present].cpu()
    values = scores[present].detach().cpu().double()
    size = max(len(trend.total), int(places.max()) + 1 if len(places) else 0)
    more = size - len(trend.total)
    return Trend(
        torch.cat([trend.total, trend.total.new_zeros(more)]).index_add(0, places, values),
        torch.cat([trend.seen, trend.seen.new_zeros(more)]).index_add(0, places, torch.ones_like(places)),
    )


def fit_rate(trend: Trend) -> float:
    """The rate r for which mean attention grows most nearly like exp(r * i) with the raster index i.

    Least squares of log mean attention on i. Positions count as often as they were seen, since the mean of a rare one is
    uncertain; those that were never seen, or never looked at, are left out. A falling trend gives a negative rate.

    Raises: ValueError with fewer than two positions to fit.
    """
    used = (trend.seen > 0) & (trend.total > 0)
    if int(used.sum()) < 2:
        raise ValueError(
            f"a rate is fitted to at least 2 positions with attention, got {int(used.sum())}; accumulate more prompts"
        )
    weight = trend.seen[used].double()
    weight = weight / weight.sum()
    place = used.nonzero()[:, 0].double()
    height = (trend.total[used] / trend.seen[used]).log()
    place = place - (weight * place).sum()
    return float((weight * place * height).sum() / (weight * place.square()).sum())


def to_config(trend: Trend, inner: TokenPruner, **fields: Any) -> Debiased:
    """`Debiased` around `inner`, with the rate fitted to its attention.

    Raises: ValueError as `fit_rate` and the config say.
    """
    return Debiased(inner=inner, rate=fit_rate(trend), **fields)
