"""TransPrune against its formula in plain Python, over three prune points with tokens leaving in between."""

from __future__ import annotations

import math

import pytest
import torch

from mmeff.pruning import TransPrune
from mmeff.pruning._base import Transition
from mmeff.pruning.transprune import shares, transition

from .fake_view import FakeView, attention, prompt_masks

VISUAL, TEXTS = [11, 6, 9], [4, 7, 3]


def sublayer(masks, visual, seed, *, poison=True):
    """Random ratios and cosines of every token of a layer; what is padding, or no token at all, is NaN."""
    draw = torch.Generator().manual_seed(seed)
    ratio = torch.rand(masks.real.shape, generator=draw, dtype=torch.float64) + 0.1
    cosine = 2 * torch.rand(masks.real.shape, generator=draw, dtype=torch.float64) - 1
    if poison:
        ratio, cosine = (x.masked_fill(~masks.real, math.nan) for x in (ratio, cosine))
    return Transition(ratio, cosine, masks.real, visual)


def visual_slots(visual):
    width = int(visual.sum(1).max())
    return (~visual).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]


def one_view(visual=VISUAL, texts=TEXTS, *, keep=0.5, layer=9, layers=32, watched=(6, 7, 8), rows=None):
    """A view before `layer` with everything still present; `rows` takes these rows of the batch, alone."""
    masks = prompt_masks(visual, texts)
    matrix = attention(masks.real, 2, seed=1)
    moved = {i: tuple(sublayer(masks, visual_slots(masks.visual), 10 * i + k) for k in (0, 1)) for i in watched}
    if rows is not None:
        masks.visual, masks.real, matrix = masks.visual[rows], masks.real[rows], matrix[rows]
        slots = visual_slots(masks.visual)
        moved = {i: tuple(Transition(t.ratio[rows], t.cosine[rows], masks.real, slots) for t in pair)
                 for i, pair in moved.items()}  # fmt: skip
    return FakeView(
        visual=masks.visual, real=masks.real, next=matrix, keep=keep, layer=layer, layers=layers, moved=moved
    )


def expected_scores(matrix, real, visual, text, transitions):
    """One row's scores by column, from the formula. `transitions`: (ratio, cosine, real columns) of each watched sublayer."""
    columns = [j for j in range(len(real)) if visual[j]]
    ttv = dict.fromkeys(columns, 0.0)
    for ratio, cosine, there in transitions:
        total = sum(math.exp(1 - float(cosine[j])) for j in range(len(there)) if there[j])
        for j in columns:
            ttv[j] += float(ratio[j]) * math.exp(1 - float(cosine[j])) / total
    heads = len(matrix)
    rows = [i for i in range(len(real)) if text[i]]
    iga = {j: sum(float(matrix[h, i, j]) for h in range(heads) for i in rows) / heads / len(rows) for j in columns}
    return {j: ttv[j] / sum(ttv.values()) + iga[j] / sum(iga.values()) for j in columns}


def text_of(masks, b):
    last = max(j for j in range(masks.real.shape[1]) if masks.visual[b, j])
    return [j > last for j in range(masks.real.shape[1])]


def kept(view, method=None):
    """Indices among each row's original visual tokens that stay."""
    keep = (method or TransPrune()).decide(view).keep
    assert not (keep & ~view.present).any()
    return [view.original[b][keep[b]].tolist() for b in range(len(keep))]


def test_scores_and_kept_tokens_are_those_of_the_formula():
    view, masks = one_view(), prompt_masks(VISUAL, TEXTS)
    scores, chosen = TransPrune().score(view), kept(view)
    for b, count in enumerate(VISUAL):
        pairs = [t for i in (6, 7, 8) for t in view.transitions(i)]
        rows = [(t.ratio[b], t.cosine[b], masks.real[b]) for t in pairs]
        wanted = expected_scores(view._attention("next")[b], masks.real[b], masks.visual[b], text_of(masks, b), rows)
        assert scores.dtype == torch.float64
        assert scores[b, :count].tolist() == pytest.approx(list(wanted.values()), rel=1e-12)
        assert scores[b, :count].sum() == pytest.approx(2)
        best = sorted(range(count), key=lambda i: -list(wanted.values())[i])[: round(0.5 * count)]
        assert chosen[b] == sorted(best)
        alone = expected_scores(view._attention("next")[b], masks.real[b], masks.visual[b], text_of(masks, b), rows[1:])
        assert scores[b, :count].tolist() != pytest.approx(list(alone.values()), rel=1e-6)  # every sublayer counts


def test_three_points_with_tokens_leaving_between_them():
    """Layers after a point see fewer tokens, in other places; transitions of the earlier ones are looked up again."""
    method = TransPrune()
    masks = prompt_masks(VISUAL, TEXTS)
    real, original = masks.real, [list(range(n)) for n in VISUAL]
    columns = [[j for j in range(real.shape[1]) if real[b, j]] for b in range(3)]  # of each row, as tokens leave
    before: dict[int, list] = {}  # layer -> per row {column: (ratio, cosine)} of both sublayers
    for point in method.points(32):
        start = max(before, default=5) + 1
        for layer in range(start, point.layer):
            draw = torch.Generator().manual_seed(layer)
            values = torch.rand(3, real.shape[1], 2, 2, generator=draw, dtype=torch.float64) + 0.05
            before[layer] = [{j: values[b, j] for j in columns[b]} for b in range(3)]
        width = real.shape[1]
        visual = torch.zeros_like(masks.visual)
        for b in range(3):
            visual[b, [j for j in columns[b] if masks.visual[b, j]]] = True
        here = torch.zeros_like(real)
        for b in range(3):
            here[b, columns[b]] = True
        matrix = attention(here, 2, seed=point.layer)
        slots = visual_slots(visual)
        moved = {}
        for layer, rows in before.items():
            size = max(map(len, rows))
            order = [sorted(row) for row in rows]  # compacted, as the host would hold them, padding in front
            there = torch.tensor([[j >= size - len(o) for j in range(size)] for o in order])
            pair = []
            for k in (0, 1):
                packed = torch.full((3, size, 2), math.nan, dtype=torch.float64)
                place = torch.zeros(slots.shape, dtype=torch.long)
                for b, o in enumerate(order):
                    for i, j in enumerate(o):
                        packed[b, size - len(o) + i] = rows[b][j][k]
                    for v in range(int(visual[b].sum())):
                        place[b, v] = size - len(o) + o.index(int(slots[b, v]))
                pair.append(Transition(packed[..., 0], 1 - packed[..., 1], there, place))
            moved[layer] = tuple(pair)
        present = [int(visual[b].sum()) for b in range(3)]
        index = torch.zeros(3, max(present), dtype=torch.long)
        for b in range(3):
            index[b, : present[b]] = torch.tensor(original[b])
        view = FakeView(
            visual=visual, real=here, next=matrix, keep=point.keep, layer=point.layer, layers=32, moved=moved,
            original=index, initial=torch.tensor(VISUAL),
        )  # fmt: skip
        chosen = kept(view)
        for b in range(3):
            rows = []
            for layer in sorted(before):
                for k in (0, 1):
                    values = [before[layer][b].get(j) for j in range(width)]
                    rows.append((
                        [math.nan if v is None else v[k][0] for v in values],
                        [math.nan if v is None else 1 - v[k][1] for v in values],
                        [v is not None for v in values],
                    ))  # fmt: skip
            wanted = expected_scores(matrix[b], here[b], visual[b], text_of(masks, b), rows)
            count = round(point.keep * VISUAL[b])
            best = sorted(wanted, key=lambda j: -wanted[j])[:count]
            first = min(j for j in range(width) if masks.visual[b, j])
            assert chosen[b] == sorted(j - first for j in best)
            original[b] = chosen[b]
            columns[b] = [j for j in columns[b] if not masks.visual[b, j] or j - first in chosen[b]]
    assert [len(o) for o in original] == [round(0.125 * n) for n in VISUAL]


def test_only_layers_before_the_point_are_asked_for():
    view = one_view(layer=7, keep=0.5, watched=(6,))
    assert [len(k) for k in kept(view)] == [round(0.5 * n) for n in VISUAL]
    with pytest.raises(KeyError):
        kept(one_view(layer=9, watched=(6, 7)))  # layer 8 is missing


def test_a_row_is_the_same_alone_and_in_a_batch():
    together = one_view()
    for b in range(3):
        alone = one_view(rows=[b])
        assert kept(alone)[0] == kept(together)[b]
        torch.testing.assert_close(TransPrune().score(alone)[0], TransPrune().score(together)[b, : VISUAL[b]])


def test_softmax_runs_over_text_too_and_not_over_padding():
    masks = prompt_masks([3, 2], [2, 2])
    given = sublayer(masks, visual_slots(masks.visual), 5)
    found = transition(given)
    for b, count in enumerate((3, 2)):
        real = [j for j in range(6) if masks.real[b, j]]
        total = sum(math.exp(1 - float(given.cosine[b, j])) for j in real)
        for v in range(count):
            j = int(given.visual[b, v])
            assert float(found[b, v]) == pytest.approx(
                float(given.ratio[b, j]) * math.exp(1 - float(given.cosine[b, j])) / total
            )


def test_shares():
    scores = torch.tensor([[1.0, 3.0, math.nan], [0.0, 0.0, 0.0]])
    present = torch.tensor([[True, True, False], [True, True, True]])
    assert shares(scores, present).tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("layers", "at"), [(32, (7, 9, 12)), (40, (9, 11, 15)), (28, (6, 8, 10)), (6, (1, 2, 3)), (4, (1, 2, 3))]
)
def test_points_and_watched_layers_scale_with_depth(layers, at):
    method = TransPrune()
    assert [(p.layer, p.keep) for p in method.points(layers)] == list(zip(at, (0.875, 0.625, 0.125), strict=True))
    assert method.watches(layers) == set(range(at[0] - 1, at[2]))


def test_the_published_layers_are_watched():
    assert TransPrune().watches(32) == {6, 7, 8, 9, 10, 11}  # 7 to 12, counted from 1
    assert TransPrune(schedule="2:0.5,5:0.25").watches(32) == {1, 2, 3, 4}


def test_a_model_that_is_too_shallow():
    with pytest.raises(
        ValueError, match=r"TransPrune prunes before layers .* at most 2, for a model of 3 layers; got layer 3"
    ):
        TransPrune().points(3)


@pytest.mark.parametrize("keep", [(0.5, 0.6, 0.1), (1.1, 0.5, 0.1), (0.5, 0.2, -0.1)])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=r"TransPrune.keep must be fractions in \[0, 1\] that do not grow, got \("):
        TransPrune(keep=keep)


@pytest.mark.parametrize("mean", [0.3, 0.5, 0.9])
def test_at_budget(mean):
    method = TransPrune().at_budget(mean, 32)
    points = method.points(32)
    assert [p.layer for p in points] == [7, 9, 12]
    ends = [*(p.layer for p in points[1:]), 32]
    total = points[0].layer + sum(p.keep * (end - p.layer) for p, end in zip(points, ends, strict=True))
    assert total / 32 == pytest.approx(mean)
    assert method.watches(32) == TransPrune().watches(32)


def test_a_budget_below_the_first_layers():
    with pytest.raises(ValueError, match=r"TransPrune prunes first before layer 7 of 32"):
        TransPrune().at_budget(0.2, 32)


def test_quota_per_frame():
    view = one_view([8], [3])
    view.frame = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    keep = TransPrune(quota="frame").decide(view).keep[0]
    assert keep[:4].sum() == keep[4:].sum() == 2
