"""Run the parts within one time: each gets what is left by its weight, and nothing is begun that could not end.

A part yields tasks. A task that the file holds is not run again, so that the same command continues a run that ran out of
time, was stopped by a signal, or lost its machine.
"""

from __future__ import annotations

import gc
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mmeff.errors import BackendUnavailable

from ..cases import Unavailable
from ..gate import GateFailed
from .rows import File
from .setting import Setting
from .workers import lost

Tick = Callable[[str, int, int], None]
RESERVE = 5.0  # seconds at the end for the table


class Stopped(BaseException):
    """The run was asked to end by a signal; no ordinary handler of errors may swallow it."""


class DeviceLost(GateFailed):
    """The device failed in this process, which can do nothing more on it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something to measure, which becomes one row.

    seconds: what it takes at most, by a guess that holds until it ran once. run: returns the figures; raises Unavailable where
    it cannot run here, GateFailed where a backend is wrong.
    """

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """weight: its share of the time of a run over all parts. tasks: the most telling first. judges: what is wrong ends the run
    when all of the part has been judged, not at the first: whoever repairs it wants to know everything. Its tasks say by
    themselves what is left to do for them."""

    name: str
    weight: float
    judges: bool = False
    tasks: Callable[[Setting, File], Generator[Task, None, None]]


@dataclass
class Outcome:
    """What a run did. left: tasks that the time did not reach. stopped: the signal that ended it. red: what the gate said."""

    done: int = 0
    failed: int = 0
    before: int = 0
    left: int = 0
    stopped: str | None = None
    red: str | None = None


class Clock:
    """The time of a run, and of the part that is running."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + max(0.0, seconds - RESERVE)
        self._part_end = self._end

    def begin_part(self, weight: float, weights: float) -> None:
        """Give a part its share of what is left; `weights` is the sum over it and the parts behind it."""
        now = self._now()
        self._part_end = now + (self._end - now) * weight / weights

    def allows(self, seconds: float) -> bool:
        """Whether a task that takes so long ends within its part; one that takes nothing always does."""
        return seconds <= 0 or self._now() + seconds <= self._part_end


def run(parts: Sequence[Part], file: File, *, seconds: float, again: bool, tick: Tick) -> Outcome:
    """Run the parts in their order, and append a row per task.

    A red gate ends the run: the speed of something wrong means nothing. SIGTERM and SIGINT end it too, between two
    bytecodes of whatever runs; rows are complete or not there.
    """
    outcome, clock = Outcome(), Clock(seconds)
    with _signals():
        try:
            for i, part in enumerate(parts):
                clock.begin_part(part.weight, sum(p.weight for p in parts[i:]))
                _run_part(part, file, clock, outcome, again, tick)
        except Stopped as signal_name:
            outcome.stopped = str(signal_name)
        except GateFailed as error:
            outcome.red = str(error)
    return outcome


def _run_part(part: Part, file: File, clock: Clock, outcome: Outcome, again: bool, tick: Tick) -> None:
    took = {row.name: row.took for row in file.latest(part.name) if row.status == "measured"}
    wrong: list[GateFailed] = []
    with closing(part.tasks(file.setting, file)) as tasks:  # parts hold models and processes, and let go of them here
        for i, task in enumerate(tasks):
            if not again and file.held(part.name, task.name) is not None:
                outcome.before += 1
                continue
            # what it took before and a fifth for bad luck, where that is known and says anything
            expected = 1.2 * took[task.name] if task.name in took and not part.judges else task.seconds
            if not clock.allows(expected):
                outcome.left += 1
                continue
            tick(f"{part.name}: {task.name}", i, i + 1)
            try:
                fine = _run_task(part.name, task, file)
            except DeviceLost:
                raise
            except GateFailed as error:
                wrong.append(error)
                if not part.judges:
                    break
                continue
            outcome.done += fine
            outcome.failed += not fine
    if wrong:
        raise GateFailed("\n".join(map(str, wrong)))


def _run_task(part: str, task: Task, file: File) -> bool:
    """Run a task and append its row; return whether it did what it should, which a refusal with its reason is too.

    What nobody foresaw is a failed row, on a GPU: its time is too dear to end with the first surprise. The run then ends with an
    exit code of its own. In a smoke run it is raised.
    """
    began = time.monotonic()

    def took() -> float:
        return time.monotonic() - began

    try:
        file.add(part, task.name, "measured", **task.run(), took=took())
    except GateFailed as error:
        file.add(part, task.name, "wrong", reason=str(error), took=took())
        raise
    except (Unavailable, BackendUnavailable) as error:
        file.add(part, task.name, "skipped", reason=str(error), took=took())
    except torch.OutOfMemoryError as error:
        file.add(part, task.name, "skipped", reason=f"out of memory: {str(error)[:200]}", took=took())
    except Exception as error:
        if file.setting.smoke:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} in {where.name}, line {where.lineno}: {str(error)[:400]}"
        file.add(part, task.name, "failed", reason=reason, took=took())
        if lost(str(error)):  # it stays with the process: everything after it would fail alike
            raise DeviceLost(f"{task.name}: {reason}") from error
        return False
    finally:
        gc.collect()
        if file.setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


@contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into Stopped; signals can only be handled in the main thread, elsewhere they stay as they are."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
