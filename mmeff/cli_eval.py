"""`mmeff eval` and `mmeff report`: a dataset through a model and its methods, and what came of it.

    mmeff eval motions --method fastv --method divprune -o runs/motions --workers 2
    mmeff report runs/motions --parquet

The same command continues a run that was stopped or killed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from mmeff.config import MethodConfig
    from mmeff.evaluation.evaluate import Progress as Step
    from mmeff.evaluation.evaluate import Run
    from mmeff.evaluation.scores import Scores

STOPPED = 130
QUIET_SECONDS = 10  # between lines of progress where there is no terminal

out_console = Console()
err_console = Console(stderr=True)

Models = "Folder, hub name, or an embedded model.  [default: the tiny model that suits the dataset]"
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; continued if it holds this run.")]


def register(app: typer.Typer) -> None:
    """Add `eval` and `report` to the command line."""
    app.command("eval")(evaluate_dataset)
    app.command("report")(report)


def evaluate_dataset(
    dataset: Annotated[
        str, typer.Argument(help="layout:path, such as mvbench:/data/MVBench; scenes or motions; or a path.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help=Models)] = "",
    method: Annotated[
        list[str] | None, typer.Option("--method", help="A method's name; a+b installs both. May be repeated.")
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="YAML file with `method:` and fields. May be repeated.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="field=value for every method that has the field.")
    ] = None,
    dense: Annotated[bool, typer.Option(help="Also run the model as it is.")] = True,
    out: Out = Path("runs/eval"),
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="name=value for the dataset's layout. May be repeated.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local, torchrun or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Processes or actors; 0 works in this process.")] = 1,
    ray_address: Annotated[str, typer.Option(help="Of a Ray cluster to join; starts Ray here if empty.")] = "",
    gpus: Annotated[float, typer.Option(help="GPUs for each Ray actor.")] = 0.0,
    batch: Annotated[int, typer.Option(help="Samples that the model sees at a time.")] = 1,
    prefetch: Annotated[int, typer.Option(help="Samples that are read ahead of the model.")] = 4,
    readers: Annotated[int, typer.Option(help="Threads that read, in each worker.")] = 2,
    read_timeout: Annotated[float, typer.Option(help="Seconds until reading a sample is given up.")] = 300.0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of PyTorch in each worker.  [default: the cores, shared out]")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
    video_frames: Annotated[int | None, typer.Option(help="Frames shown of each clip.  [default: 8]")] = None,
    video_fps: Annotated[float | None, typer.Option(help="Frames per second shown of each clip.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens generated at most per answer.  [default: 32]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels of a generated video.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels of a generated video.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a generated video.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    parquet: Annotated[bool, typer.Option("--parquet", help="Write units.parquet too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a dataset through a model, dense and with each method, losing nothing: quality, speed and cost side by side.

    Every result is on disk when it is made. Ctrl-C ends the run after the units in flight; the same command goes on where it
    stopped, also after a crash. `report.html` in the folder shows the result.

        mmeff eval video_mme:/data/Video-MME -m Qwen/Qwen2.5-VL-3B-Instruct --method adaptinfer --video-fps 1 -o runs/mme

        torchrun --nproc-per-node 8 -m mmeff.cli eval ... --executor torchrun
    """
    from mmeff.evaluation.evaluate import evaluate
    from mmeff.evaluation.units import Factory, Pace

    for_answers = {"num_frames": video_frames, "fps": video_fps, "new_tokens": new_tokens}
    for_videos = {
        "height": height, "width": width, "num_frames": frames, "num_inference_steps": steps, "guidance_scale": guidance
    }  # fmt: skip
    options = {**_pairs(option, "--option"), **({} if limit is None else {"limit": limit})}
    opened = Factory(
        function="mmeff.evaluation.datasets:open_dataset", arguments={"spec": _absolute(dataset), **options}
    )
    samples = opened.build()
    for note in samples.notes:
        err_console.print(note, style="yellow")
    task = samples[0].task
    mine, other = (for_answers, for_videos) if task == "ask" else (for_videos, for_answers)
    typed = [name for name, value in other.items() if value is not None]
    if typed:
        raise ValueError(f"{', '.join(typed)} cannot be set for {dataset}, whose samples are to {task}; leave them out")
    source = model or _embedded_for(samples[0])
    arguments = {
        "source": source, "task": task, "device": device, "dtype": dtype,
        **{name: value for name, value in mine.items() if value is not None},
    }  # fmt: skip
    pace = Pace(
        batch=batch, prefetch=prefetch, readers=readers, read_timeout=read_timeout,
        threads=threads or max(1, (os.cpu_count() or 1) // max(1, workers)),
    )  # fmt: skip
    with _shown(as_json or not _first_rank()) as show:
        run = evaluate(
            Factory(function="mmeff.evaluation.adapters:load_model", arguments=arguments), opened,
            _methods(method, config, set_), out=out, dense=dense, executor=executor, workers=workers, address=ray_address,
            gpus=gpus, pace=pace, retry=retry_failed, show=show,
        )  # fmt: skip
    if executor == "torchrun" and (run.left or run.stopped):
        return  # the rank that finds nothing left makes the report
    _finish(run, None, parquet, as_json)
    if run.stopped:
        err_console.print(f"stopped with {run.left} units left; the same command continues")
        raise typer.Exit(STOPPED)
    if run.merged.rows and not run.merged.done:
        raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `mmeff eval`, finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the report.  [default: the run's]")
    ] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write units.parquet too.")] = False,
    vbench: Annotated[
        Path | None, typer.Option(help="Also write the videos into this folder, as `vbench evaluate` takes them.")
    ] = None,
    dimension: Annotated[
        list[str] | None, typer.Option(help="A dimension of VBench for its command; may be repeated.")
    ] = None,
    custom_prompts: Annotated[
        bool, typer.Option("--custom-prompts", help="The prompts are your own, and not VBench's list.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make the report of a run: report.html, scores.csv and units.csv. It may be made while the run goes on."""
    from mmeff.evaluation.evaluate import look
    from mmeff.evaluation.export_vbench import export

    if vbench is None and (dimension or custom_prompts):
        raise ValueError("--dimension and --custom-prompts are for --vbench; pass its folder, or leave them out")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    run = look(folder)
    _finish(run, out, parquet, as_json)
    if vbench is not None:
        for one in export(run, vbench, dimensions=dimension or (), custom=custom_prompts):
            err_console.print(f"{one.variant}: {one.count} videos in {one.videos}", soft_wrap=True)
            for note in one.notes:
                err_console.print(note, style="yellow", soft_wrap=True)
            err_console.print(f"in VBench's own environment: {one.command}", soft_wrap=True, highlight=False)


def _finish(run: Run, out: Path | None, parquet: bool, as_json: bool) -> None:
    """Write the report and print the table."""
    from mmeff.evaluation.results_page import write_report
    from mmeff.evaluation.run_folder import to_plain

    if not run.merged.rows:
        if not run.stopped:
            raise ValueError(f"{run.folder} has no results yet; run `mmeff eval` into it first")
        return
    scores, files = write_report(run, out=out, parquet=parquet)
    if as_json:
        print(json.dumps(to_plain({**scores.to_dict(), "left": run.left, "files": files}), indent=1))
        return
    _print(run, scores)
    out_console.print(f"results: {files[-1]}", soft_wrap=True, highlight=False)


def _print(run: Run, scores: Scores) -> None:
    from mmeff.evaluation.results_page import summary

    columns, rows = summary(scores)
    table = Table("", *(str(row[0]) for row in rows), title=run.config["dataset"]["name"], title_justify="left")
    for i, name in enumerate(columns[1:], 1):
        table.add_row(name, *("" if row[i] is None else str(row[i]) for row in rows))
    out_console.print(table)
    for note in scores.notes:
        err_console.print(note, style="yellow", soft_wrap=True)
    for row in run.merged.failed[:5]:
        err_console.print(f"{row['sample']}, {row['method']}: {row['reason']}", soft_wrap=True, markup=False)


@contextmanager
def _shown(quiet: bool) -> Iterator[Callable[[Step], None]]:
    """How progress is shown: a bar on a terminal, a line now and then in a log, nothing where it would be in the way."""
    if quiet:
        yield lambda step: None
    elif err_console.is_terminal:
        with Progress(TextColumn("{task.description}"), BarColumn(), console=err_console, transient=True) as bar:
            task = bar.add_task("starting", total=None)
            yield lambda step: bar.update(
                task, description=str(step), completed=step.done + step.failed, total=step.total
            )
    else:
        last, whole = time.monotonic(), False

        def line(step: Step) -> None:
            nonlocal last, whole
            now, ended = time.monotonic(), step.done + step.failed == step.total
            if (now - last > QUIET_SECONDS and not whole) or (ended and not whole):
                last, whole = now, ended
                print(step, file=sys.stderr, flush=True)

        yield line


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _methods(names: list[str] | None, files: list[Path] | None, pairs: list[str] | None) -> list[list[MethodConfig]]:
    """The variants that the options name, with `--set` fields in those that have them.

    Raises: TypeError: a field that none of the methods has. ValueError: fields and no method.
    """
    from mmeff.config import check_fields
    from mmeff.registry import build

    stacks = [[build(path)] for path in files or []]
    stacks += [[build(part.strip()) for part in name.split("+")] for name in names or []]
    fields, every = _pairs(pairs, "--set"), [config for stack in stacks for config in stack]
    if fields and not every:
        raise ValueError("--set has no method to apply to; pass --method or --config")
    for field in fields:
        if not any(field in config.to_dict() for config in every):
            check_fields(type(every[0]), {field: None})  # raises, with near matches
    return [[c.replace(**{k: v for k, v in fields.items() if k in c.to_dict()}) for c in stack] for stack in stacks]


def _pairs(pairs: list[str] | None, what: str) -> dict[str, Any]:
    """`name=value` pairs, values read as YAML."""
    import yaml

    found = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{what} needs name=value, got {pair!r}")
        found[name.strip()] = yaml.safe_load(value)
    return found


def _absolute(spec: str) -> str:
    """A dataset's spec that means the same to a worker in another folder."""
    if Path(spec).expanduser().exists():
        return str(Path(spec).expanduser().absolute())
    layout, colon, path = spec.partition(":")
    if colon and Path(path).expanduser().exists():
        return f"{layout}:{Path(path).expanduser().absolute()}"
    return spec


def _embedded_for(sample: Any) -> str:
    if sample.task == "generate":
        return "tiny-video"
    return "tiny-video-vlm" if any(media.kind == "video" for media in sample.media) else "tiny-vlm"
