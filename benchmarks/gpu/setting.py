"""Where a run is: the device with its clocks, whether it is a smoke run on a CPU, and packages that were brought along."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cases import Unavailable
from ..results import Machine

# What nvidia-smi is asked, and the fields of a row: clocks as they are, as high as they may go, and why not higher.
QUERY = {
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "max_sm_mhz", "clocks.max.mem": "max_memory_mhz",
    "power.limit": "power_limit_w", "power.draw": "power_w", "temperature.gpu": "celsius", "driver_version": "driver",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A run. Smoke: the same code at tiny sizes on the CPU, whose rows are not kept because they measure nothing."""

    device: torch.device
    machine: Machine
    smoke: bool = False
    workers: int = 12  # processes that compile candidates of the sweep

    @property
    def arch(self) -> str:
        """The architecture as `mmeff.kernels.tuned` names it; that of an H100 or H200 in a smoke run."""
        from mmeff.kernels import tuned

        return tuned.arch_of(self.device) or "sm90"

    def pick(self, full: Any, smoke: Any) -> Any:
        """One of two sizes."""
        return smoke if self.smoke else full


def here(*, smoke: bool, commit: str | None = None, workers: int = 12) -> Setting:
    """Look around. Raises: ValueError where there is no CUDA device and this is no smoke run."""
    if not smoke and not torch.cuda.is_available():
        raise ValueError(
            "gpu needs a CUDA device, and torch.cuda.is_available() is False; --smoke runs the same code at tiny sizes on a "
            "CPU and keeps no rows"
        )
    device = torch.device("cpu" if smoke else "cuda")
    return Setting(device, Machine.here(device, commit), smoke, workers)


def clocks(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says of the GPU at this moment; why not, where it says nothing; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        found = subprocess.run([*command, f"--id={index}"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"{type(error).__name__}: {error}"[:200]}
    values = [value.strip() for value in found.stdout.strip().splitlines()[0].split(",")]
    return dict(zip(QUERY.values(), values, strict=False))


def bring_wheels(folder: Path, into: Path) -> list[str]:
    """Unpack the pure-Python wheels of a folder and put them in front of `sys.path`; return their names.

    They are unpacked, not imported as zips, because packages read files beside their modules. Compiled wheels are as good where
    they fit this Python: pip would do no more.

    Raises: FileNotFoundError where there is no wheel.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(
            f"--wheels {folder} holds no *.whl; `pip download --no-deps -d {folder} NAME` puts some there"
        )
    site = into / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    return [wheel.name for wheel in wheels]


def need(module: str, what: str) -> None:
    """Raise Unavailable, with what to do, where a package is missing or one that it needs."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(
            f"{what} needs the package {module}, which is not installed here; bring it as a wheel: `pip download --no-deps -d "
            f"wheels {module}` elsewhere, and --wheels wheels here"
        )
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(
            f"{what} needs {module}, which cannot be imported: {error}; bring what is missing as a wheel in the folder that "
            "--wheels names"
        ) from None
