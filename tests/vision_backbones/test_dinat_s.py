"""DiNAT_s: published sizes, official weights, Swin's downsampling, and any image size."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmeff.vision_backbones as backbones
from mmeff.vision_backbones._nat_keys import from_official, to_official

SMALL = {"depths": (1, 2, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "num_classes": 10}

# millions of parameters, 10^9 multiply-adds, pixels: as published
PUBLISHED = {
    "dinat_s_tiny": (28.3, 4.5, 224),
    "dinat_s_small": (49.6, 8.7, 224),
    "dinat_s_base": (88, 15.4, 224),
    "dinat_s_large": (197, 34.5, 224),
    "dinat_s_large_384": (197, 101.5, 384),
}


def image(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def shaken(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


def load(path, **kwargs):
    overlay = {"file": str(path), "num_classes": 10}
    return timm.create_model("dinat_s_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **kwargs).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, gmacs, pixels = PUBLISHED[name]
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)

    def attended(q, k, v, rel_bias, extra_k, extra_v, window, *rest, out_shape=None):
        return 2 * 2 * torch.Size(q).numel() * window[0] * window[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mmeff.neighborhood_attention: attended})
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, pixels, pixels, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_every_variant_is_tested():
    assert {name for name in backbones.registered() if name.startswith("dinat_s_")} == PUBLISHED.keys()


def test_official_weights(tmp_path):
    both = ("weight", "bias")
    keys = {f"{m}.{p}" for m in ("patch_embed.proj", "patch_embed.norm", "norm", "head") for p in both}
    for i, depth in enumerate(SMALL["depths"]):
        for j in range(depth):
            modules = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            keys |= {f"layers.{i}.blocks.{j}.{m}.{p}" for m in modules for p in both}
            keys.add(f"layers.{i}.blocks.{j}.attn.rpb")
        if i < 3:
            keys |= {f"layers.{i}.downsample.{p}" for p in ("norm.weight", "norm.bias", "reduction.weight")}
    model = shaken(timm.create_model("dinat_s_tiny", **SMALL))
    state = to_official(model.state_dict(), "layers")
    assert state.keys() == keys
    assert from_official(state, "layers").keys() == model.state_dict().keys()
    assert state["layers.0.downsample.norm.weight"].shape == (128,)
    torch.save({"model": state}, tmp_path / "official.pth")
    x = image(1, 3, 97, 131)
    assert torch.equal(load(tmp_path / "official.pth")(x), model(x))


def test_weights_of_dinat_are_of_another_family(tmp_path):
    state = to_official(timm.create_model("dinat_mini", depths=(1, 1, 1, 1)).state_dict(), "levels")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"weights of a DiNAT_s .*its keys look like those of NAT or DiNAT\. Missing"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_downsampling_is_swins(size):
    """timm's own merging with the same weights, on even and ragged maps."""
    from timm.models.swin_transformer import PatchMerging

    ours = shaken(timm.create_model("dinat_s_tiny", **SMALL)).stages[1].downsample
    theirs = PatchMerging(32)
    theirs.load_state_dict(ours.state_dict())
    x = image(2, *size, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_ragged_image_is_padded_with_zeros_below_and_to_the_right():
    model = shaken(timm.create_model("dinat_s_tiny", **SMALL))
    x = image(1, 3, 97, 131)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 3))
    assert torch.equal(model(x), model(padded))


def test_detection_dilations():
    model = timm.create_model("dinat_s_tiny", dilations="detection", device="meta")
    found = [[block.attn.dilation for block in stage.blocks] for stage in model.stages]
    assert found == [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]
