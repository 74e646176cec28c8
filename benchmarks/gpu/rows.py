"""The rows of `benchmarks gpu`: one JSON object per line, complete in itself, on disk as soon as it is known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from . import setting as at
from .setting import Setting

Status = Literal["measured", "skipped", "failed", "wrong"]
JUDGED: tuple[Status, ...] = ("measured", "wrong")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One task. name: everything that its figures depend on but the machine. Times in seconds, memory in bytes.

    figures: what the part found; a `bar` in it is the least that `value` should be, of which a miss is shown and stops nothing.
    skipped: it cannot run here, and the reason says why. failed: an error that nobody foresaw. wrong: a backend computed something
    wrong, and the run ended there.
    took: seconds of the whole task, by which a later run knows what it can end in time.
    """

    part: str
    name: str
    status: Status
    reason: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    took: float
    hardware: str
    gpu: dict[str, str] = field(default_factory=dict)  # clocks, power limit and driver, as they were after the task
    environment: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str

    @property
    def missed(self) -> bool:
        """Whether a bar is set and not reached."""
        return "bar" in self.figures and not self.figures["value"] >= self.figures["bar"]


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. Raises ValueError for a line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}, is no row of `python -m benchmarks gpu`: {error}; take the line out, or pass another "
                "--out"
            ) from None
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The row of every task on every machine that counts: the last that was measured or found wrong, else the last."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.hardware, row.part, row.name)
        if key not in found or row.status in JUDGED or found[key].status not in JUDGED:
            found[key] = row
    return list(found.values())


class File:
    """The rows of this machine, and new ones. In a smoke run they are kept in memory alone."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.setting = path, setting
        self.rows = [] if setting.smoke else [r for r in read(path) if r.hardware == setting.machine.hardware]
        self._clocks: tuple[float, dict[str, str]] | None = None

    def latest(self, part: str | None = None) -> list[Row]:
        """As the function `latest`; of all parts or of one."""
        return [row for row in latest(self.rows) if part in (None, row.part)]

    def held(self, part: str, name: str) -> Row | None:
        """The measured row of a task. Those of the gate hold for the code that they judged, which must be committed."""
        row = next((r for r in self.latest(part) if r.name == name and r.status == "measured"), None)
        commit = self.setting.machine.commit
        if row is not None and part == "gate" and (commit is None or commit.endswith("-dirty") or row.commit != commit):
            return None
        return row

    def _gpu(self) -> dict[str, str]:
        """The clocks now; asking takes a noticeable time, so that rows within a second share an answer."""
        now = time.monotonic()
        if self._clocks is None or now - self._clocks[0] > 1.0:
            self._clocks = now, at.clocks(self.setting.device)
        return self._clocks[1]

    def add(
        self, part: str, name: str, status: Status, *, took: float, reason: str | None = None, **figures: Any
    ) -> Row:
        """Append a row."""
        machine = self.setting.machine
        row = Row(
            part=part, name=name, status=status, reason=reason, figures=figures, took=round(took, 3),
            hardware=machine.hardware, gpu=self._gpu(), environment=versions(machine.environment),
            commit=machine.commit, date=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        line = json.dumps(asdict(row), ensure_ascii=False, allow_nan=False)
        row = Row(**json.loads(line))  # as it will be read
        if not self.setting.smoke:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())  # the machine may be taken away at any time
        self.rows.append(row)
        return row


def versions(environment: dict[str, str]) -> dict[str, str]:
    """The environment with cuDNN and cuBLAS, on which dense attention and products depend."""
    if not torch.cuda.is_available():
        return environment
    return {**environment, "cudnn": str(torch.backends.cudnn.version())}
