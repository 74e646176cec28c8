"""LongVideoBench: questions that refer to a moment of a clip of up to an hour, with up to five options.

`lvb_val.json` is a list of {id, video_id, video_path, question, question_wo_referring_query, candidates, correct_choice,
position, topic_category, question_category, level, duration_group, duration, subtitle_path, starting_timestamp_for_subtitles,
view_count}; `lvb_test_wo_gt.json` is the same without correct_choice. Clips lie in `videos/`, subtitles in `subtitles/`. The
Parquet form of the hub spells the options option0 to option4, "N/A" where there are fewer.

Source: Wu et al., NeurIPS 2024, arXiv:2407.15754; github.com/longvideobench/LongVideoBench,
longvideobench/longvideobench_dataset.py; the hub's longvideobench/LongVideoBench.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmeff.errors import suggest
from mmeff.evaluation.datasets.base import SampleList, plain
from mmeff.evaluation.datasets.tables import need_columns, read_rows, the_file, the_folder
from mmeff.evaluation.samples import LETTERS, Media, Sample, with_options

SPLITS: dict[str, tuple[str, ...]] = {
    "val": ("lvb_val.json", "validation-*.parquet", "data/validation-*.parquet"),
    "test": ("lvb_test_wo_gt.json", "test-*.parquet", "data/test-*.parquet"),
}
KEPT = (
    "duration_group", "topic_category", "level", "duration", "position", "starting_timestamp_for_subtitles", "video_id",
)  # fmt: skip


def open_longvideobench(
    path: Path, *, split: str = "val", videos: str | os.PathLike[str] | None = None, instruction: str | None = None
) -> SampleList:
    """The questions of a split; the category is the question category, the duration group is in `meta`.

    Args:
        split: "val", or "test", whose answers are held back. videos: the folder of the clips, where it lies elsewhere.
        instruction: what follows the options.
    """
    if split not in SPLITS:
        raise ValueError(f"split of LongVideoBench must be val or test, got {split!r}.{suggest(split, SPLITS)}")
    file = the_file(path, SPLITS[split], f"annotations of the split {split}") if path.is_dir() else path
    root = path if path.is_dir() else path.parent
    rows = read_rows(file)
    required: list[str | tuple[str, ...]] = [
        "id",
        "video_path",
        "question",
        ("candidates", "option0"),
        "question_category",
    ]
    need_columns(rows, [*required, "correct_choice"] if split == "val" else required, str(file))
    clips = the_folder(root, ("videos", "video"), videos, "videos")
    return SampleList(
        f"LongVideoBench {split}", [_sample(row, clips, instruction, str(file)) for row in rows], root=root
    )


def _sample(row: Mapping[str, Any], clips: Path, instruction: str | None, where: str) -> Sample:
    listed = row.get("candidates")
    if listed is None:
        listed = [row.get(f"option{i}") for i in range(5)]
    options = tuple(str(text) for text in listed if text not in (None, "N/A"))
    right = row.get("correct_choice")
    if right is not None and not (isinstance(right, int) and -1 <= right < len(options)):
        raise ValueError(
            f"correct_choice of {where}, {row['id']} must be in [0, {len(options) - 1}], or -1 where it is held back, got "
            f"{right!r}"
        )
    meta = {"question": row["question"], **{k: plain(row[k]) for k in KEPT if row.get(k) is not None}}
    if row.get("subtitle_path"):
        meta["subtitles"] = f"subtitles/{row['subtitle_path']}"
    return Sample(
        id=str(row["id"]), task="ask", prompt=with_options(row["question"], options, instruction),
        answer=None if right in (None, -1) else LETTERS[right], options=options, category=row["question_category"],
        media=(Media(path=str(clips / row["video_path"])),), meta=meta,
    )  # fmt: skip
