"""Wan 2.1 and 2.2 in diffusers: text-to-video, image-to-video and video-to-video pipelines, and the bare transformer.

Self-attention is `blocks[i].attn1` over video tokens alone, frame-major; text enters through cross-attention, which stays
as it is. The grid is the latent video divided by the patch size. Wan 2.2 has two transformers: layers count from 0 in each
of them, steps run on across both.
"""

from __future__ import annotations

import math
from typing import Any

from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import Grid
from mmeff.diffusion_attn.hosts._family import Family
from mmeff.diffusion_attn.hosts._planning import Dimensions, Work
from mmeff.report import Plan

_IMAGE_TOKENS = 257  # CLIP tokens of the conditioning image of Wan 2.1 image-to-video, in cross-attention


class WanHost(Family):
    """Runs sparse attentions in the self-attention of Wan transformers."""

    name = "wan"
    models = "diffusers WanPipeline, WanImageToVideoPipeline, WanVideoToVideoPipeline, WanTransformer3DModel"
    module = "diffusers.models.transformers.transformer_wan"
    transformer = "WanTransformer3DModel"

    @classmethod
    def attentions(cls, transformer: Any) -> list[tuple[str, Any]]:
        return [(f"blocks.{i}.attn1", block.attn1) for i, block in enumerate(transformer.blocks)]

    @classmethod
    def processors(cls) -> tuple[type, type]:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        from mmeff.diffusion_attn.hosts._wan_attention import SparseWanProcessor

        return WanAttnProcessor, SparseWanProcessor

    @classmethod
    def sizes(cls, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        latents = args[0] if args else kwargs.get("hidden_states")  # (B, C, F, H, W)
        if latents is None or latents.ndim != 5:
            return None
        return _grid(transformer, tuple(latents.shape[2:])), 0, latents.device, None

    @classmethod
    def plan(
        cls,
        model: Any,
        method: MethodConfig,
        *,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        batch: int = 1,
        text_tokens: int = 512,
    ) -> Plan:
        """What a generation of this size would do; the model does not run.

        Args:
            height, width: pixels. num_frames: frames of the video. num_inference_steps: denoising steps.
            batch: videos at once; guidance runs its two branches one after the other and is not part of it.
            text_tokens: text tokens in cross-attention (the pipelines' max_sequence_length).
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
        spatial = getattr(model, "vae_scale_factor_spatial", None)
        temporal = getattr(model, "vae_scale_factor_temporal", None)
        if spatial is None or temporal is None:
            spatial, temporal = 8, 4
            rows.append(
                ("VAE", "8 x 8 pixels and 4 frames to a latent, assumed for a transformer without its pipeline")
            )
        fitted = {}
        for name, value, patch in (("height", height, 1), ("width", width, 2)):
            unit = spatial * transformer.config.patch_size[patch]
            fitted[name] = value // unit * unit
            if value % 16:
                reasons.append(f"{name}={value} is not a multiple of 16 pixels, which the pipeline refuses")
            elif value % unit:
                reasons.append(
                    f"{name}={value} is not a multiple of {unit} pixels: the pipeline makes it {fitted[name]}"
                )
        frames = num_frames
        if temporal > 1 and num_frames % temporal != 1:
            frames = num_frames // temporal * temporal + 1
            reasons.append(
                f"num_frames={num_frames} is not 1 + a multiple of {temporal}: the pipeline makes it {frames}"
            )
        rows.append(("video", f"{frames} frames of {fitted['height']} x {fitted['width']} pixels"))
        latents = ((frames - 1) // temporal + 1, fitted["height"] // spatial, fitted["width"] // spatial)
        return Dimensions(grid=_grid(transformer, latents), rows=rows, reasons=reasons)

    @classmethod
    def work(cls, transformer: Any, video: int, text: int) -> Work:
        config, N = transformer.config, video
        C = config.num_attention_heads * config.attention_head_dim
        keys = text + (_IMAGE_TOKENS if config.added_kv_proj_dim else 0)
        cross = 2 * N * C * C + 2 * keys * C * C + 2 * N * keys * C
        patch = math.prod(config.patch_size)
        return Work(
            attention=2 * N * N * C,
            layer=4 * N * C * C + cross + 2 * N * C * config.ffn_dim,
            outside=N * C * patch * (config.in_channels + (config.out_channels or config.in_channels)),
        )


HOSTS = (WanHost,)


def _grid(transformer: Any, latents: tuple[int, ...]) -> Grid:
    F, H, W = (n // p for n, p in zip(latents, transformer.config.patch_size, strict=True))
    return F, H, W
