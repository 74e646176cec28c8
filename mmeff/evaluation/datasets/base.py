"""What a dataset is to the runner, and the two plain ones: a list of samples, and the first few of another dataset."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mmeff.evaluation.samples import Sample


@runtime_checkable
class Dataset(Protocol):
    """Samples by position. `name` says which dataset it is, `digest` changes whenever a unit of it would."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What opening it found worth saying: clips that are missing, files that were left out."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class SampleList:
    """Samples in memory.

    Args:
        name: what the dataset is called. samples: in order.
        root: the folder that the dataset lies in; the digest knows media by their place in it, so that a dataset that was
            moved is the same one.
        notes: what to tell the user beside what is found here.
    Raises:
        ValueError: no samples, or ids that occur more than once.
        FileNotFoundError: not one of the media is there, which means that the place is wrong, not the files. When only some
            are missing, `notes` says so, and their units fail one by one.
    """

    def __init__(
        self, name: str, samples: Iterable[Sample], *, root: str | os.PathLike[str] = ".", notes: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.samples = tuple(samples)
        self.root = Path(root)
        if not self.samples:
            raise ValueError(f"{name} holds no samples")
        _unique(self.samples, name)
        self.notes = (*notes, *self._missing())

    def _missing(self) -> list[str]:
        paths = list(dict.fromkeys(m.path for sample in self.samples for m in sample.media if "://" not in m.path))
        missing = [path for path in paths if not os.path.lexists(path)]
        if missing and len(missing) == len(paths):
            raise FileNotFoundError(
                f"none of the {len(paths)} media files of {self.name} is there, {missing[0]} for one; download them, or "
                "say where they are"
            )
        if missing:
            return [f"{len(missing)} of {len(paths)} media files of {self.name} are missing, {missing[0]} for one"]
        return []

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides a unit; pixels are not read."""
        total = hashlib.sha256()
        for sample in self.samples:
            values = sample.to_dict()
            for media in values["media"]:
                media["path"] = _inside(media["path"], self.root)
            total.update(json.dumps(values, sort_keys=True, ensure_ascii=False).encode())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} samples>"


class First:
    """The first `count` samples of a dataset."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        self.dataset, self.count = dataset, count
        self.name, self.notes = dataset.name, dataset.notes

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.dataset.digest} first {self.count}".encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[range(self.count)[index]]

    def __repr__(self) -> str:
        return f"<{self.name}: the first {self.count} of {len(self.dataset)} samples>"


def _unique(samples: Sequence[Sample], name: str) -> None:
    seen: dict[str, int] = {}
    twice: dict[str, list[int]] = {}
    for number, sample in enumerate(samples, start=1):
        if sample.id in seen:
            twice.setdefault(sample.id, [seen[sample.id]]).append(number)
        seen.setdefault(sample.id, number)
    if twice:
        shown = "; ".join(f"{i!r} is samples {', '.join(map(str, where))}" for i, where in list(twice.items())[:3])
        more = f"; and {len(twice) - 3} more" if len(twice) > 3 else ""
        raise ValueError(f"ids of {name} must be unique, and {len(twice)} occur more than once: {shown}{more}")


def _inside(path: str, root: Path) -> str:
    """A path as seen from the dataset's folder, where it lies in it."""
    if "://" in path:
        return path
    try:
        return Path(path).absolute().relative_to(root.absolute()).as_posix()
    except ValueError:
        return path


def plain(value: Any) -> Any:
    """A value from a table as plain JSON: arrays and tuples as lists, NaN as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
