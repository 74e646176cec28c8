"""VLAPruner over simulated control steps: prefill decides, then observes; decoded rows follow; then the next prompt."""

from __future__ import annotations

import math

import pytest
import torch

from mmeff.pruning import VLAPruner
from mmeff.pruning._base import TokenPruner

from .fake_view import FakeView, attention, prompt_masks

VISUAL, TEXTS = [12, 7], [4, 6]
ROWS = 7  # action tokens of a step: the prompt's last row and six decoded ones


def step_view(state, seed, *, visual=VISUAL, texts=TEXTS, keep=0.5, rows=None, frame=None, layer=3):
    """The view of one control step, every token present; `rows` takes these rows of the batch, alone."""
    masks = prompt_masks(visual, texts)
    matrix = attention(masks.real, 3, seed=seed)
    draw = torch.Generator().manual_seed(1000 + seed)
    embedded = torch.randn(*masks.real.shape, 5, generator=draw, dtype=torch.float64)
    embedded = embedded.masked_fill(~masks.real[..., None], math.nan)
    rows = list(range(len(visual))) if rows is None else rows
    real = masks.real[rows]
    return FakeView(
        visual=masks.visual[rows], real=real, before=matrix[rows], embedded=embedded[rows], frame=frame, keep=keep, layer=layer,
        layers=32, state=state,
    )  # fmt: skip


def action_rows(seed, visual=VISUAL, count=ROWS):
    """Attention (B, V0) of each action row of a step; columns that a row lacks are NaN."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, len(visual), max(visual), generator=draw, dtype=torch.float64)
    absent = torch.arange(max(visual)) >= torch.tensor(visual)[:, None]
    return [row.masked_fill(absent, math.nan) for row in rows]


def control_step(method, state, seed, *, dropped=None, rows=None, **sizes):
    """One whole control step in the order of a model: decide, then the prompt's last row, then the decoded ones."""
    view = step_view(state, seed, rows=rows, **sizes)
    keep = method.decide(view).keep
    for i, row in enumerate(action_rows(seed, sizes.get("visual", VISUAL))):
        row = row if rows is None else row[rows]
        method.observe(state, row[:, : view.present.shape[1]] * keep, prefill=i == 0)
    return view, keep


def expected(view, b, steps, budget, *, decay=0.8, rows="all", inside=None, candidates=None):
    """The tokens that stay in row b, by the formula in plain Python.

    steps: S of each finished control step, newest last. inside: the tokens of one camera. candidates: in place of the
    best of both scores.
    """
    present = int(view.present[b].sum())
    inside = list(range(present)) if inside is None else inside
    matrix, slots = view._attention("before")[b], view.slots()[b]
    real = [i for i in range(matrix.shape[1]) if view.real[b, i]]
    queries = {"all": real, "text": [i for i in real if i > slots[present - 1]], "last": real[-1:]}[rows]
    heads = len(matrix)
    semantic = {
        v: sum(float(matrix[h, i, slots[v]]) for h in range(heads) for i in queries) / heads / len(queries)
        for v in inside
    }
    action = {v: sum(decay**i * float(steps[-i][b, v]) for i in range(1, len(steps) + 1)) for v in range(present)}
    total = sum(action.values())
    action = {v: action[v] / total for v in inside}
    best = [sorted(inside, key=lambda v: -score[v])[:budget] for score in (semantic, action)]
    pool = sorted(set(best[0]) | set(best[1])) if candidates is None else candidates
    if len(pool) <= budget:
        return pool
    x = view._embedded[b][slots[:present]]

    def distance(i, j):
        return 1 - float(x[i] @ x[j] / x[i].norm() / x[j].norm())

    chosen = [max(pool, key=lambda i: min(distance(i, j) for j in pool if j != i))]
    while len(chosen) < budget:
        rest = [i for i in pool if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance(i, j) for j in chosen)))
    return sorted(chosen)


def kept(keep, b):
    return keep[b].nonzero()[:, 0].tolist()


def simulate(method, steps, **sizes):
    """Kept tokens of each step, and what the steps' actions looked at by the formula: (view, keep, S) each."""
    state, out = method.new_state(), []
    for t in range(steps):
        view, keep = control_step(method, state, t, **sizes)
        seen = torch.stack([row * keep for row in action_rows(t, sizes.get("visual", VISUAL))]).mean(0)
        out.append((view, keep, seen))
    return out


def test_an_episode_is_that_of_the_formula():
    """Three steps keep everything; each later one uses exactly the three steps that finished before it."""
    sizes = {"visual": [40, 25], "texts": [4, 6]}
    budgets = [20, 12]
    episode = simulate(VLAPruner(), 8, **sizes)
    seen = [s for _, _, s in episode]
    assert all(torch.equal(keep, view.present) for view, keep, _ in episode[:3])

    def agrees(oracle):
        return all(
            kept(keep, b) == oracle(t, view, b, budgets[b])
            for t, (view, keep, _) in enumerate(episode)
            for b in range(2)
            if t >= 4
        )

    for b in range(2):  # the first pruned step, whose history has no dropped tokens
        assert kept(episode[3][1], b) == expected(episode[3][0], b, seen[:3], budgets[b])
    assert agrees(lambda t, view, b, n: expected(view, b, seen[t - 3 : t], n))
    # and the comparison can tell: a step late, the step that is still running, fewer, the published code's slip, no candidates
    assert not agrees(lambda t, view, b, n: expected(view, b, seen[t - 4 : t - 1], n))
    assert not agrees(lambda t, view, b, n: expected(view, b, seen[t - 2 : t + 1], n))
    assert not agrees(lambda t, view, b, n: expected(view, b, seen[t - 2 : t], n))
    assert not agrees(lambda t, view, b, n: expected(view, b, seen[t - 3 : t], n, decay=1 / 0.8))
    assert not agrees(
        lambda t, view, b, n: expected(view, b, seen[t - 3 : t], n, candidates=list(range(sizes["visual"][b])))
    )


def test_the_newest_step_weighs_most():
    """Three steps, each looking at one token alone: with room for two actions, the oldest step's token goes."""
    method = VLAPruner(keep=2)
    state = method.new_state()
    for t in range(3):
        method.decide(step_view(state, 0, visual=[6], texts=[3], keep=2))
        method.observe(state, torch.eye(6, dtype=torch.float64)[t : t + 1], prefill=True)
    view = step_view(state, 0, visual=[6], texts=[3], keep=2)
    method.decide(view)
    weights = state.smoothed(0.8)[0].tolist()
    assert weights == pytest.approx([0.512, 0.64, 0.8, 0, 0, 0])
    view = step_view(state, 0, visual=[6], texts=[3], keep=2)
    view._embedded = torch.eye(view.real.shape[1], dtype=torch.float64)[None]  # all tokens equally unlike each other
    first = view.slots()[0, 0]
    view._matrix["before"][:, :, :, first : first + 6] = torch.tensor([0, 0, 0.1, 0.2, 0, 0], dtype=torch.float64)
    # candidates 2 and 3 (semantic), 2 and 1 (action); ties in diversity go to the earlier token
    assert kept(method.decide(view).keep, 0) == [1, 2]


def test_a_steps_rows_are_averaged_and_enter_before_the_next_decision():
    method, state = VLAPruner(window=1), VLAPruner(window=1).new_state()
    method.decide(step_view(state, 0))
    rows = [r.nan_to_num() for r in action_rows(0)]
    for i, row in enumerate(rows):
        method.observe(state, row, prefill=i == 0)
        assert len(state.steps) == 0  # the step is not over
    method.decide(step_view(state, 1))
    torch.testing.assert_close(state.steps[-1], torch.stack(rows).mean(0))
    method.observe(state, rows[0], prefill=True)
    assert len(state.steps) == 1  # finished once, not again by the next prefill's first row


def test_a_prefill_that_nothing_was_decided_in_ends_the_step_too():
    method = VLAPruner()
    state = method.new_state()
    for t in range(3):
        method.observe(state, torch.full((1, 4), float(t)), prefill=True)
        method.observe(state, torch.full((1, 4), float(t)), prefill=False)
    assert [float(s[0, 0]) for s in state.steps] == [0, 1]


def test_several_points_of_one_prefill_finish_one_step_once():
    method = VLAPruner(schedule="3:0.5,9:0.25", window=2)
    state = method.new_state()
    for t in range(4):
        first = step_view(state, t, keep=0.5)
        keep = method.decide(first).keep
        later = step_view(state, t, keep=0.25, layer=9)
        later.present = later.present & keep
        after = method.decide(later).keep
        assert not (after & ~keep).any()
        assert after.sum(1).tolist() == (VISUAL if t < 2 else [round(0.25 * n) for n in VISUAL])
        method.observe(state, torch.rand(2, 12), prefill=True)
        assert len(state.steps) == min(t, 2)


def test_later_points_look_up_the_history_by_original_index():
    """Of the tokens 0, 3 and 5 that are left, both scores like 5 best; by places in the view the history would say 3."""
    method = VLAPruner(window=1)
    state = method.new_state()
    method.decide(step_view(state, 0, visual=[6], texts=[3]))
    method.observe(state, torch.tensor([[0.1, 0.9, 0.8, 0.2, 0.0, 0.3]], dtype=torch.float64), prefill=True)
    view = step_view(state, 1, visual=[3], texts=[3])
    view.original, view.initial, view.counts = torch.tensor([[0, 3, 5]]), torch.tensor([6]), torch.tensor([1])
    view._matrix["before"][..., view.slots()[0]] = torch.tensor([0.0, 0.0, 0.1], dtype=torch.float64)
    assert view.original[0, kept(method.decide(view).keep, 0)].tolist() == [5]


def test_rows_are_their_own():
    together = simulate(VLAPruner(), 5)
    for b, count in enumerate(VISUAL):
        method = VLAPruner()
        state = method.new_state()
        for t in range(5):
            view = step_view(state, t, rows=[b])
            keep = method.decide(view).keep
            assert kept(keep, 0) == kept(together[t][1], b)
            for i, row in enumerate(action_rows(t)):
                method.observe(state, row[b : b + 1, :count] * keep, prefill=i == 0)


def test_two_installations_share_nothing():
    method = VLAPruner()
    one, other = method.new_state(), method.new_state()
    for t in range(3):
        control_step(method, one, t)
    assert torch.equal(control_step(method, other, 3)[1], step_view(other, 3).present)
    assert control_step(method, one, 3)[1].sum(1).tolist() == [6, 4]


def test_reset_episode_starts_the_warm_up_again_and_forgets_an_open_step():
    method = VLAPruner(window=2)
    state = method.new_state()
    for t in range(4):
        control_step(method, state, t)
    method.reset_episode(state)
    method.observe(state, torch.rand(2, 12), prefill=False)  # the rest of the step that was reset
    for t in range(2):
        view, keep = control_step(method, state, t)
        assert torch.equal(keep, view.present)
    assert control_step(method, state, 2)[1].sum(1).tolist() == [6, 4]


@pytest.mark.parametrize(("visual", "texts"), [([12], [4]), ([12, 8], [4, 6]), ([24, 14], [4, 6]), ([7, 12], [4, 6])])
def test_a_history_of_other_cameras(visual, texts):
    method = VLAPruner()
    state = method.new_state()
    control_step(method, state, 0)
    with pytest.raises(ValueError, match=r"a history of the wrong camera size: .*call handle.reset_episode\(\)"):
        method.decide(step_view(state, 1, visual=visual, texts=texts))
    method.reset_episode(state)
    assert method.decide(step_view(state, 1, visual=visual, texts=texts)).keep.any()


@pytest.mark.parametrize("prefill", [True, False])
def test_observed_rows_of_another_size(prefill):
    method = VLAPruner()
    state = method.new_state()
    method.observe(state, torch.rand(2, 12), prefill=True)
    with pytest.raises(ValueError, match=r"it was of \(rows, visual tokens\) = \(2, 12\), got \(2, 9\)"):
        method.observe(state, torch.rand(2, 9), prefill=prefill)


def test_history_does_not_change_with_the_tensors_it_was_given():
    state = VLAPruner().new_state()
    row = torch.ones(1, 4, requires_grad=True)
    VLAPruner().observe(state, row, prefill=True)
    with torch.no_grad():
        row.mul_(5)
    state.finish()
    assert state.steps[0].tolist() == [[1, 1, 1, 1]]
    assert not state.steps[0].requires_grad


@pytest.mark.parametrize("rows", ["last", "text", "all"])
def test_rows_of_the_semantic_score(rows):
    sizes = {"visual": [40, 25], "texts": [4, 6]}
    episode = simulate(VLAPruner(window=1, rows=rows), 2, **sizes)
    view, keep, _ = episode[1]
    for b, budget in enumerate((20, 12)):
        found = {r: expected(view, b, [episode[0][2]], budget, rows=r) for r in ("last", "text", "all")}
        assert kept(keep, b) == found.pop(rows)
        assert kept(keep, b) not in found.values()


def test_quota_per_camera():
    """Two cameras in a prompt: each keeps its share, from candidates of its own, thinned within itself."""
    method = VLAPruner(quota="frame", window=1)
    frame = torch.tensor([[0] * 20 + [1] * 20, [0] * 10 + [1] * 30])
    sizes = {"visual": [40, 40], "texts": [4, 6], "frame": frame}
    view, keep, _ = (episode := simulate(method, 2, **sizes))[1]
    for b, budgets in enumerate([(10, 10), (5, 15)]):
        cameras = [[v for v in range(40) if frame[b, v] == g] for g in (0, 1)]
        found = [expected(view, b, [episode[0][2]], n, inside=c) for n, c in zip(budgets, cameras, strict=True)]
        assert kept(keep, b) == [*found[0], *found[1]]
        assert kept(keep, b) != expected(view, b, [episode[0][2]], 20)


@pytest.mark.parametrize(("layers", "action"), [(32, 15), (40, 19), (28, 13), (6, 3), (4, 3)])
def test_the_action_layer_scales_with_depth_and_stays_behind_the_pruning(layers, action):
    assert VLAPruner().observes(layers) == action
    assert VLAPruner().points(layers)[0].layer == 3


def test_the_action_layer_must_come_after_the_decisions():
    assert VLAPruner(action_layer=3).observes(32) == 3
    for wrong in (2, 32):
        with pytest.raises(
            ValueError, match=rf"VLAPruner.action_layer must be in \[3, 31\], .* got {wrong}; pass None"
        ):
            VLAPruner(action_layer=wrong).observes(32)
    assert VLAPruner(schedule="3:0.5,20:0.25").observes(32) == 20


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("layer", 0, "be at least 1"), ("window", 0, "be at least 1 control step"), ("decay", 0.0, r"be in \(0, 1\]"),
     ("decay", 1.5, r"be in \(0, 1\]"), ("keep", 1.5, "be a fraction"), ("keep", 0, "be at least 1 token")],
)  # fmt: skip
def test_fields_out_of_range(field, value, rule):
    with pytest.raises(ValueError, match=rf"VLAPruner.{field} must {rule}.*got {value}"):
        VLAPruner(**{field: value})


def test_a_layer_behind_the_model():
    with pytest.raises(ValueError, match=r"VLAPruner.layer must be in \[1, 2\] for a model of 3 layers, got 3"):
        VLAPruner().points(3)


def test_at_budget():
    (point,) = VLAPruner().at_budget(0.4, 32).points(32)
    assert (3 + 29 * point.keep) / 32 == pytest.approx(0.4)
    with pytest.raises(ValueError, match="prunes first before layer 3 of 32"):
        VLAPruner().at_budget(0.05, 32)


def test_it_does_not_rank_tokens_one_by_one():
    assert not VLAPruner().ranks()
    assert type(VLAPruner()).score is TokenPruner.score
