"""Timing two sides alternately in one process, so that whatever else the machine does hits both alike."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .workloads import Contender

Run = Callable[[], object]

WARM_UP = 2  # calls of each side before anything counts
LEAST_ROUNDS, MOST_ROUNDS = 5, 25
# A measurement lasts at least so long, in calls without a gap, so that the clock and the launch do not matter.
LEAST_SECONDS = {"cpu": 0.02, "cuda": 0.005}
# Calls on a GPU that are shorter are replayed from a graph: Python's own time would hide them.
GRAPH_BELOW = 1e-3


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, _, _, high = statistics.quantiles(values, n=5, method="inclusive")
        return cls(low, statistics.median(values), high)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of both sides, and the ratio peer / ours, paired round by round."""

    ours: Spread
    peer: Spread
    ratio: Spread
    rounds: int
    calls: tuple[int, int]  # in one measurement, of ours and of the peer
    clock: str
    ours_bytes: int | None  # peak memory of a call beyond what was there before
    peer_bytes: int | None


@dataclass(frozen=True)
class Side:
    """What is run for one measurement: `repeats` times in a row, each holding `calls` calls."""

    run: Run
    repeats: int
    calls: int


def runnable(contender: Contender, direction: str) -> Run:
    """Return what is timed: the forward call, the gradients of a kept one, or both."""
    forward, leaves = contender.forward, contender.leaves
    if direction == "forward":

        def run() -> object:
            with torch.no_grad():
                return forward()

        return run
    if direction == "backward":
        out = forward()
        gradient = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)
    with torch.no_grad():
        gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, gradient)


def compare(ours: Run, peer: Run, device: torch.device, *, seconds: float, graphs: bool) -> Timing:
    """Time two sides in turn: ours first in even rounds, the peer first in odd ones.

    Args:
        seconds: after which no round is started, once there are LEAST_ROUNDS.
        graphs: whether short calls may be captured into a CUDA graph.
    """
    for run in (ours, peer):
        for _ in range(WARM_UP):
            run()
    estimates = [_seconds(run, 1, device) for run in (ours, peer)]
    calls = [max(1, math.ceil(LEAST_SECONDS[device.type] / max(e, 1e-7))) for e in estimates]
    memory = [_peak_memory(run, device) for run in (ours, peer)]
    clock = "perf_counter" if device.type == "cpu" else "events"
    sides = [Side(run, n, 1) for run, n in zip((ours, peer), calls, strict=True)]
    if device.type == "cuda" and graphs and min(estimates) < GRAPH_BELOW:
        try:
            sides = [Side(_captured(side.run, side.repeats), 1, side.repeats) for side in sides]
            clock = "events around graphs"
        except RuntimeError as error:  # a call that waits for the device: both sides are then timed as they are called
            clock = f"events, because no graph could be captured: {str(error).splitlines()[0][:120]}"
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < LEAST_ROUNDS or (len(times[0]) < MOST_ROUNDS and time.perf_counter() - start < seconds):
        first = len(times[0]) % 2
        for i in (first, 1 - first):
            times[i].append(_seconds(sides[i].run, sides[i].repeats, device) / sides[i].calls)
    ratios = [theirs / mine for mine, theirs in zip(*times, strict=True)]
    return Timing(
        Spread.of(times[0]), Spread.of(times[1]), Spread.of(ratios), len(ratios), (calls[0], calls[1]), clock, *memory
    )


def _seconds(run: Run, repeats: int, device: torch.device) -> float:
    """Seconds of one run, from so many in a row."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _captured(run: Run, calls: int) -> Run:
    """Return the replay of a CUDA graph that holds so many calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    replay: Run = graph.replay
    replay()
    return replay


def _peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that a warm call needs at its peak beyond those before it; None where nobody can tell.

    On a GPU from PyTorch's allocator. On Linux from the resident set. Neither counts buffers that a backend
    keeps between calls.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds would be used again without a trace
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the resident set back to its present size
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):  # not Linux with glibc, or not allowed
        return None


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
