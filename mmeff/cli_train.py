"""`mmeff train`: train the embedded tiny models again, judge them by their gates, write their folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

MISSED = 4  # exit code of a training that missed its gate

train_app = typer.Typer(
    help="Train the embedded tiny models again. Runs resume from their folder.", no_args_is_help=True
)
Work = Annotated[Path, typer.Option("--work", help="Folder of checkpoints and the log; a run there is resumed.")]
Seed = Annotated[int, typer.Option(help="Training seed.")]


@train_app.command("tiny-vlm")
def train_tiny_vlm(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the finished model.")] = Path("runs/tiny-vlm"),
    work: Work = Path("runs/train-tiny-vlm"),
    see_steps: Annotated[int | None, typer.Option(help="Steps of stage 1, the vision tower.")] = None,
    read_steps: Annotated[int | None, typer.Option(help="Steps of stage 2, the language model.")] = None,
    join_steps: Annotated[int | None, typer.Option(help="Steps of stage 3, everything.")] = None,
    seed: Seed = 1,
) -> None:
    """Train the tiny LLaVA model, run its acceptance gate, write the model folder with its card."""
    from mmeff.tiny.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.evaluation import gates
    from mmeff.tiny import train_vlm
    from mmeff.tiny.export import export_vlm

    budget: dict[str, Any] = {"see_steps": see_steps, "read_steps": read_steps, "join_steps": join_steps}
    recipe = replace(train_vlm.VlmRecipe(seed=seed), **{k: v for k, v in budget.items() if v is not None})
    net = train_vlm.train(recipe, work, progress=_print_step)
    export_vlm(net, out)
    gate = gates.vlm_gate(out, say=print)
    gates.seal_vlm(out, recipe, gate)
    _gate_exit(gate, out)


@train_app.command("tiny-video")
def train_tiny_video(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the finished model.")] = Path("runs/tiny-video"),
    work: Work = Path("runs/train-tiny-video"),
    frame_steps: Annotated[int | None, typer.Option(help="Steps on single frames.")] = None,
    clip_steps: Annotated[int | None, typer.Option(help="Steps on whole clips.")] = None,
    seed: Seed = 1,
) -> None:
    """Train the tiny Wan model, run its acceptance gate, write the pipeline folder with its card."""
    from mmeff.tiny.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.evaluation import gates
    from mmeff.tiny import train_video
    from mmeff.tiny.export import export_video

    budget: dict[str, Any] = {"frame_steps": frame_steps, "clip_steps": clip_steps}
    recipe = replace(train_video.VideoRecipe(seed=seed), **{k: v for k, v in budget.items() if v is not None})
    student = train_video.train(recipe, work, progress=_print_step)
    export_video(student, out)
    gate = gates.video_gate(out, say=print)
    gates.seal_video(out, recipe, gate)
    _gate_exit(gate, out)


def _print_step(step: int, steps: int, row: dict[str, float]) -> None:
    print(f"step {step}/{steps}  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def _gate_exit(gate: dict[str, Any], out: Path) -> None:
    print(f"gate {'passed' if gate['passed'] else 'MISSED'}; model: {out}")
    if not gate["passed"]:
        raise typer.Exit(MISSED)
