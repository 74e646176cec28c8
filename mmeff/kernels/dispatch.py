"""How a kernel operator picks a backend, says why, and leaves a record that a host can report.

A backend answers `why_not(problem)`: None when it can run the problem, otherwise a sentence for the user. With
`backend="auto"` the operator takes the usable backend it expects to be fastest; a backend that the user named runs or
raises, and never gives way to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from ..errors import BackendUnavailable, suggest

P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class Backend(Generic[P]):
    """One implementation of an operator.

    `cost` estimates the time of a problem in units of plain dense attention on the same tensors; auto takes the lowest.
    inf marks a backend that is not meant to be fast.
    """

    name: str
    summary: str  # what it does, for the table and the record
    why_not: Callable[[P], str | None]
    cost: Callable[[P], float]
    run: Callable[[P], Any]


@dataclass(frozen=True)
class Verdict:
    """What one backend says about a problem; a row of an Explanation."""

    backend: str
    usable: bool
    reason: str  # why not, or what auto expects of it
    chosen: bool  # whether backend="auto" takes it


@dataclass(frozen=True)
class Explanation:
    """Which backends can run a problem and which one auto takes; print it, or read `rows` and `chosen`."""

    operator: str
    problem: str
    rows: tuple[Verdict, ...]

    @property
    def chosen(self) -> str | None:
        """The backend that auto takes, or None if none can run the problem."""
        return next((row.backend for row in self.rows if row.chosen), None)

    def __str__(self) -> str:
        table = [("backend", "usable", "auto", "reason")]
        table += [(r.backend, "yes" if r.usable else "no", "<-" if r.chosen else "", r.reason) for r in self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in table]
        return "\n".join([f"{self.operator}: {self.problem}", *lines])


@dataclass(frozen=True)
class Call:
    """One call of a kernel operator, as a recorder saw it."""

    operator: str
    backend: str
    reason: str  # why this backend ran
    count_density: Callable[[], float] | None = field(default=None, repr=False)

    @property
    def density(self) -> float | None:
        """Attended fraction of the query-key pairs, 0 to 1; None for operators that have none.

        Reading it may count pairs and wait for the device.
        """
        return None if self.count_density is None else self.count_density()


_recorders: ContextVar[tuple[list[Call], ...]] = ContextVar("mmeff_kernel_recorders", default=())


@contextmanager
def record() -> Iterator[list[Call]]:
    """Collect every kernel call made inside the block by this thread (or async task) into the list it yields.

    Recorders nest, and each sees all the calls within it. Recomputation in a backward pass is not a call.
    """
    calls: list[Call] = []
    token = _recorders.set((*_recorders.get(), calls))
    try:
        yield calls
    finally:
        _recorders.reset(token)


def note(operator: str, backend: str, reason: str, density: Callable[[], float] | None = None) -> None:
    """Tell the active recorders, if any, that `backend` runs `operator`; `density` is called when it is read."""
    call = Call(operator, backend, reason, density)
    for calls in _recorders.get():
        calls.append(call)


def judge(backends: Sequence[Backend[P]], problem: P) -> tuple[Verdict, ...]:
    """Ask every backend about the problem and mark the one that auto takes."""
    refusals = {b.name: b.why_not(problem) for b in backends}
    costs = {b.name: b.cost(problem) for b in backends if refusals[b.name] is None}
    best = min(costs, key=lambda name: costs[name], default=None)
    rows = []
    for b in backends:
        refusal = refusals[b.name]
        reason = _expectation(b.summary, costs[b.name]) if refusal is None else refusal
        rows.append(Verdict(b.name, refusal is None, reason, b.name == best))
    return tuple(rows)


def _expectation(summary: str, cost: float) -> str:
    if cost == float("inf"):
        return summary
    speed = 1 / cost if cost > 0 else float("inf")
    return f"{summary}; predicted {speed:.2g}x the speed of plain dense attention"


def choose(operator: str, backends: Sequence[Backend[P]], problem: P, name: str) -> tuple[Backend[P], str]:
    """Return the backend to run and the reason for it.

    Raises: ValueError for a name that no backend has, BackendUnavailable when the named one cannot run the problem.
    """
    by_name = {b.name: b for b in backends}
    if name == "auto":
        chosen = next((row for row in judge(backends, problem) if row.chosen), None)
        if chosen is None:
            raise BackendUnavailable(f"{operator}: no backend can run this problem; explain(...) lists the reasons.")
        return by_name[chosen.backend], f"auto: {chosen.reason}"
    if name not in by_name:
        raise ValueError(
            f"{operator}: backend must be 'auto' or one of {', '.join(map(repr, by_name))}, got {name!r}."
            f"{suggest(str(name), by_name)}"
        )
    refusal = by_name[name].why_not(problem)
    if refusal is not None:
        raise BackendUnavailable(
            f"{operator}: backend {name!r} cannot run this problem: {refusal}. Pass backend='auto' to let the library "
            "choose, or see explain(...) for all of them."
        )
    return by_name[name], "named by the caller"


def without_autocast(device: torch.device) -> Any:
    """Return a context in which matrix products keep the dtype they are given.

    Kernels choose their accumulation dtype themselves; under autocast their float32 products would become bfloat16.
    """
    return torch.autocast(device_type=device.type, enabled=False)
