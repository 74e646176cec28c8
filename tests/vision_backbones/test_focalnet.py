"""FocalNets: our variants against the definition and timm's modules, and what their files hold."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.focalnet import FocalNet

import mmeff.vision_backbones as backbones
from mmeff.vision_backbones.focalnet import FocalNetIso

TINY = {"depths": (2,), "embed_dim": 24, "num_classes": 5}
SMALL_FL4 = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_classes": 5}


def build(name="focalnet_tiny_iso", *, seed=0, dtype=torch.float64, **kwargs):
    """A model in eval mode whose weights are all random, also those that start as constants."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def image(*shape, dtype=torch.float64, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def official(state, post_norm):
    """The state dict of a model in the layout of the official files."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("stem.", "patch_embed.").replace("head.fc.", "head.")
        key = key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2").replace("_post.", ".")
        if ".downsample." in key:
            i = int(key.split(".")[1])
            key = key.replace(f"layers.{i}.", f"layers.{i - 1}.")
        if value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value.flatten(1)  # linear layers there
        renamed[key] = value
    assert any("gamma_" in key for key in renamed) == post_norm
    return renamed


def save(tmp_path, state):
    path = tmp_path / "official.pth"
    torch.save({"model": state}, path)
    # timm drops the classifier where the numbers of classes differ
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": TINY["num_classes"]}}


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize(
    ("name", "millions"),
    [("focalnet_tiny_iso", 5.9), ("focalnet_small_iso", 22.4), ("focalnet_base_iso", 87.2)],
)
def test_parameters_of_the_isotropic_models(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert [len(stage.blocks) for stage in model.layers] == [12]
    assert model.layers[0].blocks[0].modulation.kernel_sizes == [3, 5, 7]
    assert model.post_norm == (name == "focalnet_base_iso")


def test_the_large_model_differs_from_timms_in_the_division_alone():
    with torch.device("meta"):
        ours, stock = timm.create_model("focalnet_large_fl4_normalized"), timm.create_model("focalnet_large_fl4")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    in_1k = sum(p.numel() for p in ours.parameters()) - (21842 - 1000) * (1536 + 1)
    assert in_1k / 1e6 == pytest.approx(207, rel=0.01)  # as published for 1000 classes
    assert ours.num_classes == 21842 and ours.pretrained_cfg["input_size"] == (3, 384, 384)
    flags = [m.normalize_modulator for m in ours.modules() if hasattr(m, "normalize_modulator")]
    assert all(flags) and flags
    assert not any(m.normalize_modulator for m in stock.modules() if hasattr(m, "normalize_modulator"))


def test_timms_names_stay_timms():
    assert {"focalnet_tiny_iso", "focalnet_large_fl4_normalized"} <= set(backbones.registered())
    assert timm.model_entrypoint("focalnet_large_fl4").__module__ == "timm.models.focalnet"


# ---------------------------------------------------------------- values


def layer_norm(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-5)


def linear(x, conv):
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def definition(model, x, *, normalize=False):
    """An isotropic FocalNet or one stage after the other, channels last, written from the formulas."""

    def modulate(x, m):
        C, levels = x.shape[-1], len(m.focal_layers)
        q, context, gates = linear(x, m.f).split([C, C, levels + 1], -1)
        total = 0
        for level, (conv, _) in enumerate(m.focal_layers):
            k = conv.kernel_size[0]
            context = F.conv2d(context.permute(0, 3, 1, 2), conv.weight, padding=k // 2, groups=C).permute(0, 2, 3, 1)
            context = F.gelu(context)
            total = total + context * gates[..., level : level + 1]
        total = total + F.gelu(context.mean((1, 2), keepdim=True)) * gates[..., levels:]
        return linear(q * linear(total / (levels + 1) if normalize else total, m.h), m.proj)

    def mlp(x, m):
        return linear(F.gelu(linear(x, m.fc1)), m.fc2)

    def embed(x, d):
        return layer_norm(
            F.conv2d(x, d.proj.weight, d.proj.bias, d.proj.stride, d.proj.padding).permute(0, 2, 3, 1), d.norm
        )

    x = embed(x, model.stem)
    for i, stage in enumerate(model.layers):
        if i:
            x = embed(x.permute(0, 3, 1, 2), stage.downsample)
        for block in stage.blocks:
            if block.use_post_norm:
                x = x + block.ls1.gamma * layer_norm(modulate(x, block.modulation), block.norm1_post)
                x = x + block.ls2.gamma * layer_norm(mlp(x, block.mlp), block.norm2_post)
            else:
                x = x + modulate(layer_norm(x, block.norm1), block.modulation)
                x = x + mlp(layer_norm(x, block.norm2), block.mlp)
    x = layer_norm(x, model.norm).mean((1, 2))
    return F.linear(x, model.head.fc.weight, model.head.fc.bias)


@pytest.mark.parametrize("name", ["focalnet_tiny_iso", "focalnet_base_iso"])
@pytest.mark.parametrize("size", [(32, 48), (97, 131)])
def test_isotropic_models_equal_the_definition(name, size):
    model = build(name, **TINY)
    x = image(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), definition(model, x), rtol=1e-12, atol=1e-12)


def test_the_normalised_model_equals_the_definition_and_timms_does_not():
    ours = build("focalnet_large_fl4_normalized", **SMALL_FL4)
    with torch.no_grad():
        x = image(1, 3, 64, 96)
        torch.testing.assert_close(ours(x), definition(ours, x, normalize=True), rtol=1e-12, atol=1e-12)
        stock = FocalNet(
            **SMALL_FL4, focal_levels=(4,) * 4, use_post_norm=True, use_overlap_down=True, layerscale_value=1e-4
        )
        stock.double().eval().load_state_dict(ours.state_dict())
        torch.testing.assert_close(stock(x), definition(ours, x), rtol=1e-12, atol=1e-12)
        assert (stock(x) - ours(x)).abs().max() > 1e-3


def test_the_definition_is_that_of_timms_hierarchical_models():
    """timm's models hold to the same formulas, without the division."""
    torch.manual_seed(0)
    model = FocalNet(depths=(1, 1, 1, 1), embed_dim=16, focal_levels=(3,) * 4, num_classes=4).double().eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), definition(model, x), rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_parameter():
    model = build("focalnet_base_iso", **TINY)
    leaves = list(model.parameters())
    x = image(1, 3, 32, 32)
    actual = torch.autograd.grad(model(x).square().sum(), leaves)
    wanted = torch.autograd.grad(definition(model, x).square().sum(), leaves)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-10, atol=1e-11)
        assert a.abs().max() > 0


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("name", ["focalnet_tiny_iso", "focalnet_base_iso"])
def test_gamma_keys_of_the_file_decide(name, post_norm, tmp_path):
    """A file with gammas makes a model that norms behind its branches, whatever the variant; without them, before."""
    trained = build("focalnet_base_iso" if post_norm else "focalnet_tiny_iso", **TINY)
    loaded = timm.create_model(name, **TINY, **save(tmp_path, official(trained.state_dict(), post_norm)))
    loaded = loaded.double().eval()
    assert isinstance(loaded, FocalNetIso) and loaded.post_norm == post_norm
    x = image(2, 3, 40, 56)
    with torch.no_grad():
        # loaded into float32 and widened again
        torch.testing.assert_close(loaded(x), trained(x), rtol=1e-5, atol=1e-5)


def test_official_layout_of_the_large_file(tmp_path):
    trained = build("focalnet_large_fl4_normalized", **SMALL_FL4)
    file = official(trained.state_dict(), True)
    assert {"patch_embed.proj.weight", "layers.0.downsample.proj.weight", "layers.3.blocks.0.gamma_2"} <= set(file)
    loaded = timm.create_model("focalnet_large_fl4_normalized", **SMALL_FL4, **save(tmp_path, file)).double().eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), trained(x), rtol=1e-5, atol=1e-5)


def test_a_file_that_does_not_fit_is_refused_with_its_keys(tmp_path):
    state = official(build(**TINY).state_dict(), False)
    del state["layers.0.blocks.1.modulation.h.weight"]
    with pytest.raises(ValueError, match=r"Missing \(1\): layers\.0\.blocks\.1\.modulation\.h\.weight"):
        timm.create_model("focalnet_tiny_iso", **TINY, **save(tmp_path, state))
    with pytest.raises(ValueError, match="look like those of ConvNeXt"):
        other = {"stages.0.blocks.0.conv_dw.weight": torch.zeros(3)}
        timm.create_model("focalnet_tiny_iso", **TINY, **save(tmp_path, other))


# ---------------------------------------------------------------- timm's surface


def test_one_map_of_features_at_any_size():
    model = timm.create_model("focalnet_tiny_iso", features_only=True, depths=(1,), embed_dim=24)
    assert model.feature_info.reduction() == [16] and model.feature_info.channels() == [24]
    assert [f.shape for f in model(torch.zeros(1, 3, 97, 131))] == [(1, 24, 6, 8)]


def test_other_options_of_the_isotropic_model():
    model = timm.create_model("focalnet_tiny_iso", **TINY, in_chans=1, patch_size=8, drop_path_rate=0.3)
    assert model(torch.zeros(2, 1, 24, 24)).shape == (2, 5)
    assert model.feature_info == [{"num_chs": 24, "reduction": 8, "module": "layers.0"}]
    model.reset_classifier(0, "")
    assert model(torch.zeros(2, 1, 24, 24)).shape == (2, 24, 3, 3)
    with pytest.raises(ValueError, match="has one stage, got depths=\\(2, 2\\)"):
        FocalNetIso(depths=(2, 2))


def test_exports_whole():
    model = build(dtype=torch.float32, **TINY)
    x = image(1, 3, 32, 48, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))
