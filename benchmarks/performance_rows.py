"""The rows behind docs/performance.md: those of each machine that count, and what of them was predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .gpu.rows import Row, latest
from .prefill import Row as Prefill
from .prefill import latest as latest_prefill
from .results import Row as Timed
from .results import latest as latest_timed
from .video import DENSE, Line

GPU_NAMES = ("NVIDIA", "Tesla")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the page is made of: rows of the results files, in their order."""

    gpu: Sequence[Row] = ()
    video: Sequence[Line] = ()
    prefill: Sequence[Prefill] = ()
    cpu: Sequence[Timed] = ()


@dataclass
class Machine:
    """The rows of one machine that count: the last of each kind."""

    name: str
    gpu: list[Row] = field(default_factory=list)
    video: list[Line] = field(default_factory=list)
    prefill: list[Prefill] = field(default_factory=list)
    cpu: list[Timed] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        """Whether it is a graphics processor; rows of `gpu` are made nowhere else."""
        return bool(self.gpu) or self.name.startswith(GPU_NAMES)

    def part(self, name: str) -> list[Row]:
        """The measured rows of a part of `gpu`."""
        return [row for row in self.gpu if row.part == name and row.status == "measured"]

    def summaries(self) -> list[Line]:
        """Whole forwards of a video transformer, one line per method and size."""
        of = [x for x in self.video if x.kind == "summary" and x.status == "measured" and x.method != DENSE]
        return list({(x.method, str(x.sizes)): x for x in of}.values())


def by_machine(rows: Rows) -> list[Machine]:
    """The rows of every machine, processors first."""
    found: dict[str, Machine] = {}

    def of(name: str) -> Machine:
        return found.setdefault(name, Machine(name))

    for gpu in latest(rows.gpu):
        of(gpu.hardware).gpu.append(gpu)
    for line in rows.video:
        of(line.hardware).video.append(line)
    for short in latest_prefill(list(rows.prefill)):
        of(short.hardware).prefill.append(short)
    for timed in latest_timed(list(rows.cpu)):
        of(timed.hardware).cpu.append(timed)
    return sorted(found.values(), key=lambda machine: machine.is_gpu)


# ---------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Prediction:
    """What was predicted and measured of one thing, both times as fast as dense. kind: forward, attention or prefill."""

    kind: str
    what: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured: above 1 more was promised than came."""
        return self.predicted / self.measured


def predictions(machine: Machine) -> list[Prediction]:
    """Every row of a machine that holds both."""
    found = []
    for line in machine.summaries():
        for kind in ("forward", "attention"):
            of = f"Wan, {line.sizes['layers']} layers, {' x '.join(map(str, line.sizes['grid']))}, {line.method}"
            if line.figures.get(f"predicted_{kind}") is not None:
                found.append(Prediction(kind, of, line.figures[f"predicted_{kind}"], line.figures[f"{kind}_speedup"]))
    for row in machine.part("forward"):
        x = row.figures
        if x["predicted"]["speedup"] is not None:
            of = ", ".join(row.name.split(" | "))
            found.append(Prediction("forward", of, x["predicted"]["speedup"], x["value"]))
            found.append(Prediction("attention", of, x["predicted"]["attention"], x["attention_ratio"]))
    for short in machine.prefill:
        of = f"LLaVA, {short.method}, {100 * short.budget:g} %, batch {short.sizes['batch']}"
        found.append(Prediction("prefill", of, 1 / short.token_layers, 1 / short.time))
    for row in machine.part("prefill"):
        of = ", ".join(row.name.split(" | "))
        found.append(Prediction("prefill", of, 1 / token_layers(row.figures), 1 / (1 - row.figures["value"])))
    return found


def worst(found: Sequence[Prediction]) -> Prediction:
    """The prediction that is farthest off, up or down."""
    return max(found, key=lambda p: abs(math.log(p.ratio)))


def token_layers(x: dict[str, Any]) -> float:
    """What is left of the tokens of all layers, of a row of `gpu`'s part prefill."""
    tokens = x["tokens"]
    left: float = (tokens["mean over layers"] + x["prompt"] - tokens["visual tokens per prompt"]) / x["prompt"]
    return left
