"""The ranks that torchrun, accelerate or a cluster's own launcher started: each takes its share, and they need not meet.

    torchrun --nproc-per-node 8 -m mmeff eval ... --executor torchrun

A rank reads RANK and WORLD_SIZE and runs every batch whose number leaves that remainder. Nothing is gathered and nobody waits
for the slowest, so a rank that is lost costs its share alone; the next run gives that to whoever is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmeff.evaluation.executors import Crew
from mmeff.evaluation.executors.local import limit_threads, take_a_device
from mmeff.evaluation.prefetch import ListSource
from mmeff.evaluation.rows import RowWriter
from mmeff.evaluation.runner import Worker
from mmeff.evaluation.units import Job, Task


def execute(
    job: Job, dataset: Any, tasks: list[Task], crew: Crew, *, stop: Callable[[], bool], tick: Callable[[], None]
) -> None:
    """Run this rank's share of the tasks in this process.

    Raises: ValueError: RANK and WORLD_SIZE are not set, or make no sense. CannotRecord: the folder takes no more results.
    """
    rank, world = place()
    take_a_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit_threads(job.pace.threads)
    mine = [task for task in tasks if task.number % world == rank]
    if not mine:
        return
    model = job.model.build()
    with RowWriter(Path(job.out), f"rank-{rank}") as writer:
        Worker(job, model, dataset, writer, stop=stop, finished=lambda task: tick()).run(ListSource(mine))


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks. Raises: ValueError where the launcher did not say."""
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not all(value.isdigit() for value in given.values()):
        raise ValueError(
            f"the torchrun executor needs RANK and WORLD_SIZE in the environment, got {given}; start it with "
            "`torchrun --nproc-per-node N -m mmeff eval ...`, or use --executor local --workers N"
        )
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    if not rank < world:
        raise ValueError(f"RANK must be below WORLD_SIZE, got RANK={rank} and WORLD_SIZE={world}")
    return rank, world
