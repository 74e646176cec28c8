"""The output folder: refused before any work, complete or marked as not."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmeff.evaluation import metrics
from mmeff.evaluation.run_folder import MARKER, REPORT, RunFolder, is_finished, to_plain


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_run_from_start_to_end(tmp_path):
    out = tmp_path / "runs" / "first"
    run = RunFolder(out)
    assert names(out) == [MARKER] and not run.resumed and not is_finished(out)
    run.write_text("a.txt", "ü")
    run.write_json("numbers/b.json", {"x": 1})
    run.write_image("c.png", Image.new("RGB", (4, 4)))
    run.write_video("videos/d.mp4", np.zeros((2, 8, 8, 3), np.uint8))
    run.file("e.html").write_text("by hand")
    assert not is_finished(out)
    report = run.finish({"psnr": math.inf})
    assert report == out / REPORT and is_finished(out)
    files = ["a.txt", "c.png", "e.html", "numbers/b.json", "videos/d.mp4"]
    assert json.loads(report.read_text()) == {"psnr": None, "files": files}
    assert names(out) == sorted([*files, REPORT])
    assert (out / "a.txt").read_text("utf-8") == "ü"


def test_images_keep_their_resolution(tmp_path):
    image = Image.new("RGB", (4, 4))
    image.info["dpi"] = (200, 200)
    with Image.open(RunFolder(tmp_path).write_image("a.png", image)) as stored:
        assert stored.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_a_finished_run_is_refused(tmp_path):
    RunFolder(tmp_path).finish({})
    with pytest.raises(FileExistsError, match=r"holds a finished run \(report\.json\); pass overwrite=True"):
        RunFolder(tmp_path)
    assert is_finished(tmp_path)


def test_overwriting_deletes_what_the_old_run_wrote_and_nothing_else(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    first = RunFolder(tmp_path)
    first.write_text("old/a.txt", "a")
    first.finish({})
    second = RunFolder(tmp_path, overwrite=True)
    assert names(tmp_path) == [MARKER, "mine.txt"] and not second.resumed
    second.finish({})
    assert names(tmp_path) == ["mine.txt", REPORT]


@pytest.mark.parametrize(
    "content", ["not json", "[]", "{}", '{"files": 3}', '{"files": ["../outside.txt", "/etc/none", 3]}']
)
def test_overwriting_a_foreign_report_reaches_nothing_outside(tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "outside.txt").write_text("keep")
    (out / REPORT).write_text(content)
    RunFolder(out, overwrite=True)
    assert names(tmp_path) == [f"out/{MARKER}", "outside.txt"]


def test_an_interrupted_run_is_resumed(tmp_path):
    first = RunFolder(tmp_path)
    first.write_text("a.txt", "done")
    (tmp_path / f".b.{os.getpid()}.partial.mp4").write_text("half")  # what a killed process leaves
    (tmp_path / ".partial").write_text("someone else's")
    second = RunFolder(tmp_path)
    assert second.resumed and second.has("a.txt") and not second.has("b.mp4")
    assert names(tmp_path) == [".partial", MARKER, "a.txt"]
    second.finish({})
    assert json.loads((tmp_path / REPORT).read_text())["files"] == ["a.txt"]


def test_a_run_interrupted_while_overwriting_is_incomplete(tmp_path):
    RunFolder(tmp_path).finish({})
    (tmp_path / MARKER).write_text("")  # as a crash between the marker and the deletion would leave it
    assert not is_finished(tmp_path)
    assert RunFolder(tmp_path).resumed
    assert names(tmp_path) == [MARKER]


def test_the_marker_outlives_a_failing_report(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(TypeError, match=r"report\.model must be plain data to be written as JSON, got object"):
        run.finish({"model": object()})
    assert names(tmp_path) == [MARKER]
    run.finish({})
    with pytest.raises(RuntimeError, match="is finished already"):
        run.finish({})


def test_files_of_a_report_are_its_own(tmp_path):
    with pytest.raises(ValueError, match='must not have a key "files"'):
        RunFolder(tmp_path).finish({"files": []})


@pytest.mark.parametrize("name", ["../x", "/x", "", ".", "a/../../x"])
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(ValueError, match="a relative name inside its folder"):
        RunFolder(tmp_path / "out").write_text(name, "")
    assert names(tmp_path) == [f"out/{MARKER}"]


@pytest.mark.parametrize("inner", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way_is_named(tmp_path, inner):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"cannot use .*file.* as output folder: .*file is a file"):
        RunFolder(tmp_path / "file" / inner)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is a folder that not even root can write to")
def test_unwritable_folders_are_named():
    with pytest.raises(PermissionError, match=r"/proc is not writable"):
        RunFolder("/proc")
    with pytest.raises(PermissionError, match=r"cannot make the output folder /proc/x"):
        RunFolder("/proc/x")


def test_a_failing_write_leaves_nothing(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="unknown file extension"):
        run.write_image("a.nothing", Image.new("RGB", (4, 4)))
    with pytest.raises(ValueError, match="must be"):
        run.write_video("a.mp4", np.zeros((2, 8, 8)))
    assert names(tmp_path) == [MARKER]


# ---------------------------------------------------------------- JSON


@dataclass
class Inner:
    values: tuple
    where: Path


Point = namedtuple("Point", "x y")


def test_to_plain():
    given = {
        1: np.float32(0.5), "nan": math.nan, "inf": [-math.inf, np.inf], "array": np.array([[1, 2]]),
        "tensor": torch.tensor([1.0, math.nan]), "scalar": torch.tensor(3), "flag": np.True_,
        "inner": Inner((1, None), Path("a/b")), "set": {"b", "a"}, "point": Point(1, 2),
        "text": "ü", "string": np.str_("s"), "big": 2**70,
    }  # fmt: skip
    expected = {
        "1": 0.5, "nan": None, "inf": [None, None], "array": [[1, 2]],
        "tensor": [1.0, None], "scalar": 3, "flag": True,
        "inner": {"values": [1, None], "where": "a/b"}, "set": ["a", "b"], "point": [1, 2],
        "text": "ü", "string": "s", "big": 2**70,
    }  # fmt: skip
    plain = to_plain(given)
    assert plain == expected == json.loads(json.dumps(plain, allow_nan=False))
    assert type(plain["flag"]) is bool and type(plain["string"]) is str


def test_scores_and_latencies_go_into_a_report(tmp_path):
    video = np.zeros((2, 16, 16, 3))
    run = RunFolder(tmp_path)
    run.finish({"psnr": metrics.psnr(video, video), "time": metrics.latency([1.0])})
    stored = json.loads((tmp_path / REPORT).read_text())
    assert stored["psnr"]["mean"] is None and stored["psnr"]["identical_frames"] == 2
    assert stored["time"]["median_s"] == 1.0


def test_the_place_of_a_wrong_value_is_named():
    with pytest.raises(TypeError, match=r"report\.a\[1\]\.b must be plain data to be written as JSON, got function"):
        to_plain({"a": [0, {"b": test_to_plain}]})
