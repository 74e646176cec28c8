"""Debiased against its formula in plain Python: positions, padding, tables, what it hands on, and how it is fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from mmeff.pruning import AdaptInfer, Debiased, FastV, PyramidDrop, SparseVLM, TransPrune, VLAPruner
from mmeff.pruning._base import InputPruner
from mmeff.pruning._calibrate_debiased import Trend, accumulate, fit_rate, to_config

from .fake_view import FakeView, attention, prompt_masks

VISUAL, TEXTS = [16, 9, 12], [4, 7, 3]
FRAMES = torch.tensor([[0] * 8 + [1] * 8, [0] * 9 + [0] * 7, [0] * 4 + [1] * 8 + [0] * 4])


def one_view(visual=VISUAL, texts=TEXTS, *, seed=1, keep=0.5, rows=None, frame=None, poison=False, **given):
    masks = prompt_masks(visual, texts)
    rows = list(range(len(visual))) if rows is None else rows
    matrix = attention(masks.real, 2, seed=seed)
    if poison:  # columns and rows of no token; a view hides them, and what it says of absent tokens is no number
        matrix = matrix.masked_fill(~masks.real[:, None, None, :], math.nan)
    return FakeView(
        visual=masks.visual[rows], real=masks.real[rows], before=matrix[rows], keep=keep,
        frame=None if frame is None else frame[rows], **given,
    )  # fmt: skip


def expected(view, b, weight, count, *, inside=None, padded=None, limit=1.0):
    """The tokens that stay in row b: the highest of attention times weight(i), i counted in each picture; by plain Python."""
    matrix, slots = view._attention("before")[b], view.slots()[b]
    seen: dict[int, int] = {}
    scores = {}
    for v in range(int(view.present[b].sum())):
        g = int(view.frame[b, v])
        i, seen[g] = seen.get(g, 0), seen.get(g, 0) + 1
        if (inside is None or g == inside) and (padded is None or padded[b][v] <= limit):
            heads = range(len(matrix))
            scores[v] = sum(float(matrix[h, -1, slots[v]]) for h in heads) / len(matrix) * weight(i)
    return sorted(sorted(scores, key=lambda v: -scores[v])[:count])


def kept(view, method):
    keep = method.decide(view).keep
    assert not (keep & ~view.present).any()
    return [k.nonzero()[:, 0].tolist() for k in keep]


def test_kept_tokens_are_those_of_the_formula():
    view, rate = one_view(), 0.15
    found = kept(view, Debiased(rate=rate))
    plain, half = kept(view, FastV()), [round(0.5 * n) for n in VISUAL]
    for b in range(3):
        assert found[b] == expected(view, b, lambda i: math.exp(-rate * i), half[b])
        assert plain[b] == expected(view, b, lambda i: 1.0, half[b])
    assert found != plain
    assert found != [expected(view, b, lambda i: math.exp(rate * i), half[b]) for b in range(3)]
    assert kept(view, Debiased(rate=0.0)) == plain


def test_positions_count_in_each_picture():
    view, rate = one_view(frame=FRAMES), 0.3
    found = kept(view, Debiased(rate=rate))
    for b, n in enumerate(VISUAL):
        assert found[b] == expected(view, b, lambda i: math.exp(-rate * i), round(0.5 * n))
    assert found != kept(one_view(), Debiased(rate=rate))  # as one picture


def test_positions_are_those_of_the_whole_picture_when_tokens_are_gone():
    """Of tokens 0, 1 and 8 of a picture, the last has index 8, not 2."""
    raster = torch.tensor([[0, 1, 8]])
    view = one_view([3], [4], original=raster, initial=torch.tensor([9]), raster=raster, keep=2)
    view._matrix["before"][..., -1, view.slots()[0]] = torch.tensor([0.14, 0.2, 0.3], dtype=torch.float64)
    assert kept(view, Debiased(rate=0.1)) == [[0, 1]]  # 0.3 * exp(-0.8) is the least; 0.3 * exp(-0.2) would be the most


def test_a_table_stands_for_the_exponential():
    table = tuple(1 / (1 + i) for i in range(16))
    view = one_view()
    found = kept(view, Debiased(table=table))
    for b, n in enumerate(VISUAL):
        assert found[b] == expected(view, b, lambda i: 1 / (1 + i), round(0.5 * n))
    torch.testing.assert_close(
        Debiased(table=tuple(math.exp(-0.15 * i) for i in range(16))).score(view), Debiased(rate=0.15).score(view)
    )


def test_a_table_for_smaller_pictures():
    with pytest.raises(
        ValueError, match=r"Debiased.table must have a weight .* got 15 for one with at least 16 tokens; fit"
    ):
        Debiased(table=(1.0,) * 15).decide(one_view())
    two = one_view(frame=FRAMES)
    Debiased(table=(1.0,) * 9).decide(two)  # the largest picture has 9 tokens


def test_padding_never_stays_and_a_budget_shrinks_to_what_is_left():
    draw = torch.Generator().manual_seed(4)
    padded = torch.rand(3, 16, generator=draw, dtype=torch.float64)
    padded[2] = 0.9
    padded[2, :3] = torch.tensor([0.5, 0.0, 0.2])  # at the limit stays
    view = one_view(padded=padded)
    found = kept(view, Debiased(rate=0.05))
    for b, n in enumerate(VISUAL):
        assert found[b] == expected(view, b, lambda i: math.exp(-0.05 * i), round(0.5 * n), padded=padded, limit=0.5)
    assert [len(f) for f in found] == [min(round(0.5 * n), sum(padded[b, :n] <= 0.5)) for b, n in enumerate(VISUAL)]
    assert found[2] == [0, 1, 2]
    assert kept(view, Debiased(rate=0.05, padding=1.0)) == kept(one_view(), Debiased(rate=0.05))
    assert kept(view, Debiased(rate=0.05, padding=0.3))[2] == [1, 2]


def test_where_the_host_cannot_tell_padding_only_positions_are_debiased():
    assert kept(one_view(padded=None), Debiased(rate=0.1, padding=0.0)) == kept(
        one_view(), Debiased(rate=0.1, padding=1.0)
    )


def test_quota_and_padding_per_picture():
    """Each picture keeps its share of the budget among the tokens that show something, by the inner method's quota."""
    padded = torch.zeros(3, 16)
    padded[0, 8:14] = 1.0
    view = one_view(frame=FRAMES, padded=padded)
    found = kept(view, Debiased(inner=FastV(quota="frame"), rate=0.1))
    # of 8 tokens of row 0, 6.4 and 1.6 belong to pictures of which 8 and 2 tokens are left; of 6 of row 2, 2 and 4
    for b, counts in ((0, (6, 2)), (2, (2, 4))):
        parts = [
            expected(view, b, lambda i: math.exp(-0.1 * i), n, inside=g, padded=padded, limit=0.5)
            for g, n in enumerate(counts)
        ]
        assert found[b] == [*parts[0], *parts[1]]


def test_a_row_is_the_same_alone_and_in_a_batch():
    padded = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    method = Debiased(rate=0.1)
    together = kept(one_view(frame=FRAMES, padded=padded), method)
    for b, n in enumerate(VISUAL):
        alone = one_view(rows=[b], frame=FRAMES[:, :n], padded=padded[[b], :n])
        assert kept(alone, method) == [together[b]]


def test_what_a_view_says_of_absent_tokens_does_not_matter():
    padded = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    clean, dirty = one_view(padded=padded), one_view(padded=padded, poison=True)
    dirty.padded = padded.masked_fill(~dirty.present, math.nan)
    dirty.raster = dirty.raster.masked_fill(~dirty.present, 10**6)
    for method in (Debiased(rate=0.1), Debiased(table=(0.5,) * 16), Debiased(inner=FastV(quota="frame"), rate=-0.1)):
        assert kept(dirty, method) == kept(clean, method)


# --- what it hands on --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Busy(InputPruner):
    """Uses everything a method may use."""

    needs = frozenset({"encoder"})

    def watches(self, layers):
        return frozenset({layers - 1})

    def observes(self, layers):
        return layers - 2

    def new_state(self):
        return []

    def observe(self, state, attention, *, prefill):
        state.append((attention, prefill))

    def reset_episode(self, state):
        state.clear()

    def score(self, view):
        return view.state[0][0]


def test_everything_else_is_the_inner_methods():
    inner = Busy(keep=0.3)
    method = Debiased(inner=inner)
    assert method.needs == {"encoder"}
    assert Debiased().needs == FastV().needs == frozenset()
    assert (method.points(8), method.watches(8), method.observes(8)) == (inner.points(8), {7}, 6)
    assert Debiased(inner=TransPrune()).watches(32) == TransPrune().watches(32)
    state = method.new_state()
    weights = torch.rand(1, 12)
    method.observe(state, weights, prefill=True)
    view = one_view([12], [3], state=state)
    torch.testing.assert_close(method.score(view), weights * torch.exp(-method.rate * torch.arange(12.0)))
    method.reset_episode(state)
    assert state == []
    with pytest.raises(TypeError, match="FastV keeps nothing from one prompt to the next"):
        Debiased().reset_episode(None)


def test_an_inner_method_counts_as_it_always_does():
    """AdaptInfer drops one token at least at a point that is not to keep all."""
    view = one_view()
    view.counts = torch.tensor([16, 9, 12])
    assert [len(k) for k in kept(view, Debiased(inner=AdaptInfer()))] == VISUAL
    view.initial = view.initial + 1
    assert [len(k) for k in kept(view, Debiased(inner=AdaptInfer()))] == [15, 8, 11]


@pytest.mark.parametrize("inner", [FastV(), PyramidDrop(), TransPrune(), FastV(schedule="2:200,5:100")])
def test_at_budget_is_the_inner_methods(inner):
    method = Debiased(inner=inner, rate=0.002).at_budget(0.6, 32)
    assert method == Debiased(inner=inner.at_budget(0.6, 32), rate=0.002)
    points = method.points(32)
    ends = [*(p.layer for p in points[1:]), 32]
    total = points[0].layer + sum(p.keep * (end - p.layer) for p, end in zip(points, ends, strict=True))
    assert total / 32 == pytest.approx(0.6)


@pytest.mark.parametrize("inner", [VLAPruner(), Debiased(), SparseVLM()])
def test_methods_that_decide_jointly_cannot_be_wrapped(inner):
    with pytest.raises(
        ValueError, match=r"Debiased.inner must be a method that ranks tokens by scores.* FastV, .*wrapped"
    ):
        Debiased(inner=inner)


def test_an_inner_method_by_name_or_mapping():
    assert Debiased(inner="pyramiddrop").inner == PyramidDrop()
    assert Debiased(inner={"method": "fastv", "keep": 0.3}).inner == FastV(keep=0.3)
    with pytest.raises(TypeError, match=r"Debiased\.inner must be TokenPruner, got Radial"):
        Debiased(inner="radial")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quota": "frame"},
            r"Debiased.quota must be left at 'prompt', got 'frame'; set the quota of the inner method",
        ),
        ({"rate": math.nan}, r"Debiased.rate must be finite, got nan"),
        ({"padding": -0.1}, r"Debiased.padding must be in \[0, 1\], got -0.1"),
        ({"padding": 1.1}, r"Debiased.padding must be in \[0, 1\], got 1.1"),
        ({"table": (1.0, -1.0)}, r"Debiased.table must hold finite weights >= 0, got -1.0 among 2"),
        ({"table": (math.inf,)}, r"Debiased.table must hold finite weights >= 0, got inf among 1"),
        ({"table": (1.0,), "rate": 0.1}, r"Debiased.rate must be left at 0.00179 where a table is given, got 0.1"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Debiased(**fields)


# --- published settings, and fitting one's own -------------------------------------------------------------------------


def test_published_settings():
    found = Debiased.for_method("PDrop")
    assert found == Debiased(inner=PyramidDrop(), rate=0.004, padding=0.3)
    assert found == Debiased.for_method("pyramid_drop")
    sparse = Debiased.for_method("sparsevlm")
    assert sparse == Debiased(inner=SparseVLM(recycle=0.0), rate=0.0023, padding=0.3)
    fastv = Debiased.for_method("fastv")
    assert fastv == Debiased()
    assert math.exp(-fastv.rate * 575) == pytest.approx(0.358, abs=2e-3)  # where the published table ends
    assert Debiased.for_method("himap", inner=FastV(layer=3)) == Debiased(
        inner=FastV(layer=3), rate=0.0022, padding=0.3
    )
    assert Debiased.for_method("tokencarve", inner="fastv", padding=1.0) == Debiased(rate=0.0017, padding=1.0)
    assert Debiased.for_method("pdrop", table=(1.0,)) == Debiased(inner=PyramidDrop(), table=(1.0,), padding=0.3)


def test_methods_without_a_published_setting():
    with pytest.raises(ValueError, match=r"no published setting for 'fastvv'\. Did you mean .*fastv"):
        Debiased.for_method("fastvv")
    with pytest.raises(ValueError, match="himap is not in this library; pass inner="):
        Debiased.for_method("himap")
    with pytest.raises(TypeError, match="Debiased has no field 'rates'"):
        Debiased.for_method("fastv", rates=0.1)


def test_a_planted_trend_is_found_again():
    """Attention that grows like exp(0.03 i) with noise, in pictures of several sizes and with absent tokens that are NaN."""
    draw = torch.Generator().manual_seed(2)
    trend = Trend.empty()
    for size in (20, 64, 40, 64):
        raster = torch.arange(size).expand(50, -1)
        noise = 0.5 + torch.rand(50, size, generator=draw, dtype=torch.float64)
        present = torch.rand(50, size, generator=draw) > 0.2
        scores = (torch.exp(0.03 * raster) * noise).masked_fill(~present, math.nan)
        trend = accumulate(trend, scores, raster, present)
    assert len(trend.total) == 64
    assert fit_rate(trend) == pytest.approx(0.03, rel=0.02)
    method = to_config(trend, PyramidDrop(), padding=0.3)
    assert method == Debiased(inner=PyramidDrop(), rate=fit_rate(trend), padding=0.3)


def test_a_fit_by_hand():
    """Two positions seen twice and three times, one never: the line through the logs of both means."""
    scores = torch.tensor([[1.0, 9.0, 4.0], [3.0, 9.0, 8.0], [9.0, 9.0, 6.0]])
    present = torch.tensor([[True, False, True], [True, False, True], [False, False, True]])
    trend = accumulate(Trend.empty(), scores, torch.arange(3).expand(3, -1), present)
    assert (trend.total.tolist(), trend.seen.tolist()) == ([4, 0, 18], [2, 0, 3])
    assert fit_rate(trend) == pytest.approx(math.log(6 / 2) / 2)
    further = accumulate(trend, scores, torch.arange(3).expand(3, -1), present)
    assert fit_rate(further) == pytest.approx(fit_rate(trend))


def test_a_fit_weighs_positions_by_how_often_they_were_seen():
    total, seen = torch.tensor([100.0, 200.0, 1.0]).double(), torch.tensor([100, 100, 1])
    assert fit_rate(Trend(total, seen)) == pytest.approx(weighted_slope([0, math.log(2), 0], [100, 100, 1]))


def weighted_slope(y, w):
    x = range(len(y))
    mean_x = sum(a * b for a, b in zip(w, x, strict=True)) / sum(w)
    mean_y = sum(a * b for a, b in zip(w, y, strict=True)) / sum(w)
    cov = sum(a * (b - mean_x) * (c - mean_y) for a, b, c in zip(w, x, y, strict=True))
    return cov / sum(a * (b - mean_x) ** 2 for a, b in zip(w, x, strict=True))


def test_too_little_to_fit():
    with pytest.raises(ValueError, match="at least 2 positions with attention, got 1"):
        fit_rate(Trend(torch.tensor([1.0, 0.0]), torch.tensor([1, 1])))
    with pytest.raises(ValueError, match="got 0"):
        to_config(Trend.empty(), FastV())
