"""CaCoVID: a small trained policy says which frames and which tokens of a video the language model needs.

"CaCoVID: Contribution-aware Token Compression for Video Understanding via Reinforcement Learning" (arXiv 2602.01649); the
policy is learned from rewards of a frozen model's answers (`mmeff.pipelines.train_cacovid`).

A part of the budget, `importance`, goes to frames in proportion to the frame head's softmax and inside each to the tokens
of the highest token logits; the rest is spread evenly over what was not taken, so that nothing of the video is unseen.

Differs from the published code, which takes one row of equal frames: rows are batched, and frames may have different
numbers of tokens (a frame's cap is a fraction of its own tokens). Where a quota has to grow beyond a frame's tokens the
next smallest frame grows instead. Even spreading rounds halves up, in exact integers. The third head of the published
policy, whose loss is never used, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mmeff.config import option
from mmeff.pruning._base import Decision, InputPruner, LayerView, Need
from mmeff.pruning._cacovid_policy import Policy
from mmeff.pruning._select import group_sizes, top_k
from mmeff.registry import register

SHARPNESS = 3.0  # frame logits are scaled so that the largest is 3 before the softmax
EXACT = 10**6  # fractions of the config as integers, so that 0.29 of 100 tokens is 29 on every device


@register
@dataclass(frozen=True, kw_only=True)
class CaCoVID(InputPruner):
    """Keep the video tokens that a trained policy expects the answer to depend on, and an even sample of the others."""

    source: ClassVar[str] = "arXiv 2602.01649; code LivingFutureLab/CaCoVID"
    needs: ClassVar[frozenset[Need]] = frozenset({"frames"})
    needs_training: ClassVar[bool] = True

    keep: float | int = option(
        0.25,
        "visual tokens kept: a fraction as a float, a number as an int",
        unit="fraction or tokens",
        source="paper, evaluated at 0.25, 0.2, 0.15 and 0.1",
    )
    importance: float = option(
        0.5, "share of the kept tokens that the policy picks; the others are spread evenly over the rest",
        unit="fraction of the budget", source="code, imp_ratio of the evaluation",
    )  # fmt: skip
    cap: float = option(
        1.5, "most that a frame may hold of the policy's picks, compared with an equal share",
        unit="equal shares", source="code, 1.5 times the ratio",
    )  # fmt: skip
    policy: str = option(
        "",
        "folder of a trained policy, as `mmeff train cacovid` writes it",
        unit="path",
        source="trained per model; the authors' own checkpoint is in a format of their code",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 < self.importance <= 1, "importance", "be in (0, 1]", "pass importance=0.5 for the published setting"
        )
        self.require(self.cap >= 1, "cap", "be at least 1 equal share", "pass cap=1.5 for the published setting")
        self.require(
            self.quota == "prompt", "quota", "be 'prompt'", "its frame head already shares the budget among frames"
        )

    def new_state(self) -> Policy:
        """The policy, read from its folder.

        Raises: ValueError without a folder; as `Policy.load` for a folder that holds none.
        """
        if not self.policy:
            raise ValueError(
                "CaCoVID needs a trained policy; train one with `mmeff train cacovid`, or pass policy=<folder>"
            )
        return Policy.load(Path(self.policy).expanduser())

    @torch.no_grad()
    def decide(self, view: LayerView) -> Decision:
        policy: Policy = view.state
        hidden, real, rotary = view.inputs()
        self._check(policy, hidden.shape[-1], rotary[0].shape[-1])
        policy.to(device=hidden.device, dtype=hidden.dtype)
        frames = int(view.frame.masked_fill(~view.present, 0).max()) + 1 if view.frame.numel() else 1
        tokens, whole = policy(hidden, real, rotary, view.slots(), view.present, view.frame, frames)
        counts = torch.minimum(view.counts, view.present.sum(1))
        return Decision(
            choose(tokens, whole, view.frame, view.present, counts, importance=self.importance, cap=self.cap)
        )

    def _check(self, policy: Policy, width: int, head_dim: int) -> None:
        made = policy.config
        for what, ours, theirs in (("hidden size", made.hidden_size, width), ("head dim", made.head_dim, head_dim)):
            if ours != theirs:
                origin = f", trained on {made.trained_on}" if made.trained_on else ""
                raise ValueError(
                    f"the policy in {self.policy} has {what} {ours}{origin}, and this model has {theirs}; train one on this "
                    "model with `mmeff train cacovid`"
                )


def choose(
    tokens: Tensor, frames: Tensor, frame: Tensor, present: Tensor, counts: Tensor, *, importance: float, cap: float
) -> Tensor:
    """Which tokens stay, (B, V) bool, exactly `counts` of each row.

    Args:
        tokens: (B, V) logits. frames: (B, G) logits. frame: (B, V) in [0, G). present: (B, V) bool.
        counts: (B,) at most the tokens present. importance, cap: as the fields of `CaCoVID`.
    """
    groups = frames.shape[1]
    sizes = group_sizes(frame.masked_fill(~present, groups), groups + 1)[:, :groups]
    quotas = frame_quotas(frames, sizes, counts, importance=importance, cap=cap)
    taken = top_k(tokens, quotas, present, groups=frame)
    return taken | spread(present & ~taken, counts - taken.sum(1))


def frame_quotas(logits: Tensor, sizes: Tensor, counts: Tensor, *, importance: float, cap: float) -> Tensor:
    """(B, G): how many tokens the policy picks in each frame; a row's add up to floor(importance * count).

    Args: logits: (B, G). sizes: (B, G) tokens of each frame, 0 where a row has no such frame. counts: (B,).
    Numerics: probabilities in the logits' dtype, at least float32; halves round to even; a NaN logit counts as 0.
    """
    exists = sizes > 0
    number = exists.sum(1, keepdim=True).clamp(min=1)
    total = sizes.sum(1, keepdim=True).clamp(min=1)
    f = logits.to(torch.promote_types(logits.dtype, torch.float32)).nan_to_num(nan=0.0).masked_fill(~exists, 0.0)
    f = SHARPNESS * f / f.abs().amax(1, keepdim=True).clamp(min=torch.finfo(f.dtype).tiny)
    p = f.masked_fill(~exists, float("-inf")).softmax(1)
    p = torch.minimum(torch.maximum(p, 0.5 / number), cap / number).masked_fill(~exists, 0.0)
    p = p / p.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    wanted = (p * (importance * counts.to(p.dtype)).round()[:, None]).round().long().clamp(min=1)
    most = round(importance * cap * EXACT) * counts[:, None] * sizes // (total * EXACT)
    goal = round(importance * EXACT) * counts // EXACT
    return settle(torch.minimum(torch.minimum(wanted, most), sizes), sizes, goal)


def settle(quotas: Tensor, sizes: Tensor, goal: Tensor) -> Tensor:
    """Bring each row's sum to `goal` by single steps: the largest quota loses one, or the smallest that may grow gains one.

    Ties go to the earlier frame. Args: quotas: (B, G), at most sizes (B, G). goal: (B,), at most the sum of sizes.

    All steps are taken at once. Quotas are columns of unit blocks: losing takes the highest blocks away, gaining adds the
    lowest free ones, so the blocks that are there at the end are the first `goal` of one order.
    """
    groups, height = sizes.shape[1], int(sizes.max()) if sizes.numel() else 0
    block = torch.arange(height, device=sizes.device)[None, None]
    place = torch.arange(groups, device=sizes.device)[None, :, None]
    gained = block >= quotas[..., None]
    order = block * groups + torch.where(gained, place, groups - 1 - place)
    order = order + gained * (height * groups) + (block >= sizes[..., None]) * (2 * height * groups)
    ranks = order.flatten(1).argsort(1).argsort(1).view_as(order)
    return (ranks < goal[:, None, None]).sum(2)


def spread(rest: Tensor, number: Tensor) -> Tensor:
    """(B, V) bool: `number` (B,) of the True entries of `rest` (B, V), at equal steps from the first to the last.

    The i-th of k among m entries is that of rank i * (m - 1) / (k - 1), halves rounded up; one alone is the first.
    """
    size = rest.sum(1, keepdim=True)
    steps, last = number[:, None] - 1, size - 1
    rank = rest.long().cumsum(1) - 1
    below = ((2 * rank - 1) * steps).clamp(min=0)
    i = -(-below // (2 * last).clamp(min=1))  # the first whose entry lies at this rank or behind it
    reached = (2 * i * last + steps) // (2 * steps).clamp(min=1)
    return rest & (reached == rank) & (i <= steps)
