"""SparseVLM: text tokens that the picture resembles rate the visual ones; part of what is dropped is merged and stays.

Paper: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025,
arXiv:2410.04417. Code: Gumpest/SparseVLMs, branches v1.5 (with recycling) and v2.0 (SparseVLM+).

Raters are chosen once, from embeddings: text tokens to which visual ones give more than an equal share of their softmax.
After three layers visual tokens are ranked by the attention that raters paid to them. v1.5 then recycles: the best 30 % of
the dropped ones are clustered by density peaks, ten to a cluster, and each cluster leaves its mean. v2 recycles nothing;
it divides attention by the pull of the rotary embedding alone, and listens to the 14 heads that look most at the picture.

Differs:

* a cluster's mean takes the place and position of the token at its centre, where v1.5 appends it behind the kept tokens
  and numbers all positions anew; v2 keeps positions, as here;
* merged tokens count: the keeps of a `schedule`, and budgets by `at_budget`, are of all tokens that stay. `budget` stands
  for the published counts, to which the code adds its clusters, and so does this: 309 / 204 / 113 tokens for 300 / 200 / 110;
* the published counts are named after budgets that they only come near to: means over layers are 206.5, 145.4, 114.1 and 82.3
  for 192, 128, 96 and 64 in v1.5, and 206.8, 144.1 and 81.8 for 192, 128 and 64 in v2;
* density ties go to the earlier token, where the code adds noise;
* the pull of the rotary embedding is the scaled product of all-ones queries and keys, as in the code, but not below 5 % of
  its value at distance 0, so that far tokens of small heads are not divided by nothing or by a negative number;
* a prompt without a rater is rated by all its text. Batches are supported, and heads are picked for each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import Decision, LayerPruner, LayerView
from mmeff.pruning._schedule import PrunePoint
from mmeff.pruning._select import top_k
from mmeff.registry import register

_INITIAL = 576  # visual tokens of LLaVA-1.5, of which the published counts are
_SCORED = (2, 6, 15)  # of 32 layers: the tokens are dropped behind them
_RANKED = {  # tokens that stay by rank
    "v1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 64: (66, 34, 20)},
}
_CLUSTER = 10  # recycled tokens to a cluster
_FLOOR = 0.05  # of the pull of the rotary embedding, see above


class Memory:
    """The raters of the prompt that is being read: chosen at the first prune point, where all visual tokens are there."""

    raters: Tensor | None = None


@register
@dataclass(frozen=True, kw_only=True)
class SparseVLM(LayerPruner):
    """Keep the visual tokens that relevant text attends to, and merge the best of the others into a few."""

    source: ClassVar[str] = "arXiv:2410.04417 (ICML 2025); code Gumpest/SparseVLMs, v1.5 and v2.0"

    version: Literal["v1.5", "v2"] = option(
        "v1.5", "the paper's method, or SparseVLM+", source="branches of the published code"
    )
    budget: Literal[192, 128, 96, 64] = option(
        192,
        "published counts, as fractions of 576 tokens; 96 is v1.5's alone. A schedule or at_budget set other budgets",
        unit="tokens, nominal",
        source="code, score.py",
    )
    recycle: float | None = option(
        None,
        "share of the dropped tokens that is merged and stays, at a tenth of its number; 0 drops them. None is 0.3 in v1.5, "
        "0 in v2",
        unit="fraction", source="code",
    )  # fmt: skip
    heads: int | None = option(
        None,
        "heads that count, those which look most at the picture; all where a model has fewer. None is all in v1.5, 14 in v2",
        unit="heads",
        source="code",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = _RANKED[self.version]
        self.require(
            self.budget in known,
            "budget",
            f"be one of {', '.join(map(str, known))} in {self.version}",
            "or pass a schedule",
        )
        self.require(
            self.recycle is None or 0 <= self.recycle <= 1, "recycle", "be in [0, 1]", "None is the version's own"
        )
        self.require(self.heads is None or self.heads >= 1, "heads", "be >= 1 head", "None is the version's own")

    @property
    def recycled(self) -> float:
        """`recycle`, with None replaced."""
        return (0.3 if self.version == "v1.5" else 0.0) if self.recycle is None else self.recycle

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        """The published stages at the same depth; where a shallow model brings two to one layer, the later one counts."""
        if layers < 2:
            raise ValueError(f"SparseVLM scores with one layer and prunes before the next, got {layers} layer")
        totals = published_totals(_RANKED[self.version][self.budget], self.recycled)
        found = {round(at * layers / 32) + 1: n / _INITIAL for at, n in zip(_SCORED, totals, strict=True)}
        return tuple(PrunePoint(layer=layer, keep=keep) for layer, keep in found.items() if layer < layers)

    def ranks(self) -> bool:
        return self.recycled == 0

    def new_state(self) -> Memory:
        return Memory()

    def score(self, view: LayerView) -> Tensor:
        """Attention (B, V) that the raters paid to each visual token, mean over raters and heads."""
        raters = self._raters(view)
        share = raters / raters.sum(1, keepdim=True).clamp(min=1)
        if self.version == "v1.5":
            scores = view.received("text", weights=share[:, None])
        else:
            seen = view.text_attention(to="visual") / rotary_pull(view)[:, None]
            scores = (seen * share[:, None, :, None].to(seen.dtype)).masked_fill(~raters[:, None, :, None], 0.0).sum(2)
        scores = scores.masked_fill(~view.present[:, None], 0.0)
        heads = 14 if self.heads is None and self.version == "v2" else self.heads
        return scores.mean(1) if heads is None else mean_of_heads(scores, heads)

    def decide(self, view: LayerView) -> Decision:
        """The highest scores stay, and with recycling the centres of clusters among the best others, as their means."""
        scores = self.score(view)
        if self.recycled == 0:
            return Decision(self.take(view, scores))
        present = view.present.sum(1)
        ranked, clusters = split_budget(view.counts, present, view.present.shape[1], self.recycled)
        keep = self.take(view, scores, ranked)
        dropped = view.present & ~keep
        # NaN is worse than any attention, but better than not being there
        best = top_k(scores.nan_to_num(nan=-1.0), candidates(dropped.sum(1), self.recycled), dropped)
        centres, hidden = merge_clusters(view.hidden(), best, clusters, self.recycled)
        return Decision(keep | centres, hidden, centres)

    def _raters(self, view: LayerView) -> Tensor:
        """(B, T) bool. Chosen at the first prune point of a prompt, read back at the others."""
        memory: Memory = view.state
        if memory.raters is None or view.point.layer == self.points(view.layers)[0].layer:
            memory.raters = choose_raters(view.embeddings(), view.text_embeddings(), view.present, view.text)
        return memory.raters


# ---------------------------------------------------------------- scores


def choose_raters(visual: Tensor, words: Tensor, present: Tensor, text: Tensor) -> Tensor:
    """Text tokens that visual ones resemble: more than the average of mean_v softmax_j(E_v . E_j) (B, T) bool.

    Args: visual: (B, V, D) and words: (B, T, D) embeddings. present: (B, V) and text: (B, T) bool.
    Returns: all text tokens of a row where none is above the average.
    Numerics: float32, float64 for float64 embeddings.
    """
    dtype = torch.float64 if visual.dtype == torch.float64 else torch.float32
    v = visual.to(dtype).masked_fill(~present[..., None], 0.0)
    t = words.to(dtype).masked_fill(~text[..., None], 0.0)
    chances = (v @ t.transpose(1, 2)).masked_fill(~text[:, None], float("-inf")).softmax(2)
    share = chances.masked_fill(~(present[:, :, None] & text[:, None]), 0.0).sum(1)
    share = share / present.sum(1, keepdim=True).clamp(min=1)
    mean = share.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    raters = (share > mean) & text
    return torch.where(raters.any(1, keepdim=True), raters, text)


def mean_of_heads(scores: Tensor, heads: int) -> Tensor:
    """(B, V): the mean of (B, H, V) over the heads of each row with the largest sums; ties go to the earlier head."""
    mass = scores.sum(2)
    wanted = torch.full((len(mass),), heads, device=mass.device)
    used = top_k(mass, wanted, torch.ones_like(mass, dtype=torch.bool))
    return scores.masked_fill(~used[..., None], 0.0).sum(1) / used.sum(1, keepdim=True)


def rotary_pull(view: LayerView) -> Tensor:
    """How much the rotary embedding alone favours each pair of text and visual token, (B, T, V), 1 at distance 0.

    The product of a query and a key of ones after rotation by the angles of i and j: sum cos_i cos_j + sin_i sin_j.
    """
    _, real, (cos, sin) = view.inputs()
    B, T = view.text.shape
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)  # the real tokens first
    first = real.sum(1, keepdim=True) - view.text.sum(1, keepdim=True)  # text is what ends a prompt
    last = first + torch.arange(T, device=real.device)
    words = order.gather(1, last.clamp(min=0, max=real.shape[1] - 1))
    turns = torch.cat([cos, sin], dim=-1)
    turns = turns.to(torch.float64 if turns.dtype == torch.float64 else torch.float32).expand(B, -1, -1)
    query, key = (turns.gather(1, x[..., None].expand(-1, -1, turns.shape[-1])) for x in (words, view.slots()))
    still = query.square().sum(2, keepdim=True)  # the same at all positions
    return (query @ key.transpose(1, 2) / still).clamp(min=_FLOOR)


# ---------------------------------------------------------------- budgets


def published_totals(ranked: tuple[int, ...], recycle: float) -> tuple[int, ...]:
    """Tokens that stay at each stage of 576 when `ranked` stay by rank and clusters are added, as in the code."""
    found, visual = [], _INITIAL
    for n in ranked:
        visual = n + int(clusters_of(torch.tensor(visual - n), recycle))
        found.append(visual)
    return tuple(found)


def candidates(dropped: Tensor, recycle: float) -> Tensor:
    """Tokens that are recycled of so many dropped ones: their share and one more, none where nothing is dropped."""
    found = (dropped.double() * recycle).floor().long() + 1
    return torch.where(dropped > 0, torch.minimum(found, dropped), 0) if recycle > 0 else torch.zeros_like(dropped)


def clusters_of(dropped: Tensor, recycle: float) -> Tensor:
    """Clusters that so many dropped tokens leave: one for ten recycled ones, and one more."""
    found = candidates(dropped, recycle)
    return torch.where(found > 0, found // _CLUSTER + 1, 0)


def split_budget(counts: Tensor, present: Tensor, width: int, recycle: float) -> tuple[Tensor, Tensor]:
    """How many tokens stay by rank and how many as clusters, so that both are `counts` (B,) together.

    Most by rank that leave room for their clusters; where not even the clusters of all tokens have room, fewer clusters.
    Args: present: (B,) tokens there are. width: at least the largest of them.
    """
    total = torch.minimum(counts, present)[:, None]
    ranked = torch.arange(width + 1, device=counts.device)[None]
    left = present[:, None] - ranked
    fits = (left >= 0) & (ranked + clusters_of(left.clamp(min=0), recycle) <= total)
    by_rank = (ranked * fits).amax(1)
    return by_rank, total[:, 0] - by_rank


# ---------------------------------------------------------------- recycling


def merge_clusters(hidden: Tensor, chosen: Tensor, clusters: Tensor, recycle: float) -> tuple[Tensor, Tensor]:
    """Cluster chosen tokens by density peaks (DPC-kNN), and put each cluster's mean at its centre.

    A token is dense where its nearest tokens, as many as there are clusters and itself among them, are near; centres are
    those with the highest product of density and distance to the nearest denser token; others go to the nearest centre.

    Args:
        hidden: (B, V, D). chosen: (B, V) bool, at most `candidates(V, recycle)` of a row. clusters: (B,), at most as many.
    Returns: centres (B, V) bool, and hidden with the means at the centres.
    Numerics: distances as below, means in float32, float64 for float64 states; densities as logarithms, so that none is 0. Ties go
    to the earlier token.
    """
    B, V, D = hidden.shape
    width = min(V, math.floor(V * recycle) + 1)
    most = min(width, width // _CLUSTER + 1)
    slots = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    real = chosen.gather(1, slots)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x = hidden.gather(1, slots[..., None].expand(-1, -1, D)).to(dtype).masked_fill(~real[..., None], 0.0)
    distance = distances(x) / D**0.5
    apart = distance.masked_fill(~real[:, None], float("inf"))

    nearest = apart.topk(most, dim=2, largest=False).values.square().cumsum(2)
    last = (clusters - 1).clamp(min=0)[:, None, None].expand(-1, width, 1)
    density = -nearest.gather(2, last)[..., 0] / clusters.clamp(min=1)[:, None]
    place = torch.arange(width, device=x.device)
    earlier = place[None, :] < place[:, None]
    denser = density[:, None, :] > density[:, :, None]
    denser = (denser | ((density[:, None, :] == density[:, :, None]) & earlier)) & real[:, None]
    farthest = distance.masked_fill(~(real[:, None] & real[:, :, None]), 0.0).amax((1, 2))[:, None]
    ahead = torch.minimum(distance.masked_fill(~denser, float("inf")).amin(2), farthest)
    peak = top_k(density + ahead.log(), clusters, real)

    centre = (~peak).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # (B, C) places, behind them others
    used = peak.gather(1, centre)
    to_centre = distance.gather(2, centre[:, None].expand(-1, width, -1)).masked_fill(~used[:, None], float("inf"))
    own = place[None, :, None] == centre[:, None]  # (B, M, C): a centre is in its own cluster, whatever lies as near
    nearest_centre = to_centre.masked_fill(own & used[:, None], -1.0).argmin(2)
    member = torch.nn.functional.one_hot(nearest_centre, most).to(dtype) * real[..., None]
    means = member.transpose(1, 2) @ x / member.sum(1).clamp(min=1)[..., None]

    b, c = used.nonzero(as_tuple=True)
    merged = hidden.clone()
    merged[b, slots.gather(1, centre)[b, c]] = means[b, c].to(hidden.dtype)
    return torch.zeros_like(chosen).scatter(1, slots, peak), merged


def distances(x: Tensor) -> Tensor:
    """(B, M, M) Euclidean distances between the vectors of a row, (B, M, D), in their dtype.

    Numerics: by products in float64, which takes a tenth of the time that differences take and keeps float32 neighbours
    apart; what rounding may have left of no distance is none, so that equal vectors are equally near.
    """
    wide = x.double()
    square = wide.square().sum(2)
    both = square[:, :, None] + square[:, None]
    found = both - 2 * (wide @ wide.transpose(1, 2))
    found = (found + found.transpose(1, 2)) / 2
    noise = x.shape[2] ** 0.5 * torch.finfo(found.dtype).eps
    return found.masked_fill(found <= noise * both, 0.0).sqrt().to(x.dtype)
