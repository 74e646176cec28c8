"""Read what the media of a sample name: a video file, a cut of it, a folder of frames, a picture, or something generated.

All of them come back as a `Video`, with the indices of the frames that were read, so that a result can say what the model saw.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmeff.errors import MediaError
from mmeff.evaluation.datasets.generated import draw
from mmeff.evaluation.samples import Media
from mmeff.video_io import SAME_TIME, Video, at_rate, read, read_image, spread

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_media(
    media: Media, *, num_frames: int | None = None, fps: float | None = None, backend: str = "auto"
) -> Video:
    """Read a picture or the wanted frames of a clip.

    Args:
        media: of a sample. A picture is one frame whatever the sampling says, so that one call serves samples that hold both.
        num_frames, fps, backend: which frames, and the decoder, as in `mmeff.video_io.read`; all frames when neither is given.
    Returns: a `Video`. `indices` count from the first frame of the file or folder, `timestamps` from its beginning, also for
        a cut. `backend` is "pillow" for pictures and folders of them, "generated" for what was drawn.
    Raises: MediaError for what cannot be read, with the reason; ValueError for a sampling that is out of range.
    """
    if num_frames is not None and fps is not None:
        raise ValueError("read_media takes one of num_frames and fps, got both; drop one")
    path = Path(media.path)
    if "://" in media.path:
        frames, native = draw(media.path)
        return _sampled(media, len(frames), native, num_frames, fps, lambda chosen: frames[chosen], "generated")
    if media.kind == "image":
        return _sampled(media, 1, 1.0, None, None, lambda _: np.asarray(read_image(path))[None], "pillow")
    if path.is_dir() and media.fps is not None:
        files = frame_files(path)
        return _sampled(
            media, len(files), media.fps, num_frames, fps, lambda chosen: _stacked([files[i] for i in chosen]), "pillow"
        )
    return read(path, num_frames=num_frames, fps=fps, start=media.start, end=media.end, backend=backend)


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder of frames, in the order of the numbers in their names.

    Raises: MediaError where it holds none.
    """
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES]
    if not files:
        raise MediaError(f"{folder} is a folder without frames; it should hold {', '.join(PICTURES)} files")
    return sorted(files, key=lambda file: [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", file.name)])


def _sampled(
    media: Media, count: int, native: float, num_frames: int | None, fps: float | None,
    get: Callable[[list[int]], np.ndarray], backend: str,
) -> Video:  # fmt: skip
    """A clip of `count` frames at a steady rate, cut and sampled as `mmeff.video_io.read` does it."""
    times = np.arange(count) / native
    first = 0 if media.start is None else int((media.start + SAME_TIME) * native)
    if first >= count:
        raise MediaError(
            f"the cut from {media.start:g} s on lies behind the last frame of {media.path}, shown at {times[-1]:g} s"
        )
    last = count if media.end is None else max(bisect_left(times, media.end - SAME_TIME), first + 1)
    if num_frames is not None:
        chosen = [first + i for i in spread(last - first, num_frames)]
    elif fps is not None:
        chosen = [first + i for i in at_rate(last - first, native, fps)]
    else:
        chosen = list(range(first, last))
    return Video(
        frames=get(chosen),
        timestamps=times[chosen],
        indices=np.asarray(chosen),
        fps=native,
        backend=backend,
        path=media.path,
    )


def _stacked(files: list[Path]) -> np.ndarray:
    frames = [np.asarray(read_image(file)) for file in files]
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        sizes = " and ".join(f"{w}x{h}" for h, w, _ in sorted(shapes))
        raise MediaError(f"the frames in {files[0].parent} must all have one size, got {sizes}")
    return np.stack(frames)
