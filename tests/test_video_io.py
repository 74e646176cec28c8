"""Reading and writing of videos: the same frames from every decoder, clear errors, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mmeff import video_io, video_readers
from mmeff.errors import BackendUnavailable, MediaError

USABLE = [name for name, reason in video_io.backends().items() if reason is None]
each_backend = pytest.mark.parametrize("backend", video_io.BACKENDS)


def need(backend):
    reason = video_io.backends()[backend]
    if reason is not None:
        pytest.skip(f"{backend} is not usable here: {reason}")


def clip(T=20, H=48, W=64):
    """A clip whose frames can be told apart: frame i is grey of level 10 i + 20, with a bright bar at column 3 i."""
    frames = np.zeros((T, H, W, 3), np.uint8)
    for i in range(T):
        frames[i] = (10 * i + 20) % 236
        frames[i, :, (3 * i) % W : (3 * i) % W + 4] = (250, 220, 40)
    return frames


def encode(path, frames, *, pts=None, rate=10, gop=6, codec="libx264"):
    """Write with chosen display times (milliseconds), B-frames and several keyframes, which `write` does not offer."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def level(frame):
    """Which frame of `clip` this is, read from its grey."""
    return round((float(np.median(frame)) - 20) / 10)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files that several tests read."""
    folder = tmp_path_factory.mktemp("media")
    frames = clip()
    video_io.write(folder / "plain.mp4", frames, fps=10)
    encode(folder / "gops.mp4", frames)
    encode(folder / "late.mp4", frames, pts=[700 + 100 * i for i in range(20)])  # starts at 0.7 s
    encode(folder / "uneven.mp4", frames, pts=[100 * i + 20 * (i % 3) for i in range(20)])
    encode(folder / "gops.mkv", frames)
    encode(folder / "stream.ts", frames)
    encode(folder / "old.avi", frames, codec="mpeg4")
    return folder


# ---------------------------------------------------------------- sampling


def test_spread_is_linspace_in_exact_integers():
    for count in (1, 2, 5, 17, 90, 1000):
        for n in (2, 3, 8, 17, 32):
            chosen = video_io.spread(count, n)
            assert len(chosen) == n and chosen[0] == 0 and chosen[-1] == count - 1
            assert np.abs(np.diff(np.diff(chosen))).max(initial=0) <= 1  # even, to a frame
    assert video_io.spread(90, 8) == np.linspace(0, 89, 8, dtype=int).tolist()


def test_spread_of_one_is_the_middle_and_of_too_many_repeats():
    assert video_io.spread(9, 1) == [4]
    assert video_io.spread(1, 1) == [0]
    assert video_io.spread(3, 6) == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("count", "native", "fps", "expected"),
    [
        (10, 10, 5, [0, 2, 4, 6, 8]),
        (10, 10, 3, [0, 3, 6]),
        (10, 10, 10, list(range(10))),
        (10, 10, 30, list(range(10))),
        (61, 29.97, 1, [0, 29, 59]),
        (61, 30, 1, [0, 30, 60]),
        (1, 8, 2, [0]),
        (5, 30, 0.01, [0]),
        (5, 30, 1e-6, [0]),
        (300, 10, 0.1, [0, 100, 200]),
        (300, 30000 / 1001, 1.5, [0, 19, 39, 59, 79, 99, 119, 139, 159, 179, 199, 219, 239, 259, 279, 299]),
        (9, 2, 0.5, [0, 4, 8]),
        (90, 0.1, 0.05, list(range(0, 90, 2))),
    ],
)
def test_at_rate(count, native, fps, expected):
    assert video_io.at_rate(count, native, fps) == expected


def test_at_rate_does_not_hang_on_float_noise():
    assert video_io.at_rate(100, 10 + 1e-9, 5) == video_io.at_rate(100, 10 - 1e-9, 5) == list(range(0, 100, 2))


# ---------------------------------------------------------------- round trips


@each_backend
@pytest.mark.parametrize("file", ["plain.mp4", "gops.mp4", "late.mp4", "uneven.mp4", "gops.mkv"])
def test_every_backend_returns_the_frames_that_were_written(media, backend, file):
    need(backend)
    video = video_io.read(media / file, backend=backend)
    assert video.backend == backend and video.frames.dtype == np.uint8 and video.frames.shape == (20, 48, 64, 3)
    assert [level(f) for f in video.frames] == list(range(20))
    assert video.indices.tolist() == list(range(20))
    expected = [0.1 * i + 0.02 * (i % 3) if file == "uneven.mp4" else 0.1 * i for i in range(20)]
    assert video.timestamps.dtype == np.float64
    assert np.allclose(video.timestamps, expected, atol=1e-3)
    assert video.fps == pytest.approx(19 / expected[-1], rel=1e-3)


@each_backend
def test_written_colours_survive(media, backend):
    need(backend)
    got = video_io.read(media / "plain.mp4", backend=backend).frames.astype(int)
    assert np.abs(got - clip())[:, :, 40:].mean() < 4  # 4:2:0 softens the bar's edges, and nothing else
    assert np.abs(got[0, 30:, 60:] - 20).max() <= 2


@each_backend
def test_saturated_colours_survive(tmp_path, backend):
    need(backend)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [240, 50, 230], [20, 90, 200]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (5, 32, 32, 3))
    got = video_io.read(video_io.write(tmp_path / "flat.mp4", frames), backend=backend).frames
    assert np.abs(got.astype(int) - frames).max() <= 4  # the wrong colour matrix is off by 20 and more


def test_pyav_jumps_to_keyframes_instead_of_decoding_everything(media, monkeypatch):
    decoded = []
    opened = video_readers._PyAV._open

    @contextmanager
    def counting(self):
        with opened(self) as (container, stream):

            def decode(stream):
                for frame in container.decode(stream):
                    decoded.append(frame.pts)
                    yield frame

            yield SimpleNamespace(decode=decode, seek=container.seek, demux=container.demux), stream

    monkeypatch.setattr(video_readers._PyAV, "_open", counting)
    video = video_io.read(media / "gops.mp4", indices=[1, 19], backend="pyav")
    assert [level(f) for f in video.frames] == [1, 19]
    assert len(decoded) <= 2 + 6  # a group of pictures has 6 frames


@each_backend
@pytest.mark.parametrize(
    "sampling", [{"num_frames": 7}, {"fps": 3}, {"indices": [19, 0, 7, 7, 3]}, {"indices": [13]}, {"num_frames": 30}]
)
@pytest.mark.parametrize("file", ["gops.mp4", "uneven.mp4", "late.mp4"])
def test_samples_are_frames_of_the_whole(media, backend, sampling, file):
    need(backend)
    whole = video_io.read(media / file, backend=backend)
    some = video_io.read(media / file, backend=backend, **sampling)
    assert np.array_equal(some.frames, whole.frames[some.indices])
    assert np.array_equal(some.timestamps, whole.timestamps[some.indices])
    assert some.fps == whole.fps
    if "indices" in sampling:
        assert some.indices.tolist() == sampling["indices"]


@pytest.mark.skipif(len(USABLE) < 2, reason="only one backend is usable here")
@pytest.mark.parametrize("sampling", [{}, {"num_frames": 7}, {"fps": 3}, {"fps": 7.5}])
@pytest.mark.parametrize("file", ["plain.mp4", "uneven.mp4", "late.mp4", "gops.mkv"])
def test_backends_agree_on_indices_times_and_pixels(media, sampling, file):
    first, *others = (video_io.read(media / file, backend=name, **sampling) for name in USABLE)
    for other in others:
        assert np.array_equal(first.indices, other.indices), other.backend
        assert np.allclose(first.timestamps, other.timestamps, atol=1e-5), other.backend
        assert np.abs(first.frames.astype(int) - other.frames).max() <= 2, other.backend


@pytest.mark.parametrize("file", ["stream.ts", "old.avi"])
@pytest.mark.parametrize("backend", ["pyav", "opencv"])
def test_containers_without_an_index_or_times_are_read_in_order(media, backend, file):
    need(backend)
    video = video_io.read(media / file, backend=backend, indices=[19, 2, 11, 17])
    assert [level(f) for f in video.frames] == [19, 2, 11, 17]
    assert np.allclose(video.timestamps, [1.9, 0.2, 1.1, 1.7], atol=1e-3)


def test_decord_refuses_containers_in_which_it_misplaces_frames(media):
    need("decord")
    with pytest.raises(MediaError, match=r"decord places frames correctly only in \.mp4.*stream\.ts.*another backend"):
        video_io.read(media / "stream.ts", backend="decord")


@each_backend
def test_one_frame(tmp_path, backend):
    need(backend)
    file = video_io.write(tmp_path / "one.mp4", clip(1), fps=8)
    for sampling in ({}, {"num_frames": 1}, {"num_frames": 3}, {"fps": 2}):
        video = video_io.read(file, backend=backend, **sampling)
        assert set(video.indices.tolist()) == {0} and len(video) == sampling.get("num_frames", 1)
        assert video.timestamps.tolist() == [0.0] * len(video)
    assert video.fps == pytest.approx(8)


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


@pytest.fixture
def damaged(tmp_path, media):
    import av

    whole = (media / "gops.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])  # the index stands at the end: nothing decodes
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "sound.m4a").rename(tmp_path / "sound.mp4")
    return tmp_path


@each_backend
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("none.mp4", r"none\.mp4 does not exist$"),
        ("nowhere/none.mp4", r"none\.mp4 does not exist, nor does its folder .*nowhere$"),
        ("empty.mp4", r"empty\.mp4 is empty \(0 bytes\)"),
        (".", r"is a folder, not a video"),
        ("noise.mp4", r"noise\.mp4 cannot be read: it is corrupt, truncated or not a video \(.* says: .+\)"),
        ("text.mp4", r"text\.mp4 cannot be read: it is corrupt, truncated or not a video"),
        ("cut.mp4", r"cut\.mp4 cannot be read: it is corrupt, truncated or not a video"),
        ("sound.mp4", r"sound\.mp4 cannot be read: it holds no video, only audio"),
    ],
)
def test_unreadable_files(damaged, backend, file, message):
    need(backend)
    with pytest.raises(MediaError, match=message):
        video_io.read(damaged / file, backend=backend)


@each_backend
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 20], r"indices must be in \[0, 19\] for the 20 frames of .*gops\.mp4, got 20$"),
        ([-1], r"got -1$"),
        ([3, 99, 98, 97], r"got 99 and 2 more outside"),
    ],
)
def test_indices_outside(media, backend, indices, message):
    need(backend)
    with pytest.raises(MediaError, match=message):
        video_io.read(media / "gops.mp4", indices=indices, backend=backend)


def test_a_frame_lost_to_truncation_is_named(tmp_path, media):
    import av

    # with the index in front, the file opens and only its last frames are gone
    with (
        av.open(str(media / "gops.mp4")) as source,
        av.open(str(tmp_path / "front.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:-400])
    assert level(video_io.read(tmp_path / "cut.mp4", indices=[2], backend="pyav").frames[0]) == 2
    with pytest.raises(MediaError, match=r"frame \d+ of the \d+ in .*cut\.mp4 cannot be decoded; the file is damaged"):
        video_io.read(tmp_path / "cut.mp4", backend="pyav")


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"num_frames": 2, "fps": 3}, "one of indices, num_frames and fps, got num_frames and fps"),
        ({"num_frames": 0}, "num_frames must be a positive integer, got 0"),
        ({"num_frames": 2.5}, "num_frames must be a positive integer, got 2.5"),
        ({"fps": -1}, "fps must be a positive number, got -1"),
        ({"fps": float("nan")}, "fps must be a positive number, got nan"),
        ({"indices": []}, "^indices must name at least one frame"),
        ({"backend": "decorb"}, r"one of torchcodec, pyav, decord, opencv, got 'decorb'\. Did you mean 'decord'\?"),
    ],
)
def test_wrong_arguments(media, sampling, message):
    with pytest.raises(ValueError, match=message):
        video_io.read(media / "plain.mp4", **sampling)


def without(monkeypatch, *modules):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)  # makes `import name` fail
    video_readers.missing.cache_clear()


@pytest.fixture
def forget_what_is_installed():
    yield
    video_readers.missing.cache_clear()


@pytest.mark.usefixtures("forget_what_is_installed")
def test_auto_takes_the_first_that_is_installed(media, monkeypatch):
    order = {"torchcodec": "torchcodec", "pyav": "av", "decord": "decord", "opencv": "cv2"}
    for name in USABLE:
        video_readers.missing.cache_clear()
        assert video_io.read(media / "plain.mp4", num_frames=2).backend == name
        without(monkeypatch, order[name])
    with pytest.raises(BackendUnavailable, match=r"no video decoder is usable here; pip install av\. torchcodec: .*"):
        video_io.read(media / "plain.mp4")


@pytest.mark.usefixtures("forget_what_is_installed")
@each_backend
def test_a_named_backend_never_falls_back(media, monkeypatch, backend):
    without(monkeypatch, {"pyav": "av", "opencv": "cv2"}.get(backend, backend))
    with pytest.raises(BackendUnavailable, match=rf"backend='{backend}' is not usable here: .*pass backend='auto'"):
        video_io.read(media / "plain.mp4", backend=backend)


@pytest.mark.usefixtures("forget_what_is_installed")
def test_without_pyav_the_cause_of_a_bad_file_is_still_told(damaged, monkeypatch):
    need("opencv")
    without(monkeypatch, "av")
    with pytest.raises(
        MediaError, match=r"sound\.mp4 cannot be read: it is corrupt, truncated, without a video stream"
    ):
        video_io.read(damaged / "sound.mp4", backend="opencv")
    with pytest.raises(BackendUnavailable, match="writing a video needs PyAV"):
        video_io.write(damaged / "x.mp4", clip(1))


# ---------------------------------------------------------------- writing


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


def test_nothing_heavy_is_imported_before_use():
    heavy = ("av", "cv2", "decord", "torchcodec", "PIL")
    code = f"import sys, mmeff.video_io; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


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
