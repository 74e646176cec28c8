"""How fast each backend is on this machine, which is what `backend="auto"` decides by.

The model is small: a backend costs a fixed time per call, and for every query-key pair that it visits `1 / ratio` of what
plain dense attention costs per pair. The ratios are measured once per machine, thread count and dtype, when the first
problem arrives that is worth it (half a second), and kept in the user's cache; `mmeff calibrate` measures them on demand.
Until then, and on GPUs until `mmeff calibrate` ran there, the defaults below hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .cache import cache_dir

_log = logging.getLogger(__name__)

# Dense multiply-adds of a call from which on measuring first is worth it: a tenth of a second on one core.
WORTH_CALIBRATING = 4e9
# Rounds whose ratios of dense to sparse time differ by more than this, p80 over p20, are not trusted.
NOISY = 1.5


@dataclass(frozen=True)
class Rates:
    """Speeds for one device type, dtype and direction ("forward" or "backward").

    dense: multiply-adds of plain dense attention per second. ratios: throughput per visited pair relative to that, by
    backend; "masked" is dense attention with a mask. measured: on this machine, or a default.
    """

    dense: float
    ratios: Mapping[str, float]
    measured: bool = False


# CPU: 2 cores of an AMD EPYC (AVX-512), 64-token blocks, D 64. CUDA: what specifications of comparable kernels report
# for 64-token blocks (0.5), not measured by this project.
_DEFAULTS: dict[tuple[str, str], Rates] = {
    ("cpu", "forward"): Rates(7.5e10, {"native": 1.3, "gather": 0.65, "masked": 0.75}),
    ("cpu", "backward"): Rates(7.5e10, {"native": 1.1, "gather": 0.5, "masked": 0.9}),
    ("cuda", "forward"): Rates(1e14, {"triton": 0.5, "gather": 0.15, "masked": 0.3}),
    ("cuda", "backward"): Rates(1e14, {"triton": 0.4, "gather": 0.1, "masked": 0.3}),
}


def rates(device: torch.device, dtype: torch.dtype, direction: str, multiply_adds: float = 0) -> Rates:
    """Return the speeds to decide by, measuring them first if nobody has and the problem is worth it.

    Args:
        multiply_adds: of plain dense attention on the problem at hand; only a large one starts a measurement.
    """
    default = _DEFAULTS.get((device.type, direction)) or _DEFAULTS["cpu", direction]
    stored = _stored(_machine(device.type))
    name = f"{direction} {str(dtype).removeprefix('torch.')}"
    if name in stored:
        return stored[name]
    wanted = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    if wanted and multiply_adds >= WORTH_CALIBRATING and os.environ.get("MMEFF_CALIBRATE", "1") != "0":
        return calibrate(device, dtype, direction)
    return default


def cost(
    backend: str,
    share: float,
    overhead: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    direction: str,
    multiply_adds: float,
) -> float:
    """Return the predicted time of a call, in units of plain dense attention on the same tensors.

    Args:
        backend: whose ratio to take. share: pairs it visits, of all pairs. overhead: seconds before it computes anything.
        multiply_adds: of plain dense attention.
    """
    at = rates(device, dtype, direction, multiply_adds)
    return share / at.ratios.get(backend, 0.5) + overhead * at.dense / max(multiply_adds, 1.0)


def sparse_rates(device_type: str) -> Rates:
    """Return the forward speeds that plans go by: of float32 on CPUs, of bfloat16 elsewhere, measured or the default."""
    dtype = "float32" if device_type == "cpu" else "bfloat16"
    default = _DEFAULTS.get((device_type, "forward")) or _DEFAULTS["cpu", "forward"]
    return _stored(_machine(device_type)).get(f"forward {dtype}", default)


def sparse_ratio(device_type: str) -> float:
    """Return the throughput per visited pair relative to dense attention of the fastest sparse backend there."""
    return max(ratio for name, ratio in sparse_rates(device_type).ratios.items() if name != "masked")


def calibrate(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    direction: str = "forward",
    *,
    tokens: int = 1024,
    rounds: int = 7,
) -> Rates:
    """Measure every backend against plain dense attention on this machine, and keep the result for later processes.

    Args:
        device, dtype, direction: what to measure. tokens: length of the test sequence. rounds: in each of which dense
            attention and every backend run once; the ratios are medians over the rounds.
    Returns: the measured Rates; or the defaults, where the rounds disagree so much (NOISY) that the machine must be busy
        with something else: a wrong measurement would be kept for good.
    """
    from .block_sparse.measure import measure

    device = torch.device(device)
    name = f"{direction} {str(dtype).removeprefix('torch.')}"
    found = measure(device, dtype, direction, tokens=tokens, rounds=rounds)
    machine = _machine(device.type)
    if found.spread > NOISY:
        default = _DEFAULTS.get((device.type, direction)) or _DEFAULTS["cpu", direction]
        _loaded[machine] = {**_stored(machine), name: default}  # for this process: do not measure at every call
        _log.warning(
            "too busy to calibrate %s (spread %.2f): using defaults; `mmeff calibrate` tries again", name, found.spread
        )
        return default
    rates = Rates(found.dense, found.ratios, measured=True)
    _store(machine, {**_stored(machine), name: rates})
    _log.info("calibrated %s on %s: %s", name, machine, rates)
    return rates


@lru_cache
def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _machine(device_type: str) -> str:
    """What a measurement is valid for: the processor and how many threads use it, or the GPU; and torch's version."""
    if device_type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{_cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _file(machine: str) -> Path:
    return cache_dir("calibration") / f"{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


_loaded: dict[str, dict[str, Rates]] = {}


def _stored(machine: str) -> dict[str, Rates]:
    if machine not in _loaded:
        _loaded[machine] = _read(machine)
    return _loaded[machine]


def _read(machine: str) -> dict[str, Rates]:
    try:
        content: dict[str, Any] = json.loads(_file(machine).read_text())
    except (OSError, ValueError):  # not there yet, or cut off by a crash: measure again
        return {}
    return {name: Rates(row["dense"], row["ratios"], True) for name, row in content.get("rates", {}).items()}


def _store(machine: str, found: dict[str, Rates]) -> None:
    _loaded[machine] = found
    rows = {name: {"dense": r.dense, "ratios": dict(r.ratios)} for name, r in found.items() if r.measured}
    try:
        path = _file(machine)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"machine": machine, "rates": rows}, indent=1))
        partial.replace(path)
    except OSError as error:  # a read-only home: the measurement still holds for this process
        _log.warning("cannot keep the calibration in the cache: %s", error)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
