"""LTX-Video in diffusers: text-to-video, image-to-video and conditioned pipelines, and the bare transformer.

Self-attention is `transformer_blocks[i].attn1` over video tokens alone, frame-major; text enters through cross-attention,
which stays as it is. The forward is told its grid in numbers, or only through `video_coords`, the place of every token in
seconds and pixels. Keyframes at a frame index above 0 (LTXConditionPipeline) lie as tokens of their own before the video.
They belong to no place of its grid, so they are treated like text: everything attends to them, and they to everything.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import Grid
from mmeff.diffusion_attn.hosts._family import Family
from mmeff.diffusion_attn.hosts._planning import Dimensions, Work
from mmeff.diffusion_attn.hosts._positions import ReadOnce, named
from mmeff.report import Plan

_ARGUMENTS = (
    "hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "num_frames", "height", "width",
    "rope_interpolation_scale", "video_coords",
)  # fmt: skip


class LTXHost(Family):
    """Runs sparse attentions in the self-attention of LTX-Video transformers."""

    name = "ltx"
    models = "diffusers LTXPipeline, LTXImageToVideoPipeline, LTXConditionPipeline, LTXVideoTransformer3DModel"
    module = "diffusers.models.transformers.transformer_ltx"
    transformer = "LTXVideoTransformer3DModel"

    @classmethod
    def attentions(cls, transformer: Any) -> list[tuple[str, Any]]:
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1) for i, block in enumerate(transformer.transformer_blocks)
        ]

    @classmethod
    def processors(cls) -> tuple[type, type]:
        from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

        from mmeff.diffusion_attn.hosts._ltx_attention import SparseLTXProcessor

        return LTXVideoAttnProcessor, SparseLTXProcessor

    @classmethod
    def sizes(cls, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = named(args, kwargs, *_ARGUMENTS)
        latents, coords = call.get("hidden_states"), call.get("video_coords")  # (B, N, C) and (B, 3, N)
        if latents is None or latents.ndim != 3:
            return None
        if coords is None:  # where both are given, the transformer listens to the coordinates
            grid = call.get("num_frames"), call.get("height"), call.get("width")
            return None if None in grid else (grid, 0, latents.device, None)
        found = _grid_at_the_end(coords)
        if found is None:
            return (
                "video_coords does not end in the raster of one video, the same for every sample",
                0,
                latents.device,
                None,
            )
        grid, before = found
        return grid, before, latents.device, None

    @classmethod
    def plan(
        cls,
        model: Any,
        method: MethodConfig,
        *,
        height: int = 512,
        width: int = 704,
        num_frames: int = 161,
        num_inference_steps: int = 50,
        batch: int = 1,
        text_tokens: int = 128,
    ) -> Plan:
        """What a generation of this size would do; the model does not run.

        Args:
            height, width: pixels. num_frames: frames of the video. num_inference_steps: denoising steps.
            batch: videos at once; guidance doubles it inside the transformer, which one layout serves as well.
            text_tokens: text tokens in cross-attention (the pipelines' max_sequence_length; 256 for LTXConditionPipeline).
        Returns: a Plan; its predictions count multiply-adds of the transformer and leave out the VAE, the text encoder and
            the tokens of keyframes at a frame index above 0.
        Raises: TypeError or ValueError for sizes that are not positive ints.
        """
        return cls._plan(
            model, method, height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps,
            batch=batch, text_tokens=text_tokens,
        )  # fmt: skip

    @classmethod
    def dimensions(cls, model: Any, transformer: Any, *, height: int, width: int, num_frames: int) -> Dimensions:  # type: ignore[override]
        rows, reasons = [], []
        spatial = getattr(model, "vae_spatial_compression_ratio", None)
        temporal = getattr(model, "vae_temporal_compression_ratio", None)
        if spatial is None or temporal is None:
            spatial, temporal = 32, 8
            rows.append(
                ("VAE", "32 x 32 pixels and 8 frames to a latent, assumed for a transformer without its pipeline")
            )
        for name, value in (("height", height), ("width", width)):
            if value % 32:
                reasons.append(f"{name}={value} is not a multiple of 32 pixels, which the pipeline refuses")
        grid = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
        frames = (grid[0] - 1) * temporal + 1
        if frames != num_frames:
            reasons.append(
                f"num_frames={num_frames} is not 1 + a multiple of {temporal}: the pipeline makes it {frames}"
            )
        rows.append(("video", f"{frames} frames of {grid[1] * spatial} x {grid[2] * spatial} pixels"))
        return Dimensions(grid=grid, rows=rows, reasons=reasons)

    @classmethod
    def work(cls, transformer: Any, video: int, text: int) -> Work:
        config, N = transformer.config, video
        C = config.num_attention_heads * config.attention_head_dim
        cross = 2 * N * C * C + 2 * text * config.cross_attention_dim * C + 2 * N * text * C
        return Work(
            attention=2 * N * N * C,
            layer=4 * N * C * C + cross + 2 * N * C * 4 * C,
            outside=N * C * (config.in_channels + config.out_channels) + text * C * (config.caption_channels + C),
        )


HOSTS = (LTXHost,)


def _read_grid(coords: Tensor) -> tuple[Grid, int] | None:
    """The grid in which coordinates (B, 3, N) of time, row and column end, and how many tokens lie before it.

    None unless those last tokens are the raster of one video, frame-major, and all samples have the same coordinates.
    """
    if coords.ndim != 3 or coords.shape[1] != 3 or coords.shape[2] == 0 or not (coords == coords[:1]).all():
        return None
    time, row, column = coords[0]
    N = time.shape[0]
    same_frame = int((time.flip(0) == time[-1]).int().cumprod(0).sum())  # tokens at the end with the last one's time
    W = int((row[-same_frame:].flip(0) == row[-1]).int().cumprod(0).sum())
    H = same_frame // W
    # The video is the longest end in which time moves on from frame to frame; a keyframe before it lies later in time.
    starts = time.flip(0)[H * W - 1 :: H * W]
    F = 1 + int((starts[1:] < starts[:-1]).int().cumprod(0).sum())
    t, y, x = (axis[N - F * H * W :].view(F, H, W) for axis in (time, row, column))
    raster = (
        (t == t[:, :1, :1]).all() and (y == y[:1, :, :1]).all() and (x == x[:1, :1]).all()
        and (y[0, 1:, 0] > y[0, :-1, 0]).all() and (x[0, 0, 1:] > x[0, 0, :-1]).all()
    )  # fmt: skip
    return ((F, H, W), N - F * H * W) if raster else None


_grid_at_the_end = ReadOnce(_read_grid)
