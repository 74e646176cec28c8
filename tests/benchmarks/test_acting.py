"""Acting with visual tokens dropped: the same episodes for every method, runs that go on, tables that pair by episode."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import acting, acting_table, plots
from benchmarks.results import Machine
from mmeff import tiny
from mmeff.evaluation.closed_loop import closed_loop

MACHINE = Machine(device=torch.device("cpu"), hardware="a processor", environment={"torch": "x"}, commit="c")


def row(variant: acting.Variant, batch: int, taken: list[int | None], mean: float | None = None) -> acting.Row:
    counts = {} if mean is None else {"last": mean, "mean": mean}
    return acting.Row(variant=variant.name, setting=variant.setting, batch=batch, taken=taken, counts=counts)


@pytest.fixture(scope="module")
def which() -> dict[str, acting.Variant]:
    return {v.name: v for v in acting.variants()}


def test_variants_differ_and_prune_before_the_same_layers(which):
    assert len({v.setting for v in which.values()}) == len(which)
    for name, variant in which.items():
        if variant.method is not None:
            point = variant.method.points(6)[0]
            assert point.layer == variant.layer, name
            assert getattr(variant.method, "keep", None) == variant.keep, name


def test_a_later_start_gives_the_episodes_that_come_later():
    model, processor = tiny.vla()
    run = {"seed": acting.SEED, "horizon": 2, "batch": 2}
    whole = closed_loop(model, processor, episodes=3, **run)
    late = closed_loop(model, processor, first=2, episodes=1, **run)
    assert late.episodes == 1 and late.taken == whole.taken[2:]
    with pytest.raises(ValueError, match="number of an episode, at least 0, got -1"):
        closed_loop(model, processor, first=-1, episodes=1, **run)


def test_the_run_goes_on_where_it_stopped(monkeypatch, tmp_path, which):
    acted = []

    def act(model, processor, variant, index):
        acted.append((variant.name, index))
        return row(variant, index, [3] * acting.BATCH)

    monkeypatch.setattr(acting, "act", act)
    asked = {
        "only": ("dense", "FastV, layer 2, 50%"), "seconds": None, "out": tmp_path / "rows.jsonl", "tick": lambda *_: None,
    }  # fmt: skip
    assert acting.run(episodes=50, shard=(2, 2), **asked) == (2, 0, 0)
    assert acted == [("dense", 1), ("FastV, layer 2, 50%", 1)]
    assert acting.run(episodes=50, shard=(1, 1), **asked) == (2, 2, 0)
    assert {batch for _, batch in acted[2:]} == {0}
    broken = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0]) | {"setting": "other"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(broken) + "\n")
    assert acting.run(episodes=25, shard=(1, 1), **asked)[0] == 2  # of other settings: not the same figure


def test_a_batch_of_a_method_counts_its_tokens(monkeypatch, which):
    monkeypatch.setattr(acting, "BATCH", 2)
    monkeypatch.setattr("mmeff.tiny.manipulation.HORIZON", 3)
    model, processor = tiny.vla()
    found = acting.act(model, processor, which["FastV, layer 2, 25%"], 0)
    assert len(found.taken) == 2
    assert found.counts == {"last": 36.0, "mean": pytest.approx(144 * (2 + 0.25 * 4) / 6)}


def test_figures_pair_by_episode(tmp_path, which):
    dense, fastv, mine = which["dense"], which["FastV, layer 2, 25%"], which["VLA-Pruner, layer 2, 25%"]
    rows = [
        row(dense, 0, [9] * 20 + [None] * 5), row(fastv, 0, [9] * 10 + [None] * 15, 72.0), row(mine, 0, [None] + [8] * 24, 72.0),
    ]  # fmt: skip
    acting.scored.append(tmp_path / "rows.jsonl", rows)
    found = {s.variant: s for s in acting_table.summarise(tmp_path / "rows.jsonl", MACHINE)}
    assert set(found) == {dense.name, fastv.name, mine.name}
    got = found[mine.name]
    assert got.success[0] == 0.96 and got.steps == 8.0
    difference = np.array([-1] + [0] * 19 + [1] * 5)
    assert got.against_dense == pytest.approx([difference.mean(), difference.std(ddof=1) / 5])
    assert got.against_fastv[0] == pytest.approx((24 - 10) / 25)
    assert found[fastv.name].against_fastv is None and found[dense.name].against_dense is None
    text = acting_table.markdown(list(found.values()))
    assert "| VLA-Pruner | 2 | 25 % | 25 | 96.0 ± 5.7 | +16.0 ± 9.5 |" in text
    acting_table.write_summary(list(found.values()), tmp_path / "s.jsonl")
    assert [json.loads(line)["variant"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == list(found)
    plots.acting(list(found.values()), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no method was measured"):
        plots.acting([found[dense.name]], tmp_path / "b.png")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("acting", "--episodes", "30"), "--episodes must be a multiple of 25"),
        (("acting", "--only", "nothing"), "leaves no variant; known: dense; VLA-Pruner"),
        (("acting-table",), "no rows at"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, tmp_path, args, message):
    given = (
        [*args, str(tmp_path / "none.jsonl")]
        if args == ("acting-table",)
        else [*args, "--out", str(tmp_path / "a.jsonl")]
    )
    monkeypatch.setattr(sys, "argv", ["benchmarks", *given])
    with pytest.raises(SystemExit, match="1"):
        command.main()
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a.jsonl").exists()
