"""Who does the work: processes on this machine, the ranks that torchrun started, or actors of a Ray cluster.

Every executor runs the same `Worker` on the same units and writes the same rows, so what comes out does not depend on which
one ran. None needs collectives or a barrier: the folder of the run is all that workers share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from mmeff.errors import suggest
from mmeff.evaluation.units import Job, Task

EXECUTORS = ("local", "torchrun", "ray")


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Who shall do the work. `workers` processes, or actors; 0 is this process. `address` of a Ray cluster; empty starts Ray in
    this process. `gpus` that each Ray actor asks for."""

    workers: int = 1
    address: str = ""
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if type(self.workers) is not int or self.workers < 0:
            raise ValueError(f"workers must be an integer >= 0, got {self.workers!r}; 0 works in this process")


class Executor(Protocol):
    """Runs tasks to their end, or until `stop` says so; rows appear in the folder of the run while it does."""

    def __call__(
        self,
        job: Job,
        dataset: Any,
        tasks: list[Task],
        crew: Crew,
        *,
        stop: Callable[[], bool],
        tick: Callable[[], None],
    ) -> None: ...


def choose(name: str) -> Any:
    """The executor of a name. Raises: ValueError for another name, with near matches."""
    if name not in EXECUTORS:
        raise ValueError(f"no executor is called {name!r}.{suggest(name, EXECUTORS)} Known: {', '.join(EXECUTORS)}.")
    return import_module(f"mmeff.evaluation.executors.{name}").execute
