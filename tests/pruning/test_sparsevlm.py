"""SparseVLM against its formulas in plain loops: raters, ranks, recycling by density peaks, and SparseVLM+."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mmeff.pruning.debiased import Debiased
from mmeff.pruning.sparsevlm import SparseVLM, choose_raters, distances, merge_clusters, split_budget
from tests.pruning.fake_view import FakeView, attention, prompt_masks

VISUAL, TEXTS, HEADS, WIDTH, TURNED = [61, 25, 90], [6, 11, 4], 6, 5, 16
MASKS = prompt_masks(VISUAL, TEXTS)
MATRIX = attention(MASKS.real, HEADS, seed=3)
DRAW = torch.Generator().manual_seed(8)
EMBEDDED = torch.randn(*MASKS.real.shape, WIDTH, generator=DRAW, dtype=torch.float64)
HIDDEN = torch.randn(*MASKS.real.shape, WIDTH, generator=DRAW, dtype=torch.float64)
NAN = float("nan")


def rotary(size):
    angles = torch.arange(size, dtype=torch.float64)[:, None] * 10000 ** (-torch.arange(TURNED // 2) * 2 / TURNED)
    angles = torch.cat([angles, angles], dim=1)[None]
    return angles.cos(), angles.sin()


class View(FakeView):
    """Offers attention from text to visual tokens; entries of absent tokens are NaN."""

    def received(self, *args, **kwargs):
        return super().received(*args, **kwargs).masked_fill(~self.present[:, None], NAN)

    def text_attention(self, *, to="text", where="before"):
        assert to == "visual"
        rows = self._text_slots[:, None, :, None].expand(-1, HEADS, -1, self.real.shape[1])
        columns = self._slots[:, None, None].expand(-1, HEADS, self.text.shape[1], -1)
        there = self.text[:, None, :, None] & self.present[:, None, None]
        return self._attention(where).gather(2, rows).gather(3, columns).masked_fill(~there, NAN)

    def embeddings(self):
        return super().embeddings().masked_fill(~self.present[..., None], NAN)

    def text_embeddings(self):
        return super().text_embeddings().masked_fill(~self.text[..., None], NAN)

    def hidden(self):
        return super().hidden().masked_fill(~self.present[..., None], NAN)


def batch(method, visual=MASKS.visual, layers=8, **fields):
    """A view at the first prune point of a model of 8 layers; visual tokens that `visual` lacks were dropped earlier."""
    given = {"layer": method.points(layers)[0].layer, "state": method.new_state(), "layers": layers, **fields}
    turns = [x.expand(3, -1, -1).masked_fill(~MASKS.real[..., None], NAN) for x in rotary(MASKS.real.shape[1])]
    return View(
        visual=visual,
        real=MASKS.real & (visual | ~MASKS.visual),
        before=MATRIX,
        embedded=EMBEDDED,
        entering=HIDDEN,
        rotary=tuple(turns),
        **given,
    )


def start_of(b):
    return MASKS.real.shape[1] - VISUAL[b] - TEXTS[b] - 1


def alone(method, b, **fields):
    s = start_of(b)
    return View(
        visual=MASKS.visual[b : b + 1, s:], real=MASKS.real[b : b + 1, s:], before=MATRIX[b : b + 1, :, s:, s:],
        embedded=EMBEDDED[b : b + 1, s:], entering=HIDDEN[b : b + 1, s:], layer=method.points(8)[0].layer, layers=8,
        rotary=tuple(x[:, s:] for x in rotary(MASKS.real.shape[1])), state=method.new_state(), **fields,
    )  # fmt: skip


# ---------------------------------------------------------------- the method, in loops


def raters_of(b, places=None):
    """Text tokens j with mean_v softmax_j(E_v . E_j) above the mean over j."""
    e = MASKS.real.shape[1] - TEXTS[b]
    places = range(e - VISUAL[b], e) if places is None else places
    embedded = EMBEDDED[b].numpy()
    share = [0.0] * TEXTS[b]
    for v in places:
        logits = [float(embedded[v] @ embedded[e + j]) for j in range(TEXTS[b])]
        top = max(logits)
        chances = [math.exp(x - top) for x in logits]
        for j in range(TEXTS[b]):
            share[j] += chances[j] / sum(chances) / len(places)
    return [j for j in range(TEXTS[b]) if share[j] > sum(share) / TEXTS[b]]


def scores_of(b, version="v1.5", heads=None, raters=None):
    a = MATRIX[b].numpy()
    size = a.shape[1]
    e = size - TEXTS[b]
    s = e - VISUAL[b]
    raters = raters_of(b) if raters is None else raters
    rows = [e + j for j in raters]
    seen = a[:, rows, s:e].copy()
    if version == "v2":
        cos, sin = (x[0].numpy() for x in rotary(size))
        turned = np.concatenate([-np.ones(TURNED // 2), np.ones(TURNED // 2)])  # of a vector of ones
        ones = cos + turned * sin
        still = float(ones[0] @ ones[0])
        for r, i in enumerate(rows):
            for v in range(VISUAL[b]):
                seen[:, r, v] /= max(float(ones[i] @ ones[s + v]) / still, 0.05)
    used = range(HEADS) if heads is None else sorted(range(HEADS), key=lambda h: -seen[h].sum())[:heads]
    return seen[list(used)].mean((0, 1))


def best(scores, k, among=None):
    among = range(len(scores)) if among is None else among
    return sorted(among, key=lambda v: (-scores[v], v))[:k]


def peaks(x, count):
    """DPC-kNN: centres, and for each the members of its cluster. Of tokens as dense as each other the earlier is denser:
    two that are nearest to each other are, where there are two clusters."""
    n = len(x)
    d = [[math.sqrt(((x[i] - x[j]) ** 2).mean()) for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(t**2 for t in sorted(row)[:count]) / count) for row in d]
    farthest = max(max(row) for row in d)
    order = [(density[i], -i) for i in range(n)]
    ahead = [min([d[i][j] for j in range(n) if order[j] > order[i]], default=farthest) for i in range(n)]
    centres = sorted(best([a * b for a, b in zip(ahead, density, strict=True)], count))
    clusters = {c: [c] for c in centres}
    for i in range(n):
        if i not in clusters:
            clusters[min(centres, key=lambda c: d[i][c])].append(i)
    return clusters


def split_of(total, visual, ratio=0.3):
    """Ranked and clustered tokens, by trying."""
    for ranked in range(visual, -1, -1):
        dropped = visual - ranked
        clusters = (min(int(dropped * ratio) + 1, dropped) // 10 + 1) if dropped else 0
        if ranked + clusters <= total:
            return ranked, total - ranked
    return 0, total


def recycled_of(b, total, scores, ratio=0.3):
    """Tokens kept by rank, and the clusters of the best others, as indices of visual tokens."""
    ranked, clusters = split_of(total, VISUAL[b], ratio)
    keep = best(scores, ranked)
    rest = [v for v in range(VISUAL[b]) if v not in keep]
    chosen = sorted(best(scores, min(int(len(rest) * ratio) + 1, len(rest)), rest))
    e = MASKS.real.shape[1] - TEXTS[b]
    x = HIDDEN[b, e - VISUAL[b] : e].numpy()
    found = peaks(x[chosen], clusters)
    return set(keep), {chosen[c]: x[[chosen[m] for m in members]].mean(0) for c, members in found.items()}


def kept(mask, b):
    return set(mask[b].nonzero()[:, 0].tolist())


# ---------------------------------------------------------------- raters and ranks


def test_raters():
    view = batch(SparseVLM())
    raters = choose_raters(view.embeddings(), view.text_embeddings(), view.present, view.text)
    assert [sorted(kept(raters, b)) for b in range(3)] == [raters_of(b) for b in range(3)]
    assert all(0 < len(raters_of(b)) < TEXTS[b] for b in range(3))


def test_all_text_rates_where_none_stands_out():
    same = torch.ones(1, 4, 3)
    raters = choose_raters(torch.randn(1, 7, 3), same[:, :1], torch.ones(1, 7).bool(), torch.ones(1, 1).bool())
    assert raters.tolist() == [[True]]
    text = torch.tensor([[True, True, False, False]])
    raters = choose_raters(torch.randn(1, 7, 3), 0 * same, torch.ones(1, 7).bool(), text)
    assert raters.tolist() == text.tolist()


@pytest.mark.parametrize("fields", [{}, {"heads": 2}, {"version": "v2"}, {"version": "v2", "heads": 3}], ids=str)
def test_scores_and_ranks_follow_the_formula(fields):
    method = SparseVLM(recycle=0.0, **fields)
    view = batch(method, keep=0.4)
    scores, mask = method.score(view), method.decide(view).keep
    for b, n in enumerate(VISUAL):
        wanted = scores_of(b, **fields)
        np.testing.assert_allclose(scores[b, :n].numpy(), wanted, rtol=1e-6)
        assert kept(mask, b) == set(best(wanted, round(0.4 * n)))


def test_other_formulas_are_told_apart():
    scores = {v: SparseVLM(version=v, heads=3).score(batch(SparseVLM())) for v in ("v1.5", "v2")}
    for b, n in enumerate(VISUAL):
        ours = {v: x[b, :n].numpy() for v, x in scores.items()}
        assert not np.allclose(ours["v1.5"], scores_of(b, "v2", 3), rtol=1e-3)
        assert not np.allclose(ours["v1.5"], scores_of(b, "v1.5", 2), rtol=1e-3)
        assert not np.allclose(ours["v2"], scores_of(b, "v2", 3, raters=range(TEXTS[b])), rtol=1e-3)


def test_the_pull_of_the_rotary_embedding_is_bounded_below():
    """With visual tokens turned half around, it is negative everywhere: attention is divided by the bound then."""
    method = SparseVLM(version="v2")
    view = batch(method)
    view._rotary = tuple(x * torch.where(MASKS.visual[..., None], -1.0, 1.0) for x in view._rotary)
    plain = SparseVLM().score(batch(method))
    torch.testing.assert_close(method.score(view)[view.present], 20 * plain[view.present], rtol=1e-6, atol=0)


def test_raters_are_chosen_once_from_all_visual_tokens():
    method = SparseVLM(recycle=0.0)
    first = batch(method, keep=0.4)
    method.decide(first)
    left = MASKS.visual & (torch.arange(MASKS.real.shape[1]) % 11 == 0)
    second = batch(
        method, visual=left, layer=method.points(8)[1].layer, state=first.state, keep=2, initial=torch.tensor(VISUAL)
    )
    mask = method.decide(second).keep
    differs = 0
    for b, n in enumerate(VISUAL):
        e = MASKS.real.shape[1] - TEXTS[b]
        places = [v for v in range(n) if left[b, e - n + v]]
        remembered, chosen_now = (
            set(best(scores_of(b, raters=r)[places], 2)) for r in (raters_of(b), raters_of(b, [e - n + v for v in places]))
        )  # fmt: skip
        assert kept(mask, b) == remembered
        differs += remembered != chosen_now
    assert differs
    new = batch(method, keep=0.4, state=first.state)
    new._embedded = EMBEDDED.flip(2) * torch.linspace(-1, 1, WIDTH)
    method.decide(new)  # another prompt, whose raters replace those of the one before
    fresh = choose_raters(new.embeddings(), new.text_embeddings(), new.present, new.text)
    assert torch.equal(first.state.raters, fresh)
    assert [sorted(kept(fresh, b)) for b in range(3)] != [raters_of(b) for b in range(3)]


# ---------------------------------------------------------------- recycling


@pytest.mark.parametrize("fields", [{}, {"recycle": 0.8}, {"recycle": 1.0}, {"version": "v2", "recycle": 0.5}], ids=str)
def test_the_best_of_the_dropped_are_merged(fields):
    method = SparseVLM(**fields)
    view = batch(method, keep=0.4)
    decision = method.decide(view)
    assert decision.hidden is not None
    for b, n in enumerate(VISUAL):
        e = MASKS.real.shape[1] - TEXTS[b]
        keep, means = recycled_of(b, round(0.4 * n), scores_of(b, method.version), method.recycled)
        assert kept(decision.keep, b) == keep | set(means)
        assert len(keep) + len(means) == round(0.4 * n) == int(decision.keep[b].sum())
        for v in keep:
            np.testing.assert_array_equal(decision.hidden[b, v].numpy(), HIDDEN[b, e - n + v].numpy())
        for v, mean in means.items():
            np.testing.assert_allclose(decision.hidden[b, v].numpy(), mean, rtol=1e-10)
            assert not np.allclose(mean, HIDDEN[b, e - n + v].numpy()) or len(means) >= n // 5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_clusters_match_density_peaks(count):
    """More clusters than a view has of a kind, and clouds that are plainly apart."""
    draw = np.random.default_rng(count)
    middles = 6.0 * np.eye(3, 8)
    x = np.concatenate([m + 0.3 * draw.standard_normal((11, 8)) for m in middles])
    chosen = torch.ones(1, 33, dtype=torch.bool)
    centres, hidden = merge_clusters(torch.tensor(x)[None], chosen, torch.tensor([count]), 1.0)
    wanted = peaks(x, count)
    assert kept(centres, 0) == set(wanted)
    for c, members in wanted.items():
        np.testing.assert_allclose(hidden[0, c].numpy(), x[members].mean(0), rtol=1e-10)
    if count == 3:
        assert sorted(len(m) for m in wanted.values()) == [11, 11, 11]
        assert sorted(c // 11 for c in wanted) == [0, 1, 2]


def test_equal_and_distant_tokens_are_clustered():
    twins = torch.ones(1, 20, 4)
    centres, hidden = merge_clusters(twins, torch.ones(1, 20).bool(), torch.tensor([2]), 0.95)
    assert kept(centres, 0) == {0, 1}
    assert torch.equal(hidden, twins)
    far = 1e4 * torch.arange(20.0)[None, :, None].expand(1, 20, 4)  # all densities but one are 0 in float32
    centres, _ = merge_clusters(far, torch.ones(1, 20).bool(), torch.tensor([3]), 0.95)
    assert int(centres.sum()) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_keep_near_neighbours_apart(dtype):
    """Against differences in float64, with a common part a thousand times as large as what tells tokens apart."""
    draw = torch.Generator().manual_seed(4)
    x = (1e3 + torch.randn(2, 37, 65, generator=draw, dtype=torch.float64)).to(dtype)
    x[:, 5], x[:, 9] = x[:, 3], torch.nan
    got, wide = distances(x), x.double()
    right = (wide[:, :, None] - wide[:, None]).norm(dim=-1)
    assert got.dtype == dtype and torch.equal(got.isnan(), right.isnan())
    assert got[:, 3, 5].tolist() == [0.0, 0.0] and not got.diagonal(dim1=1, dim2=2).nan_to_num().any()
    near = ~right.isnan() & (right > 0)
    # products of 65 numbers of 1e6 round by 1e-8 at most, squares of distances are about 130
    assert ((got - right) / right)[near].abs().max() < (1e-6 if dtype == torch.float32 else 1e-9)


def test_states_keep_their_dtype():
    x = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    centres, hidden = merge_clusters(x, torch.ones(1, 20).bool(), torch.tensor([2]), 0.95)
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(hidden[~centres], x[~centres])


@pytest.mark.parametrize("fields", [{}, {"version": "v2"}, {"version": "v2", "recycle": 0.4, "heads": 2}], ids=str)
def test_a_row_is_the_same_alone(fields):
    method = SparseVLM(**fields)
    together = method.decide(batch(method, keep=0.3))
    for b, n in enumerate(VISUAL):
        single = method.decide(alone(method, b, keep=0.3))
        assert torch.equal(together.keep[b, :n], single.keep[0])
        if single.hidden is not None:
            ours, theirs = together.hidden[b, :n][single.keep[0]], single.hidden[0][single.keep[0]]
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not (together.keep & ~batch(method).present).any()


@pytest.mark.parametrize("keep", [1.0, 0, 1, 2, 3, 7, 24, 25])
def test_exactly_as_many_stay(keep):
    method = SparseVLM()
    mask = method.decide(batch(method, keep=keep)).keep
    wanted = VISUAL if keep == 1.0 and isinstance(keep, float) else [keep] * 3
    assert mask.sum(1).tolist() == wanted


def test_a_frame_keeps_its_share():
    frame = (torch.arange(max(VISUAL)) >= 10).long().expand(3, -1).contiguous()
    method = SparseVLM(recycle=0.0, quota="frame")
    mask = method.decide(batch(method, keep=0.5, frame=frame)).keep
    for b, n in enumerate(VISUAL):
        first = kept(mask, b) & set(range(10))
        assert abs(len(first) - 5) <= 1
        assert first == set(best(scores_of(b), len(first), range(10)))
        assert len(kept(mask, b)) == round(0.5 * n)


def test_it_can_be_debiased_without_recycling():
    inner = SparseVLM(recycle=0.0)
    mask = Debiased(inner=inner, rate=0.1).decide(batch(inner, keep=0.4)).keep
    for b, n in enumerate(VISUAL):
        assert kept(mask, b) == set(best(scores_of(b) * np.exp(-0.1 * np.arange(n)), round(0.4 * n)))
    with pytest.raises(ValueError, match=r"Debiased\.inner must be a method that ranks tokens"):
        Debiased(inner=SparseVLM())


# ---------------------------------------------------------------- budgets


def test_totals_are_split_into_ranked_and_clusters():
    for ratio in (0.3, 0.5, 1.0):
        for visual in (1, 2, 5, 40, 87):
            totals = torch.arange(visual + 3)
            ranked, clusters = split_budget(totals, torch.full_like(totals, visual), 90, ratio)
            wanted = [split_of(min(n, visual), visual, ratio) for n in totals.tolist()]
            assert list(zip(ranked.tolist(), clusters.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(
    ("version", "budget", "ranked", "mean"),
    [
        ("v1.5", 192, (300, 200, 110), 206.5),
        ("v1.5", 128, (303, 110, 36), 145.40625),
        ("v1.5", 96, (238, 48, 26), 114.09375),
        ("v1.5", 64, (66, 30, 17), 82.25),
        ("v2", 192, (300, 200, 118), 206.75),
        ("v2", 128, (238, 108, 60), 144.125),
        ("v2", 64, (66, 34, 20), 81.8125),
    ],
)
def test_published_counts(version, budget, ranked, mean):
    """As in the code, whose clusters come on top of the table."""
    points = SparseVLM(version=version, budget=budget).points(32)
    assert [p.layer for p in points] == [3, 7, 16]
    totals, visual = [p.count(576) for p in points], 576
    for total, n in zip(totals, ranked, strict=True):
        added = int((visual - n) * 0.3 + 1) // 10 + 1 if version == "v1.5" else 0
        assert total == n + added
        if added:
            found = split_budget(torch.tensor([total]), torch.tensor([visual]), 600, 0.3)
            assert [x.item() for x in found] == [n, added]
        visual = total
    assert (3 * 576 + 4 * totals[0] + 9 * totals[1] + 16 * totals[2]) / 32 == mean


def test_without_recycling_the_table_is_all():
    points = SparseVLM(recycle=0.0).points(32)
    assert [p.count(576) for p in points] == [300, 200, 110]


@pytest.mark.parametrize(("layers", "at"), [(32, [3, 7, 16]), (28, [3, 6, 14]), (6, [1, 2, 4]), (3, [1, 2]), (2, [1])])
def test_stages_lie_at_the_same_depth(layers, at):
    points = SparseVLM().points(layers)
    assert [p.layer for p in points] == at
    assert all(a.keep > b.keep for a, b in pairwise(points))


def mean_of(points, layers):
    total = 0.0
    for layer in range(layers):
        left = [p.keep for p in points if p.layer <= layer]
        total += left[-1] if left else 1.0
    return total / layers


def test_budgets():
    for layers, mean in ((32, 1 / 3), (32, 128 / 576), (28, 0.5), (6, 0.4)):
        for version in ("v1.5", "v2"):
            method = SparseVLM(version=version).at_budget(mean, layers)
            assert mean_of(method.points(layers), layers) == pytest.approx(mean)
    with pytest.raises(
        ValueError, match=r"first before layer 3 of 32, .* at least 0\.09375 of all, got a budget of 0\.05;"
    ):
        SparseVLM().at_budget(0.05, 32)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"budget": 100}, TypeError, r"SparseVLM\.budget must be one of 192, 128, 96, 64, got 100"),
        (
            {"budget": 96, "version": "v2"},
            ValueError,
            r"SparseVLM\.budget must be one of 192, 128, 64 in v2, got 96; or pass",
        ),
        ({"recycle": 1.5}, ValueError, r"SparseVLM\.recycle must be in \[0, 1\], got 1\.5; None"),
        ({"recycle": -0.1}, ValueError, r"SparseVLM\.recycle must be in \[0, 1\]"),
        ({"heads": 0}, ValueError, r"SparseVLM\.heads must be >= 1 head, got 0; None"),
        ({"version": "v3"}, TypeError, r"SparseVLM\.version must be one of 'v1\.5', 'v2'"),
        ({"schedule": "0:0.5"}, ValueError, "SparseVLM prunes before layers of at least 1"),
    ],
)
def test_fields_out_of_range(fields, error, message):
    with pytest.raises(error, match=message):
        SparseVLM(**fields)


def test_a_model_of_one_layer_has_no_place_to_prune():
    with pytest.raises(ValueError, match="prunes before the next, got 1 layer"):
        SparseVLM().points(1)
