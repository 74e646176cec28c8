"""Stock Cosmos pipelines of three thin layers with random weights, built offline, for the tests of what acts on them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2TextToImagePipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from mmeff.tiny import codec, video_model

LAYERS = 3
PIXELS = 16  # to a token, along both axes


class Permissive:
    """In the place of the guardrail, which is a package and weights of its own."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


@cache
def text_parts():
    return {"tokenizer": video_model.tokenizer(), "text_encoder": video_model.text_encoder()}


@cache
def vae_of_cosmos_1():
    """8 x 8 pixels and 8 frames to a latent, like the published one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8),
            decode_block_out_channels=(8, 8, 8),
            attention_resolutions=(),
            resolution=32,
            num_layers=1,
            latents_mean=[0.0] * 4 * 32,
            latents_std=[1.0] * 4 * 32,
        ).eval()


vae_of_cosmos_2 = cache(codec.build)  # a Wan VAE: 2 x 2 pixels and 2 frames to a latent, 6 channels


def make_transformer(seed: int = 0, *, channels=4, patch=2, mask=0, **config):
    """`mask` is the channel by which conditioned frames are marked."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CosmosTransformer3DModel(
            in_channels=channels + mask,
            out_channels=channels,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=LAYERS,
            mlp_ratio=2,
            text_embed_dim=video_model.TEXT_DIM,
            adaln_lora_dim=4,
            max_size=(32, 16 * patch, 16 * patch),
            patch_size=(1, patch, patch),
            **config,
        ).eval()
        for parameter in model.parameters():  # learnable positions begin as zeros
            if parameter.ndim == 2 and not parameter.any():
                torch.nn.init.normal_(parameter)
        return model


def make_pipe(seed: int = 0, *, kind=CosmosTextToWorldPipeline, second=False, mask=0, **config):
    """A pipeline of Cosmos 1, or of Cosmos 2 and later, which have another VAE and schedule."""
    size = {"channels": 6, "patch": 8} if second else {}
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True) if second else EDMEulerScheduler()
    pipe = kind(
        **text_parts(),
        transformer=make_transformer(seed, mask=mask, **size, **config),
        vae=vae_of_cosmos_2() if second else vae_of_cosmos_1(),
        scheduler=scheduler,
        safety_checker=Permissive(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sizes(pipe, grid):
    F, H, W = grid
    return {
        "num_frames": (F - 1) * pipe.vae_scale_factor_temporal + 1, "height": H * PIXELS, "width": W * PIXELS
    }  # fmt: skip


def generate(pipe, prompt="a red circle moving left", *, steps=2, grid=(5, 3, 5), output="latent", **call):
    """Latents (or frames) as a tensor."""
    size = sizes(pipe, grid)
    if isinstance(pipe, Cosmos2TextToImagePipeline):
        del size["num_frames"]
    if prompt is not None:
        call = {"prompt": prompt, "negative_prompt": [""] * len(prompt) if isinstance(prompt, list) else "", **call}
    out = pipe(
        num_inference_steps=steps,
        max_sequence_length=16,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7),
        output_type=output,
        return_dict=False,
        **size,
        **call,
    )[0]
    return torch.as_tensor(np.asarray(out))
