"""GNA's windows against the rule of NATTEN written out pair by pair, and what runs in tile order against its mask."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time

import numpy as np
import pytest
import torch
from attend_oracle import check_attend, video_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from small_wan import generate, make_pipe

import mmeff
from mmeff.diffusion_attn import GNA
from mmeff.diffusion_attn._ordered import OrderedLayout
from mmeff.diffusion_attn.gna import _PRESETS
from mmeff.errors import BackendUnavailable
from mmeff.kernels import BlockLayout, native_build
from mmeff.kernels.neighborhood.layout import window_layout
from mmeff.kernels.neighborhood.tiling import pick_tile
from mmeff.kernels.simulator import simulate
from mmeff.registry import build

ALL = ("all", "all", "all")
HAS_COMPILER = os.environ.get("CC") or any(map(shutil.which, native_build.COMPILERS))
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        not HAS_COMPILER or native_build.instruction_set() is None, reason="no C compiler or no AVX2"
    ),
)

# ---------------------------------------------------------------------------- the rule, pair by pair


def sees(i: int, j: int, L: int, w: int, s: int, d: int, causal: bool) -> bool:
    """Whether key j is in the window of query i on one axis."""
    if i % d != j % d:
        return False
    q, k, n = i // d, j // d, len(range(i % d, L, d))
    if causal:
        leader = min(q // s * s + s - 1, n - 1)
        return k <= q and leader - k < w
    leader = min(q // s * s + s // 2, n - 1)
    left, right = w // 2, w // 2 + w % 2 - 1
    centre = min(max(leader, left), n - 1 - right)
    return centre - left <= k <= centre + right


def oracle(grid, window, stride=(1, 1, 1), dilation=(1, 1, 1), causal=(False,) * 3, text=0) -> torch.Tensor:
    per_axis = [
        np.array([[sees(i, j, L, *rule) for j in range(L)] for i in range(L)])
        for L, *rule in zip(grid, window, stride, dilation, causal, strict=True)
    ]
    tokens = list(itertools.product(*map(range, grid)))
    N = len(tokens)
    mask = np.ones((N + text, N + text), bool)
    for a, q in enumerate(tokens):
        for b, k in enumerate(tokens):
            mask[a, b] = all(table[i, j] for table, i, j in zip(per_axis, q, k, strict=True))
    return torch.from_numpy(mask)


def mask_of(layout) -> torch.Tensor:
    """The dense mask in the order of the video."""
    if isinstance(layout, OrderedLayout):
        return layout.layout.to_dense_mask()[0, 0][layout.inverse][:, layout.inverse]
    return layout.to_dense_mask()[0, 0]


@st.composite
def cases(draw):
    grid = draw(st.tuples(*[st.integers(1, 7)] * 3))
    dilation = tuple(draw(st.integers(1, min(2, n))) for n in grid)
    window = tuple(draw(st.integers(1, n // d)) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    causal = tuple(draw(st.booleans()) for _ in range(3))
    tile = draw(st.one_of(st.none(), st.tuples(*[st.integers(1, 4)] * 3)))
    return grid, window, stride, dilation, causal, draw(st.integers(0, 5)), tile


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_every_pair_of_the_rule(case):
    grid, window, stride, dilation, causal, text, tile = case
    method = GNA(window=window, stride=stride, dilation=dilation, causal=causal, tile=tile, block=9)
    expected = oracle(grid, window, stride, dilation, causal, text)
    layout = method.layout(grid=grid, text_len=text)
    kernel = method.kernel_layout(grid=grid, text_len=text)
    assert torch.equal(mask_of(layout), expected) and torch.equal(mask_of(kernel), expected)
    assert isinstance(kernel, OrderedLayout) or tile is None
    share = int(expected.sum()) / len(expected) ** 2
    assert layout.density == pytest.approx(share) and kernel.density == pytest.approx(share)
    assert kernel.is_full == layout.is_full == bool(expected.all())


def test_the_inward_window_of_freeswim():
    d_h, d_w, grid = 1, 2, (2, 5, 9)
    expected = torch.zeros(90, 90, dtype=torch.bool)
    for (a, (_, h, w)), (b, (_, y, x)) in itertools.product(enumerate(itertools.product(*map(range, grid))), repeat=2):
        # the window slides inward at a border, so that it keeps its size
        top, left = min(max(h - d_h, 0), 5 - (2 * d_h + 1)), min(max(w - d_w, 0), 9 - (2 * d_w + 1))
        expected[a, b] = top <= y <= top + 2 * d_h and left <= x <= left + 2 * d_w
    assert torch.equal(mask_of(GNA(window=("all", 3, 5)).layout(grid=grid)), expected)


# ---------------------------------------------------------------------------- attend


@pytest.mark.parametrize("backend", ["auto", NATIVE, "gather", "sdpa", "reference"])
@pytest.mark.parametrize(
    ("grid", "text", "valid", "fields"),
    [
        ((4, 6, 8), 0, None, {"window": (3, 3, 5), "tile": (2, 3, 4)}),
        ((3, 5, 7), 4, None, {"window": (3, 3, 3), "stride": (2, 3, 1), "tile": (2, 2, 3)}),
        ((3, 5, 7), 13, (13, 5), {"window": ("all", 3, 0.5), "tile": (2, 2, 3)}),
        ((3, 5, 7), 9, (0, 9), {"window": (2, 4, 3), "tile": (2, 4, 4)}),
        ((5, 7, 11), 3, (1, 3), {"window": (3, 2, 3), "dilation": (1, 2, 3), "causal": (True, False, False)}),
        ((1, 1, 13), 0, None, {"window": (1, 1, 4), "stride": (1, 1, 3), "tile": (6, 8, 5)}),
        ((2, 3, 5), 0, None, {}),
    ],
    ids=[
        "divides",
        "ragged and text",
        "padded text",
        "no text at all",
        "dilated, causal",
        "larger than grid",
        "default",
    ],
)
def test_attend_is_attention_under_the_mask_of_the_layout(grid, text, valid, fields, backend):
    method = GNA(backend=backend, block=16, **fields)
    valid = None if valid is None else torch.tensor(valid)
    if backend == "sdpa" and valid is not None:
        with pytest.raises(BackendUnavailable, match="empty rows"):
            check_attend(method, grid, text, text_valid=valid)
    else:
        check_attend(method, grid, text, text_valid=valid)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attend_in_other_dtypes(dtype):
    check_attend(GNA(window=(3, 3, 3), tile=(2, 2, 3)), (3, 5, 7), 4, dtype=dtype)


def test_a_layout_in_video_order_may_be_passed_too():
    method, grid = GNA(window=(2, 3, 3), tile=(2, 2, 2), block=8), (3, 5, 4)
    valid = torch.tensor([2, 6])
    for layout in (method.layout(grid=grid, text_len=6), method.kernel_layout(grid=grid, text_len=6)):
        check_attend(method, grid, 6, text_valid=valid, layout=layout)


def test_batch_rows_are_independent_and_repeat():
    method, grid = GNA(window=(2, 3, 3), tile=(2, 2, 2)), (3, 5, 4)
    q, k, v, _ = video_tensors(grid, 5)
    valid = torch.tensor([1, 4])
    both = method.attend(q, k, v, grid=grid, text_len=5, text_valid=valid)
    assert torch.equal(both, method.attend(q, k, v, grid=grid, text_len=5, text_valid=valid))
    for b in range(2):
        row = slice(b, b + 1)
        alone = method.attend(q[row], k[row], v[row], grid=grid, text_len=5, text_valid=valid[row])
        torch.testing.assert_close(both[row], alone)


def test_first_used_while_sampling_then_in_training():
    method, grid = GNA(window=(3, 3, 2), tile=(2, 2, 2)), (3, 5, 3)  # a grid of its own, so that nothing is kept yet
    q, k, v, dout = video_tensors(grid)
    with torch.inference_mode():
        expected = method.attend(q, k, v, grid=grid).clone()
    q.requires_grad_()
    out = method.attend(q, k, v, grid=grid)
    out.backward(dout)
    assert torch.equal(out.detach(), expected) and q.grad.abs().max() > 0


# ---------------------------------------------------------------------------- windows


def test_windows_of_layers_cycle():
    method = GNA(window=(1, 3, 3), windows_per_layer=((-1, 3, 3), None, ALL), tile=(2, 2, 2))
    grid = (3, 4, 5)
    for layer, window in enumerate([(3, 3, 3), (1, 3, 3), grid] * 2):
        assert torch.equal(mask_of(method.layout(grid=grid, layer=layer)), oracle(grid, window))
        check_attend(method, grid, layer=layer)
    keys = [method.layout_key(layer) for layer in range(6)]
    assert keys[:3] == keys[3:] and len(set(keys)) == 3
    assert method.kernel_layout(grid=grid, layer=2).is_full and not method.kernel_layout(grid=grid, layer=1).is_full


def test_windows_travel_through_yaml(tmp_path):
    method = GNA(
        window=(-1, 12, 0.3), windows_per_layer=(("all", 12, 24), None, (0.5, 1.0, 1)), stride=(1, 4, 1), tile=(2, 4, 8)
    )
    assert method.window == ("all", 12, 0.3)
    method.to_yaml(tmp_path / "gna.yaml")
    assert build(tmp_path / "gna.yaml") == method and hash(method) == hash(build(method.to_dict()))
    method = build({"method": "gna", "windows_per_layer": [["all", 12, 24], None, [-1, 28, 56]]})
    assert method.windows_per_layer == (("all", 12, 24), None, ("all", 28, 56))


def test_fractions_serve_any_grid():
    method = GNA(window=(0.5, 0.25, 1.0))
    assert [a.window for a in method.rule((5, 30, 7)).axes] == [3, 8, 7]  # rounded half up
    assert [a.window for a in method.rule((1, 1, 1)).axes] == [1, 1, 1]
    assert GNA(window=(1, 1, 1)).layout(grid=(3, 4, 5)).density == 1 / 60  # 1 is a token, 1.0 the axis


def test_the_window_of_everything_is_dense_attention():
    for fields in ({"window": ALL}, {"window": (1.0, 1.0, 1.0)}, {"window": (3, 5, 7)}, {"window": ALL, "stride": 99}):
        method = GNA(tile=(2, 2, 2), **fields)
        assert method.layout(grid=(3, 5, 7), text_len=4).is_full and method.kernel_layout(grid=(3, 5, 7)).is_full


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": (0, 3, 3)}, r"GNA\.window must hold numbers of tokens >= 1, .* got 0 along F"),
        ({"window": (3, 1.5, 3)}, r"GNA\.window must hold .* fractions of the axis in \(0, 1\].* got 1\.5 along H"),
        ({"window": (3, -2, 3)}, r"got -2 along H"),
        ({"windows_per_layer": (None, (3, 3, float("nan")))}, r"GNA\.windows_per_layer\[1\] must hold .* got nan"),
        (
            {"window": (4, 4, 4), "stride": (1, 5, 1)},
            r"GNA\.stride must be <= the window .* stride 5 and GNA\.window 4 along H",
        ),
        ({"window": ALL, "dilation": 2}, r"GNA\.window must be a number or a fraction along a dilated axis"),
        ({"stride": 0}, r"GNA\.stride must be >= 1"),
        ({"dilation": (1, 0, 1)}, r"GNA\.dilation must be >= 1"),
        ({"tile": (0, 1, 1)}, r"GNA\.tile must be >= 1 token along every axis"),
        ({"block": 0}, r"GNA\.block must be >= 1 token"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        GNA(**fields)


@pytest.mark.parametrize("window", [(3, 3), (3, 3, 3, 3), ("half", 3, 3), (True, 3, 3), 3, ((3, 3, 3),)])
def test_windows_of_another_form(window):
    with pytest.raises(TypeError, match=r"GNA\.window must be tuple of"):
        GNA(window=window)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"window": (4, 9, 8)},
            r"GNA\.window \* dilation must be <= the grid .* got 9 \* 1 along H of 8 tokens .* at most 8, .*'all'",
        ),
        ({"window": (4, 4, 8), "dilation": (1, 1, 2)}, r"got 8 \* 2 along W of 9 tokens .* at most 4"),
        ({"window": (0.5, 4, 4), "stride": (3, 1, 1)}, r"stride 3 and GNA\.window 2 along F at \(4, 8, 9\)"),
        ({"windows_per_layer": (None, (5, 1, 1))}, r"GNA\.windows_per_layer\[1\] \* dilation .* got 5 \* 1 along F"),
        ({"dilation": (5, 1, 1)}, r"GNA\.dilation must be <= the grid .* got 5 along F of 4 tokens"),
    ],
)
def test_grids_that_do_not_fit(fields, message):
    method = GNA(**fields)
    for ask in (
        method.check_grid,
        method.rule,
        lambda grid: method.layout(grid=grid),
        lambda g: method.kernel_layout(grid=g),
    ):
        with pytest.raises(ValueError, match=message):
            ask((4, 8, 9))


def test_a_window_that_no_layer_has_is_not_held_against_a_grid():
    GNA(window=(9, 9, 9), windows_per_layer=((1, 1, 1),)).check_grid((2, 2, 2))


# ---------------------------------------------------------------------------- settings and cost


def test_presets_serve_the_grids_they_are_for():
    grids = {"hunyuanvideo": (30, 48, 80), "wan-freeswim": (21, 68, 120), "wan-freeswim-720p": (21, 68, 120)}
    for name, (_, source) in _PRESETS.items():
        assert source
        GNA.for_model(name).check_grid(grids.get(name, (16, 44, 80)))
    cosmos = GNA.for_model("Cosmos-2B")
    densities = [cosmos.layout(grid=(2, 44, 80), layer=layer).density for layer in range(28)]
    assert [round(1 - x, 2) for x in densities[:3]] == [0.92, 0.55, 0.92]  # "90 %" and "50 %" in round numbers
    assert [layer for layer, x in enumerate(densities) if x == 1] == [15, 18, 19, 23]
    assert GNA.for_model("cosmos-50", dense_steps=2).dense_steps == 2
    with pytest.raises(ValueError, match=r"no published setting for 'hunyuan'\. Did you mean 'hunyuanvideo'"):
        GNA.for_model("hunyuan")
    with pytest.raises(TypeError, match="no field 'windows'"):
        GNA.for_model("cosmos-90", windows=3)


def test_hunyuan_video_reaches_the_bound_of_the_simulator():
    method, grid = GNA.for_model("hunyuanvideo"), (30, 48, 80)
    bound = simulate(grid, method.window, method.stride, q_tile=(2, 8, 8), kv_tile=(2, 8, 8))
    kernel = method.kernel_layout(grid=grid)
    assert pick_tile(method.rule(grid)) == (2, 8, 8)
    assert kernel.layout.visited_blocks == bound.visited_tiles and kernel.layout.partial_share == 0
    assert kernel.predicted_speedup(1.0) == pytest.approx(100 / 9) and bound.tile_bound == pytest.approx(100 / 9)
    assert kernel.density == method.layout(grid=grid).density == pytest.approx(0.09)
    sliding = method.replace(stride=1, tile=(2, 8, 8)).kernel_layout(grid=grid)
    assert sliding.predicted_speedup(1.0) == pytest.approx(5.44, abs=0.005)


@pytest.mark.parametrize("what", ["layout", "kernel_layout"])
def test_hunyuan_video_builds_in_50_ms(what):
    method, seconds = GNA.for_model("hunyuanvideo"), []
    for _ in range(7):
        window_layout.cache_clear()
        started = time.process_time()  # of this process, because others share the machine
        getattr(method, what)(grid=(30, 48, 80))
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.050, seconds


@pytest.mark.parametrize(
    ("grid", "fields"),
    [
        ((30, 48, 80), {"window": (18, 24, 24)}),
        ((8, 30, 52), {}),
        ((21, 45, 80), {"window": ("all", 15, 27)}),
        ((13, 44, 80), {"window": ("all", 12, 24), "stride": (1, 4, 8)}),
        ((21, 30, 52), {"window": (5, "all", "all")}),
        ((13, 31, 37), {"window": (5, 11, 11)}),
        ((13, 44, 80), {"window": ("all", 4, 16), "dilation": (1, 11, 5)}),
    ],
    ids=["sliding", "default", "all frames", "cosmos", "frames only", "primes", "dilated"],
)
def test_the_order_that_was_picked_is_the_cheaper_one(grid, fields):
    """Within a tenth: what raster order costs is an estimate."""
    method, N = GNA(**fields), math.prod(grid)
    kernel, raster = method.kernel_layout(grid=grid), method.layout(grid=grid)

    def work(layout):
        return layout.visited_blocks * layout.q_block * layout.kv_block / N**2

    rule = method.rule(grid)
    others = [work(window_layout(rule, tile=tile, block=128, text_len=0).layout) for tile in ((2, 8, 8), (4, 4, 8))]
    found = work(kernel if isinstance(kernel, BlockLayout) else kernel.layout)
    assert found <= 1.1 * min(work(raster), *others)
    if isinstance(kernel, OrderedLayout):
        assert 64 <= kernel.layout.q_block <= 128 and found < work(raster)


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), (1, 1, 500), (61, 1, 1), (3, 67, 71)])
def test_a_tile_is_found_for_any_grid(grid):
    tile = pick_tile(GNA(window=(1, 1, 1)).rule(grid))
    assert tile is None or (math.prod(tile) <= 128 and all(t <= n for t, n in zip(tile, grid, strict=True)))


def test_layouts_go_to_the_device_of_q_and_stay_with_what_they_are_made_from():
    method, grid = GNA(window=(3, 3, 3), tile=(2, 2, 2)), (4, 5, 6)
    q = torch.empty(1, 120, 1, 8, device="meta")
    on_meta = method.kernel_layout(grid=grid, q=q)
    assert on_meta.layout.device.type == on_meta.perm.device.type == on_meta.inverse.device.type == "meta"
    assert method.kernel_layout(grid=grid, q=q) is on_meta
    assert method.layout(grid=grid, q=q).device.type == "meta"
    with torch.device("meta"):
        assert method.kernel_layout(grid=(4, 5, 7)).layout.device.type == "cpu"
    here = method.kernel_layout(grid=grid)
    assert here.layout is method.kernel_layout(grid=grid).layout and here.perm is method.kernel_layout(grid=grid).perm


# ---------------------------------------------------------------------------- in a pipeline


def test_plan_and_report_show_what_runs_in_tile_order(monkeypatch):
    pipe = make_pipe()
    method = GNA(windows_per_layer=((3, 3, 3), (2, "all", 3)), tile=(2, 3, 3))  # a grid of 5 x 6 x 6
    plan = mmeff.plan(pipe, method, height=48, width=48, num_frames=9, num_inference_steps=2)
    with mmeff.accelerate(pipe, method) as handle:
        tiled = generate(pipe)
    report = handle.report()
    densities = [method.layout(grid=(5, 6, 6), layer=layer).density for layer in range(3)]
    assert plan.density == pytest.approx(report.density) == pytest.approx(sum(densities) / 3)
    assert [report.layers[layer]["density"] for layer in range(3)] == pytest.approx(densities)
    kernels = [method.kernel_layout(grid=(5, 6, 6), layer=layer) for layer in range(3)]
    blocks = kernels[0].layout
    assert plan.layouts["video"] is blocks and (blocks.q_block, blocks.nQ, blocks.q_len) == (18, 12, 216)
    factor = 3 / sum(1 / kernel.predicted_speedup() for kernel in kernels)
    assert dict(plan.rows)["predicted attention speedup"] == f"{factor:.2f}x where sparse"
    assert report.spans["permute"] == 2 * report.calls["sparse"]
    monkeypatch.setattr(GNA, "kernel_layout", GNA.layout)
    with mmeff.accelerate(pipe, method) as handle:
        torch.testing.assert_close(tiled, generate(pipe), atol=2e-5, rtol=1e-5)
    assert "permute" not in handle.report().spans
