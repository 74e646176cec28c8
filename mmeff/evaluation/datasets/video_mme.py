"""Video-MME: 900 clips of 11 seconds to an hour, three questions with four options about each.

Two forms are published. On the Hugging Face hub (lmms-lab/Video-MME): `videomme/test-00000-of-00001.parquet` with the columns
video_id, duration, domain, sub_category, url, videoID, question_id, task_type, question, options ("A. Apples."), answer ("C");
clips as `data/<videoID>.mp4`, subtitles as `subtitle/<videoID>.srt`. In the authors' repository: a JSON list of clips with
video_id, duration_category, video_category, video_sub_category, url and a list of questions (question_id, task_type, question,
choices, answer); the clip is named by the id in its url.

Source: Fu et al., arXiv:2405.21075; github.com/BradyFU/Video-MME (README, "Dataset Content"); the hub's dataset card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmeff.evaluation.datasets.base import SampleList
from mmeff.evaluation.datasets.tables import (
    need_columns,
    odd_notes,
    only,
    published_letter,
    read_rows,
    the_file,
    the_folder,
)
from mmeff.evaluation.samples import Media, Sample, with_options

DURATIONS = ("short", "medium", "long")
COLUMNS = (
    "videoID", "duration", "domain", "sub_category", "question_id", "task_type", "question", "options", "answer",
)  # fmt: skip
_LETTER = re.compile(r"^\s*\(?[A-Z][.):]\s*")


def open_video_mme(
    path: Path,
    *,
    videos: str | os.PathLike[str] | None = None,
    durations: str | Sequence[str] | None = None,
    instruction: str | None = None,
) -> SampleList:
    """The questions of Video-MME; the category is the task type.

    Args:
        path: the folder of the dataset, or its annotation file. videos: the folder of the clips, where it lies elsewhere.
        durations: "short", "medium" or "long", or several; None for all. instruction: what follows the options.
    """
    root = path if path.is_dir() else path.parent
    file = the_file(path, ["videomme/*.parquet", "*.parquet", "*.json"], "annotations") if path.is_dir() else path
    rows = read_rows(file)
    if "questions" in rows[0]:
        rows = _flat(rows, str(file))
    need_columns(rows, COLUMNS, str(file))
    kept = only(durations, DURATIONS, "duration")
    clips = the_folder(root, ("data", "video", "videos"), videos, "videos")
    names = _names(clips)
    odd: list[str] = []
    samples = [_sample(row, clips, names, root, instruction, odd) for row in rows if row["duration"] in kept]
    return SampleList("Video-MME", samples, root=root, notes=odd_notes(odd, "Video-MME"))


def _flat(rows: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """A row for each question of the authors' JSON, with the columns of the hub's."""
    need_columns(rows, ["duration_category", "video_category", "video_sub_category", "url", "questions"], where)
    flat = []
    for clip in rows:
        shared = {
            "videoID": re.split(r"v=|/", clip["url"].rstrip("/"))[-1].split("&")[0],
            "duration": clip["duration_category"],
            "domain": clip["video_category"],
            "sub_category": clip["video_sub_category"],
        }
        flat += [{**shared, **q, "options": q.get("choices")} for q in clip["questions"]]
    return flat


def _names(clips: Path) -> dict[str, str]:
    """File names by what stands before the ending: some clips are .MP4 or .mkv."""
    found = sorted(clips.iterdir()) if clips.is_dir() else []
    return {file.stem: file.name for file in found if file.suffix.lower() in (".mp4", ".mkv", ".webm")}


def _sample(
    row: Mapping[str, Any], clips: Path, names: Mapping[str, str], root: Path, instruction: str | None, odd: list[str]
) -> Sample:
    options = tuple(_LETTER.sub("", str(text)) for text in row["options"])
    clip = str(row["videoID"])
    subtitles = f"subtitle/{clip}.srt"
    return Sample(
        id=str(row["question_id"]), task="ask", prompt=with_options(row["question"], options, instruction),
        answer=published_letter(row["answer"], options, str(row["question_id"]), odd), options=options,
        category=row["task_type"], media=(Media(path=str(clips / names.get(clip, f"{clip}.mp4"))),),
        meta={
            "question": row["question"], "duration": row["duration"], "domain": row["domain"],
            "sub_category": row["sub_category"], **({"subtitles": subtitles} if (root / subtitles).is_file() else {}),
        },
    )  # fmt: skip
