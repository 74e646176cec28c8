"""Reading and writing of videos and images: the same frames from every decoder, and files that are whole or absent.

`read` chooses the frame indices itself, so that torchcodec, PyAV, decord and OpenCV are asked for the same frames;
decoders' own samplers disagree. `stream` hands out the frames of an hour-long clip a few at a time. Nothing here is loaded
before it is used: importing this module costs no codec library.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmeff.errors import BackendUnavailable, MediaError
from mmeff.video_readers import BACKENDS, Reader, choose, diagnose, first_line, missing

if TYPE_CHECKING:
    from PIL.Image import Image

CONTAINERS = (".mp4", ".mov", ".mkv")  # what H.264 goes into
MOST_BYTES = 4 * 2**30  # that `read` returns; more is a job for `stream`
SAME_TIME = 6e-4  # seconds; containers round display times to a millisecond


@dataclass(frozen=True, eq=False, kw_only=True)
class Video:
    """Frames of one video file, and which frames they are.

    Fields: `frames` uint8 (T, H, W, 3), RGB; `timestamps` float64 (T,), seconds since the first frame of the file;
    `indices` int64 (T,), positions in the file in display order; `fps` mean frames per second of the whole file, not of
    the sample; `backend` which decoder ran; `path` the file.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    fps: float
    backend: str
    path: str

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        T, H, W, _ = self.frames.shape
        return f"<Video {self.path}: {T} frames {W}x{H}, file at {self.fps:g} fps, read by {self.backend}>"


# ---------------------------------------------------------------- reading


def read(
    path: str | os.PathLike[str],
    *,
    indices: Sequence[int] | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
) -> Video:
    """Read some frames of a video; all of them when no sampling is given.

    Args:
        path: a video file.
        indices: frames to read, in this order, repeats allowed; 0 is the first frame shown.
        num_frames: that many frames, spread evenly from the first to the last: see `spread`.
        fps: frames per second to read: see `at_rate`, and `at_times` for a file whose own rate varies.
        start, end: seconds since the first frame; only what is shown from `start` to just before `end` is sampled. None is
            the beginning, or the end. Times are the file's own, so a cut is exact where the rate varies.
        backend: "torchcodec", "pyav", "decord", "opencv", or "auto" for the first of these that is usable here. A named
            backend never falls back, and "auto" never tries a second one on a file that the first cannot read.
    Returns: a `Video`, upright by its display matrix. The pixels of equal indices are the same over backends.
    Raises:
        MediaError: the file is missing, empty, a folder, not decodable, or has no video in it; an index lies outside
            it, or `start` behind its last frame; the frames would take more than 4 GiB.
        BackendUnavailable: the named backend is not installed, or none is.
        ValueError: more than one way of sampling, or a value out of range.
    Numerics: rates are compared as fractions with denominators up to 1001, so that rounding errors move no sample.
    """
    if indices is not None and (start is not None or end is not None):
        raise ValueError("indices count from the first frame of the file and go with no start or end; drop one of them")
    given = {"indices": indices, "num_frames": num_frames, "fps": fps}
    opened = _Opened(path, backend, given, start, end)
    distinct = sorted(set(opened.chosen))
    frames: np.ndarray | None = None
    for number, frame in enumerate(opened.walk(distinct)):
        if frames is None:
            total = frame.nbytes * len(distinct)
            if total > MOST_BYTES:
                raise MediaError(
                    f"{len(distinct)} frames of {opened.path} take {total / 2**30:.1f} GiB, and at most "
                    f"{MOST_BYTES / 2**30:g} GiB are read at once; pass num_frames or fps, or use mmeff.video_io.stream"
                )
            frames = np.empty((len(distinct), *frame.shape), np.uint8)
        frames[number] = frame
    assert frames is not None  # `distinct` is never empty
    where = np.searchsorted(distinct, opened.chosen)
    return opened.video(frames if np.array_equal(where, np.arange(len(frames))) else frames[where], opened.chosen)


def stream(
    path: str | os.PathLike[str],
    *,
    chunk: int = 16,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
) -> Iterator[Video]:
    """Read a video piece by piece: an hour-long clip in the memory of `chunk` frames and a few that are being decoded.

    Args:
        chunk: frames per piece; the last piece may have fewer.
        num_frames, fps, start, end, backend: which frames, as in `read`; all of them when none is given. With more
            `num_frames` than there are, repeats are left out.
    Returns: `Video`s of consecutive chosen frames. The file is opened, and arguments are checked, when the first is taken.
    Raises: what `read` raises, except that no amount of frames is too much.
    """
    _positive("chunk", chunk, whole=True)
    opened = _Opened(path, backend, {"num_frames": num_frames, "fps": fps}, start, end)
    distinct = sorted(set(opened.chosen))
    frames = np.empty(0, np.uint8)
    for number, frame in enumerate(opened.walk(distinct)):
        place = number % chunk
        if place == 0:
            frames = np.empty((min(chunk, len(distinct) - number), *frame.shape), np.uint8)
        frames[place] = frame
        if place == len(frames) - 1:
            yield opened.video(frames, distinct[number - place : number + 1])


class _Opened:
    """A video whose frames are chosen. What the decoders raise becomes a MediaError that says what is wrong with the file."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        backend: str,
        sampling: dict[str, Any],
        start: float | None,
        end: float | None,
    ) -> None:
        _check_sampling(sampling, start, end)
        self.path = _existing_file(path, "video")
        self.backend, open_reader = choose(backend)
        with self._explained():
            self.reader: Reader = open_reader(self.path)
            if self.reader.count < 1:
                raise MediaError(f"{self.path} holds no decodable frame; it is truncated or corrupt")
            times = np.asarray(self.reader.times(), dtype=np.float64)
            self.times = times - times[0]
            count, length = len(times), float(self.times[-1])
            self.rate = (count - 1) / length if length > 0 else self.reader.nominal_fps
            self.chosen = self._choose(sampling, start, end)

    def _choose(self, sampling: dict[str, Any], start: float | None, end: float | None) -> list[int]:
        count = len(self.times)
        if sampling.get("indices") is not None:
            return _checked(sampling["indices"], count, self.path)
        first, last = _cut(self.times, start, end, self.path)
        if sampling["num_frames"] is not None:
            return [first + i for i in spread(last - first, sampling["num_frames"])]
        if sampling["fps"] is None:
            return list(range(first, last))
        even = np.arange(count) / self.rate if self.rate > 0 else self.times
        if np.abs(self.times - even).max() <= 2 * SAME_TIME:  # both ends of a time are rounded
            chosen = at_rate(last - first, self.rate or 1, sampling["fps"])
        else:
            chosen = at_times(self.times[first:last], sampling["fps"])
        return [first + i for i in chosen]

    def walk(self, indices: list[int]) -> Iterator[np.ndarray]:
        shape = None
        with self._explained():
            for number, frame in enumerate(self.reader.walk(indices)):
                if shape is not None and frame.shape != shape:
                    raise MediaError(
                        f"frame {indices[number]} of {self.path} is {frame.shape[1]}x{frame.shape[0]} and those before it are "
                        f"{shape[1]}x{shape[0]}; a clip whose size changes cannot be read"
                    )
                shape = frame.shape
                yield frame

    def video(self, frames: np.ndarray, indices: list[int]) -> Video:
        chosen = np.asarray(indices, dtype=np.int64)
        return Video(
            frames=frames,
            timestamps=self.times[chosen],
            indices=chosen,
            fps=float(self.rate),
            backend=self.backend,
            path=str(self.path),
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (MediaError, BackendUnavailable):
            raise
        except Exception as error:  # every decoder has its own error types, some none at all; the cause stays attached
            raise MediaError(
                f"{self.path} cannot be read: {diagnose(self.path, self.backend)} ({self.backend} says: {first_line(error)})"
            ) from error


def _check_sampling(sampling: dict[str, Any], start: float | None, end: float | None) -> None:
    given = [name for name, v in sampling.items() if v is not None]
    if len(given) > 1:
        raise ValueError(f"read takes one of indices, num_frames and fps, got {' and '.join(given)}; drop all but one")
    if sampling.get("indices") is not None and len(sampling["indices"]) == 0:
        raise ValueError("indices must name at least one frame, got none; leave it out to read all frames")
    if sampling["num_frames"] is not None:
        _positive("num_frames", sampling["num_frames"], whole=True)
    if sampling["fps"] is not None:
        _positive("fps", sampling["fps"])
    for name, value in (("start", start), ("end", end)):
        if value is not None and value != 0:
            _positive(name, value)
    if end is not None and end <= (start or 0):
        raise ValueError(f"end must lie after start, got start={start or 0:g} and end={end:g} seconds")


def _cut(times: np.ndarray, start: float | None, end: float | None, path: Path) -> tuple[int, int]:
    """The first frame of a cut, which is the one that is being shown at `start`, and the one after its last."""
    length = float(times[-1])
    lasts = length / (len(times) - 1) if len(times) > 1 else 0.0  # how long the last frame is shown is not stored
    if start is not None and start > length + lasts:
        raise MediaError(
            f"the cut from {start:g} s on lies behind the last frame of {path}, which is shown at {length:g} s"
        )
    first = 0 if start is None else max(bisect_right(times, start + SAME_TIME) - 1, 0)
    last = len(times) if end is None else max(bisect_left(times, end - SAME_TIME), first + 1)
    return first, last


def spread(count: int, num_frames: int) -> list[int]:
    """Return `num_frames` indices spread evenly over `count` frames: i * (count - 1) // (num_frames - 1).

    The first and the last frame are always there, as in `numpy.linspace(0, count - 1, num_frames, dtype=int)`, in exact
    integers. A single frame is the middle one. Asking for more frames than there are repeats some.
    """
    if num_frames == 1:
        return [(count - 1) // 2]
    return [i * (count - 1) // (num_frames - 1) for i in range(num_frames)]


def at_rate(count: int, native_fps: float, fps: float) -> list[int]:
    """Return the indices of `count` frames at `native_fps` that are shown at times 0, 1/fps, 2/fps, ...

    Frame i is taken to be shown from i / native_fps on, with the mean rate of the file; where the rate varies, the
    timestamps of `Video` tell the true times. At or above the native rate every frame is returned once.
    """
    step = _rate(native_fps) / _rate(fps)
    if step <= 1:
        return list(range(count))
    return [int(k * step) for k in range(math.ceil(count / step))]


def at_times(times: Sequence[float], fps: float) -> list[int]:
    """Return the indices of frames shown at times 0, 1/fps, 2/fps, ... after the first, where the rate varies.

    Args: times: seconds at which each frame begins to be shown, in order; a frame is shown until the next one begins, and
        the last one for as long as the mean frame.
    Returns: ascending indices; a frame that several of the times fall on is there once.
    """
    since = np.asarray(times, dtype=np.float64) - times[0] - SAME_TIME
    mean = (times[-1] - times[0]) / max(len(times) - 1, 1)
    until = np.append(since[1:], since[-1] + mean)
    earliest = np.maximum(np.ceil(since * fps), 0) / fps  # the first of the times that is not before the frame
    shown = earliest < until
    shown[0] = True  # also where one frame is all there is
    return [int(i) for i in np.flatnonzero(shown)]


def _rate(fps: float) -> Fraction:
    """The fraction nearest to a float rate, so that its rounding error can never move a sample by a frame."""
    value = float(fps)
    if 0 < value < 1:  # frames that last several seconds: round the duration
        return 1 / Fraction(1 / value).limit_denominator(1001)
    return Fraction(value).limit_denominator(1001)  # 1001: the denominator of the NTSC rates


def backends() -> dict[str, str | None]:
    """Return every backend with None where it is usable here, else the reason why it is not."""
    return {name: missing(name) for name in BACKENDS}


def _existing_file(path: str | os.PathLike[str], kind: str) -> Path:
    path = Path(path)
    if path.is_dir():
        raise MediaError(f"{path} is a folder, not {'an image' if kind == 'image' else 'a video'}; pass one file of it")
    if not path.is_file():
        if path.is_symlink():
            raise MediaError(f"{path} is a symbolic link that leads to no file; it is broken, or runs in a circle")
        if path.exists():  # a pipe or a device would be waited for
            raise MediaError(
                f"{path} is neither a file nor a link to one; pass {'an image' if kind == 'image' else 'a video'}"
            )
        folder = path.absolute().parent
        raise MediaError(f"{path} does not exist" + ("" if folder.is_dir() else f", nor does its folder {folder}"))
    if not os.access(path, os.R_OK):
        raise MediaError(f"{path} may not be read by this user; change its permissions")
    if path.stat().st_size == 0:
        raise MediaError(f"{path} is empty (0 bytes); it was probably never written to the end")
    return path


def _checked(indices: Sequence[int], count: int, path: Path) -> list[int]:
    chosen = [int(i) for i in indices]
    outside = [i for i in chosen if not 0 <= i < count]
    if outside:
        raise MediaError(
            f"indices must be in [0, {count - 1}] for the {count} frames of {path}, got {outside[0]}"
            + (f" and {len(outside) - 1} more outside" if len(outside) > 1 else "")
        )
    return chosen


def _positive(name: str, value: float, *, whole: bool = False) -> None:
    ok = isinstance(value, int | np.integer) if whole else isinstance(value, int | float | np.number | Fraction)
    if not ok or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive {'integer' if whole else 'number'}, got {value!r}")


def read_image(path: str | os.PathLike[str]) -> Image:
    """Read an image as RGB, upright by its EXIF orientation; of an animation, the first frame.

    Args: path: an image file of any format that Pillow knows.
    Returns: a loaded `PIL.Image.Image` of mode RGB; transparency is dropped.
    Raises: MediaError for a file that is missing, empty, a folder, corrupt or truncated.
    """
    from PIL import Image, ImageOps

    path = _existing_file(path, "image")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and their own
        raise MediaError(f"{path} cannot be read as an image: {first_line(error)}") from error


# ---------------------------------------------------------------- writing


def write(path: str | os.PathLike[str], frames: Any, fps: float = 8, *, crf: int = 12) -> Path:
    """Write an H.264 video (yuv420p, BT.601) that browsers play. Needs PyAV.

    Args:
        path: ends in .mp4, .mov or .mkv; its folder must exist. An existing file is replaced.
        frames: uint8 or float [0, 1] (T, H, W, 3) RGB, an array, a tensor or a list of arrays; or a list of PIL images.
        fps: frames per second; crf: x264's quality, 0 (lossless) to 51 (worst). 12 is visually lossless.
    Returns: the path. The file appears under it only when it is complete.
    Raises:
        ValueError: wrong shape, dtype, range or suffix. OSError: a folder that is missing or cannot be written to.
        BackendUnavailable: PyAV is not installed.
    Numerics: yuv420p needs even sides, so an odd width or height gets one more column or row, a copy of the last one;
        nothing is rescaled. Chroma is kept at half resolution, so coloured edges of one pixel soften.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise ValueError(f"path must end in {', '.join(CONTAINERS)} to hold H.264, got {path.name!r}")
    _positive("fps", fps)
    if not 0 <= crf <= 51:
        raise ValueError(f"crf must be in [0, 51], got {crf}")
    video = to_uint8(frames)
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    try:
        av = import_module("av")
    except ImportError as error:
        raise BackendUnavailable("writing a video needs PyAV, which is not installed; pip install av") from error
    with replacing(path) as partial_path, av.open(str(partial_path), "w") as container:
        # x264 would make several threads for each clip; these clips are small, and workers share the cores
        options = {"crf": str(crf), "preset": "medium", "threads": "2"}
        stream = container.add_stream("libx264", rate=_rate(fps), options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # BT.601, and said so: readers that ignore the tag assume it
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1
        for image in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU601")))
        container.mux(stream.encode())
    return path


def to_uint8(frames: Any) -> np.ndarray:
    """Return frames as uint8 (T, H, W, 3).

    Args: frames: uint8 or float [0, 1], (T, H, W, 3); an array, a tensor, a list of arrays, or a list of PIL images.
    Raises: ValueError for other shapes, no frames, values outside [0, 1], NaN; TypeError for other dtypes.
    Numerics: floats are rounded to nearest; up to 0.01 outside [0, 1] is clipped, as decoders overshoot that much.
    """
    video = _as_array(frames)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        hint = ""
        if video.ndim == 4 and 3 in video.shape[1:3]:
            hint = "; move the channels last"
        elif video.ndim == 5:
            hint = "; pass one video of the batch"
        elif video.ndim == 3:
            hint = "; a single image is frames[None]"
        raise ValueError(f"frames must be (T, H, W, 3) with at least one frame, got {video.shape}{hint}")
    if video.dtype == np.uint8:
        return video
    if not np.issubdtype(video.dtype, np.floating):
        raise TypeError(f"frames must be uint8 in [0, 255] or float in [0, 1], got {video.dtype}")
    low, high = float(video.min()), float(video.max())
    if not (low >= -0.01 and high <= 1.01):  # NaN fails both
        raise ValueError(f"float frames must be finite and in [0, 1], got values in [{low:.4g}, {high:.4g}]")
    return (video.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _as_array(frames: Any) -> np.ndarray:
    if hasattr(frames, "detach"):  # a tensor; numpy knows no bfloat16
        frames = frames.detach().cpu()
        return np.asarray(frames.float() if frames.is_floating_point() else frames)
    if isinstance(frames, list | tuple):
        items = [np.asarray(f.convert("RGB")) if hasattr(f, "convert") else _as_array(f) for f in frames]
        shapes = {item.shape for item in items}
        if len(shapes) > 1:
            raise ValueError(f"frames must all have one shape, got {' and '.join(map(str, sorted(shapes)))}")
        return np.stack(items) if items else np.zeros((0, 0, 0, 3), np.uint8)
    return np.asarray(frames)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends well, delete it when it does not.

    Raises: FileNotFoundError, NotADirectoryError, IsADirectoryError or PermissionError naming `path`, before the block.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        kind = NotADirectoryError if folder.exists() else FileNotFoundError
        what = "is not a folder" if folder.exists() else "does not exist; create it first"
        raise kind(f"cannot write {path}: {folder} {what}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")  # the suffix names the container
    try:
        temporary.touch()
    except OSError as error:
        raise PermissionError(f"cannot write {path}: the folder {folder} is not writable ({error.strerror})") from error
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
