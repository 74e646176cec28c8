"""The commands about vision backbones: `digits` and `digits-table` for whether every family learns, `backbones` and
`backbones-table` for how fast they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import err_console, out_console, positive, progress

if TYPE_CHECKING:
    from .backbones import Row


def digits(
    only: Annotated[
        list[str] | None, typer.Option(help="Only families whose name holds this text. May be repeated.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin nothing after this time.  [default: no end]")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of this process.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/digits.jsonl]"),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder for the weights that the kernel paths learn.  [default: not kept]")
    ] = None,
) -> None:
    """Train every family of backbones on handwritten digits, on our kernels and on their reference.

    Runs whose rows are in the file are skipped, so that the same command continues. A run below 97 % is an error.
    """
    positive("--seconds", seconds)
    positive("--threads", threads)
    import torch

    from . import digits as learned
    from .results import Machine

    torch.set_num_threads(threads)
    machine = Machine.here(torch.device("cpu"))
    out = out or learned.ROWS
    with progress() as tick:
        done, before, left = learned.run(
            only=tuple(only or ()), seconds=seconds, out=out, machine=machine, tick=tick, weights=weights
        )
    print(f"runs done: {done}, before: {before}, left: {left}; rows: {out}")


def digits_table(
    file: Annotated[Path | None, typer.Argument(help="The rows.  [default: benchmarks/results/digits.jsonl]")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of the figure.  [default: beside the file]")] = None,
) -> None:
    """Print the table of `digits` for documentation, and draw the loss curves of both paths."""
    from . import digits as learned
    from . import digits_table as table

    file = file or learned.ROWS
    if not file.exists():
        raise FileNotFoundError(f"no rows at {file}; `python -m benchmarks digits --out {file}` writes them")
    rows = learned.read(file)
    print(table.markdown(rows))
    figure = (figures or file.parent) / f"{file.stem}.png"
    table.draw(rows, figure)
    err_console.print(str(figure), soft_wrap=True)


def backbones(
    suite: Annotated[
        str, typer.Option(help="quick (the tiny model of each family) or full (every variant of all of them).")
    ] = "quick",
    only: Annotated[
        list[str] | None, typer.Option(help="Only models whose name holds this text. May be repeated.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Sizes of pictures in pixels: N, or height x width as 256x384.")
    ] = "224,384,512,256x384",
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed calls of each model.")] = 5,
    seconds: Annotated[float | None, typer.Option(help="Begin nothing after this time.  [default: no end]")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/backbones.jsonl]"),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the file already holds.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit to write into the rows, where git cannot tell.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases and stop.")] = False,
) -> None:
    """Time vision backbones with random weights, in alternation with timm's Swin and ConvNeXt of their size and with their
    plain form.

    What the file already holds is not measured again, so that the same command continues. An exclamation mark says that a
    bar is missed.
    """
    for name, value in (("--batch", batch), ("--threads", threads), ("--rounds", rounds), ("--seconds", seconds)):
        positive(name, value)
    sizes = _sizes(size)

    import torch

    from . import backbones as timed
    from .results import Machine

    cases = timed.chosen(suite, tuple(only or ()), sizes)
    if dry_run:
        for model, (height, width) in cases:
            print(f"{model} | {height} x {width}")
        return
    torch.set_num_threads(threads)
    machine = Machine.here(torch.device("cpu"), commit)
    path = out or timed.ROWS
    err_console.print(f"{machine.hardware}; results: {path}", soft_wrap=True)
    with progress() as tick:
        rows, left = timed.run(
            cases, machine, path, batch=batch, rounds=rounds, seconds=seconds, again=again, tick=tick
        )
    _print_backbones(rows)
    if left:
        print(f"cases that the time did not reach: {left}; the same command continues")


def backbones_table(
    file: Annotated[
        Path | None, typer.Argument(help="The rows.  [default: benchmarks/results/backbones.jsonl]")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of the figure.  [default: beside the file]")] = None,
) -> None:
    """Print the tables of `backbones` for documentation, and draw the times at 512 pixels relative to swin_tiny."""
    from . import backbones as timed
    from . import backbones_table as table

    file = file or timed.ROWS
    if not file.exists():
        raise FileNotFoundError(f"no rows at {file}; `python -m benchmarks backbones --out {file}` writes them")
    rows = timed.latest(timed.read(file))
    print(table.markdown(rows))
    figure = (figures or file.parent) / f"{file.stem}.png"
    table.draw(rows, figure)
    err_console.print(str(figure), soft_wrap=True)


def _print_backbones(rows: list[Row]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from . import backbones_table

    for heading, of_size in backbones_table.by_size(rows).items():
        table = Table(
            *backbones_table.COLUMNS, title=escape(heading), title_justify="left", title_style="bold", box=None
        )
        for row in of_size:
            table.add_row(*map(escape, backbones_table.cells(row)))
        out_console.print(table)
        print()


def _sizes(text: str) -> list[tuple[int, int]]:
    """Height and width of every size. Raises ValueError for other text."""
    found = []
    for part in text.split(","):
        sides = part.strip().split("x")
        if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
            raise ValueError(f"--size must be sizes such as 224 or 256x384 with ',' between them, got {text!r}")
        found.append((int(sides[0]), int(sides[-1])))
    return found
