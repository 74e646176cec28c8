"""What timm and its users ask of a backbone, asked of every name that `mmeff.vision_backbones` registers.

The names come from the registry, so that a new family is tested without being mentioned here. Names whose small models
(`small_backbones.py`) are the same, attribute for attribute, are tested together. What needs no numbers (cfgs, feature maps at
the published size) is tested for every name at full size on the meta device. Compiling and exporting take seconds, so that
they are tested once for models that differ in numbers only.

Tolerances: the same operations on the same shapes must give the same bits. Where sums may run in another order (other batch sizes,
compiled graphs) float32 is granted 1e-4, and gradients, which cancel, 1e-3. Other bounds say why where they stand.
"""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay
from torch import nn

from .small_backbones import (
    CLASSES,
    DISTINCT,
    FEATURES,
    KINDS,
    NAMES,
    SIZE,
    SMALL,
    class_of,
    count_stages,
    images,
    in_nchw,
    maps_of,
    small,
    stages_of,
)

NO_DROP = {"drop_path_rate": 0.0}
# Relative error of half precision: ten times the worst that was seen, since another processor may round, and so route, differently.
HALF = {torch.bfloat16: 0.1, torch.float16: 0.015}

every_name = pytest.mark.parametrize("name", NAMES)
every_model = pytest.mark.parametrize("name", [pytest.param(names[0], id="=".join(names)) for names in DISTINCT])
every_kind = pytest.mark.parametrize("name", [pytest.param(names[0], id="=".join(names)) for names in KINDS])


# ---------------------------------------------------------------- the registry


def test_timm_keeps_its_own_names() -> None:
    """Also a name that timm would gain in a later version: it is left to timm, and not counted as ours."""
    script = """
        import timm
        from timm.models import _registry as registry

        @timm.models.register_model
        def nat_mini(pretrained=False, **kwargs):
            raise AssertionError("timm's own")

        def state():
            return dict(registry._model_entrypoints), dict(registry._model_pretrained_cfgs), set(timm.list_models())

        points, cfgs, names = state()
        import mmeff.vision_backbones as backbones
        new_points, new_cfgs, new_names = state()
        assert all(new_points[name] is point for name, point in points.items()), "an entry point was replaced"
        assert all(new_cfgs[name] == cfg for name, cfg in cfgs.items()), "a cfg was replaced"
        # `vision_tower` wraps backbones and is none
        assert new_names - names - {"vision_tower"} == set(backbones.registered()), new_names - names
        assert names <= new_names, names - new_names
        assert "nat_mini" not in backbones.registered() and "nat_tiny" in backbones.registered()
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr


def test_every_family_is_registered() -> None:
    assert {class_of(name) for name in NAMES} >= set(SMALL), "SMALL names a class that nothing registered makes"


@every_name
def test_cfg_is_complete_and_true(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    for key in ("input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "num_classes", "license", "tag"):
        assert getattr(cfg, key), f"{key} of {name} is empty"
    assert not cfg.url and not cfg.hf_hub_id, "nothing is offered for download"
    assert (cfg.mean, cfg.std) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    model: Any = timm.create_model(name, device="meta")
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model.num_classes == cfg.num_classes
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    assert model.get_submodule(cfg.first_conv).in_channels == 3
    entry_point = timm.model_entrypoint(name)
    assert entry_point.__doc__ and entry_point.__module__.startswith("mmeff.")


@every_name
def test_features_at_the_published_size(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    model: Any = timm.create_model(name, device="meta", features_only=True)
    channels, size = cfg.input_size[0], cfg.input_size[1:]
    maps = model(torch.empty(2, channels, *size, device="meta"))
    assert len(maps) == len(model.feature_info.channels()) >= 1
    for x, width, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert x.shape == (2, width, *(n // reduction for n in size))
    assert maps[-1].shape[2:] == cfg.pool_size


# ---------------------------------------------------------------- forward, backward


@every_model
def test_forward_and_backward_reach_every_parameter(name: str) -> None:
    model = small(name)
    y = model(images())
    assert y.shape == (2, CLASSES) and y.isfinite().all()
    torch.testing.assert_close(model(images()), y, rtol=0, atol=0)
    model.train()
    model(images()).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), f"{key} has no effect"


@every_model
def test_rows_of_a_batch_are_independent(name: str) -> None:
    """A row of NaN next to a picture changes nothing of it; alone the picture gives the same up to the order of sums."""
    model, x = small(name), images(3)
    y = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), y[i : i + 1], rtol=1e-4, atol=1e-5)
    poisoned = x.clone()
    poisoned[1] = torch.nan
    torch.testing.assert_close(model(poisoned)[[0, 2]], y[[0, 2]], rtol=0, atol=0)


@every_model
@pytest.mark.parametrize("size", [(97, 131), (33, 47)], ids=str)
def test_odd_sizes(name: str, size: tuple[int, int]) -> None:
    model = small(name)
    x = images(2, *size)
    if timm.get_pretrained_cfg(name).fixed_input_size:
        with pytest.raises(ValueError, match="set_input_size"):
            model(x)
        model.set_input_size(size)
    y = model(x)
    assert y.shape == (2, CLASSES) and y.isfinite().all()
    for found, info in zip(maps_of(model, x), model.feature_info, strict=True):
        steps = zip(size, found.shape[2:], strict=True)
        assert all(n // info["reduction"] <= length <= -(-n // info["reduction"]) for n, length in steps)


@every_model
def test_one_channel_and_no_pooling(name: str) -> None:
    gray = small(name, in_chans=1)
    assert gray.in_chans == 1 and gray(images(chans=1)).shape == (2, CLASSES)
    model = small(name, num_classes=0, global_pool="")
    x = images()
    unpooled = model(x)
    torch.testing.assert_close(unpooled, model.forward_features(x), rtol=0, atol=0)
    assert unpooled.ndim == 4 and model.num_features in (unpooled.shape[1], unpooled.shape[3])


@every_model
def test_drop_rates_act_in_training_only(name: str) -> None:
    x = images(4)
    for rates in ({"drop_path_rate": 0.8}, {"drop_rate": 0.8}):
        model, plain = small(name, **rates), small(name, **NO_DROP)
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
        model.train()
        assert not torch.equal(model(x), model(x)), f"{rates} has no effect"


# ---------------------------------------------------------------- features


@every_model
def test_intermediates_are_the_features(name: str) -> None:
    model, x = small(name), images()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    assert len(maps) == len(model.feature_info)
    for found, info in zip(maps, model.feature_info, strict=True):
        side = SIZE // info["reduction"]
        assert found.shape == (2, info["num_chs"], side, side)

    getter = small(name, features_only=True, **FEATURES.get(class_of(name), {}))
    getter.load_state_dict({f"model.{key}": value for key, value in model.state_dict().items()}, strict=False)
    modules = [info["module"] for info in model.feature_info]
    taken = [modules.index(module) for module in getter.feature_info.module_name()]
    features = getter(x)
    assert getter.feature_info.channels() == [f.shape[1] for f in features]
    for found, i in zip(features, taken, strict=True):
        torch.testing.assert_close(found, maps[i], rtol=0, atol=0)


@every_model
def test_intermediates_take_every_option(name: str) -> None:
    model, x = small(name), images()
    final, maps = model.forward_intermediates(x)
    last = len(maps) - 1
    half = list(range(last // 2 + 1))
    for indices, wanted in ((1, maps[-1:]), ([0], maps[:1]), ([-1], maps[-1:]), (half, maps[: len(half)])):
        torch.testing.assert_close(maps_of(model, x, indices=indices), wanted, rtol=0, atol=0)
    calls = count_stages(model)
    (early,) = maps_of(model, x, indices=[0], stop_early=True)
    torch.testing.assert_close(early, maps[0], rtol=0, atol=0)
    assert calls == [1] + [0] * last, "stop_early ran a stage behind the last one asked for"
    normed = maps_of(model, x, norm=True)[-1]
    torch.testing.assert_close(normed, in_nchw(model, final), rtol=0, atol=0)
    for output_fmt in ("NHWC", "NLC", "NCHW"):
        try:
            found = maps_of(model, x, output_fmt=output_fmt)[-1]
        except (ValueError, AssertionError) as error:
            assert output_fmt != "NCHW" and "NCHW" in str(error)
            continue
        as_nchw = found if output_fmt == "NCHW" else found.permute(0, 3, 1, 2)
        torch.testing.assert_close(as_nchw, maps[-1], rtol=0, atol=0)


@every_model
def test_pruning_keeps_the_features(name: str) -> None:
    x = images()
    whole = small(name)
    maps, final = maps_of(whole, x), whole.forward_features(x)
    for i, wanted in enumerate(maps):
        model = small(name)
        assert list(model.prune_intermediate_layers([i])) == [i]
        found = maps_of(model, x, indices=[i])[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        fewer = sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())
        assert fewer and model.num_classes == 0
        is_last = i == len(maps) - 1
        torch.testing.assert_close(
            in_nchw(model, model(x)), in_nchw(whole, final) if is_last else wanted, rtol=0, atol=0
        )


# ---------------------------------------------------------------- the head


@every_model
def test_head(name: str) -> None:
    model, x = small(name), images()
    final = model.forward_features(x)
    pooled = in_nchw(model, final).mean((2, 3))
    features = model.forward_head(final, pre_logits=True)
    torch.testing.assert_close(features, pooled)
    assert features.shape == (2, model.num_features) and model.head_hidden_size == model.num_features
    torch.testing.assert_close(model.forward_head(final), model(x), rtol=0, atol=0)
    torch.testing.assert_close(model.get_classifier()(features), model(x))

    model.reset_classifier(3)
    assert model.num_classes == 3 and model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model(x), in_nchw(model, final).amax((2, 3)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), final, rtol=0, atol=0)
    model.reset_classifier(4, "catavgmax")
    assert model(x).shape == (2, 4) and model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5) and model.head_hidden_size == model.num_features


# ---------------------------------------------------------------- training tools


@every_model
def test_checkpointing_changes_nothing_but_memory(name: str) -> None:
    found = []
    for enable in (False, True):
        model = small(name, **NO_DROP).train()
        model.set_grad_checkpointing(enable)
        block = stages_of(model)[0].blocks[0]
        calls: list[None] = []
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        y = model(images())
        y.square().sum().backward()
        found.append((y, {key: p.grad for key, p in model.named_parameters()}, len(calls)))
    (y, grads, once), (y_again, grads_again, twice) = found
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(y_again, y, rtol=0, atol=0)
    torch.testing.assert_close(grads_again, grads, rtol=1e-5, atol=1e-6)


@every_model
@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])
def test_parameter_groups_cover_everything(name: str, coarse: bool) -> None:
    model = small(name)
    matcher = model.group_matcher(coarse=coarse)
    classifier = f"{model.pretrained_cfg['classifier']}."
    patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
    for key, _ in model.named_parameters():
        assert key.startswith(classifier) or any(re.match(pattern, key) for pattern in patterns), key

    skipped = model.no_weight_decay()
    assert skipped <= {key for key, _ in model.named_parameters()}
    assert skipped >= {key for key, _ in model.named_parameters() if key.endswith(("rpb", "bias_table"))}


@every_model
def test_layer_wise_learning_rates(name: str) -> None:
    """timm's own tool makes groups of them: the stem learns least, the head most, each parameter once, biases without decay."""
    model = small(name)
    keys = {id(p): key for key, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale, decay = {}, {}
    for group in groups:
        for parameter in group["params"]:
            key = keys.pop(id(parameter))
            scale[key], decay[key] = group["lr_scale"], group["weight_decay"]
    assert not keys, f"not in any group: {sorted(keys.values())}"
    classifier = model.pretrained_cfg["classifier"]
    stem = {value for key, value in scale.items() if key.startswith("stem")}
    assert stem == {min(scale.values())} and scale[f"{classifier}.weight"] == max(scale.values()) == 1.0
    for key, parameter in model.named_parameters():
        assert (decay[key] == 0) == (parameter.ndim < 2 or key in model.no_weight_decay()), key


# ---------------------------------------------------------------- copies and files


@every_model
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    model, x = small(name), images()
    y = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(twin.parameters())).mul_(2.0)
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    assert not torch.equal(twin(x), y)

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), y, rtol=0, atol=0)

    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    other = small(name)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(load_file(file))
    torch.testing.assert_close(other(x), y, rtol=0, atol=0)
    # as users load weights: through timm and the checkpoint filter
    kwargs = {"num_classes": CLASSES, **SMALL.get(class_of(name), {})}
    cfg = {"file": str(file), "num_classes": CLASSES}
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **kwargs).eval()
    torch.testing.assert_close(loaded(x), y, rtol=0, atol=0)


@every_model
def test_device_and_dtype_arguments(name: str) -> None:
    for tensor in (*(meta := small(name, device="meta")).parameters(), *meta.buffers()):
        assert tensor.device.type == "meta"
    model = small(name, dtype=torch.float64)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float64 or not tensor.is_floating_point(), key
    x = images().double()
    y = model(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(model.float()(x.float()), y.float(), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- half precision


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "cast"])
def test_half_precision(name: str, autocast: bool, dtype: torch.dtype) -> None:
    """Close to float32; and finite, forward and backward, on pictures of 0 to 255 that somebody forgot to normalise."""
    x = images()
    raw = 255 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    wanted = small(name)(x)
    model = small(name, **NO_DROP) if autocast else small(name, **NO_DROP).to(dtype)
    with torch.autocast("cpu", dtype=dtype) if autocast else nullcontext():
        y, y_raw = (model(given if autocast else given.to(dtype)) for given in (x, raw))
    assert (y.float() - wanted).norm() <= HALF[dtype] * wanted.norm()
    assert y_raw.isfinite().all()
    y_raw.float().square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


# ---------------------------------------------------------------- compiled and exported


@every_kind
def test_compiles_into_one_graph(name: str) -> None:
    """With gradients; the graph runs the same operators, in an order that rounding may see."""
    model, x = small(name, **NO_DROP), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = model(x)
    y.square().sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    found = compiled(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close({key: p.grad for key, p in model.named_parameters()}, grads, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@every_kind
def test_exports(name: str) -> None:
    model, x = small(name), images()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@every_kind
def test_runs_in_onnx(name: str) -> None:
    """Families without an operator of ours: ONNX knows no neighborhood attention."""
    model, x = small(name), images()
    program = torch.export.export(model, (x,))
    if any(str(node.target).startswith("mmeff.") for node in program.graph.nodes):
        pytest.skip("it runs an operator of ours, which ONNX does not know")
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    torch.testing.assert_close(converted(x)[0], model(x), rtol=1e-3, atol=1e-4)
