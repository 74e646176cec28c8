"""How fast vision backbones classify pictures: every variant of our families and of timm's FocalNet and MaxViT, at several sizes.

A case is a model at a size. It is timed in alternation with its peers: the Swin and the ConvNeXt of timm that are nearest to it
in parameters, and its own plain form (BiFormer and NAT that gather the keys of a query as tensors, timm's MaxViT as timm runs
it), which must give the same classes before anything counts. Weights are random: no time here depends on them, except that
BiFormer's say which regions are picked.

Memory is what a warm call needs at its peak beyond the weights, by the resident set of this process and without what a
kernel keeps between calls. A process per model would count the same and start for longer than it measures.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from torch import Tensor, nn

import mmeff
from mmeff.kernels import na_scores, na_values, record
from mmeff.vision_backbones import nat, registered
from mmeff.vision_backbones.windowattention import WindowAttention

from . import timing
from .gate import GateFailed
from .results import FOLDER, Machine

ROWS = FOLDER / "backbones.jsonl"
PLAIN = "plain form"
Size = tuple[int, int]  # height and width in pixels
SIZES: tuple[Size, ...] = ((224, 224), (384, 384), (512, 512), (256, 384))
QUICK = (
    "swin_tiny", "convnext_tiny", "nat_tiny", "dinat_tiny", "dinat_s_tiny", "nat_iso_small", "biformer_tiny",
    "focalnet_tiny_srf", "focalnet_tiny_iso", "maxvit_tiny_tf",
)  # fmt: skip
CLASSES = {
    "tiny": 28e6,
    "small": 50e6,
    "base": 88e6,
    "large": 197e6,
}  # parameters of Swin, and nearly those of ConvNeXt
ANCHORS = ("swin", "convnext")
PLAIN_FAMILIES = ("biformer", "nat", "dinat", "maxvit")  # the first word of a name is its family
AGREE = 1e-3  # of the classes' norm: float32 in another order, through some fifty layers
TILTED = 0.5  # what the load may be above the threads that are timed here


class Bar(NamedTuple):
    """The least that a peer's time over ours must be, at a size or at all."""

    model: str
    peer: str
    least: float
    size: Size | None = None


BARS = (
    Bar("biformer_tiny", PLAIN, 1.8, (512, 512)),
    Bar("nat_tiny", PLAIN, 3.0, (512, 512)), Bar("dinat_tiny", PLAIN, 3.0, (512, 512)),
    Bar("nat_tiny", "swin_tiny", 1 / 1.3, (512, 512)), Bar("dinat_tiny", "swin_tiny", 1 / 1.3, (512, 512)),
    Bar("maxvit_tiny_tf", PLAIN, 1.0),
)  # fmt: skip


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model in a case. seconds: of a call, p20, p50 and p80; ratio: these over ours, paired within rounds, none for ours.

    memory: peak bytes of a call beyond the weights. backends: which ones ran, and how often in a call.
    """

    name: str
    parameters: int
    seconds: dict[str, float]
    memory: int | None
    backends: dict[str, int]
    ratio: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case on one machine: the model and its peers, or the reason why it cannot run.

    rounds: seconds of the model and of each peer, round by round. load: runnable threads of the machine before it began.
    """

    model: str
    height: int
    width: int
    batch: int
    ours: Side | None = None
    peers: tuple[Side, ...] = ()
    reason: str | None = None
    rounds: list[list[float]] = field(default_factory=list)
    load: float | None = None
    threads: int
    hardware: str
    environment: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a second measurement of the same thing unnecessary."""
        return (self.model, self.height, self.width, self.batch, self.hardware)

    @property
    def disturbed(self) -> bool:
        """Whether others used the processor when the case began; the previous case's own threads are in the load too."""
        return self.load is not None and self.load > self.threads + TILTED

    def peer(self, name: str) -> Side | None:
        """The peer of a name: "swin", "convnext" for whichever size, or "plain form"."""
        return next((p for p in self.peers if p.name == name or p.name.rpartition("_")[0] == name), None)

    def missed(self, peer: Side) -> float | None:
        """The bar that the ratio to a peer should reach and does not."""
        for bar in BARS:
            here = (bar.model, bar.peer) == (self.model, peer.name) and bar.size in (None, (self.height, self.width))
            if here and peer.ratio is not None and peer.ratio["p50"] < bar.least:
                return bar.least
        return None


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. Raises ValueError for a line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            row = Row(**json.loads(line))
            ours = None if row.ours is None else _side(row.ours)
            rows.append(Row(**{**vars(row), "ours": ours, "peers": tuple(map(_side, row.peers))}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is no row of backbones: {error}; take the line out.") from None
    return rows


def _side(fields: Any) -> Side:
    return Side(**fields)


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each key; one without figures never hides one with them."""
    found: dict[Any, Row] = {}
    for row in rows:
        if row.key not in found or row.ours is not None or found[row.key].ours is None:
            found[row.key] = row
    return list(found.values())


# ---------------------------------------------------------------- models


def names() -> list[str]:
    """Every model of the full suite: Swin and ConvNeXt, our families, FocalNet, MaxViT."""
    ours = registered()
    focalnets = [name for name in timm.list_models("focalnet_*") if name not in ours]
    maxvits = [name.removesuffix("_224") for name in timm.list_models("maxvit_*_tf_224")]
    return [*(f"{kind}_{size}" for kind in ANCHORS for size in CLASSES), *ours, *focalnets, *maxvits]


def chosen(suite: str, only: Sequence[str], sizes: Sequence[Size]) -> list[tuple[str, Size]]:
    """The cases of a suite, "quick" or "full", of models whose name holds one of `only`. Raises ValueError if none is left."""
    if suite not in ("quick", "full"):
        raise ValueError(f"--suite must be quick or full, got {suite!r}")
    models = [n for n in (QUICK if suite == "quick" else names()) if not only or any(text in n for text in only)]
    if not models:
        raise ValueError(f"--only {' '.join(only)} leaves no model of suite {suite}; --dry-run lists their names")
    return [(model, size) for size in sizes for model in models]


def build(name: str, size: Size, *, plain: bool = False) -> Any:
    """A model for pictures of a size, with random weights, in evaluation mode; or its plain form."""
    family = name.partition("_")[0]
    known = {"swin": f"{name}_patch4_window7_224", "maxvit": f"{name}_224"}.get(family, name)
    args: dict[str, Any] = {"img_size": size} if family in ("swin", "maxvit", "vitrpb") else {}
    if plain and family == "biformer":
        args["routing_backend"] = "gather-reference"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(known, **args).eval()
    if family == "maxvit" and not plain:
        mmeff.accelerate(model, WindowAttention())
    return Gathering(model) if plain and family in ("nat", "dinat") else model


@functools.lru_cache(maxsize=2 * len(CLASSES))
def _anchor(name: str, size: Size) -> Any:
    """A Swin or ConvNeXt; those of a size are kept, since drawing weights takes longer than the forwards of a large one."""
    return build(name, size)


def _plain_form(name: str, size: Size, ours: nn.Module) -> nn.Module:
    """A model's plain form, on the same weights where both fit one module."""
    if name.partition("_")[0] in ("nat", "dinat"):
        return Gathering(ours)
    plain: nn.Module = build(name, size, plain=True)
    return plain


class Gathering(nn.Module):
    """A NAT whose attention gathers the keys and values of every window, as its authors' code did before it had kernels.

    The reference backend of our operator is no peer: dense attention under a mask, which at 512 pixels takes six times longer still.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with mock.patch.object(nat, "neighborhood_attention", _gathered):
            classes: Tensor = self.model(x)
        return classes


def _gathered(q: Tensor, k: Tensor, v: Tensor, window: Any, *, dilation: Any, rel_bias: Tensor, backend: str) -> Tensor:
    weights = na_scores(q, k, window, dilation=dilation, rel_bias=rel_bias).softmax(-1)
    return na_values(weights, v, window, dilation=dilation)


def peers_of(name: str, parameters: int) -> list[str]:
    """Whom a model is timed against: by parameters, on a logarithmic scale; Swin itself against the smallest."""
    kind, _, size = name.rpartition("_")
    if kind in ANCHORS:
        return [] if name == "swin_tiny" else ["swin_tiny"] if kind == "swin" else [f"swin_{size}"]
    nearest = min(CLASSES, key=lambda c: abs(math.log(parameters / CLASSES[c])))
    plain = [PLAIN] if name.partition("_")[0] in PLAIN_FAMILIES else []
    return [f"{anchor}_{nearest}" for anchor in ANCHORS] + plain


# ---------------------------------------------------------------- measuring


def run(
    cases: Sequence[tuple[str, Size]], machine: Machine, path: Path, *, batch: int, rounds: int, seconds: float | None,
    again: bool, tick: Callable[[str, int, int], None],
) -> tuple[list[Row], int]:  # fmt: skip
    """Measure what the file does not hold yet, and append a row as soon as it is known.

    Args: seconds: after which no case is begun. again: measure what the file holds, too.
    Returns: the rows of all cases that have one, and how many cases the time did not reach.
    Raises: GateFailed if a model and its plain form disagree.
    """
    held = {row.key: row for row in latest(read(path)) if row.ours is not None}
    began, found = time.perf_counter(), []
    for done, (name, (height, width)) in enumerate(cases):
        key = (name, height, width, batch, machine.hardware)
        if not again and key in held:
            found.append(held[key])
            continue
        if seconds is not None and time.perf_counter() - began > seconds:
            continue
        tick(f"{name}, {height} x {width}", done, len(cases))
        load = round(os.getloadavg()[0], 1)
        try:
            figures = measure(name, (height, width), batch, rounds)
        except (ValueError, RuntimeError, AssertionError) as error:  # refused sizes, or too little memory
            figures = {
                "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            }
        row = Row(
            model=name, height=height, width=width, batch=batch, load=load, threads=torch.get_num_threads(),
            hardware=machine.hardware, environment={**machine.environment, "timm": timm.__version__}, commit=machine.commit,
            date=datetime.now(UTC).isoformat(timespec="seconds"), **figures,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n")
        found.append(row)
    return found, len(cases) - len(found)


@torch.inference_mode()
def measure(name: str, size: Size, batch: int, rounds: int) -> dict[str, Any]:
    """The figures of a `Row`: a first call of everybody, the memory of a second, then rounds whose order turns around."""
    ours = build(name, size)
    models = {name: ours}
    for peer in peers_of(name, _parameters(ours)):
        models[peer] = _plain_form(name, size, ours) if peer == PLAIN else _anchor(peer, size)
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    classes, ran = {}, {}
    for side, model in models.items():
        with record() as calls:
            classes[side] = model(x)
        ran[side] = dict(Counter(f"{c.operator}: {c.backend}" for c in calls))
    if PLAIN in models:
        check_plain(name, models[PLAIN], x, classes[name], classes[PLAIN])
    memory = {s: timing._peak_memory(lambda m=model: m(x), x.device) for s, model in models.items()}  # type: ignore[misc]
    times: list[list[float]] = []
    for turn in range(rounds):
        order, taken = list(models)[:: -1 if turn % 2 else 1], {}
        for side in order:
            began = time.perf_counter()
            models[side](x)
            taken[side] = time.perf_counter() - began
        times.append([taken[side] for side in models])
    sides = [
        Side(
            name=side, parameters=_parameters(model), memory=memory[side], backends=ran[side], seconds=_spread([t[i] for t in times]),
            ratio=_spread([t[i] / t[0] for t in times]) if i else None,
        )
        for i, (side, model) in enumerate(models.items())
    ]  # fmt: skip
    return {"ours": sides[0], "peers": tuple(sides[1:]), "rounds": [[round(t, 6) for t in turn] for turn in times]}


def check_plain(name: str, plain: nn.Module, x: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """Compare a model's classes with those of its plain form, in float32.

    A deep model of random weights can magnify rounding past AGREE. What counts then is float64: ours must not be farther from it
    than twice what the plain form is, since rounding in another order is another draw of the same size.

    Returns: how far they are apart, of their norm. Raises: GateFailed.
    """

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    error = apart(ours, theirs)
    if error <= AGREE:
        return error
    exact = copy.deepcopy(plain).double()(x.double())
    mine, its = apart(ours, exact), apart(theirs, exact)
    if not mine <= max(AGREE, 2 * its):
        raise GateFailed(
            f"red gate: {name} at {x.shape[2]} x {x.shape[3]} must give the classes of its plain form to {AGREE:g} of their norm, or "
            f"come as close to float64; got {error:.3g}, and {mine:.3g} from float64 where the plain form is {its:.3g} from it. Nothing "
            "more is timed; repair the backend, or leave the model out with --only."
        )
    return error


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _spread(values: list[float]) -> dict[str, float]:
    """One value is its own spread."""
    return asdict(timing.Spread.of(values if len(values) > 1 else values * 2))
