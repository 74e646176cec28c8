"""Cosmos 1, 2 and 2.5 in diffusers: every pipeline around CosmosTransformer3DModel, and the bare transformer.

Self-attention is `transformer_blocks[i].attn1` over video tokens alone, frame-major; text and images enter through
cross-attention, and control through residuals, both of which stay as they are, like the blocks of a ControlNet. The grid is
the latent video divided by the patch size; masks of conditioned frames are channels and change no tokens. Nothing tells
the step but the pipeline's scheduler.
"""

from __future__ import annotations

import math
from typing import Any

from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import Grid
from mmeff.diffusion_attn.hosts._family import Family
from mmeff.diffusion_attn.hosts._planning import Dimensions, Work
from mmeff.diffusion_attn.hosts._positions import named
from mmeff.report import Plan


class CosmosHost(Family):
    """Runs sparse attentions in the self-attention of Cosmos transformers."""

    name = "cosmos"
    models = (
        "diffusers CosmosTextToWorldPipeline, CosmosVideoToWorldPipeline, Cosmos2TextToImagePipeline, "
        "Cosmos2VideoToWorldPipeline, Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel"
    )
    module = "diffusers.models.transformers.transformer_cosmos"
    transformer = "CosmosTransformer3DModel"

    @classmethod
    def attentions(cls, transformer: Any) -> list[tuple[str, Any]]:
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1) for i, block in enumerate(transformer.transformer_blocks)
        ]

    @classmethod
    def processors(cls) -> tuple[type, type]:
        from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0

        from mmeff.diffusion_attn.hosts._cosmos_attention import SparseCosmosProcessor

        return CosmosAttnProcessor2_0, SparseCosmosProcessor

    @classmethod
    def sizes(cls, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        latents = named(args, kwargs, "hidden_states").get("hidden_states")  # (B, C, F, H, W)
        if latents is None or latents.ndim != 5:
            return None
        return _grid(transformer, tuple(latents.shape[2:])), 0, latents.device, None

    @classmethod
    def plan(
        cls,
        model: Any,
        method: MethodConfig,
        *,
        height: int = 704,
        width: int = 1280,
        num_frames: int = 121,
        num_inference_steps: int = 36,
        batch: int = 1,
        text_tokens: int = 512,
    ) -> Plan:
        """What a generation of this size would do; the model does not run.

        Args: the defaults are those of CosmosTextToWorldPipeline.
            height, width: pixels. num_frames: frames of the video; 1 for text-to-image, 93 is Cosmos 2's default.
            num_inference_steps: denoising steps.
            batch: videos at once; guidance runs its two branches one after the other and is not part of it.
            text_tokens: text tokens in cross-attention (the pipelines' max_sequence_length).
        Returns: a Plan; its predictions count multiply-adds of the transformer and leave out the VAE, the text encoder and
            a ControlNet.
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
            spatial, temporal = 8, 8
            rows.append(
                (
                    "VAE",
                    "8 x 8 pixels and 8 frames to a latent, those of Cosmos 1, assumed for a transformer without its "
                    "pipeline",
                )
            )
        for name, value in (("height", height), ("width", width)):
            if value % 16:
                reasons.append(f"{name}={value} is not a multiple of 16 pixels, which the pipeline refuses")
        latents = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
        frames = (latents[0] - 1) * temporal + 1
        if frames != num_frames:
            reasons.append(
                f"num_frames={num_frames} is not 1 + a multiple of {temporal}: the pipeline makes it {frames}"
            )
        rows.append(("video", f"{frames} frames of {latents[1] * spatial} x {latents[2] * spatial} pixels"))
        return Dimensions(grid=_grid(transformer, latents), rows=rows, reasons=reasons)

    @classmethod
    def work(cls, transformer: Any, video: int, text: int) -> Work:
        config, N = transformer.config, video
        C = config.num_attention_heads * config.attention_head_dim
        cross = 2 * N * C * C + 2 * text * config.text_embed_dim * C + 2 * N * text * C
        if config.img_context_dim_in:
            images = config.img_context_num_tokens
            cross += N * C * C + 2 * images * C * C + 2 * N * images * C
        patch = math.prod(config.patch_size)
        channels = config.in_channels + config.out_channels + (1 if config.concat_padding_mask else 0)
        projection = config.crossattn_proj_in_channels * config.encoder_hidden_states_channels
        return Work(
            attention=2 * N * N * C,
            layer=4 * N * C * C + cross + 2 * N * C * C * config.mlp_ratio,
            outside=N * C * patch * channels + (text * projection if config.use_crossattn_projection else 0),
        )


HOSTS = (CosmosHost,)


def _grid(transformer: Any, latents: tuple[int, ...]) -> Grid:
    F, H, W = (n // p for n, p in zip(latents, transformer.config.patch_size, strict=True))
    return F, H, W
