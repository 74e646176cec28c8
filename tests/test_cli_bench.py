"""`mmeff calibrate` and `mmeff bench`: what they print, what they keep, their mistakes."""

from __future__ import annotations

import json
import sys
from typing import get_args

import pytest
import torch
import typer

import mmeff
from mmeff import cli, cli_bench
from mmeff.kernels import calibration


@pytest.fixture
def mmeff_cli(capfd, monkeypatch):
    """Runs `mmeff ARGS` in this process, and sees what its children print: (exit code, stdout, stderr on one line)."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmeff", *args])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, " ".join(err.split())

    return run


@pytest.fixture
def quick_calibration(monkeypatch, tmp_path):
    """Calibration of a short sequence, into a cache of this test: its result must not steer the tests that follow."""
    monkeypatch.setenv("MMEFF_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "_loaded", {})
    monkeypatch.setattr(calibration, "NOISY", float("inf"))
    monkeypatch.setattr(cli_bench, "TOKENS", {"cpu": 128, "cuda": 128})
    threads = torch.get_num_threads()
    yield tmp_path / "calibration"
    torch.set_num_threads(threads)


@pytest.mark.parametrize("command", ["calibrate", "bench"])
def test_help_teaches(mmeff_cli, command):
    code, out, _ = mmeff_cli(command, "--help")
    assert code == 0
    assert "Usage" in out and len(out) > 200


def test_calibrate_measures_prints_and_keeps(mmeff_cli, quick_calibration):
    code, out, _ = mmeff_cli("calibrate", "--device", "cpu", "--dtype", "float32", "--dtype", "bfloat16")
    assert code == 0
    assert f"kept in {quick_calibration}" in out
    for text in ("forward", "backward", "float32", "bfloat16", "GFLOP/s", "gather", "x dense", "measured"):
        assert text in out
    (file,) = quick_calibration.iterdir()
    kept = json.loads(file.read_text())["rates"]
    assert set(kept) == {f"{d} {t}" for d in ("forward", "backward") for t in ("float32", "bfloat16")}
    assert calibration.rates(torch.device("cpu"), torch.float32, "forward").measured


def test_calibrate_as_json_for_a_number_of_threads(mmeff_cli, quick_calibration):
    code, out, _ = mmeff_cli("calibrate", "--device", "cpu", "--dtype", "float32", "--threads", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert torch.get_num_threads() == 1
    assert (found["device"], found["folder"]) == ("cpu", str(quick_calibration))
    assert [(r["direction"], r["dtype"], r["measured"]) for r in found["rates"]] == [
        ("forward", "float32", True), ("backward", "float32", True)
    ]  # fmt: skip
    rates = found["rates"][0]
    assert rates["dense"] > 0 and rates["ratios"]["gather"] > 0
    assert rates["break_even_density"]["gather"] == min(1, rates["ratios"]["gather"])
    assert rates["break_even_density"]["masked"] is None


def test_calibrate_says_when_the_machine_is_too_busy(mmeff_cli, quick_calibration, monkeypatch):
    monkeypatch.setattr(calibration, "NOISY", 0.0)
    code, out, err = mmeff_cli("calibrate", "--device", "cpu", "--dtype", "float32")
    assert code == cli.Exit.ERROR
    assert "default" in out and "kept in" not in out
    assert "too busy to measure all of it" in err
    assert not list(quick_calibration.iterdir())


@pytest.mark.parametrize(
    ("backend", "ratio", "density", "words"),
    [
        ("gather", 0.65, 0.65, "below density 0.65"),
        ("native", 1.8, 1.0, "at any density"),
        ("masked", 0.7, None, "never: it computes every pair"),
    ],
)
def test_break_even_is_the_ratio(backend, ratio, density, words):
    assert cli_bench.break_even(backend, ratio) == density
    assert cli_bench._in_words(backend, ratio) == words


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["calibrate", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["calibrate", "--device", "mps"], "--device must be auto, cpu, cuda or cuda:N, got 'mps'"),
        (
            ["calibrate", "--device", "cpu", "--dtype", "int8"],
            "--dtype must be one of float32, bfloat16, float16, got 'int8'",
        ),
        (["calibrate", "--device", "cpu", "--threads", "0"], "--threads must be >= 1, got 0"),
    ],
)
def test_mistakes_have_one_clear_message(mmeff_cli, quick_calibration, args, message):
    code, _, err = mmeff_cli(*args)
    assert code == cli.Exit.ERROR
    assert message in err
    assert not quick_calibration.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_calibrate_refuses_cuda_where_there_is_none(mmeff_cli):
    code, _, err = mmeff_cli("calibrate", "--device", "cuda")
    assert code == cli.Exit.ERROR
    assert "torch.cuda.is_available() is False" in err


def test_bench_runs_the_benchmarks_of_the_checkout(mmeff_cli, tmp_path, monkeypatch):
    decoy = tmp_path / "benchmarks" / "__main__.py"
    decoy.parent.mkdir()
    decoy.write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    code, out, _ = mmeff_cli("bench", "kernels", "--dry-run", "--only", "merge_attention")
    assert code == 0
    assert out.startswith("merge_attention | B1 N4096")


def test_bench_passes_the_exit_code_on(mmeff_cli):
    code, _, err = mmeff_cli("bench", "plot", "no-such-file.jsonl")
    assert code == cli.Exit.ERROR
    assert "no results file at no-such-file.jsonl" in err


def test_bench_without_a_checkout_says_where_it_is(mmeff_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(mmeff, "__file__", str(tmp_path / "site-packages" / "mmeff" / "__init__.py"))
    code, _, err = mmeff_cli("bench", "kernels")
    assert code == cli.Exit.ERROR
    assert "come with the repository and not with the installed package" in err
    assert "Clone the repository" in err


def test_bench_offers_every_command_of_the_benchmarks():
    from benchmarks.__main__ import app

    assert sorted(get_args(cli_bench.Verb)) == sorted(typer.main.get_command(app).commands)
