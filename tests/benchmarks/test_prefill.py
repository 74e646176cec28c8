"""The prefill benchmark: what a row says, and that a second run measures nothing."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import prefill, results

SMALL = prefill.Sizes(layers=8, width=64, inner=96, heads=4, side=6, text=8, batch=2)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    path = tmp_path_factory.mktemp("prefill") / "rows.jsonl"
    machine = results.Machine.here(torch.device("cpu"), commit="c0ffee")
    ticks = []

    def run(**more):
        return prefill.run(
            ["FastV", "random"], [SMALL], machine, path, rounds=2, again=False, tick=lambda *a: ticks.append(a), **more
        )

    return run(), path, run, ticks


def test_rows_hold_medians_and_what_is_left(ran):
    rows, path, _, _ = ran
    assert [(r.method, r.budget) for r in rows] == [(m, b) for m in ("FastV", "random") for b in prefill.BUDGETS]
    for row in rows:
        visual = round(row.token_layers * (36 + 8) - 8, 1)
        assert visual == pytest.approx(36 * row.budget, abs=0.6)
        assert row.gain == pytest.approx((1 - row.time) / (1 - row.token_layers))
        assert len(row.rounds) == 2 and 0 < row.selection_seconds < row.seconds
    assert prefill.read(path) == rows


def test_a_second_run_measures_nothing(ran):
    rows, path, run, ticks = ran
    before = len(ticks)
    assert run() == rows and len(ticks) == before
    assert len(path.read_text().splitlines()) == len(rows)


def test_bars(ran):
    (row, *_), _, _, _ = ran
    fields = {**vars(row), "gain": 0.79, "selection": 0.051}
    assert not prefill.Row(**fields).reaches_bar and not prefill.Row(**fields).selection_within
    fields |= {"gain": 0.8, "selection": 0.05}
    assert prefill.Row(**fields).reaches_bar and prefill.Row(**fields).selection_within


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_line_prints_a_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    args = ("--width", "64", "--side", "6", "--text", "8", "--batch", "1", "--rounds", "1", "--method", "random")
    assert call(monkeypatch, "prefill", *args, "--out", tmp_path / "p.jsonl") == 0
    out = capsys.readouterr().out
    assert "random 50%" in out and "random 35%" in out and "token-layers" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "nothing"), "--method must be one of FastV, AdaptInfer"),
        (("--batch", "1,x"), "--batch must be positive numbers"),
        (("--width", "100"), "--width must be a multiple of 64"),
        (("--rounds", "0"), "--rounds must be > 0"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, tmp_path, args, message):
    assert call(monkeypatch, "prefill", *args, "--out", tmp_path / "p.jsonl") == 1
    assert message in " ".join(capsys.readouterr().err.split())
