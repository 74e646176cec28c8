"""The loop of a worker: samples are read ahead, the model runs every variant on them, and each unit is recorded when it is done.

A failure is a result: it is recorded with its reason, and the loop goes on. Memory that runs out halves the batch. A disk
that is full stops the loop, for no result could be kept. What goes wrong with a batch is put down to a sample by running each
one alone.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmeff.evaluation.comparison import slug
from mmeff.evaluation.prefetch import Prefetch, Read, Source
from mmeff.evaluation.rows import DONE, FAILED, RowWriter, explained, output_problem
from mmeff.evaluation.units import Job, Model, Outcome, Prepared, Task, Variant, digest
from mmeff.report import environment
from mmeff.video_io import write

ARTIFACTS = "artifacts"
Item = tuple[int, tuple[int, ...]]  # a sample's index, and the variants that it still needs
Ready = tuple[Any, Prepared]  # a sample, and what `prepare` made of it
Reads = list[Read[Item, Ready]]


class Worker:
    """Runs tasks one after another and records what comes of them.

    Args:
        job: what to run. model, dataset: as the job builds them. writer: the worker's own file of rows.
        stop: asked between units; once it is true the unit in flight is finished and the loop ends.
        finished: called with each task whose units are all recorded.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        dataset: Any,
        writer: RowWriter,
        *,
        stop: Callable[[], bool] = lambda: False,
        finished: Callable[[Task], None] = lambda task: None,
    ) -> None:
        self.job, self.model, self.dataset, self.writer = job, model, dataset, writer
        self.stop, self.finished = stop, finished
        self.folder = Path(job.out)
        self._batch = {v.hash: job.pace.batch for v in job.variants}
        self._warm: set[str] = set()

    def run(self, source: Source[Task]) -> None:
        """Work until the source ends or `stop` says so.

        Raises: CannotRecord: the folder takes no more results.
        """
        pace = self.job.pace
        self.writer.append([{"kind": "session", "pid": os.getpid(), "environment": environment()}])
        ahead: Prefetch[Task, Item, Ready] = Prefetch(
            source, lambda task: list(task.todo), self._prepare,
            depth=max(pace.prefetch, pace.batch), readers=pace.readers, timeout=pace.read_timeout,
        )  # fmt: skip
        while not self.stop() and (taken := ahead.take(self.stop)) is not None:
            self._work(*taken)

    def _prepare(self, item: Item) -> Ready:
        sample = self.dataset[item[0]]
        return sample, self.model.prepare(sample)

    def _work(self, task: Task, reads: Reads) -> None:
        """All variants of the samples of a task."""
        for read in reads:
            if read.error is not None:
                self._lost(read)
        good = [read for read in reads if read.error is None]
        for position, variant in enumerate(self.job.variants):
            todo = [read for read in good if position in read.item[1]]
            while todo:
                if self.stop():
                    return
                size = self._batch[variant.hash]
                self._run(variant, todo[:size])
                todo = todo[size:]
        self.finished(task)

    def _run(self, variant: Variant, reads: Reads) -> None:
        """Run one variant on one batch, in smaller ones if it must be, and record it."""
        ready = [read.value for read in reads if read.value is not None]
        began, failure, memory, outcomes = time.perf_counter(), "", False, []
        try:
            outcomes = list(self.model.run([prepared for _, prepared in ready], variant.methods))
            if len(outcomes) != len(ready):
                raise RuntimeError(f"the model gave {len(outcomes)} outcomes for {len(ready)} samples")
        except Exception as error:  # whatever a model raises is a result of its unit; a full disk is not
            self._disk(error)
            failure, memory = reason(error), out_of_memory(error)
        # only now is the error gone, and with its frames the tensors that it held
        if memory:
            release_memory()
        if failure and len(reads) > 1:
            if memory:
                self._batch[variant.hash] = size = max(1, len(reads) // 2)
            else:
                size = 1
            for i in range(0, len(reads), size):
                if not self.stop():
                    self._run(variant, reads[i : i + size])
            return
        seconds = (time.perf_counter() - began) / len(reads)
        cold = variant.hash not in self._warm
        rows = []
        for i, read in enumerate(reads):
            row = self._row(read, variant) | {
                "batch": len(reads), "cold": cold, "seconds": {"read": read.seconds, "model": seconds}
            }  # fmt: skip
            if failure:
                row |= {"status": FAILED, "stage": "model", "reason": failure}
            else:
                row |= self._outcome(outcomes[i], ready[i][0], variant, row["seconds"])
            rows.append(row)
        self._warm.add(variant.hash)
        self.writer.append(rows)

    def _outcome(self, outcome: Outcome, sample: Any, variant: Variant, seconds: dict[str, float]) -> dict[str, Any]:
        """The part of a row that tells what came out; a video goes into a file of its own first."""
        row: dict[str, Any] = {
            "status": DONE, "tokens": outcome.tokens, "report": outcome.report, "seconds": {**seconds, **outcome.seconds}
        }  # fmt: skip
        if outcome.video is None and outcome.text is None:
            return row | {"status": FAILED, "stage": "model", "reason": "the model gave neither text nor video"}
        if outcome.text is not None:
            row["answer"] = outcome.text
        if outcome.video is not None:
            try:
                path = self.folder / artifact_name(sample.id, variant)
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, outcome.video, fps=outcome.fps)
                sync(path)  # before the row that speaks of it
            except Exception as error:
                self._disk(error)
                return row | {"status": FAILED, "stage": "artifact", "reason": reason(error)}
            row["artifact"] = path.relative_to(self.folder).as_posix()
            row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        return row

    def _lost(self, read: Read[Item, Ready]) -> None:
        """Record a sample that could not be read, for all of its variants."""
        error = read.error
        assert error is not None
        self._disk(error)
        if not isinstance(error, Exception):
            raise error
        self.writer.append(
            [
                self._row(read, self.job.variants[i])
                | {"status": FAILED, "stage": "read", "reason": reason(error), "seconds": {"read": read.seconds}}
                for i in read.item[1]
            ]
        )

    def _row(self, read: Read[Item, Ready], variant: Variant) -> dict[str, Any]:
        if read.value is not None:
            sample, prepared = read.value
            return unit_row(read.item[0], sample, variant) | {"frames": list(prepared.frames)}
        return unit_row(read.item[0], self.dataset[read.item[0]], variant)

    def _disk(self, error: BaseException) -> None:
        """Raise CannotRecord if the error is one of the disk, and not of a sample."""
        problem = output_problem(error)
        if problem is not None:
            raise explained(problem, self.folder) from error


def unit_row(index: int, sample: Any, variant: Variant) -> dict[str, Any]:
    """The part of a row that says which unit it is and what was asked."""
    return {
        "kind": "unit", "index": index, "sample": sample.id, "method": variant.name, "hash": variant.hash,
        "task": sample.task, "category": sample.category, "prompt": sample.prompt, "expected": sample.answer,
        "options": list(sample.options),
    }  # fmt: skip


def artifact_name(sample_id: str, variant: Variant) -> str:
    """Where the video of a unit lies in the folder of its run; distinct for distinct units, whatever characters an id holds."""
    name = slug(sample_id).strip(".")[:80]
    if name != sample_id:
        name = f"{name}-{digest(sample_id)[:8]}"
    return f"{ARTIFACTS}/{slug(variant.name)}-{variant.hash[:6]}/{name}.mp4"


def pending(dataset: Any, variants: Sequence[Variant], finished: set[tuple[str, str]], batch: int = 1) -> list[Task]:
    """The tasks that are left.

    Args: finished: units, as (sample id, hash), that are not to be run. batch: samples of a task.
    """
    everything = tuple(range(len(variants)))
    starts = range(0, len(dataset), batch)
    whole = (
        Task(number, tuple((i, everything) for i in range(start, min(start + batch, len(dataset)))))
        for number, start in enumerate(starts)
    )
    left = (without(task, finished, dataset, variants) for task in whole)
    return [task for task in left if task.todo]


def without(task: Task, finished: set[tuple[str, str]], dataset: Any, variants: Sequence[Variant]) -> Task:
    """A task without the units that are finished."""
    todo = []
    for index, positions in task.todo:
        name = dataset[index].id
        left = tuple(i for i in positions if (name, variants[i].hash) not in finished)
        if left:
            todo.append((index, left))
    return Task(task.number, tuple(todo))


def reason(error: BaseException) -> str:
    """An error in one line, without addresses and ids, which differ from run to run."""
    text = " ".join(str(error).split()) or "no message"
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", f"{type(error).__name__}: {text}")[:1000]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or of the process."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    )


def release_memory() -> None:
    """Give back what a failed batch left behind."""
    gc.collect()
    torch = sys.modules.get("torch")  # a model that never loaded it has nothing on a GPU
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def sync(path: Path) -> None:
    """Wait until the disk has a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
