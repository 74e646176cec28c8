"""neighborhood_attention: every backend against the rule in float64, in forward and gradient, and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_oracle import CASES, attend_with, check, plain, results, tensors
from oracle import assert_close_to_reference

from mmeff.errors import BackendUnavailable
from mmeff.kernels import merge_attention, record
from mmeff.kernels.neighborhood import (
    explain_neighborhood,
    na_scores,
    na_values,
    neighborhood_attention,
    plan,
    tiles,
    unfused,
)

property_test = settings(max_examples=20, deadline=None)

BACKENDS = ["tiles", "reference", "partitioned", "dense"]
APPLIES = {"dense": {"covered"}, "partitioned": {"covered", "windows"}}
CASE_BACKENDS = [
    pytest.param(case, backend, id=f"{backend}: {case}")
    for backend in BACKENDS
    for case in CASES
    if case in APPLIES.get(backend, CASES)
]


# ---------------------------------------------------------------- against the oracle


@pytest.mark.parametrize(("case", "backend"), CASE_BACKENDS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "rel_bias and extra keys"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", ""])
def test_cases(case, backend, extras, with_lse):
    grid, *rule = CASES[case]
    check(backend, rule, tensors(grid, rule[0], T=3 * extras, bias=extras), with_lse)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", ""])
def test_cases_on_the_block_sparse_kernels(case, with_lse):
    grid, *rule = CASES[case]
    check("blocks", rule, tensors(grid, rule[0], D=16), with_lse, times=4.0)  # flash-like: one more rounding of dP


def test_blocks_refuse_what_they_cannot_add():
    q, k, v, bias, ek, ev = tensors((6, 7), (3, 3), T=2, bias=True)
    with pytest.raises(BackendUnavailable, match="add no relative bias"):
        neighborhood_attention(q, k, v, 3, rel_bias=bias, backend="blocks")
    with pytest.raises(BackendUnavailable, match="extra keys are not part of the grid"):
        neighborhood_attention(q, k, v, 3, extra_k=ek, extra_v=ev, backend="blocks")


@pytest.mark.parametrize("backend", ["tiles", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", ""])
def test_dtypes(backend, dtype, with_lse):
    inputs = tensors((9, 14), (5, 4), D=24, T=5, bias=True, dtype=dtype)
    check(backend, [(5, 4), (1, 2), (1, 3), (False, False)], inputs, with_lse)


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", ""])
def test_a_float32_bias_with_half_inputs(with_lse):
    rule = [(5, 4), (1, 2), (1, 2), (False, False)]
    inputs = tensors((9, 14), (5, 4), dtype=torch.bfloat16)
    inputs[3] = tensors((9, 14), (5, 4), bias=True)[3]
    check("tiles", rule, inputs, with_lse)


@pytest.mark.parametrize("backend", ["tiles", "reference"])
@pytest.mark.parametrize("Hk", [1, 2, 4])
def test_grouped_queries(backend, Hk):
    inputs = tensors((9, 10), (3, 5), H=4, Hk=Hk, T=2, bias=True)
    check(backend, [(3, 5), (1, 2), (2, 1), (False, False)], inputs)


@pytest.mark.parametrize("budget", [1, 40_000, 2**40])
@pytest.mark.parametrize("sides", [(2, 3), (4, 4), (9, 14)])
def test_any_tile_and_any_chunk_give_the_same(monkeypatch, budget, sides):
    monkeypatch.setattr(tiles, "CHUNK_BYTES_PER_THREAD", budget)  # 1 also puts every key head apart
    monkeypatch.setattr(tiles, "choose_tiles", lambda *_: (sides, 1.0))
    inputs = tensors((9, 14), (5, 4), T=3, bias=True)
    check("tiles", [(5, 4), (1, 2), (1, 3), (False, False)], inputs)


def test_scale_is_honoured():
    inputs = tensors((7, 6), (3, 3), bias=True)
    for backend in ("tiles", "reference"):
        check(backend, [(3, 3), (1, 1), (1, 1), (False, False)], inputs, scale=0.7)


@pytest.mark.parametrize("which", ["out", "lse", "both"])
def test_gradcheck(which):
    rule = [(3, 2), (1, 2), (1, 2), (False, True)]
    inputs = [
        x.requires_grad_() for x in tensors((4, 5), (3, 2), B=1, H=2, Hk=1, D=3, T=1, bias=True, dtype=torch.float64)
    ]

    def attend(*inputs):
        out, lse = attend_with("tiles", rule)(*inputs)
        return {"out": out, "lse": lse, "both": (out, lse)}[which]

    assert torch.autograd.gradcheck(attend, inputs)


def test_gradients_of_some_inputs_only():
    rule = [(3, 3), (1, 1), (1, 1), (False, False)]
    inputs = tensors((7, 6), (3, 3), T=2, bias=True)
    attend = attend_with("tiles", rule, with_lse=False)
    cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
    everything = [x.clone().requires_grad_() for x in inputs]
    attend(*everything)[0].backward(cotangent)
    for i in range(6):
        some = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        attend(*some)[0].backward(cotangent)
        assert torch.equal(some[i].grad, everything[i].grad)
        assert all(x.grad is None for j, x in enumerate(some) if j != i)


# ---------------------------------------------------------------- what it must equal


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(20,), (5, 6), (3, 4, 5)])
def test_a_window_as_large_as_the_grid_is_dense_attention(grid):
    q, k, v, *_ = tensors(grid, grid)
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*flat, enable_gqa=True).transpose(1, 2).unflatten(1, grid)
    for backend in ("auto", "dense", "partitioned", "tiles", "reference"):
        close(neighborhood_attention(q, k, v, grid, backend=backend), want)


@pytest.mark.parametrize("dilation", [1, 3])
def test_stride_as_large_as_the_window_is_attention_within_windows(dilation):
    B, H, D, w, n = 2, 2, 8, 4, 2  # windows of w x w, n of them along each axis; dilated: MaxViT's grid, n times
    L = w * n * dilation
    q, k, v, *_ = tensors((L, L), (w, w), B=B, H=H, Hk=H, D=D)

    def windows(x):
        x = x.view(B, n, w, dilation, n, w, dilation, H, D)
        return x.permute(0, 1, 3, 4, 6, 7, 2, 5, 8).reshape(-1, H, w * w, D)

    out = F.scaled_dot_product_attention(*map(windows, (q, k, v)))
    out = out.view(B, n, dilation, n, dilation, H, w, w, D).permute(0, 1, 6, 2, 3, 7, 4, 5, 8).reshape(q.shape)
    for backend in ("auto", "partitioned", "tiles"):
        close(neighborhood_attention(q, k, v, w, stride=w, dilation=dilation, backend=backend), out)


def test_extra_keys_share_the_softmax():
    inputs = tensors((6, 7), (3, 3), T=5)
    q, k, v, _, ek, ev = inputs
    got, lse = neighborhood_attention(q, k, v, 3, extra_k=ek, extra_v=ev, return_lse=True, backend="tiles")
    near = neighborhood_attention(q, k, v, 3, return_lse=True)
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, ek, ev)]
    scores = flat[0] @ flat[1].repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
    text = F.scaled_dot_product_attention(*flat, enable_gqa=True).transpose(1, 2)
    out, merged = merge_attention([near[0].flatten(1, 2), text], [near[1].flatten(2), scores.logsumexp(-1)])
    close(got.flatten(1, 2), out)
    close(lse.flatten(2), merged)


def test_scalars_stand_for_every_axis_and_numbers_for_their_own():
    q, k, v, *_ = tensors((8, 8), (3, 3))
    want = neighborhood_attention(q, k, v, (3, 3), stride=(2, 2), dilation=(2, 2), causal=(True, True))
    assert torch.equal(neighborhood_attention(q, k, v, 3, stride=2, dilation=2, causal=True), want)
    assert not torch.equal(neighborhood_attention(q, k, v, 3, stride=2, dilation=2, causal=(True, False)), want)


@property_test
@given(st.data())
def test_any_rule_in_any_backend(data):
    n = data.draw(st.integers(1, 3))
    rule = [[], [], [], []]
    grid = []
    for _ in range(n):
        w, d = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2))
        grid.append(data.draw(st.integers(w * d, max(w * d, 16 // n))))
        each = (w, data.draw(st.integers(1, w)), d, data.draw(st.booleans()))
        for values, value in zip(rule, each, strict=True):
            values.append(value)
    inputs = tensors(grid, rule[0], B=1, D=4, T=data.draw(st.integers(0, 2)), bias=data.draw(st.booleans()))
    want = results(lambda q, k, v, *rest: plain(q, k, v, rule, *rest), inputs)
    bias, extra_k, extra_v = inputs[3:]
    for row in explain_neighborhood(
        *inputs[:3], *rule[:1], stride=rule[1], dilation=rule[2], causal=rule[3], rel_bias=bias, extra_k=extra_k,
        extra_v=extra_v,
    ).rows:  # fmt: skip
        if row.usable and row.backend != "triton":
            got = results(attend_with(row.backend, rule), inputs)
            for name in want:
                close(got[name], want[name])


@property_test
@given(st.permutations(range(4)), st.integers(0, 1000))
def test_head_permutation_equivariance(order, seed):
    q, k, v, bias, *_ = tensors((6, 7), (3, 4), H=4, Hk=4, bias=True, seed=seed)
    out = neighborhood_attention(q, k, v, (3, 4), rel_bias=bias)
    q, k, v = (x[..., order, :] for x in (q, k, v))
    close(neighborhood_attention(q, k, v, (3, 4), rel_bias=bias[order]), out[..., order, :])


def test_batch_rows_are_independent():
    q, k, v, *_ = tensors((6, 7), (3, 3), B=3)
    want = neighborhood_attention(q, k, v, 3, backend="tiles")
    k[1], v[2] = 1e4, torch.nan
    got = neighborhood_attention(q, k, v, 3, backend="tiles")
    assert torch.equal(got[0], want[0]) and not torch.equal(got[1], want[1]) and got[2].isnan().all()


# ---------------------------------------------------------------- memory, autocast, compilation


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("with_lse", [True, False])
def test_fresh_memory_full_of_nan_does_not_leak(poisoned_memory, with_lse):
    rule = [(3, 4), (2, 1), (2, 3), (False, False)]
    check("tiles", rule, tensors((9, 13), (3, 4), T=2, bias=True), with_lse)


def test_views_of_a_fused_projection_and_heads_first_storage():
    qkv = torch.randn(2, 6, 7, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.unbind(3)
    for backend in ("tiles", "reference"):
        want = neighborhood_attention(*(x.contiguous() for x in (q, k, v)), 3, backend=backend)
        assert torch.equal(neighborhood_attention(q, k, v, 3, backend=backend), want)
        views = [x.movedim(-2, 1).contiguous().movedim(1, -2) for x in (q, k, v)]
        assert torch.equal(neighborhood_attention(*views, 3, backend=backend), want)
    rule = [(3, 3), (1, 1), (1, 1), (False, False)]
    inputs = [*views, tensors((6, 7), (3, 3), bias=True)[3].transpose(1, 2), None, None]
    check("tiles", rule, inputs)


def test_autograd_keeps_inputs_and_output_and_no_scores():
    inputs = [x.requires_grad_() for x in tensors((16, 16), (7, 7), bias=True)[:4]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = neighborhood_attention(*inputs[:3], 7, rel_bias=inputs[3], backend="tiles")
    assert {x.data_ptr() for x in kept if x.numel()} <= {x.data_ptr() for x in (*inputs, out)}


def test_first_used_in_inference_mode_still_trains():
    rule = [(3, 5), (1, 1), (1, 1), (False, False)]
    inputs = tensors((10, 13), (3, 5), bias=True)
    plan.make_plan.cache_clear()
    with torch.inference_mode():
        attend_with("tiles", rule)(*inputs)
        na_scores(*inputs[:2], (3, 5))
    check("tiles", rule, inputs)


@pytest.mark.parametrize("backend", ["tiles", "reference"])
def test_autocast_does_not_reach_inside(backend):
    rule = [(3, 3), (1, 1), (1, 1), (False, False)]
    inputs = tensors((6, 7), (3, 3), T=2, bias=True)
    want = results(attend_with(backend, rule), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(attend_with(backend, rule), inputs)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("with_lse", [True, False])
def test_compiles_to_one_graph(with_lse):
    rule = [(3, 3), (1, 1), (1, 1), (False, False)]
    inputs = tensors((6, 7), (3, 3), T=2, bias=True)
    attend = attend_with("auto", rule, with_lse)
    want = results(attend, inputs, with_lse)
    torch._dynamo.reset()
    got = results(torch.compile(attend, fullgraph=True, backend="aot_eager"), inputs, with_lse)
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("with_lse", [True, False])
def test_the_operator_is_registered_as_pytorch_wants_it(with_lse):
    inputs = [x.requires_grad_() for x in tensors((5, 6), (3, 2), B=1, T=2, bias=True)]
    rest = ([3, 2], [1, 2], [1, 2], [False, True], 0.3, with_lse, "tiles")
    torch.library.opcheck(torch.ops.mmeff.neighborhood_attention.default, (*inputs, *rest))
    bare = [x.requires_grad_() for x in tensors((5, 6), (3, 2), B=1)[:3]]
    torch.library.opcheck(torch.ops.mmeff.neighborhood_attention.default, (*bare, None, None, None, *rest))


# ---------------------------------------------------------------- the choice of a backend


def test_what_auto_chooses_and_records_without_a_compiler(monkeypatch):
    monkeypatch.setenv("MMEFF_NATIVE", "0")
    q, k, v, *_ = tensors((28, 28), (7, 7), B=1, D=32)
    cases = {
        "dense": {"window": 7, "dilation": 4},
        "partitioned": {"window": 7, "stride": 7},
        "tiles": {"window": 7},
    }
    for name, arguments in cases.items():
        table = explain_neighborhood(q, k, v, **arguments)
        assert table.chosen == name, table
        with record() as calls:
            neighborhood_attention(q, k, v, **arguments)
        assert [(c.operator, c.backend) for c in calls] == [("neighborhood_attention", name)]
        assert calls[0].density == pytest.approx(49 / 28**2)
    text = str(table)
    assert "grid 28x28, window 7x7" in text and "window 7 x dilation 1 is less than 28 tokens" in text


def test_large_grids_run_on_the_block_sparse_kernels():
    q, k, v, *_ = (
        x if x is None else x.expand(1, 24, 45, 80, -1, 64) for x in tensors((1, 1, 1), (1, 1, 1), B=1, D=64)
    )
    assert explain_neighborhood(q, k, v, (6, 24, 24), stride=(1, 8, 8)).chosen == "blocks"
    q, k, v, *_ = tensors((4, 6, 7), (3, 3, 3))
    with record() as calls:
        neighborhood_attention(q, k, v, 3, backend="blocks")
    assert [c.operator for c in calls] == ["neighborhood_attention", "block_sparse_attention"]
    assert "within neighborhood_attention" in calls[1].reason


def test_a_backward_pass_is_not_a_call():
    q, k, v, *_ = (x if x is None else x.requires_grad_() for x in tensors((6, 7), (3, 3)))
    with record() as calls:
        neighborhood_attention(q, k, v, 3, backend="tiles").sum().backward()
    assert len(calls) == 1


def test_named_backends_refuse_what_they_cannot_do():
    q, k, v, *_ = tensors((8, 8), (3, 3))
    with pytest.raises(BackendUnavailable, match="window 3 x dilation 1 is less than 8 tokens"):
        neighborhood_attention(q, k, v, 3, backend="dense")
    with pytest.raises(BackendUnavailable, match="window 4, stride 2 and dilation 1 on 8 tokens"):
        neighborhood_attention(q, k, v, 4, stride=2, backend="partitioned")
    for backend in ("dense", "partitioned"):
        with pytest.raises(BackendUnavailable, match="axis 0 is causal"):
            neighborhood_attention(q, k, v, 8, stride=8, causal=(True, False), backend=backend)
    with pytest.raises(BackendUnavailable, match="run on a CUDA device, and the tensors are on cpu"):
        neighborhood_attention(q, k, v, 3, backend="triton")
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*'tiles'.* Did you mean 'tiles'"):
        neighborhood_attention(q, k, v, 3, backend="tile")


# ---------------------------------------------------------------- scores and values apart


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_bytes", [1, 2**40])
def test_scores_softmax_values_is_the_operator(monkeypatch, case, chunk_bytes):
    monkeypatch.setattr(unfused, "CHUNK_BYTES", chunk_bytes)
    grid, *rule = CASES[case]
    if chunk_bytes == 1 and math.prod(grid) > 60:
        grid, rule = CASES["2-D causal rows"][0], CASES["2-D causal rows"][1:]
    window, stride, dilation, causal = rule
    where = {"stride": stride, "dilation": dilation, "causal": causal}

    def attend(q, k, v, rel_bias, extra_k, extra_v):
        scores = na_scores(q, k, window, rel_bias=rel_bias, **where)
        assert scores.shape == (*q.shape[:1], q.shape[-2], *grid, math.prod(window))
        return na_values(scores.softmax(-1), v, window, **where), scores.logsumexp(-1)

    inputs = tensors(grid, window, bias=True, dtype=torch.float64)
    got = results(attend, inputs)
    want = results(lambda q, k, v, *rest: plain(q, k, v, rule, *rest), inputs)
    for name in want:
        assert_close_to_reference(got[name], want[name], want[name], name=name)


def test_scores_are_in_key_order_and_hidden_ones_are_minus_infinity():
    q = torch.ones(1, 4, 3, 1, 1)
    k = torch.arange(12.0).view(1, 4, 3, 1, 1)  # the score is the key's number
    scores = na_scores(q, k, (2, 3), causal=(True, False), scale=1.0)
    assert scores[0, 0, 2, 1].tolist() == [3, 4, 5, 6, 7, 8]
    assert scores[0, 0, 0, 1].tolist() == [-torch.inf] * 3 + [0, 1, 2]
    weights = torch.full_like(scores, torch.nan).where(scores == -torch.inf, 1.0)
    assert na_values(weights, k, (2, 3), causal=(True, False))[0, 0, 1].item() == 3, "hidden weights count for nothing"


def test_gradients_of_scores_and_values():
    q, k, v, bias, *_ = tensors((4, 3), (2, 3), B=1, H=2, Hk=1, D=2, bias=True, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]

    def attend(q, k, v, bias):
        return na_values(na_scores(q, k, (2, 3), rel_bias=bias).tanh(), v, (2, 3))

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


# ---------------------------------------------------------------- errors

ERRORS = {
    "window too large": ({"window": (3, 10)}, ValueError, r"10 \* 1 = 10 on axis 1 with 9 tokens of the grid \(8, 9\)"),
    "dilated too far": ({"window": 3, "dilation": (3, 1)}, ValueError, r"3 \* 3 = 9 on axis 0 .* at most 2 there"),
    "window 0": ({"window": (3, 0)}, ValueError, r"window must be at least 1 on every axis, got 0 on axis 1"),
    "window of wrong length": ({"window": (3, 3, 3)}, ValueError, r"one integer or 2, .* got 3: \(3, 3, 3\)"),
    "window of wrong type": ({"window": 3.0}, TypeError, r"window must be an integer or a sequence of 2 integers, got 3.0"),
    "window a bool": ({"window": (True, 3)}, TypeError, r"window must be an integer .* got \(True, 3\)"),
    "stride above window": ({"window": 3, "stride": 4}, ValueError, r"stride 4 and window 3 on axis 0"),
    "stride 0": ({"window": 3, "stride": (1, 0)}, ValueError, r"stride 0 and window 3 on axis 1"),
    "dilation 0": ({"window": 3, "dilation": 0}, ValueError, r"dilation must be at least 1 on every axis, got 0"),
    "causal": ({"window": 3, "causal": 1}, TypeError, r"causal must be True, False or 2 of them, .* got 1"),
    "bias shape": (
        {"window": (3, 4), "rel_bias": torch.zeros(4, 5, 5)}, ValueError, r"= \(4, 5, 7\), got \(4, 5, 5\)",
    ),
    "bias dtype": (
        {"window": 3, "rel_bias": torch.zeros(4, 5, 5).double()}, ValueError, r"float32 or in the dtype of q.* got torch.float64",
    ),
    "one of the extras": ({"window": 3, "extra_k": torch.zeros(2, 1, 2, 8)}, ValueError, r"got no extra_v"),
    "extra shape": (
        {"window": 3, "extra_k": torch.zeros(2, 1, 4, 8), "extra_v": torch.zeros(2, 1, 4, 8)}, ValueError,
        r"extra_k must be \(B, T, Hk, D\) = \(2, T, 2, 8\) .* got \(2, 1, 4, 8\)",
    ),
    "extras differ": (
        {"window": 3, "extra_k": torch.zeros(2, 1, 2, 8), "extra_v": torch.zeros(2, 3, 2, 8)}, ValueError,
        r"must have the same shape, got \(2, 1, 2, 8\) and \(2, 3, 2, 8\)",
    ),
    "scale": ({"window": 3, "scale": math.nan}, ValueError, r"scale must be a finite Python float, got nan"),
    "k grid": ({"window": 3, "k": torch.zeros(2, 8, 8, 2, 8)}, ValueError, r"same shape .* got k \(2, 8, 8, 2, 8\)"),
    "kv grid": (
        {"window": 3, "k": torch.zeros(2, 8, 8, 2, 8), "v": torch.zeros(2, 8, 8, 2, 8)}, ValueError,
        r"agree in batch, grid and head width, got q \(2, 8, 9, 4, 8\) and k \(2, 8, 8, 2, 8\)",
    ),
    "heads": (
        {"window": 3, "k": torch.zeros(2, 8, 9, 3, 8), "v": torch.zeros(2, 8, 9, 3, 8)}, ValueError, r"got H=4 and Hk=3",
    ),
    "dtype": ({"window": 3, "v": torch.zeros(2, 8, 9, 2, 8).half()}, ValueError, r"got v torch.float16 on cpu"),
    "integer tensor": ({"window": 3, "q": torch.zeros(2, 8, 9, 4, 8).int()}, TypeError, r"q must be a floating-point"),
    "flat": ({"window": 3, "q": torch.zeros(2, 4, 8)}, ValueError, r"\(B, \*grid, H, D\) .* got shape \(2, 4, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    change, kind, message = ERRORS[name]
    q, k, v, *_ = tensors((8, 9), (3, 3))
    with pytest.raises(kind, match=message):
        neighborhood_attention(**{"q": q, "k": k, "v": v, **change})
    with pytest.raises(kind, match=message):
        explain_neighborhood(**{"q": q, "k": k, "v": v, **change})


def test_errors_of_scores_and_values():
    q, k, v, *_ = tensors((8, 9), (3, 3))
    with pytest.raises(ValueError, match="na_scores: stride must be between 1 and the window, got stride 4"):
        na_scores(q, k, 3, stride=4)
    with pytest.raises(ValueError, match=r"na_values: weights must be .* = \(2, H, 8, 9, 9\) .* got \(2, 4, 8, 9, 8\)"):
        na_values(torch.zeros(2, 4, 8, 9, 8), v, 3)
    with pytest.raises(ValueError, match=r"na_values: .* got H=3 and Hk=2"):
        na_values(torch.zeros(2, 3, 8, 9, 9), v, 3)
    with pytest.raises(TypeError, match=r"na_values: v must be a floating-point tensor, got torch.int32"):
        na_values(torch.zeros(2, 4, 8, 9, 9), v.int(), 3)
