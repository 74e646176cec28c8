"""A stock WanPipeline of three thin layers with random weights, built offline, for the tests of what acts on it."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from mmeff.diffusion_attn import Radial
from mmeff.tiny import codec, video_model

LAYERS = 3
SPARSE = Radial(decay=0.2, block=6, drop_below=16, dense_steps=0, dense_layers=0)
FULL = Radial(decay=1e6, block=6, drop_below=0, dense_steps=0, dense_layers=0)


@cache
def shared_parts():
    return {"tokenizer": video_model.tokenizer(), "text_encoder": video_model.text_encoder(), "vae": codec.build()}


def make_transformer(seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, 4, 4),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=codec.LATENT_CHANNELS,
            out_channels=codec.LATENT_CHANNELS,
            text_dim=video_model.TEXT_DIM,
            freq_dim=32,
            ffn_dim=48,
            num_layers=LAYERS,
        ).eval()


def make_pipe(seed: int = 0, **parts):
    pipe = WanPipeline(
        **{**shared_parts(), "transformer": make_transformer(seed), "scheduler": video_model.scheduler(), **parts}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe, prompt="a red circle moving left", *, steps=2, height=48, width=48, frames=9, output="latent", **call
):
    """Latents (or frames) as a tensor; 9 frames of 48 x 48 pixels are a grid of 5 x 6 x 6."""
    out = pipe(
        prompt,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(7),
        output_type=output,
        **call,
    ).frames
    return torch.as_tensor(np.asarray(out))
