"""The files of past runs: each run in a folder whose name cannot be guessed, the oldest deleted when they are too many.

The page reaches them as `runs/<run>/<file>` and in no other way, and only files that a run put there on purpose.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

ROUTE = "/runs/{run}/{name}"


class Run:
    """One run's folder. `name` is its public name; `data` what a tab keeps for later questions, such as another frame."""

    def __init__(self, root: Path) -> None:
        self.name = secrets.token_urlsafe(16)
        self.folder = root / self.name
        self.folder.mkdir()
        self.data: dict[str, Any] = {}
        self.bytes = 0  # of its files, once it is complete
        self._public: dict[str, Path] = {}

    def publish(self, path: Path) -> str:
        """Let the page fetch a file of the folder; returns its address, relative to the page."""
        if path.parent != self.folder:
            raise ValueError("only files of the run's own folder are published")
        self._public[path.name] = path
        return f"runs/{self.name}/{path.name}"

    def file(self, name: str) -> Path | None:
        """A published file."""
        return self._public.get(name)


class Runs:
    """Keeps the last runs.

    Args: kept: how many; megabytes: of files, all together. The latest run stays, however large it is.
    """

    def __init__(self, kept: int, megabytes: float) -> None:
        self._kept, self._most = kept, int(megabytes * 1_000_000)
        self._root = Path(mkdtemp(prefix="mmeff-demo-"))
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._lock = threading.Lock()

    def new(self) -> Run:
        """A new run, in an empty folder."""
        with self._lock:
            run = Run(self._root)
            self._runs[run.name] = run
        return run

    def settle(self, run: Run) -> None:
        """A run is complete: those that were not looked at for longest go, where all of them are too many or too large."""
        run.bytes = sum(file.stat().st_size for file in run.folder.iterdir())
        gone: list[Run] = []
        with self._lock:
            while len(self._runs) > 1 and (
                len(self._runs) > self._kept or sum(one.bytes for one in self._runs.values()) > self._most
            ):
                gone.append(self._runs.popitem(last=False)[1])
        for old in gone:
            shutil.rmtree(old.folder, ignore_errors=True)

    def get(self, name: str) -> Run:
        """A run by its public name.

        Raises: ValueError for one that is not there, or not any more.
        """
        with self._lock:
            run = self._runs.get(name) if isinstance(name, str) else None
            if run is None:
                raise ValueError("this result is not kept any more; run it again")
            self._runs.move_to_end(name)
        return run

    def drop(self, run: Run) -> None:
        """Delete a run that came to nothing."""
        with self._lock:
            self._runs.pop(run.name, None)
        shutil.rmtree(run.folder, ignore_errors=True)

    def file(self, run: str, name: str) -> Path | None:
        """A published file of a run, or None."""
        with self._lock:
            found = self._runs.get(run)
        return found.file(name) if found is not None else None

    def close(self) -> None:
        """Delete everything."""
        with self._lock:
            self._runs.clear()
        shutil.rmtree(self._root, ignore_errors=True)
