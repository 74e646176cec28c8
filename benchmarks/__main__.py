"""The command line of the benchmarks: `python -m benchmarks kernels | roofline | plot | table`, from the root of a checkout.

Exit codes: 0 fine, 1 an error that a message explains, 2 wrong usage, 5 a red gate: a backend is wrong, so nothing is timed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from .results import Row

RED_GATE = 5
COLUMNS = ("case", "backend", "peer", "ours (ms)", "peer (ms)", "speedup, p20 to p80")
# A whole call then fits into ten minutes, with the start of Python and the compilation of kernels.
CUDA_SECONDS = 500.0

app = typer.Typer(
    name="benchmarks",
    help="What the operators of mmeff gain over PyTorch's own: correct first, then timed in alternation, every row kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out_console = Console()
err_console = Console(stderr=True)


@app.command()
def kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    suite: Annotated[str, typer.Option(help="quick (minutes) or full (every figure of the documentation).")] = "quick",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/DEVICE.jsonl]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: as PyTorch chooses]")] = None,
    seconds: Annotated[
        float | None, typer.Option(help=f"Time for the whole run.  [default: none on cpu, {CUDA_SECONDS:g} on cuda]")
    ] = None,
    pair_seconds: Annotated[
        float | None,
        typer.Option(help="Time for the rounds of one pair, once it has the fewest.  [default: 8 on cpu, 2 on cuda]"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name holds this text. May be repeated.")
    ] = None,
    flex: Annotated[
        bool | None,
        typer.Option("--flex/--no-flex", help="Compare with compiled FlexAttention.  [default: on cuda only]"),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the file already holds.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit to write into the rows, where git cannot tell.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases and stop.")] = False,
) -> None:
    """Time the kernels against their peers, and append a row per pair to a results file.

    A case whose row is in the file is skipped, so that a run which was stopped, or ran out of --seconds, is continued by the
    same command. What cannot run here is a skipped row with its reason.
    """
    _positive("--threads", threads)
    _positive("--seconds", seconds)
    _positive("--pair-seconds", pair_seconds)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")

    from . import results, runner, suites

    cases = suites.cases(device, suite)
    if only:
        cases = [c for c in cases if any(text in c.name for text in only)]
    if not cases:
        raise ValueError(f"--only {' '.join(only or [])} leaves no case of suite {suite}; --dry-run lists their names")
    if dry_run:
        for case in cases:
            print(f"{case.name} | {', '.join(case.backends)} against {', '.join(case.peers)}")
        return

    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch.cuda.is_available() is False")
    if threads is not None:
        torch.set_num_threads(threads)
    path = out or results.FOLDER / f"{device}.jsonl"
    machine = results.Machine.here(torch.device(device), commit)
    options = runner.Options(
        out=path,
        seconds=CUDA_SECONDS if seconds is None and device == "cuda" else seconds,
        pair_seconds=pair_seconds,
        flex=device == "cuda" if flex is None else flex,
        again=again,
    )
    err_console.print(f"{machine.hardware}; torch {machine.environment['torch']}; results: {path}", soft_wrap=True)
    with _progress() as tick:
        outcome = runner.run(cases, machine, options, tick)
    _print_rows(outcome.rows)
    if outcome.done_before:
        print(f"pairs that were measured before: {outcome.done_before}; --again measures them anew")
    if outcome.left:
        print(f"pairs that the time did not reach: {outcome.left}; the same command continues")


@app.command()
def roofline(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSONL file to append to.")] = None,
) -> None:
    """Measure what this processor could do at most in float32, beside dense attention and the native kernel."""
    import json

    import torch

    from . import results
    from . import roofline as lines

    torch.set_num_threads(threads)
    machine = results.Machine.here(torch.device("cpu"))
    out = out or results.FOLDER / "roofline.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for row in lines.rows(threads):
            file.write(json.dumps({"hardware": machine.hardware, **machine.environment, **row}) + "\n")
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    print(out)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A results file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the figures.  [default: beside the file]")
    ] = None,
) -> None:
    """Draw speedup against sparsity, and one figure of all other operators."""
    from . import plots, results

    for path in plots.draw(results.read(_existing(file)), out or file.parent, file.stem):
        print(path)


@app.command()
def table(
    file: Annotated[Path, typer.Argument(help="A results file.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="For documentation.")] = False,
) -> None:
    """Print the latest row of every pair in a results file."""
    from . import results

    rows = results.latest(results.read(_existing(file)))
    if not markdown:
        _print_rows(rows)
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for row in rows:
        print(f"| {' | '.join(_cells(row))} |")


def _cells(row: Row) -> list[str]:
    """One row for people, without a character that would break a Markdown table."""
    backend = row.backend if row.ran in (None, row.backend) else f"{row.backend}: {row.ran}"
    start = [row.case.replace(" | ", ", "), backend, row.peer]
    if row.ours is None or row.theirs is None or row.ratio is None:
        return [*start, "", "", f"skipped: {row.reason}".replace("|", "/")]
    speedup = f"{row.ratio['p50']:.2f} ({row.ratio['p20']:.2f} to {row.ratio['p80']:.2f})"
    missed = f", below its bar of {row.bar:g}" if row.bar_missed else ""
    return [*start, f"{row.ours['p50'] * 1e3:.3g}", f"{row.theirs['p50'] * 1e3:.3g}", speedup + missed]


def _print_rows(rows: list[Row]) -> None:
    """A table per case: with the case in a column, an ordinary terminal would have room for nothing else."""
    for case in dict.fromkeys(row.case for row in rows):
        table = Table(*COLUMNS[1:], title=escape(case), title_justify="left", title_style="bold")
        for row in rows:
            if row.case == case:
                style = "dim" if row.status == "skipped" else "yellow" if row.bar_missed else None
                table.add_row(*map(escape, _cells(row)[1:]), style=style)
        out_console.print(table)


def _existing(file: Path) -> Path:
    if not file.exists():
        raise FileNotFoundError(f"no results file at {file}; `python -m benchmarks kernels --out {file}` writes one")
    return file


def _positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be > 0, got {value:g}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error; yields the callback (what, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err_console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tick(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(what[:90].ljust(90)), completed=done, total=total)

        yield tick


def main() -> None:
    """Entry point: expected errors become one line on standard error."""
    from .gate import GateFailed

    try:
        app()
    except (ValueError, OSError, GateFailed) as error:
        if os.environ.get("MMEFF_TRACEBACK"):
            raise
        err_console.print("[red]error:[/red]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(RED_GATE if isinstance(error, GateFailed) else 1)
    except KeyboardInterrupt:
        err_console.print("stopped; the same command continues")
        sys.exit(130)


if __name__ == "__main__":
    main()
