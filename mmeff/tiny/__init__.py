"""Small models trained in this project on generated scenes, so that quality can be measured without any download.

They are stock classes: LLaVA models for pictures, for clips and for actions with their processors, a Wan and a Flux pipeline. Their
weights lie in `data/` of the repository and inside the wheel. They validate code and cost curves; they never say which method is better on a real model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NOTE = "a tiny model trained in this project on generated scenes; its figures validate code and do not rank methods"


def data_folder() -> Path:
    """Where the embedded models and sample media lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / "samples").is_dir():
            return folder
    raise FileNotFoundError(
        f"the embedded data is neither in {package / 'data'} nor in {package.parent / 'data'}; reinstall mmeff"
    )


def vlm(*, device: str = "cpu", attention: str = "sdpa") -> tuple[Any, Any]:
    """The embedded LLaVA model in float32 and its processor.

    Args:
        device: where to put the model. attention: its attention implementation ("sdpa" or "eager").
    Returns:
        `(model, processor)` as transformers' `from_pretrained` builds them.
    """
    return load_vlm(data_folder() / "tiny-vlm", device=device, attention=attention)


def video_vlm(*, device: str = "cpu", attention: str = "sdpa") -> tuple[Any, Any]:
    """The embedded LLaVA model that answers questions about clips of eight frames, and its processor; see `vlm`.

    Every frame is one image of the prompt: `mmeff.tiny.motions.prompt`, or the processor's chat template, writes it.
    """
    return load_vlm(data_folder() / "tiny-video-vlm", device=device, attention=attention)


def vla(*, device: str = "cpu", attention: str = "sdpa") -> tuple[Any, Any]:
    """The embedded LLaVA model that acts in `mmeff.tiny.manipulation`, and its processor; see `vlm`.

    `mmeff.evaluation.closed_loop.closed_loop` lets it act.
    """
    return load_vla(data_folder() / "tiny-vla", device=device, attention=attention)


def backbones() -> tuple[str, ...]:
    """Names of the embedded vision backbones, which read handwritten digits."""
    from mmeff.tiny import digit_backbones

    return digit_backbones.names(data_folder() / digit_backbones.FOLDER)


def backbone(name: str) -> tuple[Any, dict[str, Any]]:
    """An embedded timm model in float32, and its config: `input_size` (C, H, W), `mean` and `std` of pixels in [0, 1].

    Raises: ValueError for a name that is not one of `backbones()`.
    """
    from mmeff.tiny import digit_backbones

    return digit_backbones.load(data_folder() / digit_backbones.FOLDER, name)


def load_vlm(folder: str | Path, *, device: str = "cpu", attention: str = "sdpa") -> tuple[Any, Any]:
    """A tiny VLM from its folder; see `vlm`."""
    import torch
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    if AutoConfig.from_pretrained(folder).vision_config.model_type == "timm_wrapper":
        import mmeff.vision_backbones  # noqa: F401  registers what timm then builds

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    model.mmeff_note = NOTE
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


load_vla = load_vlm  # the same classes


def video_pipeline(*, device: str = "cpu") -> Any:
    """The embedded `WanPipeline` in float32: 17 frames of 48 x 48 pixels from prompts such as "a red square moving left".

    Args:
        device: where to put the pipeline.
    """
    return load_video(data_folder() / "tiny-video", device=device)


def load_video(folder: str | Path, *, device: str = "cpu") -> Any:
    """A tiny video pipeline from its folder, with its position table attached; see `video_pipeline`."""
    import torch
    from diffusers import WanPipeline

    from mmeff.tiny.video_model import attach_if_present

    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    if not attach_if_present(pipeline, folder):
        raise FileNotFoundError(
            f"{folder} holds no transformer/position_table.safetensors; it is not a tiny video model"
        )
    pipeline.mmeff_note = NOTE
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def image_pipeline(*, device: str = "cpu") -> Any:
    """The embedded `FluxPipeline` in float32: pictures of 48 x 48 pixels from prompts such as "a red square in the top left".

    Args:
        device: where to put the pipeline.
    """
    return load_image(data_folder() / "tiny-image", device=device)


def load_image(folder: str | Path, *, device: str = "cpu") -> Any:
    """A tiny image pipeline from its folder; see `image_pipeline`."""
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.mmeff_note = NOTE
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
