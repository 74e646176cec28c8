"""Stock LTX-Video pipelines of three thin layers with random weights, built offline, for the tests of what acts on them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from mmeff.tiny import video_model

LAYERS = 3
CHANNELS = 8
SPATIAL, TEMPORAL = 32, 4  # the pipelines take multiples of 32 pixels, so other factors would give even grids only


@cache
def shared_parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLLTXVideo(
            latent_channels=CHANNELS,
            block_out_channels=(8, 8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 3,
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False),
            decoder_spatio_temporal_scaling=(True, True, False),
            decoder_inject_noise=(False,) * 4,
            upsample_residual=(False,) * 3,
            upsample_factor=(1,) * 3,
            patch_size=8,
        ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return {"tokenizer": video_model.tokenizer(), "text_encoder": video_model.text_encoder(), "vae": vae}


def make_transformer(seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LTXVideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=video_model.TEXT_DIM,
            num_layers=LAYERS,
        ).eval()


def make_pipe(seed: int = 0, *, kind=LTXPipeline, **parts):
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = kind(**{**shared_parts(), "transformer": make_transformer(seed), "scheduler": scheduler, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt="a red circle moving left", *, steps=2, grid=(5, 3, 5), output="latent", **call):
    """Latents (or frames) as a tensor."""
    F, H, W = grid
    out = pipe(
        prompt=prompt,
        negative_prompt=[""] * len(prompt) if isinstance(prompt, list) else "",
        height=H * SPATIAL,
        width=W * SPATIAL,
        num_frames=(F - 1) * TEMPORAL + 1,
        num_inference_steps=steps,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(7),
        output_type=output,
        **call,
    ).frames
    return torch.as_tensor(np.asarray(out))
