"""The hand-set Wan autoencoder is the linear codec that it claims to be, through the stock class."""

from __future__ import annotations

import pytest
import torch

from mmeff.tiny import clips, codec


@pytest.fixture(scope="module")
def vae():
    return codec.build()


def test_encoder_equals_pack(vae):
    video = torch.from_numpy(clips.sample(1, 0, 2)[0])
    with torch.no_grad():
        latents = vae.encode(video.permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.sample()
    assert latents.shape == (2, 6, 9, 24, 24)
    normalised = (latents - codec.LATENT_MEAN) / codec.LATENT_STD
    assert (normalised - codec.pack(video)).abs().max() < 2e-5  # float32 sums of order 1 through the norm


def test_decoder_is_bilinear_interpolation_of_averages(vae):
    """Border included: the reference is PyTorch's own interpolation, which replicates the border."""
    x = torch.randn(1, 3, 5, 16, 20).clamp(-1, 1)
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    small = torch.nn.functional.avg_pool2d(x[0].transpose(0, 1), 2)
    want = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    assert (y[0].transpose(0, 1) - want).abs().max() < 1e-5


def test_survives_float16_storage(vae):
    """Every weight is exact in float16, which is how it is committed."""
    assert all(torch.equal(p, p.half().float()) for p in vae.parameters())


def test_pack_refuses_an_even_number_of_frames():
    with pytest.raises(ValueError, match="odd number of frames"):
        codec.pack(torch.zeros(1, 4, 8, 8, 3))
