"""Tile sizes, warps and pipeline stages of the Triton kernels, per architecture; and a sweep that finds better ones.

A plain table, because Triton's own autotuner cannot be made without a GPU and would time every new shape of every user.
`tune` times candidates on the user's GPU once and keeps the winner in the cache directory, where `config` finds it.

The forward entries begin with the defaults that FlexAttention publishes in PyTorch 2.15 (Inductor's template heuristics),
whose kernel walks lists as ours does. Its backward default is 16 x 16 without pipelining, which is meant to be replaced by
its autotuner; the backward entries begin with that autotuner's candidates instead (32 or 64 by 32 to 128). All of them were
compiled for their architecture by Triton 3.9, and changed where registers spilled or shared memory ran out. That they are
fast is not measured yet: no entry has been timed by this project. What the project does time goes into `mmeff/kernels/tuned.py`,
which comes before this table.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from .. import tuned
from ..cache import cache_dir

if TYPE_CHECKING:
    from .problem import Problem

# Shared memory that one program may have, bytes (CUDA C++ Programming Guide, technical specifications per capability).
SHARED_MEMORY = {"sm80": 163 * 1024, "sm89": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
PASSES = ("forward", "dq", "dkdv")


@dataclass(frozen=True)
class Config:
    """How one kernel runs: a program keeps `rows` tokens and loads `cols` tokens at a time."""

    rows: int
    cols: int
    warps: int
    stages: int


# By bytes of an element, the config for a head of at most so many channels.
_Heads = dict[int, Config]
# Products of float32 run on the ordinary cores, on every architecture alike, and hold their operands in registers:
# FlexAttention's tiles (128 x 32 and 32 x 64) spill hundreds of bytes here, these none, but for dq at 256.
_FLOAT32: dict[str, _Heads] = {
    "forward": {64: Config(64, 32, 8, 3), 128: Config(32, 16, 8, 3), 256: Config(32, 16, 8, 2)},
    "dq": {64: Config(32, 32, 8, 3), 128: Config(32, 16, 8, 3), 256: Config(16, 16, 8, 1)},
    "dkdv": {64: Config(32, 32, 8, 3), 128: Config(32, 16, 8, 3), 256: Config(16, 16, 4, 1)},
}
# Three stages wherever they fit: with two, the loads of the next tile are issued only when this one is nearly done.
TABLE: dict[str, dict[str, dict[int, _Heads]]] = {
    "forward": {
        # Flex has 32 x 64 tiles for 256 channels; eight warps hold 64 rows without spilling
        "sm80": {2: {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 3)}},
        # two stages from 128 channels on, as Flex has for the equally small sm120: tiles of a bitmap must fit too
        "sm89": {2: {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)}},
        # Flex has four warps for 64 channels, which spill here
        "sm90": {2: {64: Config(128, 128, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 4, 3)}},
        # Flex has four warps for 64 and 256 channels
        "sm100": {2: {64: Config(128, 64, 8, 3), 128: Config(128, 128, 8, 2), 256: Config(64, 32, 8, 3)}},
    },
    "dq": {
        "sm80": {2: {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 3)}},
        "sm89": {2: {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(32, 32, 4, 2)}},
        # twice Flex's rows: a warp group multiplies 64 rows, and two of them share each tile of keys
        "sm90": {2: {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 3)}},
        "sm100": {2: {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 3)}},
    },
    "dkdv": {  # two accumulators: fewer columns than dq
        "sm80": {2: {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(64, 16, 8, 3)}},
        "sm89": {2: {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(32, 32, 4, 1)}},
        "sm90": {2: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(32, 32, 4, 3)}},
        "sm100": {2: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(32, 32, 4, 3)}},
    },
}
for _kernel, _archs in TABLE.items():
    for _widths in _archs.values():
        _widths[4] = _FLOAT32[_kernel]

# Throughput of a tile of so many tokens, relative to one of 128: what the hardware loses on narrow tiles (a judgement).
_TILE_SPEED = {16: 0.25, 32: 0.5, 64: 0.8, 128: 1.0}


def arch_of(capability: tuple[int, int]) -> str:
    """Return the row of the table for a compute capability; GPUs with little shared memory share that of sm89."""
    if capability in ((8, 0), (8, 7)):
        return "sm80"
    return {9: "sm90", 10: "sm100"}.get(capability[0], "sm89")


def tile(block: int, largest: int) -> int:
    """Return the tile, a power of two from 16 to `largest`, that covers a block of so many tokens at the least cost.

    Narrow tiles are slow, wide ones waste the tokens that stick out: a block of 96 takes one tile of 128, not three of 32.
    """
    return min((t for t in _TILE_SPEED if t <= largest), key=lambda t: -(-block // t) * t / _TILE_SPEED[t])


def fitted(config: Config, row_block: int, col_block: int) -> Config:
    """Return the config with its tiles cut to a layout's blocks, and no more warps than its rows can occupy."""
    rows, cols = tile(row_block, config.rows), tile(col_block, config.cols)
    return Config(rows, cols, max(4, config.warps * rows // config.rows), config.stages)


def from_table(kernel: str, arch: str, itemsize: int, D: int, row_block: int, col_block: int) -> Config:
    """Return the table's config for one kernel ("forward", "dq" or "dkdv"), cut to the layout's blocks."""
    heads = TABLE[kernel][arch][itemsize]
    return fitted(heads[min(width for width in heads if width >= D)], row_block, col_block)


def config(kernel: str, q: Tensor, row_block: int, col_block: int) -> Config:
    """Return the config to run a kernel with on the device of q: what was tuned on it, what was measured, or the table's."""
    device = _Device.of(q.device) if q.device.type == "cuda" else None
    if device is not None:
        own = _tuned(device).get(_key(kernel, q.dtype, q.shape[-1], row_block, col_block))
        if own is not None:
            return own
    measured = tuned.find(f"block_sparse {kernel}", q, (row_block, col_block))
    if measured is not None:
        return fitted(Config(*measured), row_block, col_block)
    # the interpreter is indifferent to everything but the tiles
    arch = "sm80" if device is None else device.arch
    return from_table(kernel, arch, q.element_size(), q.shape[-1], row_block, col_block)


# ---------------------------------------------------------------- tuning


class _Device(NamedTuple):
    name: str
    arch: str

    @staticmethod
    def of(device: torch.device) -> _Device:
        return _Device(torch.cuda.get_device_name(device), arch_of(torch.cuda.get_device_capability(device)))

    @property
    def file(self) -> Path:
        return cache_dir("triton") / f"{re.sub(r'[^A-Za-z0-9]+', '-', self.name)}-{self.arch}.json"


def _key(kernel: str, dtype: torch.dtype, D: int, row_block: int, col_block: int) -> str:
    return f"{kernel} {str(dtype).removeprefix('torch.')} D{D} blocks {row_block}x{col_block}"


@lru_cache
def _tuned(device: _Device) -> dict[str, Config]:
    """Read what `tune` stored for a device."""
    try:
        return {key: Config(**fields) for key, fields in json.loads(device.file.read_text()).items()}
    except (FileNotFoundError, json.JSONDecodeError):  # never tuned, or cut off by a crash: the table holds
        return {}


def _remember(device: _Device, found: dict[str, Config]) -> None:
    _tuned.cache_clear()  # another process may have stored others
    stored = {key: asdict(config) for key, config in (_tuned(device) | found).items()}
    partial = device.file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(stored, indent=1))
    partial.replace(device.file)
    _tuned.cache_clear()


# Rows, columns and stages that are tried, each with 4 and with 8 warps.
_SEARCH = {
    "forward": ((64, 128), (32, 64, 128), (2, 3, 4)),
    "backward": ((32, 64, 128), (32, 64), (1, 2, 3)),
}


def candidates(kernel: str, row_block: int, col_block: int) -> list[Config]:
    """Return the configs that `tune` tries, cut to the layout's blocks and without repetition."""
    rows, cols, stages = _SEARCH["forward" if kernel == "forward" else "backward"]
    every = (Config(*c) for c in itertools.product(rows, cols, (4, 8), stages))
    return list(dict.fromkeys(fitted(c, row_block, col_block) for c in every))


def tune(problem: Problem, *, rounds: int = 10) -> dict[str, Config]:
    """Time the candidates of every kernel on this problem, and keep the fastest ones for later calls and processes.

    Takes a minute or two, most of it compilation. The winners hold for this GPU, dtype, head width and block sizes.

    Args:
        problem: on a CUDA device, of the shapes that matter. Its backward kernels are tuned if it is for training.
        rounds: timings of a candidate, of which the fastest counts.

    Returns: the winners by the name under which they are stored.
    Raises: BackendUnavailable where the Triton backend cannot run the problem on a GPU.
    Numerics: a candidate whose results differ from the table's by more than rounding is dropped.
    """
    from . import triton_impl

    refusal = triton_impl.why_not(problem)
    if refusal is None and problem.q.device.type != "cuda":
        refusal = "tuning times kernels, which means nothing outside a CUDA device"
    if refusal is not None:
        raise BackendUnavailable(f"triton_configs.tune: the Triton backend cannot run this problem: {refusal}.")
    return _sweep(problem, _Device.of(problem.q.device), rounds)


def _sweep(problem: Problem, device: _Device, rounds: int) -> dict[str, Config]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from . import triton_impl

    found = {}
    for kernel, row_block, col_block, run in triton_impl.kernels_of(problem):
        wanted = run(config(kernel, problem.q, row_block, col_block))
        best, best_time = None, math.inf
        for candidate in candidates(kernel, row_block, col_block):
            try:
                if not all(_agree(x, y) for x, y in zip(run(candidate), wanted, strict=True)):
                    continue
                milliseconds = _fastest(lambda: run(candidate), rounds)  # noqa: B023 called at once
            except (CompilationError, OutOfResources, PTXASError):  # too large for this GPU: not a candidate there
                continue
            except RuntimeError as error:
                if "PassManager" not in str(error):
                    raise
                continue  # the compiler's passes give up on some combinations
            if milliseconds < best_time:
                best, best_time = candidate, milliseconds
        if best is not None:
            found[_key(kernel, problem.q.dtype, problem.D, row_block, col_block)] = best
    _remember(device, found)
    return found


def _fastest(run: Callable[[], object], rounds: int) -> float:
    """Return the shortest of some timings of `run` on the current CUDA stream, in milliseconds."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in events)


def _agree(x: Tensor, y: Tensor) -> bool:
    """Whether two results are the same but for the order of their sums."""
    finite = y.isfinite()
    error = torch.where(finite, x - y, 0.0).float().abs().max()
    size = torch.where(finite, y, 0.0).float().abs().max().clamp(min=0.25)
    return torch.equal(x.isfinite(), finite) and bool(error <= 16 * torch.finfo(y.dtype).eps * size)
