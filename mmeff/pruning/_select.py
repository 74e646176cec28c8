"""How scores become kept tokens: top-k with a k per row or per frame, quotas, and greedy picking; batched throughout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that already: the dtype in which tokens are compared."""
    return x if x.dtype == torch.float64 else x.float()


def top_k(scores: Tensor, counts: Tensor, present: Tensor, *, groups: Tensor | None = None) -> Tensor:
    """Per-row top-k with a k per row, or per group of a row, without host synchronisation.

    Args:
        scores: (B, V). counts: (B,) integers, or (B, G) with groups. present: (B, V) bool; absent entries are never taken.
        groups: (B, V) group of each entry, in [0, G).
    Returns:
        bool (B, V). NaN scores rank last; ties go to the smaller index.
    """
    ranked = wide(scores).nan_to_num(nan=-math.inf)  # infinities become the largest and least numbers, above NaN
    order = ranked.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    if groups is None:
        rank = present.gather(1, order).cumsum(dim=1) - 1  # among present entries, whatever absent ones hold
        return (torch.empty_like(order).scatter_(1, order, rank) < counts[:, None]) & present
    absent = counts.shape[1]  # a group of their own, at the end
    groups = groups.masked_fill(~present, absent)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))
    sizes = group_sizes(groups, absent + 1)
    start = sizes.cumsum(1) - sizes
    rank = torch.empty_like(order).scatter_(1, order, places) - start.gather(1, groups)
    return (rank < counts.gather(1, groups.clamp(max=absent - 1))) & present


def share(counts: Tensor, frame: Tensor, present: Tensor) -> Tensor:
    """(B, G): a row's count divided among its frames in proportion to their tokens, by the largest remainders.

    Args: counts: (B,). frame: (B, V) from 0. present: (B, V). Shares of a row add up to min(count, tokens present).
    """
    groups = int(frame.masked_fill(~present, 0).max()) + 1 if frame.numel() else 1
    sizes = group_sizes(frame.masked_fill(~present, groups), groups + 1)[:, :groups]
    total = sizes.sum(1, keepdim=True)
    scaled = torch.minimum(counts[:, None], total) * sizes
    whole, rest = scaled // total.clamp(min=1), scaled % total.clamp(min=1)
    left = torch.minimum(counts, total[:, 0]) - whole.sum(1)
    order = rest.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(groups, device=order.device).expand_as(order))
    return whole + (rank < left[:, None]).long()


def group_sizes(groups: Tensor, count: int) -> Tensor:
    """(B, count): how many entries of each row lie in each group."""
    sizes = torch.zeros(groups.shape[0], count, dtype=torch.long, device=groups.device)
    return sizes.scatter_add_(1, groups, torch.ones_like(groups))


class Pools(NamedTuple):
    """Tokens that share a budget, a pool per row: the B prompts, or the G frames of each. W: tokens of the largest pool.

    row: (R,) prompt of each pool. place: (R, W) places among the prompt's V tokens, ascending. present: (R, W) bool.
    counts: (R,) tokens to keep. shape: (B, V).
    """

    row: Tensor
    place: Tensor
    present: Tensor
    counts: Tensor
    shape: tuple[int, int]

    def split(self, x: Tensor) -> Tensor:
        """(R, W, ...) from (B, V, ...); entries of absent tokens are those of any other."""
        return x[self.row[:, None], self.place]

    def join(self, x: Tensor) -> Tensor:
        """(B, V, ...) from (R, W, ...); 0 for absent tokens."""
        batch, width = self.shape
        out = x.new_zeros(batch, width + 1, *x.shape[2:])  # the last column takes what absent tokens have
        out[self.row[:, None], self.place.masked_fill(~self.present, width)] = x
        return out[:, :width]


def pools(counts: Tensor, frame: Tensor, present: Tensor, *, apart: bool) -> Pools:
    """Prompts as pools, or with `apart` their frames with the shares of `share`. Arguments as there."""
    batch, width = present.shape
    rows = torch.arange(batch, device=present.device)
    if not apart or not width:
        places = torch.arange(width, device=present.device).expand(batch, -1)
        return Pools(rows, places, present, counts, (batch, width))
    shares = share(counts, frame, present)
    groups = shares.shape[1]
    label = frame.masked_fill(~present, groups)
    sizes = group_sizes(label, groups + 1)[:, :groups]
    place = torch.arange(int(sizes.max()), device=present.device)
    at = (sizes.cumsum(1) - sizes)[..., None] + place
    order = label.argsort(dim=1, stable=True)
    index = order.gather(1, at.flatten(1).clamp(max=width - 1)).view(batch * groups, -1)
    inside = (place < sizes[..., None]).flatten(0, 1)
    return Pools(rows.repeat_interleave(groups), index, inside, shares.flatten(), (batch, width))


def greedy(value: Tensor, counts: Tensor, candidates: Tensor, after: Callable[[Tensor], Tensor]) -> Tensor:
    """Pick the candidate of the highest value `counts` times, with values that change after each pick; batched.

    Args:
        value: (B, V) values for the first pick. counts: (B,). candidates: (B, V) bool.
        after: values (B, V) for the next pick, given the places (B, 1) of the last one. It is also called for rows that
            have all they want, whose picks no longer count.
    Returns: bool (B, V), as many as counts say and candidates allow. NaN values rank last; ties go to the smaller index.
    """
    batch, width = candidates.shape
    turns = min(int(counts.max()), width) if batch else 0
    order = torch.zeros(batch, turns, dtype=torch.long, device=candidates.device)
    taken = ~candidates
    for turn in range(turns):
        # one number below all that count: NaN must lose to every value, and win against what may not be picked
        best = value.nan_to_num(nan=torch.finfo(value.dtype).min).masked_fill(taken, -math.inf).argmax(1, keepdim=True)
        order[:, turn] = best[:, 0]
        if turn + 1 < turns:
            taken = taken.scatter(1, best, True)
            value = after(best)
    spare = torch.arange(turns, device=order.device) >= torch.minimum(counts, candidates.sum(1))[:, None]
    picked = candidates.new_zeros(batch, width + 1)  # the last column takes what rows picked beyond their count
    return picked.scatter_(1, order.masked_fill(spare, width), True)[:, :width]


def extremes(x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) each: the least and the largest of each row's present entries of x (B, V), NaN apart."""
    real = present & ~x.isnan()
    low = x.masked_fill(~real, math.inf).amin(dim=1, keepdim=True)
    return low, x.masked_fill(~real, -math.inf).amax(dim=1, keepdim=True)


def cosines(x: Tensor) -> Tensor:
    """(B, V, V) cosines between the vectors of a row, (B, V, D): exactly 1 with itself, 0 with a vector of zeros."""
    x = torch.nn.functional.normalize(wide(x), dim=-1)
    found = x @ x.transpose(1, 2)
    found = (found + found.transpose(1, 2)) / 2  # rounding errors must not break ties between tokens
    itself = found.diagonal(dim1=1, dim2=2)
    itself.copy_(itself.round())
    return found


def row_of(matrix: Tensor, best: Tensor) -> Tensor:
    """(B, V): the row of each (V, V) matrix that `best` (B, 1) names."""
    return matrix.gather(1, best[..., None].expand(-1, -1, matrix.shape[2]))[:, 0]


def max_min_diversity(features: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    """Greedy max-min selection by cosine distance, batched: each pick is the candidate farthest from all picked ones.

    Args:
        features: (B, V, D). counts: (B,) how many to pick. candidates: (B, V) bool.
    Returns: bool (B, V). The first pick is the candidate whose nearest other candidate is farthest away. Ties go to the
        smaller index; tokens with NaN come last.
    Numerics: distances in float32 (float64 for float64 features), (B, V, V) at once.
    """
    distance = 1 - cosines(features)
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    broken = distance.diagonal(dim1=1, dim2=2).isnan()
    blocked = itself | ~candidates[:, None, :] | broken[:, None, :]
    lead = distance.masked_fill(blocked, math.inf).amin(dim=-1).masked_fill(broken, math.nan)
    least = torch.full_like(lead, math.inf)

    def after(best: Tensor) -> Tensor:
        nonlocal least
        least = torch.minimum(least, row_of(distance, best))
        return least

    return greedy(lead, counts, candidates, after)
