"""The gate: every Triton kernel in every dtype at sizes that divide by nothing, against float64, before anything is timed.

Where this runs in Triton's interpreter (TRITON_INTERPRET=1), the same checks judge the same kernels on a CPU; without either
they judge the plain backends, which is what a smoke run can do at least.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmeff.kernels import BlockLayout, Bounds, block_sparse_attention, neighborhood_attention, record, token_scores

from .. import workloads
from ..cases import BlockSparse, Case, Neighborhood, RandomBlocks, Routed, TokenScores, Unavailable
from ..gate import TIMES, Gate, GateFailed
from ..results import ROOT
from .engine import Part, Task
from .rows import File
from .setting import Setting
from .workers import Answer, Workers, attempt

DTYPES = ("bfloat16", "float16", "float32")
ROUTED_TIMES = 3.0  # what the tests allow it too: the output is merged from parts, which is one more rounding
REPEATS = 100  # a race shows in some of many runs
PLAIN = {"block_sparse_attention": "gather", "routed_attention": "grouped", "neighborhood_attention": "reference",
         "token_scores": "chunked"}  # fmt: skip


@dataclass(frozen=True)
class Masked:
    """A layout whose blocks are attended in part, by bounds on positions or by a bitmap."""

    block: int
    bitmap: bool = False

    def build(self, *, N: int, H: int, device: torch.device) -> BlockLayout:
        if not self.bitmap:
            return BlockLayout.from_bounds(Bounds.causal(N, N), q_block=self.block, kv_block=self.block).to(device)
        mask = torch.rand(1, 1, N, N, generator=torch.Generator().manual_seed(1)) < 0.3
        mask |= torch.eye(N, dtype=torch.bool)
        mask[..., N // 3 : N // 2, :] = True  # rows much longer than the others, which run in pieces
        return BlockLayout.from_dense_mask(mask.to(device), q_block=self.block, kv_block=self.block)

    def __str__(self) -> str:
        return f"{'a bitmap in' if self.bitmap else 'causal'} {self.block}-blocks"


def gate_of(work: workloads.Workload) -> Gate:
    """The gate with the budget of the kernels' tests: beyond a multiple of plain PyTorch's error, a rounding of the largest
    value in half precision, and four in float32, because plain gradients of some sizes come out nearly exact."""
    roundings = 4 if work.dtype == torch.float32 else 1
    times = ROUTED_TIMES if isinstance(work.case, Routed) else TIMES
    return Gate(work, times, roundings * torch.finfo(work.dtype).eps)


def interpreted() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend_of(operator: str, setting: Setting) -> str:
    """Whom the gate judges: the Triton kernels, or a plain backend where there is neither a GPU nor the interpreter."""
    return "triton" if setting.device.type == "cuda" or interpreted() else PLAIN[operator]


def cases(dtype: str, *, small: bool) -> Iterator[Case]:
    """What is judged in a dtype. small: for the interpreter, where an iteration takes milliseconds."""
    both: Any = {"dtype": dtype, "direction": "forward+backward"}
    if small:
        yield BlockSparse(N=83, H=2, Hk=1, D=24, layout=Masked(32, bitmap=True), **both)
        yield Routed(N=70, H=2, D=16, kv_block=13, picks=2, **both)
        yield Neighborhood(N=77, H=2, D=16, grid=(7, 11), window=(3, 5), bias=True, **both)
        yield TokenScores(N=83, H=2, Hk=1, D=24, rows=5, dtype=dtype)
        return
    for D in (64, 128):
        for block in (64, 128):
            yield BlockSparse(N=2999, H=8, Hk=2, D=D, layout=RandomBlocks(block, 0.6), **both)
    for layout in (Masked(64), Masked(64, bitmap=True), Masked(128), Masked(128, bitmap=True)):
        yield BlockSparse(N=1531, H=4, Hk=4, D=128, layout=layout, **both)
    yield BlockSparse(N=1531, H=4, Hk=2, D=72, layout=RandomBlocks(49, 0.5), **both)
    yield BlockSparse(N=777, H=2, Hk=1, D=256, layout=Masked(64, bitmap=True), **both)
    for D in (64, 128):
        yield Routed(N=1999, H=4, D=D, kv_block=121, picks=3, **both)
        yield Neighborhood(N=3696, H=4, Hk=2, D=D, grid=(7, 22, 24), window=(3, 9, 10), stride=(1, 2, 5), **both)
        yield TokenScores(N=2777, H=8, Hk=2, D=D, rows=37, dtype=dtype)
    yield Neighborhood(N=1457, H=3, D=32, grid=(31, 47), window=(7, 7), dilation=(2, 3), bias=True, **both)
    yield TokenScores(N=2777, H=8, Hk=8, D=80, rows=1, dtype=dtype)


def check(case: Case, setting: Setting) -> dict[str, Any]:
    """The figures of one check. Raises: GateFailed, or Unavailable."""
    backend = backend_of(case.operator, setting)
    work = workloads.build(case, setting.device)
    contender = work.ours(backend)
    with record() as calls:
        errors = gate_of(work).check(contender, f"backend {backend!r}")
    ran = sorted({call.backend for call in calls})
    if backend == "triton" and "triton" not in ran:
        raise GateFailed(f"red gate: {case.name} was to run on the Triton kernels, and ran on {', '.join(ran)}")
    worst = max(error / allowed if allowed else float(error > 0) for error, allowed in errors.values())
    return {"errors": {name: list(pair) for name, pair in errors.items()}, "of_allowed": worst, "backend": ran}


# ---------------------------------------------------------------- determinism


def _random(setting: Setting, *shape: int) -> Tensor:
    dtype = torch.float32 if setting.smoke else torch.bfloat16
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g).to(setting.device, dtype).requires_grad_()


def _block_sparse(setting: Setting) -> Callable[[], list[Tensor]]:
    N, backend = setting.pick(3001, 90), backend_of("block_sparse_attention", setting)
    q, k, v = (_random(setting, 2, N, heads, 64) for heads in (4, 2, 2))
    layout = Masked(64, bitmap=True).build(N=N, H=4, device=setting.device)

    def run() -> list[Tensor]:
        out = block_sparse_attention(q, k, v, layout, backend=backend)
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    return run


def _neighborhood(setting: Setting) -> Callable[[], list[Tensor]]:
    backend = backend_of("neighborhood_attention", setting)
    grid = setting.pick((5, 30, 22), (3, 5, 6))
    q, k, v = (_random(setting, 1, *grid, 2, 64) for _ in range(3))

    def run() -> list[Tensor]:
        out = neighborhood_attention(q, k, v, (3, 5, 5), backend=backend)
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    return run


def _token_scores(setting: Setting) -> Callable[[], list[Tensor]]:
    backend = backend_of("token_scores", setting)
    rows, k = _random(setting, 2, 20, 4, 64), _random(setting, 2, setting.pick(3001, 90), 2, 64)

    def run() -> list[Tensor]:
        out = token_scores(rows, k, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), (rows, k))]

    return run


# Calls whose bits are promised to be the same every time, gradients included.
REPEATED = {
    "block_sparse_attention": _block_sparse,
    "neighborhood_attention": _neighborhood,
    "token_scores": _token_scores,
}


def repeat(make: Callable[[Setting], Callable[[], list[Tensor]]], setting: Setting, times: int) -> dict[str, Any]:
    """The figures of a repeated call. Raises: GateFailed if a run gives other bits than the first."""
    run = make(setting)
    first = run()
    for i in range(times):
        for j, (x, y) in enumerate(zip(run(), first, strict=True)):
            if not torch.equal(x, y):
                raise GateFailed(
                    f"red gate: run {i + 2} of the same call gives other bits than the first: {int((x != y).sum())} of "
                    f"{x.numel()} elements of result {j} differ"
                )
    return {"repeats": times, "results": len(first)}


# ---------------------------------------------------------------- the tests of the repository


def tests(setting: Setting, seconds: float) -> dict[str, Any]:
    """Run the tests that need a GPU, and those of the Triton kernels on it, in processes of their own."""
    if setting.device.type != "cuda":
        raise Unavailable("the tests that are marked gpu need a CUDA device; `make test` runs the others")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or interpreter", "-p", "no:cacheprovider", "-n", "12",
                   "--dist", "load", "--maxfail", "20", f"--basetemp={Path(folder) / 'pytest'}", "tests/kernels"]  # fmt: skip
        try:
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"the tests did not end within {seconds:g} s") from error
    last = ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr.strip()[-300:]
    if ran.returncode == 1:
        failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise GateFailed(f"red gate: {last}; {'; '.join(failed[:10])}")
    if ran.returncode:
        raise Unavailable(f"pytest ended with code {ran.returncode}: {last}")
    return {"summary": last}


TEST_SECONDS = 400.0
PATIENCE = 200.0  # seconds for all checks


def tasks(setting: Setting, file: File) -> Generator[Task, None, None]:
    """All checks, the dtype of models first. On a GPU the first task makes them all, many at a time, and each gets its row."""
    small, workers = setting.smoke, Workers(setting)
    dtypes = DTYPES[2:] if small and not interpreted() else DTYPES
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        case.name: partial(check, case, setting) for dtype in dtypes for case in cases(dtype, small=small)
    }
    times = setting.pick(REPEATS, 2)
    for name, make in REPEATED.items():
        calls[f"{name} | the same bits {times} times"] = partial(repeat, make, setting, times)
    open_ = {name: call for name, call in calls.items() if file.held(PART.name, name) is None}
    answers: dict[str, Answer] = {}

    def answer(name: str) -> dict[str, Any]:
        if not answers:
            answers.update(workers.ask(open_, PATIENCE))
        if name not in answers:  # held, and wanted again
            answers[name] = attempt(calls[name])
        found: dict[str, Any] = answers[name].result()
        return found

    try:
        for name in calls:
            yield Task(name=name, seconds=0.0 if answers else 100.0, run=partial(answer, name))
        yield Task(name="tests of the kernels", seconds=TEST_SECONDS, run=partial(tests, setting, TEST_SECONDS))
    finally:
        workers.close()


PART = Part(name="gate", weight=4, tasks=tasks, judges=True)
