"""Annotation files as rows: JSON, JSON lines, CSV and Parquet, with errors that say where the fault is.

What a layout needs of a row is checked once for the whole file, before any sample is made, so that every missing column is
named together with the nearest one that is there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mmeff.errors import suggest
from mmeff.evaluation.datasets.base import plain
from mmeff.evaluation.samples import letter_of

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a .json, .jsonl, .csv or .parquet file; a JSON file is a list of objects.

    Raises: FileNotFoundError; ValueError for a file that is empty, not UTF-8, not of its format or without rows.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet(path)
    elif suffix == ".csv":
        rows = _csv(path)
    elif suffix == ".jsonl":
        rows = _jsonl(path)
    else:
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} must be a JSON list of objects, one for each row")
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises: FileNotFoundError, IsADirectoryError, PermissionError; ValueError for an empty file or other bytes.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file is needed here")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises: ValueError naming the line that is wrong, and as `read_text`."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} in line {error.lineno}") from error


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {line.strip()[:80]}")
        rows.append(row)
    return rows


def _csv(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    try:
        names = next(reader)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path} has two columns named {', '.join(twice)}; rename one")
        for values in reader:
            if values and len(values) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num} has {len(values)} fields and the header names {len(names)}; put quotes "
                    "around text that holds commas"
                )
            if values:  # else a blank line
                rows.append(dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}") from error
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading {path} needs pyarrow, which comes with `pip install mmeff[data]`"
        ) from error
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except import_module("pyarrow").ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    return rows


def need_columns(
    rows: Sequence[Mapping[str, Any]],
    required: Iterable[str | tuple[str, ...]],
    where: str,
    *,
    empty: Sequence[str] = (),
) -> None:
    """Check that the rows have what a layout needs.

    Args:
        required: names of columns; a tuple is a choice, one of which must be there. where: the file, for the error.
        empty: columns that must be there and may be empty in some rows.
    Raises: ValueError listing every missing column, with the nearest that is there; and rows that lack a column others have.
    """
    present = list(dict.fromkeys(name for row in rows for name in row))
    choices = [(choice,) if isinstance(choice, str) else choice for choice in required]
    spare = [name for name in present if not any(name in names for names in choices)]
    faults = []
    for names in choices:
        if not any(name in present for name in names):
            near = "".join(dict.fromkeys(suggest(name, spare, limit=1) for name in names))
            faults.append(f"{' or '.join(names)}{'.' if near else ''}{near}")
            continue
        if names[0] in empty:
            continue
        without = [
            number for number, row in enumerate(rows, start=1) if not any(row.get(n) not in (None, "") for n in names)
        ]
        if without and len(without) < len(rows):
            more = f" and {len(without) - 3} more" if len(without) > 3 else ""
            raise ValueError(
                f"{where} has no {' or '.join(names)} in row {', '.join(map(str, without[:3]))}{more}; fill it in, or remove "
                "the row"
            )
        if without:
            raise ValueError(f"{where} has nothing in its column {' or '.join(names)}")
    if faults:
        columns = "a column" if len(faults) == 1 else f"{len(faults)} columns"
        raise ValueError(f"{where} misses {columns}: {'; '.join(faults)} (it has {', '.join(present) or 'none'})")


def only(names: str | Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    """Those of `known` that a user chose; all of them for None.

    Raises: ValueError for a name that is not known, with near matches.
    """
    if names is None:
        return list(known)
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in known:
            raise ValueError(f"{what} {name!r} is not there; known are {', '.join(known)}.{suggest(name, known)}")
    return [name for name in known if name in chosen]


def the_file(folder: Path, patterns: Sequence[str], what: str) -> Path:
    """The first file that one of the patterns finds in a folder.

    Raises: FileNotFoundError naming the patterns.
    """
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} holds no {what}; expected {' or '.join(patterns)}")


def the_folder(root: Path, names: Sequence[str], given: Any, what: str) -> Path:
    """The folder that the user gave, or the first of `names` that is in `root`, or else the first of them.

    Raises: NotADirectoryError where the user gave one that is none.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise NotADirectoryError(f"{what} must be a folder, got {given}, which is none")
        return Path(given)
    return next((root / name for name in names if (root / name).is_dir()), root / names[0])


def published_letter(answer: Any, options: Sequence[str], sample: str, odd: list[str]) -> str | None:
    """The letter of a published answer, or None where it is none of the options.

    Published files have a few such rows. They are asked all the same and not scored, and `odd`, which collects their samples,
    goes into the notes; in a file of one's own the same is an error.
    """
    try:
        if answer not in (None, ""):
            return letter_of(str(answer), options, sample)
    except ValueError:
        pass
    odd.append(sample)
    return None


def odd_notes(odd: Sequence[str], name: str) -> list[str]:
    """What to say of the samples that `published_letter` collected."""
    if not odd:
        return []
    many = f"{len(odd)} samples of {name} have" if len(odd) > 1 else f"one sample of {name} has"
    return [f"{many} no published answer among the options, {odd[0]} for one; asked, and not scored"]


def rest(row: Mapping[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """The columns of a row that a layout did not use, as plain JSON: they become `Sample.meta`."""
    gone = set(used)
    return {k: plain(v) for k, v in row.items() if k not in gone and v is not None}
