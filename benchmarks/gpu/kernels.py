"""The kernel table: ceilings of the machine, block-sparse attention against dense attention and FlexAttention, and GNA.

Every side is gated on the tensors that are timed, and timed in alternation with ours (`runner`, `timing`). A bar is a share of
the throughput of the fastest dense attention in the same run, counted over useful pairs.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mmeff.diffusion_attn._ordered import OrderedLayout
from mmeff.diffusion_attn.gna import GNA
from mmeff.kernels import block_sparse_attention, calibration

from .. import runner, timing, workloads
from ..cases import BlockSparse, Case, Direction, Neighborhood, RandomBlocks, Routed, TokenScores, Unavailable
from ..timing import Timing, compare, runnable
from ..workloads import Contender
from .engine import Part, Task
from .gate import gate_of
from .rows import File, Row
from .setting import Setting

HEADS = (
    4  # of the 24 that HunyuanVideo has: heads are alike, and four of 115,200 tokens fill the machine many times over
)
TOKENS = 115_200
DENSE = ("cudnn", "flash", "sdpa")
# (direction, block): useful throughput relative to dense
SHARE = {("forward", 128): 0.75, ("forward", 64): 0.55, ("forward+backward", 128): 0.6}
AT_LEAST = {("forward", 128, 0.9): 7.0}  # a ratio that is stated by itself: 0.75 of ten times is 7.5
CALIBRATION = "calibration, "
GNA_BAR = 8.0
GNA_NAME = "GNA 18x24x24, stride 16x8x8, on 30x48x80, permutation included"
# NATTEN's sample, 24 heads; 23.4 ms without the permutation
GNA_QUOTED = {"seconds": 0.0291, "dense_seconds": 0.2833, "hardware": "NVIDIA H100, 24 heads", "by": "NATTEN docs"}
SECONDS = {"cpu": 0.01, "cuda": 1.5}  # for the rounds of a pair, once it has the fewest


# ---------------------------------------------------------------- ceilings


def copy_bandwidth(setting: Setting) -> dict[str, Any]:
    """Bytes read and written per second by a copy within the device, several times the size of its cache."""
    size = setting.pick(2**32, 2**20)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    spread = _spread(lambda: target.copy_(source), setting)
    return {"value": 2 * size / spread["p50"], "unit": "bytes/s", "bytes": size, "seconds": spread}


def matmul_rate(setting: Setting) -> dict[str, Any]:
    """FLOP/s of a bf16 matrix product of random values: products of zeros run faster, and mean nothing."""
    n = setting.pick(8192, 64)
    a, b = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    spread = _spread(lambda: torch.mm(a, b, out=out), setting)
    return {"value": 2 * n**3 / spread["p50"], "unit": "FLOP/s", "n": n, "seconds": spread}


def _spread(run: Callable[[], object], setting: Setting) -> dict[str, float]:
    for _ in range(3):
        run()
    calls = setting.pick(10, 1)
    times = [timing._seconds(run, calls, setting.device) for _ in range(setting.pick(11, 5))]
    return asdict(timing.Spread.of(times))


# ---------------------------------------------------------------- cases against their peers


def table(*, smoke: bool) -> Iterator[tuple[Case, float | None]]:
    """Cases, and the bar on their ratio to dense attention; what is asked for most first."""

    def random(
        sparsity: float, block: int, direction: Direction = "forward", *, N: int = TOKENS
    ) -> tuple[Case, float | None]:
        size: dict[str, Any] = {"N": 150, "H": 2, "D": 16} if smoke else {"N": N, "H": HEADS, "D": 128}
        share = SHARE.get((direction, block))
        bar = AT_LEAST.get((direction, block, sparsity), None if share is None else share / (1 - sparsity))
        case = BlockSparse(
            **size, dtype="float32" if smoke else "bfloat16", direction=direction,
            layout=RandomBlocks(16 if smoke else block, sparsity),
        )  # fmt: skip
        return case, bar if N == TOKENS and not smoke and sparsity in (0.5, 0.75, 0.9) else None

    if smoke:
        yield random(0.5, 128)
        yield TokenScores(N=64, H=4, Hk=2, D=16, rows=5), None
        return
    for sparsity in (0.75, 0.5, 0.9):
        yield random(sparsity, 128)
    for sparsity in (0.75, 0.5, 0.9):
        yield random(sparsity, 64)
    for sparsity in (0.75, 0.5, 0.9):
        yield random(sparsity, 128, "forward+backward")
    yield TokenScores(N=2880, H=32, Hk=8, D=128, rows=32, dtype="bfloat16"), None
    yield Routed(N=32760, H=12, D=128, kv_block=1560, picks=5, dtype="bfloat16"), None
    wan: dict[str, Any] = {
        "N": 32760,
        "H": 12,
        "D": 128,
        "grid": (21, 30, 52),
        "window": (9, 16, 16),
        "stride": (3, 4, 4),
    }
    for direction in ("forward", "forward+backward"):
        yield Neighborhood(**wan, dtype="bfloat16", direction=direction), None
    for sparsity in (0.75, 0.5, 0.9):
        yield random(sparsity, 64, "forward+backward")
    for sparsity in (0.0, 0.25, 0.95):  # the rest of the sweep of densities, for predicted_speedup()
        for block in (128, 64):
            yield random(sparsity, block)
    for block in (128, 64):
        for sparsity in (0.5, 0.9):
            yield random(sparsity, block, N=16384)


def against_dense(case: Case, bar: float | None, setting: Setting) -> dict[str, Any]:
    """Time our kernel against every dense kernel there is and, where it has one, FlexAttention over the same blocks.

    `value` is the ratio to the fastest of the dense ones.
    """
    options = runner.Options(out=Path(os.devnull), pair_seconds=SECONDS[setting.device.type], flex=True)
    work = workloads.build(case, setting.device)
    bench = runner._Bench(work, options)
    bench.gate = gate_of(work)
    backend = "triton" if setting.device.type == "cuda" else "auto"
    peers = DENSE if bar is None else (*DENSE, "flex")  # it compiles for most of a minute
    pairs: dict[str, Any] = {}
    for peer in peers:
        try:
            pairs[peer] = bench.figures(backend, peer)
        except (Unavailable, torch.OutOfMemoryError) as error:
            pairs[peer] = {"reason": str(error).splitlines()[0][:200]}
        except Exception as error:
            # a peer's compiler may raise anything; ours was gated before the first peer
            if peer != "flex":
                raise
            pairs[peer] = {"reason": f"{type(error).__name__}: {str(error)[:200]}"}
    dense = {peer: x for peer, x in pairs.items() if peer in DENSE and "ours" in x}
    if not dense:
        raise Unavailable("; ".join(f"{peer}: {x['reason']}" for peer, x in pairs.items()))
    fastest = min(dense, key=lambda peer: dense[peer]["theirs"]["p50"])
    flex = pairs.get("flex", {}).get("ratio")
    found = dense[fastest]
    return {
        "value": found["ratio"]["p50"], "unit": f"times as fast as {fastest}", **({} if bar is None else {"bar": bar}),
        **{name: found[name] for name in ("density", "block_density", "block", "ran", "errors", "ours_bytes")},
        "seconds": found["ours"], "dense_seconds": found["theirs"], "fastest_dense": fastest,
        "useful_flops": _useful(case, found), "of_dense_rate": found["ratio"]["p50"] * (found["block_density"] or 1.0),
        "over_flex": None if flex is None else flex["p50"], "not_slower_than_flex": None if flex is None else flex["p50"] >= 1.0,
        "operator": case.operator, "what": case.what, "direction": case.direction, "dtype": case.dtype, "shape": case.shape,
        "heads": case.H,
        "peers": {peer: x.get("reason") or {k: x[k] for k in ("ours", "theirs", "ratio", "clock", "rounds")} for peer, x in pairs.items()},
    }  # fmt: skip


def _useful(case: Case, found: dict[str, Any]) -> float | None:
    """FLOP/s over the pairs that attend: two products forward, five more backward."""
    if found["density"] is None:
        return None
    products = {"forward": 2, "backward": 5, "forward+backward": 7}[case.direction]
    return 2.0 * products * case.B * case.H * case.N**2 * case.D * found["density"] / found["ours"]["p50"]


# ---------------------------------------------------------------- GNA, its order of tokens included


def gna(setting: Setting) -> dict[str, Any]:
    """HunyuanVideo's published window as a method serves it, permutation included, against dense attention."""
    grid: tuple[int, int, int] = setting.pick((30, 48, 80), (4, 8, 8))
    case = Neighborhood(
        N=grid[0] * grid[1] * grid[2], H=setting.pick(HEADS, 1), D=setting.pick(128, 16), grid=grid,
        window=setting.pick((18, 24, 24), (2, 4, 4)), stride=setting.pick((16, 8, 8), (2, 4, 4)),
        dtype=setting.pick("bfloat16", "float32"),
    )  # fmt: skip
    work = workloads.NeighborhoodWork(case, setting.device)
    backend = "triton" if setting.device.type == "cuda" else "auto"
    method = GNA(window=case.window, stride=case.stride, backend=backend)  # type: ignore[arg-type]
    q, k, v = work.flat
    layout = method.kernel_layout(grid=grid, q=q, k=k)
    ours = Contender(lambda: method.attend(q, k, v, grid=grid, layout=layout).view(work.q.shape))
    errors = gate_of(work).check(ours, "GNA.attend")
    ordered = [layout.arrange(x) if isinstance(layout, OrderedLayout) else x for x in (q, k, v)]
    blocks = layout.layout if isinstance(layout, OrderedLayout) else layout

    def kernel() -> Tensor:
        return cast(Tensor, block_sparse_attention(ordered[0], ordered[1], ordered[2], blocks, backend=backend))

    found: dict[str, Timing] = {}
    reasons: dict[str, str] = {}
    for name in DENSE:
        try:
            peer = runnable(work.peer(name), "forward")
            peer()
            found[name] = compare(runnable(ours, "forward"), peer, setting.device, seconds=SECONDS[setting.device.type],
                                  graphs=False)  # fmt: skip
        except (Unavailable, RuntimeError) as error:
            reasons[name] = str(error).splitlines()[0][:200]
    if not found:
        raise Unavailable("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    fastest = min(found, key=lambda name: found[name].peer.p50)
    best = found[fastest]
    return {
        "value": best.ratio.p50, "unit": f"times as fast as {fastest}", **({} if setting.smoke else {"bar": GNA_BAR}),
        "seconds": asdict(best.ours), "dense_seconds": asdict(best.peer), "fastest_dense": fastest,
        "kernel_seconds": _spread(kernel, setting), "density": work.density, "block_density": blocks.block_density,
        "heads": case.H, "errors": {name: list(pair) for name, pair in errors.items()}, "unavailable": reasons,
        "quoted": GNA_QUOTED,
    }  # fmt: skip


# ---------------------------------------------------------------- what predictions go by


def calibrated(direction: str, setting: Setting) -> dict[str, Any]:
    """What `mmeff calibrate` measures here: the defaults of `mmeff/kernels/calibration.py` for GPUs come from such rows."""
    dtype = setting.pick(torch.bfloat16, torch.float32)
    found = calibration.calibrate(
        setting.device, dtype, direction, tokens=setting.pick(8192, 256), rounds=setting.pick(15, 3)
    )
    if not found.measured:
        raise Unavailable("the rounds disagreed so much that something else must be running here")
    return {"value": max(r for n, r in found.ratios.items() if n != "masked"), "unit": "of dense per visited pair",
            "dense_multiply_adds": found.dense, "ratios": dict(found.ratios)}  # fmt: skip


@dataclass(frozen=True)
class Visited:
    """Throughput per visited pair relative to dense attention, which `predicted_speedup()` takes to be the same at every density.

    ratio: the geometric mean over the densities, the least-squares fit of a constant to logarithms. low, high: the extremes.
    """

    case: str  # all but the density
    densities: tuple[float, ...]
    ratio: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """How far apart the extremes are; 0 where the model holds."""
        return self.high / self.low - 1


def visited(points: Iterable[tuple[str, float, float]]) -> list[Visited]:
    """Fit a ratio to every case of at least two densities.

    Args: points: case, density of the blocks that are visited, and times as fast as dense.
    """
    found: dict[str, dict[float, float]] = {}
    for case, density, speedup in points:
        found.setdefault(case, {})[density] = speedup * density
    return [
        Visited(case, tuple(sorted(of)), statistics.geometric_mean(of.values()), min(of.values()), max(of.values()))
        for case, of in found.items()
        if len(of) > 1
    ]


def swept(rows: Iterable[Row]) -> list[Visited]:
    """The fits of the sweep of densities: block-sparse attention in random blocks."""
    points = []
    for row in rows:
        x = row.figures
        if (
            row.status == "measured"
            and x.get("operator") == "block_sparse_attention"
            and x["what"].startswith("random")
        ):
            shape = " ".join(f"{letter}{x['shape'][letter]}" for letter in ("N", "H", "D"))
            what = x["what"].partition(",")[0]
            points.append((f"{what}, {x['direction']}, {x['dtype']}, {shape}", x["block_density"], x["value"]))
    return visited(points)


def entries(file: File) -> str:
    """Lines of `_DEFAULTS` in `mmeff/kernels/calibration.py` from the rows of calibration, with what the sweep of densities says."""
    lines = []
    for row in file.latest("kernels"):
        direction = row.name.removeprefix(CALIBRATION)
        if row.status != "measured" or direction == row.name:
            continue
        x = row.figures
        ratios = ", ".join(f'"{name}": {ratio:.2f}' for name, ratio in x["ratios"].items())
        lines += [
            f"    # {row.hardware}, {row.date[:10]}",
            f'    ("{file.setting.device.type}", "{direction}"): Rates({x["dense_multiply_adds"]:.2g}, {{{ratios}}}),',
        ]
    if lines:
        lines += [
            f"    # {fit.case}: {fit.ratio:.2f} ({fit.low:.2f} to {fit.high:.2f} over {len(fit.densities)} densities)"
            for fit in swept(file.latest("kernels"))
        ]
    return "\n".join(lines)


def tasks(setting: Setting, file: File) -> Generator[Task, None, None]:
    """Ceilings, the bars, GNA, then the rest."""
    yield Task(name="ceiling: copy within the device", seconds=10, run=partial(copy_bandwidth, setting))
    yield Task(name="ceiling: bfloat16 matrix product", seconds=10, run=partial(matmul_rate, setting))
    for i, (case, bar) in enumerate(table(smoke=setting.smoke)):
        if i == 1:
            yield Task(name=GNA_NAME, seconds=30, run=partial(gna, setting))
        yield Task(name=case.name, seconds=20 if bar is None else 60, run=partial(against_dense, case, bar, setting))
    if not setting.smoke:  # on a CPU this would be kept, and shift what "auto" takes
        for direction in ("forward", "backward"):
            yield Task(name=f"{CALIBRATION}{direction}", seconds=20, run=partial(calibrated, direction, setting))


PART = Part(name="kernels", weight=3, tasks=tasks)
