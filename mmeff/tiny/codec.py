"""A Wan video autoencoder with weights set by hand: an exactly linear codec in the stock class.

The tiny video model needs a VAE that `WanPipeline` accepts and that costs nothing to train. `AutoencoderKLWan` is a
stack of causal convolutions, normalisations and SiLUs; this file chooses its weights so that the stack is linear:

* residual branches and the attention output are zero, so those blocks are the identity;
* signals travel as pairs (x, -x), because silu(x) - silu(-x) = x exactly;
* one channel carries a large constant, so the RMS norm divides by (almost) that constant.

Encoding averages 2 x 2 pixels and packs two frames into six channels: frame 0 alone as (f0, f0), then
(f1, f2), (f3, f4), ... Decoding unpacks and interpolates bilinearly; because the constant channel passes through the same
interpolation, the norm divides out the zero padding at the border. Every weight is a power of two or a sum of two, so
float16 storage is exact.
"""

from __future__ import annotations

from typing import Any

import torch

WIDTH = 16  # channels; sqrt(16) = 4 keeps the norm's scale a power of two
LATENT_CHANNELS = 6
SPATIAL, TEMPORAL = 2, 2
# Statistics of the generated clips in [-1, 1]; the pipeline stores them as latents_mean and latents_std.
LATENT_MEAN, LATENT_STD = -0.45, 0.5
_CONSTANT = 2048.0
_A, _NOT_A, _B, _NOT_B, _ONE = slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12), 12


def build() -> Any:
    """Return an `AutoencoderKLWan` that averages 2 x 2 pixels and packs two frames into one latent frame."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=WIDTH,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[LATENT_MEAN] * LATENT_CHANNELS,
        latents_std=[LATENT_STD] * LATENT_CHANNELS,
        scale_factor_temporal=TEMPORAL,
        scale_factor_spatial=SPATIAL,
    ).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        for module in vae.modules():
            if type(module).__name__ == "WanRMS_norm":
                module.gamma.fill_(_CONSTANT / WIDTH**0.5)
        _set_encoder(vae)
        _set_decoder(vae)
    return vae


def _eye(weight: torch.Tensor, out: slice, into: slice, value: float = 1.0) -> None:
    """Put `value` on the centre tap (last tap in time) from channels `into` to channels `out`."""
    tap = [weight.shape[2] - 1, *(size // 2 for size in weight.shape[3:])]
    for o, i in zip(range(out.start, out.stop), range(into.start, into.stop), strict=True):
        weight[(o, i, *tap)] = value


def _set_encoder(vae: Any) -> None:
    encoder = vae.encoder
    rgb = slice(0, 3)
    for out, sign in ((_A, 1.0), (_NOT_A, -1.0), (_B, 1.0), (_NOT_B, -1.0)):
        _eye(encoder.conv_in.weight, out, rgb, sign)
    encoder.conv_in.bias[_ONE] = _CONSTANT
    resample = next(m for m in encoder.modules() if type(m).__name__ == "WanResample")
    pool = resample.resample[
        1
    ].weight  # (WIDTH, WIDTH, 3, 3), stride 2, padded right and below: taps 0 and 1 stay inside
    for channel in range(_ONE + 1):
        pool[channel, channel, :2, :2] = 0.25
    # The strided window over time ends at frame 2t: its taps are frames 2t-2, 2t-1 and 2t.
    mix = resample.time_conv.weight
    for out, into, tap in ((_A, _A, 1), (_NOT_A, _NOT_A, 1), (_B, _A, 2), (_NOT_B, _NOT_A, 2)):
        for o, i in zip(range(out.start, out.stop), range(into.start, into.stop), strict=True):
            mix[o, i, tap, 0, 0] = 1.0
    mix[_ONE, _ONE, 2, 0, 0] = 1.0
    for first, out in ((_A, slice(0, 3)), (_B, slice(3, 6))):
        _eye(encoder.conv_out.weight, out, first, 1.0)
        _eye(encoder.conv_out.weight, out, slice(first.start + 3, first.stop + 3), -1.0)
    encoder.conv_out.bias[LATENT_CHANNELS:] = -30.0  # log-variance: the posterior is a point
    _eye(vae.quant_conv.weight, slice(0, 12), slice(0, 12))
    vae.quant_conv.bias.zero_()


def _set_decoder(vae: Any) -> None:
    decoder = vae.decoder
    _eye(vae.post_quant_conv.weight, slice(0, 6), slice(0, 6))
    for pair, latent in ((_A, slice(0, 3)), (_B, slice(3, 6))):
        _eye(decoder.conv_in.weight, pair, latent, 1.0)
        _eye(decoder.conv_in.weight, slice(pair.start + 3, pair.stop + 3), latent, -1.0)
    decoder.conv_in.bias[_ONE] = _CONSTANT
    resample = next(m for m in decoder.modules() if type(m).__name__ == "WanResample")
    split = resample.time_conv.weight  # (2 * WIDTH, WIDTH, 3, 1, 1): first half is frame 2t-1, second half frame 2t
    for half, source in ((0, _A), (WIDTH, _B)):
        both = slice(source.start, source.start + 6)
        _eye(split, slice(half, half + 6), both)
        split[half + _ONE, _ONE, 2, 0, 0] = 1.0
    # Nearest upsampling followed by (1 2 1)/4 on both axes is bilinear interpolation.
    blur = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(blur, blur)
    weight = resample.resample[1].weight  # (WIDTH // 2, WIDTH, 3, 3)
    for channel in range(6):
        weight[channel, channel] = kernel
    weight[6, _ONE] = kernel
    widen = decoder.up_blocks[1].resnets[0].conv_shortcut.weight  # (WIDTH, WIDTH // 2, 1, 1, 1)
    _eye(widen, slice(0, 7), slice(0, 7))
    _eye(decoder.conv_out.weight, slice(0, 3), slice(0, 3), 1.0)
    _eye(decoder.conv_out.weight, slice(0, 3), slice(3, 6), -1.0)


def pack(video: torch.Tensor, *, pooled: bool = False) -> torch.Tensor:
    """The encoder and the pipeline's normalisation in four lines, for training.

    Args:
        video: (B, F, h, w, 3) in [0, 1], F odd.
        pooled: the video holds 2 x 2 averages already.
    Returns:
        normalised latents (B, 6, (F + 1) / 2, h / 2, w / 2), equal to the VAE's up to rounding.
    """
    batch, frames, height, width, _ = video.shape
    if frames % 2 == 0:
        raise ValueError(f"pack needs an odd number of frames (1 + 2k), got {frames}; drop or add one")
    x = video * 2 - 1
    if not pooled:
        height, width = height // 2, width // 2
        x = x.reshape(batch, frames, height, 2, width, 2, 3).mean(dim=(3, 5))
    x = torch.cat([x[:, :1], x], dim=1)  # frame 0 fills both slots of the first latent frame
    x = x.reshape(batch, (frames + 1) // 2, 2, height, width, 3).permute(0, 2, 5, 1, 3, 4)
    return (x.flatten(1, 2) - LATENT_MEAN) / LATENT_STD
