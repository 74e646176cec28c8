"""`mmeff calibrate`: measure this machine's kernels, or fit a method to a model's attention on a data set.

`kernels` is what the bare command does. `adaptinfer` and `debiased` write a YAML file that `--config` and `accelerate` load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from mmeff.pipelines.calibrate import Calibrated

out_console = Console()
err_console = Console(stderr=True)


class KernelsFirst(TyperGroup):
    """A group whose bare call, with or without options, is that of `kernels`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["kernels", *args]
        return super().parse_args(ctx, args)


calibrate_app = typer.Typer(
    cls=KernelsFirst,
    help="Measure the kernels on this machine, or fit a method to a model's attention. Without a command: kernels.",
)
Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder, hub name, or an embedded model: tiny-vlm, tiny-video-vlm.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help='JSONL of {"image": file or files, "question": text}, or a folder that holds it as questions.jsonl.  [default: '
        "generated questions, for the embedded models]"
    ),
]
Samples = Annotated[int, typer.Option(help="Questions at most.")]
Batch = Annotated[int, typer.Option(help="Prompts of a forward.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


@calibrate_app.command("adaptinfer")
def calibrate_adaptinfer(
    model: Model = "tiny-vlm",
    data: Data = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="YAML file to write.")] = Path("adaptinfer.yaml"),
    budget: Annotated[
        str, typer.Option(help="Mean of visual tokens over layers: a fraction such as 0.5, or a number of tokens.")
    ] = "0.5",
    points: Annotated[int, typer.Option(help="Stages at most.")] = 3,
    samples: Samples = 256,
    batch: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find the layers where attention from text to the picture shifts, and a schedule for them that meets a budget.

        mmeff calibrate adaptinfer -m llava-hf/llava-1.5-7b-hf --data questions.jsonl --samples 1000 --budget 128

    All pictures must make the same number of visual tokens.
    """
    try:
        wanted: int | float = int(budget) if budget.isdigit() else float(budget)
    except ValueError:
        raise ValueError(f"--budget must be a fraction such as 0.5, or a number of tokens, got {budget!r}") from None
    if not (wanted >= 1 if isinstance(wanted, int) else 0 < wanted <= 1):
        raise ValueError(f"--budget must be a fraction in (0, 1], or at least 1 token, got {budget}")
    if points < 1:
        raise ValueError(f"--points must be >= 1, got {points}")
    from mmeff.pipelines.calibrate import calibrate_adaptinfer

    loaded, questions = _prepare(model, data, samples, batch, out, device, dtype)
    found = calibrate_adaptinfer(
        loaded.model, loaded.processor, questions, budget=wanted, points=points, batch=batch, tick=_ticker(samples)
    )
    _write(found, model, out)


@calibrate_app.command("debiased")
def calibrate_debiased(
    model: Model = "tiny-vlm",
    data: Data = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="YAML file to write.")] = Path("debiased.yaml"),
    method: Annotated[
        str, typer.Option(help="The method whose scores are debiased: a name, or a YAML file with its fields.")
    ] = "fastv",
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="field=value of that method, e.g. --set layer=3.")
    ] = None,
    padding: Annotated[
        float, typer.Option(help="Share of a token that may be padding; tokens with more do not count.")
    ] = 0.5,
    samples: Samples = 256,
    batch: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Fit how much more attention later tokens of a picture get in a method's scores, whatever they show.

    mmeff calibrate debiased -m llava-hf/llava-1.5-7b-hf --method fastv --data questions.jsonl
    """
    from mmeff.pipelines.calibrate import calibrate_debiased
    from mmeff.pruning._base import TokenPruner
    from mmeff.pruning.debiased import Debiased
    from mmeff.registry import build

    fields = {}
    for pair in set_ or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set needs field=value, got {pair!r}; for example --set layer=3")
        fields[name.strip()] = yaml.safe_load(value)
    inner = build(method).replace(**fields)
    if not isinstance(inner, TokenPruner):
        raise ValueError(f"{inner.name()} does not score visual tokens; `mmeff list` shows methods of stage pruning")
    Debiased(inner=inner, padding=padding)  # a method that cannot be debiased must not cost a model load
    loaded, questions = _prepare(model, data, samples, batch, out, device, dtype)
    found = calibrate_debiased(
        loaded.model, loaded.processor, questions, inner, batch=batch, padding=padding, tick=_ticker(samples)
    )
    _write(found, model, out)


def _prepare(
    model: str, data: Path | None, samples: int, batch: int, out: Path, device: str, dtype: str
) -> tuple[Any, Any]:
    """The model and its questions. Raises ValueError for options that contradict each other, before anything is loaded."""
    from mmeff.pipelines.calibrate import SEEDS, generated, listed
    from mmeff.pipelines.loading import load

    for name, value in (("--samples", samples), ("--batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if data is None and model not in SEEDS:
        raise ValueError(
            f"{model} needs questions to watch: pass --data; only {' and '.join(SEEDS)} have generated ones"
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: {out.parent} is no folder")
    questions = generated(model, samples) if data is None else listed(data, samples)
    loaded = load(model, device=device, dtype=dtype)
    if loaded.kind != "vlm":
        raise ValueError(f"{model} makes videos and has no visual tokens to prune; pass a vision-language model")
    return loaded, questions


def _ticker(samples: int) -> Any:
    def tick(done: int) -> None:
        err_console.print(f"{done} of at most {samples} questions", style="dim")

    return tick


def _write(found: Calibrated, model: str, out: Path) -> None:
    text = found.method.to_yaml()
    out.write_text(f"# fitted to {found.samples} questions on {model}; mmeff calibrate {found.method.name()}\n{text}")
    print(text, end="")
    for name, value in found.figures.items():
        print(f"{name}: {value}")
    out_console.print(f"written to {out}", soft_wrap=True, highlight=False)
