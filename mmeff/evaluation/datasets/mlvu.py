"""MLVU: nine tasks about clips of three minutes to two hours; seven with options, two with open answers.

`json/<n>_<task>.json` (1_plotQA to 9_summary) is a list of {video, duration, question, candidates, answer, question_type}; the
clips of a task lie in `video/<n>_<task>/`. Sub-scene captioning and summary have no candidates; the former has
`scoring_points`. A row without a question, of which the published files have one, is left out. The test set (MLVU_Test) is
`test-ground-truth/test_mcq_gt.json`, a list with `question_id` besides, or `test_multi_choice_tasks.json` without answers, and
one folder `video/`.

Source: Zhou et al., CVPR 2025, arXiv:2406.04264; github.com/JUNJIE99/MLVU and github.com/FlagOpen/FlagEmbedding, MLVU/ (data
and multiple_choice_evaluation/choice_bench.py); the hub's MLVU/MVLU and MLVU/MLVU_Test.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmeff.errors import suggest
from mmeff.evaluation.datasets.base import SampleList
from mmeff.evaluation.datasets.tables import (
    need_columns,
    odd_notes,
    only,
    published_letter,
    read_rows,
    rest,
    the_file,
    the_folder,
)
from mmeff.evaluation.samples import Media, Sample, with_options

TASKS = (
    "1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning", "8_sub_scene", "9_summary",
)  # fmt: skip
TEST = (
    "test-ground-truth/test_mcq_gt.json", "test_mcq_gt.json", "test_multi_choice_tasks.json", "test_question.json",
)  # fmt: skip
USED = ("video", "question", "candidates", "answer", "question_type", "question_id")


def open_mlvu(
    path: Path,
    *,
    split: str = "dev",
    tasks: str | Sequence[str] | None = None,
    videos: str | os.PathLike[str] | None = None,
    instruction: str | None = None,
) -> SampleList:
    """The questions of MLVU; the category is the question type.

    Args:
        split: "dev", or "test".
        tasks: of the dev split, such as "5_order" or "order"; None for all that have annotations.
        videos: the folder `video/`, where it lies elsewhere. instruction: what follows the options.
    """
    if split not in ("dev", "test"):
        raise ValueError(f"split of MLVU must be dev or test, got {split!r}.{suggest(split, ('dev', 'test'))}")
    root = next((p for p in (path / "MLVU", path / "MLVU_Test") if p.is_dir()), path)
    clips = the_folder(root, ("video", "videos"), videos, "videos")
    odd: list[str] = []
    if split == "test":
        if tasks is not None:
            raise ValueError("the test split of MLVU is one file for all tasks; leave tasks out")
        file = the_file(path, [*TEST, *(f"MLVU_Test/{name}" for name in TEST)], "annotations of the test split")
        rows = read_rows(file)
        need_columns(rows, ["question_id", "video", "question", "candidates", "question_type"], str(file))
        found = [_sample(str(row["question_id"]), row, clips / row["video"], instruction, odd) for row in rows]
        return SampleList("MLVU test", found, root=path, notes=odd_notes(odd, "MLVU test"))
    annotations = the_folder(root, ("json", "data", "upload_json"), None, "annotations")
    there = [task for task in TASKS if (annotations / f"{task}.json").is_file()]
    if not there:
        raise FileNotFoundError(f"{path} holds no MLVU annotations; expected json/{TASKS[0]}.json and others")
    samples = []
    for task in only(_numbered(tasks), there, "MLVU task"):
        file = annotations / f"{task}.json"
        rows = read_rows(file)
        need_columns(rows, ["video", "question", "answer", "question_type"], str(file), empty=["answer", "question"])
        folder = the_folder(clips, (task, task.partition("_")[2]), None, "videos")
        samples += [
            _sample(f"{task}-{n:04}", row, folder / row["video"], instruction, odd)
            for n, row in enumerate(rows)
            if row["question"]
        ]
    return SampleList("MLVU dev", samples, root=path, notes=odd_notes(odd, "MLVU dev"))


def _numbered(tasks: str | Sequence[str] | None) -> list[str] | None:
    """Names of tasks with their numbers in front, which a user may leave out."""
    if tasks is None:
        return None
    full = {task.partition("_")[2]: task for task in TASKS}
    return [full.get(task, task) for task in ([tasks] if isinstance(tasks, str) else tasks)]


def _sample(id: str, row: Mapping[str, Any], clip: Path, instruction: str | None, odd: list[str]) -> Sample:
    options = tuple(str(text) for text in row.get("candidates") or ())
    answer = row.get("answer")
    if options and "answer" in row:
        answer = published_letter(answer, options, id, odd)
    return Sample(
        id=id, task="ask", prompt=with_options(row["question"], options, instruction), answer=answer, options=options,
        category=row["question_type"], media=(Media(path=str(clip)),), meta={"question": row["question"], **rest(row, USED)},
    )  # fmt: skip
