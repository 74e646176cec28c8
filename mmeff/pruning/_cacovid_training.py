"""What CaCoVID learns from: masks that are drawn for a question, and the losses of their rewards.

Pure functions of one question, whose video has F frames of P tokens; M masks. Everything random comes from a given CPU
generator, so a training is a function of its seed. `mmeff.pipelines.train_cacovid` puts them together.

A mask keeps `k` tokens per frame on the mean. Three kinds: one "content" mask takes the density peaks of each frame and is
only looked at, as a baseline; "token" masks follow the token head, "frame" masks the frame head. Masks of a question are
always drawn from the policy as it was before the question's first update, which is what ratios are taken against.

Reading order: the samplers, `density_peaks`, then rewards to advantages to losses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEIGHBOURS = 4  # of a token's density, itself among them
GROUP = 2  # tokens of a group for each one that is drawn from it
MOST_GROUP = 2.0  # most of a group's probability, in equal shares; between the two below
GROUP_LIMITS = (0.1, 0.9)
TOKEN_LIMITS = (0.5, 2.0)  # of a token's probability inside its group, in equal shares
MOST_FRAME = 3.0  # most of a frame's probability, in equal shares
EASY, HARD = 0.875, 0.125  # mean rewards from and to which the next masks keep half, or twice, as much


def kept_per_frame(alpha: float, tokens: int) -> int:
    """Tokens kept in each frame at the fraction `alpha`; at least one."""
    return max(1, round(alpha * tokens))


def next_alpha(alpha: float, reward: float, *, start: float, floor: float, cap: float) -> float:
    """The fraction kept by the next masks of a question: half after an easy round, twice after a hard one.

    Args: reward: mean of the last round, in [0, 1]. start: the question's first fraction; floor and cap give way to it.
    """
    if reward >= EASY:
        return max(alpha / 2, min(floor, start))
    return min(alpha * 2, max(cap, start)) if reward <= HARD else alpha


# -------------------------------------------------------------------- samplers


def token_masks(logits: Tensor, alpha: float, number: int, generator: torch.Generator) -> Tensor:
    """Masks (number, F, P) of `kept_per_frame` tokens in every frame: the best ones first, then online draws.

    The first mask takes the tokens of the highest logits (F, P). For every other one each frame's tokens, sorted by their
    probability, are cut into groups about twice as large as what is kept; one group is drawn by its limited mass, and the
    tokens are drawn inside it. So a mask compares tokens of like rank, and no group starves.
    """
    frames, size = logits.shape
    k = kept_per_frame(alpha, size)
    p = logits.detach().double().cpu().softmax(1)
    ranked, order = p.sort(dim=1, descending=True, stable=True)
    groups = min(max(int(1 / alpha / GROUP), 1), size // k)
    group = torch.arange(size) * groups // size  # sizes differ by one at most where they cannot be equal
    mass = torch.zeros(frames, groups, dtype=p.dtype).index_add_(1, group, ranked)
    limit = min(max(MOST_GROUP / groups, GROUP_LIMITS[0]), GROUP_LIMITS[1]) if groups > 1 else 1.0
    chosen = torch.multinomial(limit_shares(mass, limit), number, replacement=True, generator=generator)  # (F, number)
    share = ranked / mass.gather(1, group.expand(frames, -1)).clamp(min=torch.finfo(p.dtype).tiny)
    equal = 1.0 / torch.bincount(group, minlength=groups)[group]
    share = torch.minimum(torch.maximum(share, TOKEN_LIMITS[0] * equal), TOKEN_LIMITS[1] * equal)
    inside = share[:, None] * (group == chosen[..., None])  # (F, number, P), by rank
    ranks = torch.multinomial(inside.flatten(0, 1), k, generator=generator).view(frames, number, k)
    ranks[:, 0] = torch.arange(k)
    places = order[:, None].expand(-1, number, -1).gather(2, ranks)
    masks = torch.zeros(frames, number, size, dtype=torch.bool).scatter_(2, places, True)
    return masks.transpose(0, 1).contiguous().to(logits.device)


def frame_masks(
    logits: Tensor, embeds: Tensor, k: int, number: int, fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masks (number, F, P) of k * F tokens that all lie in a few frames, and which frames these are (number, F).

    The first mask takes the frames of the highest logits (F,), the others draw them by their limited probabilities; in the
    drawn frames together the density peaks of `embeds` (F, P, D) are kept. `fraction` of the frames are taken, more where
    they have fewer than k * F tokens.
    """
    frames, size, width = embeds.shape
    taken = min(frames, max(math.ceil(fraction * frames), math.ceil(k * frames / size)))
    p = logits.detach().double().cpu().softmax(0).clamp(min=1e-9, max=MOST_FRAME / frames)
    drawn = torch.multinomial(p.expand(number, -1), taken, generator=generator)
    drawn[0] = _best(logits.detach().double().cpu(), taken)
    drawn = drawn.sort(dim=1).values
    pool = embeds[drawn.to(embeds.device)].view(number, taken * size, width)
    best = _best(density_peaks(pool), k * frames)
    kept = torch.zeros(number, taken * size, dtype=torch.bool, device=embeds.device).scatter_(1, best, True)
    chosen = torch.zeros(number, frames, dtype=torch.bool).scatter_(1, drawn, True).to(embeds.device)
    masks = torch.zeros(number, frames, size, dtype=torch.bool, device=embeds.device)
    masks[chosen] = kept.view(-1, size)
    return masks, chosen


def content_mask(embeds: Tensor, k: int) -> Tensor:
    """(F, P) bool: in every frame the k density peaks of `embeds` (F, P, D)."""
    scores = density_peaks(embeds)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, _best(scores, k), True)


def _best(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores of the last axis; ties to the earlier one."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def density_peaks(x: Tensor) -> Tensor:
    """Scores (..., N) of tokens (..., N, D): how dense their surroundings are, times how far away a denser token is.

    Density is exp(-mean squared distance) to the four nearest, the token itself among them, distances being divided by
    sqrt(D); the densest token gets the largest distance of all. Of equally dense tokens the earlier counts as denser.
    """
    x = x.detach().float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[-1])
    count = x.shape[-2]
    density = (-distance.topk(min(NEIGHBOURS, count), largest=False).values.square().mean(-1)).exp()
    earlier = torch.ones(count, count, dtype=torch.bool, device=x.device).tril(-1)
    mine, other = density[..., :, None], density[..., None, :]
    denser = (other > mine) | ((other == mine) & earlier)
    farthest = distance.flatten(-2).amax(-1)[..., None, None]
    return torch.where(denser, distance, farthest).amin(-1) * density


def limit_shares(shares: Tensor, most: float) -> Tensor:
    """Probabilities (..., G) in proportion to `shares` with none above `most`: what is cut off goes to the others in proportion.

    Where `most` is below 1 / G every group gets the same.
    """
    count = shares.shape[-1]
    if most * count <= 1:
        return torch.full_like(shares, 1 / count)
    p = shares.clamp(min=1e-12)
    p = p / p.sum(-1, keepdim=True)
    full = torch.zeros_like(p, dtype=torch.bool)
    for _ in range(
        int(1 / most) + 1
    ):  # every round fills a group or is the last, and more than 1 / most are never full
        full = full | (p >= most)
        left = 1 - most * full.sum(-1, keepdim=True)
        others = p.masked_fill(full, 0.0)
        scale = left / others.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        p = torch.where(full, most, others * scale)
    return p


# -------------------------------------------------------------------- rewards to losses


def advantages(rewards: Tensor) -> Tensor:
    """(M,) rewards of all masks of one kind that a question has seen, minus their mean, in standard deviations."""
    if rewards.numel() < 2:
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def action_log_probs(logits: Tensor, masks: Tensor) -> Tensor:
    """(M, N) log-probability that each of the N tokens or frames is kept, where a mask keeps it, or dropped, where not.

    The heads have two outputs, of which `logits` (N,) is the difference, so each action is a coin of its own.
    """
    return torch.nn.functional.logsigmoid(torch.where(masks, logits, -logits))


def clipped_gain(logits: Tensor, old: Tensor, masks: Tensor, gain: Tensor, *, low: float, high: float) -> Tensor:
    """(M, N) PPO's clipped objective: the smaller of ratio * gain and clip(ratio, 1 - low, 1 + high) * gain.

    Args: logits, old: (N,) of the policy now and before the first update. masks: (M, N) bool. gain: (M,) advantages.
    """
    ratio = (action_log_probs(logits, masks) - action_log_probs(old.detach(), masks)).exp()
    return torch.minimum(ratio * gain[:, None], ratio.clamp(1 - low, 1 + high) * gain[:, None])


def token_loss(logits: Tensor, old: Tensor, masks: Tensor, rewards: Tensor, *, low: float, high: float) -> Tensor:
    """Minus the clipped gain of the token masks, where kept and dropped tokens of a mask count equally though few are kept.

    Args: logits, old: (N,). masks: (M, N) bool. rewards: (M,).
    """
    gains = clipped_gain(logits, old, masks, advantages(rewards), low=low, high=high)
    share = masks.to(gains.dtype).mean(1, keepdim=True)
    weight = torch.where(masks, 1 - share, share)
    return -((gains * weight).sum(1) / weight.sum(1).clamp(min=1e-7)).mean()


def frame_loss(logits: Tensor, old: Tensor, masks: Tensor, rewards: Tensor, *, low: float, high: float) -> Tensor:
    """Minus the clipped gain of the frame masks; plain mean. Args: as `token_loss`, with frames for tokens."""
    return -clipped_gain(logits, old, masks, advantages(rewards), low=low, high=high).mean()


def divergence_from_even(logits: Tensor) -> Tensor:
    """Mean divergence of each coin from a fair one, in nats: 0 where all logits are 0, log 2 where the policy is certain."""
    p = logits.sigmoid()
    entropy = -(p * torch.nn.functional.logsigmoid(logits) + (1 - p) * torch.nn.functional.logsigmoid(-logits))
    return math.log(2) - entropy.mean()
