"""A Hugging Face dataset on disk, with the columns of a manifest: what `Dataset.save_to_disk` wrote, or a folder of Parquet
files as the hub stores them, which are read into memory. Nothing is downloaded. Needs `datasets`: `pip install mmeff[data]`.

Pictures and videos may be paths, or bytes inside the dataset; bytes are written into a cache folder when it is opened, once,
under a name that their content decides. A row without an id is known by its number.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mmeff.errors import suggest
from mmeff.evaluation.datasets.base import SampleList
from mmeff.evaluation.datasets.manifest import samples_of
from mmeff.evaluation.datasets.tables import the_folder
from mmeff.video_io import replacing


def open_hf(
    path: Path,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    media: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    instruction: str | None = None,
) -> SampleList:
    """The rows of a dataset on disk.

    Args:
        split: which one, where there are several.
        columns: which of its columns stand for those of a manifest, as in {"question": "query", "video": "clip"}.
        media: the folder that paths in it start from; None is the dataset's own.
        cache: a folder for media that lie inside the dataset. instruction: as for a manifest.
    Raises:
        ModuleNotFoundError: `datasets` is not installed. FileNotFoundError: no dataset is there.
        ValueError: a split or column that it does not have, rows that cannot be samples, media inside it and no `cache`.
    """
    table = _load(path, split)
    columns = dict(columns or {})
    for ours, theirs in columns.items():
        if theirs not in table.column_names:
            raise ValueError(
                f"columns says that {ours} is {theirs!r}, and {path} has no such column; it has "
                f"{', '.join(table.column_names)}.{suggest(theirs, table.column_names)}"
            )
        if ours != theirs and ours in table.column_names:  # give way to what the user named
            table = table.remove_columns(ours)
    table = table.rename_columns({theirs: ours for ours, theirs in columns.items() if ours != theirs})
    table = table.with_format(None)
    datasets = import_module("datasets")
    for name, feature in table.features.items():  # paths and bytes, not pixels: opening a dataset decodes nothing
        if isinstance(feature, datasets.Image | datasets.Video):
            table = table.cast_column(name, type(feature)(decode=False))
    rows = [{"id": str(n), **{k: _stored(v, path, cache) for k, v in row.items()}} for n, row in enumerate(table)]
    root = the_folder(path, (".",), media, "media")
    return SampleList(f"dataset {path.name}", samples_of(rows, root, str(path), instruction), root=root)


def _load(path: Path, split: str | None) -> Any:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ModuleNotFoundError(f"opening {path} needs datasets; pip install mmeff[data]") from error
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        found = datasets.load_from_disk(str(path))
    else:
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if not files or files[0].suffix != ".parquet":
            raise FileNotFoundError(f"{path} holds no dataset: neither dataset_info.json nor a .parquet file")
        parts: dict[str, list[Any]] = {}
        for file in files:  # test-00000-of-00001.parquet; read here, as Dataset.from_parquet leaves a copy in a cache
            content = datasets.table.InMemoryTable(import_module("pyarrow.parquet").read_table(file))
            parts.setdefault(file.stem.split("-")[0], []).append(datasets.Dataset(content))
        found = datasets.DatasetDict({name: datasets.concatenate_datasets(part) for name, part in parts.items()})
    if not hasattr(found, "keys"):
        if split is not None:
            raise ValueError(f"{path} is one dataset without splits, got split={split!r}; leave it out")
        return found
    names = list(found.keys())
    if split is None and len(names) == 1:
        return found[names[0]]
    if split not in names:
        said = "none was chosen" if split is None else f"got {split!r}"
        raise ValueError(f"split of {path} must be one of {', '.join(names)}; {said}.{suggest(split or '', names)}")
    return found[split]


def _stored(value: Any, path: Path, cache: str | os.PathLike[str] | None) -> Any:
    """A cell as it is, or the path of a picture or video: its own where that exists, else a file with its bytes."""
    if not isinstance(value, dict) or set(value) != {"bytes", "path"}:
        return value
    if value["path"] and (value["bytes"] is None or os.path.exists(value["path"])):
        return value["path"]
    if cache is None:
        raise ValueError(
            f"{path} holds its pictures or videos inside; pass cache=, a folder that they may be written to"
        )
    content: bytes = value["bytes"]
    target = (
        Path(cache)
        / f"{hashlib.sha256(content).hexdigest()[:24]}{Path(value['path'] or '').suffix or _suffix(content)}"
    )
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            partial.write_bytes(content)
    return str(target)


def _suffix(content: bytes) -> str:
    """The ending of a file with these first bytes; decoders look at the content, people at the name."""
    if content.startswith(b"RIFF"):
        return ".webp" if content[8:12] == b"WEBP" else ".avi"
    kinds = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"\x1a\x45\xdf\xa3": ".mkv"}
    return next((suffix for start, suffix in kinds.items() if content.startswith(start)), ".mp4")
