"""NExT-QA: why, how and what before or after, about everyday clips; with five options, or open answers.

Multiple choice: `val.csv`, `test.csv` with the columns video, frame_count, width, height, question, answer (0 to 4), qid, type,
a0 to a4. Open answers (NExT-OE): the same without options, the answer a text; a second accepted answer of the test split is in
`add_reference_answer_test.json` ({video: {qid: text}}). `map_vid_vidorID.json` maps a video to its place, as in
"0101/2909445186", below `NExTVideo/`. The hub's lmms-lab/NExTQA has `MC/` and `OE/` with Parquet files of the same columns,
the second answer as additional_ref_answer, and the clips in one folder.

Source: Xiao et al., CVPR 2021, arXiv:2105.08276; github.com/doc-doc/NExT-QA and github.com/doc-doc/NExT-OE, dataset/nextqa/.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmeff.errors import suggest
from mmeff.evaluation.datasets.base import SampleList
from mmeff.evaluation.datasets.tables import need_columns, read_json, read_rows, the_file, the_folder
from mmeff.evaluation.samples import LETTERS, Media, Sample, with_options

FORMS = {"mc": "MC", "oe": "OE"}
OPTIONS = tuple(f"a{i}" for i in range(5))
TYPES = {
    "CW": "causal why", "CH": "causal how", "TN": "temporal next", "TP": "temporal previous", "TC": "temporal present",
    "DC": "count", "DL": "location", "DB": "binary", "DO": "descriptive other",
}  # fmt: skip


def open_nextqa(
    path: Path,
    *,
    split: str = "val",
    form: str = "mc",
    videos: str | os.PathLike[str] | None = None,
    instruction: str | None = None,
) -> SampleList:
    """The questions of a split; the category is the type of question, spelled out.

    Args:
        split: "train", "val" or "test". form: "mc" for multiple choice, "oe" for open answers.
        videos: the folder of the clips, where it lies elsewhere. instruction: what follows the options.
    """
    if form not in FORMS:
        raise ValueError(f"form of NExT-QA must be mc or oe, got {form!r}.{suggest(form, FORMS)}")
    root = path if path.is_dir() else path.parent
    places = (f"{split}.csv", f"nextqa/{split}.csv", f"dataset/nextqa/{split}.csv", f"{FORMS[form]}/{split}-*.parquet")
    file = the_file(path, places, f"annotations of the split {split}") if path.is_dir() else path
    rows = read_rows(file)
    required = ["video", "question", "answer", "qid", "type"]
    need_columns(rows, [*required, *OPTIONS] if form == "mc" else required, str(file))
    clips = the_folder(root, ("NExTVideo", "videos", "video"), videos, "videos")
    places_of = _json_beside(file, "map_vid_vidorID.json")
    accepted = _json_beside(file, f"add_reference_answer_{split}.json") if form == "oe" else {}
    samples = []
    for row in rows:
        clip = _place(clips, str(row["video"]), places_of)
        samples.append(_sample(row, clip, accepted, instruction, f"{file}, {row['video']}_{row['qid']}", form))
    return SampleList(f"NExT-QA {split} {form}", samples, root=root)


def _json_beside(file: Path, name: str) -> dict[str, Any]:
    place = file.with_name(name)
    return dict(read_json(place)) if place.is_file() else {}


def _place(clips: Path, video: str, places_of: Mapping[str, str]) -> Path:
    """Where a clip lies: below a numbered folder as the map says, or, in the hub's release, beside all others."""
    mapped = clips / f"{places_of.get(video, video)}.mp4"
    flat = clips / f"{video}.mp4"
    return flat if flat.is_file() and not mapped.is_file() else mapped


def _sample(
    row: Mapping[str, Any], clip: Path, accepted: Mapping[str, Any], instruction: str | None, where: str, form: str
) -> Sample:
    video, qid, question = str(row["video"]), str(row["qid"]), str(row["question"]).strip()
    options = tuple(str(row[name]).strip() for name in OPTIONS) if form == "mc" else ()
    answer, meta = str(row["answer"]).strip(), {"question": question, "type": row["type"]}
    if options:
        if answer not in map(str, range(len(options))):
            raise ValueError(
                f"answer of {where} must be the number of an option, 0 to {len(options) - 1}, got {answer!r}; for the files of "
                "open answers pass form='oe'"
            )
        answer = LETTERS[int(answer)]
    else:
        other = row.get("additional_ref_answer") or accepted.get(video, {}).get(qid)
        meta["references"] = [answer, str(other).strip()] if other else [answer]
    return Sample(
        id=f"{video}_{qid}", task="ask", prompt=with_options(question, options, instruction), answer=answer, options=options,
        category=TYPES.get(row["type"], row["type"]), media=(Media(path=str(clip)),), meta=meta,
    )  # fmt: skip
