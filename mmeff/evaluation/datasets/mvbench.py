"""MVBench: twenty tasks of 200 questions, made from the clips of eleven other datasets.

`json/<task>.json` is a list of {video, question, candidates, answer}; clips lie in `video/`, in a folder for each source. Five
tasks ask about a cut of a clip, from `start` to `end` seconds. One of them, episodic reasoning, has its clips as folders of
pictures, three for each second. Later releases renamed folders (`data0613/`) and ship some clips as ready cuts (`*_segment`,
`*_convert`, `*_mp4`); what is there is used, and a ready cut is not cut again.

Source: Li et al., CVPR 2024, arXiv:2311.17005; github.com/OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb; the hub's
OpenGVLab/MVBench; the folders of later releases as lmms-eval and VLMEvalKit look for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmeff.evaluation.datasets.base import SampleList
from mmeff.evaluation.datasets.tables import (
    need_columns,
    odd_notes,
    only,
    published_letter,
    read_rows,
    rest,
    the_folder,
)
from mmeff.evaluation.samples import Media, Sample, with_options

FRAMES_FPS = 3.0  # of folders of frames
_STAR = ("star/Charades_v1_480", "data0613/star/Charades_v1_480")
_CLEVRER = ("clevrer/video_validation", "data0613/clevrer/video_validation")
_PERCEPTION = ("perception/videos",)


@dataclass(frozen=True)
class Source:
    """Where the clips of a task lie: whole ones in the first of `folders` that is there, ready cuts in `ready`."""

    folders: tuple[str, ...]
    cut: bool = False
    ready: str | None = None


TASKS: dict[str, Source] = {
    "action_sequence": Source(_STAR, cut=True, ready="star/Charades_segment"),
    "action_prediction": Source(_STAR, cut=True, ready="star/Charades_segment"),
    "action_antonym": Source(("ssv2_video", "ssv2_video_mp4")),
    "fine_grained_action": Source(("Moments_in_Time_Raw/videos",)),
    "unexpected_action": Source(("FunQA_test/test",)),
    "object_existence": Source(_CLEVRER),
    "object_interaction": Source(_STAR, cut=True, ready="star/Charades_segment"),
    "object_shuffle": Source(_PERCEPTION),
    "moving_direction": Source(_CLEVRER),
    "action_localization": Source(("sta/sta_video",), cut=True, ready="sta/sta_video_segment"),
    "scene_transition": Source(("scene_qa/video",)),
    "action_count": Source(_PERCEPTION),
    "moving_count": Source(_CLEVRER),
    "moving_attribute": Source(_CLEVRER),
    "state_change": Source(_PERCEPTION),
    "fine_grained_pose": Source(("nturgbd", "nturgbd_convert")),
    "character_order": Source(_PERCEPTION),
    "egocentric_navigation": Source(("vlnqa",)),
    "episodic_reasoning": Source(("tvqa/frames_fps3_hq",), cut=True, ready="tvqa/video_fps3_hq_segment"),
    "counterfactual_inference": Source(_CLEVRER),
}


def open_mvbench(
    path: Path,
    *,
    tasks: str | Sequence[str] | None = None,
    videos: str | os.PathLike[str] | None = None,
    instruction: str | None = None,
) -> SampleList:
    """The questions of MVBench; the category is the task, the id the task and the row.

    Args:
        tasks: names such as "action_sequence"; None for all that have annotations. videos: the folder `video/`, where it
            lies elsewhere. instruction: what follows the options.
    Raises: FileNotFoundError where there are no annotations.
    """
    annotations = path / "json" if (path / "json").is_dir() else path
    there = [task for task in TASKS if (annotations / f"{task}.json").is_file()]
    if not there:
        raise FileNotFoundError(
            f"{path} holds no MVBench annotations; expected json/{next(iter(TASKS))}.json and others"
        )
    clips = the_folder(path, ("video", "videos"), videos, "videos")
    samples, odd = [], list[str]()
    for task in only(tasks, there, "MVBench task"):
        file, source = annotations / f"{task}.json", TASKS[task]
        rows = read_rows(file)
        need_columns(rows, ["video", "question", "candidates", "answer"], str(file))
        needs_cut = source.cut and not _is_ready(clips, source)
        if needs_cut:
            need_columns(rows, ["start", "end"], str(file))
        for number, row in enumerate(rows):
            media = _media(row, clips, source, needs_cut)
            samples.append(_sample(task, number, row, media, instruction, odd))
    return SampleList("MVBench", samples, root=path, notes=odd_notes(odd, "MVBench"))


def _is_ready(clips: Path, source: Source) -> bool:
    """Whether only the ready cuts of a source are there."""
    whole = any((clips / folder).is_dir() for folder in source.folders)
    return not whole and source.ready is not None and (clips / source.ready).is_dir()


def _media(row: Mapping[str, Any], clips: Path, source: Source, needs_cut: bool) -> Media:
    if source.cut and not needs_cut:
        assert source.ready is not None
        return Media(path=str(_as_named(clips / source.ready / row["video"])))
    folder = next((f for f in source.folders if (clips / f).is_dir()), source.folders[0])
    place = _as_named(clips / folder / row["video"])
    start, end = (float(row["start"]), float(row["end"])) if needs_cut else (None, None)
    return Media(path=str(place), fps=FRAMES_FPS if "frames" in folder else None, start=start, end=end)


def _as_named(place: Path) -> Path:
    """The file itself, or one that was converted to mp4 under the same name."""
    converted = place.with_name(f"{place.stem}.mp4")
    return converted if not place.exists() and converted.exists() else place


def _sample(
    task: str, number: int, row: Mapping[str, Any], media: Media, instruction: str | None, odd: list[str]
) -> Sample:
    options = tuple(str(text) for text in row["candidates"])
    used = ("video", "question", "candidates", "answer", "start", "end")
    name = f"{task}-{number:04}"
    return Sample(
        id=name, task="ask", prompt=with_options(row["question"], options, instruction),
        answer=published_letter(row["answer"], options, name, odd), options=options, category=task, media=(media,),
        meta={"question": row["question"], **rest(row, used)},
    )  # fmt: skip
