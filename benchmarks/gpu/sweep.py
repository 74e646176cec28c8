"""The sweep: which tiles, warps and stages are fastest for each kernel, dtype and head width; the winners are to be checked in.

Candidates are compiled and judged in processes of their own, many at a time: most of a sweep is compilation, and a kernel that
crashes takes no more with it than its process. What agrees with the table's results is then timed by itself in this
process, from the compiler's cache. The winner must also run on blocks that are attended in part, which take more shared memory.

A candidate is put into `mmeff.kernels.tuned` for the time of its call, so that what is measured is what a checked-in entry does.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from mmeff.kernels import BlockLayout, neighborhood_attention, token_scores, tuned
from mmeff.kernels.block_sparse import op as block_sparse_op
from mmeff.kernels.block_sparse import triton_configs
from mmeff.kernels.block_sparse.problem import BackwardProblem, Problem
from mmeff.kernels.dispatch import without_autocast
from mmeff.kernels.tuned import Tiles

from .. import timing
from ..cases import Unavailable
from .engine import Part, Task
from .gate import Masked, interpreted
from .rows import File
from .setting import Setting
from .workers import Workers

ROUNDS = 7  # timings of a candidate, of which the median counts
PATIENCE = 100.0  # seconds for the candidates of a group
WORTH = 0.02  # that the winner must be faster than what runs today, or nothing is to be checked in
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """One entry to be found: a kernel, a dtype, a head width and, for kernels that walk layouts, the layout's blocks."""

    kernel: str
    dtype: str
    D: int
    N: int
    H: int = 8
    blocks: tuple[int, int] | None = None
    smoke: bool = False

    @property
    def key(self) -> str:
        """The entry's name in `tuned.TUNED`."""
        return tuned.key(self.kernel, getattr(torch, self.dtype), self.D, self.blocks)


def groups(*, smoke: bool) -> Iterator[Group]:
    """What is swept, the most used first: the dtype and head width of nearly every model, then 64 channels, then other dtypes."""
    if smoke:
        yield Group(kernel="block_sparse forward", dtype="float32", D=16, N=64, H=1, blocks=(32, 32), smoke=True)
        yield Group(kernel="token_scores forward", dtype="float32", D=16, N=64, H=1, smoke=True)
        return
    for dtype, D in (
        ("bfloat16", 128),
        ("bfloat16", 64),
        ("float16", 128),
        ("float16", 64),
        ("float32", 64),
        ("float32", 128),
    ):
        N = 8192 if dtype == "float32" else 16384
        for blocks in ((128, 128), (64, 64), (64, 128)):  # the last are the groups of routed attention, in long blocks
            for kernel in ("forward", "dq", "dkdv"):
                turned = blocks[::-1] if kernel == "dkdv" else blocks
                yield Group(kernel=f"block_sparse {kernel}", dtype=dtype, D=D, N=N, blocks=turned)
        for direction in ("forward", "backward"):
            yield Group(kernel=f"neighborhood {direction}", dtype=dtype, D=D, N=N)
            yield Group(kernel=f"token_scores {direction}", dtype=dtype, D=D, N=N)


def candidates(group: Group) -> list[Tiles]:
    """What is tried, without repetition: FlexAttention's sizes and their neighbours. Float32 holds its operands in registers."""
    forward, wide = group.kernel.endswith("forward"), group.dtype == "float32"
    if group.smoke:
        return [Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1)]
    rows, cols = ((16, 32, 64), (16, 32)) if wide else ((64, 128) if forward else (32, 64, 128), (32, 64, 128))
    stages = (1, 2, 3) if wide else (2, 3, 4) if forward else (1, 2, 3)
    every = [Tiles(*c) for c in itertools.product(rows, cols, (4, 8), stages)]
    if group.blocks is not None:  # no tile is larger than its block
        every = [Tiles(**asdict(triton_configs.fitted(triton_configs.Config(*t), *group.blocks))) for t in every]
    return list(dict.fromkeys(every))


# ---------------------------------------------------------------- running a kernel


def tensors(group: Group, device: torch.device, N: int | None = None) -> list[Tensor]:
    """q, k, v and a gradient, (1, N, H, D) standard normal."""
    g = torch.Generator(device).manual_seed(0)
    size = (1, N or group.N, group.H, group.D)
    return [torch.randn(size, generator=g, device=device, dtype=getattr(torch, group.dtype)) for _ in range(4)]


def runner(group: Group, device: torch.device, layout: Any = None) -> Run:
    """A call of the group's kernel, and of no other that would take its time; layout: in place of random blocks."""
    operator, kernel = group.kernel.split()
    if operator == "block_sparse":
        return _block_sparse(group, kernel, device, layout)
    return (_neighborhood if operator == "neighborhood" else _token_scores)(group, kernel, device)


def _backend(device: torch.device) -> str:
    return "triton" if device.type == "cuda" or interpreted() else "auto"


def _block_sparse(group: Group, kernel: str, device: torch.device, layout: Any) -> Run:
    assert group.blocks is not None
    q_block, kv_block = group.blocks[::-1] if kernel == "dkdv" else group.blocks
    q, k, v, dout = tensors(group, device, None if layout is None else layout.q_len)
    layout = _random(group, q_block, kv_block, device) if layout is None else layout
    problem = Problem(q, k, v, layout, group.D**-0.5, True, training=True)
    name = _backend(device)
    forward = next(
        b for b in block_sparse_op.FORWARD if b.name == name or (name == "auto" and b.why_not(problem) is None)
    )
    if kernel == "forward":
        return lambda: [x for x in forward.run(problem) if x is not None]
    out, lse = forward.run(problem)
    needs = (True, False, False) if kernel == "dq" else (False, True, True)
    gradients = BackwardProblem(problem, out, lse, dout, None, needs)
    backward = next(b for b in block_sparse_op.BACKWARD if b.name == forward.name)
    return lambda: [x for x in backward.run(gradients) if x is not None]


def _random(group: Group, q_block: int, kv_block: int, device: torch.device) -> Any:
    """A quarter of the blocks of every row, whichever."""
    g = torch.Generator().manual_seed(0)
    rows, cols = -(-group.N // q_block), -(-group.N // kv_block)
    chosen = torch.rand(1, group.H, rows, cols, generator=g).topk(max(1, cols // 4), -1).indices
    mask = torch.zeros(1, group.H, rows, cols, dtype=torch.bool).scatter_(-1, chosen, True)
    return BlockLayout.from_block_mask(
        mask.to(device), q_len=group.N, kv_len=group.N, q_block=q_block, kv_block=kv_block
    )


def _neighborhood(group: Group, kernel: str, device: torch.device) -> Run:
    grid = (group.N // 1024, 32, 32)
    q, k, v, dout = (x.view(1, *grid, group.H, group.D) for x in tensors(group, device))
    call = partial(neighborhood_attention, window=(grid[0] // 2 or 1, 16, 16), stride=(1, 4, 4), backend="triton")
    if kernel == "forward":
        return lambda: [cast(Tensor, call(q, k, v))]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = call(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _token_scores(group: Group, kernel: str, device: torch.device) -> Run:
    q, k, _, _ = tensors(group, device)
    rows = q[:, -min(128, group.N // 2) :].contiguous()
    call = partial(token_scores, backend=_backend(device))
    if kernel == "forward":
        return lambda: [call(rows, k)]
    leaves = [x.requires_grad_() for x in (rows, k)]
    with torch.enable_grad():
        out = call(*leaves)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


@contextmanager
def entered(group: Group, arch: str, tiles: Tiles | None) -> Iterator[None]:
    """Inside the block the entry is in the table; None takes out the one that is there, which leaves the backend's own."""
    table = tuned.TUNED.setdefault(arch, {})
    before = table.pop(group.key, None)
    if tiles is not None:
        table[group.key] = tiles
    try:
        yield
    finally:
        table.pop(group.key, None)
        if before is not None:
            table[group.key] = before


# ---------------------------------------------------------------- judging and timing


@lru_cache(maxsize=1)
def _prepared(group: Group, arch: str, device: torch.device) -> tuple[Run, list[Tensor]]:
    """A group's call in this process, and what it returns with today's tiles."""
    run = runner(group, device)
    with torch.no_grad(), without_autocast(device):
        return run, [x.clone() for x in run()]


def judge(group: Group, tiles: Tiles, arch: str, device: torch.device) -> str | None:
    """Run a candidate once, which compiles it; return why it is none, or None. Raises whatever its compiler does."""
    run, wanted = _prepared(group, arch, device)
    with entered(group, arch, tiles), without_autocast(device):
        found = run()
    if all(triton_configs._agree(x, y) for x, y in zip(found, wanted, strict=True)):
        return None
    return "its results differ from those of the table"


def seconds(run: Run, device: torch.device, *, graphs: bool) -> float:
    """The median of some timings, by events, of as many calls in a row as take a few milliseconds.

    graphs: replay calls that are shorter than a launch from Python is, where they can be captured.
    """
    run()
    once = timing._seconds(run, 1, device)
    calls = max(1, round(timing.LEAST_SECONDS[device.type] / max(once, 1e-6)))
    if graphs and device.type == "cuda" and once < timing.GRAPH_BELOW:
        replay = timing._captured(run, calls)
        return statistics.median(timing._seconds(replay, 1, device) for _ in range(ROUNDS)) / calls
    return statistics.median(timing._seconds(run, calls, device) for _ in range(ROUNDS))


def sweep(group: Group, setting: Setting, workers: Workers) -> dict[str, Any]:
    """The figures of a group: seconds of every candidate, what runs today, and the winner."""
    device, arch = setting.device, setting.arch
    if device.type == "cuda" and group.kernel.startswith("block_sparse"):
        own = triton_configs._Device.of(device)
        if triton_configs._tuned(own):
            raise Unavailable(
                f"{own.file} holds what somebody tuned on this machine, which comes before every entry; take it away"
            )
    tried = candidates(group)
    answers = workers.ask({t: partial(judge, group, t, arch, device) for t in tried}, PATIENCE)
    # too many registers, too much shared memory, a pass of the compiler that gives up: whatever it is, it is no candidate
    refused = {t: answer.value for t, answer in answers.items()}
    run, _ = _prepared(group, arch, device)
    graphs = group.kernel == "token_scores forward"  # the only one that is short
    with without_autocast(device):
        with entered(group, arch, None):
            fallback = seconds(run, device, graphs=graphs)
        timed = {}
        for t in tried:
            if refused[t] is None:
                with entered(group, arch, t):
                    timed[t] = seconds(run, device, graphs=graphs)
        best, drawbacks = None, {}
        for t in sorted(timed, key=timed.__getitem__):
            reason = _not_everywhere(group, t, setting)
            if reason is None:
                best = t
                break
            drawbacks[t] = reason
    _prepared.cache_clear()
    gain = None if best is None else fallback / timed[best]
    return {
        "kernel": group.kernel, "dtype": group.dtype, "D": group.D, "arch": arch, "key": group.key, "N": group.N, "H": group.H,
        "fallback_seconds": fallback,
        "candidates": [
            {"tiles": list(t), "seconds": timed.get(t), "refused": refused[t] or drawbacks.get(t)} for t in tried
        ],
        "best": None if best is None else list(best), "gain": gain,
        "worth": gain is not None and gain >= 1 + WORTH,
    }  # fmt: skip


def _not_everywhere(group: Group, tiles: Tiles, setting: Setting) -> str | None:
    """Why a candidate that runs on full blocks cannot serve others: those attended in part take more shared memory."""
    if group.blocks is None:
        return None
    turned = group.blocks[::-1] if group.kernel.endswith("dkdv") else group.blocks
    for bitmap in (False, True):
        if turned[0] != turned[1]:
            continue  # routed attention knows no such blocks
        size = setting.pick(1000, 40)
        layout = Masked(turned[0], bitmap).build(N=size, H=group.H, device=setting.device)
        try:
            run = runner(group, setting.device, layout)
            with entered(group, setting.arch, None):
                wanted = [x.clone() for x in run()]
            with entered(group, setting.arch, tiles):
                found = run()
        except Exception as error:  # as with the candidates before
            return f"on partly attended blocks: {type(error).__name__}: {str(error)[:120]}"
        if not all(triton_configs._agree(x, y) for x, y in zip(found, wanted, strict=True)):
            return "on partly attended blocks: its results differ from those of the table"
    return None


def entries(file: File) -> str:
    """The table to be checked in: lines of `mmeff/kernels/tuned.py` from the rows of the sweep, each with its gain."""
    found: dict[str, list[str]] = {}
    for row in file.latest("sweep"):
        x = row.figures
        if row.status == "measured" and x["worth"]:
            tiles = ", ".join(map(str, x["best"]))
            line = f'        "{x["key"]}": Tiles({tiles}),  # {x["gain"]:.2f} x the table, {row.date[:10]}'
            found.setdefault(x["arch"], []).append(line)
    if not found:
        return ""
    parts = [f'    "{arch}": {{\n' + "\n".join(lines) + "\n    },\n" for arch, lines in found.items()]
    return "TUNED: dict[str, dict[str, Tiles]] = {\n" + "".join(parts) + "}"


def tasks(setting: Setting, file: File) -> Generator[Task, None, None]:
    """A task per group."""
    workers = Workers(setting)
    try:
        for group in groups(smoke=setting.smoke):
            run = partial(sweep, group, setting, workers)
            yield Task(name=f"{group.key} | N{group.N} H{group.H}", seconds=60, run=run)
    finally:
        workers.close()


PART = Part(name="sweep", weight=3, tasks=tasks)
