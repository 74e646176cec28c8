"""`mmeff eval` and `mmeff report` as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import pytest

from mmeff import cli


@pytest.fixture
def mmeff_cli(capsys, monkeypatch, tmp_path):
    """Runs `mmeff ARGS` in this process: (exit code, stdout, stderr on one line)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmeff", *args])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return run


EVAL = ("eval", "scenes", "--limit", "6", "--workers", "0", "--threads", "1", "-o", "run")


def test_a_dataset_from_end_to_end_and_again(mmeff_cli, tmp_path):
    call = (*EVAL, "--method", "fastv", "--method", "fastv+divprune", "-s", "keep=0.5")
    code, out, err = mmeff_cli(*EVAL, "--method", "fastv", "--set", "keep=0.5", "--batch", "2")
    assert (
        code == 0 and "exact match" in out and "fastv" in out and f"results: {tmp_path / 'run' / 'report.html'}" in out
    )
    assert "12 of 12 units" in err
    before = (tmp_path / "run" / "units.csv").read_text()
    code, out, _ = mmeff_cli(*EVAL, "--method", "fastv", "-s", "keep=0.5", "--batch", "2", "--json")
    result = json.loads(out)
    assert code == 0 and result["left"] == 0 and [v["name"] for v in result["variants"]] == ["dense", "fastv"]
    assert (tmp_path / "run" / "units.csv").read_text() == before  # nothing was done again
    code, _, err = mmeff_cli(*call)
    assert code == cli.Exit.ERROR and "holds a run with another configuration" in err
    code, out, _ = mmeff_cli("report", "run", "-o", "elsewhere")
    assert code == 0 and (tmp_path / "elsewhere" / "report.html").is_file()


def test_a_video_run_is_exported_for_vbench(mmeff_cli, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square moves right\n")
    code, out, _ = mmeff_cli(
        "eval", "prompts.txt", "--workers", "0", "--threads", "1", "-o", "run", "--steps", "1", "--option", "samples=1"
    )
    assert code == 0 and "steadiness" in out
    code, _, err = mmeff_cli("report", "run", "--vbench", "videos", "--custom-prompts")
    assert code == 0 and "1 videos in" in err and "--mode=custom_input" in err
    assert len(list((tmp_path / "videos" / "dense" / "videos").iterdir())) == 1


def test_a_stopped_run_says_how_to_go_on(mmeff_cli, tmp_path):
    def stop() -> None:
        while not list(tmp_path.glob("run/rows/*.jsonl")):  # the worker is there, so the signal is listened to
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    code, _, err = mmeff_cli("eval", "scenes", "--limit", "300", "--workers", "0", "--threads", "1", "-o", "run")
    assert code == 130 and "the same command continues" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval", "scens"], "no dataset layout is named 'scens'"),
        (["eval", "scenes", "--limit", "2", "--method", "fastvv"], "no method is called 'fastvv'"),
        (["eval", "scenes", "--limit", "2", "--set", "keep=1"], "--set has no method to apply to"),
        (["eval", "scenes", "--limit", "2", "--method", "fastv", "--set", "kep=1"], "FastV has no field 'kep'"),
        (["eval", "scenes", "--limit", "2", "--no-dense"], "needs at least one variant"),
        (["eval", "scenes", "--limit", "2", "--executor", "rey"], "no executor is called 'rey'. Did you mean 'ray'"),
        (["eval", "scenes", "--limit", "2", "--executor", "torchrun"], "needs RANK and WORLD_SIZE"),
        (["eval", "scenes", "--limit", "2", "--ray-address", "auto"], "a Ray address and gpus are for executor='ray'"),
        (["eval", "scenes", "--limit", "2", "--steps", "3"], "num_inference_steps cannot be set for scenes"),
        (["eval", "scenes", "--limit", "2", "--batch", "0"], "Pace.batch must be an integer >= 1, got 0"),
        (["eval", "scenes", "--option", "seed"], "--option needs name=value, got 'seed'"),
        (["eval", "scenes", "--option", "sed=1"], "has no option 'sed'"),
        (["report", "nothing"], "holds no evaluation: there is no run.json in it"),
        (["report", "nothing", "--custom-prompts"], "--dimension and --custom-prompts are for --vbench"),
    ],
)
def test_mistakes_have_one_clear_message(mmeff_cli, monkeypatch, args, message):
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = mmeff_cli(*args)
    assert code == cli.Exit.ERROR and message in err and "Traceback" not in err
