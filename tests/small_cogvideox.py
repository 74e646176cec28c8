"""Stock CogVideoX pipelines of three thin layers with random weights, built offline, in the manners of 1.0 and 1.5."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from mmeff.tiny import video_model

HOST = "cogvideox"
LAYERS = 3
GRAPHS = 2  # the first block gets other strides: as many as without a handle
HEADS, HEAD_DIM = 2, 16
TEXT_TOKENS, LATENT_CHANNELS = 11, 4
PIXELS = 16  # to a token, along height and width; 4 frames to a latent frame
PROMPTS = ["a red circle moving left", "a blue square"]
GUIDED, FORWARDS = {"negative_prompt": "a", "guidance_scale": 3.0}, 1  # both branches are one batch
TEXT_FIRST = True


@cache
def shared_parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLCogVideoX(
            latent_channels=LATENT_CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
    return {"tokenizer": video_model.tokenizer(), "text_encoder": video_model.text_encoder(), "vae": vae.eval()}


def make_transformer(seed: int = 0, **config):
    """In the manner of CogVideoX 5B: rotary embedding and no frames joined in a token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = CogVideoXTransformer3DModel(
            **{
                "num_attention_heads": HEADS,
                "attention_head_dim": HEAD_DIM,
                "in_channels": LATENT_CHANNELS,
                "out_channels": LATENT_CHANNELS,
                "time_embed_dim": 8,
                "text_embed_dim": video_model.TEXT_DIM,
                "num_layers": LAYERS,
                "sample_width": 10,
                "sample_height": 10,
                "sample_frames": 13,
                "max_text_seq_length": TEXT_TOKENS,
                "use_rotary_positional_embeddings": True,
                **config,
            }
        ).eval()
        with torch.no_grad():  # attention that looks somewhere, so that a mask matters
            for attention in attentions(transformer):
                attention.norm_q.weight.fill_(3.0)
    return transformer


def attentions(transformer):
    return [block.attn1 for block in transformer.transformer_blocks]


def make_pipe(seed: int = 0, kind=CogVideoXPipeline, scheduler=CogVideoXDDIMScheduler, **config):
    pipe = kind(**shared_parts(), transformer=make_transformer(seed, **config), scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_sizes(grid):
    F, H, W = grid
    return {"num_frames": 4 * (F - 1) + 1, "height": PIXELS * H, "width": PIXELS * W}


def generate(pipe, prompt=PROMPTS[0], *, grid=(3, 5, 4), steps=2, output="latent", **call):
    """Latents (or frames) as a tensor; without guidance unless it is asked for."""
    out = pipe(
        prompt=prompt,
        num_inference_steps=steps,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(7),
        output_type=output,
        **{"guidance_scale": 1.0, **({} if "video" in call else plan_sizes(grid)), **call},
    ).frames
    return torch.as_tensor(np.asarray(out))


def rotary(grid):
    F, H, W = grid
    return get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), (H, W)), (H, W), F)


def forward(transformer, grid, rows=(0, 1)):
    """One forward of two samples, or of some of them."""
    F, H, W = grid
    draw, rows = torch.Generator().manual_seed(3), list(rows)
    latents = torch.randn(2, F, LATENT_CHANNELS, 2 * H, 2 * W, generator=draw)[rows]
    text = torch.randn(2, TEXT_TOKENS, video_model.TEXT_DIM, generator=draw)[rows]
    return transformer(
        latents, text, torch.full((len(rows),), 500.0), image_rotary_emb=rotary(grid), return_dict=False
    )[0]


def call_attention(attention):
    """A call of one layer by itself: video and text."""
    draw = torch.Generator().manual_seed(3)
    video, text = (torch.randn(1, n, HEADS * HEAD_DIM, generator=draw) for n in (100, TEXT_TOKENS))
    return attention(video, encoder_hidden_states=text, image_rotary_emb=rotary((4, 5, 5)))
