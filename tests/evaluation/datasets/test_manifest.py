"""Manifests and Hugging Face datasets of one's own: every form of a cell, and every fault of a file."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image
from video_files import clip

from mmeff import video_io
from mmeff.evaluation.datasets import open_dataset
from mmeff.evaluation.media import read_media


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4"):
        video_io.write(tmp_path / "clips" / name, clip(3))
    Image.fromarray(clip(1)[0]).save(tmp_path / "clips" / "c.png")
    return tmp_path


def jsonl(folder, *rows, name="m.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def table(folder, *rows, name="m.csv"):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / name).write_text(out.getvalue())
    return folder / name


# ---------------------------------------------------------------- rows


def test_questions_in_json_lines(folder):
    file = jsonl(
        folder,
        {
            "video": "clips/a.mp4",
            "question": "What?",
            "answer": "red",
            "options": ["blue", "red"],
            "category": "colour",
        },
        {
            "video": "clips/b.mp4",
            "question": "When?",
            "answer": "now",
            "start": 0.1,
            "end": 0.2,
            "id": "mine",
            "who": "me",
        },
        {"video": ["clips/a.mp4", "clips/b.mp4"], "image": "clips/c.png", "question": "Which?"},
    )
    first, second, third = open_dataset(file)
    assert (first.answer, first.options, first.category) == ("B", ("blue", "red"), "colour")
    assert first.prompt.startswith("What?\nA. blue\nB. red\n") and first.meta == {"question": "What?"}
    assert second.id == "mine" and second.answer == "now" and second.options == () and second.prompt == "When?"
    assert second.meta["who"] == "me" and (second.media[0].start, second.media[0].end) == (0.1, 0.2)
    assert read_media(second.media[0]).indices.tolist() == [0, 1]  # at 8 frames a second
    assert [m.kind for m in third.media] == ["video", "video", "image"] and third.answer is None


def test_questions_in_csv(folder):
    rows = [
        {"video": "clips/a.mp4", "question": 'What, and "why"?', "options": "blue | red", "answer": "b", "start": "", "end": ""},
        {"video": "clips/b.mp4", "question": "Où?", "options": '["here, there", "a|b"]', "answer": "a|b", "start": "0", "end": "1.5"},
    ]  # fmt: skip
    first, second = open_dataset(table(folder, *rows))
    assert first.meta["question"] == 'What, and "why"?' and first.options == ("blue", "red") and first.answer == "B"
    assert first.media[0].start is None
    assert second.options == ("here, there", "a|b") and second.answer == "B" and second.media[0].end == 1.5
    with_mark = folder / "mark.csv"  # as spreadsheets save it
    with_mark.write_bytes(b"\xef\xbb\xbf" + (folder / "m.csv").read_bytes().replace(b"\r\n", b"\n") + b"\n")
    assert [s.id for s in open_dataset(with_mark)] == [first.id, second.id]


def test_prompts_to_generate(folder):
    first, second = open_dataset(
        jsonl(
            folder,
            {"prompt": "a cat", "seed": 7},
            {"prompt": "a dog", "image": "clips/c.png", "id": "d", "style": "oil"},
        )
    )
    assert (first.task, first.prompt, first.seed, first.media) == ("generate", "a cat", 7, ())
    assert (second.id, second.seed, second.media[0].kind, second.meta) == ("d", 0, "image", {"style": "oil"})
    (third,) = open_dataset(table(folder, {"prompt": "a cow", "seed": "12"}))
    assert third.seed == 12


def test_ids_depend_on_the_content_alone(folder):
    a = {"video": "clips/a.mp4", "question": "What?", "answer": "x"}
    b = {"video": "clips/b.mp4", "question": "What?"}
    before = {s.media[0].path: s.id for s in open_dataset(jsonl(folder, a, b))}
    after = {
        s.media[0].path: s.id for s in open_dataset(jsonl(folder, {**b, "question": "Why?"}, b, {**a, "answer": "y"}))
    }
    assert after[str(folder / "clips/a.mp4")] == before[str(folder / "clips/a.mp4")]  # moved, its answer mended
    assert after[str(folder / "clips/b.mp4")] == before[str(folder / "clips/b.mp4")]
    moved = {
        s.id
        for s in open_dataset(f"manifest:{jsonl(folder / 'clips', {**a, 'video': 'a.mp4'})}", media=folder / "clips")
    }
    assert len(moved) == 1


def test_media_may_lie_elsewhere(folder, tmp_path):
    file = jsonl(folder, {"video": "a.mp4", "question": "What?"})
    with pytest.raises(
        FileNotFoundError, match=r"none of the 1 media files of manifest m\.jsonl is there, .*a\.mp4 for one"
    ):
        open_dataset(file)
    assert open_dataset(file, media=folder / "clips")[0].media[0].path == str(folder / "clips" / "a.mp4")
    with pytest.raises(NotADirectoryError, match=r"media must be a folder, got .*nowhere"):
        open_dataset(file, media=folder / "nowhere")
    file = jsonl(folder, {"video": "a.mp4", "question": "What?"}, {"video": "z.mp4", "question": "What?"})
    dataset = open_dataset(file, media=folder / "clips")
    assert len(dataset) == 2 and "1 of 2 media files of manifest m.jsonl are missing" in dataset.notes[0]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"vidoe": "a.mp4", "qestion": "?", "answr": "x"}],
            r"misses 2 columns: video or image\. Did you mean 'vidoe'\?; question\. Did you mean 'qestion'\? \(it has vidoe,",
        ),
        ([{"video": "a.mp4", "answer": "x"}], r"misses a column: question \(it has video, answer\)"),
        ([{"promt": "a cat", "seed": 1}], r"misses 2 columns: .*question"),
        ([{"video": "a", "question": "?"}, {"video": "a"}], r"has no question in row 2; fill it in, or remove the row"),
        ([{"video": "", "question": "?"}], r"has nothing in its column video or image"),
        ([{"video": "a", "question": 5}], r"row 1 must have a text in question, got 5"),
        ([{"video": 5, "question": "?"}], r"row 1 must name its media by a path, or a list of paths, got 5"),
        ([{"video": "a", "question": "?", "options": ["x"]}], r"options of .*row 1 must be two or more texts"),
        ([{"video": "a", "question": "?", "options": "[x"}], r"options of .*row 1 are no JSON list"),
        (
            [{"video": "a", "question": "?", "options": "x|y", "answer": "z"}],
            r"row 1 must be one of its options, .*got 'z'",
        ),
        ([{"video": "a", "question": "?", "start": "soon"}], r"row 1 must have a number in start, got 'soon'"),
        (
            [{"video": "a", "question": "?", "start": 5, "end": 2}],
            r"end of .*a must lie after its start at 5 s, got 2 s",
        ),
        ([{"video": ["a", "b"], "question": "?", "end": 2}], r"cut its one video, and it has 2"),
        ([{"prompt": "a cat", "seed": 1.5}], r"row 1 has the seed 1\.5; a seed is a whole number"),
        ([{"prompt": "a cat", "seed": -1}], r"row 1 has the seed -1"),
        (
            [{"id": "q", "prompt": "1"}, {"id": "q", "prompt": "2"}, {"id": "r", "prompt": "3"}],
            r"ids of manifest m\.jsonl must be unique, and 1 occur more than once: 'q' is samples 1, 2",
        ),
        ([{"prompt": "same"}, {"prompt": "same"}], r"must be unique, and 1 occur more than once"),
    ],
)
def test_rows_that_cannot_be_samples(folder, rows, message):
    file = jsonl(folder, *rows)
    with pytest.raises(ValueError, match=message):
        open_dataset(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b"", r"m\.jsonl is empty"),
        ("m.jsonl", b"\xff\xfe\x00", r"m\.jsonl is not UTF-8 text: .* at byte 0; save it as UTF-8"),
        ("m.jsonl", b'{"a": 1}\n\n{"a":\n', r"m\.jsonl, line 3 is not JSON"),
        ("m.jsonl", b"[1, 2]\n", r"m\.jsonl, line 1 must be a JSON object, got \[1, 2\]"),
        ("m.csv", b"video,question\n", r"m\.csv holds no rows"),
        (
            "m.csv",
            b"video,question\na,what, and why?\n",
            r"m\.csv, line 2 has 3 fields and the header names 2; put quotes",
        ),
        ("m.csv", b"video,question\na\n", r"m\.csv, line 2 has 1 fields and the header names 2"),
        ("m.csv", b"video,video\na,b\n", r"m\.csv has two columns named video; rename one"),
        ("m.csv", b'video,question\na,"open\n', r"m\.csv, line \d is not CSV"),
        ("m.json", b'{"a": 1}', r"m\.json must be a JSON list of objects"),
        ("m.json", b'[\n{"a": 1},\n]', r"m\.json is not JSON: .* in line \d"),
        ("m.parquet", b"PAR0", r"m\.parquet is not a Parquet file"),
        ("m.xml", b"<a/>", r"a manifest ends in \.jsonl, \.csv, \.parquet, \.json, got .*m\.xml"),
    ],
)
def test_files_that_are_no_manifest(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_dataset(f"manifest:{tmp_path / name}")


def test_many_faults_are_cut_short(folder):
    rows = [{"id": str(i // 2), "prompt": str(i)} for i in range(10)]
    with pytest.raises(ValueError, match=r"5 occur more than once: '0' is samples 1, 2; .*; and 2 more$"):
        open_dataset(jsonl(folder, *rows))
    rows = [{"video": "clips/a.mp4", "question": "?" if i == 0 else ""} for i in range(9)]
    with pytest.raises(ValueError, match=r"has no question in row 2, 3, 4 and 5 more; fill it in"):
        open_dataset(jsonl(folder, *rows))


# ---------------------------------------------------------------- Hugging Face datasets on disk


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="the datasets package, of mmeff[data], is not installed")


def test_a_saved_dataset(folder, datasets):
    rows = {
        "clip": ["clips/a.mp4", "clips/b.mp4"],
        "query": ["What?", "Why?"],
        "answer": ["x", None],
        "score": [1.5, 2.0],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "saved")
    options = {"columns": {"video": "clip", "question": "query"}, "media": folder}
    first, second = open_dataset(f"hf:{folder / 'saved'}", **options)
    assert (first.id, first.prompt, first.answer, first.meta) == (
        "0",
        "What?",
        "x",
        {"question": "What?", "score": 1.5},
    )
    assert second.answer is None and second.media[0].path == str(folder / "clips/b.mp4")
    with pytest.raises(ValueError, match=r"is one dataset without splits, got split='test'; leave it out"):
        open_dataset(f"hf:{folder / 'saved'}", split="test", **options)
    with pytest.raises(
        ValueError, match=r"misses 2 columns: video or image.*; question \(it has id, clip, query, answer, score\)"
    ):
        open_dataset(f"hf:{folder / 'saved'}")
    with pytest.raises(ValueError, match=r"video is 'clib', and .* has no such column; it has .*Did you mean 'clip'\?"):
        open_dataset(f"hf:{folder / 'saved'}", columns={"video": "clib"})


def test_splits_of_parquet_files(folder, datasets):
    for name in ("train", "test"):
        part = datasets.Dataset.from_dict({"prompt": [f"a {name} cat"]})
        (folder / "hub" / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(folder / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    assert open_dataset(f"hf:{folder / 'hub'}", split="test")[0].prompt == "a test cat"
    with pytest.raises(ValueError, match="must be one of test, train; none was chosen"):
        open_dataset(f"hf:{folder / 'hub'}")
    with pytest.raises(ValueError, match=r"must be one of test, train; got 'tets'\. Did you mean 'test'\?"):
        open_dataset(f"hf:{folder / 'hub'}", split="tets")
    both = datasets.DatasetDict({"val": datasets.Dataset.from_dict({"prompt": ["a", "b"]})})
    both.save_to_disk(folder / "dict")
    assert len(open_dataset(f"hf:{folder / 'dict'}")) == 2
    with pytest.raises(FileNotFoundError, match=r"holds no dataset: neither dataset_info\.json nor a \.parquet file"):
        open_dataset(f"hf:{folder / 'clips'}")


def test_pictures_inside_a_dataset_are_written_out_once(folder, datasets):
    content = (folder / "clips" / "c.png").read_bytes()
    rows = {"image": [{"bytes": content, "path": None}], "question": ["What?"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "inside.parquet")
    with pytest.raises(ValueError, match=r"holds its pictures or videos inside; pass cache=, a folder"):
        open_dataset(f"hf:{folder / 'inside.parquet'}")
    (sample,) = open_dataset(f"hf:{folder / 'inside.parquet'}", cache=folder / "cache")
    (written,) = (folder / "cache").iterdir()
    assert sample.media[0].path == str(written) and sample.media[0].kind == "image" and sample.id == "0"
    assert np.array_equal(read_media(sample.media[0]).frames[0], clip(1)[0])
    before = written.stat().st_mtime_ns
    open_dataset(f"hf:{folder / 'inside.parquet'}", cache=folder / "cache")
    assert written.stat().st_mtime_ns == before


def test_without_the_package_the_way_out_is_told(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs datasets; pip install mmeff\[data\]"):
        open_dataset(f"hf:{folder}")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (folder / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(ModuleNotFoundError, match=r"needs pyarrow, which comes with `pip install mmeff\[data\]`"):
        open_dataset(f"manifest:{folder / 'm.parquet'}")
