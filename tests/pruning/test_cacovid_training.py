"""Samplers and losses of CaCoVID's training: against loops, against their limits, and in the direction of the reward."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mmeff.pruning import _cacovid_training as rl


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------- how much is kept


def test_kept_per_frame():
    assert rl.kept_per_frame(0.02, 196) == 4  # the published setting
    assert rl.kept_per_frame(0.02, 36) == 1
    assert rl.kept_per_frame(0.12, 36) == 4


def test_alpha_follows_the_difficulty():
    limits = {"start": 0.02, "floor": 0.01, "cap": 0.12}
    assert rl.next_alpha(0.02, 0.875, **limits) == 0.01
    assert rl.next_alpha(0.01, 1.0, **limits) == 0.01
    assert rl.next_alpha(0.02, 0.125, **limits) == 0.04
    assert rl.next_alpha(0.08, 0.0, **limits) == 0.12
    assert rl.next_alpha(0.02, 0.5, **limits) == 0.02
    assert rl.next_alpha(0.2, 0.0, start=0.2, floor=0.01, cap=0.12) == 0.2
    assert rl.next_alpha(0.005, 1.0, start=0.005, floor=0.01, cap=0.12) == 0.005


# -------------------------------------------------------------------- token masks


@pytest.mark.parametrize(("size", "alpha"), [(196, 0.02), (36, 0.02), (36, 0.12), (7, 0.5), (5, 1.0), (196, 0.04)])
def test_token_masks_keep_the_same_number_in_every_frame(size, alpha):
    logits = torch.randn(6, size, generator=draw(1))
    masks = rl.token_masks(logits, alpha, 9, draw(2))
    assert masks.shape == (9, 6, size)
    assert (masks.sum(2) == rl.kept_per_frame(alpha, size)).all()
    best = torch.zeros(6, size, dtype=torch.bool).scatter_(1, logits.topk(rl.kept_per_frame(alpha, size)).indices, True)
    assert torch.equal(masks[0], best)
    assert torch.equal(masks, rl.token_masks(logits, alpha, 9, draw(2)))
    if alpha < 0.5:
        assert not torch.equal(masks, rl.token_masks(logits, alpha, 9, draw(3)))


def test_drawn_tokens_of_a_frame_are_of_one_group_of_like_rank():
    logits = torch.randn(3, 196, generator=draw(1))
    rank = logits.argsort(1, descending=True).argsort(1)
    masks = rl.token_masks(logits, 0.02, 200, draw(2))
    groups = [[i for i in range(196) if i * 25 // 196 == g] for g in range(25)]
    seen = set()
    for mask in masks[1:]:
        for f in range(3):
            ranks = rank[f][mask[f]].tolist()
            (group,) = {r * 25 // 196 for r in ranks}
            assert set(ranks) <= set(groups[group])
            seen.add(group)
    assert seen == set(range(25))


def test_draws_follow_limited_probabilities():
    """8 tokens, 2 kept: 2 groups of 4. The first holds nearly all the mass, and is limited to 0.9."""
    logits = torch.tensor([[9.0, 9.0, 9.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
    masks = rl.token_masks(logits, 0.25, 4001, draw(0))[1:, 0]
    assert masks[:, :4].any(1).float().mean() == pytest.approx(0.9, abs=0.02)
    # inside a group: one token of 4 with all the mass may have 2 of 4 shares, the others half a share each
    steep = torch.tensor([[20.0, 0.0, -0.01, -0.02, -30.0, -30.0, -30.0, -30.0]])
    masks = rl.token_masks(steep, 0.25, 8001, draw(0))[1:, 0]
    pairs = Counter(tuple(m.nonzero()[:, 0].tolist()) for m in masks if m[:4].any())
    with_first = sum(n for pair, n in pairs.items() if 0 in pair) / sum(pairs.values())
    weight = [2, 0.5, 0.5, 0.5]
    total = sum(weight)
    missing = sum(
        (w / total) * (v / (total - w)) for i, w in enumerate(weight[1:]) for j, v in enumerate(weight[1:]) if i != j
    )
    assert with_first == pytest.approx(1 - missing, abs=0.02)


def test_limited_shares_are_filled_in_proportion():
    shares = torch.tensor([[8.0, 1.0, 0.6, 0.4], [1.0, 1.0, 1.0, 1.0], [5.0, 4.0, 0.5, 0.5], [0.0, 0.0, 0.0, 1.0]])
    found = rl.limit_shares(shares.double(), 0.4)
    torch.testing.assert_close(found[0], torch.tensor([0.4, 0.3, 0.18, 0.12]).double())
    torch.testing.assert_close(found[1], torch.full((4,), 0.25).double())
    torch.testing.assert_close(found[2], torch.tensor([0.4, 0.4, 0.1, 0.1]).double())
    torch.testing.assert_close(found[3], torch.tensor([0.2, 0.2, 0.2, 0.4]).double())
    # the second fills up only after the first was cut
    torch.testing.assert_close(
        rl.limit_shares(torch.tensor([10.0, 3.0, 1.0, 1.0]).double(), 0.35),
        torch.tensor([0.35, 0.35, 0.15, 0.15]).double(),
    )
    torch.testing.assert_close(
        rl.limit_shares(torch.tensor([1.0, 9.0]).double(), 0.1), torch.tensor([0.5, 0.5]).double()
    )


@pytest.mark.parametrize("seed", range(5))
def test_limited_shares_are_probabilities(seed):
    shares = torch.rand(50, 25, generator=draw(seed), dtype=torch.float64) ** 8
    p = rl.limit_shares(shares, 0.1)
    assert p.max() <= 0.1 + 1e-9
    torch.testing.assert_close(p.sum(1), torch.ones(50).double())
    free = p < 0.1 - 1e-9
    ratio = (p / shares.clamp(min=1e-12)).masked_fill(~free, math.nan)
    for row in ratio:
        kept = row[~row.isnan() & (row < 1e6)]
        assert torch.allclose(kept, kept[:1], rtol=1e-3)  # below the limit shares keep their proportions


# -------------------------------------------------------------------- density peaks, content and frame masks


def expected_peaks(x):
    """Loops over one set of points."""
    n, width = x.shape
    d = [[float((x[i] - x[j]).norm()) / math.sqrt(width) for j in range(n)] for i in range(n)]
    rho = [math.exp(-sum(v * v for v in sorted(row)[:4]) / min(4, n)) for row in d]
    scores = []
    for i in range(n):
        above = [d[i][j] for j in range(n) if rho[j] > rho[i]]
        scores.append(rho[i] * (min(above) if above else max(max(row) for row in d)))
    return scores


def test_density_peaks():
    x = torch.randn(3, 17, 6, generator=draw(4), dtype=torch.float32)
    found = rl.density_peaks(x)
    for row, score in zip(x.double(), found, strict=True):
        torch.testing.assert_close(score, torch.tensor(expected_peaks(row)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, rl.density_peaks(x * 1.1), atol=1e-5)


def test_content_takes_one_token_of_each_cluster():
    centres = 8 * torch.eye(4, 12)
    x = (centres.repeat_interleave(9, 0) + 0.1 * torch.randn(36, 12, generator=draw(5)))[
        torch.randperm(36, generator=draw(6))
    ]
    mask = rl.content_mask(x[None], 4)[0]
    assert mask.sum() == 4
    assert sorted(x[mask].argmax(1).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("frames", "size", "k", "taken"), [(32, 16, 1, 4), (8, 36, 3, 1), (8, 4, 2, 4), (1, 9, 2, 1)])
def test_frame_masks_lie_in_the_drawn_frames(frames, size, k, taken):
    logits = torch.randn(frames, generator=draw(7))
    video = torch.randn(frames, size, 10, generator=draw(8))
    masks, chosen = rl.frame_masks(logits, video, k, 5, 0.125, draw(9))
    assert (chosen.sum(1) == taken).all()  # ceil(0.125 * frames), or as many as hold k tokens per frame
    assert (masks.sum((1, 2)) == k * frames).all()
    assert not (masks.any(2) & ~chosen).any()
    assert set(chosen[0].nonzero()[:, 0].tolist()) == set(logits.topk(taken).indices.tolist())
    for mask, frame in zip(masks, chosen, strict=True):
        scores = torch.tensor(expected_peaks(video[frame].flatten(0, 1).double()))
        best = set(scores.topk(k * frames).indices.tolist())
        assert set(mask[frame].flatten().nonzero()[:, 0].tolist()) == best
    again = rl.frame_masks(logits, video, k, 5, 0.125, draw(9))
    assert torch.equal(masks, again[0])


def test_frames_are_drawn_with_limited_probabilities():
    """One frame has nearly all of the softmax, and may have three equal shares: 0.3 of 0.3 + what the others have left."""
    logits = torch.tensor([5.0] + [0.0] * 9)
    _, chosen = rl.frame_masks(logits, torch.randn(10, 5, 4), 1, 4001, 0.05, draw(1))
    others = 9 * torch.softmax(logits, 0)[1]
    # k = 1 of 5 tokens needs two of ten frames: one and then another, drawn without putting back
    p, q = 0.3 / (0.3 + others), (others / 9) / (0.3 + others)
    assert chosen[1:, 0].float().mean() == pytest.approx(float(p + 9 * q * 0.3 / (0.3 + others - others / 9)), abs=0.02)


# -------------------------------------------------------------------- rewards to losses


def test_advantages():
    rewards = torch.tensor([0.0, 1.0, 1.0, 4.0])
    wanted = (rewards - 1.5) / (math.sqrt((2.25 + 0.25 + 0.25 + 6.25) / 3) + 1e-4)
    torch.testing.assert_close(rl.advantages(rewards), wanted)
    assert rl.advantages(torch.full((5,), 0.3)).abs().max() < 1e-6  # nothing to prefer
    assert rl.advantages(torch.tensor([7.0])).tolist() == [0.0]


def test_actions_are_those_of_a_two_output_head():
    two = torch.randn(11, 2, generator=draw(2), dtype=torch.float64)
    masks = torch.rand(4, 11, generator=draw(3)) < 0.3
    wanted = torch.stack([two.log_softmax(-1).gather(1, m.long()[:, None])[:, 0] for m in masks])
    torch.testing.assert_close(rl.action_log_probs(two[:, 1] - two[:, 0], masks), wanted)


def expected_gain(new, old, kept, gain, low, high):
    def log_prob(z):
        return -math.log1p(math.exp(-z if kept else z))

    ratio = math.exp(log_prob(new) - log_prob(old))
    return min(ratio * gain, min(max(ratio, 1 - low), 1 + high) * gain)


def test_losses_against_loops():
    masks = torch.rand(6, 9, generator=draw(3)) < 0.3
    masks[:, 0] = True
    new, old = (torch.randn(9, generator=draw(s), dtype=torch.float64) for s in (4, 5))
    rewards = torch.rand(6, generator=draw(6), dtype=torch.float64)
    gains = rl.advantages(rewards).tolist()
    weighted, plain = [], []
    for m, gain in zip(masks.tolist(), gains, strict=True):
        share = sum(m) / 9
        parts = [expected_gain(new[i].item(), old[i].item(), m[i], gain, 0.2, 0.28) for i in range(9)]
        weights = [1 - share if kept else share for kept in m]
        assert sum(w for w, kept in zip(weights, m, strict=True) if kept) == pytest.approx(sum(weights) / 2)
        weighted.append(sum(w * x for w, x in zip(weights, parts, strict=True)) / sum(weights))
        plain += parts
    limits = {"low": 0.2, "high": 0.28}
    assert float(rl.token_loss(new, old, masks, rewards, **limits)) == pytest.approx(-sum(weighted) / 6)
    assert float(rl.frame_loss(new, old, masks, rewards, **limits)) == pytest.approx(-sum(plain) / len(plain))
    assert float(rl.token_loss(new, old, masks, rewards, low=0.1, high=0.28)) != pytest.approx(-sum(weighted) / 6)


def test_clipping_stops_the_gradient_of_what_moved_far_enough():
    masks = torch.tensor([[True, False], [False, True]])
    rewards = torch.tensor([1.0, 0.0])  # keep the first token, drop the second
    old = torch.zeros(2)
    near = torch.tensor([0.1, -0.1], requires_grad=True)
    rl.token_loss(near, old, masks, rewards, low=0.2, high=0.28).backward()
    assert near.grad[0] < 0 < near.grad[1]
    far = torch.tensor([3.0, -3.0], requires_grad=True)
    rl.token_loss(far, old, masks, rewards, low=0.2, high=0.28).backward()
    assert far.grad.abs().max() == 0
    wrong = torch.tensor([-3.0, 3.0], requires_grad=True)  # moved the wrong way: not held back
    rl.token_loss(wrong, old, masks, rewards, low=0.2, high=0.28).backward()
    assert wrong.grad[0] < 0 < wrong.grad[1]


def test_the_old_policy_gets_no_gradient():
    logits = torch.zeros(3, requires_grad=True)
    masks = torch.eye(3, dtype=torch.bool)
    rl.frame_loss(logits, logits, masks, torch.tensor([1.0, 0.0, 0.0]), low=0.2, high=0.28).backward()
    assert logits.grad.abs().max() > 0
    assert logits.grad[0] < 0


def test_divergence_from_even():
    assert float(rl.divergence_from_even(torch.zeros(5))) == pytest.approx(0.0, abs=1e-6)
    p = 0.8
    wanted = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert float(rl.divergence_from_even(torch.full((4,), math.log(4.0)))) == pytest.approx(wanted, rel=1e-5)
    assert float(rl.divergence_from_even(torch.tensor([60.0, -60.0]))) == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_planted_tokens_are_found(sign):
    """Plain logits as the policy: steps on the loss raise the tokens that the reward likes, or none of them when it does not."""
    liked = torch.zeros(4, 18, dtype=torch.bool)
    liked[:, [2, 7, 11]] = True
    logits = torch.zeros(4, 18, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(50):
        old = logits.detach().clone()
        masks = rl.token_masks(old, 0.17, 24, draw(step))
        rewards = sign * (masks & liked).sum((1, 2)).float()
        for _ in range(3):
            loss = rl.token_loss(logits.flatten(), old.flatten(), masks.flatten(1), rewards, low=0.2, high=0.28)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = int(liked.gather(1, logits.topk(3).indices).sum())
    assert found >= 10 if sign > 0 else found == 0  # of 12; 2 by chance
