"""The verb: run every variant of a model on every sample of a dataset, into a folder, and pick up where an earlier run stopped.

    evaluate(model, dataset, ["fastv", "divprune"], out="runs/mvbench", workers=2)

What decides the results is written down first, and a folder that holds another run is refused. Then the units that are left go
to an executor. SIGINT and SIGTERM let the units in flight finish; a second one does not wait. The same call continues.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmeff.evaluation.executors import Crew, choose
from mmeff.evaluation.prefetch import ListSource
from mmeff.evaluation.rows import DONE, FAILED, Merged, RowWriter, Tail, explained, key, merge, output_problem
from mmeff.evaluation.runner import Worker, pending
from mmeff.evaluation.units import Factory, Job, Pace, configuration, guard, read_config, variants

LOCK = "run.lock"
WINDOW = 60.0  # seconds that the rate is measured over


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: units `done` and `failed` of `total`, units per second of late, and seconds until the end; None where it
    is not known yet."""

    done: int
    failed: int
    total: int
    rate: float | None
    eta: float | None

    def __str__(self) -> str:
        parts = [f"{self.done + self.failed} of {self.total} units"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.rate:
            parts.append(f"{self.rate:.3g}/s")
        if self.eta is not None:
            parts.append(f"{duration(self.eta)} left")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What lies in the folder of a run. `config` what it is; `merged` what was recorded; `left` how many units were not tried
    yet; `stopped` whether a signal ended it."""

    folder: Path
    config: dict[str, Any]
    merged: Merged
    left: int
    stopped: bool = False

    @property
    def finished(self) -> bool:
        """Whether every unit is done or failed."""
        return self.left == 0


def evaluate(
    model: Factory,
    dataset: Factory,
    methods: Sequence[Any] = (),
    *,
    out: str | os.PathLike[str],
    dense: bool = True,
    executor: str = "local",
    workers: int = 1,
    address: str = "",
    gpus: float = 0.0,
    pace: Pace | None = None,
    retry: bool = False,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Run all variants on all samples, or what is left of them.

    Args:
        model: builds a `Model`; `mmeff.evaluation.adapters` has those of this library. dataset: builds a `Dataset`, such as
            `mmeff.evaluation.datasets:open_dataset` with a `spec`.
        methods: as `units.variants`. dense: also the model as it is, which the others are compared with.
        out: the folder of the run; made, or continued.
        executor: "local", "torchrun" or "ray". workers: processes or actors; 0 is this process, for "local".
        address: of a Ray cluster; empty starts Ray here. gpus: that each Ray actor asks for.
        pace: batches, reading ahead, time limits.
        retry: also what failed before.
        show: called with a `Progress` now and then.
    Returns:
        a `Run`; `scores.score` makes a table of it.
    Raises:
        OtherRun: the folder holds a run with another configuration; the message lists the differences.
        CannotRecord: no space left, or the folder became read-only; what was recorded is safe.
        BackendUnavailable: the executor's package is missing. RuntimeError: workers cannot start.
        ValueError, TypeError, LookupError, OSError: inputs that cannot be right, before any work.
    """
    crew, run = Crew(workers=workers, address=address, gpus=gpus), choose(executor)
    if executor != "ray" and (address or gpus):
        raise ValueError(f"a Ray address and gpus are for executor='ray', got executor={executor!r}; leave them out")
    opened = dataset.build()
    job = Job(
        out=str(Path(out).absolute()), model=model, dataset=dataset, variants=variants(methods, dense=dense),
        pace=pace or Pace(),
    )  # fmt: skip
    folder = Path(job.out)
    with _disk_errors(folder):
        guard(folder, configuration(job, opened))
        with _lock(folder, shared=executor == "torchrun"):
            merged = merge(folder)
            finished = {key(row) for row in merged.rows if row["status"] == DONE or not retry}
            tasks = pending(opened, job.variants, finished, job.pace.batch)
            with _Signals() as signals:
                meter = _Meter(folder, len(opened) * len(job.variants), merged, finished, show)
                if tasks and executor == "local" and workers == 0:
                    _here(job, opened, tasks, signals.stop, meter.tick)
                elif tasks:
                    run(job, opened, tasks, crew, stop=signals.stop, tick=meter.tick)
                meter.tick(last=True)
            return look(folder, stopped=signals.stop())


def look(folder: str | os.PathLike[str], *, stopped: bool = False) -> Run:
    """Read what lies in the folder of a run, finished or not.

    Raises: FileNotFoundError: no evaluation lies there.
    """
    folder = Path(folder)
    config = read_config(folder)
    merged = merge(folder, config["variants"])
    total = config["dataset"]["samples"] * len(config["variants"])
    return Run(folder=folder, config=config, merged=merged, left=total - len(merged.rows), stopped=stopped)


def _here(job: Job, dataset: Any, tasks: list[Any], stop: Callable[[], bool], tick: Callable[[], None]) -> None:
    """The only worker is this process."""
    model = job.model.build()
    with RowWriter(Path(job.out), "here") as writer:
        Worker(job, model, dataset, writer, stop=stop, finished=lambda task: tick()).run(ListSource(tasks))


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = output_problem(error)
        if problem is None or error.__class__.__name__ == "CannotRecord":
            raise
        raise explained(problem, folder) from error


@contextlib.contextmanager
def _lock(folder: Path, *, shared: bool) -> Iterator[None]:
    """Keep two runs out of one folder; the ranks of one launcher share it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another run is going on in {folder}; wait for it, end it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                raise
        yield


class _Signals:
    """While this is entered, the first SIGINT or SIGTERM asks the run to stop, and the second ends it."""

    def __init__(self) -> None:
        self._asked = False
        self._old: dict[int, Any] = {}

    def stop(self) -> bool:
        return self._asked

    def _hear(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class _Meter:
    """Counts what workers record, and says how fast they are."""

    def __init__(
        self, folder: Path, total: int, merged: Merged, finished: set[tuple[str, str]], show: Callable[[Progress], None]
    ) -> None:
        self.tail, self.total, self.show = Tail(folder), total, show
        self.tail.new()
        self.status = {key(row): row["status"] for row in merged.rows if key(row) in finished}
        self.seen: deque[tuple[float, int]] = deque([(time.monotonic(), len(self.status))])
        self.next = 0.0

    def tick(self, last: bool = False) -> None:
        now = time.monotonic()
        if now < self.next and not last:
            return
        self.next = now + 0.5
        for row in self.tail.new():
            if row["kind"] == "unit":
                self.status[key(row)] = row["status"]
        self.seen.append((now, len(self.status)))
        while len(self.seen) > 2 and self.seen[0][0] < now - WINDOW:
            self.seen.popleft()
        (then, before), count = self.seen[0], len(self.status)
        rate = (count - before) / (now - then) if now > then and count > before else None
        failed = sum(status == FAILED for status in self.status.values())
        self.show(
            Progress(
                done=count - failed, failed=failed, total=self.total, rate=rate,
                eta=(self.total - count) / rate if rate else None,
            )
        )  # fmt: skip


def duration(seconds: float) -> str:
    """A span of time for people: 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    seconds = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // small
            return f"{seconds // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{seconds} s"
