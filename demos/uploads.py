"""Files that visitors bring: looked at before anything reads them.

A file must lie in the folder where Gradio puts uploads. Its size, its kind and its dimensions are bounded, and it must decode;
what it is called says nothing about what it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmeff.errors import MediaError

from .settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmeff.video_io import Video

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_TYPES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


class Uploads:
    """Checks files against the settings. `folders` are those a file may lie in: Gradio's uploads, and the demo's examples."""

    def __init__(self, settings: Settings, folders: tuple[str | os.PathLike[str], ...] = ()) -> None:
        self.settings = settings
        self.folders = folders

    def path(self, given: Any, what: str) -> Path | None:
        """The file that was given, as a path or as the mapping that Gradio's clients send; None for none.

        Raises: MediaError for one that is not an upload, is missing, empty or too large.
        """
        if given is None or given == "":
            return None
        if isinstance(given, Mapping):
            given = given.get("path")
        if not isinstance(given, str | os.PathLike):
            raise MediaError(f"{what} must be an uploaded file, got {type(given).__name__}")
        try:
            path = Path(given).resolve()
            inside = any(path.is_relative_to(Path(folder).resolve()) for folder in (upload_folder(), *self.folders))
            there = inside and path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            inside = there = False
        if not inside:
            raise MediaError(f"{what} must be a file that was uploaded here; this one is not")
        if not there:
            raise MediaError(f"{what} is no file any more; upload it again")
        size, most = path.stat().st_size, self.settings.max_upload_mb
        if size == 0:
            raise MediaError(f"{what} {path.name} is empty (0 bytes)")
        if size > most * 1_000_000:
            raise MediaError(f"{what} {path.name} must be at most {most:g} MB, got {size / 1_000_000:.1f} MB")
        return path

    def image(self, given: Any, what: str = "the image") -> Image | None:
        """The picture that was given, as RGB; None for none.

        Raises: MediaError as `path`, and for a file that is no picture, or one with too many pixels.
        """
        path = self.path(given, what)
        if path is None:
            return None
        from PIL import Image, UnidentifiedImageError

        from mmeff.video_io import read_image

        try:
            with Image.open(path, formats=IMAGE_FORMATS) as opened:  # reads the header only
                width, height = opened.size
        except UnidentifiedImageError as error:
            raise MediaError(
                f"{what} {path.name} is no picture of a kind that can be read here: {', '.join(IMAGE_FORMATS)}"
            ) from error
        except Image.DecompressionBombError as error:
            raise MediaError(f"{what} {path.name} has too many pixels") from error
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's plugins raise all of these for a broken header
            raise MediaError(f"{what} {path.name} cannot be read: its header is broken") from error
        self._pixels(width, height, f"{what} {path.name}")
        return read_image(path)

    def video(self, given: Any, what: str = "the video", *, num_frames: int | None = None, fps: float | None = None) -> Video | None:  # fmt: skip
        """Frames of the clip that was given, sampled as `mmeff.video_io.read` does; None for none.

        Raises: MediaError as `path`, and for a file that is no clip, too long or too large a one.
        """
        path = self.path(given, what)
        if path is None:
            return None
        from mmeff.video_io import read

        width, height, seconds = probe(path, f"{what} {path.name}")
        self._pixels(width, height, f"{what} {path.name}")
        if seconds > self.settings.max_upload_seconds:
            raise MediaError(
                f"{what} {path.name} must last at most {self.settings.max_upload_seconds:g} seconds, got {seconds:.1f}"
            )
        return read(path, num_frames=num_frames, fps=fps)

    def _pixels(self, width: int, height: int, what: str) -> None:
        if width * height > self.settings.max_upload_pixels:
            raise MediaError(
                f"{what} must have at most {self.settings.max_upload_pixels:,} pixels, got {width} x {height}"
            )


def probe(path: Path, what: str) -> tuple[int, int, float]:
    """Width, height and seconds of a clip, from its header.

    Raises: MediaError for a file without a video stream.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{what} holds no video")
            stream = container.streams.video[0]
            length = container.duration / 1_000_000 if container.duration else 0.0
            return stream.width, stream.height, length
    except MediaError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{what} is no clip that can be read here; try an mp4") from error


def upload_folder() -> str:
    """Where Gradio keeps what visitors send."""
    from gradio.utils import get_upload_folder

    return get_upload_folder()
