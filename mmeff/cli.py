"""The command line: `mmeff list | plan | compare | generate | ask | eval | report | calibrate | bench | train | demo`.

Every command prints for people, or with `--json` for programs. A method is named as in Python; its fields come from
`--config file.yaml` and from `--set field=value`, which wins. Exit codes: 0 fine, 1 an error that a message explains, 2 wrong
usage, 3 a method accelerated nothing, 4 a training missed its gate.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import mmeff
from mmeff.cli_bench import PASS_ON, bench, calibrate
from mmeff.cli_calibrate import calibrate_app
from mmeff.cli_demo import register as register_demo
from mmeff.cli_eval import register as register_eval
from mmeff.cli_train import MISSED, train_app
from mmeff.config import MethodConfig, describe, normalise
from mmeff.errors import MediaError, NothingAccelerated

app = typer.Typer(
    name="mmeff",
    help="Faster vision-language models and video diffusion transformers, without retraining, honestly measured.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(train_app, name="train")
calibrate_app.command("kernels")(calibrate)
app.add_typer(calibrate_app, name="calibrate")
register_eval(app)
register_demo(app)
out_console = Console()
err_console = Console(stderr=True)


class Exit(IntEnum):
    """What a command's exit code means."""

    FINE, ERROR, USAGE, IDLE, GATE = 0, 1, 2, 3, MISSED


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Folder, hub name, or an embedded model: tiny-video, tiny-image, tiny-vlm, tiny-video-vlm.",
    ),
]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="A method's name, as `mmeff list` shows it. May be repeated.")
]
Config = Annotated[
    list[Path] | None, typer.Option("--config", "-c", help="YAML file with `method:` and fields. May be repeated.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="field=value for every method that has the field, e.g. --set keep=0.25."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in the folder.")]


def settings(pairs: list[str] | None) -> dict[str, Any]:
    """`field=value` pairs, values read as YAML."""
    import yaml

    fields = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set needs field=value, got {pair!r}; for example --set keep=0.25")
        fields[name.strip()] = yaml.safe_load(value)
    return fields


def chosen(
    names: list[str] | None, files: list[Path] | None, pairs: list[str] | None, default: str
) -> list[MethodConfig]:
    """The methods that the options name, with `--set` fields applied to those that have them.

    Raises:
        TypeError: a field that none of the methods has.
    """
    from mmeff.registry import build

    configs = [build(path) for path in files or []] + [build(name) for name in names or []]
    configs = configs or [build(default)]
    fields = settings(pairs)
    for field in fields:
        if not any(field in c.to_dict() for c in configs):
            configs[0].replace(**{field: fields[field]})  # raises, with near matches
    return [c.replace(**{k: v for k, v in fields.items() if k in c.to_dict()}) for c in configs]


@contextmanager
def progress(quiet: bool) -> Iterator[Any]:
    """A progress bar on standard error; yields the callback (what, done, total)."""
    if quiet:
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err_console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tick(what: str, done: int, total: int) -> None:
            bar.update(task, description=what[:60].ljust(60), completed=done, total=total)

        yield tick


def show(value: Any, as_json: bool) -> None:
    """Print an object with `to_dict` and `str`."""
    if as_json:
        _print_json(value.to_dict())
    else:
        print(value)


@app.command("list")
def list_methods(
    as_json: AsJson = False, fields: Annotated[bool, typer.Option("--fields", help="Show every field.")] = False
) -> None:
    """List every method: what it is for, where it comes from, and with --fields what can be set."""
    from mmeff.registry import broken_plugins

    found = mmeff.methods()
    if as_json:
        rows = [
            {
                "name": m.name, "class": m.config.__name__, "stage": m.stage, "hosts": list(m.hosts), "summary": m.summary,
                "source": m.source, "needs_training": m.needs_training, "fields": [vars(f) for f in describe(m.config)],
            }
            for m in found
        ]  # fmt: skip
        print(json.dumps({"methods": rows, "broken_plugins": broken_plugins()}, indent=1))
        return
    table = Table("method", "stage", "hosts", "what it does", "source")
    for m in found:
        table.add_row(m.name, m.stage, ", ".join(m.hosts), m.summary, m.source)
    out_console.print(table)
    if fields:
        for m in found:
            table = Table("field", "default", "type", "unit", "meaning", title=m.name, title_justify="left")
            for f in describe(m.config):
                table.add_row(f.name, str(f.default), f.type, f.unit, f.doc)
            out_console.print(table)
    for plugin, reason in broken_plugins().items():
        err_console.print(f"plugin {plugin} could not be loaded: {reason}", style="yellow")


@app.command()
def plan(
    method: Annotated[str, typer.Argument(help="The method's name; may be left out with --config.")] = "",
    model: Model = "",
    config: Config = None,
    set_: Settings = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Text tokens of the prompt.")] = None,
    images: Annotated[int | None, typer.Option(help="Images in the prompt.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what a method would do at given sizes, before anything runs: density, predicted speedup, every fallback."""
    from mmeff.pipelines.loading import load

    if not method and not config:
        raise ValueError("plan needs a method: its name, or --config file.yaml; `mmeff list` shows the names")
    configs = chosen(None if config else [method], config, set_, method)
    if len(configs) != 1 or (method and configs[0].name() != normalise(method)):
        raise ValueError(
            f"plan takes one method, got {method or 'no name'} and {', '.join(c.name() for c in configs)} from --config"
        )
    loaded = load(model or _embedded_for(configs[0]), device=device, dtype=dtype)
    given = {
        "height": height, "width": width, "num_frames": frames, "num_inference_steps": steps, "text_tokens": text_tokens,
        "images": images, "batch": batch,
    }  # fmt: skip
    own = _video_defaults(loaded)
    own["text_tokens"] = own.get("max_sequence_length")
    given = {k: own.get(k) if v is None else v for k, v in given.items()}
    show(mmeff.plan(loaded.model, configs[0], **{k: v for k, v in given.items() if v is not None}), as_json)


def _embedded_for(config: MethodConfig) -> str:
    return "tiny-video" if config.stage == "diffusion_attn" else "tiny-vlm"


@app.command()
def compare(
    model: Model = "",
    method: Methods = None,
    config: Config = None,
    set_: Settings = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Prompt, or question about the images.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="jpg or png; may be repeated.")] = None,
    video: Annotated[
        Path | None, typer.Option("--video", help="mp4: frames of it are shown to a vision-language model.")
    ] = None,
    video_frames: Annotated[int | None, typer.Option(help="Frames taken from --video.  [default: 4]")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("runs/compare"),
    height: Annotated[int | None, typer.Option(help="Pixels.  [default: 480]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.  [default: 832]")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.  [default: 81]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: 50]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.  [default: 5]")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens generated at most per answer.  [default: 32]")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Mean of visual tokens over layers, of all, for every method, such as 0.25; or native, for each method's own "
            "setting.  [default: that of the first method, where several are compared]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Noise seed.  [default: 0]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Dense against fast on the same inputs: videos side by side, answers, quality, and where the time went.

    Without arguments it runs the embedded models on sample inputs. With --model it runs yours:

        mmeff compare -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers --method radial -p "a cat surfing" --set dense_steps=12

        mmeff compare -m llava-hf/llava-1.5-7b-hf --method fastv -i photo.jpg -p "What is in the picture?"
    """
    for_video = {
        "seed": seed, "height": height, "width": width, "num_frames": frames, "num_inference_steps": steps,
        "guidance_scale": guidance,
    }  # fmt: skip
    for_answers = {"new_tokens": new_tokens, "budget": _budget(budget)}
    if not any((model, method, config, set_, prompt, image, video)):
        _refuse(
            {**for_video, **for_answers, "video_frames": video_frames}, "the embedded run, which has its own settings;"
        )
        if (device, dtype) != ("auto", "auto"):
            raise ValueError("the embedded run takes no --device and no --dtype; pass --model and --prompt with them")
        from mmeff.evaluation import embedded

        with progress(as_json) as tick:
            results = embedded.run(out, overwrite=overwrite, tick=tick)
    else:
        from mmeff.pipelines.loading import load

        pictures = _pictures(image, video, video_frames)  # unreadable media must not cost a model load
        configs = chosen(method, config, set_, "fastv" if pictures else "radial")
        loaded = load(model or _embedded_for(configs[0]), device=device, dtype=dtype)
        inputs, given = _inputs(loaded, prompt, pictures, for_video, for_answers)
        run = {"out": out, "processor": loaded.processor, "overwrite": overwrite, **given}
        with progress(as_json) as tick:
            results = [mmeff.compare(loaded.model, configs, inputs, tick=tick, **run)]
    if as_json:
        _print_json([r.to_dict() for r in results])
    else:
        for result in results:
            _print_table(result)
        print(f"results: {out / 'report.html'}")
    if any(r.idle for r in results):
        raise typer.Exit(Exit.IDLE)


def _inputs(
    loaded: Any, prompts: list[str] | None, pictures: list[Any], for_video: dict[str, Any], for_answers: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """What `mmeff.compare` is given for this kind of model, and the settings that belong to it.

    Raises:
        ValueError: prompts or pictures that are missing, or that the model cannot use.
    """
    if not prompts:
        raise ValueError("compare needs a prompt for this model; pass --prompt")
    if loaded.kind == "video":
        if pictures:
            raise ValueError(f"{loaded.source} makes videos or pictures from text and takes no --image or --video")
        _refuse(for_answers, f"{loaded.source}, which makes videos or pictures;")
        return prompts, {**_video_defaults(loaded), **{k: v for k, v in for_video.items() if v is not None}}
    if not pictures:
        raise ValueError("the prompt comes without an image: visual tokens are what is pruned; pass --image or --video")
    _refuse(for_video, f"{loaded.source}, which answers questions;")
    inputs = [{"images": pictures, "question": question} for question in prompts]
    return inputs, {k: v for k, v in for_answers.items() if v is not None}


def _budget(text: str | None) -> float | str | None:
    """Raises ValueError for text that is neither a number nor native."""
    if text in (None, "native"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--budget must be a fraction such as 0.25, or native, got {text!r}") from None


def _refuse(given: dict[str, Any], who: str) -> None:
    """Raise ValueError for settings that were typed but mean nothing to what will run."""
    typed = [name for name, value in given.items() if value is not None]
    if typed:
        raise ValueError(f"{', '.join(typed)} cannot be set for {who} leave it out, or choose another --model")


def _video_defaults(loaded: Any) -> dict[str, Any]:
    """Sizes and steps that suit the embedded pipelines; any other model keeps its pipeline's own defaults."""
    from mmeff.evaluation.embedded import DEFAULTS

    return dict(DEFAULTS.get(loaded.source, {}))


def _print_json(value: Any) -> None:
    from mmeff.evaluation.run_folder import to_plain

    print(json.dumps(to_plain(value), indent=1))


def _pictures(images: list[Path] | None, video: Path | None, count: int | None) -> list[Any]:
    from mmeff.video_io import read, read_image

    if video is None and count is not None:
        raise ValueError("--video-frames says how many frames of --video to take; pass --video too, or leave it out")
    pictures = [read_image(path) for path in images or []]
    if video is not None:
        from PIL import Image

        clip = read(video, num_frames=4 if count is None else count)
        err_console.print(f"{video}: frames {clip.indices.tolist()} of {clip.backend}")
        pictures += [Image.fromarray(frame) for frame in clip.frames]
    return pictures


def _print_table(result: Any) -> None:
    """Variants as columns: the list of figures is long, and terminals are narrow."""
    table = Table("", *(str(row[0]) for row in result.rows), title=result.model, title_justify="left")
    for i, figure in enumerate(result.columns[1:], 1):
        table.add_row(figure, *("" if row[i] is None else str(row[i]) for row in result.rows))
    out_console.print(table)
    for words in filter(None, (result.remark, result.note)):
        out_console.print(words, style="dim")
    for name in result.idle:
        err_console.print(f"{name} accelerated nothing", style="red")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    model: Model = "tiny-video",
    method: Methods = None,
    config: Config = None,
    set_: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The mp4 to write, or png of a picture.  [default: video.mp4, or picture.png]"
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    fps: Annotated[
        int | None, typer.Option(help="Frames per second of the mp4.  [default: the pipeline's own rate, else 8]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise seed.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate one video or picture, dense or with --method, and print what ran."""
    from mmeff.pipelines import VideoGenerator
    from mmeff.pipelines.recipe import check_out

    if not prompt.strip():
        raise ValueError("generate needs a prompt that is not empty")
    configs = chosen(method, config, set_, "radial") if method or config else []
    if set_ and not configs:
        raise ValueError("--set has no method to apply to; pass --method or --config")
    if out is not None:
        check_out(out)  # a path that cannot be written must not cost a model load
    given = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    with VideoGenerator(model, configs, device=device, dtype=dtype) as generator:
        call = {k: v for k, v in given.items() if v is not None}
        what = "picture" if generator.makes_pictures else "video"
        out = out or Path("picture.png" if generator.makes_pictures else "video.mp4")
        clip = generator.generate(prompt, seed=seed, fps=fps, out=out, **call)
    if as_json:
        _print_json({what: out, "reports": [r.to_dict() for r in clip.reports]})
    else:
        for report in clip.reports:
            print(report)
        print(f"{what}: {out}")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="jpg or png; may be repeated.")] = None,
    video: Annotated[Path | None, typer.Option("--video", help="mp4: frames of it are shown to the model.")] = None,
    video_frames: Annotated[int | None, typer.Option(help="Frames taken from --video.  [default: 4]")] = None,
    model: Model = "tiny-vlm",
    method: Methods = None,
    config: Config = None,
    set_: Settings = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated at most.")] = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask a vision-language model about images or a video, dense or with --method, and print what ran."""
    from mmeff.pipelines import VisionLanguageModel

    if not question.strip():
        raise ValueError("ask needs a question that is not empty")
    pictures = _pictures(image, video, video_frames)  # unreadable media must not cost a model load
    if not pictures:
        raise ValueError(
            "ask needs an image: visual tokens are what is pruned; pass --image photo.jpg or --video clip.mp4"
        )
    configs = chosen(method, config, set_, "fastv") if method or config else []
    if set_ and not configs:
        raise ValueError("--set has no method to apply to; pass --method or --config")
    with VisionLanguageModel(model, configs, device=device, dtype=dtype) as vlm:
        answer = vlm.ask(question, images=pictures, new_tokens=new_tokens)
    if as_json:
        _print_json({"answer": answer.text, "reports": [r.to_dict() for r in answer.reports]})
    else:
        print(answer.text)
        for report in answer.reports:
            print(report)


app.command(context_settings=PASS_ON)(bench)


def main() -> None:
    """Entry point: runs the app; expected errors become one line on standard error and exit code 1."""
    _quiet_libraries()
    try:
        app()
    except NothingAccelerated as error:
        err_console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        sys.exit(Exit.IDLE)
    except (mmeff.errors.MmeffError, MediaError, ValueError, TypeError, LookupError, OSError) as error:
        if os.environ.get("MMEFF_TRACEBACK"):
            raise
        err_console.print("[red]error:[/red]", str(error), markup=True, highlight=False, soft_wrap=True)
        err_console.print("MMEFF_TRACEBACK=1 shows where it was raised.", style="dim")
        sys.exit(Exit.ERROR)
    except KeyboardInterrupt:
        err_console.print("stopped")
        sys.exit(130)


def _quiet_libraries() -> None:
    """Loading bars and deprecation notices of the model libraries drown a command's own output."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


if __name__ == "__main__":
    main()
