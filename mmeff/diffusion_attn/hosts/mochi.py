"""Mochi in diffusers: the text-to-video pipeline and the bare transformer.

Self-attention is joint: video tokens, frame-major, then the text, of which each sample attends to what its mask marks. A frame
of tokens is a latent frame. Guidance runs as a batch of both branches, whose texts differ in length.
"""

from __future__ import annotations

from typing import Any

import torch

from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import Grid
from mmeff.diffusion_attn.hosts._family import Family, argument
from mmeff.diffusion_attn.hosts._planning import Dimensions, Work
from mmeff.report import Plan


class MochiHost(Family):
    """Runs sparse attentions in the joint self-attention of Mochi transformers."""

    name = "mochi"
    models = "diffusers MochiPipeline, MochiTransformer3DModel"
    module = "diffusers.models.transformers.transformer_mochi"
    transformer = "MochiTransformer3DModel"
    joint = True

    @classmethod
    def attentions(cls, transformer: Any) -> list[tuple[str, Any]]:
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1) for i, block in enumerate(transformer.transformer_blocks)
        ]

    @classmethod
    def processors(cls) -> tuple[type, type]:
        from diffusers.models.attention_processor import MochiAttnProcessor2_0

        from mmeff.diffusion_attn.hosts._mochi_attention import SparseMochiProcessor

        return MochiAttnProcessor2_0, SparseMochiProcessor

    @classmethod
    def sizes(cls, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, F, H, W)
        text = argument(args, kwargs, 1, "encoder_hidden_states")  # (B, T, C)
        mask = argument(args, kwargs, 3, "encoder_attention_mask")  # (B, T)
        if latents is None or text is None or mask is None or latents.ndim != 5 or text.ndim != 3 or mask.ndim != 2:
            return None
        valid = mask.bool().sum(dim=1, dtype=torch.int32)
        return _grid(transformer, tuple(latents.shape[2:])), text.shape[1], latents.device, valid

    @classmethod
    def plan(
        cls,
        model: Any,
        method: MethodConfig,
        *,
        height: int = 480,
        width: int = 848,
        num_frames: int = 19,
        num_inference_steps: int = 64,
        batch: int = 1,
        text_tokens: int = 256,
    ) -> Plan:
        """What a generation of this size would do; the model does not run.

        Args:
            height, width: pixels. num_frames: frames of the video. num_inference_steps: denoising steps.
            batch: videos at once; guidance doubles it in every forward and is not part of it.
            text_tokens: text tokens with their padding (the pipeline's max_sequence_length).
        Returns: a Plan; its predictions count multiply-adds of the transformer and leave out the VAE and the text encoder.
        Raises: TypeError or ValueError for sizes that are not positive ints.
        """
        return cls._plan(
            model, method, height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps,
            batch=batch, text_tokens=text_tokens,
        )  # fmt: skip

    @classmethod
    def dimensions(cls, model: Any, transformer: Any, *, height: int, width: int, num_frames: int) -> Dimensions:  # type: ignore[override]
        rows, reasons = [], []
        spatial = getattr(model, "vae_spatial_scale_factor", None)
        temporal = getattr(model, "vae_temporal_scale_factor", None)
        if spatial is None or temporal is None:
            spatial, temporal = 8, 6
            rows.append(
                ("VAE", "8 x 8 pixels and 6 frames to a latent, assumed for a transformer without its pipeline")
            )
        unit = spatial * transformer.config.patch_size
        for name, value in (("height", height), ("width", width)):
            if value % 8:
                reasons.append(f"{name}={value} is not a multiple of 8 pixels, which the pipeline refuses")
            elif value % unit:
                reasons.append(
                    f"{name}={value} is not a multiple of {unit} pixels, the size of a token, which the transformer refuses"
                )
        latents = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
        frames = (latents[0] - 1) * temporal + 1
        if frames != num_frames:
            reasons.append(
                f"num_frames={num_frames} is not 1 + a multiple of {temporal}: the pipeline makes it {frames}"
            )
        rows.append(("video", f"{frames} frames of {height} x {width} pixels"))
        return Dimensions(grid=_grid(transformer, latents), rows=rows, reasons=reasons)

    @classmethod
    def work(cls, transformer: Any, video: int, text: int) -> Work:
        config, N, T = transformer.config, video, text
        C, P = config.num_attention_heads * config.attention_head_dim, config.pooled_projection_dim
        gated = {width: 3 * width * (4 * width * 2 // 3) for width in (C, P)}  # a gated MLP, per token
        text_behind = T * (C * P + gated[P]) * (config.num_layers - 1) / config.num_layers  # the last layer has none
        return Work(
            attention=2 * (N + T) ** 2 * C,
            layer=N * (4 * C * C + gated[C]) + 3 * T * P * C + text_behind,
            outside=N * C * config.patch_size**2 * (config.in_channels + (config.out_channels or config.in_channels))
            + T * config.text_embed_dim * (P + 2 * config.text_embed_dim),
        )


HOSTS = (MochiHost,)


def _grid(transformer: Any, latents: tuple[int, ...]) -> Grid:
    F, H, W = latents
    return F, H // transformer.config.patch_size, W // transformer.config.patch_size
