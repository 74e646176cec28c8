"""Files of scored rows, to which several processes append and from which a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

RowT = TypeVar("RowT")
KeyT = TypeVar("KeyT", bound=Hashable)


def read(
    path: Path, what: str, row_type: Callable[..., RowT], settings: Mapping[str, str], key: Callable[[RowT], KeyT]
) -> dict[str, dict[KeyT, RowT]]:
    """The last row of every variant and key; rows of settings other than `settings[variant]` are left out.

    Raises: ValueError for a line that is no row of `what`, with its number.
    """
    rows: dict[str, dict[KeyT, RowT]] = {name: {} for name in settings}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            row: Any = row_type(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is no row of {what}: {error}; take the line out.") from None
        if settings.get(row.variant) == row.setting:
            rows[row.variant][key(row)] = row
    return rows


def append(path: Path, rows: Iterable[Any]) -> None:
    """Add rows in one write, which two processes cannot interleave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(row), separators=(",", ":"), allow_nan=False) + "\n" for row in rows)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())
