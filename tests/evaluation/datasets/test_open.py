"""Datasets are found by name or by what a path is, and what is wrong is said before work starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from video_files import clip

from mmeff import video_io
from mmeff.evaluation.datasets import LAYOUTS, Dataset, layouts, open_dataset
from mmeff.evaluation.media import read_media


@pytest.fixture
def clips(tmp_path):
    """A folder with two clips and a picture, and much that is none."""
    folder = tmp_path / "clips"
    (folder / "deep" / "er").mkdir(parents=True)
    video_io.write(folder / "b.mp4", clip(3))
    shutil.copy(folder / "b.mp4", folder / "deep" / "er" / "a.MP4")
    Image.fromarray(clip(1)[0]).save(folder / "c.png")
    (folder / "text.mp4").write_text("no clip")
    (folder / "zero.mkv").write_bytes(b"")
    (folder / "folder.mov").mkdir()
    (folder / "loop.webm").symlink_to(folder / "loop.webm")
    (folder / "round").symlink_to(folder)  # a circle of folders
    (folder / "notes.txt").write_text("about these clips")
    (folder / ".b.mp4.12.partial.mp4").write_bytes(b"half")
    return folder


def test_every_layout_is_there_and_tells_its_options():
    found = layouts()
    assert set(found) == set(LAYOUTS)
    assert found["motions"][1] == {"count": 256, "seed": 24_000, "files": None}
    assert "tasks" in found["mvbench"][1] and "path" not in found["mvbench"][1]
    for words, _ in found.values():
        assert words


def test_a_folder_lists_what_is_named_like_a_clip(clips):
    dataset = open_dataset(clips, question="What?")
    assert isinstance(dataset, Dataset)
    assert [s.id for s in dataset] == [
        "b.mp4", "c.png", "deep/er/a.MP4", "folder.mov", "loop.webm", "text.mp4", "zero.mkv",
    ]  # fmt: skip
    assert {s.prompt for s in dataset} == {"What?"} and dataset[2].category == "deep/er"
    assert [s.media[0].kind for s in dataset] == ["video", "image", *["video"] * 5]
    assert any("2 files" in note and "notes.txt" in note for note in dataset.notes)
    assert len(read_media(dataset[0].media[0])) == 3 and len(read_media(dataset[2].media[0])) == 3


def test_the_digest_is_that_of_the_content_and_not_of_the_place(clips, tmp_path):
    first = open_dataset(f"folder:{clips}")
    shutil.copytree(clips, tmp_path / "moved", symlinks=True)
    assert open_dataset(tmp_path / "moved").digest == first.digest
    assert open_dataset(clips, question="Why?").digest != first.digest
    assert open_dataset(clips, limit=3).digest != first.digest
    (clips / "b.mp4").rename(clips / "bb.mp4")
    assert open_dataset(clips).digest != first.digest


def test_a_limit_takes_the_first(clips):
    dataset = open_dataset(clips, limit=2)
    assert len(dataset) == 2 and [s.id for s in dataset] == ["b.mp4", "c.png"]
    assert dataset[-1].id == "c.png"
    with pytest.raises(IndexError):
        dataset[2]
    assert len(open_dataset(clips, limit=99)) == 7
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="limit must be a positive number of samples, got"):
            open_dataset(clips, limit=wrong)


def test_the_layout_is_told_by_the_path(tmp_path, clips):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "m.jsonl").write_text(json.dumps({"prompt": "a cat", "seed": 3}) + "\n")
    assert open_dataset(tmp_path / "prompts.txt")[0].task == "generate"
    assert open_dataset(tmp_path / "m.jsonl")[0].seed == 3
    assert open_dataset(str(clips)).name == "folder clips"
    colon = tmp_path / "odd:name"
    shutil.copytree(clips, colon, symlinks=True)
    assert len(open_dataset(colon)) == 7


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "video_mne:/data",
            ValueError,
            r"no dataset layout is named 'video_mne'; known are folder, .*mean 'video_mme'",
        ),
        ("motion", ValueError, r"no dataset layout is named 'motion'.*Did you mean 'motions'"),
        ("mvbench", ValueError, "layout 'mvbench' needs a path; write 'mvbench:/path/to/it'"),
        ("scenes:/data", ValueError, "'scenes' is generated and reads no path, got /data"),
        ("mlvu:/not/there", FileNotFoundError, "dataset /not/there does not exist; 'mlvu' is MLVU: json"),
        ("/not/there", FileNotFoundError, "dataset /not/there does not exist"),
    ],
)
def test_specs_that_name_nothing(spec, error, message):
    with pytest.raises(error, match=message):
        open_dataset(spec)


def test_a_file_of_no_known_kind(tmp_path):
    file = tmp_path / "data.xyz"
    file.write_text("?")
    with pytest.raises(ValueError, match=r"cannot tell the layout of .*data\.xyz; write 'layout:"):
        open_dataset(file)
    with pytest.raises(NotADirectoryError, match=r"data\.xyz is no folder; pass a folder of clips"):
        open_dataset(f"folder:{file}")


def test_opening_and_decoding_need_no_torch():
    """Workers that only decode start in a fraction of a second."""
    code = (
        "import sys; from mmeff.evaluation.datasets import open_dataset; from mmeff.evaluation.media import read_media\n"
        "from mmeff.evaluation.samples import Media; read_media(Media(path='motions://3/0'))\n"
        "print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_options_that_a_layout_does_not_have(clips):
    with pytest.raises(
        TypeError, match=r"layout 'folder' has no option 'questoin'; it takes question\. Did you mean 'question'"
    ):
        open_dataset(clips, questoin="What?")
    with pytest.raises(TypeError, match=r"layout 'motions' has no option 'path'; it takes count, files, seed"):
        open_dataset("motions", path=".")


def test_folders_without_anything(tmp_path):
    with pytest.raises(ValueError, match=r"holds no clip and no picture; known endings are \.mp4"):
        open_dataset(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="question must not be empty"):
        open_dataset(tmp_path, question=" ")


# ---------------------------------------------------------------- generated


@pytest.mark.parametrize(("name", "frames", "size"), [("scenes", 1, 96), ("motions", 8, 48)])
def test_generated_datasets_are_the_same_every_time(name, frames, size):
    dataset, again = open_dataset(name, count=40), open_dataset(name, count=40)
    assert len(dataset) == 40 and dataset.digest == again.digest
    assert [s.to_dict() for s in dataset] == [s.to_dict() for s in again]
    assert len({s.id for s in dataset}) == 40 and {s.answer for s in dataset} - {None}
    assert len({s.category for s in dataset}) > 4
    assert read_media(dataset[37].media[0]).frames.shape == (frames, size, size, 3)
    assert open_dataset(name, count=80)[37] == dataset[37]  # more samples change none
    other = open_dataset(name, count=40, seed=5)
    assert other.digest != dataset.digest and other[3] != dataset[3]


def test_generated_questions_are_those_of_the_tiny_models_evaluation():
    from mmeff.evaluation.questions import motion_turns, scene_turns

    for name, turns in (("scenes", scene_turns), ("motions", motion_turns)):
        dataset = open_dataset(name, count=32, seed=77)
        asked = [turn[2] for index in range(2) for turn in turns(77, index, 16)]
        assert [(s.prompt, s.answer, s.category) for s in dataset] == [(q.text, q.answer, q.kind) for q in asked]


def test_generated_files_are_written_once_and_decode_to_what_was_drawn(tmp_path):
    for name, kind in (("scenes", "png"), ("motions", "mp4")):
        dataset = open_dataset(name, count=3, files=tmp_path / name)
        assert list((tmp_path / name).iterdir()) == []  # nothing before it is asked for
        sample = dataset[2]
        file = tmp_path / name / f"{sample.id}.{kind}"
        assert [m.path for m in sample.media] == [str(file)] and list((tmp_path / name).iterdir()) == [file]
        before = file.stat().st_mtime_ns
        assert dataset[2] == sample and file.stat().st_mtime_ns == before
        drawn = read_media(open_dataset(name, count=3)[2].media[0]).frames
        stored = read_media(sample.media[0]).frames
        off = np.abs(stored.astype(int) - drawn)
        assert off.max() == 0 if kind == "png" else off.mean() < 4  # H.264 is lossy
        assert dataset.digest != open_dataset(name, count=3).digest


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count of motions must be an integer of at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed of motions must be an integer of at least 0, got -1"),
        ({"seed": 21_000}, ValueError, "seed 21000 of motions is what the tiny models were trained on"),
        ({"files": "/not/there/clips"}, FileNotFoundError, "files of motions must be a folder in one that exists"),
    ],
)
def test_generated_datasets_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        open_dataset("motions", **options)
