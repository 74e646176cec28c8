"""AdaptInfer against its formulas in plain loops, its schedules against their published means, and its calibration."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmeff.pruning._calibrate_adaptinfer import Trajectory, change_points, to_config
from mmeff.pruning._schedule import PrunePoint
from mmeff.pruning.adaptinfer import AdaptInfer, prune_layers, solve_keeps
from mmeff.pruning.debiased import Debiased
from tests.pruning.fake_view import FakeView, attention, prompt_masks

VISUAL, TEXTS, HEADS = [23, 9, 31], [6, 11, 4], 3
MASKS = prompt_masks(VISUAL, TEXTS)
MATRIX = attention(MASKS.real, HEADS, seed=5)


class Poisoned(FakeView):
    """Entries of absent tokens are NaN."""

    def received(self, *args, **kwargs):
        return super().received(*args, **kwargs).masked_fill(~self.present[:, None], float("nan"))

    def text_attention(self, **kwargs):
        there = self.text[:, None, :, None] & self.text[:, None, None, :]
        return super().text_attention(**kwargs).masked_fill(~there, float("nan"))


def batch(**fields):
    return Poisoned(visual=MASKS.visual, real=MASKS.real, before=MATRIX, **fields)


def alone(b, **fields):
    start = MASKS.real.shape[1] - VISUAL[b] - TEXTS[b] - 1
    return Poisoned(
        visual=MASKS.visual[b : b + 1, start:],
        real=MASKS.real[b : b + 1, start:],
        before=MATRIX[b : b + 1, :, start:, start:],
        **fields,
    )


def formula(b, mix=1.0, prior="text", diagonal=True):
    """Steps 1 to 5 of the method for one row, with the matrices written out."""
    a = MATRIX[b].numpy()
    e = a.shape[1] - TEXTS[b]
    s = e - VISUAL[b]
    symmetric = []
    for h in range(HEADS):
        m = a[h, e:, e:]
        symmetric.append(m + m.T - (np.diag(np.diag(m)) if diagonal else 0))
    mean = np.mean(symmetric)
    scores = np.zeros(VISUAL[b])
    for h in range(HEADS):
        seen = a[h, e:, s:e]
        if prior == "uniform":
            scores += seen.mean(0) / seen.mean(0).sum()
            continue
        flattened = (1 - mix) * mean * np.ones_like(symmetric[h]) + mix * symmetric[h]
        for j in range(TEXTS[b]):
            scores += flattened[:, j].sum() * seen[j]
    return scores


def best(scores, k):
    return set(sorted(range(len(scores)), key=lambda v: (-scores[v], v))[:k])


def kept(mask, b):
    return set(mask[b].nonzero()[:, 0].tolist())


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "fields", [{}, {"prior_mix": 0.4}, {"prior_mix": 0.0}, {"prior": "uniform"}], ids=["default", "mix", "flat", "uniform"]
)  # fmt: skip
def test_scores_and_kept_tokens_follow_the_formula(fields):
    method = AdaptInfer(**fields)
    view = batch(keep=0.4)
    scores, mask = method.score(view), method.decide(view).keep
    for b in range(3):
        wanted = formula(b, fields.get("prior_mix", 1.0), fields.get("prior", "text"))
        np.testing.assert_allclose(scores[b, : VISUAL[b]].numpy(), wanted, rtol=1e-10)
        assert kept(mask, b) == best(wanted, round(0.4 * VISUAL[b]))


def test_other_formulas_are_told_apart():
    scores = AdaptInfer().score(batch())
    for b in range(3):
        for other in (formula(b, diagonal=False), formula(b, mix=0.9), formula(b, prior="uniform")):
            assert not np.allclose(scores[b, : VISUAL[b]].numpy(), other, rtol=1e-3)
    mask = AdaptInfer().decide(batch(keep=0.4)).keep
    assert any(kept(mask, b) != best(formula(b, prior="uniform"), round(0.4 * VISUAL[b])) for b in range(3))


@pytest.mark.parametrize("fields", [{}, {"prior_mix": 0.3}, {"prior": "uniform"}])
def test_a_row_is_the_same_alone(fields):
    method = AdaptInfer(**fields)
    together = method.decide(batch(keep=0.3)).keep
    for b in range(3):
        assert torch.equal(together[b, : VISUAL[b]], method.decide(alone(b, keep=0.3)).keep[0])
    assert not (together & ~batch().present).any()


def test_a_frame_keeps_its_share():
    frame = (torch.arange(max(VISUAL)).expand(3, -1) % 2).contiguous()
    mask = AdaptInfer(quota="frame").decide(batch(keep=0.5, frame=frame)).keep
    for b, n in enumerate(VISUAL):
        for f in (0, 1):
            places = [v for v in range(n) if v % 2 == f]
            scores = {v: formula(b)[v] for v in places}
            here = kept(mask, b) & set(places)
            assert here == set(sorted(places, key=lambda v: -scores[v])[: len(here)])
            assert abs(len(here) - 0.5 * len(places)) <= 1
        assert len(kept(mask, b)) == round(0.5 * n)


def test_a_point_always_drops_unless_it_is_to_keep_all():
    """The published rule is min(schedule, V - 1)."""
    initial = torch.tensor([46, 9, 31])
    assert AdaptInfer().decide(batch(keep=23, initial=torch.tensor([46, 46, 46]))).keep.sum(1).tolist() == [22, 8, 23]
    assert AdaptInfer().decide(batch(keep=0.5, initial=initial)).keep.sum(1).tolist() == [22, 4, 16]
    assert AdaptInfer().decide(batch(keep=1.0)).keep.sum(1).tolist() == VISUAL
    assert AdaptInfer().decide(batch(keep=0)).keep.sum(1).tolist() == [0, 0, 0]


def test_it_can_be_debiased():
    view = batch(keep=0.4)
    mask = Debiased(inner=AdaptInfer(), rate=0.2).decide(view).keep
    for b, n in enumerate(VISUAL):
        assert kept(mask, b) == best(formula(b) * np.exp(-0.2 * np.arange(n)), round(0.4 * n))


# ---------------------------------------------------------------- schedules


def mean_of(points, layers, visual):
    """Mean visual tokens over layers, layer by layer."""
    total = 0.0
    for layer in range(layers):
        left = [p.keep if isinstance(p.keep, int) else p.keep * visual for p in points if p.layer <= layer]
        total += left[-1] if left else visual
    return total / layers


@pytest.mark.parametrize(
    ("layers", "budget", "keeps", "mean"),
    [
        (32, 128, (290, 72, 18), 146.25),
        (32, 64, (133, 27, 3), 82.875),
        (32, 48, (80, 24, 2), 66.6875),
        (32, 32, (40, 12, 0), 51.0),
        (40, 128, (300, 94, 30), 134.05),
        (40, 64, (148, 40, 5), 74.475),
    ],
)
def test_published_counts(layers, budget, keeps, mean):
    found = AdaptInfer(budget=budget).points(layers)
    assert [p.layer for p in found] == [2, 11, 21]
    assert tuple(p.keep for p in found) == keeps
    assert mean_of(found, layers, 576) == pytest.approx(mean)
    model = {32: "LLaVA-1.5-7B", 40: "llava-1.5-13b"}[layers]
    assert AdaptInfer.for_model(model, budget=budget).points(layers) == found


@pytest.mark.parametrize("layers", [5, 6, 8, 12, 16, 22, 24, 28, 32, 36, 40, 48, 80])
@pytest.mark.parametrize("mean", [0.21, 0.25, 1 / 3, 0.5, 0.9])
def test_solved_schedules_meet_their_budget(layers, mean):
    method = AdaptInfer().at_budget(mean, layers)
    found = method.points(layers)
    assert mean_of(found, layers, 1) == pytest.approx(mean, abs=1e-12)
    assert all(1 > a.keep > b.keep > 0 for a, b in pairwise(found))
    assert method == AdaptInfer(budget=mean)


def test_budgets_in_tokens_are_of_the_initial_ones():
    assert AdaptInfer(budget=100).points(32) == AdaptInfer(budget=100 / 576).points(32)
    assert AdaptInfer(budget=256, initial=1024).points(32) == AdaptInfer(budget=0.25).points(32)
    assert mean_of(AdaptInfer(budget=128).points(28), 28, 576) == pytest.approx(128)  # published for 32 layers only
    assert mean_of(AdaptInfer(budget=128, initial=512).points(32), 32, 512) == pytest.approx(128)  # and 576 tokens
    assert mean_of(AdaptInfer(budget=48).points(40), 40, 576) == pytest.approx(48)  # not for 13B
    assert [p.keep for p in AdaptInfer(budget=576).points(32)] == [1.0, 1.0, 1.0]


def test_solutions_pass_through_the_published_decay():
    for stages in ((0.5, 0.25, 0.25), (0.23, 0.20, 0.11)):
        keeps = np.cumprod(stages)
        mean = (2 + 9 * keeps[0] + 10 * keeps[1] + 11 * keeps[2]) / 32
        np.testing.assert_allclose(solve_keeps((2, 11, 21), mean, 32), keeps, atol=1e-12)
    halfway = solve_keeps((2, 11, 21), 0.2, 32)
    assert 0.23 < halfway[0] < 0.5
    assert solve_keeps((2, 11, 21), 2 / 32, 32) == (0.0, 0.0, 0.0)
    four = solve_keeps((2, 11, 21, 30), 0.25, 32, ((0.5, 0.25),))
    assert four[3] / four[2] == pytest.approx(four[2] / four[1])  # the last factor serves further stages


@pytest.mark.parametrize(
    ("layers", "at"),
    [(32, (2, 11, 21)), (28, (2, 10, 19)), (6, (1, 3, 5)), (4, (1, 2, 3)), (3, (1, 2)), (2, (1,))],
)
def test_shallow_models_have_fewer_stages(layers, at):
    assert prune_layers(layers) == at
    assert tuple(p.layer for p in AdaptInfer(budget=0.9).points(layers)) == at


def test_presets():
    assert AdaptInfer.for_model("llava-1.5-7b") == AdaptInfer.for_model("llava-1.5-7b", budget=128)
    assert AdaptInfer.for_model("llava-1.5-7b", prior_mix=0.5).prior_mix == 0.5
    for budget, ratios in {0.1: (0.17, 0.6, 0.3), 0.3: (0.5, 0.6, 0.3), 0.5: (0.7, 0.9, 0.3)}.items():
        found = AdaptInfer.for_model("qwen2-vl-2b", budget=budget).points(28)
        assert [p.layer for p in found] == [1, 10, 20]
        np.testing.assert_allclose([p.keep for p in found], np.cumprod(ratios), rtol=1e-12)
    with pytest.raises(ValueError, match=r"no published schedule for 'llava-1.5-7c'.*llava-1.5-7b.*pass AdaptInfer\("):
        AdaptInfer.for_model("llava-1.5-7c")
    with pytest.raises(ValueError, match=r"budget 192 for 'llava-1.5-7b', only 128, 64, 48, 32; pass AdaptInfer\(bud"):
        AdaptInfer.for_model("llava-1.5-7b", budget=192)


def test_a_schedule_is_scaled_to_a_budget():
    method = AdaptInfer(schedule="1:0.5,4:0.25").at_budget(0.3, 8)
    found = method.points(8)
    assert [p.layer for p in found] == [1, 4]
    assert found[0].keep / found[1].keep == pytest.approx(2)
    assert mean_of(found, 8, 1) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"budget": 1024},
            r"AdaptInfer\.budget must be in \[1, 576\] visual tokens for this model, got 1024; "
            r"pass budget=128 for the paper's setting\.$",
        ),
        ({"budget": 0}, r"AdaptInfer\.budget must be in \[1, 576\] visual tokens"),
        ({"budget": 65, "initial": 64}, r"budget must be in \[1, 64\] .*, got 65; pass budget=0\.25\.$"),
        ({"budget": 1.5}, r"AdaptInfer\.budget must be a fraction in \(0, 1\] where it is a float, got 1\.5; pass an int"),
        ({"budget": 0.0}, r"must be a fraction in \(0, 1\]"),
        ({"initial": 0}, r"AdaptInfer\.initial must be >= 1 visual token, got 0"),
        ({"prior_mix": 1.1}, r"AdaptInfer\.prior_mix must be in \[0, 1\], got 1\.1"),
        ({"prior_mix": 0.5, "prior": "uniform"}, r"prior_mix must be 1 with prior=\"uniform\", got 0\.5"),
        ({"schedule": "0:0.5"}, r"AdaptInfer prunes before layers of at least 1"),
    ],
)  # fmt: skip
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaptInfer(**fields)


def test_budgets_out_of_reach():
    with pytest.raises(
        ValueError, match=r"first before layer 2 of 32, .* in \[0\.0625, 1\] of all, got a budget of 0\.05"
    ):
        AdaptInfer().at_budget(0.05, 32)
    with pytest.raises(ValueError, match=r"first before layer 1 of 4, .* in \[0\.25, 1\] .* got a budget of 0\.2222"):
        AdaptInfer().points(4)
    with pytest.raises(ValueError, match=r"must be a fraction of the visual tokens in \(0, 1\], got 1\.5"):
        AdaptInfer().at_budget(1.5, 32)
    with pytest.raises(ValueError, match="got a model of 1 layer"):
        AdaptInfer().points(1)


# ---------------------------------------------------------------- calibration


def staircase(size, steps, seed=0, noise=0.0):
    draw = np.random.default_rng(seed)
    levels = np.zeros((size, 2))
    for at, height in steps:
        levels[at:] += height
    return torch.tensor(levels + noise * draw.standard_normal((size, 2)))


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_change_points_are_found(noise):
    curves = staircase(32, [(1, (3.0, 1.0)), (10, (1.0, -2.0)), (20, (2.0, 2.0))], noise=noise)
    assert change_points(curves, 3) == (1, 10, 20)
    assert set(change_points(curves, 2)) < {1, 10, 20}
    moved = staircase(32, [(4, (3.0, 1.0)), (12, (1.0, -2.0)), (25, (2.0, 2.0))], noise=noise)
    assert change_points(moved, 3) == (4, 12, 25)


def test_one_change_is_the_split_of_least_cost():
    curves = torch.tensor(np.random.default_rng(3).standard_normal((17, 2)))
    x = curves.numpy()
    x = (x - x.mean(0)) / x.std(0)
    costs = {s: sum(((part - part.mean(0)) ** 2).sum() for part in (x[:s], x[s:])) for s in range(1, 17)}
    assert change_points(curves, 1) == (min(costs, key=costs.__getitem__),)


def test_columns_weigh_the_same_whatever_their_scale():
    curves = staircase(20, [(5, (1.0, 0.0)), (12, (0.0, 1.0))])
    assert change_points(curves * torch.tensor([1e6, 1e-3]), 2) == (5, 12)


def test_nothing_changes_in_flat_curves():
    assert (
        change_points(torch.ones(12, 2) + 1e-15 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), 3)
        == ()
    )
    assert change_points(staircase(12, [(5, (1.0, 1.0))]), 3) == (5,)
    for count in (0, 12):
        with pytest.raises(ValueError, match=rf"count must be in \[1, 11\] for curves over 12 layers, got {count}"):
            change_points(torch.ones(12, 2), count)
    with pytest.raises(ValueError, match="curves must be finite"):
        change_points(torch.full((12, 2), float("nan")), 1)


def test_a_trajectory_is_the_mean_of_its_samples():
    draw = np.random.default_rng(1)
    samples = draw.random((7, 4, 9))  # samples, layers, visual tokens
    trajectory = Trajectory(layers=4)
    for layer in range(4):
        trajectory.update(layer, torch.tensor(samples[:3, layer]))
        trajectory.update(layer, torch.tensor(samples[3:, layer]))
    maps = samples.mean(0)
    np.testing.assert_allclose(trajectory.maps().numpy(), maps)
    curves = trajectory.curves().numpy()
    np.testing.assert_allclose(curves[:, 0], np.cumsum(maps.sum(1)))
    for l in range(1, 4):
        a, b = maps[l], maps[l - 1]
        assert curves[l, 1] == pytest.approx(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert curves[0, 1] == curves[1, 1]


def bursts(layers, at, visual=12):
    """A model whose text looks at the picture in a few layers alone."""
    trajectory = Trajectory(layers=layers)
    profile = torch.linspace(1, 2, visual, dtype=torch.float64)[None]
    for layer in range(layers):
        trajectory.update(layer, profile * (0.5 if layer in at else 0.001) / visual)
    return trajectory


def test_calibrated_schedules_prune_behind_changes():
    method = to_config(bursts(32, (1, 10, 20)), budget=0.25)
    found = method.points(32)
    assert [p.layer for p in found] == [2, 11, 21]
    assert mean_of(found, 32, 1) == pytest.approx(0.25)
    assert [p.layer for p in to_config(bursts(24, (3, 9, 16)), budget=0.4).points(24)] == [4, 10, 17]
    assert to_config(bursts(32, (1, 10, 20)), budget=3).points(32) == found  # 3 of 12 tokens
    two = to_config(bursts(32, (5, 20)), budget=0.5, points=2).points(32)
    assert [p.layer for p in two] == [6, 21]
    assert mean_of(two, 32, 1) == pytest.approx(0.5)
    assert all(p.layer < 8 for p in to_config(bursts(8, (1, 7)), budget=0.5).points(8))  # nothing runs behind layer 7


def test_calibration_refuses():
    with pytest.raises(
        ValueError, match=r"AdaptInfer\.budget must be in \[1, 12\] visual tokens for this model, got 13"
    ):
        to_config(bursts(32, (1, 10, 20)), budget=13)
    with pytest.raises(ValueError, match="prunes first before layer 11 of 32"):
        to_config(bursts(32, (10, 20)), budget=0.2, points=2)
    even = Trajectory(layers=4)
    with pytest.raises(ValueError, match=r"every layer needs samples, got none for \[0, 1, 2, 3\]"):
        even.curves()
    even.update(0, torch.ones(1, 5))
    with pytest.raises(ValueError, match="same visual tokens, got 6 after 5; resize"):
        even.update(1, torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\] for this trajectory, got 4"):
        even.update(4, torch.ones(1, 5))
    with pytest.raises(ValueError, match="attention of layer 1 must be finite"):
        even.update(1, torch.full((1, 5), float("nan")))
    with pytest.raises(ValueError, match=r"\(samples, visual tokens\), none of them 0, got \(5,\)"):
        even.update(1, torch.ones(5))
    with pytest.raises(ValueError, match=r"Trajectory\.layers must be >= 3"):
        Trajectory(layers=2)
    blind = Trajectory(layers=4)
    for layer in range(4):
        blind.update(layer, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="the trajectory changes nowhere"):
        to_config(blind, budget=0.5)


def test_points_are_prune_points():
    assert AdaptInfer(schedule="2:0.5").points(8) == (PrunePoint(layer=2, keep=0.5),)
