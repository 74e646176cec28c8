"""Stock Flux pipelines of two dual and two single thin layers with random weights, built offline."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from mmeff.tiny import video_model

DUAL, SINGLE = 2, 2
LAYERS = DUAL + SINGLE
LATENT_CHANNELS = 4
TEXT_TOKENS = 11
PIXELS = 4  # to a token, along both axes: 2 to a latent, and 2 latents


@cache
def shared_parts():
    words = video_model.tokenizer()
    words.model_max_length = 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=None,
                eos_token_id=1,
            )
        ).eval()
        vae = AutoencoderKL(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval()
    return {
        "tokenizer": words,
        "text_encoder": clip,
        "tokenizer_2": video_model.tokenizer(),
        "text_encoder_2": video_model.text_encoder(),
        "vae": vae,
    }


def make_transformer(seed: int = 0, *, in_channels=4 * LATENT_CHANNELS):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FluxTransformer2DModel(
            in_channels=in_channels,
            out_channels=4 * LATENT_CHANNELS,
            num_layers=DUAL,
            num_single_layers=SINGLE,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=video_model.TEXT_DIM,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        ).eval()


def make_pipe(seed: int = 0, *, kind=FluxPipeline, **config):
    transformer = make_transformer(seed, **config)
    pipe = kind(**shared_parts(), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sizes(grid):
    return {"height": grid[1] * PIXELS, "width": grid[2] * PIXELS}


def generate(pipe, prompt="a red circle moving left", *, steps=2, grid=(1, 7, 11), output="latent", **call):
    """Latents (or pixels) as a tensor. Guidance runs the transformer twice per step."""
    guidance = {"negative_prompt": [""] * len(prompt) if isinstance(prompt, list) else "", "true_cfg_scale": 2.0}
    if isinstance(pipe, FluxFillPipeline):
        guidance = {}
    call = {"max_sequence_length": TEXT_TOKENS, **sizes(grid), **guidance, **call}
    out = pipe(
        prompt=prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        output_type=output,
        **call,
    ).images
    return torch.as_tensor(np.asarray(out))
