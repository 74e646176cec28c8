"""Stock HunyuanVideo pipelines of two dual and two single layers with random weights, built offline."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from mmeff.tiny import video_model

HOST = "hunyuan_video"
LAYERS = 4
GRAPHS = 3  # dual blocks, the first single block and, with other strides, the rest: as many as without a handle
HEADS, HEAD_DIM = 2, 16
TEXT_DIM, TEXT_TOKENS, LATENT_CHANNELS = 32, 11, 4
PIXELS = 16  # to a token, along height and width; 4 frames to a latent frame
PROMPTS = ["a red circle moving left", "a blue square"]  # 6 and 4 tokens of 11
GUIDED, FORWARDS = {"negative_prompt": "a", "true_cfg_scale": 3.0}, 2
TEXT_FIRST = False


@cache
def shared_parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = video_model.tokenizer()
        llama = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        )  # fmt: skip
        clip = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, projection_dim=16, eos_token_id=1, pad_token_id=0, bos_token_id=2,
        )  # fmt: skip
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=LATENT_CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
            mid_block_add_attention=False,
        )  # fmt: skip
        return {
            "tokenizer": tokenizer,
            "text_encoder": LlamaModel(llama).eval(),
            "tokenizer_2": tokenizer,
            "text_encoder_2": CLIPTextModel(clip).eval(),
            "vae": vae.eval(),
        }


def make_transformer(seed: int = 0, **config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = HunyuanVideoTransformer3DModel(
            **{
                "in_channels": LATENT_CHANNELS,
                "out_channels": LATENT_CHANNELS,
                "num_attention_heads": HEADS,
                "attention_head_dim": HEAD_DIM,
                "num_layers": 2,
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "mlp_ratio": 1.5,
                "text_embed_dim": TEXT_DIM,
                "pooled_projection_dim": 16,
                "rope_axes_dim": (4, 6, 6),
                **config,
            }
        ).eval()
        with torch.no_grad():  # attention that looks somewhere, so that a mask matters
            for attention in attentions(transformer):
                attention.norm_q.weight.fill_(3.0)
                if attention.norm_added_q is not None:
                    attention.norm_added_q.weight.fill_(3.0)
        return transformer


def attentions(transformer):
    return [block.attn for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]]


def _scheduler():
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def make_pipe(seed: int = 0, **parts):
    pipe = HunyuanVideoPipeline(
        **{**shared_parts(), "transformer": make_transformer(seed), "scheduler": _scheduler(), **parts}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_image_pipe(image_condition_type: str, seed: int = 0):
    """Prompts are passed to it as embeddings: its own text encoder is a whole vision-language model."""
    channels = 2 * LATENT_CHANNELS + 1 if image_condition_type == "latent_concat" else LATENT_CHANNELS
    transformer = make_transformer(seed, image_condition_type=image_condition_type, in_channels=channels)
    parts = {**shared_parts(), "text_encoder": None, "image_processor": None}
    pipe = HunyuanVideoImageToVideoPipeline(**parts, transformer=transformer, scheduler=_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt=PROMPTS[0], *, grid=(3, 5, 4), steps=2, output="latent", text_tokens=TEXT_TOKENS, **call):
    """Latents (or frames) as a tensor."""
    if prompt is not None:
        call["prompt_template"] = {"template": "{}", "crop_start": 0}
    out = pipe(
        prompt=prompt,
        num_inference_steps=steps,
        max_sequence_length=text_tokens,
        generator=torch.Generator().manual_seed(7),
        output_type=output,
        **{**plan_sizes(grid), **call},
    ).frames
    return torch.as_tensor(np.asarray(out))


def plan_sizes(grid):
    F, H, W = grid
    return {"num_frames": 4 * (F - 1) + 1, "height": PIXELS * H, "width": PIXELS * W}


def forward(transformer, grid, rows=(0, 1)):
    """One forward of two samples, or of some of them, whose prompts have 11 and 3 tokens of 11."""
    F, H, W = grid
    draw = torch.Generator().manual_seed(3)
    rows = list(rows)
    latents = torch.randn(2, transformer.config.in_channels, F, 2 * H, 2 * W, generator=draw)[rows]
    text = torch.randn(2, TEXT_TOKENS, TEXT_DIM, generator=draw)[rows]
    pooled = torch.randn(2, 16, generator=draw)[rows]
    mask = (torch.arange(TEXT_TOKENS) < torch.tensor([[TEXT_TOKENS], [3]])).float()[rows]
    return transformer(
        latents,
        torch.full((len(rows),), 500.0),
        text,
        mask,
        pooled,
        torch.full((len(rows),), 6000.0),
        return_dict=False,
    )[0]


def call_attention(attention):
    """A call of one layer by itself: video and text."""
    draw = torch.Generator().manual_seed(3)
    video, text = (torch.randn(1, n, HEADS * HEAD_DIM, generator=draw) for n in (100, TEXT_TOKENS))
    mask = torch.ones(1, 1, 1, 100 + TEXT_TOKENS, dtype=torch.bool)
    return attention(video, encoder_hidden_states=text, attention_mask=mask)
