"""What ran and what would run: the recorder that a handle fills, the report read from it, and the plan made before a run.

Measured, predicted and quoted figures never share a column: a `Report` holds only what happened, a `Plan` only what
would happen.
"""

from __future__ import annotations

import copy
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# How a call of an accelerated layer was served.
SPARSE, FULL, DENSE = "sparse", "full", "dense"


class Span:
    """A stretch of time that belongs to `name`.

    share: what of it counts, and may be set until the report is made; a negative share is taken off the span around it.
    """

    def __init__(self, name: str, device: Any) -> None:
        self.name, self.share = name, 1.0
        self._events: tuple[Any, Any] | None = None
        if getattr(device, "type", None) == "cuda":
            import torch

            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._began = time.perf_counter()

    def end(self) -> None:
        """Close it."""
        if self._events is not None:
            self._events[1].record()
        self._ended = time.perf_counter()

    def seconds(self) -> float:
        """How long it was; waits for outstanding CUDA events."""
        if self._events is None:
            return self._ended - self._began
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000


@dataclass(frozen=True)
class TokenPlaces:
    """Where the visual tokens of the last prompt lie in its pictures, by the positions that `Report.kept` names.

    picture: (B, V) which image of the row, or which frame of its videos, as the model merges them, from 0; -1 where a row has
    fewer tokens. box: (B, V, 4) left, top, right, bottom in shares of the picture as the model was given it: scaled, and
    where its processor cuts out the middle, of that; NaN where a token's place cannot be told. tile: (B, V) bool, tokens of
    parts of a picture that the model also sees whole.
    """

    picture: Any
    box: Any
    tile: Any


class Recorder:
    """Counters and clocks of one handle. Hosts call it while the model runs; it never synchronises a device in the loop."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything that ran."""
        self.calls: dict[int, Counter[str]] = defaultdict(Counter)
        self.steps: dict[int, Counter[str]] = defaultdict(Counter)
        self.densities: dict[int, list[float]] = defaultdict(list)
        self.fallbacks: Counter[str] = Counter()
        self.remarks: dict[str, None] = {}  # in order, each once
        self.backends: Counter[str] = Counter()
        self.forwards = 0
        self.kept: dict[int, Any] = {}
        self.places: TokenPlaces | None = None
        self.tokens: dict[str, Any] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._spans: dict[str, int] = defaultdict(int)
        self._ended: list[Span] = []

    def call(
        self,
        layer: int,
        kind: str,
        *,
        step: int | None = None,
        density: float | None = None,
        backend: str | None = None,
    ) -> None:
        """One call of one layer: `sparse` (the method acted), `full` (its layout attends everything), or `dense` (the
        schedule or a fallback)."""
        self.calls[layer][kind] += 1
        if step is not None:
            self.steps[step][kind] += 1
        if density is not None:
            self.densities[layer].append(density)
        if backend is not None:
            self.backends[backend] += 1

    def remark(self, text: str) -> None:
        """Something worth knowing about what ran, said once."""
        self.remarks[text] = None

    def fallback(self, reason: str) -> None:
        """The model ran dense where the method was meant to act."""
        self.fallbacks[reason] += 1

    @contextmanager
    def time(self, name: str, device: Any = None) -> Iterator[Span]:
        """Add the span to `seconds[name]`; on a CUDA device through events that are read when the report is made."""
        span = Span(name, device)
        try:
            yield span
        finally:
            span.end()
            self._ended.append(span)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add a span that the caller timed."""
        self._seconds[name] += seconds
        self._spans[name] += 1

    def seconds(self) -> dict[str, float]:
        """Total seconds per span name. Waits for outstanding CUDA events."""
        for span in self._ended:
            self._seconds[span.name] += span.share * span.seconds()
            self._spans[span.name] += span.share > 0
        self._ended.clear()
        return dict(self._seconds)

    def spans(self) -> dict[str, int]:
        """How many spans each total in `seconds` adds up."""
        self.seconds()
        return dict(self._spans)

    def total(self, kind: str) -> int:
        """Calls of one kind over all layers."""
        return sum(counter[kind] for counter in self.calls.values())


@dataclass(frozen=True, kw_only=True)
class Report:
    """What really ran under a handle.

    Fields: `method` the resolved config; `model` and `host` what it ran on; `note` what the reader must know about the model
    (a tiny or random one); `calls` totals by kind; `layers` per-layer calls and mean density; `steps` per-step calls;
    `kept[layer]` the original visual positions (B, K) of the last prompt that survive from that layer on, counted within the
    row's visual tokens, -1 where a row kept fewer than K; `places` where they lie in its pictures, see `TokenPlaces`;
    `tokens` counts; `seconds` and `spans` per phase; `fallbacks` reasons with counts; `remarks` what else is worth knowing; `environment` versions and hardware.
    """

    method: dict[str, Any]
    model: str
    host: str
    note: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    steps: dict[int, dict[str, int]] = field(default_factory=dict)
    density: float | None = None
    kept: dict[int, Any] = field(default_factory=dict)
    places: TokenPlaces | None = None
    tokens: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    spans: dict[str, int] = field(default_factory=dict)
    backends: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def accelerated(self) -> int:
        """Calls in which the method acted."""
        return self.calls.get(SPARSE, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `kept` as nested lists, without `places`."""
        names = self.__dataclass_fields__.keys() - {"kept", "places"}
        plain = {name: copy.deepcopy(getattr(self, name)) for name in self.__dataclass_fields__ if name in names}
        plain["remarks"] = list(self.remarks)
        plain["kept"] = {str(k): v.tolist() for k, v in self.kept.items()}
        plain["layers"] = {str(k): v for k, v in self.layers.items()}
        plain["steps"] = {str(k): v for k, v in self.steps.items()}
        return plain

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.method.items() if k != "method")
        lines = [f"{self.method['method']}({settings})", f"  on {self.model} through the {self.host} host"]
        if self.note:
            lines.append(f"  note: {self.note}")
        total = sum(self.calls.values())
        if not total:
            lines.append("  nothing has run yet")
        else:
            parts = ", ".join(f"{n} {kind}" for kind, n in self.calls.items() if n)
            lines.append(f"  layer calls: {parts} (of {total})")
        if self.density is not None:
            lines.append(f"  mean density where the method acted: {self.density:.3f}")
        for name, value in self.tokens.items():
            lines.append(f"  {name.replace('_', ' ')}: {value}")
        if self.backends:
            lines.append("  backends: " + ", ".join(f"{k} x{v}" for k, v in self.backends.items()))
        for name, seconds in self.seconds.items():
            lines.append(f"  {name}: {seconds:.3f} s in {self.spans.get(name, 0)} calls")
        lines += [f"  remark: {text}" for text in self.remarks]
        for reason, count in self.fallbacks.items():
            lines.append(f"  fell back to dense x{count}: {reason}")
        return "\n".join(lines)


def make_report(recorder: Recorder, *, method: dict[str, Any], model: str, host: str, note: str = "") -> Report:
    """Freeze a recorder into a report."""
    layers = {}
    for layer in sorted(recorder.calls):
        densities = [float(d) for d in recorder.densities.get(layer, [])]
        layers[layer] = {
            **dict(recorder.calls[layer]),
            **({"density": sum(densities) / len(densities)} if densities else {}),
        }
    every = [float(d) for values in recorder.densities.values() for d in values]
    return Report(
        method=method,
        model=model,
        host=host,
        note=note,
        calls={kind: recorder.total(kind) for kind in (SPARSE, FULL, DENSE)} if recorder.calls else {},
        layers=layers,
        steps={step: dict(counter) for step, counter in sorted(recorder.steps.items())},
        density=sum(every) / len(every) if every else None,
        kept=dict(recorder.kept),
        places=recorder.places,
        tokens=dict(recorder.tokens),
        seconds=recorder.seconds(),
        spans=recorder.spans(),
        backends=dict(recorder.backends),
        fallbacks=dict(recorder.fallbacks),
        remarks=tuple(recorder.remarks),
        environment=environment(),
    )


def environment() -> dict[str, str]:
    """Versions and hardware, for every figure that leaves this library."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("mmeff", "torch", "transformers", "diffusers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["cpu"] = _cpu_name()
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = str(torch.get_num_threads())
        if torch.cuda.is_initialized():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    import os

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: platform's own name stands
    return f"{name}, {os.cpu_count()} cores"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A dry run: what a method would do to a model at given sizes, and every reason why part of it would run dense.

    `rows` are (name, value) pairs for people; the named figures are for programs. `predicted_speedup` of the whole run and
    `predicted_attention`, of its attention where the method acts, are a model's estimates, never measurements.
    """

    method: dict[str, Any]
    model: str
    host: str
    rows: tuple[tuple[str, str], ...]
    density: float | None = None
    predicted_speedup: float | None = None
    predicted_attention: float | None = None
    fallbacks: tuple[str, ...] = ()
    layouts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the layouts."""
        return {
            "method": self.method, "model": self.model, "host": self.host, "rows": [list(r) for r in self.rows],
            "density": self.density, "predicted_speedup": self.predicted_speedup,
            "predicted_attention": self.predicted_attention, "fallbacks": list(self.fallbacks),
        }  # fmt: skip

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.method.items() if k != "method")
        width = max((len(name) for name, _ in self.rows), default=0)
        lines = [f"{self.method['method']}({settings})", f"  on {self.model} through the {self.host} host"]
        lines += [f"  {name.ljust(width)}  {value}" for name, value in self.rows]
        lines += [f"  note: {reason}" for reason in self.fallbacks]
        return "\n".join(lines)
