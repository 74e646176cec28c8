"""Writing of videos, whole or not at all, and reading of images."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from video_files import clip, each_backend, level, need

from mmeff import video_io
from mmeff.errors import MediaError

# ---------------------------------------------------------------- what survives


@each_backend
def test_written_colours_survive(tmp_path, backend):
    need(backend)
    got = video_io.read(video_io.write(tmp_path / "a.mp4", clip(), fps=10), backend=backend).frames.astype(int)
    assert np.abs(got - clip())[:, :, 40:].mean() < 4  # 4:2:0 softens the bar's edges, and nothing else
    assert np.abs(got[0, 30:, 60:] - 20).max() <= 2


@each_backend
def test_saturated_colours_survive(tmp_path, backend):
    need(backend)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [240, 50, 230], [20, 90, 200]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (5, 32, 32, 3))
    got = video_io.read(video_io.write(tmp_path / "flat.mp4", frames), backend=backend).frames
    assert np.abs(got.astype(int) - frames).max() <= 4  # the wrong colour matrix is off by 20 and more


@pytest.mark.parametrize(("H", "W"), [(47, 64), (48, 63), (33, 35), (1, 1)])
def test_odd_sizes_are_padded_by_repeating_the_last_row_and_column(tmp_path, H, W):
    frames = clip(3, 48, 64)[:, :H, :W]
    got = video_io.read(video_io.write(tmp_path / "odd.mp4", frames), backend="pyav").frames
    assert got.shape == (3, H + H % 2, W + W % 2, 3)
    if H % 2 and H > 1:
        assert np.abs(got[:, -1].astype(int) - got[:, -2]).max() <= 8
    assert [level(f[:H, :W]) for f in got] == ([0, 1, 2] if H > 1 else [level(f) for f in frames])


def test_write_takes_floats_tensors_and_pictures(tmp_path):
    torch = pytest.importorskip("torch")
    frames = clip(3)
    unit = frames.astype(np.float32) / 255
    pictures = [Image.fromarray(f) for f in frames]
    for other in (
        unit,
        unit.astype(np.float64),
        torch.from_numpy(unit),
        torch.from_numpy(frames),
        pictures,
        list(frames),
    ):
        assert np.array_equal(video_io.to_uint8(other), frames)
    assert np.abs(video_io.to_uint8(torch.from_numpy(unit).bfloat16()).astype(int) - frames).max() <= 1
    with_alpha = [p.convert("RGBA") for p in pictures]
    assert np.array_equal(video_io.to_uint8(with_alpha), frames)
    video_io.write(tmp_path / "a.mp4", unit)
    video_io.write(tmp_path / "b.mp4", pictures)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_lower_crf_is_closer(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8)
    error = {}
    for crf in (0, 40):
        got = video_io.read(video_io.write(tmp_path / f"{crf}.mp4", frames, crf=crf)).frames
        error[crf] = np.abs(got.astype(int) - frames).mean()
    assert error[0] < error[40]


def test_fractional_rates_survive(tmp_path):
    file = video_io.write(tmp_path / "ntsc.mp4", clip(12), fps=30000 / 1001)
    assert video_io.read(file, backend="pyav").fps == pytest.approx(30000 / 1001, rel=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 8, 8), np.uint8), r"must be \(T, H, W, 3\).*got \(4, 8, 8\); a single image is frames\[None\]"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"got \(4, 3, 8, 8\); move the channels last"),
        (np.zeros((1, 4, 8, 8, 3), np.uint8), "pass one video of the batch"),
        (np.zeros((4, 8, 8, 4), np.uint8), r"got \(4, 8, 8, 4\)$"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one frame"),
        ([], "at least one frame"),
        (np.full((1, 8, 8, 3), 255.0), r"in \[0, 1\], got values in \[255, 255\]"),
        (np.full((1, 8, 8, 3), -0.5), r"got values in \[-0.5, -0.5\]"),
        (np.full((1, 8, 8, 3), np.nan), r"finite"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], r"one shape, got \(8, 8, 3\) and \(9, 8, 3\)"),
    ],
)
def test_wrong_frames(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        video_io.write(tmp_path / "x.mp4", frames)
    assert list(tmp_path.iterdir()) == []


def test_wrong_dtype_suffix_and_rate(tmp_path):
    with pytest.raises(TypeError, match=r"uint8 in .* or float in .*, got int64"):
        video_io.write(tmp_path / "x.mp4", np.zeros((1, 8, 8, 3), np.int64))
    with pytest.raises(ValueError, match=r"must end in \.mp4, \.mov, \.mkv to hold H\.264, got 'x\.webm'"):
        video_io.write(tmp_path / "x.webm", clip(1))
    with pytest.raises(ValueError, match="fps must be a positive number, got 0"):
        video_io.write(tmp_path / "x.mp4", clip(1), fps=0)
    with pytest.raises(ValueError, match=r"crf must be in \[0, 51\], got 52"):
        video_io.write(tmp_path / "x.mp4", clip(1), crf=52)


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"cannot write .*x\.mp4: .*nowhere does not exist; create it first"):
        video_io.write(tmp_path / "nowhere" / "x.mp4", clip(1))
    with pytest.raises(NotADirectoryError, match=r"cannot write .*x\.mp4: .*file is not a folder"):
        video_io.write(tmp_path / "file" / "x.mp4", clip(1))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.mp4: it is a folder; name a file in it"):
        video_io.write(tmp_path / "folder.mp4", clip(1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is a folder that not even root can write to")
def test_a_folder_without_permission():
    with pytest.raises(PermissionError, match=r"cannot write /proc/x\.mp4: the folder /proc is not writable"):
        video_io.write("/proc/x.mp4", clip(1))


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    import av

    file = video_io.write(tmp_path / "x.mp4", clip(2))
    before = file.read_bytes()
    made = av.VideoFrame.from_ndarray
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return made(*args, **kwargs)

    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=failing))
    with pytest.raises(KeyboardInterrupt):
        video_io.write(file, clip(8))
    assert len(calls) == 4
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


# ---------------------------------------------------------------- images


def test_read_image(tmp_path):
    picture = Image.fromarray(clip(1)[0])
    picture.save(tmp_path / "a.png")
    picture.convert("RGBA").save(tmp_path / "b.png")
    picture.convert("L").save(tmp_path / "c.jpg")
    assert np.array_equal(np.asarray(video_io.read_image(tmp_path / "a.png")), clip(1)[0])
    for name in ("a.png", "b.png", "c.jpg"):
        assert video_io.read_image(tmp_path / name).mode == "RGB"


def test_read_image_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by 90 degrees
    Image.fromarray(clip(1)[0]).save(tmp_path / "a.jpg", exif=exif)
    assert video_io.read_image(tmp_path / "a.jpg").size == (48, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x\.png does not exist"),
        (b"", r"x\.png is empty \(0 bytes\)"),
        (b"hello", r"x\.png cannot be read as an image: cannot identify"),
        ("cut", r"x\.png cannot be read as an image"),
        ("folder", r"x\.png is a folder, not an image"),
    ],
)
def test_unreadable_images(tmp_path, content, message):
    file = tmp_path / "x.png"
    if content == "folder":
        file.mkdir()
    elif content == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:3000])
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(MediaError, match=message):
        video_io.read_image(file)
