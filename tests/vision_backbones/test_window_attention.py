"""WindowAttention on timm's MaxViT, Swin, DaViT and GC ViT: same results, nothing left behind, truthful reports."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from functools import partial

import pytest
import timm
import torch
from timm.models.davit import DaVit
from timm.models.gcvit import GlobalContextVit
from timm.models.swin_transformer import SwinTransformer

import mmeff
from mmeff.errors import AlreadyAccelerated, NothingAccelerated, UnsupportedModel
from mmeff.kernels import native_build
from mmeff.vision_backbones import WindowAttention, any_size

COMPILER = os.environ.get("CC") or next(filter(shutil.which, native_build.COMPILERS), None)
needs_native = pytest.mark.skipif(
    COMPILER is None or native_build.instruction_set() is None, reason="no C compiler, or no AVX2"
)


def swin(**options):
    options = {"img_size": 32, "patch_size": 2, "window_size": 4, **options}
    return SwinTransformer(embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5, drop_path_rate=0.0, **options)


def gcvit(**options):
    return GlobalContextVit(
        img_size=64, window_size=(4, 4), embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5, **options
    )


def davit(**options):
    return DaVit(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4, num_classes=5, **options)


def maxvit(**options):
    return timm.create_model("test_maxvit", num_classes=5, img_size=64, **options)


# a model, the pixels it takes, its window attentions
MODELS = {
    "swin": (swin, (32, 32), 4),
    "swin padded": (partial(swin, img_size=(36, 44)), (36, 44), 4),
    "swin any size": (partial(swin, strict_img_size=False), (52, 40), 4),
    "gcvit": (gcvit, (64, 64), 4),
    "davit": (davit, (44, 60), 2),
    "maxvit": (maxvit, (64, 64), None),
}


def build(kind, dtype=torch.float64, **options):
    make, size, layers = MODELS[kind]
    torch.manual_seed(0)
    model = make(**options).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_()
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, x.to(dtype)


def instance_state(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("kind", MODELS)
def test_equals_timm_forward_and_gradients(kind):
    model, x = build(kind)
    x.requires_grad_()
    leaves = [x, *model.parameters()]
    wanted = model(x)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), leaves, allow_unused=True)
    with mmeff.accelerate(model, WindowAttention(when="always")) as handle:
        actual = model(x)
        grads = torch.autograd.grad(actual.square().sum(), leaves, allow_unused=True)
        report = handle.report()
    assert report.calls == {"sparse": len(report.layers), "full": 0, "dense": 0}
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    for a, w in zip(grads, wanted_grads, strict=True):
        if w is None:
            assert a is None
        else:
            torch.testing.assert_close(a, w, rtol=1e-9, atol=1e-9 * float(w.abs().max() + 1e-3))


@needs_native
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_is_close_to_timm_in_low_precision(kind, dtype):
    wide, x = build(kind)
    with torch.no_grad():
        wanted = wide(x)
        model, x = wide.to(dtype), x.to(dtype)
        stock = model(x)
        with mmeff.accelerate(model, "windowattention", backend="native") as handle:
            actual = model(x)
            assert set(handle.report().backends) == {"native"}
    floor = 4 * torch.finfo(dtype).eps * wanted.abs().max()
    assert (actual - wanted).abs().max() <= 2 * (stock - wanted).abs().max() + floor


@pytest.mark.parametrize("kind", MODELS)
def test_remove_restores_bits_and_leaves_nothing(kind):
    model, x = build(kind, torch.float32)
    state, keys = instance_state(model), list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        handle = mmeff.accelerate(model, WindowAttention(when="always"))
        assert list(model.state_dict()) == keys
        assert not torch.equal(model(x), before)
        handle.enabled = False
        assert torch.equal(model(x), before)
        handle.enabled = True
        handle.remove()
        assert torch.equal(model(x), before)
    assert instance_state(model) == state


@pytest.mark.parametrize("kind", ["swin", "davit"])
def test_copies_and_pickles_are_timms_own(kind):
    model, x = build(kind, torch.float32)
    with torch.no_grad():
        before = model(x)
        with mmeff.accelerate(model, WindowAttention(when="always")) as handle:
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                calls = handle.report().calls
                assert torch.equal(other(x), before)
                assert handle.report().calls == calls and handle.recorder.forwards == 0
            model(x)


def test_no_method_of_timms_classes_is_touched():
    classes = [type(module) for module in build("swin")[0].modules()]
    methods = [dict(vars(cls)) for cls in classes]
    model, other = build("swin", torch.float32)[0], build("swin", torch.float32)[0]
    with torch.no_grad(), mmeff.accelerate(model, WindowAttention(when="always")) as handle:
        x = build("swin", torch.float32)[1]
        other(x)
        assert handle.report().calls == {}
        model(x)
    assert methods == [dict(vars(cls)) for cls in classes]


@pytest.mark.parametrize("kind", ["gcvit", "davit"])
def test_exports_with_the_operator(kind):
    model, x = build(kind, torch.float32)
    with torch.no_grad():
        mmeff.accelerate(model, WindowAttention(when="always"))
        program = torch.export.export(model, (x,))
        assert any("mmeff.partitioned_attention" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), model(x))


def test_compiles_whole():
    model, x = build("swin", torch.float32)
    with torch.no_grad():
        mmeff.accelerate(model, WindowAttention(when="always"))
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


# ---------------------------------------------------------------- MaxViT at any size


def test_pad_lets_maxvit_take_any_size_while_it_is_installed():
    model, x = build("maxvit", torch.float32)
    odd = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        with mmeff.accelerate(model, WindowAttention()), pytest.raises(AssertionError, match="divisible"):
            model(torch.zeros(1, 3, 96, 96))
        with pytest.raises(RuntimeError, match="must match the size"):  # the shortcut of an odd map
            model(odd)
        with mmeff.accelerate(model, WindowAttention(pad=True)) as handle:
            actual = model(odd)
            assert handle.report().calls["dense"] == 0
        with pytest.raises(RuntimeError, match="must match the size"):
            model(odd)
        torch.testing.assert_close(any_size(model)(odd), actual)


# ---------------------------------------------------------------- what it says


@needs_native
def test_faster_takes_what_was_measured_and_says_why_not():
    model, x = build("swin", torch.float32)
    with torch.inference_mode(), mmeff.accelerate(model, WindowAttention()) as handle:
        model(x)
        report = handle.report()
    assert report.calls == {"sparse": 4, "full": 0, "dense": 0} and report.backends == {"native": 4}
    assert report.layers[0]["density"] == pytest.approx(16 / 256)
    assert report.host == "swin" and not report.fallbacks

    with (
        pytest.raises(NothingAccelerated, match=r"a backward pass may follow.*infer under torch\.no_grad"),
        mmeff.accelerate(model, WindowAttention()),
    ):
        model(x)
    model, x = build("swin", torch.float64)
    with (
        torch.no_grad(),
        pytest.raises(NothingAccelerated, match=r"computes in float32, and this is torch\.float64"),
        mmeff.accelerate(model, WindowAttention()),
    ):
        model(x)
    model, x = build("davit", torch.float32)
    with (
        torch.no_grad(),
        pytest.raises(NothingAccelerated, match="is fused and has no bias"),
        mmeff.accelerate(model, WindowAttention()),
    ):
        model(x)


def test_without_a_compiler_faster_leaves_everything_to_timm(monkeypatch):
    monkeypatch.setenv("MMEFF_NATIVE", "0")
    model, x = build("swin", torch.float32)
    with torch.no_grad():
        wanted = model(x)
        handle = mmeff.accelerate(model, WindowAttention())
        assert torch.equal(model(x), wanted)
    report = handle.report()
    assert report.calls == {"sparse": 0, "full": 0, "dense": 4}
    assert "switched off by MMEFF_NATIVE=0" in next(iter(report.fallbacks))


def test_dropped_attention_weights_stay_with_timm():
    model, x = build("swin", torch.float32, attn_drop_rate=0.2)
    model.train()
    drops = pytest.raises(NothingAccelerated, match=r"drops attention weights in training \(attn_drop=0.2\)")
    with torch.no_grad(), drops, mmeff.accelerate(model, WindowAttention(when="always")):
        model(x)


@needs_native
def test_plan_is_what_happens():
    for kind in ("swin", "gcvit", "davit", "maxvit"):
        model, x = build(kind, torch.float32)
        height, width = x.shape[2:]
        with torch.no_grad():
            plan = mmeff.plan(model, "windowattention", height=height, width=width, batch=2)
            handle = mmeff.accelerate(model, WindowAttention())
            model(x)
            handle.remove()
        report = handle.report()
        taken, total = report.calls["sparse"], sum(report.calls.values())
        assert f"{taken} of {total} window attentions" in dict(plan.rows)["layers"]
        assert set(plan.fallbacks) == set(report.fallbacks)
        assert plan.host == kind


def test_plan_under_grad_names_the_backward_pass_and_computes_nothing():
    model, _ = build("swin", torch.float32)
    before = instance_state(model)
    plan = mmeff.plan(model, WindowAttention(), height=32)
    assert "0 of 4 window attentions" in str(plan)
    assert "a backward pass may follow" in str(plan)
    assert "windows of 4 x 4 on 16 x 16, 2 heads of 8, batch 1: with timm" in str(plan)
    assert instance_state(model) == before
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_plan_says_that_timm_refuses_a_size():
    model, _ = build("maxvit", torch.float32)
    with torch.no_grad():
        refused = mmeff.plan(model, WindowAttention(), height=96, width=160)
        padded = mmeff.plan(model, WindowAttention(pad=True), height=97, width=131)
    assert any("timm refuses it, because the window does not divide the map" in reason for reason in refused.fallbacks)
    assert not any("refuses" in reason for reason in padded.fallbacks)


# ---------------------------------------------------------------- what is refused


def test_models_that_no_host_knows():
    with pytest.raises(
        UnsupportedModel, match=r"no host of stage 'vision_backbones' knows .*Linear.*davit \(timm davit_\*\)"
    ):
        mmeff.accelerate(torch.nn.Linear(2, 2), "windowattention")
    with pytest.raises(UnsupportedModel, match="no host"):
        mmeff.accelerate(timm.create_model("test_vit"), WindowAttention())
    with pytest.raises(UnsupportedModel, match="takes methods of stage vision_backbones: WindowAttention"):
        mmeff.accelerate(build("swin")[0], "fastv")


def test_states_that_cannot_be_served():
    model, _ = build("swin", torch.float32)
    with pytest.raises(UnsupportedModel, match=r"wrapped by torch\.compile; accelerate the model before"):
        mmeff.accelerate(torch.compile(model), WindowAttention())
    with (
        mmeff.accelerate(model, WindowAttention()),
        pytest.raises(AlreadyAccelerated, match="already runs windowattention"),
    ):
        mmeff.accelerate(model, WindowAttention())
    padded = any_size(build("maxvit", torch.float32)[0])
    with pytest.raises(UnsupportedModel, match="was replaced by a AnySize; take that back first"):
        mmeff.accelerate(padded, WindowAttention())


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"backends": "native"}, TypeError, "WindowAttention has no field 'backends'. Did you mean 'backend'"),
        (
            {"backend": "cuda"},
            TypeError,
            r"WindowAttention\.backend must be one of 'auto', 'native', 'sdpa', 'reference'",
        ),
        ({"when": True}, TypeError, r"WindowAttention\.when must be one of 'faster', 'always'"),
        ({"pad": 1}, TypeError, r"WindowAttention\.pad must be bool, got 1"),
    ],
)
def test_bad_fields(fields, error, words):
    with pytest.raises(error, match=words):
        mmeff.accelerate(build("swin")[0], WindowAttention, **fields)


def test_bad_plan_sizes():
    model, _ = build("swin", torch.float32)
    with pytest.raises(TypeError, match=r"a plan for the swin host has no size 'heigth'.*Did you mean 'height'"):
        mmeff.plan(model, "windowattention", heigth=224)
    with pytest.raises(ValueError, match="plan needs batch >= 1, got 0"):
        mmeff.plan(model, "windowattention", batch=0)
