"""Wan 2.1 and 2.2 in diffusers: text-to-video, image-to-video and video-to-video pipelines, and the bare transformer.

Self-attention is `blocks[i].attn1` over video tokens alone, frame-major; text enters through cross-attention, which stays
as it is. The grid is the latent video divided by the patch size. Wan 2.2 has two transformers: layers count from 0 in each
of them, steps run on across both.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import Grid, SparseAttention
from mmeff.diffusion_attn.hosts._planning import Dimensions, Work, make_plan
from mmeff.handle import Handle, Host
from mmeff.report import Plan

_IMAGE_TOKENS = 257  # CLIP tokens of the conditioning image of Wan 2.1 image-to-video, in cross-attention


class WanHost(Host):
    """Runs sparse attentions in the self-attention of Wan transformers."""

    name = "wan"
    stage = "diffusion_attn"
    models = "diffusers WanPipeline, WanImageToVideoPipeline, WanVideoToVideoPipeline, WanTransformer3DModel"

    @classmethod
    def matches(cls, model: Any) -> bool:
        return bool(_transformers(model))

    @classmethod
    def modules(cls, model: Any) -> list[Any]:
        return _transformers(model)

    @classmethod
    def why_not(cls, model: Any, method: MethodConfig) -> str | None:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        if not isinstance(method, SparseAttention):
            return f"{type(method).__name__} is not a SparseAttention, which this host needs to lay out its tokens"
        if method.counts_steps and not hasattr(model, "scheduler"):
            return (
                f"dense_steps={method.dense_steps} and last_dense_steps={method.last_dense_steps} count denoising steps, "
                "which a transformer alone does not know; pass the pipeline, or set both to 0"
            )
        for transformer in _transformers(model):
            if hasattr(transformer, "_orig_mod"):
                return "its transformer is wrapped by torch.compile; accelerate the pipeline before compiling it"
            for i, block in enumerate(transformer.blocks):
                processor = block.attn1.processor
                processor = getattr(processor, "original", processor)  # ours: that the stage is taken is said elsewhere
                if type(processor) is not WanAttnProcessor:
                    return (
                        f"blocks.{i}.attn1 has the processor {type(processor).__name__}, and only the stock "
                        "WanAttnProcessor can be replaced without losing what another one adds; call "
                        "set_attn_processor(WanAttnProcessor()) or unload the adapter first"
                    )
                if processor._parallel_config is not None:
                    return "context parallelism is enabled, and a layout is made for all tokens on one device"
        return None

    @classmethod
    def install(cls, model: Any, method: MethodConfig, handle: Handle) -> None:
        from mmeff.diffusion_attn.hosts._denoiser import Session, watch
        from mmeff.diffusion_attn.hosts._wan_attention import SparseWanProcessor

        assert isinstance(method, SparseAttention)  # why_not has refused everything else
        session = Session(handle, method, pipeline=model if hasattr(model, "scheduler") else None)
        for transformer in _transformers(model):
            method.dense_layer_ids(len(transformer.blocks))  # complains about layers that are not there
            watch(transformer, session, num_layers=len(transformer.blocks), sizes=_sizes)
            for layer, block in enumerate(transformer.blocks):
                _replace(block.attn1, SparseWanProcessor(block.attn1.processor, layer, session), handle)

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
        assert isinstance(method, SparseAttention)
        transformer = _transformers(model)[0]
        sizes = _dimensions(model, transformer, height, width, num_frames)
        sizes.rows.append(("batch", f"{batch} (one layout serves all)"))
        return make_plan(
            model,
            method,
            host=cls.name,
            sizes=sizes,
            num_steps=num_inference_steps,
            num_layers=len(transformer.blocks),
            work=_work(transformer.config, math.prod(sizes.grid), text_tokens),
        )


HOSTS = (WanHost,)


def _transformers(model: Any) -> list[Any]:
    """The Wan transformers of a pipeline, or the model itself if it is one; empty for anything else."""
    loaded = sys.modules.get("diffusers.models.transformers.transformer_wan")
    if loaded is None:  # then nobody can have made one
        return []
    parts = [getattr(model, name, None) for name in ("transformer", "transformer_2")]
    parts = [model] if parts == [None, None] else parts
    wan = loaded.WanTransformer3DModel
    found = [part for part in parts if isinstance(getattr(part, "_orig_mod", part), wan)]
    return list({id(part): part for part in found}.values())


def _sizes(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Grid, text length and device of a forward, from its latents (B, C, F, H, W)."""
    latents = args[0] if args else kwargs.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    return _grid(transformer, tuple(latents.shape[2:])), 0, latents.device


def _grid(transformer: Any, latents: tuple[int, ...]) -> Grid:
    F, H, W = (n // p for n, p in zip(latents, transformer.config.patch_size, strict=True))
    return F, H, W


def _replace(attention: Any, processor: Any, handle: Handle) -> None:
    original = attention.processor
    attention.set_processor(processor)

    def undo() -> None:
        if attention.processor is processor:  # one that the user has set since stays
            attention.set_processor(original)

    handle.on_remove(undo)


def _dimensions(model: Any, transformer: Any, height: int, width: int, num_frames: int) -> Dimensions:
    """The token grid of a video, rounded as the pipeline rounds it."""
    rows, reasons = [], []
    spatial = getattr(model, "vae_scale_factor_spatial", None)
    temporal = getattr(model, "vae_scale_factor_temporal", None)
    if spatial is None or temporal is None:
        spatial, temporal = 8, 4
        rows.append(("VAE", "8 x 8 pixels and 4 frames to a latent, assumed for a transformer without its pipeline"))
    fitted = {}
    for name, value, patch in (("height", height, 1), ("width", width, 2)):
        unit = spatial * transformer.config.patch_size[patch]
        fitted[name] = value // unit * unit
        if value % 16:
            reasons.append(f"{name}={value} is not a multiple of 16 pixels, which the pipeline refuses")
        elif value % unit:
            reasons.append(f"{name}={value} is not a multiple of {unit} pixels: the pipeline makes it {fitted[name]}")
    frames = num_frames
    if temporal > 1 and num_frames % temporal != 1:
        frames = num_frames // temporal * temporal + 1
        reasons.append(f"num_frames={num_frames} is not 1 + a multiple of {temporal}: the pipeline makes it {frames}")
    rows.append(("video", f"{frames} frames of {fitted['height']} x {fitted['width']} pixels"))
    latents = ((frames - 1) // temporal + 1, fitted["height"] // spatial, fitted["width"] // spatial)
    return Dimensions(grid=_grid(transformer, latents), rows=rows, reasons=reasons)


def _work(config: Any, N: int, T: int) -> Work:
    """Multiply-adds of a forward over N video tokens with T text tokens."""
    C = config.num_attention_heads * config.attention_head_dim
    keys = T + (_IMAGE_TOKENS if config.added_kv_proj_dim else 0)
    cross = 2 * N * C * C + 2 * keys * C * C + 2 * N * keys * C
    patch = math.prod(config.patch_size)
    return Work(
        attention=2 * N * N * C,
        layer=4 * N * C * C + cross + 2 * N * C * config.ffn_dim,
        outside=N * C * patch * (config.in_channels + (config.out_channels or config.in_channels)),
    )
