"""Videos, or pictures, from a diffusers pipeline, stock or accelerated, each with everything that is needed to make it again.

    with VideoGenerator("tiny-video", Radial(block=6, dense_steps=5)) as generator:
        clip = generator.generate("a red square moving left", seed=3)
    clip.save("square.mp4")     # and square.yaml
    print(clip.seconds, clip.reports[0])

The pipeline stays the stock one: `generator.pipe` is it, and what this file does not know (latents, embeddings, video to
video) is called there, under the same methods.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, overload

import numpy as np
import torch

from mmeff.evaluation.comparison import Tick, silent
from mmeff.handle import model_note
from mmeff.pipelines._wrapper import Cancel, Cancelled, Wrapper, check_names, check_prompts, picture, resolved, taken
from mmeff.pipelines.loading import EMBEDDED, Kind, check_honoured, guided, makes_pictures
from mmeff.pipelines.recipe import PICTURE, Recipe, check_out, save
from mmeff.report import Report
from mmeff.video_io import to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

Offload = Literal["none", "model", "group", "sequential"]
FPS = 8.0  # of the mp4, where the pipeline has no opinion

_BATCH = "pass a list of prompts, with a seed each"
_PIPE = "call the stock pipeline, `generator.pipe`, which runs under the same methods"
_ADVICE = {
    "generator": "pass seed", "num_videos_per_prompt": _BATCH, "num_images_per_prompt": _BATCH, "latents": _PIPE,
    "output_type": "frames are uint8; for another type " + _PIPE, "return_dict": _PIPE,
    "callback_on_step_end": "pass progress or cancel", "callback_on_step_end_tensor_inputs": "pass progress or cancel",
}  # fmt: skip
_NOT_OFFLOADED = {
    "onload_device": "it is the generator's device",
    "offload_to_disk_path": "diffusers 0.42 loses tied weights on disk, such as the embeddings of T5, and the clip is NaN; "
    "enable it on the pipeline with exclude_modules, then pass the pipeline",
}  # fmt: skip
_OWN = ("prompt", "negative_prompt", "image", "fps")  # arguments of `generate` itself
_COUNTS = ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length")


@dataclass(frozen=True, eq=False, kw_only=True)
class Clip:
    """One generated video.

    Fields: `frames` uint8 (T, H, W, 3), RGB, one frame of a pipeline that makes pictures; `seconds` of the pipeline call
    that made it, which made `batch` clips together; `reports` of the methods that were on, over that whole call; `recipe`
    what made it; `image` the first frame that was given.
    """

    frames: np.ndarray
    seconds: float
    recipe: Recipe
    batch: int = 1
    reports: tuple[Report, ...] = ()
    image: Image | None = None

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.recipe.fps

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the video with its recipe as metadata; beside it the recipe as YAML, and the image as PNG if there is one.

        Args:
            path: ends in .mp4, .mov or .mkv, or in .png for a clip of one frame. Files of these names are replaced, each whole or not at all.
        Raises:
            ValueError, OSError: as `check_out`.
        """
        path = check_out(path)
        save(path, self.frames, self.recipe.to_dict(), self.image)
        return path

    def to_dict(self) -> dict[str, Any]:
        """What was measured and what made it, as plain JSON types; without the frames."""
        return {
            "seconds": self.seconds, "batch": self.batch, "shape": list(self.frames.shape), "recipe": self.recipe.to_dict(),
            "reports": [report.to_dict() for report in self.reports],
        }  # fmt: skip

    def __repr__(self) -> str:
        T, H, W, _ = self.frames.shape
        return f"<Clip “{self.recipe.prompt}”: {T} frames {W}x{H}, {self.seconds:.2f} s>"


class VideoGenerator(Wrapper):
    """A diffusers pipeline with methods on it.

    Args:
        model: "tiny-video", "tiny-image", a folder, a hub name, or a pipeline that is loaded already.
        methods: what `use` takes; several are stacked. To compare methods, call `mmeff.compare`.
        device, dtype: of a model that is loaded by name, as `mmeff.pipelines.loading.load`.
        offload: "none"; "model" keeps one component on the GPU at a time, "sequential" one layer; "group" a group of layers.
        offload_options: for "group", arguments of diffusers' `enable_group_offload`, such as `use_stream`; by default single
            layers (`offload_type="leaf_level"`) are moved.
        defaults: settings of the pipeline call that hold where `generate` is given no others.
    Raises:
        as `load` and `use`; UnsupportedModel for a vision-language model; TypeError for something that is no pipeline;
        ValueError for an offload without a GPU.

    Weights are read from safetensors, and no code of a repository runs: a pipeline that needs its own code must be loaded by
    the caller, with diffusers' `trust_remote_code=True`, and passed in.
    """

    kind: ClassVar[Kind] = "video"
    mistaken = "is a vision-language model and makes no videos; use VisionLanguageModel, or `mmeff ask`"

    def __init__(
        self, model: Any, methods: Any = None, *, device: str | None = None, dtype: str | None = None,
        offload: Offload = "none", offload_options: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        configs = resolved(methods)  # a misspelt method must not cost a model load
        target = device if device not in (None, "auto") else "cuda" if torch.cuda.is_available() else "cpu"
        _check_offload(offload, offload_options, str(target))
        load_device = None if offload == "none" else "cpu"
        if load_device and isinstance(model, str) and str(target).startswith("cuda"):
            dtype = "bfloat16" if dtype in (None, "auto") else dtype  # what "auto" is on the device that computes
        loaded = taken("video", model, device=device, dtype=dtype, load_device=load_device)
        if loaded.kind == "video" and not _is_pipeline(loaded.model):
            raise TypeError(f"VideoGenerator needs a name or a diffusers pipeline, got {type(loaded.model).__name__}")
        super().__init__(loaded)
        self.offload = offload
        self._names = list(inspect.signature(self.pipe.__call__).parameters)
        self.defaults: dict[str, Any] = {**_embedded_defaults(loaded.source), **(defaults or {})}
        self._check_settings(self.defaults)
        _set_offload(self.pipe, offload, str(target), offload_options or {})
        self.use(configs)

    @property
    def pipe(self) -> Any:
        """The stock pipeline."""
        return self._open().model

    @property
    def makes_pictures(self) -> bool:
        """Whether the pipeline makes pictures, which are clips of one frame."""
        return makes_pictures(self.pipe)

    @overload
    def generate(self, prompt: str, **call: Any) -> Clip: ...
    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], **call: Any) -> list[Clip]: ...
    def generate(
        self, prompt: str | list[str] | tuple[str, ...], *, seed: int | Sequence[int] = 0, image: Any = None,
        negative_prompt: str | Sequence[str] | None = None, fps: float | None = None, batch_size: int | None = None,
        out: Any = None, dense: bool = False, progress: Tick = silent, cancel: Cancel | None = None, **settings: Any,
    ) -> Clip | list[Clip]:  # fmt: skip
        """Generate a video, or one for each prompt of a list.

        Args:
            prompt: a text, or a list of them.
            seed: of the noise, drawn on the CPU and so the same on every device; a number s gives prompt i the seed s + i, a
                list gives each prompt its own.
            image: the first frame, for a pipeline that takes one: a path, a PIL image or uint8 (H, W, 3); or one per prompt.
            negative_prompt: a text for all, or one per prompt; None is the pipeline's own.
            fps: frames per second, of the mp4 and, where the pipeline is told a rate, of what it makes.
            batch_size: prompts per pipeline call; None is all of them. With an image it is 1.
            out: a path, or one per prompt: each clip is saved as soon as it is made.
            dense: run this call without the methods.
            progress: called as (prompt, steps done, steps in all). cancel: asked before every call and after every step.
            settings: of the pipeline call: `height`, `width`, `num_frames`, `num_inference_steps`, `guidance_scale`, ...
        Returns:
            a `Clip`, or a list of them for a list of prompts.
        Raises:
            TypeError, ValueError, OSError: an input that this pipeline cannot take, before anything runs.
            Cancelled: `cancel` said so; the clips of earlier pipeline calls are in its `done`.
            NothingAccelerated: a method never acted; this is known after the first pipeline call, and no other is made.

        A prompt of a batch gives the same clip as alone, up to the rounding of larger matrix products.
        """
        texts, single = check_prompts(prompt, "prompt")
        seeds = _seeds(seed, len(texts))
        negatives = self._negatives(negative_prompt, len(texts))
        outs = [None if path is None else check_out(path) for path in _each("out", out, len(texts))]
        if len({path for path in outs if path}) < len([path for path in outs if path]):
            raise ValueError("out names the same file twice; every clip needs its own")
        stills = [path for path in outs if path and path.suffix.lower() == PICTURE]
        if stills and not self.makes_pictures:
            raise ValueError(
                f"cannot write {stills[0]}: {type(self.pipe).__name__} makes videos; name it .mp4, .mov or .mkv"
            )
        call, rate = self._settings(settings, fps)
        check_honoured(self.pipe, {**call, "negative_prompt": negative_prompt})
        images = self._images(image, len(texts))
        size = _batch_size(batch_size, len(texts), with_image=image is not None)
        recipe = self._recipe(call, rate, dense)
        clips: list[Clip] = []
        chunks = [list(range(i, min(i + size, len(texts)))) for i in range(0, len(texts), size)]
        with self._alone():
            for n, rows in enumerate(chunks):
                report = _steps(texts[rows[0]], n, len(chunks), progress, cancel, clips)
                with self._recorded(dense) as reports:
                    made, seconds = self._call(
                        [texts[i] for i in rows], [negatives[i] for i in rows], [seeds[i] for i in rows], images[rows[0]],
                        {**call, "callback_on_step_end": report},
                    )  # fmt: skip
                for i, frames in zip(rows, made, strict=True):
                    own = replace(recipe, prompt=texts[i], seed=seeds[i], negative_prompt=negatives[i])
                    clip = Clip(
                        frames=to_uint8(frames), seconds=seconds, recipe=own, batch=len(rows), reports=tuple(reports),
                        image=images[i],
                    )  # fmt: skip
                    clips.append(clip)
                    if (path := outs[i]) is not None:
                        clip.save(path)
        return clips[0] if single else clips

    def _call(
        self, texts: list[str], negatives: list[str | None], seeds: list[int], image: Image | None, call: dict[str, Any]
    ) -> tuple[Any, float]:
        """One pipeline call: videos (B, T, H, W, 3) in [0, 1], and the seconds it took."""
        alone = len(texts) == 1
        noise = [torch.Generator(device="cpu").manual_seed(seed) for seed in seeds]
        if negatives[0] is not None:
            call["negative_prompt"] = negatives[0] if alone else negatives
        if image is not None:
            call["image"] = image
        began = time.perf_counter()
        try:
            output = self.pipe(
                prompt=texts[0] if alone else texts, generator=noise[0] if alone else noise, output_type="np", **call
            )
        except BaseException:
            if self.offload == "model":
                self.pipe.maybe_free_model_hooks()  # which the pipeline only does when it ends well
            raise
        seconds = time.perf_counter() - began
        videos = getattr(output, "frames", None)
        return (output.images[:, None] if videos is None else videos), seconds

    # ---------------------------------------------------------------- inputs, checked before anything runs

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises: TypeError, ValueError as `generate`."""
        who = type(self.pipe).__name__
        known = [name for name in self._names if name not in (*_OWN, *_ADVICE)]
        check_names(settings, known, {**_ADVICE, **dict.fromkeys(_OWN, "it is an argument of generate")}, who)
        for name, value in settings.items():
            if not _is_plain(value):
                raise TypeError(
                    f"{name} must be a number, a text, or a list or mapping of these, so that the recipe can hold it, got "
                    f"{type(value).__name__}; for anything else {_PIPE}"
                )
            if name in _COUNTS and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        check_honoured(self.pipe, settings)

    def _settings(self, given: Mapping[str, Any], fps: float | None) -> tuple[dict[str, Any], float]:
        """The pipeline call with its own defaults written out, so that a recipe outlives them; and frames per second."""
        self._check_settings(given)
        if fps is not None and (
            isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf")
        ):
            raise ValueError(f"fps must be a positive number, got {fps!r}")
        own = {
            name: parameter.default
            for name, parameter in inspect.signature(self.pipe.__call__).parameters.items()
            if name not in _ADVICE and isinstance(parameter.default, bool | int | float)
        }
        if not guided(self.pipe):
            own.pop("guidance_scale", None)
        call = {**own, **self.defaults, **given}
        # Cosmos and LTX condition on a rate, under two names
        told = next((name for name in ("fps", "frame_rate") if name in self._names), None)
        if told is None:
            return call, float(fps or FPS)
        if fps is not None and "frame_rate" in given:
            raise ValueError(f"fps and frame_rate are one setting of {type(self.pipe).__name__}; pass one of them")
        call[told] = fps if fps is not None else call.get(told) or FPS
        return call, float(call[told])

    def _negatives(self, negative: Any, count: int) -> list[str | None]:
        if negative is None:
            return [None] * count
        if "negative_prompt" not in self._names:
            raise TypeError(f"{type(self.pipe).__name__} takes no negative prompt; leave it out")
        if isinstance(negative, str):
            return [negative] * count
        texts = list(_each("negative_prompt", negative, count))
        for i, text in enumerate(texts):
            if not isinstance(text, str):  # an empty one is fine: it is what unguided means
                raise TypeError(f"negative_prompt {i} must be a text, got {text!r} of type {type(text).__name__}")
        return texts

    def _images(self, image: Any, count: int) -> list[Image | None]:
        who, parameter = type(self.pipe).__name__, inspect.signature(self.pipe.__call__).parameters.get("image")
        what = "pictures" if self.makes_pictures else "videos"
        if image is None:
            if parameter is not None and parameter.default is parameter.empty:
                raise TypeError(f"{who} makes {what} from an image and a text; pass image=")
            return [None] * count
        if parameter is None:
            raise TypeError(
                f"{who} makes {what} from text and takes no image; load a pipeline that takes one, such as "
                f"{'FluxImg2ImgPipeline' if self.makes_pictures else 'WanImageToVideoPipeline'}, and pass it"
            )
        if isinstance(image, list | tuple):
            return [picture(one, f"image {i}") for i, one in enumerate(_each("image", image, count))]
        return [picture(image, "image")] * count

    def _recipe(self, call: Mapping[str, Any], fps: float, dense: bool) -> Recipe:
        source = self.source or str(self.pipe.config.get("_name_or_path") or "")
        if source and Path(source).is_dir():
            source = str(Path(source).resolve())
        denoiser = getattr(self.pipe, "transformer", None)
        return Recipe(
            model=source, prompt="", seed=0, fps=fps, offload=self.offload,
            dtype=str((denoiser or self.pipe).dtype).removeprefix("torch."),
            methods=tuple(config.to_dict() for config in self._acting(dense)), note=model_note(self.pipe),
            settings={name: value for name, value in call.items() if value is not None and name != "fps"},
        )  # fmt: skip


def repeat(
    path: str | os.PathLike[str], model: Any = None, *, device: str | None = None, progress: Tick = silent
) -> Clip:
    """Make a clip again from its YAML or from the video itself.

    Args:
        path: a .yaml, .mp4, .mov or .mkv that `Clip.save` wrote.
        model: another model than the recipe's; needed where that one was built in memory.
        device: as `VideoGenerator`. progress: as `generate`.
    Returns:
        the clip; its frames are equal to the first where versions and hardware are, else up to rounding.
    Raises:
        as `Recipe.read`, `VideoGenerator` and `generate`; ValueError for a recipe without a model.
    """
    recipe = Recipe.read(path)
    if not recipe.model and model is None:
        raise ValueError(f"the pipeline of {path} was built in memory and has no name; pass model=")
    by_name = model is None or isinstance(model, str)
    image = None if recipe.image is None else Path(path).parent / recipe.image
    with VideoGenerator(
        model or recipe.model, list(recipe.methods), device=device, dtype=recipe.dtype if by_name else None,
        offload=recipe.offload if by_name else "none",  # type: ignore[arg-type]  # checked there
    ) as generator:  # fmt: skip
        return generator.generate(
            recipe.prompt, seed=recipe.seed, image=image, negative_prompt=recipe.negative_prompt, progress=progress,
            **({} if "frame_rate" in recipe.settings else {"fps": recipe.fps}), **recipe.settings,
        )  # fmt: skip


def _steps(what: str, n: int, calls: int, progress: Tick, cancel: Cancel | None, clips: list[Clip]) -> Any:
    """The callback of pipeline call n of `calls`: tells the progress, and ends the run when it is cancelled."""

    def check(where: str) -> None:
        if cancel is not None and cancel():
            raise Cancelled(f"cancelled {where} of “{what}”; {len(clips)} clips are done", clips)

    def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps = pipe.num_timesteps
        progress(what, n * steps + step + 1, calls * steps)
        if step + 1 < steps:  # after the last one only decoding is left
            check(f"after step {step + 1} of {steps}")
        return tensors

    check("before the first step")
    return report


def _seeds(seed: Any, count: int) -> list[int]:
    seeds = [seed + i for i in range(count)] if type(seed) is int else list(_each("seed", seed, count))
    for one in seeds:
        if type(one) is not int or not 0 <= one < 2**63:
            raise ValueError(f"seed must be an int in [0, 2**63), or one per prompt, got {one!r}")
    return seeds


def _each(name: str, value: Any, count: int) -> Sequence[Any]:
    """One value per prompt: a list of as many, or a single one where there is a single prompt."""
    if value is None:
        return [None] * count
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise ValueError(f"{name} must have one value per prompt, got {len(value)} for {count} prompts")
        return value
    if count != 1:
        raise ValueError(f"{name} must be a list with one value per prompt, got {value!r} for {count} prompts")
    return [value]


def _batch_size(given: int | None, count: int, *, with_image: bool) -> int:
    if given is not None and (type(given) is not int or given < 1):
        raise ValueError(f"batch_size must be an int >= 1, got {given!r}")
    if with_image:
        if given not in (None, 1):
            raise ValueError(f"with an image every clip is a pipeline call of its own; leave batch_size={given} out")
        return 1
    return given or count


def _is_pipeline(model: Any) -> bool:
    from diffusers import DiffusionPipeline

    return isinstance(model, DiffusionPipeline)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _embedded_defaults(source: str) -> dict[str, Any]:
    """Sizes and steps that suit the embedded model; the defaults of its stock pipeline are those of a large one."""
    if source not in EMBEDDED:
        return {}
    from mmeff.evaluation.embedded import DEFAULTS

    return dict(DEFAULTS.get(source, {}))


def _check_offload(offload: str, options: Mapping[str, Any] | None, device: str) -> None:
    if offload not in get_args(Offload):
        raise ValueError(f"offload must be one of {', '.join(get_args(Offload))}, got {offload!r}")
    if options and offload != "group":
        raise ValueError(f"offload_options are for offload='group', got them with {offload!r}")
    if offload != "none" and device.startswith("cpu"):
        raise ValueError(
            f"offload={offload!r} moves weights from a GPU to the CPU, and this runs on the CPU; pass offload='none'"
        )


def _set_offload(pipe: Any, offload: Offload, device: str, options: Mapping[str, Any]) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        chosen = {"offload_type": "leaf_level", **options}
        known = list(inspect.signature(pipe.enable_group_offload).parameters)
        check_names(chosen, known, _NOT_OFFLOADED, "group offload")
        pipe.enable_group_offload(torch.device(device), **chosen)
