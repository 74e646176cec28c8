"""Reading of videos: the same frames from every decoder, and clear errors."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from video_files import USABLE, clip, each_backend, level, need, write_media

from mmeff import video_io, video_readers
from mmeff.errors import BackendUnavailable, MediaError


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


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


@pytest.mark.parametrize(
    ("times", "fps", "expected"),
    [
        ([0, 0.1, 0.2, 0.3, 2.0, 2.1], 1, [0, 3, 4]),  # frame 3 is shown until 2.0, so it is what a viewer sees at 1.0
        ([0, 0.1, 0.2, 0.3, 2.0, 2.1], 10, [0, 1, 2, 3, 4, 5]),
        ([5, 5.5, 6.0, 6.1, 6.2], 2, [0, 1, 2]),  # 6.5 is behind the end
        ([0, 0.333, 0.667, 1.0], 3, [0, 1, 2, 3]),  # two thirds, rounded up to a millisecond, are two thirds
        ([0, 0.5, 1.0], 1e9, [0, 1, 2]),
        ([7.25], 3, [0]),
        ([0, 10], 1e-6, [0]),
    ],
)
def test_at_times(times, fps, expected):
    assert video_io.at_times(times, fps) == expected


def test_at_times_is_at_rate_where_the_rate_is_steady():
    for fps in (1, 2.5, 7, 23.976, 30, 60):
        times = np.round(np.arange(200) / 30, 3)  # as Matroska stores them
        assert video_io.at_times(times, fps) == video_io.at_rate(200, 30, fps), fps


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


def test_pyav_jumps_to_keyframes_instead_of_decoding_everything(media, monkeypatch):
    decoded = []
    opened = video_readers._opened

    @contextmanager
    def counting(path):
        with opened(path) as (container, stream):

            def decode(stream):
                for frame in container.decode(stream):
                    decoded.append(frame.pts)
                    yield frame

            yield SimpleNamespace(decode=decode, seek=container.seek, demux=container.demux), stream

    monkeypatch.setattr(video_readers, "_opened", counting)
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
        assert np.array_equal(first.frames, other.frames), other.backend


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


def test_nothing_heavy_is_imported_before_use():
    heavy = ("av", "cv2", "decord", "torchcodec", "PIL")
    code = f"import sys, mmeff.video_io; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
