"""Datasets by name: `open_dataset("video_mme:/data/Video-MME")` yields samples, whatever the files look like.

A layout is one file of this folder with one function that returns a `Dataset`; `LAYOUTS` names them. Opening reads the
annotations, checks every row and looks for the clips, so that what is wrong is said before any work starts. Clips themselves
are opened by the worker that needs them: one that cannot be read is that unit's failure, and the run goes on.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from mmeff.errors import suggest
from mmeff.evaluation.datasets.base import Dataset, First

__all__ = ["LAYOUTS", "Dataset", "layouts", "open_dataset"]

LAYOUTS: dict[str, str] = {
    "folder": "a folder of clips and pictures, one question about each",
    "manifest": "a .jsonl or .csv file: video, question, answer, options; or prompt, seed",
    "hf": "a Hugging Face dataset on disk (save_to_disk, or Parquet files)",
    "video_mme": "Video-MME: parquet or JSON annotations, data/<videoID>.mp4",
    "mvbench": "MVBench: json/<task>.json, video/<source>/...; videos, folders of frames, cuts",
    "longvideobench": "LongVideoBench: lvb_val.json, videos/",
    "mlvu": "MLVU: json/<n>_<task>.json, video/<n>_<task>/; and its test set",
    "nextqa": "NExT-QA: val.csv, map_vid_vidorID.json, NExTVideo/; multiple choice and open answers",
    "vbench": "VBench prompt lists: a .txt file, prompts_per_dimension/, or VBench_full_info.json",
    "scenes": "generated pictures of coloured shapes, with questions",
    "motions": "generated clips of moving shapes, with questions",
}
_WITHOUT_PATH = ("scenes", "motions")


def open_dataset(spec: str | os.PathLike[str], *, limit: int | None = None, **options: Any) -> Dataset:
    """Open a dataset.

    Args:
        spec: "layout:path", as in "mvbench:/data/MVBench"; "scenes" or "motions", which are generated; or a path alone: a
            folder of clips, a .jsonl or .csv manifest, or a .txt file of prompts.
        limit: only the first so many samples.
        options: what the layout takes; `layouts()` tells.
    Returns: a `Dataset`.
    Raises:
        ValueError: an unknown layout (with near matches), missing columns (all of them, each with the nearest that is
            there), rows that cannot be samples, ids that occur twice.
        TypeError: an option that the layout does not have (with near matches).
        FileNotFoundError: the path, its annotations, or all of its clips are not there.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit must be a positive number of samples, got {limit!r}; leave it out for all")
    name, path = _split(os.fspath(spec))
    read = _function(name)
    accepted = {p for p in inspect.signature(read).parameters if p != "path"}
    for option in options:
        if option not in accepted:
            raise TypeError(
                f"layout {name!r} has no option {option!r}; it takes {', '.join(sorted(accepted))}."
                f"{suggest(option, accepted)}"
            )
    if name in _WITHOUT_PATH:
        if path is not None:
            raise ValueError(f"{name!r} is generated and reads no path, got {path}; write {name!r} alone")
        dataset = read(**options)
    else:
        if path is None:
            raise ValueError(f"layout {name!r} needs a path; write {name + ':/path/to/it'!r}")
        if not path.exists():
            raise FileNotFoundError(f"dataset {path} does not exist; {name!r} is {LAYOUTS[name]}")
        dataset = read(path, **options)
    return dataset if limit is None or limit >= len(dataset) else First(dataset, limit)


def layouts() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return for every layout what it is, and its options with their defaults."""
    found = {}
    for name, words in LAYOUTS.items():
        parameters = inspect.signature(_function(name)).parameters
        found[name] = (words, {k: p.default for k, p in parameters.items() if k != "path"})
    return found


def _split(spec: str) -> tuple[str, Path | None]:
    """The layout and the path of a spec. What is before a colon counts as a layout unless the whole is a path."""
    if spec in _WITHOUT_PATH:
        return spec, None
    whole = Path(spec).expanduser()
    head, colon, tail = spec.partition(":")
    if colon and tail and not whole.exists():
        if head not in LAYOUTS:
            raise ValueError(_unknown(head))
        return head, Path(tail).expanduser()
    if whole.is_dir():
        return "folder", whole
    by_suffix = {".jsonl": "manifest", ".csv": "manifest", ".txt": "vbench"}.get(whole.suffix.lower())
    if by_suffix:
        return by_suffix, whole
    if whole.exists():
        raise ValueError(
            f"cannot tell the layout of {spec}; write 'layout:{spec}' with one of {', '.join(LAYOUTS)}, or pass a folder of "
            "clips, a .jsonl or .csv manifest, or a .txt file of prompts"
        )
    if spec in LAYOUTS:
        return spec, None
    if os.sep in spec:
        raise FileNotFoundError(f"dataset {spec} does not exist")
    raise ValueError(_unknown(spec))


def _unknown(name: str) -> str:
    return f"no dataset layout is named {name!r}; known are {', '.join(LAYOUTS)}.{suggest(name, LAYOUTS)}"


def _function(name: str) -> Callable[..., Dataset]:
    module = "generated" if name in _WITHOUT_PATH else name
    function: Callable[..., Dataset] = getattr(import_module(f"{__name__}.{module}"), f"open_{name}")
    return function
