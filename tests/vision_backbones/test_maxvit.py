"""MaxViT on our attention and at any size, against timm's and against masked attention written out in float64."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.maxxvit import (
    MaxxVit,
    MaxxVitCfg,
    MaxxVitTransformerCfg,
    ParallelPartitionAttention,
    PartitionAttentionCl,
)

from mmeff.kernels.partitioned import partitioned_attention
from mmeff.vision_backbones import any_size, fixed_size
from mmeff.vision_backbones.maxvit import partition_attention

WINDOW = 4


def tiny(*, rel_pos_type="bias_tf", head_first=False, block_type=("M", "M"), dtype=torch.float64, seed=0, **options):
    """A MaxViT of two stages whose windows and grids are 4 x 4; the maps of a 64-pixel image are 16 and 8."""
    torch.manual_seed(seed)
    transformer = MaxxVitTransformerCfg(
        dim_head=8,
        window_size=(WINDOW, WINDOW),
        grid_size=(WINDOW, WINDOW),
        rel_pos_type=rel_pos_type,
        head_first=head_first,
    )
    cfg = MaxxVitCfg(
        embed_dim=(16, 32), depths=(1, 1), block_type=block_type, stem_width=8, transformer_cfg=transformer, **options
    )
    model = MaxxVit(cfg, img_size=64, num_classes=5).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.normal_()
    return model


def image(*size, batch=2, dtype=torch.float64, seed=3):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


KINDS = {
    "tf": {},
    "flat table, heads first": {"rel_pos_type": "bias", "head_first": True},
    "mlp": {"rel_pos_type": "mlp"},
    "no bias": {"rel_pos_type": ""},
    "parallel": {"block_type": ("PM", "PM")},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_equals_timm_where_timm_takes_the_size(kind, size):
    model = tiny(**KINDS[kind])
    x = image(*size).requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    wanted = model(x)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), leaves)
    any_size(model)
    actual = model(x)
    assert not torch.equal(actual, wanted), "ours did not run"
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    for a, w in zip(torch.autograd.grad(actual.square().sum(), leaves), wanted_grads, strict=True):
        # sums over every token of the image
        torch.testing.assert_close(a, w, rtol=1e-9, atol=1e-9 * float(w.abs().max() + 1e-3))


def masked_statement(module, x):
    """Attention of one layer on a map of any size: dense, under a mask that says which pairs share a window."""
    attn, (wh, ww) = module.attn, module.partition_size
    B, H, W, C = x.shape
    Hp, Wp = -(-H // wh) * wh, -(-W // ww) * ww  # the padded map says where windows lie; nobody sees the padding
    i, j = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    if module.partition_block:
        group = (i // wh) * (Wp // ww) + j // ww
        place = torch.stack([i % wh, j % ww])
    else:
        group = (i % (Hp // wh)) * (Wp // ww) + j % (Wp // ww)
        place = torch.stack([i // (Hp // wh), j // (Wp // ww)])
    group, (a, b) = group.flatten(), place.flatten(1)
    together = group[:, None] == group
    qkv = F.linear(x.flatten(1, 2), attn.qkv.weight, attn.qkv.bias)
    q, k, v = qkv.view(B, H * W, 3, attn.num_heads, attn.dim_head).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / attn.dim_head**0.5
    rows, columns = (a - a[:, None] + wh - 1), (b - b[:, None] + ww - 1)
    bias = attn.rel_pos.relative_position_bias_table[:, rows.clamp(0, 2 * wh - 2), columns.clamp(0, 2 * ww - 2)]
    weights = (scores + bias).masked_fill(~together, -torch.inf).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(B, H, W, C)
    return F.linear(out, attn.proj.weight, attn.proj.bias)


@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize("size", [(5, 7), (13, 8), (3, 2), (1, 9), (8, 8)])
def test_padded_layer_equals_masked_attention(partition, size):
    model = tiny()
    module = model.stages[0].blocks[0].attn_block if partition == "block" else model.stages[0].blocks[0].attn_grid
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.attn.parameters()]
    actual, wanted = partition_attention(module, x, attend=partitioned_attention), masked_statement(module, x)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)
    g = torch.randn_like(actual)
    for a, w in zip(torch.autograd.grad(actual, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [(97, 131), (40, 50), (17, 64)])
def test_whole_model_at_sizes_that_timm_refuses(size):
    model = tiny()
    x = image(*size)
    with torch.no_grad():
        with pytest.raises((AssertionError, RuntimeError), match=r"divisible by window|must match the size"):
            model(x)
        any_size(model)
        actual = model(x)
        apart = torch.cat([model(x[:1]), model(x[1:])])
        for module in model.modules():
            if isinstance(module, PartitionAttentionCl):
                module._partition_attn = lambda x, module=module: masked_statement(module, x)
        torch.testing.assert_close(actual, model(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(actual, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_autocast_stay_close(dtype):
    wide = any_size(tiny())
    x = image(48, 80, batch=1)
    with torch.no_grad():
        wanted = wide(x)
        narrow = copy.deepcopy(wide).to(dtype)
        size = wanted.abs().max()
        tolerance = 64 * torch.finfo(dtype).eps  # a dozen layers, each some roundings
        assert (narrow(x.to(dtype)).double() - wanted).abs().max() < tolerance * size
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = copy.deepcopy(wide).float()(x.float())
    assert (mixed.double() - wanted).abs().max() < 64 * torch.finfo(torch.bfloat16).eps * size


def test_comes_off_bit_for_bit_and_travels_with_copies():
    model = tiny(dtype=torch.float32)
    x, odd = image(64, 64, dtype=torch.float32), image(40, 56, dtype=torch.float32)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        assert any_size(model) is model
        wanted = model(odd)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(odd), wanted)
            for parameter in other.parameters():
                parameter.zero_()  # must not be the parameters of the original
        assert torch.equal(model(odd), wanted)
        assert list(model.state_dict()) == keys
        assert torch.equal(fixed_size(model)(x), before)
        with pytest.raises(AssertionError, match="divisible"):
            model(odd)


def test_windows_keep_their_size_and_other_inputs_work():
    model = any_size(timm.create_model("test_maxvit", in_chans=1, num_classes=0).eval())
    sizes = {m.partition_size for m in model.modules() if isinstance(m, PartitionAttentionCl)}
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 97, 131)).shape == (1, model.num_features)
    assert {m.partition_size for m in model.modules() if isinstance(m, PartitionAttentionCl)} == sizes
    maps = any_size(timm.create_model("test_maxvit", features_only=True).eval())(torch.zeros(1, 3, 97, 131))
    assert maps[0].shape[2:] == (49, 66) and len(maps) == 5


def test_exports_and_compiles_whole():
    model = any_size(tiny(dtype=torch.float32))
    x = image(40, 56, batch=1, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(x)
        program = torch.export.export(model, (x,))
        names = {str(node.target) for node in program.graph.nodes}
        assert any("mmeff.partitioned_attention" in name for name in names)
        torch.testing.assert_close(program.module()(x), wanted)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted)


def test_a_map_below_the_window():
    model = any_size(tiny(), small_input="error")
    with torch.no_grad():
        assert model(image(64, 64)).shape == (2, 5)
        with pytest.raises(ValueError, match=r"at least a window, 4 x 4, in every layer, got 8 x 3; pass a larger"):
            model(image(64, 20))
        fixed_size(model)
        assert any_size(model)(image(64, 20)).isfinite().all()


def test_bad_models_and_options():
    with pytest.raises(TypeError, match="any_size needs a timm MaxViT such as maxvit_tiny_tf_224, got a Linear"):
        any_size(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got str"):
        any_size("maxvit_tiny_tf_224")
    with pytest.raises(ValueError, match="small_input must be 'pad' or 'error', got 'clamp'"):
        any_size(tiny(), small_input="clamp")
    with pytest.raises(ValueError, match="there is nothing to undo"):
        fixed_size(tiny())
    twice = any_size(tiny())
    with pytest.raises(ValueError, match="any_size acts on it already; fixed_size undoes that"):
        any_size(twice)
    dropping = tiny().train()
    for module in dropping.modules():
        if isinstance(module, (PartitionAttentionCl, ParallelPartitionAttention)):
            module.attn.attn_drop.p = 0.1
    with pytest.raises(ValueError, match=r"drops attention weights in training \(attn_drop=0.1\)"):
        any_size(dropping)
