"""What fine-tuning must know of a model family: its sizes, its latents, its text features, its velocity.

One class per family, chosen by `trainable`. Today that is Wan, text to video; other pipelines are refused with the reason.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmeff.diffusion_attn._base import Grid
from mmeff.errors import UnsupportedModel
from mmeff.handle import describe_model


def trainable(pipeline: Any) -> WanVideo:
    """The family of a pipeline.

    Raises: UnsupportedModel for a pipeline that fine-tuning does not know, with the reason.
    """
    from diffusers import WanPipeline

    name = type(pipeline).__name__
    if not isinstance(pipeline, WanPipeline):
        raise UnsupportedModel(
            f"fine-tuning knows the text-to-video pipelines of the Wan family (diffusers WanPipeline), got {name}; "
            "load the model as a WanPipeline, or train this one with its own scripts"
        )
    scheduler = pipeline.scheduler
    prediction = scheduler.config.get("prediction_type", "")
    if not type(scheduler).__name__.startswith("FlowMatch") and prediction != "flow_prediction":
        raise UnsupportedModel(
            f"fine-tuning needs a flow-matching scheduler, because it trains a velocity; {name} has "
            f"{type(scheduler).__name__} with prediction_type={prediction!r}; set pipeline.scheduler to a "
            "FlowMatchEulerDiscreteScheduler if the model was trained by flow matching"
        )
    if pipeline.config.get("boundary_ratio") is not None or getattr(pipeline, "transformer_2", None) is not None:
        raise UnsupportedModel(
            f"this {name} shares its steps between two transformers (Wan 2.2 A14B), each trained on its own noise levels, "
            "and fine-tuning knows one transformer; use Wan 2.1"
        )
    if pipeline.config.get("expand_timesteps"):
        raise UnsupportedModel(
            f"this {name} has a timestep for every token (Wan 2.2 TI2V), which fine-tuning does not know; use Wan 2.1"
        )
    channels, latent = pipeline.transformer.config.in_channels, pipeline.vae.config.z_dim
    if channels != latent:
        raise UnsupportedModel(
            f"the transformer takes {channels} channels and the VAE makes {latent}: it is conditioned on more than text "
            "(image to video), which fine-tuning does not know"
        )
    return WanVideo(pipeline)


class WanVideo:
    """Wan, text to video. Text features are encoded once per prompt and kept without their padding.

    Attributes: `pipeline` and its `name`; `transformer`, what is trained; `shift` of the noise levels, from the scheduler.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.name = describe_model(pipeline)
        self.transformer = pipeline.transformer
        config = pipeline.scheduler.config
        self.shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
        self.timesteps = int(config.get("num_train_timesteps", 1000))
        self._texts: dict[tuple[str, int], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(iter(self.transformer.parameters())).device

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The token grid of a video of this size.

        Raises: ValueError for sizes that the pipeline would not generate.
        """
        temporal, spatial = self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial
        patch = self.transformer.config.patch_size
        if frames < 1 or (frames - 1) % temporal:
            below = max(frames - 1, 0) // temporal * temporal + 1
            raise ValueError(
                f"frames must be 1 + a multiple of {temporal} for this VAE, got {frames}; pass {below} or {below + temporal}"
            )
        found = [((frames - 1) // temporal + 1) // patch[0]]
        for name, value, p in (("height", height, patch[1]), ("width", width, patch[2])):
            unit = math.lcm(16, spatial * p)  # the pipeline refuses what is no multiple of 16
            if value < unit or value % unit:
                raise ValueError(f"{name} must be a multiple of {unit} pixels for this pipeline, got {value}")
            found.append(value // spatial // p)
        return found[0], found[1], found[2]

    @torch.no_grad()
    def encode_text(self, prompts: list[str], tokens: int) -> Tensor:
        """Text features (B, tokens, C) as the pipeline makes them, padded with zeros."""
        for prompt in dict.fromkeys(prompts):
            if (prompt, tokens) not in self._texts:
                features = self.pipeline.encode_prompt(
                    [prompt], do_classifier_free_guidance=False, max_sequence_length=tokens
                )[0][0]
                words = features.any(dim=-1).nonzero()  # what is behind the words is exactly zero
                self._texts[prompt, tokens] = features[: int(words.max()) + 1 if len(words) else 0].cpu()
        found = [self._texts[prompt, tokens] for prompt in prompts]
        padded = found[0].new_zeros(len(found), tokens, found[0].shape[-1])
        for row, features in zip(padded, found, strict=True):
            row[: len(features)] = features
        return padded.to(self.device)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Normalised latents (C, f, h, w) of a video (F, H, W, 3) in [0, 1], on the CPU: the mode of the posterior."""
        vae = self.pipeline.vae
        pixels = (video.permute(3, 0, 1, 2)[None] * 2 - 1).to(vae.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode().float()
        mean, std = (
            torch.tensor(values, device=latents.device)[None, :, None, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return ((latents - mean) / std)[0].to("cpu", vae.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """The predicted velocity (B, C, f, h, w) in float32 of noised latents at noise levels sigma (B,) in (0, 1)."""
        dtype = self.transformer.dtype
        out = self.transformer(
            hidden_states=latents.to(dtype),
            timestep=sigma * self.timesteps,
            encoder_hidden_states=text.to(dtype),
            return_dict=False,
        )[0]
        return out.float()
