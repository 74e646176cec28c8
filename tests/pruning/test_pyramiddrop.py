"""PyramidDrop against the published rule in plain loops, and its stages in models of other depths."""

from __future__ import annotations

import pytest
import torch

from mmeff.pruning.debiased import Debiased
from mmeff.pruning.pyramiddrop import PyramidDrop
from tests.pruning.fake_view import FakeView, attention, prompt_masks

VISUAL, TEXTS, HEADS = [23, 9, 31], [6, 11, 4], 3
MASKS = prompt_masks(VISUAL, TEXTS)
BEFORE, NEXT = attention(MASKS.real, HEADS, seed=1), attention(MASKS.real, HEADS, seed=2)


class Poisoned(FakeView):
    """Entries of absent tokens are NaN."""

    def received(self, *args, **kwargs):
        return super().received(*args, **kwargs).masked_fill(~self.present[:, None], float("nan"))


def batch(**fields):
    return Poisoned(visual=MASKS.visual, real=MASKS.real, before=BEFORE, next=NEXT, **fields)


def alone(b, **fields):
    start = MASKS.real.shape[1] - VISUAL[b] - TEXTS[b] - 1
    matrices = {"before": BEFORE, "next": NEXT}
    matrices = {name: x[b : b + 1, :, start:, start:] for name, x in matrices.items()}
    return Poisoned(visual=MASKS.visual[b : b + 1, start:], real=MASKS.real[b : b + 1, start:], **matrices, **fields)


def scores_of(b, matrix=NEXT, row=-1):
    a = matrix[b].tolist()
    e = len(a[0]) - TEXTS[b]
    return [sum(a[h][row][v] for h in range(HEADS)) / HEADS for v in range(e - VISUAL[b], e)]


def best(scores, k):
    return set(sorted(range(len(scores)), key=lambda v: (-scores[v], v))[:k])


def kept(mask, b):
    return set(mask[b].nonzero()[:, 0].tolist())


def test_the_last_row_of_the_next_layer_decides():
    mask = PyramidDrop().decide(batch(keep=0.4)).keep
    for b, n in enumerate(VISUAL):
        assert kept(mask, b) == best(scores_of(b), round(0.4 * n))
    for other in ({"matrix": BEFORE}, {"row": -2}):
        assert any(kept(mask, b) != best(scores_of(b, **other), round(0.4 * n)) for b, n in enumerate(VISUAL))


def test_a_row_is_the_same_alone():
    together = PyramidDrop().decide(batch(keep=0.3)).keep
    for b, n in enumerate(VISUAL):
        assert torch.equal(together[b, :n], PyramidDrop().decide(alone(b, keep=0.3)).keep[0])
    assert not (together & ~batch().present).any()


def test_all_and_none():
    assert torch.equal(PyramidDrop().decide(batch(keep=1.0)).keep, batch().present)
    assert not PyramidDrop().decide(batch(keep=0)).keep.any()


def test_a_frame_keeps_its_share():
    frame = (torch.arange(max(VISUAL)) >= 8).long().expand(3, -1).contiguous()
    mask = PyramidDrop(quota="frame").decide(batch(keep=0.5, frame=frame)).keep
    for b, n in enumerate(VISUAL):
        first = kept(mask, b) & set(range(8))
        rest = kept(mask, b) - first
        assert len(first) + len(rest) == round(0.5 * n)
        assert abs(len(first) - 4) <= 1
        assert first == best(scores_of(b)[:8], len(first))
        assert {v - 8 for v in rest} == best(scores_of(b)[8:], len(rest))


def test_it_can_be_debiased():
    mask = Debiased(inner=PyramidDrop(), rate=0.2).decide(batch(keep=0.4)).keep
    for b, n in enumerate(VISUAL):
        weighed = [s * 2.718281828459045 ** (-0.2 * v) for v, s in enumerate(scores_of(b))]
        assert kept(mask, b) == best(weighed, round(0.4 * n))


@pytest.mark.parametrize(
    ("layers", "at", "keeps"),
    [
        (32, [8, 16, 24], [0.5, 0.25, 0.125]),
        (28, [7, 14, 21], [0.5, 0.25, 0.125]),
        (6, [2, 3, 4], [0.5, 0.25, 0.125]),
        (3, [1, 2], [0.5, 0.125]),
        (2, [1], [0.125]),
    ],
)
def test_stages_lie_at_the_same_depth(layers, at, keeps):
    found = PyramidDrop().points(layers)
    assert [p.layer for p in found] == at
    assert [p.keep for p in found] == keeps


def mean_of(points, layers):
    total = 0.0
    for layer in range(layers):
        left = [p.keep for p in points if p.layer <= layer]
        total += left[-1] if left else 1.0
    return total / layers


def test_budgets():
    assert 576 * mean_of(PyramidDrop().points(32), 32) == 270
    for layers, mean in ((32, 0.3), (28, 0.5), (6, 0.4)):
        found = PyramidDrop().at_budget(mean, layers).points(layers)
        assert [p.layer for p in found] == [p.layer for p in PyramidDrop().points(layers)]
        assert mean_of(found, layers) == pytest.approx(mean)
    with pytest.raises(
        ValueError, match=r"first before layer 8 of 32, .* at least 0\.25 of all, got a budget of 0\.2;"
    ):
        PyramidDrop().at_budget(0.2, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stages": (0.5, 0.25, 0.75)},
            r"PyramidDrop\.stages must ascend in \(0, 1\), got \(0\.5, 0\.25, 0\.75\); pass",
        ),
        ({"stages": (0.0, 0.25, 0.75)}, r"stages must ascend in \(0, 1\)"),
        ({"stages": (0.2, 0.25, 1.0)}, r"stages must ascend in \(0, 1\)"),
        ({"stages": (), "keep": ()}, r"stages must ascend in \(0, 1\)"),
        (
            {"stages": (0.5,)},
            r"PyramidDrop\.keep must have a fraction for each of 1 stages, got \(0\.5, 0\.25, 0\.125\)\.",
        ),
        ({"keep": (0.5, 0.6, 0.1)}, r"PyramidDrop\.keep must be fractions in \[0, 1\] that do not grow, got"),
        ({"keep": (1.5, 0.6, 0.1)}, r"keep must be fractions in \[0, 1\]"),
        ({"keep": (0.5, 0.2, -0.1)}, r"keep must be fractions in \[0, 1\]"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        PyramidDrop(**fields)
    with pytest.raises(ValueError, match="got a model of 1 layer"):
        PyramidDrop().points(1)
