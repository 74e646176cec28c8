"""The decoders behind `mmeff.video_io.read`: one small class each, asked only for frames by their index.

Nothing here samples. A reader counts the frames of its file exactly, tells when each is shown, and hands out those it is
asked for one at a time, upright, so that memory is bounded by a few frames; what to ask for is decided once, in `video_io`.

All four turn frames by the angle of the file's display matrix, a multiple of 90 degrees, and leave its mirrorings alone.
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

CHUNK = 8  # frames that a reader decodes ahead of what it hands out
BACKENDS = ("torchcodec", "pyav", "decord", "opencv")  # the order in which "auto" tries them
_PACKAGES = {"torchcodec": "torchcodec", "pyav": "av", "decord": "decord", "opencv": "opencv-python-headless"}


class Reader(Protocol):
    """An open file. Times are seconds on any clock; `read` subtracts the first frame's."""

    count: int
    nominal_fps: float  # what the header says; only used for a video of one frame, whose rate cannot be measured

    def times(self) -> Sequence[float]:
        """When each frame is shown, in order."""

    def walk(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames (H, W, 3) of ascending, distinct indices, one after the other; no more than CHUNK are held."""


class _TorchCodec:
    def __init__(self, path: Path) -> None:
        decoders = import_module("torchcodec.decoders")
        self.path = path
        self.decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC", seek_mode="exact")
        self.count = len(self.decoder)
        self.nominal_fps = float(self.decoder.metadata.average_fps_from_header or 0)

    def times(self) -> Sequence[float]:
        """torchcodec tells a frame's time only with its pixels, so the packets are listed by PyAV, which decodes nothing."""
        if missing("pyav") is None:
            packets = _Packets(self.path)
            if len(packets.pts) == self.count:
                return packets.seconds()
        found: list[float] = []
        for start in range(0, self.count, CHUNK):
            stop = min(start + CHUNK, self.count)
            found += self.decoder.get_frames_in_range(start, stop).pts_seconds.tolist()
        return found

    def walk(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for start in range(0, len(indices), CHUNK):
            yield from self.decoder.get_frames_at(indices=list(indices[start : start + CHUNK])).data.numpy()


class _Packets:
    """The display times of a file's frames, from its packets: read to the end, nothing decoded.

    `pts` is empty where packets do not say when they are shown, as in old containers and bare streams.
    """

    def __init__(self, path: Path) -> None:
        with _opened(path) as (container, stream):
            self.nominal_fps = float(stream.average_rate or 0)
            self.time_base = stream.time_base or Fraction(1)
            shown = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
        pts = [p for p, _ in shown]
        known = None not in pts and len(set(pts)) == len(pts)
        self.pts: list[int] = sorted(pts) if known else []
        self.keys: list[int] = sorted(p for p, is_key in shown if is_key) if known else []

    def seconds(self) -> list[float]:
        return [float(p * self.time_base) for p in self.pts]


class _PyAV:
    """Packets are listed first, without decoding: that counts the frames exactly and gives the keyframes to seek to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        packets = _Packets(path)
        self.nominal_fps, self.keys = packets.nominal_fps, packets.keys
        self.by_time = bool(packets.pts)
        if self.by_time:
            self.pts, self.time_base = packets.pts, packets.time_base
        else:  # no display times: count by decoding, and trust the nominal rate
            self.pts = list(range(sum(1 for _ in self._decoded())))
            self.time_base = Fraction(1 / self.nominal_fps if self.nominal_fps else 1)
        self.count = len(self.pts)

    def times(self) -> Sequence[float]:
        return [float(p * self.time_base) for p in self.pts]

    def walk(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for frame in self._sought(indices) if self.by_time else self._in_order(indices):
            yield _upright(frame)

    def _decoded(self) -> Iterator[Any]:
        with _opened(self.path) as (container, stream):
            yield from container.decode(stream)

    def _sought(self, indices: Sequence[int]) -> Iterator[Any]:
        """Decode forward, jumping to a keyframe where one lies between the last frame and the next wanted one."""
        with _opened(self.path) as (container, stream):
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
                yield frame

    def _in_order(self, indices: Sequence[int]) -> Iterator[Any]:
        wanted = set(indices)
        for number, frame in enumerate(self._decoded()):
            if number in wanted:
                yield frame
                if number == indices[-1]:
                    return


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    with import_module("av").open(str(path)) as container:
        streams = [stream for stream in container.streams.video if _kind(stream) == "video"]
        if not streams:
            raise RuntimeError("no video stream")
        stream = streams[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _upright(frame: Any) -> np.ndarray:
    """The pixels of a PyAV frame, turned as its file asks for; the other decoders turn theirs without being told."""
    quarters, rest = divmod(frame.rotation, 90)  # counter-clockwise
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    return pixels if rest else np.rot90(pixels, quarters)


class _Decord:
    """decord 0.6 is exact in containers with an index and no edit list. In others it returns wrong frames without a
    word, so those are refused here, whatever the file is called; an edit list, which `ffmpeg -ss ... -c copy` writes into
    an mp4, it ignores: it then counts the hidden frames before the cut too, and disagrees with every other backend."""

    suffixes = (".mp4", ".m4v", ".mov", ".mkv", ".webm")

    def __init__(self, path: Path) -> None:
        if not _is_indexed(path) and (path.suffix.lower() not in self.suffixes or _is_unindexed(path)):
            raise MediaError(
                f"decord places frames correctly only in {', '.join(self.suffixes)}, got {path}; pass another backend"
            )
        decord = import_module("decord")
        self.reader = decord.VideoReader(str(path), num_threads=1)
        self.count = len(self.reader)
        self.nominal_fps = float(self.reader.get_avg_fps())

    def times(self) -> Sequence[float]:
        return [float(t) for t in self.reader.get_frame_timestamp(range(self.count))[:, 0]]

    def walk(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for start in range(0, len(indices), CHUNK):
            yield from self.reader.get_batch(list(indices[start : start + CHUNK])).asnumpy()


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _is_indexed(path: Path) -> bool:
    """Whether a file is an MP4, MOV, Matroska or WebM by its first bytes."""
    head = _head(path)
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") or head[:4] == b"\x1a\x45\xdf\xa3"


def _is_unindexed(path: Path) -> bool:
    """Whether a file is an AVI, MPEG-TS, MPEG-PS or bare stream, ASF, Ogg or FLV by its first bytes."""
    starts = (b"RIFF", b"G", b"\x00\x00\x01", b"\x00\x00\x00\x01", b"0&\xb2u", b"OggS", b"FLV")
    return _head(path).startswith(starts)


class _OpenCV:
    """OpenCV's own frame count and seeking are estimates in some containers, so this reader walks the file instead."""

    def __init__(self, path: Path) -> None:
        self.cv2 = import_module("cv2")
        self.path = path
        capture = self._open()
        self.nominal_fps = float(capture.get(self.cv2.CAP_PROP_FPS))
        self.shown: list[float] = []
        while capture.grab():
            self.shown.append(capture.get(self.cv2.CAP_PROP_POS_MSEC) / 1000)
        capture.release()
        self.count = len(self.shown)
        if any(b <= a for a, b in zip(self.shown, self.shown[1:], strict=False)):  # the container stores no times
            self.shown = [number / (self.nominal_fps or 1) for number in range(self.count)]

    def _open(self) -> Any:
        capture = self.cv2.VideoCapture(str(self.path), self.cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise RuntimeError("the file could not be opened")
        return capture

    def times(self) -> Sequence[float]:
        return self.shown

    def walk(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        capture, wanted = self._open(), set(indices)
        try:
            for number in range(indices[-1] + 1):
                if not capture.grab():
                    raise _undecodable(self.path, number, self.count)
                if number in wanted:
                    ok, frame = capture.retrieve()
                    if not ok:
                        raise _undecodable(self.path, number, self.count)
                    yield self.cv2.cvtColor(frame, self.cv2.COLOR_BGR2RGB)
        finally:
            capture.release()


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
