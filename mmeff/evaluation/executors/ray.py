"""Actors of a Ray cluster, through Ray Data: a pool that grows and shrinks with the cluster, and replaces actors that die.

Ray starts in this process when no address is given; with one, the cluster of that address does the work. The folder of the run
must be reachable under the same path from every node, for actors write their rows into it as workers of any executor do.
Ray's own object store carries task numbers only.

A sample that kills its actor is tried again by Ray, then alone, and is recorded as failed if it kills that one too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmeff.errors import BackendUnavailable
from mmeff.evaluation.executors import Crew
from mmeff.evaluation.executors.local import give_up, limit_threads
from mmeff.evaluation.prefetch import ListSource
from mmeff.evaluation.rows import CannotRecord, Recorded, RowWriter
from mmeff.evaluation.runner import Worker, reason, without
from mmeff.evaluation.units import Job, Task

STOP = ".stop"  # a file in the folder of the run; while it is there, actors finish the unit in flight and take no other
BLOCK = 8  # tasks that an actor gets at a time: within them reading overlaps with the model


def execute(
    job: Job, dataset: Any, tasks: list[Task], crew: Crew, *, stop: Callable[[], bool], tick: Callable[[], None]
) -> None:
    """Run tasks in up to `crew.workers` actors.

    Raises:
        BackendUnavailable: the package ray is not installed. CannotRecord: the folder takes no more results.
        RuntimeError: actors cannot work, for the reason in the message. ConnectionError: no cluster at the address.
    """
    ray = connect(crew)
    folder = Path(job.out)
    recorded = Recorded(folder)
    (folder / STOP).unlink(missing_ok=True)
    left, over = tasks, threading.Event()
    watch = threading.Thread(target=_watch, args=(folder / STOP, stop, tick, over), daemon=True)
    watch.start()
    try:
        for block in (BLOCK, 1):  # what is left after the first turn died with its actor, so now each sample goes alone
            _map(ray, job, left, crew, block)
            done = recorded.units()
            left = [one for task in left for one in without(task, done, dataset, job.variants).alone()]
            if not left or stop():
                return
        for task in left:
            give_up(job, dataset, task, f"in {job.pace.restarts} actors")
    finally:
        over.set()
        watch.join()
        (folder / STOP).unlink(missing_ok=True)
        if not crew.address:
            ray.shutdown()


def connect(crew: Crew) -> Any:
    """Start Ray in this process, or join the cluster at `crew.address`.

    Raises: BackendUnavailable: ray is not installed. ConnectionError: nothing answers at the address.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendUnavailable(
            f"the ray executor needs the package ray ({error}); pip install 'mmeff[ray]', or use --executor local"
        ) from error
    if ray.is_initialized():
        return ray
    # actors must find what this process can import, also what is not installed
    installed = (sys.prefix, sys.base_prefix)
    paths = os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path and not path.startswith(installed))
    options: dict[str, Any] = {
        "logging_level": logging.ERROR, "log_to_driver": False, "runtime_env": {"env_vars": {"PYTHONPATH": paths}}
    }  # fmt: skip
    if not crew.address:
        # a worker that waits for its disk and a worker that computes may share a core, so there is a slot for every actor
        ray.init(num_cpus=max(os.cpu_count() or 1, crew.workers + 1), include_dashboard=False, **options)
        return ray
    try:
        ray.init(address=crew.address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"no Ray cluster can be joined at {crew.address}: {str(error).splitlines()[0]}; see `ray status` on its head node"
        ) from error
    return ray


def _watch(flag: Path, stop: Callable[[], bool], tick: Callable[[], None], over: threading.Event) -> None:
    """Show the progress, and hand a wish to stop on to the actors, while the main thread waits for Ray."""
    while not over.wait(0.2):
        tick()
        if stop():
            flag.touch()


def _map(ray: Any, job: Job, tasks: list[Task], crew: Crew, block: int) -> None:
    """One pass over tasks with a pool of actors. Blocks whose actors died again and again are left out."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # why a sample failed is in the rows
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.enable_progress_bars = False
    workers = max(1, min(crew.workers, len(tasks)))
    rows = [{"task": json.dumps([t.number, t.todo])} for t in tasks]
    blocks = max(min(workers, len(rows)), -(-len(rows) // block))
    # Ray retries without end unless it is told otherwise, and a sample that kills its actor would be retried for ever. It wants
    # to rename how it is told, but has no other name yet.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")
        mapped = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Actor,
            fn_constructor_args=(job.to_dict(),),
            batch_size=None,  # a block at a time
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=workers,
                initial_size=workers,
                # a block that waits for an actor when that dies is lost with it
                max_tasks_in_flight_per_actor=1 if block == 1 else None,
            ),
            num_cpus=1,
            num_gpus=crew.gpus,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": job.pace.restarts - 1},
        )
    for batch in mapped.iter_batches(batch_size=None, prefetch_batches=0):
        for kind, text in zip(batch["problem"], batch["text"], strict=True):
            if kind:
                raise (CannotRecord if kind == "disk" else RuntimeError)(str(text))


class _Actor:
    """A worker inside an actor."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.problem: tuple[str, str] | None = None
        try:
            self.job = Job.from_dict(values)
            limit_threads(self.job.pace.threads)
            self.model, self.dataset = self.job.model.build(), self.job.dataset.build()
            self.recorded = Recorded(Path(self.job.out), before=True)
            self.writer = RowWriter(Path(self.job.out), f"ray-{os.getpid()}-{time.time_ns()}")
        except CannotRecord as error:
            self.problem = ("disk", str(error))
        except Exception as error:  # Ray would start the actor again and again
            self.problem = ("error", f"a Ray actor cannot work: {reason(error)}")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        if self.problem is None:
            try:
                self._work(batch)
            except CannotRecord as error:
                self.problem = ("disk", str(error))
        kind, text = self.problem or ("", "")
        return {"problem": [kind], "text": [text]}

    def _work(self, batch: dict[str, Any]) -> None:
        recorded = self.recorded.units()  # an actor that died may have done a part of this block
        tasks = []
        for number, todo in map(json.loads, batch["task"]):
            task = Task(number, tuple((index, tuple(left)) for index, left in todo))
            tasks.append(without(task, recorded, self.dataset, self.job.variants))
        flag = Path(self.job.out) / STOP
        worker = Worker(self.job, self.model, self.dataset, self.writer, stop=flag.exists)
        worker.run(ListSource([task for task in tasks if task.todo]))
