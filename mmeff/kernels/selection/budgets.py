"""Budgets: which of the scored entries are taken. Each returns a bool mask of the shape of its scores.

A budget is spent per group: the entries that share all axes but `axes`. The default, (-1,), spends it per row. Entries
of a group rank by falling score, equal scores by position, first come first served; so the result is exact and does
not depend on the device's sorting. -inf and NaN are not candidates and are never taken, whatever the budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import checks

# What VMoBA's names for its scopes mean on (B, H, Nq, nK) scores: the axes that share one budget.
SCOPES: dict[str, tuple[int, ...]] = {
    "query_head": (-1,),
    "head_global": (-2, -1),
    "block": (-3, -2),
    "overall": (-3, -2, -1),
}


def top_k(scores: Tensor, k: int | Tensor, *, axes: tuple[int, ...] = (-1,)) -> Tensor:
    """Take the k highest scores of each group.

    Args:
        scores: any shape; -inf marks what is not a candidate.
        k: entries to take, one number or an integer tensor that broadcasts to the shape of `scores` without `axes`.
            More than there are candidates takes them all; a tensor's values below 1 take none.
        axes: the axes that share one budget.

    Returns: bool, the shape of scores: exactly min(k, candidates) True per group.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: exact. Of equal scores the lowest index (row-major within the group) wins.
    """
    who = "top_k"
    checks.score_tensor(who, scores)
    flat, restore = _by_group(scores, checks.axis_set(who, axes, scores.ndim))
    flat = _candidates(flat)
    if isinstance(k, Tensor):
        ordered = _descending(flat)
        return restore(_take(flat, ordered, _per_group(who, "k", k, flat)))
    wanted = min(checks.count(who, "k", k, "entries", least=0), flat.shape[-1])
    if wanted == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ordered = flat.topk(wanted, -1).values
    return restore(_take(flat, ordered, torch.full_like(flat[..., :1], wanted, dtype=torch.int64)))


def top_p(
    probabilities: Tensor,
    p: float,
    *,
    include_crossing: bool = True,
    at_least: int | Tensor = 0,
    axes: tuple[int, ...] = (-1,),
) -> Tensor:
    """Take the largest entries of each group until they hold the share p.

    Args:
        probabilities: any shape, >= 0, summing to 1 over `axes`; -inf marks what is not a candidate.
        p: share to be held, in [0, 1]. 1 takes every candidate.
        include_crossing: also take the entry with which the running sum first exceeds p, so that at least one is taken.
        at_least: entries to take in any case, as k in `top_k`.
        axes: the axes that share one budget.

    Returns: bool, the shape of probabilities: per group the first n in falling order, n = #{running sum <= p}, plus 1
        with include_crossing, and no less than at_least.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: running sums in the dtype of probabilities. Of equal entries the lowest index wins.
    Source: Rectified SpaAttn (Liu et al., 2025, arXiv:2511.19835): at_least is its top_k.
    """
    who = "top_p"
    checks.score_tensor(who, probabilities, "probabilities")
    flat, restore = _by_group(probabilities, checks.axis_set(who, axes, probabilities.ndim))
    flat = _candidates(flat)
    if checks.fraction(who, "p", p) == 1:
        return restore(flat > -torch.inf)  # a running sum may round to more than 1 before the end
    ordered = _descending(flat)
    n = (_running_sum(ordered) <= p).sum(-1, keepdim=True) + int(include_crossing)
    if isinstance(at_least, Tensor):
        n = torch.maximum(n, _per_group(who, "at_least", at_least, flat))
    else:
        n = n.clamp(min=checks.count(who, "at_least", at_least, "entries", least=0))
    return restore(_take(flat, ordered, n))


def threshold(scores: Tensor, t: float | Tensor) -> Tensor:
    """Take every score that is at least t.

    Args:
        scores: any shape; -inf marks what is not a candidate.
        t: the threshold, a number or a floating-point tensor that broadcasts to scores (one per row: (..., 1)).

    Returns: bool, the shape of scores. A row may come out empty: add a forced set.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: exact.
    """
    who = "threshold"
    checks.score_tensor(who, scores)
    if isinstance(t, Tensor):
        fits = t.ndim <= scores.ndim and all(
            a in (1, b) for a, b in zip(reversed(t.shape), reversed(scores.shape), strict=False)
        )
        if not fits or t.device != scores.device:
            raise ValueError(
                f"{who}: t must broadcast to the scores, {tuple(scores.shape)} on {scores.device}, got "
                f"{tuple(t.shape)} on {t.device}; one threshold per row has the shape (..., 1)."
            )
    elif isinstance(t, bool) or not isinstance(t, int | float) or t != t:
        raise TypeError(f"{who}: t must be a number or a tensor, got {type(t).__name__} {t!r}.")
    return (scores >= t) & (scores > -torch.inf)


def minmax_cumulative(
    scores: Tensor,
    tau: float,
    *,
    own: Tensor,
    axes: tuple[int, ...] = (-1,),
    valid: Tensor | None = None,
) -> Tensor:
    """Take each query's own block, then the best others until the group holds the share tau of its normalised score.

    Args:
        scores: (..., rows, blocks), from `query_scores`.
        tau: share in [0, 1] of the summed scores, which are first stretched to [0, 1] within their group.
        own: bool, broadcastable to scores: the block that a query belongs to. It is always taken, counts towards tau,
            and is no competitor.
        axes: the axes that share one budget; `SCOPES` has VMoBA's names for them.
        valid: bool, broadcastable to scores: what exists at all. None is everything. Scores of -inf never do.

    Returns: bool, the shape of scores. Every group with a valid entry that is not its own takes at least one such
        entry, even at tau = 0.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: in the dtype of scores. A group whose scores span 1e-6 or less is shifted but not stretched. Of equal
        scores the lowest index wins.
    Source: VMoBA (Wu et al., 2025, arXiv:2506.23858), threshold selection in its four scopes, tau 0.25 there.
    Differs: minimum and maximum are over valid entries; in every scope only valid others compete, which the published
        code does in "overall" alone.
    """
    who = "minmax_cumulative"
    checks.score_tensor(who, scores)
    found = checks.axis_set(who, axes, scores.ndim)
    tau = checks.fraction(who, "tau", tau)
    own = checks.bool_mask(who, "own", own, scores)
    valid = _valid(who, valid, scores)
    flat, restore = _by_group(scores, found)
    (mine, _), (exists, _) = (_by_group(mask, found) for mask in (own, valid))
    low = flat.masked_fill(~exists, torch.inf).amin(-1, keepdim=True)
    span = flat.masked_fill(~exists, -torch.inf).amax(-1, keepdim=True) - low
    span = torch.where(span > 1e-6, span, 1.0)
    stretched = ((flat - low) / span).masked_fill(~exists, 0.0)
    total = stretched.sum(-1, keepdim=True) + 1e-6
    need = (tau - (stretched * mine).sum(-1, keepdim=True) / total).clamp(min=0)
    others = stretched.masked_fill(mine | ~exists, -torch.inf)
    ordered = _descending(others)
    n = (_running_sum(ordered) / total < need).sum(-1, keepdim=True) + 1
    return restore((_take(others, ordered, n) | mine) & exists)


def top_k_with_self(
    scores: Tensor, k: int, *, own: Tensor, axes: tuple[int, ...] = (-1,), valid: Tensor | None = None
) -> Tensor:
    """Take each query's own block first and then the best others, k per query on average over the group.

    Args:
        scores, own, axes, valid: as in `minmax_cumulative`; axes must contain the last one.
        k: blocks per query, the own one included. A group of n queries takes k * n blocks.

    Returns: bool, the shape of scores.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: exact. Of equal scores the lowest index wins. A query for which nothing is valid adds nothing to the
        budget of its group.
    Source: VMoBA (Wu et al., 2025, arXiv:2506.23858), top-k selection; it has none for the scope "block".
    """
    who = "top_k_with_self"
    checks.score_tensor(who, scores)
    found = checks.axis_set(who, axes, scores.ndim)
    if scores.ndim - 1 not in found:
        raise ValueError(
            f"{who}: axes must contain the last one, because k counts blocks per query, got {axes!r}; use "
            "minmax_cumulative for the scope 'block'."
        )
    checks.count(who, "k", k, "blocks per query")
    own = checks.bool_mask(who, "own", own, scores)
    valid = _valid(who, valid, scores)
    first = scores.masked_fill(own, torch.inf).masked_fill(~valid, -torch.inf)
    queries = valid.any(-1)
    shared = found[:-1]
    wanted = (queries.sum(shared) if shared else queries.long()) * k
    return top_k(first, wanted, axes=axes)


def random_k(
    candidates: Tensor, k: int | Tensor, *, generator: torch.Generator, axes: tuple[int, ...] = (-1,)
) -> Tensor:
    """Take k candidates of each group at random: the control that every score has to beat.

    Args:
        candidates: bool of any shape; True may be taken.
        k, axes: as in `top_k`.
        generator: what to draw with. The draw is made on the generator's device, so that a CPU generator gives the same
            selection on every device.

    Returns: bool, the shape of candidates.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: every set of k candidates is equally likely, up to ties of float32 draws.
    """
    who = "random_k"
    if not isinstance(candidates, Tensor) or candidates.dtype != torch.bool:
        got = f"a {candidates.dtype} tensor" if isinstance(candidates, Tensor) else type(candidates).__name__
        raise TypeError(f"{who}: candidates must be a bool tensor, True for what may be taken, got {got}.")
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{who}: generator must be a torch.Generator, got {type(generator).__name__}; pass "
            "torch.Generator().manual_seed(0), so that the control can be repeated."
        )
    draws = torch.rand(candidates.shape, generator=generator, device=generator.device).to(candidates.device)
    return top_k(draws.masked_fill(~candidates, -torch.inf), k, axes=axes)


# ---------------------------------------------------------------- parts


def _by_group(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Bring `axes` together as the last one: (..., entries of a group), and the way back."""
    order = [a for a in range(x.ndim) if a not in axes] + list(axes)
    sizes = [x.shape[a] for a in axes]
    back = [order.index(a) for a in range(x.ndim)]
    flat = x.permute(order).flatten(x.ndim - len(axes))
    return flat, lambda mask: mask.unflatten(-1, sizes).permute(back)


def _candidates(flat: Tensor) -> Tensor:
    """NaN becomes -inf: neither is a candidate."""
    return torch.where(flat > -torch.inf, flat, -torch.inf)


def _valid(who: str, valid: Tensor | None, scores: Tensor) -> Tensor:
    exists = scores > -torch.inf
    return exists if valid is None else checks.bool_mask(who, "valid", valid, scores) & exists


def _running_sum(ordered: Tensor) -> Tensor:
    return ordered.masked_fill(ordered == -torch.inf, 0.0).cumsum(-1)


def _take(flat: Tensor, ordered: Tensor, n: Tensor) -> Tensor:
    """The n highest of each group: all above the n-th value, and the first of those equal to it.

    `ordered` holds at least the n highest values in falling order; n is (..., 1). This needs values only, so the order
    in which a device sorts equal values does not matter.
    """
    last = ordered.gather(-1, (n - 1).clamp(min=0, max=ordered.shape[-1] - 1))
    above, equal = flat > last, flat == last
    room = n - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))) & (flat > -torch.inf)


def _per_group(who: str, name: str, n: Tensor, flat: Tensor) -> Tensor:
    """(..., 1) int64 from counts that broadcast to the groups."""
    groups = flat.shape[:-1]
    if n.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{who}: {name} must be an int or an int32 or int64 tensor, got {n.dtype}; cast it.")
    fits = n.ndim <= len(groups) and all(a in (1, b) for a, b in zip(reversed(n.shape), reversed(groups), strict=False))
    if not fits or n.device != flat.device:
        raise ValueError(
            f"{who}: {name} must broadcast to the groups, {tuple(groups)} on {flat.device}, got {tuple(n.shape)} on "
            f"{n.device}; give one number per group, in the order of the axes that remain."
        )
    return n.long().expand(groups)[..., None]


def _descending(x: Tensor) -> Tensor:
    """Sort the last axis, largest first, NaN first. NumPy sorts rows on a CPU with vector instructions, 17 times faster."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if not plain or torch.compiler.is_compiling():
        return x.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(x.detach().neg().numpy(), -1)).neg_()
