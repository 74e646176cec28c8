"""What the processor could do at most, beside what dense and sparse attention do: why a speedup is as large as it is.

A kernel that computes every visited pair exactly in float32 cannot go faster than the vector units multiply and add. So
against dense attention at D GFLOP/s a peak of P bounds the speedup at a density d to P / (D d), before any overhead.
"""

from __future__ import annotations

import ctypes
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from mmeff.kernels import block_sparse_attention
from mmeff.kernels.block_sparse.measure import random_layout
from mmeff.kernels.calibration import seconds
from mmeff.kernels.native_build import build

ROUNDS = 4_000_000


@dataclass(frozen=True)
class Roofline:
    """GFLOP/s of all threads together, over visited pairs; `bound` and `speedup` are over dense attention."""

    threads: int
    peak: float
    dense: float
    sparsity: float
    native: float
    speedup: float
    bound: float


def measure(sparsity: float, *, threads: int, rounds: int = 9, N: int = 4096, H: int = 8, D: int = 64) -> Roofline:
    """Measure peak, dense attention and the native kernel in turn, and return the medians.

    Raises: RuntimeError if the native kernels cannot be compiled here.
    """
    library = build(Path(__file__).parent / "peak.c")
    if library.library is None:
        raise RuntimeError(f"the roofline needs a C compiler: {library.reason}")
    fma = library.library.peak
    fma.restype = ctypes.c_double
    sink = ctypes.c_float(0)
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, N, H, D, generator=g) for _ in range(3))
    layout = random_layout(N, sparsity, H=H)
    cpu = torch.device("cpu")
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    rows: list[tuple[float, float, float]] = []
    for i in range(rounds + 1):
        peak = 2e-9 * fma(ctypes.c_long(ROUNDS), ctypes.c_int(threads), ctypes.byref(sink))
        dense = seconds(lambda: F.scaled_dot_product_attention(*heads_first), cpu)
        ours = seconds(lambda: block_sparse_attention(q, k, v, layout, backend="native"), cpu)
        if i:  # the first round compiles and touches the memory
            rows.append((peak, dense, ours))
    peak, dense, ours = (statistics.median(column) for column in zip(*rows, strict=True))
    flops = 4e-9 * H * N * N * D
    speedup = statistics.median(d / o for _, d, o in rows)
    density = layout.block_density
    return Roofline(
        threads=threads, peak=peak, dense=flops / dense, sparsity=sparsity, native=flops * density / ours,
        speedup=speedup, bound=peak / (flops / dense) / density,
    )  # fmt: skip


def rows(threads: int) -> list[dict[str, float]]:
    """The roofline at the sparsities of the kernel suite."""
    return [asdict(measure(sparsity, threads=threads)) for sparsity in (0.0, 0.5, 0.75, 0.9)]
