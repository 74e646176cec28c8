"""`mmeff calibrate` and `mmeff bench`: how fast the kernels are on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

import mmeff

if TYPE_CHECKING:
    import torch

    from mmeff.kernels.calibration import Rates

DTYPES = ("float32", "bfloat16", "float16")
# A GPU needs a longer sequence before its kernels fill it.
TOKENS = {"cpu": 1024, "cuda": 8192}
# `bench` hands its arguments on as they are.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

out_console = Console()
err_console = Console(stderr=True)


def calibrate(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16 or float16; may be repeated.  [default: float32 and bfloat16]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads that the result is for.  [default: as PyTorch chooses]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure every kernel backend against dense attention on this machine, which is what `backend="auto"` goes by.

    The result is kept for later processes with as many threads. On CPUs the first large problem measures by itself; on GPUs
    conservative defaults hold until this command ran. Run it while the machine has nothing else to do.
    """
    import torch

    from mmeff.kernels import calibration
    from mmeff.kernels.cache import cache_dir

    chosen = _device(device)
    names = list(dict.fromkeys(dtype or ["float32", "bfloat16"]))
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be >= 1, got {threads}")
        if chosen.type != "cpu":
            raise ValueError(f"--threads is for --device cpu, got {chosen}; leave it out")
        torch.set_num_threads(threads)
    found: dict[tuple[str, str], Rates] = {}
    for name in names:
        for direction in ("forward", "backward"):
            if not as_json:
                err_console.print(f"measuring {direction} {name}", style="dim")
            found[direction, name] = calibration.calibrate(
                chosen, getattr(torch, name), direction, tokens=TOKENS[chosen.type]
            )
    folder = cache_dir("calibration")
    busy = any(not rates.measured for rates in found.values())
    if as_json:
        _print_json(chosen, found, folder)
    else:
        _print_table(chosen, found)
        if not busy:
            out_console.print(f"kept in {folder}", soft_wrap=True, highlight=False)
    if busy:
        err_console.print(
            "the machine was too busy to measure all of it: where it says default, auto goes by the defaults. Run this again "
            "when nothing else runs.",
            style="yellow",
        )
        raise typer.Exit(1)


def _device(name: str) -> torch.device:
    """Raises ValueError for a device that is not there, or that no default exists for."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in TOKENS:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} needs a CUDA device, and torch.cuda.is_available() is False")
    return device


def break_even(backend: str, ratio: float) -> float | None:
    """Return the density below which a backend beats dense attention by the model of calibration, 0 to 1.

    None for "masked", which computes every pair whatever the density.
    """
    return None if backend == "masked" else min(1.0, ratio)


def _print_table(device: torch.device, found: dict[tuple[str, str], Rates]) -> None:
    table = Table("direction", "dtype", "backend", "per visited pair", "faster than dense", "from", title=str(device))
    for (direction, dtype), rates in found.items():
        origin = "measured" if rates.measured else "default"
        table.add_row(direction, dtype, "dense", f"{2e-9 * rates.dense:,.0f} GFLOP/s", "", origin, style="bold")
        for backend, ratio in sorted(rates.ratios.items(), key=lambda item: -item[1]):
            table.add_row(direction, dtype, backend, f"{ratio:.2f} x dense", _in_words(backend, ratio), origin)
    out_console.print(table)


def _in_words(backend: str, ratio: float) -> str:
    density = break_even(backend, ratio)
    if density is None:
        return "never: it computes every pair" if ratio <= 1 else "always"
    return "at any density" if density == 1 else f"below density {density:.2f}"


def _print_json(device: torch.device, found: dict[tuple[str, str], Rates], folder: Path) -> None:
    import json

    rows: list[dict[str, Any]] = [
        {
            "direction": direction, "dtype": dtype, **asdict(rates),
            "break_even_density": {name: break_even(name, ratio) for name, ratio in rates.ratios.items()},
        }
        for (direction, dtype), rates in found.items()
    ]  # fmt: skip
    print(json.dumps({"device": str(device), "folder": str(folder), "rates": rows}, indent=1))


Verb = Literal[
    "kernels", "gpu", "roofline", "plot", "table", "video", "quality", "quality-table", "pruning", "pruning-table", "acting",
    "acting-table", "prefill", "backbones", "backbones-table", "digits", "digits-table",
]  # fmt: skip


def bench(
    context: typer.Context,
    verb: Annotated[Verb, typer.Argument(help="What to do; further arguments are those of `python -m benchmarks`.")],
) -> None:
    """Time the kernels against PyTorch's own, from a checkout of the repository; the same as `python -m benchmarks`.

    Nothing is timed that did not first compute the right thing. Results are appended to a JSONL file row by row, and a run that
    was stopped continues where it was. `python -m benchmarks kernels --help` lists what can be set.

        mmeff bench kernels --device cpu --suite quick --threads 2
    """
    root = Path(mmeff.__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").exists():
        raise FileNotFoundError(
            f"bench needs the benchmarks, which come with the repository and not with the installed package: there is no "
            f"{root / 'benchmarks'}. Clone the repository, run `make venv` in it, and call .venv/bin/mmeff bench there."
        )
    # -P and the path: a folder called benchmarks where the user stands must not be taken for ours
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    call = [sys.executable, "-P", "-m", "benchmarks", verb, *context.args]
    code = subprocess.run(call, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    if code:
        raise typer.Exit(code)
