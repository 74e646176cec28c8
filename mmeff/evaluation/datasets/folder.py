"""A folder of clips and pictures, each asked the same question.

Whatever has the name of a clip or a picture is a sample, also what will turn out to be none: a truncated file, a text file
called a.mp4, a folder called b.mp4, a link in a circle. Their units fail with the reason, and nobody wonders where they went.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mmeff.evaluation.datasets.base import SampleList
from mmeff.evaluation.media import PICTURES
from mmeff.evaluation.samples import Media, Sample

CLIPS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".gif")
QUESTION = "Describe what happens."


def open_folder(path: Path, *, question: str = QUESTION) -> SampleList:
    """Every clip and picture in a folder and the folders in it, in the order of their names; the id is the place in it.

    Args: question: what each is asked; there are no answers to compare with.
    Raises: NotADirectoryError; ValueError for an empty question or a folder without clips and pictures.
    """
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is no folder; pass a folder of clips, or name another layout")
    if not question.strip():
        raise ValueError("question must not be empty; say what to ask about each clip")
    samples, others = [], []
    for place in sorted(_walk(path)):
        suffix = place.suffix.lower()
        if suffix not in (*CLIPS, *PICTURES):
            others.append(place)
            continue
        name = place.relative_to(path).as_posix()
        media = Media(path=str(place), kind="image" if suffix in PICTURES else "video")
        samples.append(Sample(id=name, task="ask", prompt=question, category=os.path.dirname(name), media=(media,)))
    if not samples:
        raise ValueError(f"{path} holds no clip and no picture; known endings are {', '.join((*CLIPS, *PICTURES))}")
    notes = [f"{len(others)} files in {path} were left out by their ending, {others[0].name} for one"] if others else []
    return SampleList(f"folder {path.name}", samples, root=path, notes=notes)


def _walk(path: Path) -> Iterator[Path]:
    """Files of a folder and those in it, without following links; a folder named like a clip counts as one."""
    for place in path.iterdir():
        if place.is_dir() and not place.is_symlink() and place.suffix.lower() not in CLIPS:
            yield from _walk(place)
        elif not place.name.startswith("."):
            yield place
