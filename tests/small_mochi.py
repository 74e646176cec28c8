"""A stock MochiPipeline of three thin layers with random weights, built offline; it makes latents only."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from mmeff.tiny import video_model

HOST = "mochi"
LAYERS = 3
GRAPHS = 2  # the last block drops its text
HEADS, HEAD_DIM = 2, 16
TEXT_TOKENS, TEXT_WIDTH, LATENT_CHANNELS = 11, 24, 4
PIXELS = 16  # to a token, along height and width; 6 frames to a latent frame
PROMPTS = ["a red circle moving left", "a blue square"]  # 6 and 4 tokens of 11
GUIDED, FORWARDS = {"negative_prompt": "a", "guidance_scale": 3.0}, 1  # both branches are one batch
TEXT_FIRST = False


@cache
def shared_parts():
    return {"tokenizer": video_model.tokenizer(), "text_encoder": video_model.text_encoder(), "vae": None}


def make_transformer(seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = MochiTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=LAYERS,
            pooled_projection_dim=TEXT_WIDTH,
            in_channels=LATENT_CHANNELS,
            text_embed_dim=video_model.TEXT_DIM,
            time_embed_dim=8,
        ).eval()
        with torch.no_grad():
            transformer.pos_frequencies.normal_(0, 0.2)  # zero in a new model, which rotates nothing
            for attention in attentions(transformer):  # attention that looks somewhere, so that a mask matters
                attention.norm_q.weight.fill_(3.0)
                attention.norm_added_q.weight.fill_(3.0)
    return transformer


def attentions(transformer):
    return [block.attn1 for block in transformer.transformer_blocks]


def make_pipe(seed: int = 0, **settings):
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)  # as the released model
    pipe = MochiPipeline(**shared_parts(), transformer=make_transformer(seed), scheduler=scheduler, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_sizes(grid):
    F, H, W = grid
    return {"num_frames": 6 * (F - 1) + 1, "height": PIXELS * H, "width": PIXELS * W}


def generate(pipe, prompt=PROMPTS[0], *, grid=(3, 5, 4), steps=2, **call):
    """Latents as a tensor; without guidance unless it is asked for."""
    out = pipe(
        prompt=prompt,
        num_inference_steps=steps,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **{"guidance_scale": 1.0, **plan_sizes(grid), **call},
    ).frames
    return torch.as_tensor(np.asarray(out))


def forward(transformer, grid, rows=(0, 1), mask=None):
    """One forward of two samples, or of some of them, whose prompts have 11 and 3 tokens of 11."""
    F, H, W = grid
    draw, rows = torch.Generator().manual_seed(3), list(rows)
    latents = torch.randn(2, LATENT_CHANNELS, F, 2 * H, 2 * W, generator=draw)[rows]
    text = torch.randn(2, TEXT_TOKENS, video_model.TEXT_DIM, generator=draw)[rows]
    if mask is None:
        mask = torch.arange(TEXT_TOKENS) < torch.tensor([[TEXT_TOKENS], [3]])
    return transformer(latents, text, torch.full((len(rows),), 500.0), mask[rows], return_dict=False)[0]


def call_attention(attention):
    """A call of one layer by itself: video and text."""
    draw = torch.Generator().manual_seed(3)
    video = torch.randn(1, 100, HEADS * HEAD_DIM, generator=draw)
    text = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=draw)
    return attention(video, encoder_hidden_states=text, attention_mask=torch.ones(1, TEXT_TOKENS))
