"""The command line as a user meets it: help, JSON, every documented mistake with one clear message, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from mmeff import cli, tiny

SAMPLES = tiny.data_folder() / "samples"
PICTURE = str(SAMPLES / "scene-1.jpg")


@pytest.fixture
def mmeff_cli(capsys, monkeypatch):
    """Runs `mmeff ARGS` in this process: (exit code, stdout, stderr on one line)."""

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


@pytest.mark.parametrize("command", ["list", "plan", "compare", "generate", "ask", "train"])
def test_help_teaches(mmeff_cli, command):
    code, out, _ = mmeff_cli(command, "--help")
    assert code == 0
    assert "Usage" in out and len(out) > 200


def test_list_as_json_describes_every_field(mmeff_cli):
    code, out, _ = mmeff_cli("list", "--json")
    methods = {m["name"]: m for m in json.loads(out)["methods"]}
    assert code == 0
    assert {"fastv", "radial"} <= set(methods)
    assert all(f["doc"] for m in methods.values() for f in m["fields"])


def test_plan_of_both_stages(mmeff_cli):
    code, out, _ = mmeff_cli("plan", "fastv", "--set", "keep=0.25", "--json")
    assert code == 0
    assert json.loads(out)["predicted_speedup"] > 1
    code, out, _ = mmeff_cli("plan", "radial", "--set", "block=6", "--set", "drop_below=8", "--set", "dense_steps=5")
    assert code == 0
    assert "9 x 6 x 6" in out


def test_config_file_and_set(mmeff_cli, tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump({"method": "fastv", "keep": 0.5, "layer": 3}))
    code, out, _ = mmeff_cli("plan", "fastv", "-c", str(file), "--set", "keep=0.25", "--json")
    assert code == 0
    assert json.loads(out)["method"].items() >= {"method": "fastv", "layer": 3, "keep": 0.25, "rows": "last"}.items()


def test_plan_refuses_a_name_that_its_config_contradicts(mmeff_cli, tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text("method: fastv\n")
    assert mmeff_cli("plan", "-c", str(file))[0] == 0
    code, _, err = mmeff_cli("plan", "radial", "-c", str(file))
    assert code == cli.Exit.ERROR
    assert "got radial and fastv from --config" in err


def test_ask_dense_and_pruned(mmeff_cli):
    code, out, _ = mmeff_cli("ask", "what color is the cross ?", "-i", PICTURE)
    assert code == 0
    code, out, _ = mmeff_cli("ask", "what color is the cross ?", "-i", PICTURE, "--method", "fastv", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["answer"] == "white"
    assert found["reports"][0]["tokens"]["kept from layer 2 on"] == 72


def test_ask_about_a_video(mmeff_cli):
    code, out, err = mmeff_cli(
        "ask", "how many objects are there ?", "--video", str(SAMPLES / "clip-1.mp4"), "--video-frames", "2", "--method", "fastv",
        "--json",
    )  # fmt: skip
    assert code == 0
    assert "frames [0, 16]" in err
    assert json.loads(out)["reports"][0]["tokens"]["visual tokens per prompt"] == 288


def test_generate_writes_an_mp4_and_says_what_ran(mmeff_cli, tmp_path):
    out_file = tmp_path / "v.mp4"
    code, out, _ = mmeff_cli(
        "generate", "a red square moving left", "-o", str(out_file), "--steps", "3", "--method", "radial", "--set", "block=6",
        "--set", "drop_below=8", "--set", "dense_steps=1", "--set", "dense_layers=0", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)["reports"][0]
    assert report["calls"]["sparse"] == 2 * 2 * 4  # two sparse steps, two guidance branches, four layers
    from mmeff.video_io import read

    assert read(out_file).frames.shape[0] == 17


def test_generate_a_picture(mmeff_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = mmeff_cli(
        "generate",
        "a red square in the top left",
        "-m",
        "tiny-image",
        "--steps",
        "2",
        "--method",
        "gna",
        "--set",
        "window=[1,8,8]",
    )
    assert code == 0, err
    assert "picture: picture.png" in out and (tmp_path / "picture.yaml").is_file()
    from PIL import Image

    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (48, 48)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "fastvv"], "no method is called 'fastvv'. Did you mean 'FastV'?"),
        (["plan", "fastv", "--set", "kep=0.5"], "FastV has no field 'kep'. Did you mean 'keep'?"),
        (["plan", "fastv", "--set", "keep=2.5"], "FastV.keep must be a fraction in (0, 1]"),
        (["plan", "fastv", "--set", "keep"], "--set needs field=value, got 'keep'"),
        (["plan", "fastv", "--set", "keep=yes"], "FastV.keep must be float or int, got True"),
        (["plan", "fastv", "-m", "tiny-video"], "no host of stage 'pruning' knows"),
        (["plan", "radial", "-m", "nowhere/at/all"], "no model folder at nowhere/at/all"),
        (["plan", "radial", "-c", "missing.yaml"], "no config file at missing.yaml"),
        (
            ["plan", "fastv", "--steps", "5"],
            "the llava host has no size 'num_inference_steps', and fastv has no such field",
        ),
        (["plan", "radial", "--steps", "0"], "plan needs num_inference_steps >= 1, got 0"),
        (["plan"], "plan needs a method"),
        (["compare", "--steps", "5"], "num_inference_steps cannot be set for the embedded run"),
        (["compare", "--device", "cpu"], "the embedded run takes no --device"),
        (["compare", "-m", "tiny-video", "-p", "a", "--new-tokens", "4"], "new_tokens cannot be set for tiny-video"),
        (["compare", "-m", "tiny-vlm", "-p", "a", "-i", PICTURE, "--seed", "4"], "seed cannot be set for tiny-vlm"),
        (["ask", "what ?", "-i", PICTURE, "--video-frames", "2"], "pass --video too"),
        (["ask", "what ?"], "ask needs an image"),
        (["ask", " ", "-i", PICTURE], "a question that is not empty"),
        (["ask", "what ?", "-i", "missing.png"], "missing.png"),
        (["ask", "what ?", "-i", PICTURE, "--set", "keep=0.5"], "--set has no method to apply to"),
        (["ask", "what ?", "-i", PICTURE, "-m", "tiny-video"], "answers no questions"),
        (["generate", " "], "a prompt that is not empty"),
        (["generate", "a cat", "-m", "tiny-vlm"], "makes no videos"),
        (["generate", "a cat", "-m", "tiny-image", "--frames", "9"], "FluxPipeline has no setting 'num_frames'"),
        (["generate", "a cat", "-m", "tiny-video", "-o", "a.png"], "WanPipeline makes videos"),
        (["compare", "-m", "tiny-image", "--method", "gna", "-p", "a", "--guidance", "3"], "no guidance embedding"),
        (["compare", "-m", "tiny-image", "--method", "gna", "-p", "a", "--frames", "9"], "num_frames must be 1"),
        (["generate", "a cat", "-o", "/no/such/folder/v.mp4"], "/no/such/folder is missing or not writable"),
        (["compare", "-m", "tiny-vlm", "--method", "fastv", "-p", "what ?"], "without an image"),
        (["compare", "-m", "tiny-video", "--method", "radial"], "needs a prompt"),
    ],
)
def test_mistakes_have_one_clear_message(mmeff_cli, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = mmeff_cli(*args)
    assert code == cli.Exit.ERROR
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "a mistake must not leave files behind"


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_bad_pictures(mmeff_cli, tmp_path, content):
    file = tmp_path / "x.png"
    file.write_bytes(Path(PICTURE).read_bytes()[:300] if content is None else content)
    code, _, err = mmeff_cli("ask", "what ?", "-i", str(file))
    assert code == cli.Exit.ERROR
    assert "x.png" in err


@pytest.mark.parametrize("content", [b"", b"not a video", None])
def test_bad_videos(mmeff_cli, tmp_path, content):
    file = tmp_path / "x.mp4"
    file.write_bytes((SAMPLES / "clip-1.mp4").read_bytes()[:400] if content is None else content)
    code, _, err = mmeff_cli("compare", "-m", "tiny-vlm", "--method", "fastv", "-p", "what ?", "--video", str(file))
    assert code == cli.Exit.ERROR
    assert "x.mp4" in err


def test_output_folder_that_is_a_file(mmeff_cli, tmp_path):
    (tmp_path / "f").write_text("")
    code, _, err = mmeff_cli(
        "compare",
        "-m",
        "tiny-vlm",
        "--method",
        "fastv",
        "-p",
        "what ?",
        "-i",
        PICTURE,
        "-o",
        str(tmp_path / "f" / "run"),
    )
    assert code == cli.Exit.ERROR
    assert "is a file" in err


def test_a_grid_smaller_than_a_block(mmeff_cli, tmp_path):
    code, _, err = mmeff_cli(
        "generate", "a red square moving left", "-o", str(tmp_path / "v.mp4"), "--method", "radial", "--set", "block=512",
        "--set", "dense_steps=0", "--steps", "2",
    )  # fmt: skip
    assert code == cli.Exit.ERROR
    assert "Radial.block must be <= F*H*W = 9*6*6 = 324 video tokens" in err
    assert not list(tmp_path.iterdir())


def test_accelerating_nothing_has_its_own_exit_code(mmeff_cli, tmp_path):
    code, _, err = mmeff_cli(
        "compare", "-m", "tiny-vlm", "--method", "fastv", "--set", "keep=0.25", "-p", "what color is the cross ?", "-i", PICTURE,
        "-o", str(tmp_path / "fine"),
    )  # fmt: skip
    assert code == 0
    assert (tmp_path / "fine" / "report.html").is_file()
    code, _, err = mmeff_cli(
        "generate", "a red square moving left", "-o", str(tmp_path / "v.mp4"), "--method", "radial", "--set", "block=6",
        "--set", "dense_steps=2", "--steps", "2",
    )  # fmt: skip
    assert code == cli.Exit.IDLE
    assert "accelerat" in err or "dense" in err
    assert not (tmp_path / "v.mp4").exists()
