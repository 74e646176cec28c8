"""Run a suite: gate, then time, every backend of every case against every peer; one row each, kept as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmeff.errors import BackendUnavailable
from mmeff.kernels import record

from . import peers, results, workloads
from .cases import Case, Unavailable
from .gate import Errors, Gate
from .results import Machine, Row
from .timing import compare, runnable
from .workloads import Contender, Workload

# Seconds that the rounds of one pair may take, once it has the fewest: enough for a steady median.
PAIR_SECONDS = {"cpu": 8.0, "cuda": 2.0}

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run a suite.

    seconds: after which no pair is started; a pair is not started either when one as long as the longest so far would end
    later. flex: whether FlexAttention is among the peers. again: measure what the file already holds.
    """

    out: Path
    seconds: float | None = None
    pair_seconds: float | None = None
    flex: bool = False
    again: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run did: the rows it added, pairs that the file already had, and pairs that the time did not reach."""

    rows: list[Row]
    done_before: int
    left: int


def run(cases: list[Case], machine: Machine, options: Options, tick: Tick) -> Outcome:
    """Run the cases, and append a row for each pair of a backend and a peer.

    Raises: GateFailed if a backend is wrong; rows of the cases before it are on disk.
    """
    kept = results.latest(results.read(options.out))
    done = set() if options.again else {r.key for r in kept if r.status == "measured"}
    skipped = {(r.key, r.reason) for r in kept if r.status == "skipped"}
    todo = [(case, _pairs(case, options.flex)) for case in cases]
    total = sum(len(pairs) for _, pairs in todo)
    keys = {(c.name, b, p): results.row(machine, c, b, p, reason="").key for c, pairs in todo for b, p in pairs}
    clock = _Budget(options.seconds)
    rows: list[Row] = []
    before = left = finished = 0
    for case, pairs in todo:
        wanted = [pair for pair in pairs if keys[case.name, *pair] not in done]
        before += len(pairs) - len(wanted)
        finished += len(pairs) - len(wanted)
        if wanted and not clock.has_time():
            left += len(wanted)
            continue
        made = 0
        say = partial(_say, tick, finished, total)
        for row in _rows(case, wanted, machine, options, clock, say):
            made += 1
            rows.append(row)
            if row.status == "measured" or (row.key, row.reason) not in skipped:
                results.append(options.out, row)
        finished += made
        left += len(wanted) - made
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    return Outcome(rows, before, left)


def _say(tick: Tick, before: int, total: int, what: str, done: int) -> None:
    tick(what, before + done, total)


def _pairs(case: Case, flex: bool) -> list[tuple[str, str]]:
    chosen = [p for p in case.peers if flex or p not in peers.SPARSE]
    return [(backend, peer) for backend in case.backends for peer in chosen]


class _Budget:
    """The time of a whole run."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._longest = 0.0

    def has_time(self) -> bool:
        """Whether another pair as long as the longest so far would end in time."""
        return self._end is None or time.monotonic() + self._longest < self._end

    def spent(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)


def _rows(
    case: Case, pairs: list[tuple[str, str]], machine: Machine, options: Options, clock: _Budget,
    say: Callable[[str, int], None],
) -> Iterator[Row]:  # fmt: skip
    """Yield a row per pair while there is time."""
    if not pairs:
        return
    say(f"{case.name}: tensors", 0)
    try:
        bench = _Bench(workloads.build(case, machine.device), options)
    except Unavailable as error:
        yield from (results.row(machine, case, *pair, reason=str(error)) for pair in pairs)
        return
    for i, (backend, peer) in enumerate(pairs):
        if not clock.has_time():
            return
        say(f"{backend} / {peer}: {case.name}", i)
        start = time.monotonic()
        try:
            row = results.row(machine, case, backend, peer, **bench.figures(backend, peer))
        except (Unavailable, BackendUnavailable) as error:
            row = results.row(machine, case, backend, peer, reason=str(error))
        except torch.OutOfMemoryError:
            row = results.row(machine, case, backend, peer, reason="out of memory")
        clock.spent(time.monotonic() - start)
        yield row


class _Bench:
    """One case on its device: gates each side once, then times pairs."""

    def __init__(self, work: Workload, options: Options) -> None:
        self.work, self.options = work, options
        self.gate = Gate(work)
        self._ours: dict[str, tuple[Contender, Errors, str | None]] = {}
        self._peers: dict[str, Contender] = {}

    def figures(self, backend: str, peer: str) -> dict[str, Any]:
        """Return the figures of a row. Raises Unavailable, BackendUnavailable or GateFailed."""
        work = self.work
        ours, errors, ran = self._gated(backend)
        theirs = self._ready(peer)
        kind = work.device.type
        timing = compare(
            runnable(ours, work.case.direction), runnable(theirs, work.case.direction), work.device,
            seconds=self.options.pair_seconds or PAIR_SECONDS[kind], graphs=work.case.direction == "forward",
        )  # fmt: skip
        return results.figures(work, timing, errors, ran)

    def _gated(self, backend: str) -> tuple[Contender, Errors, str | None]:
        if backend not in self._ours:
            contender = self.work.ours(backend)
            with record() as calls:
                errors = self.gate.check(contender, f"backend {backend!r}")
            ran = next((c.backend for c in calls if c.operator == self.work.case.operator), None)
            self._ours[backend] = contender, errors, ran
        return self._ours[backend]

    def _ready(self, peer: str) -> Contender:
        if peer not in self._peers:
            contender = self.work.peer(peer)
            try:
                if self.work.peer_is_equal(peer):
                    self.gate.check_peer(contender, peer)
                runnable(contender, self.work.case.direction)()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # no such kernel for this problem, or it does not compile
                raise Unavailable(f"{peer} does not run: {str(error).strip().splitlines()[0][:200]}") from None
            self._peers[peer] = contender
        return self._peers[peer]
