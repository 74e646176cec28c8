"""A manifest of one's own: a .jsonl or .csv file with a row for each question, or for each video to generate.

Columns of questions: `video` or `image` (a path, or in JSON a list of them), `question`; and if wanted `answer`, `options`,
`id`, `category`, `start`, `end`. Columns of generation: `prompt`; and if wanted `seed`, `image` (to start from), `id`,
`category`. Every other column goes into the results as it is.

`answer` may be the text of an option or its letter. In CSV, options are a JSON list or texts with | between them. An id that
is not given is made from the row's content, so that rows may be moved, and added, without losing what is done.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmeff.evaluation.datasets.base import SampleList
from mmeff.evaluation.datasets.tables import need_columns, read_rows, rest, the_folder
from mmeff.evaluation.samples import Media, Sample, letter_of, with_options

SUFFIXES = (".jsonl", ".csv", ".parquet", ".json")
USED = ("id", "video", "image", "question", "answer", "options", "category", "start", "end", "prompt", "seed")


def open_manifest(
    path: Path, *, media: str | os.PathLike[str] | None = None, instruction: str | None = None
) -> SampleList:
    """The rows of a manifest.

    Args:
        path: a .jsonl, .csv, .json or .parquet file. media: the folder that paths in it start from; None is the manifest's own.
        instruction: what follows the options of a question; None for the usual sentence, "" for nothing.
    Raises: ValueError for a file of another kind, missing columns, cells that cannot be used, ids that occur twice.
    """
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise ValueError(f"a manifest ends in {', '.join(SUFFIXES)}, got {path}")
    root = the_folder(path.parent, (".",), media, "media")
    rows = read_rows(path)
    return SampleList(f"manifest {path.name}", samples_of(rows, root, str(path), instruction), root=root)


def samples_of(
    rows: Sequence[Mapping[str, Any]], root: Path, where: str, instruction: str | None = None
) -> list[Sample]:
    """The samples of rows that have the columns of a manifest.

    Args: root: what relative paths start from. where: the file, for errors.
    """
    columns = {name for row in rows for name in row}
    if "prompt" in columns and "question" not in columns:
        need_columns(rows, ["prompt"], where)
        return [_to_generate(row, root, f"{where}, row {n}") for n, row in enumerate(rows, start=1)]
    need_columns(rows, [("video", "image"), "question"], where)
    return [_to_ask(row, root, f"{where}, row {n}", instruction) for n, row in enumerate(rows, start=1)]


def _to_ask(row: Mapping[str, Any], root: Path, where: str, instruction: str | None) -> Sample:
    question = _text(row, "question", where)
    options = options_of(row.get("options"), where)
    answer = None if row.get("answer") in (None, "") else str(row["answer"])
    if options and answer is not None:
        answer = letter_of(answer, options, where)
    videos, images = _paths(row.get("video"), root, where), _paths(row.get("image"), root, where)
    start, end = _number(row, "start", where), _number(row, "end", where)
    if (start, end) != (None, None) and len(videos) != 1:
        raise ValueError(f"{where} has a start or an end, which cut its one video, and it has {len(videos)}")
    media = [Media(path=p, start=start, end=end) for p in videos] + [Media(path=p, kind="image") for p in images]
    return Sample(
        id=_id(row, [row.get("video"), row.get("image"), question, list(options), start, end]),
        task="ask", prompt=with_options(question, options, instruction), answer=answer, options=options,
        category=_words(row.get("category")), media=tuple(media), meta={"question": question, **rest(row, USED)},
    )  # fmt: skip


def _to_generate(row: Mapping[str, Any], root: Path, where: str) -> Sample:
    prompt, seed = _text(row, "prompt", where), _number(row, "seed", where)
    if seed is not None and (seed < 0 or seed != int(seed)):
        raise ValueError(f"{where} has the seed {row['seed']!r}; a seed is a whole number, 0 or more")
    media = [Media(path=p, kind="image") for p in _paths(row.get("image"), root, where)]
    return Sample(
        id=_id(row, [prompt, seed, row.get("image")]), task="generate", prompt=prompt, category=_words(row.get("category")),
        media=tuple(media), seed=0 if seed is None else int(seed), meta=rest(row, USED),
    )  # fmt: skip


def options_of(value: Any, where: str) -> tuple[str, ...]:
    """The options in a cell: a list, a JSON list, or texts with | between them."""
    if value in (None, "", []):
        return ()
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"options of {where} are no JSON list: {error.msg}; write them as a|b|c") from error
        else:
            value = [part.strip() for part in value.split("|")]
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise ValueError(f"options of {where} must be two or more texts, as a list or as a|b|c, got {value!r}")
    return tuple(str(v) for v in value)


def _paths(value: Any, root: Path, where: str) -> list[str]:
    """The paths in a cell; what starts from the root folder is completed, whole paths and generated names are left."""
    found = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(p, str) and p for p in found):
        raise ValueError(f"{where} must name its media by a path, or a list of paths, got {value!r}")
    return [p if "://" in p else str(root / Path(p).expanduser()) for p in found]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must have a text in {name}, got {value!r}")
    return value.strip()


def _number(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise ValueError(f"{where} must have a number in {name}, got {value!r}")
    return number


def _words(value: Any) -> str:
    return "" if value is None else str(value)


def _id(row: Mapping[str, Any], content: list[Any]) -> str:
    given = row.get("id")
    if given not in (None, ""):
        return str(given)
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, default=str).encode()).hexdigest()[:16]
