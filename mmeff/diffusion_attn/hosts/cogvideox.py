"""CogVideoX 1.0 and 1.5 in diffusers: text-, image- and video-to-video, controlled generation, and the bare transformer.

Self-attention is joint: the text, all of whose padding is attended, and the video tokens, frame-major. CogVideoX 1.5 puts
`patch_size_t` latent frames into a token, for which its pipelines prepend latent frames; 1.0 has no such size. Guidance runs
as a batch of both branches.
"""

from __future__ import annotations

from typing import Any

from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import Grid
from mmeff.diffusion_attn.hosts._family import Family, argument
from mmeff.diffusion_attn.hosts._planning import Dimensions, Work
from mmeff.report import Plan


class CogVideoXHost(Family):
    """Runs sparse attentions in the joint self-attention of CogVideoX transformers."""

    name = "cogvideox"
    models = (
        "diffusers CogVideoXPipeline, CogVideoXImageToVideoPipeline, CogVideoXVideoToVideoPipeline, "
        "CogVideoXFunControlPipeline, CogVideoXTransformer3DModel"
    )
    module = "diffusers.models.transformers.cogvideox_transformer_3d"
    transformer = "CogVideoXTransformer3DModel"
    joint = True

    @classmethod
    def attentions(cls, transformer: Any) -> list[tuple[str, Any]]:
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1) for i, block in enumerate(transformer.transformer_blocks)
        ]

    @classmethod
    def processors(cls) -> tuple[type, type]:
        from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

        from mmeff.diffusion_attn.hosts._cogvideox_attention import SparseCogVideoXProcessor

        return CogVideoXAttnProcessor2_0, SparseCogVideoXProcessor

    @classmethod
    def sizes(cls, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, F, C, H, W)
        text = argument(args, kwargs, 1, "encoder_hidden_states")  # (B, T, C)
        if latents is None or text is None or latents.ndim != 5 or text.ndim != 3:
            return None
        F, _, H, W = latents.shape[1:]
        return _grid(transformer, F, H, W), text.shape[1], latents.device, None

    @classmethod
    def plan(
        cls,
        model: Any,
        method: MethodConfig,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        batch: int = 1,
        text_tokens: int = 226,
    ) -> Plan:
        """What a generation of this size would do; the model does not run.

        Args:
            height, width: pixels. num_frames: frames of the video. Left out, they are those that the transformer names, as
                in the pipeline. num_inference_steps: denoising steps.
            batch: videos at once; guidance doubles it in every forward and is not part of it.
            text_tokens: text tokens with their padding (the pipelines' max_sequence_length).
        Returns: a Plan; its predictions count multiply-adds of the transformer and leave out the VAE and the text encoder.
        Raises: TypeError or ValueError for sizes that are not positive ints.
        """
        return cls._plan(
            model, method, height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps,
            batch=batch, text_tokens=text_tokens,
        )  # fmt: skip

    @classmethod
    def dimensions(  # type: ignore[override]
        cls, model: Any, transformer: Any, *, height: int | None, width: int | None, num_frames: int | None
    ) -> Dimensions:
        config, rows, reasons = transformer.config, [], []
        spatial = getattr(model, "vae_scale_factor_spatial", None)
        temporal = getattr(model, "vae_scale_factor_temporal", None)
        if spatial is None or temporal is None:
            spatial, temporal = 8, 4
            rows.append(
                ("VAE", "8 x 8 pixels and 4 frames to a latent, assumed for a transformer without its pipeline")
            )
        height = height or config.sample_height * spatial
        width = width or config.sample_width * spatial
        num_frames = num_frames or config.sample_frames
        unit = spatial * config.patch_size
        for name, value in (("height", height), ("width", width)):
            if value % 8:
                reasons.append(f"{name}={value} is not a multiple of 8 pixels, which the pipeline refuses")
            elif value % unit:
                reasons.append(
                    f"{name}={value} is not a multiple of {unit} pixels, the size of a token, which the transformer refuses"
                )
        latent_frames = (num_frames - 1) // temporal + 1
        frames = (latent_frames - 1) * temporal + 1
        if frames != num_frames:
            reasons.append(
                f"num_frames={num_frames} is not 1 + a multiple of {temporal}: the pipeline makes it {frames}"
            )
        rows.append(("video", f"{frames} frames of {height} x {width} pixels"))
        extra = -latent_frames % (config.patch_size_t or 1)
        if extra:
            rows.append(
                ("latent frames", f"{latent_frames} and {extra} more, which the pipeline removes before decoding")
            )
        grid = _grid(transformer, latent_frames + extra, height // spatial, width // spatial)
        return Dimensions(grid=grid, rows=rows, reasons=reasons)

    @classmethod
    def work(cls, transformer: Any, video: int, text: int) -> Work:
        config, N = transformer.config, video + text
        C = config.num_attention_heads * config.attention_head_dim
        patch = config.patch_size**2 * (config.patch_size_t or 1)
        return Work(
            attention=2 * N * N * C,
            layer=(4 + 8) * N * C * C,
            outside=video * C * patch * (config.in_channels + (config.out_channels or config.in_channels))
            + text * config.text_embed_dim * C,
        )


HOSTS = (CogVideoXHost,)


def _grid(transformer: Any, F: int, H: int, W: int) -> Grid:
    config = transformer.config
    return F // (config.patch_size_t or 1), H // config.patch_size, W // config.patch_size
