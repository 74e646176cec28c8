"""Sparse attention in a video transformer end to end, and how its time grows with the length of the video.

`forward` runs a Wan transformer with random weights as diffusers has it, and again under every method. What counts is the
attention share: from q, k and v after the rotary embedding to the output before its projection, with all that a method does
there. The bar is 0.75 of 1 / density: what a kernel would gain that visits fewer pairs and loses a quarter of its rate.

`scaling` calls attention alone at growing numbers of frames, dense and with two static methods, and fits exponents.

A line of the results file is one forward, or one method at one number of frames, so that a run which was stopped goes on
where it ended. Summaries and fits are lines too, made again whenever something new was measured.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmeff
from mmeff.diffusion_attn._base import Grid, SparseAttention
from mmeff.diffusion_attn._ordered import OrderedLayout
from mmeff.diffusion_attn.gna import GNA
from mmeff.diffusion_attn.radial import Radial
from mmeff.diffusion_attn.rectified import RectifiedSpaAttn
from mmeff.diffusion_attn.sliding_tile import SlidingTile
from mmeff.diffusion_attn.vmoba import VMoBA
from mmeff.kernels import record
from mmeff.kernels.neighborhood.layout import window_layout

from .results import Machine

DENSE = "dense"
SHARE_OF_BOUND = 0.75  # of 1 / density, which the attention share should gain at least
MOST_OVERHEAD = 0.15  # of the attention share, for selecting and reordering
SPREAD_PER_BLOCK = 0.20  # between the cheapest and the dearest block of Radial over all lengths
LAYOUT_SHARE = 0.02  # of Radial's time, for building its layout
LAYOUT_BUILDS = 3
PROCESS = datetime.now(UTC).isoformat(timespec="seconds")  # which forwards shared a process

Tick = Callable[[str, int, int], None]
Measured = tuple[str, dict[str, Any], dict[str, Any]]  # preset, config, figures

_EVERY: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0}  # a single forward, in which every layer is sparse
# name: (what it is, how it is made)
FORWARD: dict[str, tuple[str, Callable[[], SparseAttention]]] = {
    "radial": ("for_model wan2.1-14b", lambda: Radial.for_model("wan2.1-14b", **_EVERY)),
    "gna": ("for_model cosmos-90: all frames, 12 x 24, stride 1 x 4 x 8", lambda: GNA.for_model("cosmos-90", **_EVERY)),
    "gna-default": ("defaults: 0.6 x 0.5 x 0.3 of the grid, stride 1", lambda: GNA(**_EVERY)),
    "sliding_tile": ("defaults: 3 x 3 x 3 tiles of 6 x 8 x 8", lambda: SlidingTile(**_EVERY)),
    "rectified": ("for_model wan2.1-t2v-14b", lambda: RectifiedSpaAttn.for_model("wan2.1-t2v-14b", **_EVERY)),
    "vmoba": ("for_model 77x480x832", lambda: VMoBA.for_model("77x480x832", **_EVERY)),
}
SCALING: dict[str, tuple[str, Callable[[], SparseAttention]]] = {
    "radial": FORWARD["radial"],
    "gna": (
        "window 6 x 16 x 24, stride and tile 2 x 8 x 8",
        lambda: GNA(window=(6, 16, 24), stride=(2, 8, 8), tile=(2, 8, 8), **_EVERY),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The random transformer and its input, at batch 1. The feed-forward width is that of Wan2.1-1.3B."""

    layers: int = 4
    heads: int = 24
    head_dim: int = 64
    ffn_dim: int = 8960
    grid: Grid = (16, 30, 52)
    text: int = 512  # text tokens, in cross-attention

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def check(self) -> None:
        """Raise ValueError for sizes that cannot be measured."""
        if min(self.layers, self.heads, *self.grid) < 1:
            raise ValueError(f"layers, heads and the grid must be >= 1, got {self}")
        if self.tokens == self.text:
            raise ValueError(
                f"the grid must not have {self.text} tokens, like the text: self-attention would look like cross-attention"
            )


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the results file; `figures` depends on its kind. Times in seconds, densities of query-key pairs.

    forward: sizes, round, process, seconds, attention_seconds, layer_seconds, spans, density, predicted_attention,
        predicted_forward, backends. summary: medians of those, speedups, bars and verdicts.
    scaling: frames, tokens, seconds (a list, one per round), first_seconds, layout_seconds, blocks, block, density, backend.
    fit: exponent, and for radial how even the time per block is and the share of its layout.
    """

    kind: str
    status: str = "measured"  # or "skipped"
    reason: str | None = None
    method: str
    preset: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    hardware: str
    environment: dict[str, str]
    commit: str | None = None
    date: str = ""


class File:
    """The lines of a results file, and new ones appended as soon as they are known."""

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path, self.machine = path, machine
        self.lines = read(path)

    def add(self, **fields: Any) -> Line:
        here = self.machine
        line = Line(
            hardware=here.hardware, environment=here.environment, commit=here.commit,
            date=datetime.now(UTC).isoformat(timespec="seconds"), **fields,
        )  # fmt: skip
        line = Line(**json.loads(json.dumps(asdict(line), allow_nan=False)))  # as it will be read
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(line), ensure_ascii=False) + "\n")
        self.lines.append(line)
        return line

    def latest(self, kind: str) -> list[Line]:
        """The last line of a kind for every method, size and number of frames on this machine."""
        of = [x for x in self.lines if x.kind == kind and x.hardware == self.machine.hardware]
        return list({(x.method, json.dumps(x.sizes), str(x.figures.get("frames"))): x for x in of}.values())

    def at(self, sizes: dict[str, Any]) -> list[Line]:
        """All lines at these sizes on this machine."""
        return [x for x in self.lines if x.hardware == self.machine.hardware and x.sizes == sizes]

    def of(self, kind: str, sizes: dict[str, Any]) -> list[Line]:
        """Measured lines of a kind at these sizes on this machine."""
        return [x for x in self.at(sizes) if x.kind == kind and x.status == "measured"]


def read(path: Path) -> list[Line]:
    """Read a results file; one that does not exist has no lines. Raises ValueError for a line of another kind of file."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            lines.append(Line(**json.loads(text)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}, was not written by `python -m benchmarks video`: {error}; pass another --out."
            ) from None
    return lines


class Budget:
    """The time of a whole run; None is without end."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def allows(self, expected: float) -> bool:
        """Whether something that takes so long would end in time."""
        return self._end is None or time.monotonic() + expected < self._end


# ---------------------------------------------------------------- end to end


def forward(
    file: File, sizes: Sizes, methods: list[str], *, rounds: int, dense_rounds: int, budget: Budget, tick: Tick
) -> int:
    """Run one forward at a time, in turn, and append a line for each; return how many the time did not reach.

    Dense is first in even rounds and last in odd ones, and so is the order of the methods. Nothing is run to warm up but one
    head of each method's attention, which makes the kernels choose their backends.
    """
    sizes.check()
    here = _plain(asdict(sizes))
    methods = [name for name in methods if _serves(file, name, sizes, here)]
    done = {(x.method, x.figures["round"]): x.figures["seconds"] for x in file.of("forward", here)}
    todo: list[tuple[str, int]] = []
    for r in range(max(rounds, dense_rounds)):
        order = [DENSE] * (r < dense_rounds) + list(methods) * (r < rounds)
        todo += [(name, r) for name in (order if r % 2 == 0 else order[::-1])]
    open_ = [pair for pair in todo if pair not in done]
    if not open_:
        return 0
    tick("random weights", 0, len(todo))
    bench = _Transformer(sizes)
    known, left = {name: seconds for (name, _), seconds in done.items()}, 0
    for i, (name, r) in enumerate(todo):
        if (name, r) in done:
            continue
        if not budget.allows(known.get(name, known.get(DENSE, 0.0))):
            left += 1
            continue
        tick(f"forward, {name}, round {r + 1}", i, len(todo))
        preset, method = _setting(name)
        figures = bench.run(name, method)
        known[name] = figures["seconds"]
        file.add(kind="forward", method=name, preset=preset, config={} if method is None else method.to_dict(), sizes=here,
                 figures={"round": r, "process": PROCESS, **figures})  # fmt: skip
    if left < len(open_):
        for fields in summaries(file.of("forward", here)):
            file.add(kind="summary", sizes=here, **fields)
    return left


def _setting(name: str) -> tuple[str, SparseAttention | None]:
    if name == DENSE:
        return "stock diffusers", None
    preset, make = FORWARD[name]
    return preset, make()


def _serves(file: File, name: str, sizes: Sizes, here: dict[str, Any]) -> bool:
    """Whether a method can serve the grid; where not, a skipped line says why, once."""
    preset, method = _setting(name)
    assert method is not None
    try:
        method.check_grid(sizes.grid)
    except ValueError as error:
        if name not in [x.method for x in file.at(here) if x.status == "skipped"]:
            file.add(kind="forward", status="skipped", reason=str(error), method=name, preset=preset,
                     config=method.to_dict(), sizes=here)  # fmt: skip
        return False
    return True


class _Transformer:
    """One set of random weights, in a transformer per method, so that handles and their layouts live on between rounds."""

    def __init__(self, sizes: Sizes) -> None:
        from diffusers import WanTransformer3DModel

        self.sizes = sizes
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stock = WanTransformer3DModel(
                num_attention_heads=sizes.heads, attention_head_dim=sizes.head_dim, ffn_dim=sizes.ffn_dim,
                num_layers=sizes.layers,
            ).eval()  # fmt: skip
            F, H, W = sizes.grid
            patch = self.stock.config.patch_size
            shape = (1, self.stock.config.in_channels, F * patch[0], H * patch[1], W * patch[2])
            text = torch.randn(1, sizes.text, self.stock.config.text_dim)
            self.inputs = {
                "hidden_states": torch.randn(shape), "timestep": torch.tensor([500]), "encoder_hidden_states": text,
            }  # fmt: skip
        self._ready: dict[str, tuple[Any, Any, dict[str, float | None]]] = {}

    def run(self, name: str, method: SparseAttention | None) -> dict[str, Any]:
        """The figures of one forward. Raises RuntimeError if a layer fell back to dense attention."""
        if name not in self._ready:
            self._ready[name] = (self.stock, None, {}) if method is None else self._accelerated(method)
        model, handle, predicted = self._ready[name]
        if handle is not None:
            handle.reset()
        gc.collect()
        with torch.no_grad(), _attention_clock(self.sizes.tokens) as layers:
            start = time.perf_counter()
            model(**self.inputs, return_dict=False)
            seconds = time.perf_counter() - start
        assert len(layers) == self.sizes.layers, "a self-attention was not seen"
        report = None if handle is None else handle.report()
        if report is not None and report.fallbacks:
            raise RuntimeError(f"{name} fell back to dense attention: {report.fallbacks}")
        return {
            "seconds": seconds, "attention_seconds": sum(layers), "layer_seconds": layers,
            "spans": {} if report is None else report.seconds,
            "density": 1.0 if report is None else report.density,
            "backends": {} if report is None else report.backends,
            **predicted,
        }  # fmt: skip

    def _accelerated(self, method: SparseAttention) -> tuple[Any, Any, dict[str, float | None]]:
        sizes, (F, H, W) = self.sizes, self.sizes.grid
        shared = {id(x): x for x in (*self.stock.parameters(), *self.stock.buffers())}
        model = copy.deepcopy(self.stock, shared)
        plan = mmeff.plan(
            model, method, height=16 * H, width=16 * W, num_frames=4 * F - 3, num_inference_steps=1,
            text_tokens=sizes.text,
        )  # fmt: skip
        with torch.no_grad():
            method.attend(*_random(sizes.tokens, 1, sizes.head_dim), grid=sizes.grid)
        predicted = {
            "predicted_attention": plan.predicted_attention,
            "predicted_forward": plan.predicted_speedup,
        }
        return model, mmeff.accelerate(model, method), predicted


@contextmanager
def _attention_clock(tokens: int) -> Iterator[list[float]]:
    """Collect the seconds of every self-attention, stock or under a handle: q, k and v (B, N, H, D) in, the same out."""
    from diffusers.models.transformers import transformer_wan

    from mmeff.diffusion_attn.hosts._denoiser import Session

    stock, sparse = transformer_wan.dispatch_attention_fn, Session.attend
    seconds: list[float] = []

    def timed(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = run(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return out

    def dense(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if key.shape[1] != tokens:  # the text
            return stock(query, key, *args, **kwargs)
        return timed(stock, query, key, *args, **kwargs)

    def attend(session: Session, *args: Any, **kwargs: Any) -> Any:
        return timed(sparse, session, *args, **kwargs)

    transformer_wan.dispatch_attention_fn = dense
    Session.attend = attend  # type: ignore[method-assign,assignment]
    try:
        yield seconds
    finally:
        transformer_wan.dispatch_attention_fn = stock
        Session.attend = sparse  # type: ignore[method-assign]


def summaries(lines: list[Line]) -> list[dict[str, Any]]:
    """Medians over the rounds and the verdicts, a dict of Line fields per method; none without a dense forward."""
    dense = [x.figures for x in lines if x.method == DENSE]
    if not dense:
        return []
    processes = {x.figures["process"] for x in lines}
    found = []
    for name in dict.fromkeys(x.method for x in lines):
        of = [x for x in lines if x.method == name]
        figures = [x.figures for x in of]
        seconds, attention, density = (_median(figures, key) for key in ("seconds", "attention_seconds", "density"))
        spans = {
            span: statistics.median(x["spans"].get(span, 0.0) for x in figures)
            for span in ("selection", "permute", "rectification", "layout")
        }
        speedup = _median(dense, "attention_seconds") / attention
        row: dict[str, Any] = {
            "rounds": len(figures), "dense_rounds": len(dense), "processes": len(processes), "seconds": seconds,
            "attention_seconds": attention, "spans": spans, "density": density,
            "forward_speedup": _median(dense, "seconds") / seconds, "attention_speedup": speedup,
            "predicted_attention": figures[-1].get("predicted_attention"),
            "predicted_forward": figures[-1].get("predicted_forward"),
        }  # fmt: skip
        if name != DENSE:
            bar, overhead = SHARE_OF_BOUND / density, (spans["selection"] + spans["permute"]) / attention
            row |= {"bar": bar, "reaches_bar": speedup >= bar}
            row |= {"overhead": overhead, "overhead_within": overhead <= MOST_OVERHEAD}
        found.append({"method": name, "preset": of[-1].preset, "config": of[-1].config, "figures": row})
    return found


def _median(figures: list[dict[str, Any]], key: str) -> float:
    return statistics.median(x[key] for x in figures)


# ---------------------------------------------------------------- scaling


def scaling(
    file: File, frames: list[int], *, frame: tuple[int, int] = (30, 52), heads: int = 2, head_dim: int = 64, rounds: int,
    budget: Budget, tick: Tick,
) -> int:  # fmt: skip
    """Time attention at each number of frames, and append a line per method; return how many lengths were not reached."""
    here = _plain({"frame": frame, "heads": heads, "head_dim": head_dim})
    names = {DENSE, *SCALING}
    done = {(x.method, x.figures["frames"]) for x in file.of("scaling", here)}
    spent: dict[int, float] = {}
    left, added = 0, False
    for i, F in enumerate(sorted(frames)):
        if all((name, F) in done for name in names):
            continue
        if not budget.allows(max((s * (F / f) ** 2 for f, s in spent.items()), default=0.0)):
            left += 1
            continue
        tick(f"attention, {F} frames", i, len(frames))
        start = time.monotonic()
        measured = _lengths((F, *frame), heads, head_dim, rounds)
        for name, (preset, config, figures) in measured.items():
            file.add(kind="scaling", method=name, preset=preset, config=config, sizes=here, figures=figures)
        spent[F] = time.monotonic() - start
        added = True
    if added:
        for fields in fits(file.of("scaling", here)):
            file.add(kind="fit", sizes=here, **fields)
    return left


def _lengths(grid: Grid, heads: int, head_dim: int, rounds: int) -> dict[str, Measured]:
    """Measure dense attention and of every method at one size, rounds in alternating order."""
    tokens = math.prod(grid)
    q, k, v = _random(tokens, heads, head_dim)

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    runs: dict[str, Callable[[], Tensor]] = {DENSE: dense}
    common: dict[str, Any] = {"frames": grid[0], "tokens": tokens}
    found: dict[str, Measured] = {DENSE: ("scaled_dot_product_attention", {}, {**common, "density": 1.0})}
    with torch.no_grad():
        for name, (preset, make) in SCALING.items():
            method = make()
            builds = []
            for _ in range(LAYOUT_BUILDS):
                window_layout.cache_clear()  # or GNA would build once
                seconds, layout = _timed(lambda method=method: method.kernel_layout(grid=grid))  # type: ignore[misc]
                builds.append(seconds)
            blocks = layout.layout if isinstance(layout, OrderedLayout) else layout

            def run(method: SparseAttention = method, layout: Any = layout) -> Tensor:
                return method.attend(q, k, v, grid=grid, layout=layout)

            with record() as calls:
                first, _ = _timed(run)  # plans, and chooses a backend
            figures = {
                **common, "density": layout.density, "blocks": blocks.visited_blocks * heads,
                "block": [blocks.q_block, blocks.kv_block], "first_seconds": first,
                "layout_seconds": statistics.median(builds), "backend": calls[0].backend,
            }  # fmt: skip
            runs[name], found[name] = run, (preset, method.to_dict(), figures)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for r in range(rounds):
            for name in list(runs) if r % 2 == 0 else list(runs)[::-1]:
                times[name].append(_timed(runs[name])[0])
    for name, (_, _, figures) in found.items():
        figures["seconds"] = times[name]
    return found


def fits(lines: list[Line]) -> list[dict[str, Any]]:
    """Exponents of the median times in the tokens, a dict of Line fields per method; none for fewer than two lengths."""
    found = []
    for name in dict.fromkeys(x.method for x in lines):
        of = {x.figures["frames"]: x for x in lines if x.method == name}
        if len(of) < 2:
            continue
        figures = [of[F].figures for F in sorted(of)]
        seconds = [statistics.median(x["seconds"]) for x in figures]
        row: dict[str, Any] = {"exponent": slope([x["tokens"] for x in figures], seconds), "lengths": sorted(of)}
        if name in SCALING:
            per_block = [s / x["blocks"] for s, x in zip(seconds, figures, strict=True)]
            shares = [x["layout_seconds"] / s for s, x in zip(seconds, figures, strict=True)]
            row |= {
                "blocks_exponent": slope([x["tokens"] for x in figures], [x["blocks"] for x in figures]),
                "seconds_per_block": per_block,
                "spread_per_block": max(per_block) / min(per_block) - 1,
                "layout_share": max(shares),
            }
        if name == "radial":
            row["in_proportion"] = row["spread_per_block"] <= SPREAD_PER_BLOCK
            row["layout_within"] = row["layout_share"] <= LAYOUT_SHARE
        last = of[max(of)]
        found.append({"method": name, "preset": last.preset, "config": last.config, "figures": row})
    return found


def slope(x: list[float], y: list[float]) -> float:
    """Return the exponent p of the least-squares fit y = c x^p, in logarithms."""
    fit = statistics.linear_regression([math.log(a) for a in x], [math.log(b) for b in y])
    return fit.slope


# ---------------------------------------------------------------- small things


def _random(tokens: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, head_dim, generator=generator) for _ in range(3))
    return q, k, v


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def _plain(sizes: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in sizes.items()}
