"""NAT, DiNAT and the isotropic models: published sizes, official weights, attention against the rule, and bad input."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from neighborhood_oracle import plain
from oracle import assert_close_to_reference
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mmeff.vision_backbones as backbones
from mmeff.errors import UnknownMethod
from mmeff.kernels.neighborhood import na_scores, na_values
from mmeff.vision_backbones._nat_keys import from_official, to_official
from mmeff.vision_backbones.nat import NATBlock, NeighborhoodAttention2d

SMALL = {"depths": (1, 2, 2, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "num_classes": 10}
SMALL_ISO = {"depth": 3, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
SMALL_OF = {"nat_small": SMALL, "dinat_mini": SMALL, "dinat_iso_small": SMALL_ISO, "vitrpb_small": SMALL_ISO}

# millions of parameters, 10^9 multiply-adds, pixels: as published
PUBLISHED = {
    "nat_mini": (20.0, 2.7, 224), "nat_tiny": (27.9, 4.3, 224), "nat_small": (50.7, 7.8, 224), "nat_base": (89.8, 13.7, 224),
    "dinat_mini": (20.0, 2.7, 224), "dinat_tiny": (27.9, 4.3, 224), "dinat_small": (50.7, 7.8, 224),
    "dinat_base": (89.8, 13.7, 224), "dinat_large": (200.9, 30.6, 224), "dinat_large_384": (200.9, 89.7, 384),
    "dinat_large_384_k11": (200.9, 92.4, 384),
    "nat_iso_small": (22.0, 4.3, 224), "nat_iso_base": (86.4, 16.9, 224), "dinat_iso_small": (22.0, 4.3, 224),
    "dinat_iso_base": (86.4, 16.9, 224), "vitrpb_small": (22.0, 4.6, 224), "vitrpb_base": (86.4, 17.5, 224),
}  # fmt: skip


def multiply_adds(model, pixels):
    """Products of the matrices, convolutions and attended pairs for one image, on the meta device."""

    def attended(q, k, v, rel_bias, extra_k, extra_v, window, *rest, out_shape=None):
        B, *grid, H, D = q
        per_query = 1
        for w in window:
            per_query *= w
        return 2 * 2 * B * H * D * per_query * torch.Size(grid).numel()

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mmeff.neighborhood_attention: attended})
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, pixels, pixels, device="meta"))
    return counter.get_total_flops() / 2e9


def image(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def shaken(model, seed=0):
    """With every parameter random: scales, norms and biases count in a comparison of weights."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, gmacs, pixels = PUBLISHED[name]
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert multiply_adds(model, pixels) == pytest.approx(gmacs, rel=0.01)
    assert model.pretrained_cfg["input_size"] == (3, pixels, pixels)


def test_every_variant_is_tested():
    ours = {n for n in backbones.registered() if n.split("_")[0] in ("nat", "dinat", "vitrpb") and "dinat_s_" not in n}
    assert ours == PUBLISHED.keys()


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("grid", "window", "dilation"), [((7, 9), 3, 1), ((11, 8), 3, 2), ((14, 7), 7, 1), ((15, 13), 5, 2)]
)
def test_a_layer_is_the_rule(grid, window, dilation):
    """Forward and every gradient against float64 brute force, judged by what plain float32 achieves."""
    layer = shaken(NeighborhoodAttention2d(24, 3, window, dilation))
    x = image(2, *grid, 24)
    cotangent = image(2, *grid, 24, seed=1)

    def brute(layer, x):
        q, k, v = layer.qkv(x).unflatten(-1, (3, 3, 8)).unbind(3)
        rule = [(window,) * 2, (1, 1), (dilation,) * 2, (False, False)]
        return layer.proj(plain(q, k, v, rule, layer.rpb)[0].flatten(-2))

    def results(run, layer, x):
        layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
        out = run(layer, x)
        (out * cotangent.to(out)).sum().backward()
        return {"out": out, "dx": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}

    actual, same = results(lambda layer, x: layer(x), layer, x), results(brute, layer, x)
    reference = results(brute, layer.double(), x.double())
    for name in reference:
        assert_close_to_reference(actual[name], same[name], reference[name], name=name)


def test_pad_is_zeros_before_the_projection():
    layer = shaken(NeighborhoodAttention2d(16, 2, 5, 2))
    x = image(2, 7, 12, 16)
    padded = F.pad(x, (0, 0, 0, 0, 0, 3))
    assert torch.equal(layer(x), layer(padded)[:, :7])
    moved = layer.qkv.bias.detach().clone()
    with torch.no_grad():
        layer.qkv.bias[32:] += 1  # a pad's values are those of the bias, and attended to
        changed = layer(x)
        layer.qkv.bias.copy_(moved)
    assert not torch.allclose(changed, layer(x))


def test_error_names_the_sizes():
    model = timm.create_model("dinat_mini", small_input="error", **SMALL).eval()
    with pytest.raises(ValueError, match=r"7 \* 4 = 28 on a map of 8 x 28; .*small_input='pad' or 'clamp'"):
        model(image(1, 3, 64, 224))
    assert model(image(1, 3, 224, 225)).shape == (1, 10)


@pytest.mark.parametrize(
    ("grid", "window", "dilation"),
    [((10, 12), (5, 5), (2, 2)), ((9, 12), (5, 5), (1, 2)), ((5, 4), (5, 4), (1, 1)), ((1, 11), (1, 5), (1, 2))],
)
def test_clamp_lowers_the_dilation_then_the_window(grid, window, dilation):
    layer = shaken(NeighborhoodAttention2d(16, 2, 5, 2, small_input="clamp"))
    x = image(1, *grid, 16)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(3)
    rows, columns = (slice(5 - w, 4 + w) for w in window)
    rule = [window, (1, 1), dilation, (False, False)]
    want = layer.proj(plain(q, k, v, rule, layer.rpb[:, rows, columns])[0].flatten(-2))
    torch.testing.assert_close(layer(x), want)


# ---------------------------------------------------------------- official weights


def block_keys(prefix, scales):
    parts = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.rpb"]
    parts += [f"{m}.{p}" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")]
    return {prefix + part for part in [*parts, *(["gamma1", "gamma2"] if scales else [])]}


def official_keys(name):
    """The layout of SHI-Labs, written down a second time."""
    both = ("weight", "bias")
    keys = {f"{m}.{p}" for m in ("patch_embed.norm", "norm", "head") for p in both}
    if "iso" in name or "vitrpb" in name:
        keys |= {f"patch_embed.proj.{p}" for p in both}
        return keys.union(*(block_keys(f"layers.{i}.", False) for i in range(3)))
    keys |= {f"patch_embed.proj.{i}.{p}" for i in (0, 1) for p in both}
    for i, depth in enumerate(SMALL["depths"]):
        keys = keys.union(*(block_keys(f"levels.{i}.blocks.{j}.", name == "nat_small") for j in range(depth)))
        if i < 3:
            keys |= {f"levels.{i}.downsample.{p}" for p in ("reduction.weight", "norm.weight", "norm.bias")}
    return keys


def load(name, path, **kwargs):
    overlay = {"file": str(path), "num_classes": 10}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}]
)
@pytest.mark.parametrize("name", SMALL_OF)
def test_official_weights(name, wrap, tmp_path):
    word = "isotropic" if "iso" in name or "vitrpb" in name else "levels"
    model = shaken(timm.create_model(name, **SMALL_OF[name]))
    state = to_official(model.state_dict(), word)
    assert state.keys() == official_keys(name)
    assert from_official(state, word).keys() == model.state_dict().keys()
    if name == "vitrpb_small":  # the official file also keeps a table of indices
        state["layers.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    torch.save(wrap(state), tmp_path / "official.pth")
    x = image(1, 3, 224, 224)
    for file in ("official.pth", "ours.pth"):
        torch.save(model.state_dict(), tmp_path / "ours.pth")
        assert torch.equal(load(name, tmp_path / file, **SMALL_OF[name])(x), model(x))


class Hugging(nn.Module):
    """transformers' DiNAT for classification without its check for natten; the same names of weights."""

    def __init__(self, config):
        from transformers.models.dinat import modeling_dinat as dinat

        super().__init__()
        self.dinat = nn.Module()
        self.dinat.embeddings, self.dinat.encoder = dinat.DinatEmbeddings(config), dinat.DinatEncoder(config)
        self.dinat.layernorm = nn.LayerNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 10)

    def forward(self, x):
        x = self.dinat.encoder(self.dinat.embeddings(x)).last_hidden_state
        return self.classifier(self.dinat.layernorm(x).mean((1, 2)))


@pytest.mark.parametrize("scale", [0.0, 1e-1])
def test_transformers_weights_and_output(monkeypatch, tmp_path, scale):
    """transformers' own layers with the two functions that natten no longer has, against ours with their weights."""
    from transformers import DinatConfig
    from transformers.models.dinat import modeling_dinat as dinat

    def tokens(x, heads):
        # (B, heads, H, W, D) as natten wants it; transformers 5.17 and on hands over (B, W, H, heads, D)
        return x.permute(0, 2, 3, 1, 4) if x.shape[1] == heads else x.transpose(1, 2)

    def scores(q, k, rpb, window, dilation):
        q, k = tokens(q, len(rpb)), tokens(k, len(rpb))
        return na_scores(q, k, window, dilation=dilation, rel_bias=rpb, scale=1.0)

    def values(weights, v, window, dilation):
        return na_values(weights, tokens(v, weights.shape[1]), window, dilation=dilation).permute(0, 3, 1, 2, 4)

    monkeypatch.setattr(dinat, "natten2dqkrpb", scores)
    monkeypatch.setattr(dinat, "natten2dav", values)
    dilations = [[1], [1, 4], [1, 2], [1]]
    config = DinatConfig(
        depths=[1, 2, 2, 1], num_heads=[1, 2, 4, 8], embed_dim=32, dilations=dilations, layer_scale_init_value=scale
    )  # fmt: skip
    theirs = shaken(Hugging(config))
    torch.save(theirs.state_dict(), tmp_path / "hf.pth")
    ours = load("dinat_mini", tmp_path / "hf.pth", **SMALL, layer_scale=scale or None)
    x = image(2, 3, 97, 131)
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=1e-4)  # float32, six layers, random weights


def test_vit_weights_for_another_size(tmp_path):
    model = shaken(timm.create_model("vitrpb_small", **SMALL_ISO))
    torch.save(to_official(model.state_dict(), "isotropic"), tmp_path / "vit.pth")
    larger = load("vitrpb_small", tmp_path / "vit.pth", img_size=(256, 97), **SMALL_ISO)
    with pytest.raises(ValueError, match=r"made for, 16 x 7, got 14 x 14; call model.set_input_size"):
        larger(image(1, 3, 224, 224))
    model.set_input_size((256, 97))
    x = image(1, 3, 256, 97)
    assert torch.equal(larger(x), model(x))
    rpb = model.stages[0].blocks[0].attn.rpb
    assert rpb.shape == (2, 31, 13)


# ---------------------------------------------------------------- bad checkpoints and names


def test_a_checkpoint_of_another_family(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"weights of a NAT or DiNAT .*look like those of ResNet.* Missing \(\d+\): norm"
    ):
        load("nat_small", tmp_path / "x.pth", **SMALL)


@pytest.mark.parametrize("name", ["nat_small", "dinat_iso_small"])
def test_missing_unexpected_and_reshaped_weights_are_listed(name, tmp_path):
    word = "isotropic" if "iso" in name else "levels"
    state = to_official(timm.create_model(name, **SMALL_OF[name]).state_dict(), word)
    first = "layers.1." if "iso" in name else "levels.1.blocks.0."
    ours = "stages.1.blocks.0."
    del state[f"{first}attn.rpb"], state[f"{first}mlp.fc2.bias"]
    state["extra.weight"] = torch.zeros(1)
    state[f"{first}norm1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError) as found:
        load(name, tmp_path / "x.pth", **SMALL_OF[name])
    text = str(found.value)
    assert f"Missing (2): {ours}attn.rpb, {ours}mlp.fc2.bias." in text and "Unexpected (1): extra.weight." in text
    assert f"Of another shape (1): {ours}norm1.bias (3,) instead of ({64},)." in text


def test_other_classes_and_channels_load_as_in_timm(tmp_path):
    model = shaken(timm.create_model("dinat_mini", **SMALL))
    torch.save(to_official(model.state_dict(), "levels"), tmp_path / "x.pth")
    rest = {key: value for key, value in SMALL.items() if key != "num_classes"}
    gray = load("dinat_mini", tmp_path / "x.pth", num_classes=3, in_chans=1, **rest)
    assert gray(image(1, 1, 64, 64)).shape == (1, 3)
    assert torch.equal(gray.stages[2].blocks[0].attn.rpb, model.stages[2].blocks[0].attn.rpb)
    maps = load("dinat_mini", tmp_path / "x.pth", features_only=True, out_indices=(1, 3), **rest)(image(1, 3, 97, 131))
    assert [tuple(x.shape) for x in maps] == [(1, 64, 13, 17), (1, 256, 4, 5)]


def test_an_unknown_name_gets_near_matches():
    with pytest.raises(UnknownMethod, match=r"no backbone is called 'dinat_tinny'\. Did you mean 'dinat_tiny'"):
        backbones.create_model("dinat_tinny")
    assert isinstance(backbones.create_model("nat_mini", device="meta"), backbones.NAT)


def test_names_of_timm_are_left_to_timm():
    from mmeff.vision_backbones._timm import register

    def resnet18(pretrained=False, **kwargs):
        raise AssertionError("ours must not be registered")

    before = timm.models.model_entrypoint("resnet18")
    assert register(resnet18) is resnet18
    assert timm.models.model_entrypoint("resnet18") is before and "resnet18" not in backbones.registered()


# ---------------------------------------------------------------- arguments


def dilations_of(model):
    return [[m.dilation for m in stage.modules() if isinstance(m, NeighborhoodAttention2d)] for stage in model.stages]


def test_dilations():
    kwargs = {"device": "meta", "depths": (3, 4, 6, 5)}
    of = lambda name, **more: dilations_of(timm.create_model(name, **kwargs, **more))  # noqa: E731
    assert of("nat_mini") == [[1] * n for n in (3, 4, 6, 5)]
    assert of("dinat_mini") == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5]
    assert of("dinat_large_384") == [[1, 13, 1], [1, 6, 1, 6], [1, 3, 1, 3, 1, 3], [1] * 5]
    detection = [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
    assert of("dinat_mini", dilations="detection") == detection
    assert of("nat_mini", dilations=detection) == detection, "the official lists may be passed as they are"
    assert of("dinat_mini", dilations=(2, [3], 1, (1, 2, 3))) == [[1, 2, 1], [3] * 4, [1] * 6, [1, 2, 3, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dilations": (1, 2)}, r"one entry per stage, got \(1, 2\) for depths \(1, 2, 2, 1\)"),
        ({"dilations": "large"}, r"'detection' or one entry per stage, got 'large'"),
        ({"dilations": (1, 0, 1, 1)}, r"at least 1, got 7 and 0"),
        ({"small_input": "crop"}, r"one of pad, error, clamp, got 'crop'"),
        ({"num_heads": (1, 2, 5, 8)}, r"must divide the channels .* got 5 heads for 128 channels"),
        ({"num_heads": (1, 2)}, r"one entry per stage, got \(1, 2\)"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dinat_mini", **{**SMALL, **arguments})


def test_biases_are_out_of_weight_decay():
    model = timm.create_model("dinat_mini", **SMALL)
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    tables = {p for name, p in model.named_parameters() if name.endswith("rpb")}
    assert len(tables) == 6 and not tables & decayed
    assert model.stages[0].blocks[0].attn.qkv.weight in decayed


def test_a_block_scales_its_branches():
    block = NATBlock(8, nn.Identity(), 2.0, layer_scale=0.0)
    x = image(1, 3, 3, 8)
    assert torch.equal(block(x), x)


# ---------------------------------------------------------------- precision, compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_do_not_overflow(dtype):
    """Scores beyond the range of float16 are computed in float32."""
    model = timm.create_model("dinat_mini", **SMALL).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, NeighborhoodAttention2d):
                m.qkv.weight[: 2 * m.proj.in_features] *= 3000
    x = image(1, 3, 64, 97)
    want = model(x)
    assert want.isfinite().all()
    with torch.autocast("cpu", dtype):
        assert model(x).isfinite().all()
    assert model.to(dtype)(x.to(dtype)).isfinite().all()


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_iso_small"])
def test_half_precision_is_close(name):
    model = timm.create_model(name, **SMALL_OF[name]).eval()
    x = image(1, 3, 64, 97)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert (got - want).abs().max() < 0.05 * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["dinat_mini", "vitrpb_small"])
def test_compiled_and_exported(name):
    size = (224, 224) if name == "vitrpb_small" else (97, 131)
    shorter = {"depth": 1} if name == "vitrpb_small" else {"depths": (1, 2), "num_heads": (1, 2), "dilations": (8, 4)}
    model = timm.create_model(name, **{**SMALL_OF[name], **shorter}).eval()
    x = image(2, 3, *size)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
        exported = torch.export.export(model, (x,), strict=False)
        assert torch.equal(exported.module()(x), want)
    called = {str(node.target) for node in exported.graph.nodes}
    assert any("mmeff.neighborhood_attention" in target for target in called)
