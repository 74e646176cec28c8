"""Samples are plain data that survive the way to a worker; media of every kind are read the same way."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from video_files import clip, level

from mmeff import video_io
from mmeff.errors import MediaError
from mmeff.evaluation.media import read_media
from mmeff.evaluation.samples import INSTRUCTION, Media, Sample, letter_of, with_options
from mmeff.tiny import motions, scenes

# ---------------------------------------------------------------- samples


def test_a_sample_survives_json():
    sample = Sample(
        id="a/b c-1", task="ask", prompt="Wer?", answer="B", options=("ä", "b", "b"), category="who",
        media=(Media(path="x.mp4", start=0.5, end=2), Media(path="y.png", kind="image"), Media(path="f", fps=3.0)),
        meta={"question": "Wer?", "nested": {"list": [1, None, 2.5]}},
    )  # fmt: skip
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
    assert sample.letters == ("A", "B", "C") and sample.answer_text == "b"
    made = Sample(id="p-0", task="generate", prompt="a cat", seed=7)
    assert Sample.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.answer_text is None


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"id": ""}, ValueError, "a sample needs an id that is not empty"),
        ({"task": "aks"}, ValueError, "task of sample 'x' must be ask or generate, got 'aks'"),
        ({"options": ("a",)}, ValueError, "has one option, 'a'; give two or more, or none"),
        ({"options": tuple("ab"), "answer": "C"}, ValueError, r"one of its 2 options \(A to B\), got 'C'"),
        ({"options": tuple("ab"), "answer": "a"}, ValueError, r"must be the letter .* got 'a'"),
        ({"options": tuple(map(str, range(27)))}, ValueError, "has 27 options; at most 26 have a letter"),
        ({"meta": {"x": np.zeros(2)}}, TypeError, "meta of sample 'x' must be plain JSON"),
        ({"meta": {"x": float("nan")}}, TypeError, "meta of sample 'x' must be plain JSON"),
    ],
)
def test_what_no_sample_can_be(fields, error, message):
    with pytest.raises(error, match=message):
        Sample(**{"id": "x", "task": "ask", "prompt": "?", **fields})


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"a sample has no colour, size; pass what Sample\.to_dict returned"):
        Sample.from_dict({"id": "x", "task": "ask", "prompt": "?", "size": 1, "colour": 2})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "film"}, "must be video or image, got 'film'"),
        ({"start": -1}, "start of x must be a number of seconds, 0 or more, got -1"),
        ({"end": float("inf")}, "end of x must be a number of seconds"),
        ({"start": 2, "end": 2}, "end of x must lie after its start at 2 s, got 2 s"),
        ({"kind": "image", "start": 1}, "x is an image, which has no start"),
        ({"fps": 0}, "fps of x must be a positive number, got 0"),
    ],
)
def test_what_no_media_can_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Media(path="x", **fields)


def test_prompts_with_options():
    assert with_options("Who?", ()) == "Who?"
    assert with_options("Who?", ("he", "she")) == f"Who?\nA. he\nB. she\n{INSTRUCTION}"
    assert with_options("Who?", ("he", "she"), "Letter!") == "Who?\nA. he\nB. she\nLetter!"
    assert with_options("Who?", ("he", "she"), "") == "Who?\nA. he\nB. she"


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("red", ("blue", "red"), "B"),
        ("B", ("blue", "red"), "B"),
        ("(b)", ("blue", "red"), "B"),
        ("a.", ("blue", "red"), "A"),
        ("A", ("B", "A"), "B"),  # the text comes before the letter
        ("red", ("red", "red"), "A"),
        ("Red. ", ("red", "red."), "B"),
        ("red", ("RED", "red"), "B"),
    ],
)
def test_letters_of_answers(answer, options, letter):
    assert letter_of(answer, options, "row 1") == letter


@pytest.mark.parametrize("answer", ["green", "C", "", "AB"])
def test_answers_that_are_no_option(answer):
    with pytest.raises(
        ValueError, match=r"answer of row 1 must be one of its options, or a letter from A to B, got .*'red'"
    ):
        letter_of(answer, ("blue", "red"), "row 1")


# ---------------------------------------------------------------- media


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    video_io.write(folder / "clip.mp4", clip(20), fps=10)
    (folder / "frames").mkdir()
    for i, frame in enumerate(clip(20)):  # numbers without leading zeros: by name, 10 would come before 2
        Image.fromarray(frame).save(folder / "frames" / f"{i + 1}.png")
    (folder / "frames" / "notes.txt").write_text("no frame")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("name", ["clip.mp4", "frames"])
@pytest.mark.parametrize(
    ("cut", "sampling", "expected"),
    [
        ({}, {}, list(range(20))),
        ({}, {"num_frames": 4}, [0, 6, 12, 19]),
        ({}, {"fps": 5}, list(range(0, 20, 2))),
        ({"start": 0.5, "end": 1.0}, {}, [5, 6, 7, 8, 9]),
        ({"start": 0.55}, {"num_frames": 3}, [5, 12, 19]),
        ({"end": 0.45}, {"fps": 5}, [0, 2, 4]),
        ({"start": 1.0, "end": 99}, {"num_frames": 2}, [10, 19]),
    ],
)
def test_files_and_folders_of_frames_are_cut_and_sampled_alike(files, name, cut, sampling, expected):
    media = Media(path=str(files / name), fps=10.0 if name == "frames" else None, **cut)
    video = read_media(media, **sampling)
    assert video.indices.tolist() == expected
    assert [level(f) for f in video.frames] == expected
    assert np.allclose(video.timestamps, np.array(expected) / 10, atol=1e-6)
    assert video.fps == pytest.approx(10) and video.backend == ("pillow" if name == "frames" else "pyav")


def test_a_picture_is_one_frame(files):
    media = Media(path=str(files / "frames" / "3.png"), kind="image")
    for sampling in ({}, {"num_frames": 8}, {"fps": 2}):
        video = read_media(media, **sampling)
        assert video.frames.shape == (1, 48, 64, 3) and level(video.frames[0]) == 2


def test_generated_media_are_what_the_generators_draw():
    video = read_media(Media(path="motions://24000/21"))
    drawn = motions.sample(24_000, 1, 16).videos[5]
    assert np.array_equal(video.frames, (drawn * 255).round().astype(np.uint8)) and video.backend == "generated"
    assert read_media(Media(path="motions://24000/21"), num_frames=3).indices.tolist() == [0, 3, 7]
    picture = read_media(Media(path="scenes://14000/3", kind="image"))
    drawn = scenes.sample(14_000, 0, 16).images[3]
    assert np.array_equal(picture.frames[0], (drawn * 255).round().astype(np.uint8))


def test_media_that_cannot_be_read(files, tmp_path):
    with pytest.raises(MediaError, match=r"empty is a folder without frames; it should hold \.jpg"):
        read_media(Media(path=str(files / "empty"), fps=3))
    with pytest.raises(MediaError, match="frames is a folder, not a video"):
        read_media(Media(path=str(files / "frames")))  # no rate: nothing says that these are frames
    with pytest.raises(
        MediaError, match=r"the cut from 5 s on lies behind the last frame of .*frames, shown at 1\.9 s"
    ):
        read_media(Media(path=str(files / "frames"), fps=10, start=5))
    for size, name in (((8, 8), "1.png"), ((9, 8), "2.png")):
        Image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(MediaError, match=r"must all have one size, got 8x8 and 9x8"):
        read_media(Media(path=str(tmp_path), fps=1))
    with pytest.raises(MediaError, match=r"none\.mp4 does not exist"):
        read_media(Media(path=str(tmp_path / "none.mp4")))
    with pytest.raises(ValueError, match=r"named scenes://seed/index or motions://seed/index, got 'movies://1/2'"):
        read_media(Media(path="movies://1/2"))
    with pytest.raises(ValueError, match="one of num_frames and fps, got both"):
        read_media(Media(path=str(files / "clip.mp4")), num_frames=2, fps=1)
