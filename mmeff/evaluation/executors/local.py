"""Worker processes on this machine, fed one task at a time, replaced when they die.

A decoder that crashes takes its process along, and not the run: what the process had taken is given out again, each sample to
a worker of its own, and a sample that keeps killing its worker is recorded as failed. A worker whose parent dies ends at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mmeff.evaluation.executors import Crew
from mmeff.evaluation.rows import FAILED, CannotRecord, Recorded, RowWriter
from mmeff.evaluation.runner import Worker, reason, unit_row, without
from mmeff.evaluation.units import Job, Task

ORPHANED = 75  # exit code of a worker whose parent is gone
FALSE_STARTS = 2  # workers in a row that die before they are ready


def execute(
    job: Job, dataset: Any, tasks: list[Task], crew: Crew, *, stop: Callable[[], bool], tick: Callable[[], None]
) -> None:
    """Run tasks in `crew.workers` processes.

    Raises:
        CannotRecord: the folder of the run takes no more results. RuntimeError: workers cannot start; the message says why.
    """
    Parent(job, dataset, tasks, crew.workers, stop, tick).run()


@dataclass(eq=False)
class _Child:
    """A worker process, the pipe to it, and the tasks that it has."""

    name: str
    process: Any
    pipe: Connection
    tasks: list[Task] = field(default_factory=list)
    ready: bool = False
    alone: bool = False  # it has one task that killed a worker before, and gets no other meanwhile
    ended: bool = False  # it was told that there is nothing more


class Parent:
    """Gives out tasks and replaces workers that die. See `execute`."""

    def __init__(
        self,
        job: Job,
        dataset: Any,
        tasks: list[Task],
        workers: int,
        stop: Callable[[], bool],
        tick: Callable[[], None],
    ) -> None:
        self.job, self.dataset, self.stop, self.tick = job, dataset, stop, tick
        self.queue = deque(tasks)
        self.suspects: deque[Task] = deque()
        self.deaths: Counter[int] = Counter()  # by sample, of workers that had it alone
        self.recorded = Recorded(Path(job.out))
        self.children: list[_Child] = []
        self.workers = min(workers, max(1, len(tasks)))
        self.depth = -(-job.pace.prefetch // job.pace.batch) + 1  # tasks: one in the model, the others being read
        self.false_starts = 0
        self.context = multiprocessing.get_context("spawn")  # forks do not survive CUDA and threads

    def run(self) -> None:
        try:
            for i in range(self.workers):
                self._start(f"local-{i}")
            while self.children:
                self._feed()
                watched = [w for c in self.children for w in (c.pipe, c.process.sentinel)]
                wait(watched, timeout=0.2)
                for child in list(self.children):
                    self._hear(child)
                self.tick()
        except BaseException:
            for child in self.children:
                child.process.kill()
            raise
        finally:
            for child in self.children:
                child.process.join()

    def _start(self, name: str) -> None:
        ours, theirs = self.context.Pipe()
        number = int(name.rsplit("-", 1)[1])
        process = self.context.Process(target=serve, args=(self.job.to_dict(), name, number, theirs), name=name)
        process.start()
        theirs.close()
        self.children.append(_Child(name, process, ours))

    def _feed(self) -> None:
        """Give every worker what it can take, and tell it when there is nothing left that it could get."""
        for child in self.children:
            if child.ended:
                continue
            if self.stop():
                self._send(child, "stop")
                if not child.ready:
                    child.process.kill()  # it loads its model, and has nothing in flight
                continue
            if not child.ready:
                continue
            if self.suspects and not child.tasks:
                child.alone = True
                self._give(child, self.suspects.popleft())
            while self.queue and not child.alone and not self.suspects and len(child.tasks) < self.depth:
                self._give(child, self.queue.popleft())
            busy = any(c.tasks for c in self.children)
            if not child.tasks and not self.queue and not self.suspects and not busy:
                self._send(child, "end")

    def _give(self, child: _Child, task: Task) -> None:
        child.tasks.append(task)
        self._tell(child, task)

    def _send(self, child: _Child, word: str) -> None:
        child.ended = True
        self._tell(child, word)

    def _tell(self, child: _Child, what: Any) -> None:
        with contextlib.suppress(OSError):  # it died this moment, which `_hear` sees next
            child.pipe.send(what)

    def _hear(self, child: _Child) -> None:
        """Take in what a worker said, and see whether it has died."""
        alive = child.process.is_alive()  # asked first: what it said before it died is still in the pipe
        try:
            while child.pipe.poll():
                word, value = child.pipe.recv()
                if word == "ready":
                    child.ready, self.false_starts = True, 0
                elif word == "finished":
                    child.tasks.remove(value)
                    child.alone = False
                elif word == "disk":
                    raise CannotRecord(value)
                else:
                    raise RuntimeError(f"worker {child.name} cannot work: {value}")
        except (EOFError, ConnectionResetError):
            alive = False
        if not alive:
            child.process.join()
            self.children.remove(child)
            child.pipe.close()
            self._bury(child)

    def _bury(self, child: _Child) -> None:
        """A worker is gone. Unless that was the plan, put back its tasks and start another one in its place."""
        if child.ended:
            return
        code = child.process.exitcode
        if not child.ready:
            self.false_starts += 1
            if self.false_starts >= FALSE_STARTS:
                raise RuntimeError(
                    f"worker {child.name} died while it started, {_how(code)}, and so did the one before it; "
                    "there may not be enough memory for so many workers"
                )
        # each sample of its tasks may be what killed it; what it recorded before is not done again
        recorded = self.recorded.units()
        left = [without(task, recorded, self.dataset, self.job.variants) for task in child.tasks]
        for task in (one for several in left for one in several.alone()):
            ((index, _),) = task.todo
            self.deaths[index] += child.alone
            if self.deaths[index] >= self.job.pace.restarts:
                give_up(self.job, self.dataset, task, f"{self.deaths[index]} times, {_how(code)}")
            else:
                self.suspects.append(task)
        if not self.stop() and (self.queue or self.suspects or any(c.tasks for c in self.children)):
            self._start(child.name)


def give_up(job: Job, dataset: Any, task: Task, how: str) -> None:
    """Record the samples of a task as failed, because their worker died."""
    why = f"the worker died while it had this sample alone, {how}"
    with RowWriter(Path(job.out), "parent") as writer:
        writer.append(
            [
                unit_row(index, dataset[index], job.variants[i]) | {"status": FAILED, "stage": "worker", "reason": why}
                for index, positions in task.todo
                for i in positions
            ]
        )


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"by {signal.Signals(-code).name}"
        except ValueError:
            return f"by signal {-code}"
    return f"with exit code {code}"


# ---------------------------------------------------------------- in the worker process


class _Inbox:
    """The tasks that the parent sends, as a `Source`. The thread that listens also notices that the parent is gone."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._queue, self.stopped = pipe, queue.Queue[Any](), False
        threading.Thread(target=self._listen, daemon=True, name="mmeff-inbox").start()

    def _listen(self) -> None:
        while True:
            try:
                word = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(
                    ORPHANED
                )  # killed from outside: what is in flight will be done again by the run that continues
            if word == "stop":
                self.stopped = True
            self._queue.put(word)

    def get(self, block: bool) -> Task | None:
        while True:
            if self.stopped:
                raise StopIteration
            try:
                word = self._queue.get(block, timeout=0.2)
            except queue.Empty:
                if block:
                    continue
                return None
            if isinstance(word, Task):
                return word
            if word in ("end", "stop"):
                raise StopIteration


def serve(values: dict[str, Any], name: str, number: int, pipe: Connection) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what it means
    inbox = _Inbox(pipe)
    signal.signal(signal.SIGTERM, lambda *_: setattr(inbox, "stopped", True))
    try:
        job = Job.from_dict(values)
        take_a_device(number)
        limit_threads(job.pace.threads)
        model, dataset = job.model.build(), job.dataset.build()
        with RowWriter(Path(job.out), name) as writer:
            worker = Worker(
                job, model, dataset, writer,
                stop=lambda: inbox.stopped, finished=lambda task: pipe.send(("finished", task)),
            )  # fmt: skip
            pipe.send(("ready", None))
            worker.run(inbox)
    except CannotRecord as error:
        pipe.send(("disk", str(error)))
    except Exception as error:  # a model that cannot be loaded, a folder that is gone: the parent tells the user
        pipe.send(("error", reason(error)))
    pipe.close()


def take_a_device(number: int) -> None:
    """Give each worker of a machine its own GPU, in turn, where there are several. Must come before CUDA is used."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:  # counted without PyTorch, which takes seconds to load
        names = [str(i) for i in range(len([p for p in Path("/dev").glob("nvidia*") if p.name[6:].isdigit()]))]
    else:
        names = [name for name in visible.split(",") if name]
    if len(names) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]


def limit_threads(threads: int | None) -> None:
    """Keep workers on one machine from taking each other's cores."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
