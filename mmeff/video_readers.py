"""The decoders behind `mmeff.video_io.read`: one small class each, asked only for frames by their index.

Nothing here samples. A reader counts the frames of its file exactly, tells when the first and the last are shown, and
returns those it is asked for; what to ask for is decided once, in `video_io`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmeff.errors import BackendUnavailable, MediaError, suggest

BACKENDS = ("torchcodec", "pyav", "decord", "opencv")  # the order in which "auto" tries them
_PACKAGES = {"torchcodec": "torchcodec", "pyav": "av", "decord": "decord", "opencv": "opencv-python-headless"}


class Reader(Protocol):
    """An open file. Times are seconds on any clock; `read` subtracts the first frame's."""

    count: int
    nominal_fps: float  # what the header says; only used for a video of one frame, whose rate cannot be measured

    def span(self) -> tuple[float, float]:
        """Times of the first and the last frame."""

    def get(self, indices: list[int]) -> tuple[np.ndarray, Sequence[float]]:
        """Frames (T, H, W, 3) and times of ascending, distinct indices."""


class _TorchCodec:
    def __init__(self, path: Path) -> None:
        decoders = import_module("torchcodec.decoders")
        self.decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC", seek_mode="exact")
        self.count = len(self.decoder)
        self.nominal_fps = float(self.decoder.metadata.average_fps_from_header or 0)

    def span(self) -> tuple[float, float]:
        return self.decoder.get_frame_at(0).pts_seconds, self.decoder.get_frame_at(self.count - 1).pts_seconds

    def get(self, indices: list[int]) -> tuple[np.ndarray, Sequence[float]]:
        batch = self.decoder.get_frames_at(indices=indices)
        return batch.data.numpy(), batch.pts_seconds.tolist()


class _PyAV:
    """Packets are listed first, without decoding: that counts the frames exactly and gives the keyframes to seek to."""

    def __init__(self, path: Path) -> None:
        self.av = import_module("av")
        self.path = path
        with self._open() as (container, stream):
            self.nominal_fps = float(stream.average_rate or 0)
            self.time_base = stream.time_base or Fraction(1)
            shown = [p for p in container.demux(stream) if p.size and not p.is_discard]
            pts = [p.pts for p in shown]
            self.by_time = None not in pts and len(set(pts)) == len(pts)
            self.keys = sorted(p.pts for p in shown if p.is_keyframe) if self.by_time else []
        if self.by_time:
            self.pts = sorted(pts)
        else:  # old containers and bare streams store no display times: count by decoding, and trust the nominal rate
            self.pts = list(range(sum(1 for _ in self._walk())))
            self.time_base = Fraction(1 / self.nominal_fps if self.nominal_fps else 1)
        self.count = len(self.pts)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        with self.av.open(str(self.path)) as container:
            streams = [stream for stream in container.streams.video if _kind(stream) == "video"]
            if not streams:
                raise RuntimeError("no video stream")
            stream = streams[0]
            stream.thread_type = "AUTO"
            yield container, stream

    def _walk(self) -> Iterator[Any]:
        with self._open() as (container, stream):
            yield from container.decode(stream)

    def span(self) -> tuple[float, float]:
        return float(self.pts[0] * self.time_base), float(self.pts[-1] * self.time_base)

    def get(self, indices: list[int]) -> tuple[np.ndarray, Sequence[float]]:
        frames = self._sought(indices) if self.by_time else self._in_order(indices)
        return np.stack(list(frames)), [float(self.pts[i] * self.time_base) for i in indices]

    def _sought(self, indices: list[int]) -> Iterator[np.ndarray]:
        """Decode forward, jumping to a keyframe where one lies between the last frame and the next wanted one."""
        with self._open() as (container, stream):
            decoded: Iterator[Any] = container.decode(stream)
            trusted, at, frame = True, self.pts[0] - 1, None  # `at`: display time of the last decoded frame
            for index in indices:
                target = self.pts[index]
                key = self.keys[max(bisect_right(self.keys, target) - 1, 0)] if self.keys else at
                if trusted and at < key and key > self.pts[0]:
                    container.seek(key, stream=stream)
                    decoded = container.decode(stream)
                    frame = next(decoded, None)
                    # containers without an index (MPEG-TS) land somewhere; what follows there may lack its references
                    trusted = frame is not None and frame.key_frame and frame.pts <= key
                    if not trusted:
                        container.seek(self.pts[0], stream=stream)
                        decoded = container.decode(stream)
                        frame = next(decoded, None)
                while frame is None or frame.pts < target:
                    frame = next(decoded, None)
                    if frame is None:
                        break
                if frame is None or frame.pts != target:
                    raise _undecodable(self.path, index, self.count)
                at = frame.pts
                yield frame.to_ndarray(format="rgb24")

    def _in_order(self, indices: list[int]) -> Iterator[np.ndarray]:
        wanted = set(indices)
        for number, frame in enumerate(self._walk()):
            if number in wanted:
                yield frame.to_ndarray(format="rgb24")
                if number == indices[-1]:
                    return


class _Decord:
    """decord 0.6 is exact in containers with an index and no edit list. In others it returns wrong frames without a
    word, so those are refused here; an edit list, which `ffmpeg -ss ... -c copy` writes into an mp4, it ignores: it
    then counts the hidden frames before the cut too, and disagrees with every other backend."""

    suffixes = (".mp4", ".m4v", ".mov", ".mkv", ".webm")

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() not in self.suffixes:
            raise MediaError(
                f"decord places frames correctly only in {', '.join(self.suffixes)}, got {path}; pass another backend"
            )
        decord = import_module("decord")
        self.reader = decord.VideoReader(str(path), num_threads=1)
        self.count = len(self.reader)
        self.nominal_fps = float(self.reader.get_avg_fps())

    def span(self) -> tuple[float, float]:
        times = self.reader.get_frame_timestamp([0, self.count - 1])
        return float(times[0, 0]), float(times[1, 0])

    def get(self, indices: list[int]) -> tuple[np.ndarray, Sequence[float]]:
        frames = self.reader.get_batch(indices).asnumpy()
        return frames, self.reader.get_frame_timestamp(indices)[:, 0].tolist()


class _OpenCV:
    """OpenCV's own frame count and seeking are estimates in some containers, so this reader walks the file instead."""

    def __init__(self, path: Path) -> None:
        self.cv2 = import_module("cv2")
        self.path = path
        capture = self._open()
        self.nominal_fps = float(capture.get(self.cv2.CAP_PROP_FPS))
        self.times: list[float] = []
        while capture.grab():
            self.times.append(capture.get(self.cv2.CAP_PROP_POS_MSEC) / 1000)
        capture.release()
        self.count = len(self.times)
        if any(b <= a for a, b in zip(self.times, self.times[1:], strict=False)):  # the container stores no times
            self.times = [number / (self.nominal_fps or 1) for number in range(self.count)]

    def _open(self) -> Any:
        capture = self.cv2.VideoCapture(str(self.path), self.cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise RuntimeError("the file could not be opened")
        return capture

    def span(self) -> tuple[float, float]:
        return self.times[0], self.times[-1]

    def get(self, indices: list[int]) -> tuple[np.ndarray, Sequence[float]]:
        capture, wanted, frames = self._open(), set(indices), []
        try:
            for number in range(indices[-1] + 1):
                if not capture.grab():
                    raise _undecodable(self.path, number, self.count)
                if number in wanted:
                    ok, frame = capture.retrieve()
                    if not ok:
                        raise _undecodable(self.path, number, self.count)
                    frames.append(self.cv2.cvtColor(frame, self.cv2.COLOR_BGR2RGB))
        finally:
            capture.release()
        return np.stack(frames), [self.times[i] for i in indices]


_READERS: dict[str, Callable[[Path], Reader]] = {
    "torchcodec": _TorchCodec,
    "pyav": _PyAV,
    "decord": _Decord,
    "opencv": _OpenCV,
}


def choose(backend: str) -> tuple[str, Callable[[Path], Reader]]:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}.{suggest(backend, BACKENDS)}"
        )
    reasons = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        reason = missing(name)
        if reason is None:
            return name, _READERS[name]
        reasons[name] = reason
    if backend == "auto":
        raise BackendUnavailable(
            "no video decoder is usable here; pip install av. " + "; ".join(f"{k}: {v}" for k, v in reasons.items())
        )
    raise BackendUnavailable(
        f"backend={backend!r} is not usable here: {reasons[backend]}. "
        f"Install {_PACKAGES[backend]}, or pass backend='auto'"
    )


@cache
def missing(name: str) -> str | None:
    """Why a backend cannot be used, or None."""
    try:
        module = import_module({"pyav": "av", "opencv": "cv2"}.get(name, name))
        if name == "torchcodec":
            _load_torchcodec()
    except Exception as error:  # a codec wheel whose shared libraries do not load fails in many ways, all "not usable"
        return first_line(error)
    if name == "decord" and not hasattr(module, "VideoReader"):  # a leftover empty folder imports as a namespace
        return "the installed decord has no VideoReader"
    return None


def _load_torchcodec() -> None:
    """Raise where torchcodec finds no FFmpeg: newer releases import without it, and fail only when a file is opened."""
    decoders = import_module("torchcodec.decoders")
    try:
        decoders.VideoDecoder(b"not a video")
    except Exception as error:
        if "libtorchcodec" in str(error):
            raise


def _undecodable(path: Path, index: int, count: int) -> MediaError:
    return MediaError(f"frame {index} of the {count} in {path} cannot be decoded; the file is damaged or cut there")


def diagnose(path: Path, backend: str) -> str:
    """What is wrong with a file that a backend refused. Asks PyAV where it is installed; decodes nothing."""
    try:
        av = import_module("av")
    except ImportError:
        return "it is corrupt, truncated, without a video stream or of a kind that this backend does not know"
    try:
        with av.open(str(path)) as container:
            kinds = {_kind(stream) for stream in container.streams}
    except Exception:  # whatever PyAV raises, it did not recognise the file either
        kinds = set()
    if not kinds:
        return "it is corrupt, truncated or not a video"
    if "video" not in kinds:
        return f"it holds no video, only {' and '.join(sorted(kinds))}"
    other = "" if backend == "pyav" else "; backend='pyav' may read it"
    return f"it is damaged, or of a kind that {backend} does not decode{other}"


def _kind(stream: Any) -> str:
    """ "video", "audio", ...; the picture that music files carry is a video stream to FFmpeg, but no video."""
    is_picture = stream.type == "video" and stream.disposition & _attached_picture()
    return "cover art" if is_picture else str(stream.type)


def _attached_picture() -> Any:
    return import_module("av.stream").Disposition.attached_pic


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
