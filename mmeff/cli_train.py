"""`mmeff train`: fine-tune a video pipeline under a sparse method, and train the embedded tiny models again.

`video` is for your own model and clips. `tiny-long` and `tiny-vmoba` show the same on the tiny model and measure what they
claim; `tiny-vlm`, `tiny-video-vlm`, `tiny-vla`, `tiny-video` and `tiny-image` make the models that the library carries and judge them by
their gates. `cacovid` trains the policy of a pruning method on one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

MISSED = 4  # exit code of a training that missed its gate

train_app = typer.Typer(
    help="Fine-tune a video pipeline under a sparse method, or train the embedded tiny models. Runs resume from their folder.",
    no_args_is_help=True,
)
Work = Annotated[Path, typer.Option("--work", help="Folder of checkpoints and the log; a run there is resumed.")]
Seed = Annotated[int, typer.Option(help="Training seed.")]
Method = Annotated[str | None, typer.Option("--method", help="A sparse attention's name, as `mmeff list` shows it.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with `method:` and fields.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="field=value of the method, e.g. --set decay=0.2.")
]
Only = Annotated[
    str | None, typer.Option(help="sparse or dense: make one of the two runs, and compare in a later call without it.")
]


@train_app.command("video")
def train_video(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a diffusers Wan pipeline, or tiny-video.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result: weights, curve, card.")] = Path(
        "runs/tuned-video"
    ),
    work: Work = Path("runs/train-video"),
    method: Method = None,
    config: Config = None,
    set_: Settings = None,
    data: Annotated[
        Path | None, typer.Option(help='Folder of videos with manifest.jsonl: {"file": ..., "text": ...} per line.')
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.  [default: 81]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.  [default: 480]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.  [default: 832]")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Text tokens of a prompt.  [default: 512]")] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapter; 0 trains every weight.")] = 128,
    lora_alpha: Annotated[int | None, typer.Option(help="Weight of the adapter.  [default: the rank]")] = None,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(help="End of a module's name; may be repeated.  [default: to_q to_k to_v to_out.0]"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 2000,
    batch: Annotated[int, typer.Option(help="Clips of a forward.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Forwards of a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 20,
    shift: Annotated[float | None, typer.Option(help="Shift of the noise levels.  [default: the scheduler's]")] = None,
    text_dropout: Annotated[float, typer.Option(help="Share of clips trained without text.")] = 0.1,
    held_out: Annotated[int, typer.Option(help="Clips that are never trained on: the last of the manifest.")] = 8,
    held_out_every: Annotated[int, typer.Option(help="Steps between two held-out losses.")] = 100,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, one forward more.")
    ] = False,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Fine-tune a Wan pipeline under a sparse attention, or dense without --method; tiny-video needs no --data.

        mmeff train video Wan-AI/Wan2.1-T2V-1.3B-Diffusers --method radial --data clips --frames 161 --lora-rank 128

    Training has no denoising steps: a method named by --method gets dense_steps=0 and last_dense_steps=0.
    """
    from mmeff.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.pipelines.finetune import FinetuneRecipe, finetune
    from mmeff.pipelines.finetune_data import GeneratedClips, VideoFolder
    from mmeff.pipelines.loading import load
    from mmeff.tiny import clips

    tiny = model == "tiny-video"
    if data is None and not tiny:
        raise ValueError(
            f"{model} needs clips to train on: pass --data with a folder that holds manifest.jsonl and its videos; only "
            "tiny-video has generated ones"
        )
    sizes = (
        {"frames": clips.FRAMES, "height": clips.SIZE, "width": clips.SIZE, "text_tokens": 16}
        if tiny
        else {"frames": 81, "height": 480, "width": 832, "text_tokens": 512}
    )
    typed = {"frames": frames, "height": height, "width": width, "text_tokens": text_tokens}
    more: dict[str, Any] = {k: sizes[k] if v is None else v for k, v in typed.items()}
    if lora_target:
        more["lora_targets"] = tuple(lora_target)
    recipe = FinetuneRecipe(
        method=_method(method, config, set_), lora_rank=lora_rank, lora_alpha=lora_alpha, steps=steps, batch=batch,
        accumulate=accumulate, lr=lr, warmup=warmup, shift=shift, text_dropout=text_dropout, held_out=held_out,
        held_out_every=held_out_every, checkpoint_every=checkpoint_every, seed=seed,
        gradient_checkpointing=gradient_checkpointing, **more,
    )  # fmt: skip
    source = GeneratedClips() if data is None else VideoFolder(data)  # unreadable clips must not cost a model load
    loaded = load(model, device=device, dtype=dtype)
    done = finetune(loaded.model, source, recipe, work, out=out, progress=_print_step)
    print(f"held-out loss {done.untuned:.5f} before, {done.final:.5f} after; result: {out}")


@train_app.command("tiny-long")
def train_tiny_long(
    times: Annotated[int, typer.Option(help="How many times longer than trained the clips are.")] = 4,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the results.  [default: runs/tiny-long-<times>x]")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the runs, resumed.  [default: runs/train-tiny-long-<times>x]")
    ] = None,
    method: Method = None,
    config: Config = None,
    set_: Settings = None,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 400,
    only: Only = None,
    seed: Seed = 0,
) -> None:
    """Tune the tiny video model on longer clips, under Radial and dense, and compare the held-out losses.

    Passes if the tuned sparse model is below the untuned one and within 5 % of the tuned dense one.
    """
    from mmeff.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.tiny import train_sparse

    chosen = _method(method, config, set_, default="radial", preset=train_sparse.LONG_RADIAL)
    found = train_sparse.long(
        times, chosen, work or Path(f"runs/train-tiny-long-{times}x"), out or Path(f"runs/tiny-long-{times}x"),
        steps=steps, seed=seed, only=_only(only), progress=_named_progress,
    )  # fmt: skip
    if found is None:
        return
    print(
        f"untuned sparse {found['untuned_sparse']:.5f}, tuned sparse {found['tuned_sparse']:.5f}, "
        f"untuned dense {found['untuned_dense']:.5f}, tuned dense {found['tuned_dense']:.5f}: "
        f"{found['tuned_sparse_over_tuned_dense']:.3f} of dense; {'passed' if found['passed'] else 'MISSED'}"
    )
    if not found["passed"]:
        raise typer.Exit(MISSED)


@train_app.command("tiny-vmoba")
def train_tiny_vmoba(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path("runs/tiny-vmoba"),
    work: Work = Path("runs/train-tiny-vmoba"),
    method: Method = None,
    config: Config = None,
    set_: Settings = None,
    frame_steps: Annotated[int, typer.Option(help="Steps on single frames, dense.")] = 400,
    clip_steps: Annotated[int, typer.Option(help="Steps on whole clips, under the method.")] = 700,
    prompts: Annotated[int, typer.Option(help="Prompts that the detector judges.")] = 64,
    only: Only = None,
    seed: Seed = 1,
) -> None:
    """Train the tiny video model from nothing under VMoBA, or any --method, and its dense twin, and judge both."""
    from mmeff.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.tiny import train_sparse

    chosen = _method(method, config, set_, default="vmoba", preset=train_sparse.START_VMOBA)
    recipe = train_sparse.start_recipe(frame_steps=frame_steps, clip_steps=clip_steps, seed=seed)
    found = train_sparse.from_start(
        chosen, work, out, recipe=recipe, only=_only(only), prompts=prompts, progress=_named_progress
    )
    if found is not None:
        print(f"held-out loss over that of the dense twin: {found['ratio']:.3f}; result: {out}")


@train_app.command("tiny-vlm")
def train_tiny_vlm(
    tower: Annotated[
        str,
        typer.Option(
            help="A vision backbone in place of CLIP, such as biformer_tiny or nat_mini; a small one of its family."
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of the finished model.  [default: runs/tiny-vlm, or runs/tiny-vlm-TOWER]"
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of checkpoints and the log; a run there is resumed.  [default: runs/train-tiny-vlm, with -TOWER]"
        ),
    ] = None,
    see_steps: Annotated[int | None, typer.Option(help="Steps of stage 1, the vision tower.")] = None,
    read_steps: Annotated[int | None, typer.Option(help="Steps of stage 2, the language model.")] = None,
    join_steps: Annotated[
        int | None, typer.Option(help="Steps of stage 3, everything.  [default: 1300, with --tower 2600]")
    ] = None,
    seed: Seed = 1,
) -> None:
    """Train the tiny LLaVA model, run its acceptance gate, write the model folder with its card."""
    from mmeff.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.evaluation import gates, gates_tower
    from mmeff.tiny import train_vlm
    from mmeff.tiny.export import export_vlm

    budget: dict[str, Any] = {"see_steps": see_steps, "read_steps": read_steps, "join_steps": join_steps}
    own = {"tower": tower, "join_steps": train_vlm.TOWER_JOIN_STEPS} if tower else {}
    recipe = replace(train_vlm.VlmRecipe(seed=seed), **{**own, **{k: v for k, v in budget.items() if v is not None}})
    suffix = f"-{tower}" if tower else ""
    out = out or Path(f"runs/tiny-vlm{suffix}")
    net = train_vlm.train(recipe, work or Path(f"runs/train-tiny-vlm{suffix}"), progress=_print_step)
    export_vlm(net, out)
    gate = gates.vlm_gate(out, say=print)
    (gates_tower.seal_tower if tower else gates.seal_vlm)(out, recipe, gate)
    _gate_exit(gate, out)


@train_app.command("tiny-video-vlm")
def train_tiny_video_vlm(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the finished model.")] = Path(
        "runs/tiny-video-vlm"
    ),
    work: Work = Path("runs/train-tiny-video-vlm"),
    see_steps: Annotated[int | None, typer.Option(help="Steps of stage 1, the vision tower.")] = None,
    follow_steps: Annotated[int | None, typer.Option(help="Steps of stage 2, clips of one object.")] = None,
    read_steps: Annotated[int | None, typer.Option(help="Steps of stage 3, clips of up to three.")] = None,
    join_steps: Annotated[int | None, typer.Option(help="Steps of stage 4, all tokens.")] = None,
    seed: Seed = 1,
) -> None:
    """Train the tiny LLaVA model for clips from tiny-vlm, run its acceptance gate, write the folder with its card."""
    from mmeff.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.evaluation import gates
    from mmeff.tiny import train_video_vlm
    from mmeff.tiny.export import export_video_vlm

    budget: dict[str, Any] = {
        "see_steps": see_steps, "follow_steps": follow_steps, "read_steps": read_steps, "join_steps": join_steps,
    }  # fmt: skip
    recipe = replace(train_video_vlm.VideoVlmRecipe(seed=seed), **{k: v for k, v in budget.items() if v is not None})
    net = train_video_vlm.train(recipe, work, progress=_print_step)
    export_video_vlm(net, out)
    gate = gates.video_vlm_gate(out, say=print)
    gates.seal_video_vlm(out, recipe, gate)
    _gate_exit(gate, out)


@train_app.command("tiny-vla")
def train_tiny_vla(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the finished model.")] = Path("runs/tiny-vla"),
    work: Work = Path("runs/train-tiny-vla"),
    see_steps: Annotated[int | None, typer.Option(help="Steps of stage 1, the vision tower.")] = None,
    read_steps: Annotated[int | None, typer.Option(help="Steps of stage 2, the language model.")] = None,
    join_steps: Annotated[int | None, typer.Option(help="Steps of stage 3, everything.")] = None,
    drop_steps: Annotated[int | None, typer.Option(help="Steps of stage 4, with tokens dropped.")] = None,
    seed: Seed = 1,
) -> None:
    """Train the tiny policy from the tiny VLM, let it act in its acceptance gate, write the model folder with its card."""
    from mmeff.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.evaluation import gates_vla
    from mmeff.tiny import train_vla
    from mmeff.tiny.export import export_vla

    budget: dict[str, Any] = {
        "see_steps": see_steps, "read_steps": read_steps, "join_steps": join_steps, "drop_steps": drop_steps,
    }  # fmt: skip
    recipe = replace(train_vla.VlaRecipe(seed=seed), **{k: v for k, v in budget.items() if v is not None})
    net = train_vla.train(recipe, work, progress=_print_step)
    export_vla(net, out)
    gate = gates_vla.vla_gate(out, say=print)
    gates_vla.seal_vla(out, recipe, gate)
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
    from mmeff.training import reexec_with_cpu_environment

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


@train_app.command("tiny-image")
def train_tiny_image(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the finished model.")] = Path("runs/tiny-image"),
    work: Work = Path("runs/train-tiny-image"),
    half_steps: Annotated[int | None, typer.Option(help="Steps on pictures of half the size.")] = None,
    full_steps: Annotated[int | None, typer.Option(help="Steps on pictures of full size.")] = None,
    seed: Seed = 1,
) -> None:
    """Train the tiny Flux model, run its acceptance gate, write the pipeline folder with its card."""
    from mmeff.training import logged, reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.evaluation import gates_image
    from mmeff.tiny import train_image
    from mmeff.tiny.export import export_image

    budget: dict[str, Any] = {"half_steps": half_steps, "full_steps": full_steps}
    recipe = replace(train_image.ImageRecipe(seed=seed), **{k: v for k, v in budget.items() if v is not None})
    student = train_image.train(recipe, work, progress=_print_step)
    export_image(student, out)
    gate = gates_image.image_gate(out, say=print)
    gates_image.seal_image(out, recipe, gate, logged(work))
    _gate_exit(gate, out)


@train_app.command("cacovid")
def train_cacovid_policy(
    model: Annotated[
        str, typer.Option("--model", "-m", help="tiny-video-vlm, or a folder that `mmeff train tiny-video-vlm` wrote.")
    ] = "tiny-video-vlm",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the policy, its curve and card.")] = Path(
        "runs/cacovid-policy"
    ),
    work: Work = Path("runs/train-cacovid"),
    questions: Annotated[int, typer.Option(help="Questions, a new clip each.")] = 400,
    reward: Annotated[str, typer.Option(help="likelihood of the gold answer, or exact.")] = "likelihood",
    updates: Annotated[int, typer.Option(help="Updates of a question.")] = 5,
    token_masks: Annotated[int, typer.Option(help="Masks of an update that the token head draws.")] = 23,
    frame_masks: Annotated[int, typer.Option(help="Masks of an update that the frame head draws.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate of the heads.")] = 3e-4,
    held_out: Annotated[int, typer.Option(help="Questions that are never trained on.")] = 64,
    held_out_every: Annotated[int, typer.Option(help="Questions between two held-out figures.")] = 100,
    keep: Annotated[float, typer.Option(help="Video tokens kept in held-out figures, as a fraction.")] = 0.25,
    checkpoint_every: Annotated[int, typer.Option(help="Questions between two checkpoints.")] = 100,
    seed: Seed = 42,
) -> None:
    """Train CaCoVID's policy on the tiny video VLM, which stays as it is, with questions about generated clips.

        mmeff ask "which way does the red circle move ?" -m tiny-video-vlm --video clip.mp4 --video-frames 8 \\
            --method cacovid --set policy=runs/cacovid-policy
    """
    from mmeff.training import reexec_with_cpu_environment

    reexec_with_cpu_environment()
    from mmeff.pipelines.loading import load
    from mmeff.pipelines.train_cacovid import CaCoVIDRecipe, train_cacovid
    from mmeff.pipelines.train_cacovid_clips import ClipQuestions
    from mmeff.tiny import motions

    recipe = CaCoVIDRecipe.small(
        reward=reward, questions=questions, updates=updates, token_masks=token_masks, frame_masks=frame_masks, lr=lr,
        held_out_every=held_out_every, held_out_keep=keep, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    loaded = load(model, device="cpu", dtype="float32")
    vision = getattr(getattr(loaded.model, "config", None), "vision_config", None)
    if getattr(vision, "image_size", None) != motions.SIZE:
        raise ValueError(
            f"the questions are about clips of {motions.SIZE} x {motions.SIZE} pixels, which {model} does not look at; pass "
            "tiny-video-vlm, or train on other questions through mmeff.pipelines.train_cacovid"
        )
    asked = ClipQuestions(loaded.processor, held_out=held_out)
    done = train_cacovid(loaded.model, asked, recipe, work, out=out, progress=_print_step)
    print(
        f"held-out answers at {keep:g} of the tokens: probability {done.held_out[0][1]:.4f} before, {done.figure('held_out'):.4f} "
        f"after, {done.figure('even'):.4f} with as many spread evenly; policy: {out}"
    )


def _method(
    name: str | None,
    file: Path | None,
    pairs: list[str] | None,
    *,
    default: str = "",
    preset: dict[str, Any] | None = None,
) -> Any:
    """The method that the options name, None for none. `preset` holds the fields of `default` on the tiny model.

    Raises: ValueError for options that contradict each other.
    """
    import yaml

    from mmeff.registry import build

    if name and file:
        raise ValueError(f"a training takes one method, got --method {name} and --config {file}; drop one of them")
    fields: dict[str, Any] = {}
    for pair in pairs or []:
        field, equals, value = pair.partition("=")
        if not equals or not field.strip():
            raise ValueError(f"--set needs field=value, got {pair!r}; for example --set decay=0.2")
        fields[field.strip()] = yaml.safe_load(value)
    if file:
        return build(file).replace(**fields)
    if not (name or default):
        if fields:
            raise ValueError("--set has no method to apply to; pass --method or --config")
        return None
    config = build(name or default)
    if config.name() == default:
        config = config.replace(**preset or {})
    steps: dict[str, Any] = {k: 0 for k in ("dense_steps", "last_dense_steps") if k in config.to_dict()}
    return config.replace(**(steps | fields))


def _only(value: str | None) -> Any:
    if value not in (None, "sparse", "dense"):
        raise ValueError(f"--only must be sparse or dense, got {value!r}; leave it out to make both runs and compare")
    return value


def _named_progress(name: str) -> Callable[[int, int, dict[str, float]], None]:
    def tick(step: int, steps: int, row: dict[str, float]) -> None:
        print(f"{name}  ", end="")
        _print_step(step, steps, row)

    return tick


def _print_step(step: int, steps: int, row: dict[str, float]) -> None:
    print(f"step {step}/{steps}  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def _gate_exit(gate: dict[str, Any], out: Path) -> None:
    print(f"gate {'passed' if gate['passed'] else 'MISSED'}; model: {out}")
    if not gate["passed"]:
        raise typer.Exit(MISSED)
