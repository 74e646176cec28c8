"""The tiny image model: a stock `FluxPipeline` whose transformer is the only trained part.

What surrounds the transformer has weights set by hand, so that the stock classes accept it and it costs nothing to train:

* the T5 encoder is silent: it maps every word to one fixed random vector, and padding to zero;
* the CLIP encoder pools: its end mark attends evenly to the words before it, so its pooled output is a bag of words;
* the autoencoder is the identity on pixels: residual branches are zero, signals travel as pairs (x, -x), because
  silu(x) - silu(-x) = x, and a constant pair makes the group norm divide by (almost) that constant.

So 48 x 48 pixels are 48 x 48 latents and, in the pipeline's patches of 2 x 2, 24 x 24 tokens. Flux places tokens by rotary
embedding alone, as Wan does, but its text sits at position 0 of the same attention: every token of the picture sees the
words at a distance that is its own place. No position table is needed, and `FluxPipeline.from_pretrained` loads all there is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from mmeff.tiny import stills

GRID = (24, 24)  # rows and columns of tokens
CHANNELS = 3  # of a latent
TEXT_DIM = 32  # of a text token, and of the pooled text
TEXT_TOKENS = 8  # seven words and the end mark
POOLED_TOKENS = 16  # the CLIP encoder's whole length
SHIFT = 3.0
# Statistics of the generated pictures in [-1, 1]; the autoencoder stores them as shift_factor and scaling_factor.
LATENT_MEAN, LATENT_STD = -0.5, 0.5
_CONSTANT = 256.0


def tokenizer(length: int) -> Any:
    """A word-level tokenizer over the grammar of `stills.prompt`; unknown words become <unk>. `length`: tokens at most."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *stills.words()]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def _vectors(count: int, seed: int) -> torch.Tensor:
    """Random vectors (count, TEXT_DIM), zero for <pad>, exact in float16."""
    vectors = torch.randn(count, TEXT_DIM, generator=torch.Generator().manual_seed(seed)).half().float()
    vectors[0] = 0
    return vectors


@torch.no_grad()
def word_encoder() -> Any:
    """A stock T5 encoder whose layers are silent: every word maps to one fixed random vector of RMS 2, <pad> to zero."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tokenizer(512)), d_model=TEXT_DIM, d_kv=16, d_ff=16, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    encoder.shared.weight.copy_(_vectors(config.vocab_size, 7))
    for block in encoder.encoder.block:
        block.layer[0].SelfAttention.o.weight.zero_()
        block.layer[1].DenseReluDense.wo.weight.zero_()
    encoder.encoder.final_layer_norm.weight.fill_(2.0)
    return encoder


@torch.no_grad()
def pooling_encoder() -> Any:
    """A stock CLIP text encoder of one layer: even attention to all words so far, whose sum of vectors is the pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer(POOLED_TOKENS)), hidden_size=TEXT_DIM, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=POOLED_TOKENS, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    encoder = CLIPTextModel(config).eval()
    for parameter in encoder.parameters():
        parameter.zero_()
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
    encoder.embeddings.token_embedding.weight.copy_(_vectors(config.vocab_size, 8))
    attention = encoder.encoder.layers[0].self_attn
    attention.v_proj.weight.copy_(torch.eye(TEXT_DIM))
    attention.out_proj.weight.copy_(torch.eye(TEXT_DIM) * 8)  # the words outweigh the end mark itself
    return encoder


@torch.no_grad()
def autoencoder() -> Any:
    """A stock `AutoencoderKL` that is the identity on pixels, up to rounding of about 1e-4."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=1, sample_size=stills.SIZE,
        scaling_factor=1 / LATENT_STD, shift_factor=LATENT_MEAN, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False, force_upcast=False,
    ).eval()  # fmt: skip
    for parameter in vae.parameters():
        parameter.zero_()
    for half in (vae.encoder, vae.decoder):
        # Channels 0 to 2 are x, 3 to 5 are -x, and the last two the constant and its negative: all have mean 0, and the
        # standard deviation of the eight is half the constant.
        for channel in range(3):
            half.conv_in.weight[channel, channel, 1, 1] = 1.0
            half.conv_in.weight[channel + 3, channel, 1, 1] = -1.0
            half.conv_out.weight[channel, channel, 1, 1] = 1.0
            half.conv_out.weight[channel, channel + 3, 1, 1] = -1.0
        half.conv_in.bias[6], half.conv_in.bias[7] = _CONSTANT, -_CONSTANT
        half.conv_norm_out.weight.fill_(_CONSTANT / 2)
    vae.encoder.conv_out.bias[CHANNELS:] = -30.0  # log-variance: the posterior is a point
    return vae


def transformer() -> Any:
    """The untrained Flux transformer: 2 dual and 3 single layers, 4 heads of 32, 2.0 M parameters."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS, num_layers=2, num_single_layers=3, num_attention_heads=4, attention_head_dim=32,
        joint_attention_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM, guidance_embeds=False, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip


def scheduler() -> Any:
    """Euler steps on the flow-matching path, with the shift that training used."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def pipeline(net: Any) -> Any:
    """The stock pipeline around a transformer."""
    from diffusers import FluxPipeline

    return FluxPipeline(
        scheduler=scheduler(), vae=autoencoder(), text_encoder=pooling_encoder(), tokenizer=tokenizer(POOLED_TOKENS),
        text_encoder_2=word_encoder(), tokenizer_2=tokenizer(512), transformer=net,
    )  # fmt: skip


@cache
@torch.no_grad()
def prompt_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Text features (P, TEXT_TOKENS + 1, TEXT_DIM) and pooled ones (P, TEXT_DIM) of every prompt, the empty prompt last.

    The last row of the text is zero, one token of padding that stands for all of it.
    """
    prompts = [*stills.all_prompts(), ""]
    words = tokenizer(512)(prompts, padding="max_length", max_length=TEXT_TOKENS + 1, return_tensors="pt").input_ids
    bags = tokenizer(POOLED_TOKENS)(prompts, padding="max_length", return_tensors="pt").input_ids
    return word_encoder()(words)[0], pooling_encoder()(bags).pooler_output


def pack(images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, h, w, 3) in [0, 1] to the pipeline's tokens (B, h / 2 * w / 2, 12), for training."""
    batch, height, width, _ = images.shape
    latents = ((images * 2 - 1) - LATENT_MEAN) / LATENT_STD
    tokens = latents.reshape(batch, height // 2, 2, width // 2, 2, 3).permute(0, 1, 3, 5, 2, 4)
    return tokens.reshape(batch, -1, 12)


def unpack(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack`, clamped to [0, 1]."""
    H, W = grid
    latents = tokens.reshape(-1, H, W, 3, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(-1, 2 * H, 2 * W, 3)
    return ((latents * LATENT_STD + LATENT_MEAN + 1) / 2).clamp(0, 1)


def positions(*, pooled: bool = False) -> torch.Tensor:
    """`img_ids` (N, 3) of the tokens. Those of a pooled picture, half as many along both axes, lie amid the four they cover."""
    stride = 2 if pooled else 1
    rows, columns = (torch.arange(n // stride) * stride + (stride - 1) / 2 for n in GRID)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3)
