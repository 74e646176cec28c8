"""HunyuanVideo in diffusers: text-to-video and both kinds of image-to-video, SkyReels, and the bare transformer.

Self-attention is joint: video tokens, frame-major, then the text. Layers count through the dual blocks and on through the
single ones; the token refiner of the text is left alone. Prompts are padded at their end, and the model attends to as many
text tokens as the mask has ones. Image-to-video puts the image's tokens before the text's, where they count as text.
"""

from __future__ import annotations

from typing import Any

import torch

from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import Grid
from mmeff.diffusion_attn.hosts._family import Family, argument
from mmeff.diffusion_attn.hosts._planning import Dimensions, Work
from mmeff.report import Plan

# Tokens of the conditioning image that join the text, less the four of the prompt template that are cut out of it: the 576 of
# the vision tower are thinned out by `image_embed_interleave`, whose default is 2 or 4.
_IMAGE_TOKENS = {None: 0, "latent_concat": 576 // 2 - 4, "token_replace": 576 // 4 - 4}


class HunyuanVideoHost(Family):
    """Runs sparse attentions in the joint self-attention of HunyuanVideo transformers."""

    name = "hunyuan_video"
    models = (
        "diffusers HunyuanVideoPipeline, HunyuanVideoImageToVideoPipeline, HunyuanSkyreelsImageToVideoPipeline, "
        "HunyuanVideoTransformer3DModel"
    )
    module = "diffusers.models.transformers.transformer_hunyuan_video"
    transformer = "HunyuanVideoTransformer3DModel"
    joint = True

    @classmethod
    def attentions(cls, transformer: Any) -> list[tuple[str, Any]]:
        return [
            (f"{name}.{i}.attn", block.attn)
            for name in ("transformer_blocks", "single_transformer_blocks")
            for i, block in enumerate(getattr(transformer, name))
        ]

    @classmethod
    def processors(cls) -> tuple[type, type]:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        from mmeff.diffusion_attn.hosts._hunyuan_video_attention import SparseHunyuanVideoProcessor

        return HunyuanVideoAttnProcessor2_0, SparseHunyuanVideoProcessor

    @classmethod
    def sizes(cls, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, F, H, W)
        text = argument(args, kwargs, 2, "encoder_hidden_states")  # (B, T, C)
        mask = argument(args, kwargs, 3, "encoder_attention_mask")  # (B, T), ones first
        if latents is None or text is None or mask is None or latents.ndim != 5 or text.ndim != 3 or mask.ndim != 2:
            return None
        valid = mask.sum(dim=1, dtype=torch.int32).expand(latents.shape[0])
        return _grid(transformer, tuple(latents.shape[2:])), text.shape[1], latents.device, valid

    @classmethod
    def plan(
        cls,
        model: Any,
        method: MethodConfig,
        *,
        height: int = 720,
        width: int = 1280,
        num_frames: int = 129,
        num_inference_steps: int = 50,
        batch: int = 1,
        text_tokens: int = 256,
    ) -> Plan:
        """What a generation of this size would do; the model does not run.

        Args:
            height, width: pixels. num_frames: frames of the video. num_inference_steps: denoising steps.
            batch: videos at once; true guidance runs its two branches one after the other and is not part of it.
            text_tokens: text tokens with their padding (the pipelines' max_sequence_length); the tokens of the image that
                image-to-video puts before them are added here.
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
        for name, value in (("height", height), ("width", width)):
            if value % 16:
                reasons.append(f"{name}={value} is not a multiple of 16 pixels, which the pipeline refuses")
        latents = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
        frames = (latents[0] - 1) * temporal + 1
        if frames != num_frames:
            reasons.append(
                f"num_frames={num_frames} is not 1 + a multiple of {temporal}: the pipeline makes it {frames}"
            )
        rows.append(("video", f"{frames} frames of {height} x {width} pixels"))
        image = _IMAGE_TOKENS[transformer.config.image_condition_type]
        if image:
            rows.append(
                ("image tokens", f"{image} beside the text, at the pipeline's default of image_embed_interleave")
            )
        return Dimensions(grid=_grid(transformer, latents), text_len=image, rows=rows, reasons=reasons)

    @classmethod
    def work(cls, transformer: Any, video: int, text: int) -> Work:
        config, N = transformer.config, video + text
        C = config.num_attention_heads * config.attention_head_dim
        patch = config.patch_size**2 * config.patch_size_t
        refiner = 12 * text * C * C + 2 * text * text * C  # projections, an MLP of width 4 and attention
        return Work(
            attention=2 * N * N * C,
            layer=(4 + 2 * config.mlp_ratio) * N * C * C,  # the same in dual and single blocks
            outside=video * C * patch * (config.in_channels + (config.out_channels or config.in_channels))
            + text * config.text_embed_dim * C
            + config.num_refiner_layers * refiner,
        )


HOSTS = (HunyuanVideoHost,)


def _grid(transformer: Any, latents: tuple[int, ...]) -> Grid:
    config = transformer.config
    F, H, W = latents
    return F // config.patch_size_t, H // config.patch_size, W // config.patch_size
