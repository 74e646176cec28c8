"""Comparisons on the embedded models: equal inputs give equal outputs, the folder is complete, mistakes come first."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import mmeff
from mmeff import tiny
from mmeff.diffusion_attn import GNA, Radial
from mmeff.evaluation.compare import resolve
from mmeff.evaluation.comparison import variant_names
from mmeff.evaluation.embedded import IMAGE, VIDEO, sample_questions
from mmeff.pruning import FastV

SMALL = {**VIDEO, "num_inference_steps": 3}
SPARSE = Radial(block=6, drop_below=8, decay=0.25, dense_steps=1, dense_layers=0)
FULL = Radial(block=36, drop_below=0, decay=100.0, dense_steps=0, dense_layers=0)
IDLE = Radial(block=6, dense_steps=3)


@pytest.fixture(scope="module")
def pipeline():
    return tiny.video_pipeline()


@pytest.fixture(scope="module")
def video(pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "video"
    return mmeff.compare(
        pipeline, [SPARSE, FULL, IDLE], "a red square moving left", out=out, warm_up=False, **SMALL
    ), out


def test_video_figures(video):
    result, _ = video
    variants = result.measured["variants"]
    sparse, full, idle = (name for name in variants if name != "dense")
    assert variants[full]["psnr"].identical == 17, "a full layout must give the dense video bit by bit"
    assert variants[idle]["psnr"].identical == 17
    assert 5 < variants[sparse]["psnr"].mean < 60
    assert variants[sparse]["density"] < 1
    assert set(result.idle) == {full, idle}, "neither of them ran a sparse call"


def test_video_folder_is_complete(video):
    result, out = video
    report = json.loads((out / "report.json").read_text())
    assert report["comparisons"][0]["accelerated_nothing"] == list(result.idle)
    assert all((out / name).is_file() for name in report["files"])
    assert {p.suffix for p in out.rglob("*") if p.is_file()} == {".mp4", ".png", ".json", ".html"}
    page = (out / "report.html").read_text()
    assert "accelerated nothing" in page and 'src="http' not in page
    assert not (out / "INCOMPLETE").exists()


def test_the_table_prints(video):
    text = str(video[0])
    assert "dense" in text and "accelerated nothing" in text


def test_pictures(tmp_path):
    """A pipeline of pictures: the same figures, PNGs in place of mp4s, the text's tokens in the plan."""
    pipeline, gna = tiny.image_pipeline(), GNA(window=(1, 12, 12), tile=(1, 4, 4), dense_steps=1)
    everything = GNA(window=("all", "all", "all"))
    result = mmeff.compare(
        pipeline, [gna, everything], "a red square in the top left", out=tmp_path / "r", warm_up=False,
        **{**IMAGE, "num_inference_steps": 3},
    )  # fmt: skip
    assert result.kind == "image" and "tiny model" in result.note
    sparse, full = (name for name in result.measured["variants"] if name != "dense")
    figures = result.measured["variants"]
    assert 5 < figures[sparse]["psnr"].mean < 60 and figures[sparse]["density"] < 0.3
    assert figures[full]["psnr"].identical == 1 and result.idle == (full,)
    written = {p.suffix for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert written == {".png", ".json", ".html"}
    with Image.open(tmp_path / "r" / "pictures" / "0-dense.png") as picture:
        assert picture.size == (48, 48)
    assert "16 text tokens in self-attention" in (tmp_path / "r" / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 17}, "num_frames must be 1 or left out"),
        ({"guidance_scale": 3.0}, "no guidance embedding"),
        ({"negative_prompt": "blue"}, "only with true_cfg_scale > 1"),
    ],
)
def test_a_picture_refuses_what_it_cannot_honour(settings, message):
    with pytest.raises(ValueError, match=message):
        mmeff.compare(tiny.image_pipeline(), GNA(), "a red square in the top left", **IMAGE, **settings)


def test_answers(tmp_path):
    model, processor = tiny.vlm()
    result = mmeff.compare(
        model, [FastV(keep=0.25), FastV(keep=1.0)], sample_questions(), out=tmp_path / "r", processor=processor, repeats=1,
        new_tokens=3,
    )  # fmt: skip
    variants = result.measured["variants"]
    assert variants["fastv keep=1.0"]["answers"] == variants["dense"]["answers"]
    assert variants["dense"]["answers"] == ["white", "top right", "five"]
    assert result.idle == ()
    assert len(list((tmp_path / "r" / "pictures").glob("kept-*"))) == 6


def test_a_prompt_of_several_pictures_is_shown_frame_by_frame(tmp_path):
    model, processor = tiny.vlm()
    images = [case["images"][0] for case in sample_questions()]
    mmeff.compare(
        model, "pyramiddrop", {"question": "how many objects are there ?", "images": images}, out=tmp_path / "r",
        processor=processor, repeats=1, new_tokens=2,
    )  # fmt: skip
    (file,) = (tmp_path / "r" / "pictures").glob("kept-*")
    with Image.open(file) as sheet:
        assert sheet.height > 4 * 160 and sheet.width > 3 * 160, "as seen, and after each of three layers"


def test_tokens_are_means_over_the_questions():
    model, processor = tiny.vlm()
    one, two, _ = sample_questions()
    two = {**two, "images": two["images"] * 2}
    result = mmeff.compare(model, FastV(keep=0.25), [two, one], processor=processor, repeats=1, new_tokens=3)
    tokens = result.measured["variants"]["fastv"]["tokens"]
    assert tokens["visual tokens per prompt"] == (288 + 144) / 2
    assert tokens["kept from layer 2 on"] == (72 + 36) / 2


@pytest.mark.parametrize(
    ("methods", "inputs", "error", "message"),
    [
        ([], "a", ValueError, "no method"),
        (["radial", "fastv"], "a", ValueError, "one stage at a time"),
        ([SPARSE, SPARSE], "a", ValueError, "same method twice"),
        (SPARSE, "", ValueError, "at least one prompt"),
        (FastV(), "a", mmeff.errors.UnsupportedModel, "no host of stage 'pruning'"),
    ],
)
def test_mistakes(pipeline, methods, inputs, error, message):
    with pytest.raises(error, match=message):
        mmeff.compare(pipeline, methods, inputs, **SMALL)


def test_questions_need_images():
    model, processor = tiny.vlm()
    with pytest.raises(ValueError, match="has no image"):
        mmeff.compare(model, "fastv", {"question": "what ?"}, processor=processor)
    with pytest.raises(ValueError, match="processor"):
        mmeff.compare(model, "fastv", {"question": "what ?"})


def test_variant_names():
    assert variant_names(resolve("radial")) == ["radial"]
    assert variant_names(resolve([FastV(keep=0.5), FastV(keep=0.25)])) == ["fastv keep=0.5", "fastv keep=0.25"]
