"""The commands about dropping visual tokens: `pruning` and `pruning-table` for what it costs in answers, `acting` and
`acting-table` for what it costs a policy that acts, `prefill` for what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import err_console, out_console, positive, progress, shard_of


def pruning(
    model: Annotated[str, typer.Option("--model", "-m", help="tiny-vlm or tiny-video-vlm.")] = "tiny-vlm",
    questions: Annotated[int, typer.Option(help="Questions per variant.")] = 1500,
    only: Annotated[
        list[str] | None, typer.Option(help="Only variants whose name holds this text. May be repeated.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Folder of a trained policy, for CaCoVID.")] = "",
    seconds: Annotated[float | None, typer.Option(help="Begin nothing after this time.  [default: no end]")] = None,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n processes that share the work.")] = "1/1",
    threads: Annotated[int, typer.Option(help="CPU threads of this process.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/pruning-MODEL.jsonl]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the variants and stop.")] = False,
) -> None:
    """Answer questions under every method that drops visual tokens, at equal budgets, on a tiny model.

    Batches of a variant whose rows are in the file are skipped, so that the same command continues.
    """
    positive("--seconds", seconds)
    positive("--threads", threads)
    import torch

    from . import pruning as asked

    if dry_run:
        for variant in asked.chosen(asked.variants(model, asked.load(model)[0], policy), tuple(only or ())):
            print(f"{variant.name} | {variant.reason or variant.method or 'dense'}")
        return
    torch.set_num_threads(threads)
    options = asked.Options(
        model=model,
        questions=questions,
        only=tuple(only or ()),
        seconds=seconds,
        shard=shard_of(shard),
        policy=policy,
        out=out,
    )
    with progress() as tick:
        outcome = asked.run(options, tick)
    print(
        f"batches done: {outcome.done}, before: {outcome.done_before}, left: {outcome.left}; variants that cannot run: "
        f"{outcome.unreachable}; rows: {outcome.out}"
    )


def pruning_table(
    model: Annotated[str, typer.Option("--model", "-m", help="tiny-vlm or tiny-video-vlm.")] = "tiny-vlm",
    file: Annotated[
        Path | None, typer.Argument(help="The rows.  [default: benchmarks/results/pruning-MODEL.jsonl]")
    ] = None,
    policy: Annotated[str, typer.Option(help="Folder of the policy that the rows were made with.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Summary file.  [default: FILE with -summary in its name]")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of the figure.  [default: beside the file]")] = None,
) -> None:
    """Summarise the rows of `pruning`: write a row per variant, print the tables for documentation, and draw the figure."""
    import torch

    from . import plots, results
    from . import pruning_table as table
    from .pruning import rows_file

    file = file or rows_file(model)
    if not file.exists():
        raise FileNotFoundError(
            f"no rows at {file}; `python -m benchmarks pruning --model {model} --out {file}` writes them"
        )
    summaries = table.summarise(file, model, results.Machine.here(torch.device("cpu")), policy)
    summary = out or file.with_name(f"{file.stem}-summary.jsonl")
    table.write_summary(summaries, summary)
    print(table.markdown(summaries))
    figure = (figures or file.parent) / f"{file.stem}.png"
    plots.pruning(summaries, figure)
    err_console.print(f"{summary}\n{figure}", soft_wrap=True)


def acting(
    episodes: Annotated[int, typer.Option(help="Episodes per variant, a multiple of 25.")] = 200,
    only: Annotated[
        list[str] | None, typer.Option(help="Only variants whose name holds this text. May be repeated.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin nothing after this time.  [default: no end]")] = None,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n processes that share the work.")] = "1/1",
    threads: Annotated[int, typer.Option(help="CPU threads of this process.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/acting-tiny-vla.jsonl]"
        ),
    ] = None,
) -> None:
    """Let the tiny policy act with visual tokens dropped, the same episodes under every method.

    Batches of a variant whose rows are in the file are skipped, so that the same command continues.
    """
    positive("--seconds", seconds)
    positive("--threads", threads)
    import torch

    from . import acting as acted

    torch.set_num_threads(threads)
    out = out or acted.ROWS
    with progress() as tick:
        done, before, left = acted.run(
            episodes=episodes, only=tuple(only or ()), seconds=seconds, shard=shard_of(shard), out=out, tick=tick
        )
    print(f"batches done: {done}, before: {before}, left: {left}; rows: {out}")


def acting_table(
    file: Annotated[
        Path | None, typer.Argument(help="The rows.  [default: benchmarks/results/acting-tiny-vla.jsonl]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Summary file.  [default: FILE with -summary in its name]")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of the figure.  [default: beside the file]")] = None,
) -> None:
    """Summarise the rows of `acting`: write a row per variant, print the table for documentation, and draw the figure."""
    import torch

    from . import acting_table as table
    from . import plots, results
    from .acting import ROWS

    file = file or ROWS
    if not file.exists():
        raise FileNotFoundError(f"no rows at {file}; `python -m benchmarks acting --out {file}` writes them")
    summaries = table.summarise(file, results.Machine.here(torch.device("cpu")))
    summary = out or file.with_name(f"{file.stem}-summary.jsonl")
    table.write_summary(summaries, summary)
    print(table.markdown(summaries))
    figure = (figures or file.parent) / f"{file.stem}.png"
    plots.acting(summaries, figure)
    err_console.print(f"{summary}\n{figure}", soft_wrap=True)


def prefill(
    method: Annotated[list[str] | None, typer.Option(help="Only this method. May be repeated.")] = None,
    batch: Annotated[str, typer.Option(help="Prompts at once.")] = "1,4",
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 8,
    width: Annotated[int, typer.Option(help="Width of the decoder, a multiple of 64.")] = 1024,
    side: Annotated[int, typer.Option(help="Visual tokens along a side of the picture.")] = 24,
    text: Annotated[int, typer.Option(help="Text tokens.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed prefills of each side.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: as PyTorch chooses]")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/prefill.jsonl]"),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the file already holds.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit to write into the rows, where git cannot tell.")] = None,
) -> None:
    """Time prefill of a LLaVA with random weights, dense and with visual tokens dropped, in alternation.

    What the file already holds is not measured again. An exclamation mark says that a bar is missed.
    """
    sizes = {
        "--layers": layers,
        "--width": width,
        "--side": side,
        "--text": text,
        "--rounds": rounds,
        "--threads": threads,
    }
    for name, value in sizes.items():
        positive(name, value)
    batches = [part.strip() for part in batch.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in batches):
        raise ValueError(f"--batch must be positive numbers with ',' between them, got {batch!r}")
    if width % 64 or text < 2:
        raise ValueError(f"--width must be a multiple of 64 and --text at least 2, got {width} and {text}")

    import torch
    from rich.table import Table

    from . import prefill as timed
    from . import results

    unknown = sorted(set(method or ()) - set(timed.METHODS))
    if unknown:
        raise ValueError(f"--method must be one of {', '.join(timed.METHODS)}, got {', '.join(unknown)}")
    if threads is not None:
        torch.set_num_threads(threads)
    machine = results.Machine.here(torch.device("cpu"), commit)
    path = out or timed.ROWS
    err_console.print(f"{machine.hardware}; results: {path}", soft_wrap=True)
    shapes = [
        timed.Sizes(
            layers=layers, width=width, inner=width * 43 // 16, heads=width // 64, side=side, text=text, batch=int(b)
        )
        for b in batches
    ]
    with progress() as tick:
        rows = timed.run(method or list(timed.METHODS), shapes, machine, path, rounds=rounds, again=again, tick=tick)
    columns = ("method", "batch", "dense s", "s", "time", "token-layers", "gain", "selection")
    table = Table(*columns, title="prefill, of dense", title_justify="left", box=None, pad_edge=False)
    for row in rows:
        gain = f"{row.gain:.2f}" + ("" if row.reaches_bar else " !")
        selection = f"{row.selection:.1%}" + ("" if row.selection_within else " !")
        table.add_row(
            f"{row.method} {100 * row.budget:g}%", str(row.sizes["batch"]), f"{row.dense_seconds:.3f}", f"{row.seconds:.3f}",
            f"{row.time:.3f}", f"{row.token_layers:.3f}", gain, selection,
        )  # fmt: skip
    out_console.print(table)
