"""`mmeff calibrate adaptinfer | debiased`, `mmeff train cacovid` and `mmeff compare --budget` as a user meets them."""

from __future__ import annotations

import sys

import pytest
import torch

from mmeff import cli, tiny
from mmeff.tiny import video_vlm_model

PICTURES = [str(tiny.data_folder() / "samples" / name) for name in ("scene-1.jpg", "scene-2.png")]


@pytest.fixture
def mmeff_cli(capsys, monkeypatch, tmp_path):
    """Runs `mmeff ARGS` in this process: (exit code, stdout and stderr, each on one line)."""
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
        return code, " ".join(out.split()), " ".join(err.split())  # however wide the console is

    return run


def test_calibrated_files_are_configs(mmeff_cli, tmp_path):
    code, out, _ = mmeff_cli("calibrate", "adaptinfer", "--samples", "4", "--budget", "0.8", "-o", "a.yaml")
    assert code == 0 and "changes at layers" in out and "written to a.yaml" in out
    code, out, _ = mmeff_cli("calibrate", "debiased", "--samples", "4", "--set", "layer=1", "-o", "d.yaml")
    assert code == 0 and "rate: " in out
    assert "4 questions on tiny-vlm" in (tmp_path / "d.yaml").read_text()
    code, out, _ = mmeff_cli(
        "compare", "-m", "tiny-vlm", "-c", "a.yaml", "-c", "d.yaml", "-p", "what color is the cross ?", "-i", PICTURES[0],
        "--new-tokens", "2", "-o", "r",
    )  # fmt: skip
    assert code == 0 and "visual tokens are 0.8 of all on the mean over layers, that of adaptinfer" in out


def test_a_budget_on_the_command_line(mmeff_cli):
    call = ("compare", "-m", "tiny-vlm", "-p", "what color is the cross ?", "-i", PICTURES[0], "--new-tokens", "1")
    two = ("--method", "fastv", "--method", "divprune")
    code, out, _ = mmeff_cli(*call, *two, "--budget", "0.5", "-o", "r")
    assert code == 0 and "visual tokens are 0.5 of all" in out and "as asked for" in out
    code, out, _ = mmeff_cli(*call, *two, "--budget", "native", "-o", "s")
    assert code == 0 and "its own setting" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["calibrate", "adaptinfer", "--budget", "half"], "--budget must be a fraction such as 0.5, or a number"),
        (["calibrate", "adaptinfer", "--budget", "0"], "or at least 1 token, got 0"),
        (["calibrate", "adaptinfer", "--points", "0"], "--points must be >= 1, got 0"),
        (["calibrate", "adaptinfer", "--samples", "0"], "--samples must be >= 1, got 0"),
        (["calibrate", "adaptinfer", "-m", "some/model"], "some/model needs questions to watch: pass --data"),
        (["calibrate", "adaptinfer", "--data", "none.jsonl"], "no questions at none.jsonl"),
        (["calibrate", "adaptinfer", "-o", "no/such/a.yaml"], "no/such is no folder"),
        (["calibrate", "debiased", "--method", "divprune"], "Debiased.inner must be a method that ranks tokens"),
        (["calibrate", "debiased", "--method", "radial"], "radial does not score visual tokens"),
        (["calibrate", "debiased", "--set", "layer"], "--set needs field=value, got 'layer'"),
        (["calibrate", "kernels", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["compare", "-m", "tiny-vlm", "--budget", "some", "-p", "a"], "--budget must be a fraction such as 0.25, or"),
        (["compare", "--budget", "0.5"], "budget cannot be set for the embedded run"),
        (["compare", "-m", "tiny-video", "-p", "a", "--budget", "0.5"], "budget cannot be set for tiny-video"),
        (["train", "cacovid", "-m", "tiny-vlm"], "clips of 48 x 48 pixels, which tiny-vlm does not look at"),
        (["train", "cacovid", "--reward", "joy"], "reward must be 'likelihood' or 'exact', got 'joy'"),
    ],
)
def test_mistakes_have_one_clear_message(mmeff_cli, monkeypatch, tmp_path, args, message):
    monkeypatch.setattr("mmeff.training.reexec_with_cpu_environment", lambda: None)
    code, _, err = mmeff_cli(*args)
    assert code == cli.Exit.ERROR
    assert message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_policy_is_trained_and_prunes(mmeff_cli, monkeypatch, tmp_path):
    monkeypatch.setattr("mmeff.training.reexec_with_cpu_environment", lambda: None)
    torch.manual_seed(0)
    video_vlm_model.model().save_pretrained(tmp_path / "m")
    video_vlm_model.processor().save_pretrained(tmp_path / "m")
    code, out, _ = mmeff_cli(
        "train", "cacovid", "-m", str(tmp_path / "m"), "--questions", "1", "--updates", "1", "--token-masks", "2",
        "--frame-masks", "2", "--held-out", "1", "-o", "policy", "--work", "work",
    )  # fmt: skip
    assert code == 0 and "policy: policy" in out
    code, out, _ = mmeff_cli(
        "ask", "how many objects are there ?", "-i", PICTURES[0], "-i", PICTURES[1], "-m", str(tmp_path / "m"),
        "--method", "cacovid", "--set", "policy=policy",
    )  # fmt: skip
    assert code == 0 and "kept from layer 0 on: 18" in out
