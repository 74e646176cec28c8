"""Denoising transformers at the sizes that people run, with random weights: stock diffusers classes, configs in code.

The configs are the published ones (the config.json beside each checkpoint), so that nothing is downloaded; latency does not
depend on weights, except where a method selects by what it finds, which is said with its rows. A model may be built with
fewer layers than it has: rows then say so, and what the whole model would take stands in a column that is called estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmeff.diffusion_attn._base import Grid, SparseAttention
from mmeff.diffusion_attn.gna import GNA
from mmeff.diffusion_attn.radial import Radial
from mmeff.diffusion_attn.rectified import RectifiedSpaAttn
from mmeff.diffusion_attn.sliding_tile import SlidingTile
from mmeff.diffusion_attn.vmoba import VMoBA

# A single forward, in which every layer is sparse; the schedule is applied to the estimate alone.
EVERY: dict[str, Any] = {"dense_steps": 0, "last_dense_steps": 0, "dense_layers": 0}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of diffusers. stacks: its lists of blocks, with the argument that sets their number; inputs: of a forward.

    pixels: a transformer's config and a grid to the sizes that `mmeff.plan` takes; joint: whether text is in self-attention.
    """

    cls: str
    stacks: dict[str, str]
    inputs: Callable[[Any, Grid, int, Callable[..., Tensor], torch.device], dict[str, Any]]
    pixels: Callable[[Any, Grid], dict[str, int]]
    joint: bool = True
    tiny: dict[str, Any]  # the config of a smoke run


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published model. layers: of each stack in full, by the name of the stack; cut: how many of them are built."""

    name: str
    family: Family
    config: dict[str, Any]
    layers: dict[str, int]
    cut: dict[str, int]
    text: int


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What the authors of a method report: how many times as fast as dense, of what, where they say so, and on what hardware."""

    value: float
    of: str
    by: str
    hardware: str = "not known to us"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A method at a setting, and the least that a forward should become faster by where one is published.

    make: with every layer sparse; published: dense layers of the schedule, for the estimate.
    """

    name: str
    preset: str
    make: Callable[[], SparseAttention]
    dense_layers: tuple[int, ...] = ()
    bar: float | None = None
    quoted: Quote | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A model at a size of video. train: forward and backward through it, with gradient checkpointing."""

    model: Model
    what: str
    grid: Grid
    setups: tuple[Setup, ...]
    train: bool = False
    cut: dict[str, int] = field(default_factory=dict)  # in place of the model's
    full: tuple[str, ...] = ()  # methods that are also run with all layers

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return math.prod(self.grid)


# ---------------------------------------------------------------- families


def _wan_inputs(
    model: Any, grid: Grid, text: int, random: Callable[..., Tensor], device: torch.device
) -> dict[str, Any]:
    patch = model.config.patch_size
    latents = [n * p for n, p in zip(grid, patch, strict=True)]
    return {
        "hidden_states": random(1, model.config.in_channels, *latents), "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": random(1, text, model.config.text_dim),
    }  # fmt: skip


def _hunyuan_inputs(
    model: Any, grid: Grid, text: int, random: Callable[..., Tensor], device: torch.device
) -> dict[str, Any]:
    config, (F, H, W) = model.config, grid
    return {
        "hidden_states": random(1, config.in_channels, F * config.patch_size_t, H * config.patch_size, W * config.patch_size),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": random(1, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool, device=device),
        "pooled_projections": random(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], device=device, dtype=random(1).dtype),
    }  # fmt: skip


def _cogvideox_inputs(
    model: Any, grid: Grid, text: int, random: Callable[..., Tensor], device: torch.device
) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    config, (F, H, W) = model.config, grid
    frames = F * (config.patch_size_t or 1)
    ends: dict[str, Any] = {"crops_coords": ((0, 0), (H, W)), "grid_size": (H, W), "temporal_size": F}
    if config.patch_size_t is not None:  # as the pipeline of CogVideoX 1.5 does
        ends = {"crops_coords": None, "grid_size": (H, W), "temporal_size": F, "grid_type": "slice", "max_size": (H, W)}
    rotary = get_3d_rotary_pos_embed(embed_dim=config.attention_head_dim, **ends)
    return {
        "hidden_states": random(1, frames, config.in_channels, H * config.patch_size, W * config.patch_size),
        "encoder_hidden_states": random(1, text, config.text_embed_dim), "timestep": torch.tensor([500], device=device),
        "image_rotary_emb": tuple(x.to(device) for x in rotary),
    }  # fmt: skip


def _flux_inputs(
    model: Any, grid: Grid, text: int, random: Callable[..., Tensor], device: torch.device
) -> dict[str, Any]:
    config, (_, H, W) = model.config, grid
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()
    guidance = {"guidance": torch.tensor([3.5], device=device, dtype=random(1).dtype)} if config.guidance_embeds else {}
    return {
        "hidden_states": random(1, H * W, config.in_channels), "timestep": torch.tensor([0.5], device=device, dtype=random(1).dtype),
        "encoder_hidden_states": random(1, text, config.joint_attention_dim),
        "pooled_projections": random(1, config.pooled_projection_dim), "img_ids": ids.to(device),
        "txt_ids": torch.zeros(text, 3, device=device), **guidance,
    }  # fmt: skip


# A bare transformer is planned as if its VAE made 8 x 8 pixels and 4 frames a latent, and its first frame one by itself.


def _wan_pixels(config: Any, grid: Grid) -> dict[str, int]:
    F, H, W = (n * p for n, p in zip(grid, config.patch_size, strict=True))
    return {"height": 8 * H, "width": 8 * W, "num_frames": 4 * F - 3}


def _patched_pixels(config: Any, grid: Grid) -> dict[str, int]:
    F, H, W = grid
    frames = F * (config.patch_size_t or 1)
    return {"height": 8 * config.patch_size * H, "width": 8 * config.patch_size * W, "num_frames": 4 * frames - 3}


def _flux_pixels(config: Any, grid: Grid) -> dict[str, int]:
    _, H, W = grid
    return {"height": 16 * H, "width": 16 * W}  # the pipeline packs 2 x 2 latents into a token


WAN = Family(
    cls="WanTransformer3DModel", stacks={"blocks": "num_layers"}, inputs=_wan_inputs, pixels=_wan_pixels, joint=False,
    tiny={"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32, "text_dim": 16, "freq_dim": 16},
)  # fmt: skip
HUNYUAN = Family(
    cls="HunyuanVideoTransformer3DModel",
    stacks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}, inputs=_hunyuan_inputs,
    pixels=_patched_pixels,
    tiny={"num_attention_heads": 2, "attention_head_dim": 16, "num_refiner_layers": 1, "mlp_ratio": 1.5, "text_embed_dim": 16,
          "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6)},
)  # fmt: skip
COGVIDEOX = Family(
    cls="CogVideoXTransformer3DModel", stacks={"transformer_blocks": "num_layers"}, inputs=_cogvideox_inputs,
    pixels=_patched_pixels,
    tiny={"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 8, "text_embed_dim": 16},
)  # fmt: skip
FLUX = Family(
    cls="FluxTransformer2DModel",
    stacks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}, inputs=_flux_inputs,
    pixels=_flux_pixels,
    tiny={"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "joint_attention_dim": 16,
          "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)},
)  # fmt: skip


# ---------------------------------------------------------------- models


WAN_14B = Model(
    name="Wan2.1-14B", family=WAN, text=512, layers={"blocks": 40}, cut={"blocks": 4},
    config={"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "text_dim": 4096},
)  # fmt: skip
WAN_1B = Model(
    name="Wan2.1-1.3B", family=WAN, text=512, layers={"blocks": 30}, cut={"blocks": 6},
    config={"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096},
)  # fmt: skip
HUNYUAN_13B = Model(
    name="HunyuanVideo", family=HUNYUAN, text=256, layers={"transformer_blocks": 20, "single_transformer_blocks": 40},
    cut={"transformer_blocks": 2, "single_transformer_blocks": 3},
    config={"num_attention_heads": 24, "attention_head_dim": 128, "num_refiner_layers": 2, "mlp_ratio": 4.0,
            "text_embed_dim": 4096, "pooled_projection_dim": 768, "rope_axes_dim": (16, 56, 56), "guidance_embeds": True},
)  # fmt: skip
COGVIDEOX_5B = Model(
    name="CogVideoX1.5-5B", family=COGVIDEOX, text=226, layers={"transformer_blocks": 42}, cut={"transformer_blocks": 6},
    config={"num_attention_heads": 48, "attention_head_dim": 64, "time_embed_dim": 512, "text_embed_dim": 4096,
            "sample_width": 170, "sample_height": 96, "sample_frames": 81, "patch_size": 2, "patch_size_t": 2, "patch_bias": False,
            "max_text_seq_length": 226, "use_rotary_positional_embeddings": True},
)  # fmt: skip
FLUX_DEV = Model(
    name="FLUX.1-dev", family=FLUX, text=512, layers={"transformer_blocks": 19, "single_transformer_blocks": 38},
    cut={"transformer_blocks": 2, "single_transformer_blocks": 3},
    config={"num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56), "guidance_embeds": True},
)  # fmt: skip


def _first(n: int) -> tuple[int, ...]:
    return tuple(range(n))


RADIAL, RECTIFIED, VMOBA = "arXiv:2506.19852", "arXiv:2511.19835", "arXiv:2506.23858"
GENERATION = "a whole generation"

SCENES: tuple[Scene, ...] = (
    Scene(
        model=HUNYUAN_13B, what="768 x 1280, 117 frames", grid=(30, 48, 80), full=("radial",),
        setups=(
            Setup(name="radial", preset="for_model hunyuanvideo", bar=1.9, quoted=Quote(value=1.9, of=GENERATION, by=RADIAL),
                  make=lambda: Radial.for_model("hunyuanvideo", **EVERY)),
            Setup(name="gna", preset="for_model hunyuanvideo: 18 x 24 x 24, stride 16 x 8 x 8",
                  make=lambda: GNA.for_model("hunyuanvideo", **EVERY)),
            Setup(name="sliding_tile", preset="3 x 3 x 3 tiles of 6 x 8 x 8", make=lambda: SlidingTile(**EVERY)),
        ),
    ),
    Scene(
        model=WAN_14B, what="768 x 1280, 69 frames", grid=(18, 48, 80), full=("radial",),
        setups=(
            Setup(name="radial", preset="for_model wan2.1-14b", bar=1.8, quoted=Quote(value=1.8, of=GENERATION, by=RADIAL), dense_layers=_first(1),
                  make=lambda: Radial.for_model("wan2.1-14b", **EVERY)),
            Setup(name="rectified", preset="for_model wan2.1-t2v-14b", dense_layers=_first(2),
                  make=lambda: RectifiedSpaAttn.for_model("wan2.1-t2v-14b", **EVERY)),
        ),
    ),
    Scene(
        model=HUNYUAN_13B, what="720 x 1280, 129 frames", grid=(33, 45, 80), full=("rectified",),
        setups=(
            Setup(name="rectified", preset="for_model hunyuanvideo, drop 0.8", bar=3.0, quoted=Quote(value=3.33, of=GENERATION, by=f"{RECTIFIED}; 2.50 in its code's list of examples"),
                  make=lambda: RectifiedSpaAttn.for_model("hunyuanvideo", **EVERY)),
        ),
    ),
    Scene(
        model=HUNYUAN_13B, what="720 x 1280, 509 frames", grid=(128, 45, 80),
        cut={"transformer_blocks": 1, "single_transformer_blocks": 1},
        setups=(
            Setup(name="radial", preset="for_model hunyuanvideo-4x", bar=3.7, quoted=Quote(value=3.7, of=GENERATION, by=RADIAL), dense_layers=_first(2),
                  make=lambda: Radial.for_model("hunyuanvideo-4x", **EVERY)),
        ),
    ),
    Scene(
        model=WAN_1B, what="576 x 1024, 93 frames", grid=(24, 36, 64), train=True,
        setups=(
            Setup(name="vmoba", preset="for_model 77x480x832", bar=1.48, quoted=Quote(value=1.48, of="a training step", by=VMOBA),
                  make=lambda: VMoBA.for_model("77x480x832", **EVERY)),
        ),
    ),
    Scene(
        model=WAN_1B, what="480 x 832, 81 frames", grid=(21, 30, 52),
        setups=(
            Setup(name="gna", preset="for_model cosmos-90: all frames, 12 x 24, stride 1 x 4 x 8",
                  make=lambda: GNA.for_model("cosmos-90", **EVERY)),
            Setup(name="radial", preset="for_model wan2.1-14b", dense_layers=_first(1),
                  make=lambda: Radial.for_model("wan2.1-14b", **EVERY)),
            Setup(name="rectified", preset="for_model wan2.1-t2v-14b", dense_layers=_first(2),
                  make=lambda: RectifiedSpaAttn.for_model("wan2.1-t2v-14b", **EVERY)),
            Setup(name="sliding_tile", preset="3 x 3 x 3 tiles of 6 x 8 x 8", make=lambda: SlidingTile(**EVERY)),
            Setup(name="vmoba", preset="for_model 77x480x832", make=lambda: VMoBA.for_model("77x480x832", **EVERY)),
        ),
    ),
    Scene(
        model=FLUX_DEV, what="4096 x 4096", grid=(1, 256, 256),
        setups=(
            Setup(name="rectified", preset="for_model flux", dense_layers=tuple(range(37, 57)), quoted=Quote(value=1.6, of=GENERATION, by=RECTIFIED),
                  make=lambda: RectifiedSpaAttn.for_model("flux", **EVERY)),
            Setup(name="gna", preset="80 x 80, stride 16 x 16",
                  make=lambda: GNA(window=(1, 80, 80), stride=(1, 16, 16), **EVERY)),
        ),
    ),
    Scene(
        model=COGVIDEOX_5B, what="768 x 1360, 81 frames", grid=(11, 48, 85),
        setups=(
            Setup(name="rectified", preset="for_model cogvideox1.5-t2v",
                  make=lambda: RectifiedSpaAttn.for_model("cogvideox1.5-t2v", **EVERY)),
        ),
    ),
)  # fmt: skip


def _small(scene: Scene) -> Scene:
    """A scene of a smoke run: the same code at a grid of some hundred tokens."""
    family = scene.model.family
    tiny = {
        **{k: v for k, v in scene.model.config.items() if not isinstance(v, int | float) or isinstance(v, bool)},
        **family.tiny,
    }
    if family is COGVIDEOX:
        tiny |= {
            "patch_size_t": 2,
            "patch_size": 2,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 5,
        }
    model = replace(scene.model, config=tiny, cut=dict.fromkeys(scene.model.layers, 1), text=5)
    grid = (1, 8, 12) if family is FLUX else (4, 6, 8)
    small = {
        "radial": lambda: Radial(block=16, drop_below=0, **EVERY), "gna": lambda: GNA(window=(1, 4, 4), **EVERY),
        "rectified": lambda: RectifiedSpaAttn(block=16, drop=0.9, p_threshold=0.0, neighbours=False, first_frame=False, **EVERY), "sliding_tile": lambda: SlidingTile(tile=(2, 2, 4), **EVERY),
        "vmoba": lambda: VMoBA(chunks=((1, 3, 4),), top_k=2, threshold=None, **EVERY),
    }  # fmt: skip
    setups = tuple(replace(s, make=small[s.name], bar=None) for s in scene.setups)
    return replace(scene, model=model, grid=grid, setups=setups, cut={}, full=())


def scenes(*, smoke: bool) -> list[Scene]:
    """All of them; in a smoke run one of each family and the one that trains, with one method each."""
    if not smoke:
        return list(SCENES)
    chosen = {(s.model.family.cls, s.train): s for s in reversed(SCENES)}
    return [replace(s, setups=s.setups[:1]) for s in map(_small, chosen.values())]


def construct(model: Model, layers: dict[str, int], device: torch.device) -> Any:
    """The transformer of a model with so many layers and random float32 weights."""
    import diffusers

    depth = {argument: layers[stack] for stack, argument in model.family.stacks.items()}
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(0)
        return getattr(diffusers, model.family.cls)(**model.config, **depth)


def build(scene: Scene, layers: dict[str, int], device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model with random weights on the device, and the inputs of a forward.

    Parameters become `dtype` but for those that the class keeps in float32, and buffers stay as they are: what
    `from_pretrained(torch_dtype=...)` leaves.
    """
    model, family = scene.model, scene.model.family
    transformer = construct(model, layers, device)
    wide = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        if not wide & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    inputs = family.inputs(transformer, scene.grid, model.text, random, device)
    transformer.train(scene.train)
    if scene.train:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.requires_grad_(False)
    return transformer, {**inputs, "return_dict": False}


def blocks(transformer: nn.Module, scene: Scene) -> dict[str, list[nn.Module]]:
    """The blocks of each stack."""
    return {stack: list(getattr(transformer, stack)) for stack in scene.model.family.stacks}
