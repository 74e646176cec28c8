"""Fine-tune a video diffusion transformer under a sparse attention: all of its weights, or a low-rank adapter.

The loss is that of flow matching: noise and latents are mixed at a random noise level, and the transformer predicts the velocity
`noise - latents`. The method is installed with `mmeff.accelerate` for the whole run, so what is trained is what will
run. Gradients are exact for the pairs that the method attends.

    recipe = FinetuneRecipe(method=Radial(dense_steps=0), lora_rank=128, steps=2000, frames=161, height=480, width=832)
    done = finetune(pipeline, VideoFolder("clips"), recipe, "runs/train-radial", out="runs/radial-lora")
    pipeline.load_lora_weights(done.folder)     # in another process, before mmeff.accelerate(pipeline, "radial", ...)

A run is a function of its recipe and its clips; it resumes from its folder. The held-out loss is taken on the same clips, noise
and noise levels by every run of a pipeline, so that the curves of two runs may be compared.

Reading order: `FinetuneRecipe`, `finetune`, `held_out_loss`, then the weights and the checkpointing of activations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmeff import training
from mmeff.accelerate import accelerate, find_host
from mmeff.diffusion_attn._base import SparseAttention
from mmeff.errors import BackendUnavailable, UnsupportedModel, suggest
from mmeff.handle import model_note
from mmeff.pipelines.finetune_data import Clips, ClipSize
from mmeff.pipelines.finetune_models import WanVideo, trainable
from mmeff.pipelines.finetune_results import Finetuned, check_out, write_result

ADAPTER = "mmeff"  # the name of the adapter on the transformer
HELD_OUT_NOISE = 97  # seed of the noise that held-out clips are mixed with
LOG_EVERY = 10  # steps
Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """Everything that decides the weights, besides the model and the clips.

    Rank, targets and learning rate are common for adapters of video transformers; Radial's authors tuned with rank 128 on some
    2000 videos (arXiv:2506.19852) and published no training code.

    Raises: ValueError for a value out of range, or a method whose schedule counts denoising steps.
    """

    method: SparseAttention | None = None  # installed while training; None trains dense
    lora_rank: int = 128  # 0 trains every weight of the transformer
    lora_alpha: int | None = None  # None: the rank, so that the adapter counts once
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # ends of module names
    steps: int = 2000
    batch: int = 1  # clips of a forward
    accumulate: int = 1  # forwards of a step
    lr: float = 1e-4
    warmup: int = 20  # steps
    constant: float = 1.0  # fraction of all steps before the linear decay
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the gradient
    seed: int = 0
    frames: int = 81
    height: int = 480  # pixels
    width: int = 832
    shift: float | None = None  # of the noise levels; None is the scheduler's
    sigma_std: float = 1.0  # of the logit-normal noise level, before the shift
    text_dropout: float = 0.1  # share of clips trained without their text, for classifier-free guidance
    text_tokens: int = 512  # the pipeline's max_sequence_length
    held_out: int = 8  # clips that are never trained on
    held_out_levels: int = 4  # noise levels that each of them is seen at
    held_out_every: int = 100  # steps
    checkpoint_every: int = 100
    gradient_checkpointing: bool = False  # keep no activations inside blocks: less memory, a forward more

    def __post_init__(self) -> None:
        method = self.method
        if method is not None and not isinstance(method, SparseAttention):
            raise TypeError(
                f"FinetuneRecipe.method must be a config of stage 'diffusion_attn' or None, got {method!r}; build one, for "
                "example Radial(dense_steps=0)"
            )
        if method is not None and method.counts_steps:
            raise ValueError(
                f"training has no denoising steps, so the schedule of {type(method).__name__} must not count them, got "
                f"dense_steps={method.dense_steps}, last_dense_steps={method.last_dense_steps}; train with both 0, and "
                "generate with the schedule you like"
            )
        at_least = {
            "steps": 1, "batch": 1, "accumulate": 1, "frames": 1, "height": 1, "width": 1, "text_tokens": 1, "held_out": 1,
            "held_out_levels": 1, "held_out_every": 1, "checkpoint_every": 1, "lora_rank": 0, "warmup": 0, "seed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"FinetuneRecipe.{name} must be an int >= {least}, got {value!r}")
        positive = {"lr": self.lr, "clip": self.clip, "sigma_std": self.sigma_std, "shift": self.shift or 1.0}
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"FinetuneRecipe.{name} must be finite and > 0, got {value!r}")
        for name in ("text_dropout", "constant"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"FinetuneRecipe.{name} must be in [0, 1], got {getattr(self, name)!r}")
        if self.weight_decay < 0:
            raise ValueError(f"FinetuneRecipe.weight_decay must be >= 0, got {self.weight_decay!r}")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"FinetuneRecipe.lora_alpha must be >= 1, got {self.lora_alpha!r}; None is the rank")
        if self.lora_rank and not self.lora_targets:
            raise ValueError("FinetuneRecipe.lora_targets must name modules; pass lora_rank=0 to train every weight")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; the method as its own dictionary."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "method": None if self.method is None else self.method.to_dict()}

    @property
    def size(self) -> ClipSize:
        """The size of every clip."""
        return ClipSize(frames=self.frames, height=self.height, width=self.width)


def finetune(
    pipeline: Any,
    data: Clips,
    recipe: FinetuneRecipe,
    folder: str | Path,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Run or resume a training, and write what it gives.

    Args:
        pipeline: a diffusers WanPipeline, text to video, trained by flow matching.
        data: a `VideoFolder`, or the `GeneratedClips` of the tiny model.
        folder: of the run: config, log, checkpoint, encoded clips. A run there is resumed.
        out: where the result goes; `folder/result` unless given. See `write_result` for what is in it.
        progress: called with (step, steps, figures).
    Returns: a `Finetuned`. The pipeline is left tuned: with the adapter "mmeff" active, which
        `pipeline.unload_lora_weights()` takes off, or with its new weights. After an error or an interruption an adapter
        is gone, and fully trained weights stay where they had got to.
    Raises:
        UnsupportedModel: the pipeline cannot be trained, or not under this method. BackendUnavailable: peft is missing.
        ValueError: sizes, targets, clips or folders that do not fit, or a loss that is no longer finite; all but the last
            before the first step.
    Numerics: the loss is taken in float32. An adapter is trained in float32 whatever the dtype of the transformer.
    """
    model = trainable(pipeline)
    _check(model, recipe)
    folder, out = Path(folder), Path(folder) / "result" if out is None else Path(out)
    check_out(out)
    data.prepare(model, recipe.size, recipe.held_out, folder)
    config = {"kind": "finetune", "model": model.name, "data": data.describe(), **recipe.to_dict()}
    run = training.Run(
        folder, config
    )  # after everything that a wrong input can stop: it lays the folder down to this recipe
    with ExitStack() as undo:
        weights = _train_adapter(model, recipe, undo) if recipe.lora_rank else _train_all(model, undo)
        if recipe.gradient_checkpointing or model.transformer.is_gradient_checkpointing:
            _checkpoint_activations(model.transformer, undo)
        handle = None
        if recipe.method is not None:
            handle = undo.enter_context(accelerate(model.transformer, recipe.method))
        loss = _loop(model, data, recipe, run, weights, handle, progress)
        report = None if handle is None else handle.report().to_dict()
        done = Finetuned(
            folder=out, steps=recipe.steps, rows=training.logged(folder), final=loss, report=report,
            model=config["model"], note=model_note(pipeline), data=config["data"], recipe=recipe.to_dict(),
        )  # fmt: skip
        write_result(done, pipeline, ADAPTER if recipe.lora_rank else None)
    return done


def _check(model: WanVideo, recipe: FinetuneRecipe) -> None:
    """Everything that can be refused before files are touched."""
    grid = model.grid(recipe.frames, recipe.height, recipe.width)
    if recipe.method is not None:
        find_host(model.transformer, recipe.method)
        recipe.method.check_grid(grid)
    adapters = getattr(model.transformer, "peft_config", None)
    if adapters:
        raise ValueError(
            f"the transformer already has the adapters {', '.join(adapters)}; fuse them (pipeline.fuse_lora) or unload them "
            "(pipeline.unload_lora_weights), so that it is clear what is trained"
        )
    if not recipe.lora_rank:
        if model.transformer.dtype != torch.float32:
            raise ValueError(
                f"training every weight needs the transformer in float32, got {model.transformer.dtype}: small updates are "
                "lost in it; load it with dtype float32, or train an adapter (lora_rank > 0)"
            )
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"an adapter of rank {recipe.lora_rank} needs peft, which is not installed; pip install 'mmeff[train]', or pass "
            "lora_rank=0 to train every weight"
        ) from error
    linear = [name for name, module in model.transformer.named_modules() if isinstance(module, nn.Linear)]
    ends = {".".join(name.split(".")[-2:]) for name in linear} | {name.split(".")[-1] for name in linear}
    for target in recipe.lora_targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise ValueError(
                f"lora_targets must be ends of names of linear modules of this transformer, got {target!r}."
                f"{suggest(target, ends)}"
            )


# -------------------------------------------------------------------- the loop


def _loop(
    model: WanVideo, data: Clips, recipe: FinetuneRecipe, run: training.Run, weights: dict[str, nn.Parameter], handle: Any,
    progress: Progress | None,
) -> float:  # fmt: skip
    """Train from wherever the run's folder got to; returns the held-out loss of the result."""
    optimizer = training.Optimizer(
        [torch.optim.AdamW(list(weights.values()), lr=recipe.lr, weight_decay=recipe.weight_decay)]
    )
    start = 0
    if (stored := run.load()) is not None:
        tensors, state = stored
        saved = training.without_prefix("weights", tensors)
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(saved[name])
        optimizer.load_tensors(tensors)
        start = state["step"]

    def note(step: int, **row: float) -> None:
        run.log(step=step, **row)
        if progress:
            progress(step, recipe.steps, row)

    held_out = data.held_out()
    if start == 0:
        note(0, held_out=held_out_loss(model, held_out, recipe))
        _refuse_dense(handle)
    losses: list[float] = []
    for step in range(start, recipe.steps):
        for part in range(step * recipe.accumulate, (step + 1) * recipe.accumulate):
            latents, sigma, target, text = _batch(model, data, recipe, part)
            loss = F.mse_loss(model.velocity(latents, sigma, text), target) / recipe.accumulate
            loss.backward()
            losses.append(loss.item() * recipe.accumulate)
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"the loss must stay finite, got {losses[-1]} in step {step + 1} at lr={recipe.lr}; lower lr, and "
                    f"start again in a new folder, or go on from the last checkpoint in {run.folder}"
                )
            _refuse_dense(handle)
        lr = training.warmup_constant_linear(
            step, steps=recipe.steps, lr=recipe.lr, warmup=recipe.warmup, constant=recipe.constant
        )
        norm = optimizer.step(lr, clip=recipe.clip)
        last = step + 1 == recipe.steps
        if (step + 1) % LOG_EVERY == 0 or last:
            note(step + 1, loss=float(np.mean(losses[-LOG_EVERY * recipe.accumulate :])), lr=lr, norm=norm)
        if (step + 1) % recipe.held_out_every == 0 and not last:
            note(step + 1, held_out=held_out_loss(model, held_out, recipe))
        if (step + 1) % recipe.checkpoint_every == 0 or last:
            run.save(training.with_prefix("weights", dict(weights)) | optimizer.tensors(), step=step + 1)
    final = held_out_loss(model, held_out, recipe)
    note(recipe.steps, held_out=final)
    return final


def _batch(model: WanVideo, data: Clips, recipe: FinetuneRecipe, part: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised latents, noise levels, velocity and text of one forward; everything is drawn on the CPU."""
    draw = training.rng(recipe.seed, part)
    latents, prompts = data.training(recipe.seed, part, recipe.batch)
    dropped = draw.uniform(size=recipe.batch) < recipe.text_dropout
    text = model.encode_text(["" if drop else p for p, drop in zip(prompts, dropped, strict=True)], recipe.text_tokens)
    level = 1 / (1 + np.exp(-recipe.sigma_std * draw.standard_normal(recipe.batch)))
    noise = torch.randn(latents.shape, generator=training.torch_rng(recipe.seed, part))
    latents, target, sigma = _mix(latents, noise, level, model.shift if recipe.shift is None else recipe.shift)
    return latents.to(model.device), sigma.to(model.device), target.to(model.device), text


def _mix(latents: Tensor, noise: Tensor, level: np.ndarray, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Latents mixed with noise at levels (B,) in (0, 1) behind the shift; the velocity; and the levels themselves."""
    sigma = torch.from_numpy(shift * level / (1 + (shift - 1) * level)).float()
    weight = sigma[:, None, None, None, None]
    return weight * noise + (1 - weight) * latents, noise - latents, sigma


@torch.no_grad()
def held_out_loss(model: WanVideo, clips: tuple[Tensor, list[str]], recipe: FinetuneRecipe) -> float:
    """Mean squared error of the velocity on clips that are not trained on, at fixed noise and noise levels.

    Args:
        clips: what `Clips.held_out` returns. recipe: of it only `batch`, `text_tokens` and `held_out_levels` matter.
    Returns: the mean over clips and levels. The levels are spread evenly over (0, 1) and go through the scheduler's shift, and
        the noise has a seed of its own, so runs of different recipes on one pipeline may be compared.
    """
    latents, prompts = clips
    total, count = 0.0, len(prompts) * recipe.held_out_levels
    for begin in range(0, count, recipe.batch):
        places = range(begin, min(begin + recipe.batch, count))
        chosen = [i % len(prompts) for i in places]
        # clip i sees every band of levels once, each time at its own place in the band
        level = np.array([(i // len(prompts) + (i % len(prompts) + 0.5) / len(prompts)) for i in places])
        noise = torch.stack(
            [torch.randn(latents.shape[1:], generator=training.torch_rng(HELD_OUT_NOISE, i)) for i in places]
        )
        mixed, target, sigma = _mix(latents[chosen], noise, level / recipe.held_out_levels, model.shift)
        text = model.encode_text([prompts[i] for i in chosen], recipe.text_tokens)
        velocity = model.velocity(mixed.to(model.device), sigma.to(model.device), text)
        total += float((velocity - target.to(model.device)).square().mean(dim=(1, 2, 3, 4)).sum())
    return total / count


def _refuse_dense(handle: Any) -> None:
    """Training must run what will run later: a layer that fell back to dense would be trained for something else."""
    if handle is None:
        return
    handle.check()
    if handle.recorder.fallbacks:
        reasons = "; ".join(handle.recorder.fallbacks)
        raise UnsupportedModel(f"{handle.method.name()} cannot be trained on this model: layers ran dense: {reasons}")


# -------------------------------------------------------------------- what is trained


def _train_adapter(model: WanVideo, recipe: FinetuneRecipe, undo: ExitStack) -> dict[str, nn.Parameter]:
    """Put an adapter on the transformer; its parameters, in float32. Its undo takes it off if the run does not end well."""
    from peft import LoraConfig

    transformer = model.transformer
    frozen = {name: p.requires_grad for name, p in transformer.named_parameters()}
    config = LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha or recipe.lora_rank, target_modules=list(recipe.lora_targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        transformer.requires_grad_(False)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    weights = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for parameter in weights.values():
        parameter.data = parameter.data.float()

    def restore(kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            transformer.unload_lora()
        for name, p in transformer.named_parameters():
            p.grad = None
            p.requires_grad_(frozen.get(name.replace(".base_layer.", "."), False))

    undo.push(restore)
    return weights


def _train_all(model: WanVideo, undo: ExitStack) -> dict[str, nn.Parameter]:
    """Every parameter of the transformer."""
    transformer = model.transformer
    frozen = {name: p.requires_grad for name, p in transformer.named_parameters()}

    def restore() -> None:
        for name, p in transformer.named_parameters():
            p.grad = None
            p.requires_grad_(frozen[name])

    transformer.requires_grad_(True)
    undo.callback(restore)
    return dict(transformer.named_parameters())


def _checkpoint_activations(transformer: Any, undo: ExitStack) -> None:
    """Recompute blocks in the backward pass, each inside the forward that it belongs to.

    A sparse layer asks its session which forward is running; in the backward pass none is, and the layer would run dense. So
    the forward of the first time is remembered, and put back for the second.
    """
    from torch.utils.checkpoint import checkpoint

    def sessions() -> list[Any]:
        found = (getattr(p, "session", None) for p in transformer.attn_processors.values())
        return list({id(s): s for s in found if s is not None}.values())

    def run(block: nn.Module, *args: Any) -> Any:
        moments = [(session, session.now) for session in sessions()]

        @contextmanager
        def again() -> Iterator[None]:
            before = [session.now for session, _ in moments]
            for session, now in moments:
                session.now = now
            try:
                yield
            finally:
                for (session, _), now in zip(moments, before, strict=True):
                    session.now = now

        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

    was_on = transformer.is_gradient_checkpointing
    transformer.enable_gradient_checkpointing(run)
    undo.callback(transformer.enable_gradient_checkpointing if was_on else transformer.disable_gradient_checkpointing)
