"""The command line of the benchmarks, from the root of a checkout: `python -m benchmarks kernels | roofline | plot | table`
and `video` for speed, `quality | quality-table` for what sparse attention costs, `pruning | pruning-table` and `acting |
acting-table` for what dropping visual tokens costs, `prefill` for what that gains, `digits | digits-table` for whether the
vision backbones learn, `backbones | backbones-table` for how fast they are, `gpu` for all that is said about GPUs.

Exit codes: 0 fine, 1 an error that a message explains, 2 wrong usage, 5 a red gate: a backend is wrong, so nothing is timed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .commands_backbones import backbones, backbones_table, digits, digits_table
from .commands_gpu import gpu
from .commands_pruning import acting, acting_table, prefill, pruning, pruning_table
from .console import err_console, out_console, positive, progress, shard_of

if TYPE_CHECKING:
    from .results import Row
    from .video import File as VideoFile

RED_GATE = 5
COLUMNS = ("case", "backend", "peer", "ours (ms)", "peer (ms)", "speedup, p20 to p80")
FORWARD_COLUMNS = (
    "method", "forward s", "gain", "plan", "attn s", "gain", "plan", "density", "bar", "overhead",
)  # fmt: skip
FIT_COLUMNS = ("method", "frames", "exponent", "of its blocks", "time per block, spread", "layout, share")
# A whole call then fits into ten minutes, with the start of Python and the compilation of kernels.
CUDA_SECONDS = 500.0

app = typer.Typer(
    name="benchmarks",
    help="What the operators of mmeff gain over PyTorch's own: correct first, then timed in alternation, every row kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    positive("--threads", threads)
    positive("--seconds", seconds)
    positive("--pair-seconds", pair_seconds)
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
    with progress() as tick:
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
def video(
    part: Annotated[str, typer.Option(help="forward (end to end), scaling (attention alone), or both.")] = "both",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/video.jsonl]"),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the figure.  [default: beside the file]")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this one end to end. May be repeated.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the transformer.")] = 4,
    heads: Annotated[int, typer.Option(help="Heads of 64 channels of the transformer.")] = 24,
    grid: Annotated[str, typer.Option(help="Tokens of the video end to end: frames x rows x columns.")] = "16x30x52",
    rounds: Annotated[int, typer.Option(help="Forwards of each method.")] = 2,
    dense_rounds: Annotated[int, typer.Option(help="Forwards of the stock transformer.")] = 1,
    frames: Annotated[str, typer.Option(help="Frames of 30 x 52 tokens for scaling.")] = "8,16,32,64",
    scaling_rounds: Annotated[int, typer.Option(help="Calls of each side at every number of frames.")] = 3,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: as PyTorch chooses]")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time for the whole run; the same command continues.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to write into the rows, where git cannot tell.")] = None,
) -> None:
    """Time a video transformer with random weights under every sparse attention, and attention alone as videos get longer.

    What the file already holds is not measured again, so that the same command continues a run that was stopped, and prints
    the tables of one that is complete.
    """
    if part not in ("forward", "scaling", "both"):
        raise ValueError(f"--part must be forward, scaling or both, got {part!r}")
    for name, value in (("--rounds", rounds), ("--dense-rounds", dense_rounds), ("--scaling-rounds", scaling_rounds)):
        positive(name, value)
    positive("--threads", threads)
    positive("--seconds", seconds)
    lengths, (F, H, W) = _numbers("--frames", frames, ","), _numbers("--grid", grid, "x", 3)

    import torch

    from . import plots, results
    from . import video as bench

    unknown = sorted(set(method or ()) - set(bench.FORWARD))
    if unknown:
        raise ValueError(f"--method must be one of {', '.join(bench.FORWARD)}, got {', '.join(unknown)}")
    if threads is not None:
        torch.set_num_threads(threads)
    path = out or results.FOLDER / "video.jsonl"
    file = bench.File(path, results.Machine.here(torch.device("cpu"), commit))
    err_console.print(f"{file.machine.hardware}; results: {path}", soft_wrap=True)
    budget, left = bench.Budget(seconds), 0
    with progress() as tick:
        if part != "scaling":
            sizes = bench.Sizes(layers=layers, heads=heads, grid=(F, H, W))
            left += bench.forward(
                file, sizes, method or list(bench.FORWARD), rounds=rounds, dense_rounds=dense_rounds, budget=budget,
                tick=tick,
            )  # fmt: skip
        if part != "forward":
            left += bench.scaling(file, lengths, rounds=scaling_rounds, budget=budget, tick=tick)
    _print_video(file)
    if part != "forward" and file.latest("fit"):
        print(plots.scaling(file.latest("scaling"), file.latest("fit"), (images or path.parent) / "video-scaling.png"))
    if left:
        print(f"forwards and lengths that the time did not reach: {left}; the same command continues")


def _print_video(file: VideoFile) -> None:
    """A table per size: the forwards with their bars, then the fits. An exclamation mark says that a bar is missed."""

    def print_table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
        table = Table(*columns, title=escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        out_console.print(table)
        print()

    def factor(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    def judged(text: str, good: bool) -> str:
        return text if good else f"{text} !"

    of_size: dict[str, list[list[str]]] = {}
    for line in file.latest("summary"):
        x, s = line.figures, line.sizes
        title = f"{s['layers']} layers, {s['heads']} heads x {s['head_dim']}, grid {' x '.join(map(str, s['grid']))}"
        forward = [f"{x['seconds']:.3g}", f"{x['forward_speedup']:.2f}", factor(x["predicted_forward"])]
        attention = [f"{x['attention_seconds']:.3g}", f"{x['attention_speedup']:.2f}", factor(x["predicted_attention"])]
        cells = [line.method, *forward, *attention, f"{x['density']:.3f}"]
        if "bar" in x:
            cells += [
                judged(f"{x['bar']:.2f}", x["reaches_bar"]),
                judged(f"{x['overhead']:.1%}", x["overhead_within"]),
            ]
        of_size.setdefault(title, []).append(cells)
    for title, rows in of_size.items():
        print_table(title, FORWARD_COLUMNS, rows)
    rows = []
    for line in file.latest("fit"):
        x = line.figures
        cells = [line.method, ", ".join(map(str, x["lengths"])), f"{x['exponent']:.2f}"]
        if "blocks_exponent" in x:
            cells += [f"{x['blocks_exponent']:.2f}", judged(f"{x['spread_per_block']:.1%}", x.get("in_proportion", True)),
                      judged(f"{x['layout_share']:.2%}", x.get("layout_within", True))]  # fmt: skip
        rows.append(cells)
    if rows:
        print_table("attention as the video gets longer", FIT_COLUMNS, rows)


def _numbers(name: str, text: str, separator: str, count: int | None = None) -> list[int]:
    parts = text.split(separator)
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts) or count not in (None, len(parts)):
        wanted = f"{count} positive numbers" if count else "positive numbers"
        raise ValueError(f"{name} must be {wanted} with {separator!r} between them, got {text!r}")
    return [int(part) for part in parts]


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


@app.command()
def quality(
    prompts: Annotated[int, typer.Option(help="Prompts per variant.")] = 256,
    only: Annotated[
        list[str] | None, typer.Option(help="Only variants whose name holds this text. May be repeated.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin nothing after this time.  [default: no end]")] = None,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n processes that share the work.")] = "1/1",
    threads: Annotated[int, typer.Option(help="CPU threads of this process.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSONL file to append to.  [default: benchmarks/results/quality.jsonl]"),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the dense clips.  [default: runs/quality]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the variants and stop.")] = False,
) -> None:
    """Generate clips with every sparse attention on the tiny video model, and score them against dense.

    Batches of a variant whose rows are in the file are skipped, so that the same command continues.
    """
    positive("--seconds", seconds)
    positive("--threads", threads)
    import torch

    from . import quality as judged

    which = judged.chosen(tuple(only or ()))
    if dry_run:
        for variant in which:
            print(f"{variant.name} | {variant.method if variant.method is not None else 'dense'}")
        return
    torch.set_num_threads(threads)
    options = judged.Options(
        prompts=prompts, only=tuple(only or ()), seconds=seconds, shard=shard_of(shard),
        out=out or judged.ROWS, cache=cache or judged.CACHE,
    )  # fmt: skip
    with progress() as tick:
        outcome = judged.run(options, tick)
    for name, value in outcome.seconds.items():
        print(f"{value:7.2f} s of processor time per prompt  {name}")
    print(f"batches done: {outcome.done}, before: {outcome.done_before}, left: {outcome.left}; rows: {options.out}")


@app.command()
def quality_table(
    file: Annotated[Path | None, typer.Argument(help="The rows.  [default: benchmarks/results/quality.jsonl]")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Summary file.  [default: FILE with -summary in its name]")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of the figure.  [default: beside the file]")] = None,
) -> None:
    """Summarise the rows of `quality`: write a row per variant, print the tables for documentation, and draw the figure."""
    import torch

    from . import plots, results
    from . import quality_table as table
    from .quality import ROWS

    file = file or ROWS
    if not file.exists():
        raise FileNotFoundError(f"no rows at {file}; `python -m benchmarks quality --out {file}` writes them")
    summaries = table.summarise(file, results.Machine.here(torch.device("cpu")))
    summary = out or file.with_name(f"{file.stem}-summary.jsonl")
    table.write_summary(summaries, summary)
    print(table.markdown(summaries))
    figure = (figures or file.parent) / f"{file.stem}.png"
    plots.quality(summaries, figure)
    err_console.print(f"{summary}\n{figure}", soft_wrap=True)


for command in (
    pruning,
    pruning_table,
    acting,
    acting_table,
    prefill,
    digits,
    digits_table,
    backbones,
    backbones_table,
    gpu,
):
    app.command()(command)


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
