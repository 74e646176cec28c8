"""VisionZip: keep what the vision encoder attends to, and merge what is left into a few contextual tokens.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025 (arXiv 2412.04467); code
dvlab-research/VisionZip.

Dominant tokens are those that receive most attention in one encoder layer, from the class token or, in encoders without
one, from all patches on the mean. The others are taken in the order of the picture: every s-th of them is a target, where s
is the largest step that gives enough, and each further one joins the target whose key (mean over heads) has the largest
cosine to its own. A target's features plus the mean of those that joined it make a contextual token.

Published budgets on LLaVA-1.5 are 162 + 30, 108 + 20 and 54 + 10 of 576 tokens: `keep=192`, 128 and 64 with the default share
of contextual tokens.

Differs: the published code works inside the vision tower and always keeps the class token besides; here that is no visual
token, and none is kept. Contextual tokens stand at their targets' places among the others, where the published code puts
them behind. A row's budget covers all its images, unless `quota="frame"`; the published code has one for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import Decision, InputPruner, LayerView, Need
from mmeff.pruning._select import pools, top_k, wide
from mmeff.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class VisionZip(InputPruner):
    """Keep the visual tokens that the vision encoder attends to, and a few averages of the others."""

    source: ClassVar[str] = "arXiv 2412.04467 (CVPR 2025); code dvlab-research/VisionZip"
    needs: ClassVar[frozenset[Need]] = frozenset({"encoder", "class token", "projector"})  # of the default fields

    keep: float | int = option(
        192 / 576,
        "visual tokens kept, contextual ones included: a fraction as a float, a number as an int",
        unit="fraction or tokens",
        source="the largest published budget",
    )
    contextual: float = option(
        10 / 64, "share of contextual tokens among those kept", unit="fraction", source="30 of 192, 20 of 128, 10 of 64"
    )
    layer: int = option(
        -2, "encoder layer of the attention and the keys", unit="layer, negative from the end", source="the published code"
    )  # fmt: skip
    rows: Literal["class", "all"] = option(
        "class", "whose attention counts: the class token's, or that of all patches of the picture on the mean",
        unit="query rows", source="the published code has class for CLIP, all for encoders without a class token",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.contextual <= 1, "contextual", "be in [0, 1]", "the published share is 0.15625")
        needs: set[Need] = {"encoder"}
        if self.rows == "class":
            needs.add("class token")
        if self.contextual > 0:
            needs.add("projector")
        object.__setattr__(self, "needs", frozenset(needs))  # in place of the class's, which are those of the defaults

    def decide(self, view: LayerView) -> Decision:
        encoder = view.encoder()
        self.require(
            -encoder.layers <= self.layer < encoder.layers,
            "layer",
            f"be a layer of this encoder, which has {encoder.layers}",
            "pass layer=-2",
        )
        pool = pools(view.counts, view.frame, view.present, apart=self.quota == "frame")
        kept = torch.minimum(pool.counts, pool.present.sum(dim=1))
        averaged = (kept * self.contextual).round().long()
        dominant = top_k(pool.split(encoder.received(self.layer, self.rows)), kept - averaged, pool.present)
        if not self.contextual:
            return Decision(pool.join(dominant))
        rest = pool.present & ~dominant
        groups = join_targets(pool.split(encoder.keys(self.layer)), rest, averaged)
        features = encoder.features()
        merged = encoder.project(merge(pool.split(features), groups).to(features.dtype))
        embedded = view.embeddings()
        # targets of smaller pools go to a spare last place
        hidden = torch.nn.functional.pad(pool.split(embedded), (0, 0, 0, 1))
        place = groups.place.masked_fill(~groups.real, hidden.shape[1] - 1)
        hidden = hidden.scatter(1, place[..., None].expand_as(merged), merged.to(hidden.dtype))[:, :-1]
        return Decision(pool.join(dominant | groups.target), pool.join(hidden))


class Groups(NamedTuple):
    """Which tokens become one. M: targets of the row with most.

    place: (B, M) of each target. real: (B, M) bool. target: (B, V) bool. joins: (B, V, M) 1 where a token joins a target, in
    the dtype of its key.
    """

    place: Tensor
    real: Tensor
    target: Tensor
    joins: Tensor


def join_targets(keys: Tensor, rest: Tensor, counts: Tensor) -> Groups:
    """Targets at even steps among the tokens of `rest`, and the target that each other one of them joins.

    Args: keys: (B, V, D). rest: (B, V) bool. counts: (B,) targets, at most as many as the rest has tokens.
    Numerics: cosines in float32 (float64 for float64 keys). Ties go to the earlier target.
    """
    rank = rest.cumsum(dim=1) - 1
    step = (rest.sum(dim=1) // counts.clamp(min=1)).clamp(min=1)[:, None]
    target = rest & (rank % step == 0) & (rank // step < counts[:, None])
    most = int(counts.max())
    place = (~target).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    real = torch.arange(most, device=rest.device) < counts[:, None]
    unit = torch.nn.functional.normalize(wide(keys), dim=-1)
    cosine = unit @ unit.gather(1, place[..., None].expand(-1, -1, unit.shape[2])).transpose(1, 2)
    if not most:
        return Groups(place, real, target, cosine)
    cosine = cosine.nan_to_num(nan=-2.0).masked_fill(~real[:, None], -torch.inf)
    joins = torch.zeros_like(cosine).scatter_(2, cosine.argmax(dim=2, keepdim=True), 1.0)
    return Groups(place, real, target, joins * (rest & ~target)[..., None])


def merge(features: Tensor, groups: Groups) -> Tensor:
    """(B, M, D): each target's features (of B, V, D) plus the mean of those that joined it, if any did."""
    joins = groups.joins.to(wide(features).dtype)
    some = joins.sum(dim=2, keepdim=True) > 0
    joined = wide(features).where(some, 0.0)  # 0 times what absent tokens hold may be NaN
    mean = joins.transpose(1, 2) @ joined / joins.sum(dim=1).clamp(min=1)[..., None]
    return wide(features).gather(1, groups.place[..., None].expand(-1, -1, features.shape[2])) + mean
