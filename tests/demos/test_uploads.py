"""Files that visitors bring."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from demos.settings import Settings
from demos.uploads import Uploads
from mmeff.errors import MediaError
from mmeff.tiny import data_folder
from mmeff.video_io import write


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return Uploads(Settings(max_upload_mb=0.5, max_upload_pixels=100_000, max_upload_seconds=2))


@pytest.fixture
def put(tmp_path, uploads):
    def put(name, content=b""):
        path = tmp_path / "uploads" / name
        if isinstance(content, np.ndarray):
            Image.fromarray(content).save(path)
        else:
            path.write_bytes(content)
        return str(path)

    return put


def test_a_picture_and_a_clip(uploads, put, tmp_path):
    pixels = np.full((40, 60, 3), 90, np.uint8)
    for given in (put("a.png", pixels), {"path": put("b.png", pixels), "meta": {"_type": "gradio.FileData"}}):
        assert np.array_equal(np.asarray(uploads.image(given)), pixels)
    write(tmp_path / "uploads" / "c.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    video = uploads.video(str(tmp_path / "uploads" / "c.mp4"), num_frames=3)
    assert video.frames.shape == (3, 32, 32, 3)
    assert uploads.image(None) is None and uploads.video("") is None


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "uploads/../../secret.png", "\0", "x" * 5000],
    ids=["absolute", "up", "out", "no name", "long"],
)  # fmt: skip
def test_paths_outside_the_folder(uploads, tmp_path, path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    for given in (path, {"path": path}, str(tmp_path / "uploads" / path)):
        for read in (uploads.image, uploads.video):
            with pytest.raises(MediaError, match=r"this one is not|no file any more") as caught:
                read(given)
            assert "/etc" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_link_out_of_the_folder(uploads, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "uploads" / "innocent.png")
    with pytest.raises(MediaError, match="this one is not"):
        uploads.image(str(tmp_path / "uploads" / "innocent.png"))


def test_folders_of_examples_are_allowed_where_they_are_named():
    folder = data_folder() / "samples"
    assert Uploads(Settings(), (folder,)).image(str(folder / "scene-1.jpg")).size[0] > 0
    with pytest.raises(MediaError, match="this one is not"):
        Uploads(Settings()).image(str(folder / "scene-1.jpg"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", r"empty.png is empty \(0 bytes\)"),
        ("large.png", os.urandom(600_000), "must be at most 0.5 MB, got 0.6 MB"),
        ("text.png", b"hello, I am no picture", "no picture of a kind that can be read here: PNG, JPEG"),
        ("page.svg", b"<svg onload='alert(1)'/>", "no picture of a kind"),
        ("doc.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a kind"),
        (
            "cut.png",
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x10\0\0\0\x10\x08\x02\0\0\0\x90\x91h6",
            "no picture of a kind",
        ),
        ("wide.png", np.zeros((200, 600, 3), np.uint8), "at most 100,000 pixels, got 600 x 200"),
    ],
    ids=["empty", "large", "text", "svg", "eps", "cut", "wide"],
)
def test_pictures_that_are_refused(uploads, put, name, content, message):
    path = put(name, content)
    with pytest.raises(MediaError, match=message):
        uploads.image(path)


def test_clips_that_are_refused(uploads, put, tmp_path):
    with pytest.raises(MediaError, match="no clip that can be read here"):
        uploads.video(put("text.mp4", b"hello, I am no clip"))
    with pytest.raises(MediaError, match=r"empty \(0 bytes\)"):
        uploads.video(put("empty.mp4"))
    write(tmp_path / "uploads" / "long.mp4", np.zeros((25, 32, 32, 3), np.uint8), fps=8)
    with pytest.raises(MediaError, match=r"must last at most 2 seconds, got 3\.1"):
        uploads.video(str(tmp_path / "uploads" / "long.mp4"))
    write(tmp_path / "uploads" / "wide.mp4", np.zeros((2, 320, 400, 3), np.uint8), fps=8)
    with pytest.raises(MediaError, match="at most 100,000 pixels, got 400 x 320"):
        uploads.video(str(tmp_path / "uploads" / "wide.mp4"))


@pytest.mark.parametrize("given", [3, [], {"url": "http://example.org/x.png"}, {"path": 3}])
def test_things_that_are_no_files(uploads, given):
    with pytest.raises(MediaError, match="must be an uploaded file"):
        uploads.image(given)
