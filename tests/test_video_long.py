"""Clips as cameras and the web make them: rotated, of varying rate, cut, an hour long, damaged or no clip at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from textwrap import dedent

import numpy as np
import pytest
from odd_media import write_odd_media
from video_files import USABLE, clip, each_backend, encode, level, need, turn

from mmeff import video_io
from mmeff.errors import MediaError

GIB = 2**30
UPRIGHT = {  # display matrix -> quarter turns counter-clockwise that show a frame upright
    "no turn": ((1, 0, 0, 1), 0),
    "90 clockwise": ((0, 1, -1, 0), -1),
    "180": ((-1, 0, 0, -1), 2),
    "90 counter-clockwise": ((0, -1, 1, 0), 1),
}


@pytest.fixture(scope="module")
def ninety(tmp_path_factory):
    """A clip of 90 frames with colours everywhere, as a phone makes them; sides of no round size."""
    y, x = np.mgrid[:90, :162]
    frames = np.stack(
        [np.stack([x + 2 * i, 2 * y + i, (x + y) // 2 + 3 * i], axis=-1) % 256 for i in range(90)]
    ).astype(np.uint8)
    file = tmp_path_factory.mktemp("ninety") / "clip.mp4"
    encode(file, frames, rate=30, gop=25)
    return file


# ---------------------------------------------------------------- one clip, every backend


@pytest.mark.skipif(len(USABLE) < 2, reason="only one backend is usable here")
@pytest.mark.parametrize("turned", list(UPRIGHT))
def test_eight_of_ninety_frames_are_equal_pixels_on_every_backend(ninety, tmp_path, turned):
    matrix, quarters = UPRIGHT[turned]
    file = tmp_path / "turned.mp4"
    file.write_bytes(ninety.read_bytes())
    turn(file, matrix)
    plain = video_io.read(ninety, num_frames=8, backend=USABLE[0])
    for backend in USABLE:
        video = video_io.read(file, num_frames=8, backend=backend)
        assert video.indices.tolist() == [0, 12, 25, 38, 50, 63, 76, 89], backend
        assert np.array_equal(video.frames, np.rot90(plain.frames, quarters, axes=(1, 2))), backend
        assert np.allclose(video.timestamps, plain.timestamps, atol=1e-6), backend


@pytest.mark.skipif(len(USABLE) < 2, reason="only one backend is usable here")
def test_mirrored_matrices_and_odd_angles_agree_too(ninety, tmp_path):
    for name, matrix in {"mirror": (-1, 0, 0, 1), "transpose": (0, 1, 1, 0), "45": (0.7, 0.7, -0.7, 0.7)}.items():
        file = tmp_path / f"{name}.mp4"
        file.write_bytes(ninety.read_bytes())
        turn(file, matrix)
        first, *others = (
            video_io.read(file, indices=[7, 40], backend=b).frames for b in ("pyav", "opencv") if b in USABLE
        )
        assert all(np.array_equal(first, other) for other in others), name


@each_backend
def test_ten_bit_grey_and_odd_sides(tmp_path, backend):
    need(backend)
    import av

    for pix_fmt, codec, (H, W) in (
        ("yuv420p10le", "libx265", (48, 64)),
        ("gray", "ffv1", (47, 63)),
        ("yuv444p", "libx264", (47, 63)),
    ):
        file = tmp_path / f"{pix_fmt}.mkv"
        with av.open(str(file), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width, stream.pix_fmt = H, W, pix_fmt
            for image in clip(4)[:, :H, :W]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)))
            container.mux(stream.encode())
        video = video_io.read(file, num_frames=4, backend=backend)
        assert video.frames.shape == (4, H, W, 3), pix_fmt
        assert [level(f) for f in video.frames] == [0, 1, 2, 3], pix_fmt


# ---------------------------------------------------------------- varying rate, and cuts


@pytest.fixture(scope="module")
def varying(tmp_path_factory):
    """Twenty frames: ten in the first second, then one each second."""
    file = tmp_path_factory.mktemp("varying") / "vfr.mp4"
    encode(file, clip(), pts=[100 * i for i in range(10)] + [1000 * (i - 9) for i in range(10, 20)])
    return file


@each_backend
def test_a_rate_is_met_in_time_where_the_file_has_none_of_its_own(varying, backend):
    need(backend)
    video = video_io.read(varying, fps=1, backend=backend)
    assert video.indices.tolist() == [0, *range(10, 20)]  # the mean rate would take frames 0, 1, 3, 5, ...
    assert [level(f) for f in video.frames] == video.indices.tolist()
    assert np.allclose(video.timestamps, range(11), atol=1e-3)
    assert len(video_io.read(varying, fps=10, backend=backend)) == 20


@each_backend
@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"start": 0.5, "end": 3.0}, [5, 6, 7, 8, 9, 10, 11]),
        ({"start": 2.5}, [11, 12, 13, 14, 15, 16, 17, 18, 19]),  # frame 11 is still shown
        ({"end": 0.2}, [0, 1]),
        ({"start": 0.45, "end": 0.46}, [4]),
        ({"start": 9.9, "end": 900}, [18, 19]),
        ({"start": 0, "end": 1.0, "num_frames": 3}, [0, 4, 9]),
        ({"start": 1.0, "end": 5.0, "fps": 0.5}, [10, 12]),
        ({"start": 0.1, "end": 0.9, "fps": 5}, [1, 3, 5, 7]),
    ],
)
def test_cuts_are_of_time(varying, backend, cut, expected):
    need(backend)
    video = video_io.read(varying, backend=backend, **cut)
    assert video.indices.tolist() == expected
    assert [level(f) for f in video.frames] == expected


def test_cuts_that_cannot_be(varying):
    with pytest.raises(
        MediaError, match=r"the cut from 12\.5 s on lies behind the last frame of .*vfr\.mp4, .* at 10 s"
    ):
        video_io.read(varying, start=12.5)
    with pytest.raises(ValueError, match="end must lie after start, got start=3 and end=3 seconds"):
        video_io.read(varying, start=3, end=3)
    with pytest.raises(ValueError, match="start must be a positive number, got -1"):
        video_io.read(varying, start=-1)
    with pytest.raises(ValueError, match="indices count from the first frame of the file and go with no start or end"):
        video_io.read(varying, indices=[1], start=2)


# ---------------------------------------------------------------- hours


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """An hour at 2 frames a second: 7,200 frames of 320 x 240, 1.5 GiB of pixels. Flat, so that it is made in seconds."""
    import av

    file = tmp_path_factory.mktemp("hour") / "hour.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast", "crf": "40"})
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuv420p"
        stream.codec_context.gop_size = 120
        grey = [np.full((360, 320), 16 + 20 * k, np.uint8) for k in range(10)]
        for plane in grey:
            plane[240:] = 128
        for i in range(7200):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey[i // 720], format="yuv420p")))
        container.mux(stream.encode())
    return file


def peak(code):
    """Peak resident bytes of a Python process that runs `code`, above one that only imports what it needs, and its output."""
    # not getrusage: what it says of a child begins at the peak of the process that started it
    report = "print([int(x.split()[1]) * 1024 for x in open('/proc/self/status') if x.startswith('VmHWM')][0])"
    found = subprocess.run(
        [sys.executable, "-c", f"{dedent(code)}\n{report}"], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout.split()  # fmt: skip
    return int(found[-1]), found[:-1]


@each_backend
def test_eight_frames_of_an_hour_take_little_memory(hour, backend):
    need(backend)
    used, said = peak(f"""
        from mmeff import video_io
        video = video_io.read({str(hour)!r}, num_frames=8, backend={backend!r})
        print(video.frames.shape[0], *video.indices, *(int(f.mean()) for f in video.frames))
    """)
    assert used < GIB, f"{used / GIB:.2f} GiB"
    count, *rest = map(int, said)
    assert count == 8 and rest[:8] == [i * 7199 // 7 for i in range(8)]
    assert rest[8:] == sorted(rest[8:]) and len(set(rest[8:])) == 8  # the clip brightens


@pytest.mark.parametrize("backend", ["auto"])
def test_all_of_an_hour_is_streamed_in_little_memory(hour, backend):
    used, said = peak(f"""
        from mmeff import video_io
        seen = [0, 0]
        for piece in video_io.stream({str(hour)!r}, chunk=64, backend={backend!r}):
            assert piece.indices[0] == seen[0] and len(piece) <= 64
            seen[0] += len(piece)
            seen[1] = piece.timestamps[-1]
        print(seen[0], round(seen[1], 3))
    """)
    assert said == ["7200", "3599.5"]
    assert used < GIB, f"{used / GIB:.2f} GiB"


def test_what_would_not_fit_is_refused_before_it_is_tried(hour, monkeypatch):
    monkeypatch.setattr(video_io, "MOST_BYTES", GIB)
    with pytest.raises(
        MediaError, match=r"7200 frames of .*hour\.mp4 take 1\.5 GiB, and at most 1 GiB .*pass num_frames"
    ):
        video_io.read(hour)


@each_backend
def test_a_stream_is_the_read_in_pieces(varying, backend):
    need(backend)
    for sampling in ({}, {"fps": 3}, {"num_frames": 7}, {"start": 0.3, "end": 5}, {"num_frames": 30}):
        whole = video_io.read(varying, backend=backend, **sampling)
        kept = np.unique(whole.indices, return_index=True)[1]  # a stream repeats no frame
        pieces = list(video_io.stream(varying, chunk=3, backend=backend, **sampling))
        assert all(len(p) == 3 for p in pieces[:-1]) and 1 <= len(pieces[-1]) <= 3
        assert np.array_equal(np.concatenate([p.indices for p in pieces]), whole.indices[kept])
        assert np.array_equal(np.concatenate([p.frames for p in pieces]), whole.frames[kept])
        assert np.array_equal(np.concatenate([p.timestamps for p in pieces]), whole.timestamps[kept])
        assert {p.fps for p in pieces} == {whole.fps}


def test_a_stream_can_be_left_early_and_checks_its_arguments(varying, tmp_path):
    for piece in video_io.stream(varying, chunk=2):
        assert piece.indices.tolist() == [0, 1]
        break
    for wrong, message in (
        ({"chunk": 0}, "chunk must be a positive integer, got 0"),
        ({"fps": -2}, "fps must be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            next(video_io.stream(varying, **wrong))
    with pytest.raises(MediaError, match=r"none\.mp4 does not exist"):
        next(video_io.stream(tmp_path / "none.mp4"))


# ---------------------------------------------------------------- what is no clip


def test_places_that_are_no_files(tmp_path):
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    for name in ("loop.mp4", "gone.mp4"):
        with pytest.raises(MediaError, match=rf"{name} is a symbolic link that leads to no file"):
            video_io.read(tmp_path / name)
    with pytest.raises(MediaError, match=r"pipe\.mp4 is neither a file nor a link to one"):
        video_io.read(tmp_path / "pipe.mp4")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    file = video_io.write(tmp_path / "a.mp4", clip(2))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(MediaError, match=r"a\.mp4 may not be read by this user; change its permissions"):
        video_io.read(file)


@each_backend
def test_a_wrong_ending_misleads_nobody(tmp_path, backend):
    need(backend)
    encode(tmp_path / "a.mkv", clip())
    encode(tmp_path / "b.ts", clip())
    (tmp_path / "a.mkv").rename(tmp_path / "a.mp4")
    (tmp_path / "b.ts").rename(tmp_path / "b.mp4")
    assert [level(f) for f in video_io.read(tmp_path / "a.mp4", indices=[17, 3], backend=backend).frames] == [17, 3]
    if backend in ("decord", "torchcodec"):  # neither places frames in a stream without an index
        with pytest.raises(MediaError, match=r"pass another backend|backend='pyav' may read it"):
            video_io.read(tmp_path / "b.mp4", indices=[17, 3], backend=backend)
    else:
        assert [level(f) for f in video_io.read(tmp_path / "b.mp4", indices=[17, 3], backend=backend).frames] == [17, 3]


@each_backend
def test_a_clip_without_frames(tmp_path, backend):
    need(backend)
    import av

    file = tmp_path / "none.mkv"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(MediaError, match=r"none\.mkv (holds no decodable frame|cannot be read)"):
        video_io.read(file, backend=backend)


@each_backend
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
def test_a_clip_that_was_cut_off_anywhere_is_read_or_refused(ninety, tmp_path, backend, keep):
    """Matroska keeps no index at its end, so what is there can be read; every backend must say what it cannot do, and end."""
    need(backend)
    import av

    whole = tmp_path / "whole.mkv"
    with av.open(str(ninety)) as source, av.open(str(whole), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = whole.read_bytes()
    file = tmp_path / "cut.mkv"
    file.write_bytes(content[: int(len(content) * keep)])
    reference = video_io.read(whole, backend="pyav")
    try:
        video = video_io.read(file, num_frames=4, backend=backend)
    except MediaError as error:
        assert "cut.mkv" in str(error)
    else:
        near = np.abs(video.frames[0].astype(int) - reference.frames[video.indices[0]]).max()
        assert near == 0 and len(video) == 4


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, write_odd_media(folder)


@each_backend
def test_sixty_odd_files_crash_nothing_and_hang_nothing(odd, backend):
    """In a process of its own: a decoder that crashes takes its process along, and one that hangs is ended by the clock."""
    need(backend)
    folder, readable = odd
    assert len(readable) >= 60 and set(readable) == set(os.listdir(folder))
    code = f"""
        import json, pathlib, sys
        from mmeff import video_io
        from mmeff.errors import MediaError
        found = {{}}
        for file in sorted(pathlib.Path({str(folder)!r}).iterdir()):
            try:
                found[file.name] = len(video_io.read(file, num_frames=4, backend={backend!r}))
            except MediaError as error:
                found[file.name] = str(error)
        print(json.dumps(found))
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(readable)
    for name, result in found.items():
        if isinstance(result, str):
            assert name in result and len(result) > len(name) + 20, result  # which file, and what is wrong with it
        if backend == "pyav" and readable[name] is not None:
            assert (result == 4) == readable[name], (name, result)
