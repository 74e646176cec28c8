"""`gpu`: everything that is measured on a GPU, in calls of a few minutes that continue each other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .console import err_console, out_console, positive, progress

PARTS = ("gate", "sweep", "kernels", "forward", "prefill", "backbones")
SIGNALS = {"SIGTERM": 143, "SIGINT": 130}


def gpu(
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(PARTS)}; may be repeated, runs in this order.  [default: all]"),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time of the whole call, shared by its parts.")] = 9.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/h200.jsonl]"),
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="Folder of wheels that are missing here, such as diffusers.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile the candidates of the sweep.")] = 12,
    again: Annotated[bool, typer.Option("--again", help="Measure what the file already holds.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes on the CPU, to see that all of it runs; no row is kept.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would run and what the file holds, and stop.")
    ] = False,
    commit: Annotated[str | None, typer.Option(help="Commit to write into the rows, where git cannot tell.")] = None,
) -> None:
    """Measure on an NVIDIA GPU: a correctness gate, tile sizes, kernels, denoisers, vision-language models, backbones.

    Nothing is begun that cannot end within --minutes; the same command continues. A red gate ends the run with exit code 5.
    An exclamation mark says that a bar is missed.
    """
    positive("--minutes", minutes)
    positive("--workers", workers)
    unknown = sorted(set(part or ()) - set(PARTS))
    if unknown:
        raise ValueError(f"--part must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        if wheels is not None:  # before anything is imported that one of them could hold
            from .gpu.setting import bring_wheels

            err_console.print(f"brought along: {', '.join(bring_wheels(wheels, Path(folder)))}", soft_wrap=True)
        _run([p for p in PARTS if not part or p in part], minutes, out, workers, again, smoke, dry_run, commit)


def _run(
    chosen: list[str],
    minutes: float,
    out: Path | None,
    workers: int,
    again: bool,
    smoke: bool,
    dry_run: bool,
    commit: str | None,
) -> None:
    from importlib import import_module

    from rich.markup import escape
    from rich.table import Table

    from . import results
    from .gate import GateFailed
    from .gpu import engine, report, rows, setting

    here = setting.here(smoke=smoke or dry_run, commit=commit, workers=workers)
    parts = [import_module(f"benchmarks.gpu.{name}").PART for name in chosen]
    if dry_run:
        full = setting.Setting(here.device, here.machine)
        for p in parts:
            for task in p.tasks(full, rows.File(Path("dry"), here)):
                print(f"{p.name} | {task.name} | at most {task.seconds:.0f} s")
        return
    path = out or results.FOLDER / "h200.jsonl"
    file = rows.File(path, here)
    told = "a smoke run: nothing of it is a measurement, and no row is kept" if smoke else f"results: {path}"
    clocks = ", ".join(f"{name} {value}" for name, value in setting.clocks(here.device).items())
    err_console.print(
        f"{here.machine.hardware}; torch {here.machine.environment['torch']}; {clocks}; {told}", soft_wrap=True
    )
    with progress() as tick:
        outcome = engine.run(parts, file, seconds=60 * minutes, again=again, tick=tick)
    shown = [row for name in chosen for row in file.latest(name)]
    for name, where in (("sweep", "mmeff/kernels/tuned.py"), ("kernels", "_DEFAULTS in mmeff/kernels/calibration.py")):
        entries = import_module(f"benchmarks.gpu.{name}").entries(file) if name in chosen else ""
        if entries:
            print(f"for {where}:\n{entries}\n")
    table = Table(*report.COLUMNS, box=None, pad_edge=False)
    for cells, style in report.lines(shown):
        table.add_row(*map(escape, cells), style=style)
    out_console.print(table)
    print(
        f"done {outcome.done}, failed {outcome.failed}, held before {outcome.before}, left {outcome.left}"
        + ("; the same command continues" if outcome.left or outcome.stopped else "")
    )
    print(told)
    if outcome.red is not None:
        raise GateFailed(outcome.red)
    if outcome.stopped is not None:
        err_console.print(f"stopped by {outcome.stopped}")
        raise typer.Exit(SIGNALS[outcome.stopped])
    if outcome.failed:
        raise typer.Exit(1)
