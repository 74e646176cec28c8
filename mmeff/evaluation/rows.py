"""The record of a run: one append-only file of JSON lines per worker, synced to disk, merged when it is read.

Nothing is ever rewritten, and no two processes write one file, so a worker can be killed at any moment: at worst the last
line of its file is torn, which is seen and skipped, and its unit is done again. A unit that two workers did all the same is
counted once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmeff.errors import MmeffError
from mmeff.evaluation.run_folder import to_plain

ROWS = "rows"  # the folder of the files
DONE, FAILED = "done", "failed"
# What depends on the sample and the methods alone, and not on the machine, the worker or the hour.
RESULT = (
    "sample", "method", "hash", "status", "stage", "reason", "task", "category", "prompt", "expected", "options",
    "answer", "artifact", "sha256", "frames", "tokens",
)  # fmt: skip
_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}
_CLOSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EIO: "the disk failed",
}


class CannotRecord(MmeffError, OSError):
    """The output folder takes no more results. What was recorded before is safe; the message says what to do."""


class RowWriter:
    """The file of one worker.

    Args: folder: of the run. worker: a name that no other living process of the run has.
    Raises: CannotRecord: the folder cannot be written to. RuntimeError: another process holds the file.
    """

    def __init__(self, folder: Path, worker: str) -> None:
        self.folder, self.worker = folder, worker
        self.path = folder / ROWS / f"{worker}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._error(error) from error
        self._lock()
        size = os.fstat(self._fd).st_size
        # a torn last line gets its end, so that the next line stands alone
        self._pending = b"\n" if size and os.pread(self._fd, 1, size - 1) != b"\n" else b""
        self._host = socket.gethostname()

    def _lock(self, patience: float = 10.0) -> None:
        """Refuse a second writer. A worker whose parent was just killed may live for another moment, so wait a little."""
        try:
            import fcntl
        except ImportError:  # Windows has no flock; the executors give every worker its own name
            return
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    os.close(self._fd)
                    raise RuntimeError(
                        f"another process is writing {self.path}: a run in {self.folder} is still going on; wait for it, or end it"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                return  # this file system knows no locks

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows with one call and wait until the disk has them.

        Raises: CannotRecord: they could not be written; none of them counts, and all earlier ones are safe.
        """
        stamp = {"worker": self.worker, "host": self._host, "time": time.time()}
        lines = [json.dumps(to_plain({**row, **stamp}), ensure_ascii=False, allow_nan=False) for row in rows]
        data = self._pending + "".join(f"{line}\n" for line in lines).encode()
        before = os.fstat(self._fd).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(
                OSError
            ):  # on a device that cannot shrink the torn line stays, and readers skip it
                os.ftruncate(self._fd, before)
            raise self._error(error) from error
        self._pending = b""

    def _error(self, error: OSError) -> CannotRecord:
        return explained(error, self.folder)

    def close(self) -> None:
        """Close the file and give up its lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def output_problem(error: BaseException | None) -> OSError | None:
    """The error of the disk in a chain of causes, if that is what it was; a full disk is no fault of a sample."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {**_FULL, errno.EROFS: ""}:
            return error
        error = error.__cause__
    return None


def explained(error: OSError, folder: Path) -> CannotRecord:
    """The error of a write into the folder of a run, for people."""
    known = {**_FULL, **_CLOSED}
    what = known.get(error.errno or 0, error.strerror or str(error))
    advice = "free some space" if error.errno in _FULL else "make it writable"
    found = CannotRecord(
        f"{folder} cannot take results: {what}. What was recorded before is safe; {advice} and give the same command again, "
        "which continues the run."
    )
    found.errno = error.errno
    return found


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What all workers recorded. `rows` one per unit that was tried, samples in order and variants within them; `sessions` one
    entry per start of a worker; `repeated` how many rows told of a unit that was done already; `torn` how many lines were cut
    short by a kill."""

    rows: tuple[dict[str, Any], ...]
    sessions: tuple[dict[str, Any], ...] = ()
    repeated: int = 0
    torn: int = 0

    @property
    def done(self) -> set[tuple[str, str]]:
        """Units that are done, as (sample id, hash)."""
        return {key(row) for row in self.rows if row["status"] == DONE}

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        """Rows of units that failed and were not done since."""
        return tuple(row for row in self.rows if row["status"] == FAILED)

    def table(self) -> list[dict[str, Any]]:
        """The results alone: what is the same whichever executor ran, however often it was interrupted."""
        return [{name: row.get(name) for name in RESULT} for row in self.rows]


def key(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a unit is known by."""
    return str(row["sample"]), str(row["hash"])


def merge(folder: Path, variants: Sequence[Mapping[str, Any]] = ()) -> Merged:
    """Read the rows of all workers of a run.

    Args: folder: of the run. variants: of its configuration, for their order; by name where there are none.
    Returns: a `Merged`. A unit that was done and failed is done; of several failures the last one stands.
    """
    order = {v["hash"]: i for i, v in enumerate(variants)}
    best: dict[tuple[str, str], dict[str, Any]] = {}
    sessions, repeated, torn = [], 0, 0
    for row in read_rows(folder):
        if row is None:
            torn += 1
        elif row.get("kind") == "session":
            sessions.append(row)
        else:
            old = best.get(key(row))
            repeated += old is not None and old["status"] == row["status"] == DONE
            if old is None or _better(row, old):
                best[key(row)] = row
    rows = sorted(best.values(), key=lambda r: (r["index"], order.get(r["hash"], len(order)), r["method"]))
    return Merged(
        rows=tuple(rows), sessions=tuple(sorted(sessions, key=lambda s: s["time"])), repeated=repeated, torn=torn
    )


def _better(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    if new["status"] != old["status"]:
        return bool(new["status"] == DONE)
    return bool(new["time"] < old["time"]) if new["status"] == DONE else bool(new["time"] > old["time"])


def read_rows(folder: Path) -> Iterator[dict[str, Any] | None]:
    """Every line of every worker's file; None for one that was torn."""
    for path in sorted((folder / ROWS).glob("*.jsonl")):
        with path.open("rb") as file:
            yield from parsed(file)


def parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """Lines as rows; empty ones are left out, and one that is no whole JSON object is None."""
    for line in lines:
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) and "kind" in row else None


@dataclass
class Tail:
    """Follows the rows of a run while others write them: each call of `new` returns what came since the last one."""

    folder: Path
    _read: dict[Path, int] = field(default_factory=dict)

    def new(self) -> list[dict[str, Any]]:
        """Whole rows that were not seen before."""
        found: list[dict[str, Any]] = []
        for path in sorted((self.folder / ROWS).glob("*.jsonl")):
            start = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
            whole = data.rfind(b"\n") + 1
            self._read[path] = start + whole
            found += [row for row in parsed(data[:whole].splitlines()) if row is not None]
        return found


class Recorded:
    """Which units were recorded since this object was made, done or failed; with `before`, those done earlier count too."""

    def __init__(self, folder: Path, *, before: bool = False) -> None:
        self._tail = Tail(folder)
        old = self._tail.new()
        self._units = {key(row) for row in old if row.get("status") == DONE} if before else set()

    def units(self) -> set[tuple[str, str]]:
        """Units as (sample id, hash)."""
        self._units |= {key(row) for row in self._tail.new() if row["kind"] == "unit"}
        return self._units
