"""Closed-loop runs: what is counted, what is timed, and that methods with a history see whole episodes in fixed rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mmeff
from mmeff import tiny
from mmeff.evaluation.closed_loop import ProcessorPolicy, begin_episode, closed_loop
from mmeff.tiny import manipulation, vla_model


@pytest.fixture(scope="module")
def model():
    """The embedded policy where there is one, else an untrained one: what is tested here holds for both."""
    if (tiny.data_folder() / "tiny-vla").is_dir():
        return tiny.vla()
    torch.manual_seed(0)
    return vla_model.model().eval(), vla_model.processor()


class Scripted(ProcessorPolicy):
    """The expert in place of a model."""

    def __init__(self, seed: int, batch: int, episodes: int) -> None:
        super().__init__(None, None)
        self.starts = [manipulation.sample(seed, range(s, min(s + batch, episodes))) for s in range(0, episodes, batch)]
        self.now = None
        self.sizes: list[int] = []

    def __call__(self, images, instructions):
        self.calls += 1
        if self.now is None or instructions != self.now[0].instructions():
            self.now = self.starts.pop(0)
        tables, state = self.now
        action = manipulation.expert(state, tables.pick, tables.place)
        self.now = tables, state.where(manipulation.succeeded(tables, state), manipulation.step(state, action))
        self.sizes.append(len(images))
        return action


def run(policy, handle=None, *, episodes, batch, horizon=manipulation.HORIZON):
    from mmeff.evaluation import closed_loop as module

    return module._run(policy, handle, 31, range(episodes), batch, horizon, None)


def test_expert_wins_every_episode():
    found = run(Scripted(31, 8, 20), episodes=20, batch=8)
    assert found.episodes == found.successes == 20 and found.success == 1.0
    _, length = manipulation.demonstrate(*manipulation.sample(31, range(20)), np.random.default_rng(0))
    assert found.taken == tuple(length) and found.steps == pytest.approx(length.mean())
    assert found.first(7).taken == tuple(length[:7])
    assert found.control_steps == sum(length[s : s + 8].max() for s in (0, 8, 16))
    assert 0 < found.error < 0.1


def test_finished_episodes_stay_in_the_batch():
    policy = Scripted(31, 8, 20)
    run(policy, episodes=20, batch=8)
    _, length = manipulation.demonstrate(*manipulation.sample(31, range(20)), np.random.default_rng(0))
    assert policy.sizes == [8] * length[:8].max() + [8] * length[8:16].max() + [4] * length[16:].max()


def test_failures_take_the_horizon():
    found = run(Scripted(31, 8, 8), episodes=8, batch=8, horizon=3)
    assert found.successes == 0 and math.isnan(found.steps) and found.control_steps == 3
    assert found.error > 0


def test_every_batch_begins_an_episode():
    resets = []
    handle = SimpleNamespace(reset_episode=lambda: resets.append(1), report=lambda: "report")
    found = run(Scripted(31, 8, 20), handle, episodes=20, batch=8)
    assert len(resets) == 3 and found.report == "report"


def test_only_the_answer_of_methods_without_a_history_is_passed_over(model):
    with mmeff.accelerate(model[0], "fastv", layer=2, keep=0.5) as handle:
        with pytest.raises(TypeError, match="no episode to reset"):
            handle.reset_episode()
        begin_episode(handle)
        handle.enabled = False
    begin_episode(None)

    def broken():
        raise TypeError("unsupported operand")

    with pytest.raises(TypeError, match="unsupported"):
        begin_episode(SimpleNamespace(reset_episode=broken))


def test_parts_of_a_control_step_are_timed(model):
    found = closed_loop(*model, seed=31, episodes=2, batch=2, horizon=2)
    assert set(found.seconds) == {"world", "prepare", "first", "rest"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.report is None and found.to_dict()["episodes"] == 2


def test_a_method_acts_and_is_removed(model):
    tables, state = manipulation.sample(31, range(2))
    images, _ = manipulation.render(tables, state)
    before = ProcessorPolicy(*model)(images, tables.instructions())
    found = closed_loop(*model, seed=31, episodes=2, batch=2, horizon=2, method="fastv", layer=2, keep=0.25)
    assert found.report.accelerated
    assert np.array_equal(ProcessorPolicy(*model)(images, tables.instructions()), before)


def test_rows_of_a_padded_batch_equal_single_ones(model):
    tables, state = manipulation.sample(32, range(4))
    images, _ = manipulation.render(tables, state)
    texts = tables.instructions()
    texts[1] = "put the red square on the ring"
    texts[2] = "the blue ring"
    policy = ProcessorPolicy(*model)
    together = policy(images, texts)
    alone = [policy(images[b : b + 1], texts[b : b + 1])[0] for b in range(4)]
    assert together.tolist() == [a.tolist() for a in alone]


def test_look_and_hear_change_what_the_model_gets(model):
    seen = []
    closed_loop(
        *model, seed=31, episodes=2, batch=2, horizon=1,
        look=lambda images: seen.append(images.shape) or np.zeros_like(images),
        hear=lambda texts: seen.append(texts) or texts[::-1],
    )  # fmt: skip
    assert seen == [(2, 96, 96, 3), manipulation.sample(31, range(2))[0].instructions()]


@pytest.mark.parametrize("field", ["episodes", "batch", "horizon"])
def test_sizes_are_checked(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        closed_loop(None, None, **({"seed": 1, "episodes": 1} | {field: 0}))


def test_the_gate_can_be_missed_and_the_card_says_so(model, tmp_path, monkeypatch):
    """Four control steps are too few for any policy: the gate runs on the folder, fails, and the card shows it."""
    from mmeff.evaluation import gates_vla
    from mmeff.tiny import export, train_vla

    monkeypatch.setattr(gates_vla, "PRUNED", ({"method": "fastv", "layer": 2, "keep": 0.25},))
    short = closed_loop
    monkeypatch.setattr(gates_vla, "closed_loop", lambda *a, **k: short(*a, **k, horizon=4))
    export.export_vla(model[0], tmp_path / "m")
    said = []
    gate = gates_vla.vla_gate(tmp_path / "m", episodes=2, control=2, pruning=1, say=said.append)
    assert not gate["passed"] and len(said) == 4
    gates_vla.seal_vla(tmp_path / "m", train_vla.VlaRecipe(), gate, note="A note.")
    export.verify(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "## Gate: missed" in card and "one seed.\n\nA note.\n\n## What" in card
    assert "| dense | 1 | 0.000" in card
