"""Load any supported model from a folder or a hub name, the way its own library does.

Weights are safetensors, nothing is unpickled, and no code from a repository runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmeff.errors import UnsupportedModel

Kind = Literal["video", "vlm"]
EMBEDDED: dict[str, Kind] = {"tiny-video": "video", "tiny-vlm": "vlm", "tiny-video-vlm": "vlm", "tiny-image": "video"}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to use. `kind` is "video" for a diffusers pipeline, also of pictures, "vlm" for a transformers model with a
    processor."""

    kind: Kind
    model: Any
    processor: Any = None
    source: str = ""
    note: str = ""

    @property
    def embedded(self) -> bool:
        """Whether this is one of the tiny models of this project."""
        return self.source in EMBEDDED


def load(source: str, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load `tiny-video`, `tiny-image`, `tiny-vlm`, `tiny-video-vlm`, a local folder, or a hub name.

    Args:
        source: where the model is.
        device: "auto" takes CUDA where there is one.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere; or a torch dtype's name.
    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached.
        UnsupportedModel: a folder without model_index.json or config.json, or a model that its library cannot build.
    """
    import torch

    from mmeff import tiny

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _dtype(dtype, device)
    if source in EMBEDDED:
        if not (tiny.data_folder() / source).is_dir():
            raise FileNotFoundError(
                f"{source} has no weights at {tiny.data_folder() / source}; `mmeff train {source} --out {tiny.data_folder() / source}` "
                "makes them"
            )
        if EMBEDDED[source] == "video":
            pipeline = (tiny.video_pipeline if source == "tiny-video" else tiny.image_pipeline)(device=device)
            if chosen != torch.float32:  # which it has; diffusers warns of every cast
                pipeline = pipeline.to(chosen)
            return Loaded(kind="video", model=pipeline, source=source, note=tiny.NOTE)
        model, processor = (tiny.vlm if source == "tiny-vlm" else tiny.video_vlm)(device=device)
        return Loaded(kind="vlm", model=model.to(chosen), processor=processor, source=source, note=tiny.NOTE)
    kind = _kind(source)
    if kind == "video":
        from diffusers import DiffusionPipeline

        from mmeff.tiny.video_model import attach_if_present

        pipeline = DiffusionPipeline.from_pretrained(source, dtype=chosen, use_safetensors=True)
        if attach_if_present(pipeline, source):  # a folder that `mmeff train tiny-video` wrote
            pipeline.mmeff_note = tiny.NOTE
        return Loaded(kind="video", model=pipeline.to(device), source=source)
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if getattr(getattr(config, "vision_config", None), "model_type", None) == "timm_wrapper":
            import mmeff.vision_backbones  # noqa: F401  # its towers are built by timm, which must know them
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=chosen, use_safetensors=True, trust_remote_code=False
        )
    except ValueError as error:
        raise UnsupportedModel(
            f"{source} is not a vision-language model that transformers can build: {error}"
        ) from error
    return Loaded(
        kind="vlm",
        model=model.to(device).eval(),
        processor=AutoProcessor.from_pretrained(source, trust_remote_code=False),
        source=source,
    )


def makes_pictures(pipeline: Any) -> bool:
    """Whether a pipeline makes pictures: its call takes no number of frames."""
    return "num_frames" not in inspect.signature(pipeline.__call__).parameters


def check_honoured(pipeline: Any, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of a call that this pipeline takes and would then ignore.

    Args:
        settings: what the caller gave, by the names of the pipeline's call; None counts as not given.
    """
    who = type(pipeline).__name__
    guidance, negative = settings.get("guidance_scale"), settings.get("negative_prompt")
    if guidance is not None and not guided(pipeline):
        raise ValueError(
            f"this {who} has no guidance embedding, so guidance_scale={guidance} would change nothing; leave it out"
        )
    true_scale = inspect.signature(pipeline.__call__).parameters.get("true_cfg_scale")
    if negative is not None and true_scale is not None:
        given = settings.get("true_cfg_scale")
        scale = true_scale.default if given is None else given
        if scale <= 1:
            raise ValueError(
                f"{who} reads a negative prompt only with true_cfg_scale > 1, and it is {scale}; leave negative_prompt out, or "
                "raise true_cfg_scale where you can pass it"
            )


def guided(pipeline: Any) -> bool:
    """Whether `guidance_scale` can change what a pipeline makes: distilled Flux models take it, and have nowhere to put it."""
    config = getattr(getattr(pipeline, "transformer", None), "config", None)
    return getattr(config, "guidance_embeds", None) is not False


def _dtype(name: str, device: str) -> Any:
    import torch

    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return found


def _kind(source: str) -> Kind:
    folder = Path(source)
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return "video"
        if (folder / "config.json").is_file():
            return "vlm"
        raise UnsupportedModel(
            f"{folder} holds neither model_index.json (a diffusers pipeline) nor config.json (a transformers model)"
        )
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(
            f"no model folder at {source}; pass a folder, a hub name such as organisation/model, "
            f"or one of the embedded models: {', '.join(EMBEDDED)}"
        )
    from huggingface_hub import file_exists

    try:
        return "video" if file_exists(source, "model_index.json") else "vlm"
    except Exception as error:  # network, authentication or a bad name: all mean that the hub did not give the model
        raise FileNotFoundError(
            f"{source} is no folder here, and the hub could not be asked for it ({type(error).__name__}: {error}); "
            "check the name and the network, or pass a local folder"
        ) from error
