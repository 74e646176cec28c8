"""BiFormer against a re-statement of the published architecture, its backends against each other, and its checkpoints."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from biformer_restated import Restated, official_shapes, official_state
from oracle import assert_close_to_reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mmeff.vision_backbones
from mmeff.errors import BackendUnavailable
from mmeff.kernels import record
from mmeff.vision_backbones import _routing
from mmeff.vision_backbones._routing import BACKENDS, choose, cut, region_attention, route
from mmeff.vision_backbones.biformer import BiFormer, BiLevelRoutingAttention, checkpoint_filter

SMALL = {"depths": (1, 1, 1, 1), "widths": (32, 64, 64, 64), "num_classes": 5}
NAMED = [name for name in BACKENDS if name != "auto"]
# the form, depths, widths and MLP ratio of the variants, as published
VARIANTS = {
    "biformer_tiny": ("conv", (2, 2, 8, 2), 64, 3, 13.14, 2.22),
    "biformer_small": ("conv", (4, 4, 18, 4), 64, 3, 25.54, 4.46),
    "biformer_base": ("conv", (4, 4, 18, 4), 96, 3, 56.80, 9.76),
    "biformer_stl": ("stl", (2, 2, 6, 2), 96, 4, 28.4, 4.6),
    "biformer_stl_nchw": ("stl_nchw", (2, 2, 6, 2), 96, 4, 28.4, 4.6),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def needs_kernel(backend: str, dtype: torch.dtype = torch.float32) -> None:
    reason = _routing.kernel_missing("cpu", dtype)
    if backend == "kernel" and reason is not None:
        pytest.skip(f"no kernel: {reason}")


# ---------------------------------------------------------------- the architecture


def check_against_restatement(name: str, size: tuple[int, int], depths, base: int, ratio: int, form: str) -> None:
    torch.manual_seed(1)
    widths = tuple(base * 2**i for i in range(4))
    state = official_state(form, depths, widths, ratio, 10)
    restated, image = Restated(form, state, depths), torch.randn(3, *size).double()
    wanted = restated(image)
    # a choice between regions that float32 cannot tell apart would say nothing about either side
    assert restated.gap > 1e-5
    model = timm.create_model(name, depths=depths, widths=widths, num_classes=10).eval()
    model.load_state_dict(checkpoint_filter({"model": state}, model))
    with torch.inference_mode():
        single = model(image[None].float())[0]
        double = model.double()(image[None])[0]
    assert (double - wanted).abs().max() < 1e-11 * wanted.abs().max()
    assert (single - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("size", [(224, 224), (97, 131)])
def test_tiny_equals_the_restatement(size):
    check_against_restatement("biformer_tiny", size, (2, 2, 8, 2), 64, 3, "conv")


def test_tiny_equals_the_restatement_at_256():
    check_against_restatement("biformer_tiny", (256, 256), (1, 1, 2, 1), 64, 3, "conv")


@pytest.mark.parametrize("size", [(224, 224), (250, 290)])
@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw"])
def test_swin_layouts_equal_the_restatement(name, size):
    check_against_restatement(name, size, (1, 1, 1, 1), 32, 4, VARIANTS[name][0])


# ---------------------------------------------------------------- variants and checkpoints


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    *_, millions, giga = VARIANTS[name]
    with torch.device("meta"):
        model = timm.create_model(name, routing_backend="gather").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("name", VARIANTS)
def test_official_keys_are_exactly_ours_after_filtering(name):
    form, depths, base, ratio, *_ = VARIANTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
        shapes = official_shapes(form, depths, [base * 2**i for i in range(4)], ratio, 1000)
        found = checkpoint_filter({"model": {key: torch.empty(shape) for key, shape in shapes.items()}}, model)
    assert {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in model.state_dict().items()}


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_official_files_load_through_timm(name, tmp_path):
    form, _, _, ratio, *_ = VARIANTS[name]
    state = official_state(form, SMALL["depths"], SMALL["widths"], ratio, 5)
    torch.save({"model": state}, tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth"), "num_classes": 5}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert torch.equal(model.head.fc.weight, state["head.weight"])
    stage3 = state["stages.3.0.attn.qkv.weight" if form == "conv" else "stages.3.blocks.0.attn.qkv.weight"]
    assert torch.equal(model.stages[3].blocks[0].attn.qkv.weight, stage3.flatten(1))
    # what was saved here loads too
    assert checkpoint_filter(model.state_dict(), model).keys() == model.state_dict().keys()


def test_checkpoints_that_do_not_fit_are_refused():
    model = timm.create_model("biformer_tiny", **SMALL)
    state = official_state("conv", SMALL["depths"], SMALL["widths"], 3, 5)
    del state["stages.1.0.attn.wo.bias"], state["norm.running_var"]
    with pytest.raises(ValueError, match=r"Missing \(2\): norm.running_var, stages.1.blocks.0.attn.proj.bias"):
        checkpoint_filter(state, model)
    other = timm.create_model("resnet18").state_dict()
    with pytest.raises(ValueError, match=r"BiFormer.*look like those of ResNet"):
        checkpoint_filter(other, model)
    wide = official_state("conv", SMALL["depths"], (32, 64, 64, 96), 3, 5)
    with pytest.raises(ValueError, match=r"Of another shape.*\(64, 64\)"):
        checkpoint_filter(wide, model)


def test_images_are_normalised_as_in_training():
    assert timm.get_pretrained_cfg("biformer_tiny").mean == (0.485, 0.456, 0.406)


# ---------------------------------------------------------------- backends


def problem(B=2, R=6, T=7, heads=2, D=32, K=3, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    qkv = torch.randn(B, R, T, 3 * heads * D, dtype=torch.float64).to(dtype)
    return qkv, torch.rand(B, R, R).topk(K).indices


def brute_force(qkv: Tensor, routes: Tensor, heads: int, scale: float) -> Tensor:
    out = []
    for x, picked in zip(qkv, routes, strict=True):
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in x.chunk(3, -1))
        rows = []
        for r, regions in enumerate(picked.tolist()):
            keys, values = (torch.cat([t[s] for s in regions], -2) for t in (k, v))
            weights = torch.softmax(scale * q[r] @ keys.transpose(-2, -1), -1)
            rows.append((weights @ values).transpose(0, 1).flatten(1))
        out.append(torch.stack(rows))
    return torch.stack(out)


GEOMETRIES = [
    {},
    {"R": 49, "T": 4, "heads": 1, "K": 16, "B": 1},
    {"R": 12, "T": 37, "K": 1},
    {"R": 5, "T": 1, "K": 5},
    {"R": 9, "T": 19, "K": 4, "D": 24},
]


@pytest.mark.parametrize("sizes", GEOMETRIES)
@pytest.mark.parametrize("backend", NAMED)
def test_backends_agree_with_float64(backend, sizes):
    needs_kernel(backend)
    qkv, routes = problem(**sizes)
    heads = sizes.get("heads", 2)
    dout = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3)

    def run(x: Tensor, how) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = how(x)
        return out, torch.autograd.grad(out, x, dout.to(x.dtype))[0]

    actual = run(qkv, lambda x: region_attention(x, routes, heads=heads, scale=0.13, backend=backend))
    plain = run(qkv, lambda x: brute_force(x, routes, heads, 0.13))
    reference = run(qkv.double(), lambda x: brute_force(x, routes, heads, 0.13))
    assert_close_to_reference(actual[0], plain[0], reference[0], name="out")
    assert_close_to_reference(actual[1], plain[1], reference[1], name="gradient", terms=4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["masked", "gather", "kernel"])
def test_half_precision_survives_large_scores(backend, dtype):
    needs_kernel(backend, dtype)
    qkv, routes = problem(T=5, dtype=dtype)
    qkv = (qkv * 60).requires_grad_()  # scores far beyond what float16 holds
    out = region_attention(qkv, routes, heads=2, scale=1.0, backend=backend)
    out.float().square().mean().backward()
    wanted = brute_force(qkv.double(), routes, 2, 1.0)
    assert out.dtype == dtype
    assert (out.double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * wanted.abs().max()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["masked", "gather", "kernel"])
def test_gradients_are_the_same_every_time(backend):
    needs_kernel(backend)
    qkv, routes = problem(R=20, T=9, K=11)

    def gradient() -> Tensor:
        x = qkv.clone().requires_grad_()
        region_attention(x, routes, heads=2, scale=0.2, backend=backend).square().sum().backward()
        return x.grad

    assert torch.equal(gradient(), gradient())


def test_gather_sums_gradients_the_same_way_on_every_device():
    """The product with ones that other devices use, on the meta device for shapes and by hand for values."""
    x, routes = torch.randn(2, 6, 5, 8), torch.rand(2, 6, 6).topk(3).indices
    grad = torch.randn(2, 6, 3, 5, 8)
    ones = torch.zeros(2, 6, 18).scatter(1, routes.reshape(2, 1, 18), 1.0)
    x.requires_grad_()
    _routing._Picked.apply(x, routes).backward(grad)
    torch.testing.assert_close(x.grad, (ones @ grad.reshape(2, 18, 40)).view(2, 6, 5, 8))
    far = torch.empty(2, 6, 5, 8, device="meta", requires_grad=True)
    _routing._Picked.apply(far, routes.to("meta")).sum().backward()
    assert far.grad.shape == far.shape


def test_auto_chooses_by_the_geometry():
    needs_kernel("kernel")

    def names(tokens: list[int]) -> list[str]:
        sizes = zip(tokens, (64, 128, 256), (1, 4, 16), strict=True)
        return [choose(torch.empty(1, 49, T, 3 * C), torch.empty(1, 49, K), C // 32)[0] for T, C, K in sizes]

    assert names([64, 16, 4]) == ["gather", "gather", "masked"]  # 224 pixels
    assert names([361, 100, 25]) == ["kernel", "kernel", "kernel"]  # 512
    far = torch.empty(1, 49, 361, 192, device="meta")
    assert choose(far, torch.empty(1, 49, 1), 2)[0] == "gather"  # no kernel for that device


def test_a_model_uses_the_backend_that_was_named_and_records_it():
    images = torch.randn(1, 3, 64, 64)
    for backend in ("masked", "gather", "gather-reference"):
        with record() as calls, torch.inference_mode():
            timm.create_model("biformer_tiny", routing_backend=backend, **SMALL).eval()(images)
        found = [(call.backend, call.density) for call in calls if call.operator == _routing.OPERATOR]
        assert found == [(backend, 1 / 49), (backend, 4 / 49), (backend, 16 / 49)]


def test_kernel_is_refused_where_it_cannot_run():
    qkv, routes = problem(dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match=r'"kernel" cannot run on these tensors.*float64'):
        region_attention(qkv, routes, heads=2, scale=1.0, backend="kernel")


# ---------------------------------------------------------------- routing and regions


def test_routing_carries_no_gradient_and_is_made_in_float32():
    q = torch.ones(1, 2, 64, requires_grad=True)
    # 0.5 and 0.503 in 64 channels: 32.0 and 32.2, which bfloat16 rounds to the same
    k = torch.tensor([0.5, 0.503])[None, :, None].expand(1, 2, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        routes = route(q, k, 1)
    assert routes.tolist() == [[[1], [1]]]
    assert route(torch.randn(2, 9, 8), torch.randn(2, 9, 8), 30).shape == (2, 9, 9)  # fewer regions than picks
    # with every region picked it is dense attention, and has the gradient of that alone
    layer = BiLevelRoutingAttention(32, 49)
    x = torch.randn(1, 14, 14, 32)
    everything = layer(x)
    q, k, v = (part.unflatten(-1, (1, 32)) for part in layer.qkv(x).flatten(1, 2).chunk(3, -1))
    dense = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=32**-0.5)
    lepe = layer.lepe(v.transpose(1, 2).transpose(2, 3).reshape(1, 32, 14, 14)).permute(0, 2, 3, 1)
    wanted = layer.proj(dense.transpose(1, 2).reshape(1, 14, 14, 32) + lepe)
    for actual, plain in zip(
        *(torch.autograd.grad(y.square().sum(), layer.qkv.parameters()) for y in (everything, wanted)), strict=True
    ):
        torch.testing.assert_close(actual, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [7, "scaled"])
@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("height, width", [(1, 1), (5, 9), (8, 14), (25, 33), (56, 56), (64, 61)])
def test_regions_cut_any_map_and_put_it_together_again(height, width, floor, count):
    regions = cut(height, width, count, reference=14, floor=floor)
    pad_h, pad_w = regions.padding
    assert pad_h >= 0 and pad_w >= 0
    x = torch.randn(2, height, width, 3, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(3, dtype=torch.float64, requires_grad=True) if pad_h or pad_w else None
    split = regions.split(x, fill)
    assert torch.equal(regions.join(split), x)
    inputs = [t for t in (x, fill) if t is not None]
    padded = x
    if fill is not None:
        marked = regions.split(x, torch.full_like(fill, torch.nan))
        assert torch.equal(marked[0, :, :, 0].isfinite().sum(1), regions.inside(x.device))
        padded = fill.expand(2, height + pad_h, width + pad_w, 3).clone()
        padded[:, :height, :width] = x
    one_by_one = [
        padded[:, i * regions.region_height : (i + 1) * regions.region_height,
               j * regions.region_width : (j + 1) * regions.region_width].flatten(1, 2)
        for i in range(regions.rows) for j in range(regions.cols)
    ]  # fmt: skip
    wanted = torch.stack(one_by_one, 1)
    assert torch.equal(split, wanted)
    weight = torch.randn_like(wanted)
    for got, want in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (split, wanted)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_scaled_regions_are_seven_at_224_and_grow_with_the_image():
    for side in (56, 28, 14):
        same = cut(side, side, "scaled", reference=side, floor=False)
        assert (same.rows, same.cols) == (7, 7)
        large = cut(8 * side, 4 * side, "scaled", reference=side, floor=False)
        assert large.rows / 7 == pytest.approx(8 ** (2 / 3), rel=0.2)
        assert large.cols / 7 == pytest.approx(4 ** (2 / 3), rel=0.2)
    image = torch.randn(1, 3, 320, 256)
    model = timm.create_model("biformer_tiny", regions="scaled", **SMALL).eval()
    with record() as calls, torch.inference_mode():
        assert model(image).isfinite().all()
    densities = [call.density for call in calls if call.operator == _routing.OPERATOR]
    assert densities[2] < 16 / 49
    fixed = timm.create_model("biformer_tiny", **SMALL).eval()
    fixed.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(fixed(image[:, :, :224, :224]), model(image[:, :, :224, :224]))
        assert not torch.equal(fixed(image), model(image))


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_batch_rows_are_independent_at_odd_sizes(name):
    model = timm.create_model(name, **SMALL).eval()
    images = torch.randn(3, 3, 97, 131)
    with torch.inference_mode():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- tracing, precision, bad input


@pytest.mark.parametrize("backend", ["auto", "kernel"])
def test_compiles_whole_and_exports(backend):
    needs_kernel(backend)
    model = BiLevelRoutingAttention(64, 4, routing_backend=backend)
    x = torch.randn(2, 11, 19, 64)
    wanted, traced = model(x), torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(traced, wanted)
    traced.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    wanted.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-4)
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), wanted)
    ours = [node for node in program.graph.nodes if "mmeff" in str(node.target)]
    assert bool(ours) == (backend == "kernel")  # auto exports plain PyTorch


def test_a_whole_model_exports():
    model = timm.create_model("biformer_stl_nchw", **SMALL).eval()
    images = torch.randn(1, 3, 97, 131)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images))


@pytest.mark.parametrize("backend", ["gather", "masked", "kernel"])
def test_autocast_and_half_weights_train_finitely(backend):
    needs_kernel(backend)
    images = torch.randn(2, 3, 64, 64)
    model = timm.create_model("biformer_tiny", routing_backend=backend, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        model(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.inference_mode():
            assert model.eval().to(dtype)(images.to(dtype)).isfinite().all()


def test_bad_options_and_images_are_refused():
    def create(name: str = "biformer_tiny", **fields) -> BiFormer:
        return timm.create_model(name, **{**SMALL, **fields})

    with pytest.raises(ValueError, match=r"routing_backend must be one of .*got 'gathr'. Did you mean 'gather'"):
        create(routing_backend="gathr")
    with pytest.raises(ValueError, match=r"regions must be an int >= 1.*got 0"):
        create(regions=0)
    with pytest.raises(ValueError, match=r"form must be one of 'conv', 'stl', 'stl_nchw', got 'nhwc'"):
        create(form="nhwc")
    with pytest.raises(ValueError, match=r"widths must be multiples of 32.*got 48"):
        create(widths=(48, 64, 64, 64))
    with pytest.raises(ValueError, match=r"one entry for each of the 4 stages"):
        create(depths=(1, 1, 1))
    with pytest.raises(ValueError, match=r"topk must be at least 1"):
        create(topk=(0, 1, 1, None))
    with pytest.raises(ValueError, match=r"at least 32 pixels.*got 31 x 40"):
        create("biformer_stl")(torch.randn(1, 3, 31, 40))
    with pytest.raises(ValueError, match=r"regions must divide the maps.*got a map of 25 x 33"):
        create(auto_pad=False)(torch.randn(1, 3, 97, 131))
    strict = create(auto_pad=False).eval()
    assert strict(torch.randn(1, 3, 224, 224)).shape == (1, 5)
    with pytest.raises(mmeff.errors.UnknownMethod, match="biformer_tiny"):
        mmeff.vision_backbones.create_model("biformer_tny")
