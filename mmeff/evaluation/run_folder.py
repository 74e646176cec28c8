"""The output folder of a run: checked before any work, and never mistaken for complete when it is not.

    run = RunFolder(out)                  # fails here if the folder cannot be used
    run.write_video("dense.mp4", frames)  # every file appears whole or not at all
    run.finish({"psnr": score})           # report.json last: a folder that holds it is complete

Until `finish`, the folder holds a file named INCOMPLETE.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from mmeff.video_io import replacing
from mmeff.video_io import write as write_video

if TYPE_CHECKING:
    from PIL.Image import Image

MARKER = "INCOMPLETE"
REPORT = "report.json"
_LEFTOVER = re.compile(r"\..+\.\d+\.partial(\.\w+)?")  # the temporary names of video_io.replacing
_MARKER_TEXT = (
    "This run has not finished: it is still going, or it was interrupted. Its files are whole, but some are missing.\n"
    f"{REPORT} is written last; this file goes away with it. Running into this folder again continues here.\n"
)


class RunFolder:
    """A folder that one run writes into.

    Args:
        out: the folder; made with its parents if it does not exist. Files that are no part of a run are left alone.
        overwrite: take a folder that holds a finished run, and delete the files that its report.json lists.

    Attributes: `path` the folder; `resumed` whether an interrupted run was found here. Its files are kept: skip what
        `has` says is done, or write it again.
    Raises:
        FileExistsError: the folder holds a finished run and `overwrite` is False.
        NotADirectoryError, PermissionError: `out` or a parent of it is a file, or cannot be written to.

    One run at a time: two processes must not write into one folder.
    """

    def __init__(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(out)
        self._files: set[str] = set()
        self._finished = False
        self._make()
        self.resumed = (self.path / MARKER).exists()
        complete = (self.path / REPORT).exists() and not self.resumed
        if complete and not overwrite:
            raise FileExistsError(
                f"{self.path} holds a finished run ({REPORT}); pass overwrite=True to replace it, or another folder"
            )
        # the marker goes first: a crash while the old run is deleted leaves an incomplete folder, not a mixed one
        self.write_text(MARKER, _MARKER_TEXT)
        self._files.discard(MARKER)
        for leftover in self.path.rglob(".*.partial*"):  # what a killed run was writing
            if _LEFTOVER.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)
        if (self.path / REPORT).exists():
            self._delete_old_run()

    def _make(self) -> None:
        blocking = next((p for p in (self.path, *self.path.parents) if p.exists() and not p.is_dir()), None)
        if blocking is not None:
            raise NotADirectoryError(f"cannot use {self.path} as output folder: {blocking} is a file")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(f"cannot make the output folder {self.path}: {error.strerror}") from error

    def _delete_old_run(self) -> None:
        report = self.path / REPORT
        try:
            listed = list(json.loads(report.read_text("utf-8"))["files"])
        except (ValueError, KeyError, TypeError):  # not written by this class, or damaged: only the report itself goes
            listed = []
        for name in listed:
            if isinstance(name, str) and _is_inside(name):  # an edited list must not reach out of the folder
                (self.path / name).unlink(missing_ok=True)
        report.unlink()

    def has(self, name: str) -> bool:
        """Whether a file of that name is here, which means that it is whole. It then counts as part of this run."""
        path = self._where(name)
        found = path.is_file()
        if found:
            self._files.add(path.relative_to(self.path).as_posix())
        return found

    def file(self, name: str) -> Path:
        """The path of a file that someone else will write, with its folder made. It is listed as part of the run."""
        path = self._where(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.add(path.relative_to(self.path).as_posix())
        return path

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file, whole or not at all. `name` may hold folders, as in "videos/dense.mp4"."""
        path = self.file(name)
        with replacing(path) as partial, partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write UTF-8 text."""
        return self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write indented JSON of anything that `to_plain` takes."""
        return self.write_text(name, json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_image(self, name: str, image: Image) -> Path:
        """Write an image in the format that the suffix of `name` says."""
        path = self.file(name)
        dpi = image.info.get("dpi")
        with replacing(path) as partial:
            image.save(partial, **({"dpi": dpi} if dpi else {}))
        return path

    def write_video(self, name: str, frames: Any, fps: float = 8) -> Path:
        """Write a video with `mmeff.video_io.write`."""
        return write_video(self.file(name), frames, fps)

    def finish(self, report: Mapping[str, Any]) -> Path:
        """Write report.json, with the list of the run's files added as `files`, and remove the marker.

        Args: report: anything that `to_plain` takes; it must not have a key "files".
        Returns: the path of report.json.
        Raises: ValueError for a key "files"; RuntimeError when called twice.
        """
        if self._finished:
            raise RuntimeError(f"the run in {self.path} is finished already")
        if "files" in report:
            raise ValueError('the report must not have a key "files": that is where the run lists what it wrote')
        path = self.write_json(REPORT, {**report, "files": sorted(self._files - {REPORT})})
        (self.path / MARKER).unlink(missing_ok=True)
        self._finished = True
        return path

    def _where(self, name: str) -> Path:
        if not _is_inside(name):
            raise ValueError(f"a file of a run needs a relative name inside its folder, got {name!r}")
        return self.path / name

    def __repr__(self) -> str:
        return f"<RunFolder {self.path}: {'finished' if self._finished else 'incomplete'}, {len(self._files)} files>"


def is_finished(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a run that ended well."""
    folder = Path(folder)
    return (folder / REPORT).is_file() and not (folder / MARKER).exists()


def to_plain(value: Any, where: str = "report") -> Any:
    """Return `value` as plain JSON types.

    Takes what json takes, and objects with `to_dict`, dataclasses, numpy and torch arrays and scalars, paths, tuples
    and sets. JSON has no NaN and no infinity: both become null, so write a flag beside a value that may be infinite,
    as `metrics.Score.to_dict` does. Keys become strings.

    Raises: TypeError naming the place of a value of any other type.
    """
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_dict"):
        return to_plain(value.to_dict(), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [to_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy and torch, arrays and scalars
        return to_plain(value.tolist(), where)
    raise TypeError(f"{where} must be plain data to be written as JSON, got {type(value).__name__}")


def _is_inside(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(pure.name) and not pure.is_absolute() and ".." not in pure.parts
