"""Flux in diffusers, an image model: the pipelines around FluxTransformer2DModel, and the bare transformer.

Attention is joint: the text's tokens come first, then those of the image, which is a video of one frame here. Layers count
through the dual blocks and on through the single ones. Dual blocks are handed the two streams apart; single blocks are
handed them joined and do not know where the text ends, which only the transformer's arguments tell. The grid is read from
`img_ids`, the row and column of every token. With tokens of a second picture behind the first (FluxKontextPipeline) there is
no single grid, and forwards run dense.
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

_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids")


class FluxHost(Family):
    """Runs sparse attentions in the joint attention of Flux transformers."""

    name = "flux"
    models = (
        "diffusers FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxFillPipeline, FluxControlPipeline, "
        "FluxControlNetPipeline, FluxTransformer2DModel"
    )
    module = "diffusers.models.transformers.transformer_flux"
    transformer = "FluxTransformer2DModel"
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
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        from mmeff.diffusion_attn.hosts._flux_attention import SparseFluxProcessor

        return FluxAttnProcessor, SparseFluxProcessor

    @classmethod
    def sizes(cls, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = named(args, kwargs, *_ARGUMENTS)
        latents, text, ids = call.get("hidden_states"), call.get("encoder_hidden_states"), call.get("img_ids")
        if latents is None or text is None or ids is None:
            return None
        reason = "img_ids are not the raster of one image: there may be a reference image behind it"
        return _grid_of(ids) or reason, text.shape[1], latents.device, None

    @classmethod
    def plan(
        cls,
        model: Any,
        method: MethodConfig,
        *,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 28,
        batch: int = 1,
        text_tokens: int = 512,
    ) -> Plan:
        """What a generation of this size would do; the model does not run.

        Args:
            height, width: pixels. num_inference_steps: denoising steps.
            batch: images at once; true guidance runs its two branches one after the other and is not part of it.
            text_tokens: text tokens in self-attention, padding included (the pipelines' max_sequence_length).
        Returns: a Plan; its predictions count multiply-adds of the transformer and leave out the VAE and the text encoders.
        Raises: TypeError or ValueError for sizes that are not positive ints.
        """
        return cls._plan(
            model, method, height=height, width=width, num_inference_steps=num_inference_steps, batch=batch,
            text_tokens=text_tokens,
        )  # fmt: skip

    @classmethod
    def dimensions(cls, model: Any, transformer: Any, *, height: int, width: int) -> Dimensions:  # type: ignore[override]
        rows, reasons = [], []
        factor = getattr(model, "vae_scale_factor", None)
        if factor is None:
            factor = 8
            rows.append(("VAE", "8 x 8 pixels to a latent, assumed for a transformer without its pipeline"))
        unit = 2 * factor  # the pipelines pack 2 x 2 latents into a token
        grid = (1, height // unit, width // unit)
        for name, value, tokens in (("height", height, grid[1]), ("width", width, grid[2])):
            if value % unit:
                reasons.append(
                    f"{name}={value} is not a multiple of {unit} pixels: the pipeline makes it {tokens * unit}"
                )
        rows.append(("image", f"{grid[1] * unit} x {grid[2] * unit} pixels"))
        return Dimensions(grid=grid, rows=rows, reasons=reasons)

    @classmethod
    def work(cls, transformer: Any, video: int, text: int) -> Work:
        config, tokens = transformer.config, video + text
        C = config.num_attention_heads * config.attention_head_dim
        dual, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        # Both kinds project q, k, v and the output and widen fourfold; a single block's last product takes both at once.
        layers = dual * (4 + 8) * tokens * C * C + single * (3 + 4 + 5) * tokens * C * C
        ends = config.in_channels + config.patch_size**2 * (config.out_channels or config.in_channels)
        return Work(
            attention=2 * tokens * tokens * C,
            layer=layers / (dual + single),
            outside=video * C * ends + text * C * config.joint_attention_dim,
        )


HOSTS = (FluxHost,)


def _read_grid(ids: Tensor) -> Grid | None:
    """The grid of positions (N, 3), whose last two columns are row and column; None unless they are the raster of one image.

    In half precision large positions are rounded, so neighbours may share one; the first two rows are always told apart.
    """
    if ids.ndim == 3:  # deprecated in diffusers, which takes the first sample's
        ids = ids[0]
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] != 3:
        return None
    image, row, column = ids.unbind(1)
    W = int((row == row[0]).int().cumprod(0).sum())
    if ids.shape[0] % W:
        return None
    y, x = row.view(-1, W), column.view(-1, W)
    raster = (
        (image == image[0]).all() and (y == y[:, :1]).all() and (x == x[:1]).all()
        and (y[1:, 0] >= y[:-1, 0]).all() and (x[0, 1:] >= x[0, :-1]).all()
    )  # fmt: skip
    return (1, y.shape[0], W) if raster else None


_grid_of = ReadOnce(_read_grid)
