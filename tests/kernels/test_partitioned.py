"""partitioned_attention against a statement of its rule pair by pair, in every backend, dtype and layout of memory."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from oracle import assert_close_to_reference

from mmeff.errors import BackendUnavailable
from mmeff.kernels import native_build, record
from mmeff.kernels.partitioned import explain_partitioned, native, partitioned_attention

COMPILER = os.environ.get("CC") or next(filter(shutil.which, native_build.COMPILERS), None)
needs_native = pytest.mark.skipif(
    COMPILER is None or native_build.instruction_set() is None, reason="no C compiler, or no AVX2"
)
BACKENDS = [pytest.param("native", marks=needs_native), "sdpa", "reference"]

# map, window, partition, shift, heads, D, shared queries, key mask
CASES = [
    ((4, 6), (2, 3), "window", (0, 0), 2, 4, False, False),
    ((4, 6), (2, 3), "grid", (0, 0), 1, 5, False, False),
    ((6, 4), (3, 2), "window", (1, 1), 2, 8, False, False),
    ((6, 6), (3, 3), "window", (2, 0), 1, 17, False, True),
    ((6, 8), (3, 4), "grid", (0, 0), 2, 33, False, True),
    ((4, 4), (2, 2), "window", (0, 0), 2, 16, True, True),
    ((7, 7), (7, 7), "window", (3, 3), 1, 32, True, False),
    ((5, 5), (1, 5), "window", (0, 2), 2, 3, False, False),
]
IDS = [f"{c[2]}-{c[0]}-{c[1]}-{c[3]}{'-shared' if c[6] else ''}{'-mask' if c[7] else ''}" for c in CASES]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def axis(i, length, window, partition, shift):
    """(window, place within it) of position i; positions before the shift are in a window of their own."""
    if partition == "grid":
        return i % (length // window), i // (length // window)
    j = (i - shift) % length
    return (j // window, i < shift), j % window


def brute(q, k, v, window, partition, shift, bias, mask, scale):
    """Attention pair by pair; q, k, v (B, H, W, heads, D)."""
    B, H, W, heads, D = k.shape
    where = {
        (x, y): (axis(x, H, window[0], partition, shift[0]), axis(y, W, window[1], partition, shift[1]))
        for x in range(H)
        for y in range(W)
    }
    rows = []
    for b in range(B):
        for (x, y), ((wx, px), (wy, py)) in where.items():
            seen = [
                (at, to)
                for at, to in where.items()
                if (to[0][0], to[1][0]) == (wx, wy) and (mask is None or mask[b % len(mask), at[0], at[1]])
            ]
            if not seen:
                rows.append(k.new_zeros(heads, D))
                continue
            query = q[b, x, y] if q.shape == k.shape else q[b, px, py]
            keys, values = (torch.stack([t[b, i, j] for (i, j), _ in seen]) for t in (k, v))  # (n, heads, D)
            scores = torch.einsum("hd,nhd->hn", query, keys) * scale
            if bias is not None:
                offsets = [(to[0][1] - px + window[0] - 1, to[1][1] - py + window[1] - 1) for _, to in seen]
                scores = scores + torch.stack([bias[:, i, j] for i, j in offsets], 1)
            rows.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values))
    return torch.stack(rows).view(B, H, W, heads, D)


def make(case, dtype=torch.float64, with_bias=True, seed=0):
    """q, k, v as slices of one tensor where q is a map, the bias, and the mask, which hides a whole window too."""
    (H, W), window, partition, shift, heads, D, shared, masked = case
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    q, k, v = randn(2, H, W, 3, heads, D).unbind(3)
    if shared:
        q = randn(2, *window, heads, D)
    bias = randn(heads, 2 * window[0] - 1, 2 * window[1] - 1) if with_bias else None
    mask = None
    if masked:
        mask = torch.rand(2, H, W, generator=g) < 0.6
        for x in range(H):
            for y in range(W):
                if axis(x, H, window[0], partition, 0)[0] == axis(0, H, window[0], partition, 0)[0]:
                    mask[0, x, y] = False
    return q, k, v, window, {"partition": partition, "shift": shift, "rel_bias": bias, "key_mask": mask}


def run_brute(q, k, v, window, rule, scale=None):
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    return brute(q, k, v, window, rule["partition"], rule["shift"], rule["rel_bias"], rule["key_mask"], scale)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward_and_gradients_equal_the_rule_in_float64(case, backend):
    q, k, v, window, rule = make(case)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, rule["rel_bias"])]
    rule["rel_bias"] = leaves[3]
    wanted = run_brute(*leaves[:3], window, rule, scale=0.3)
    actual = partitioned_attention(*leaves[:3], window, **rule, scale=0.3, backend=backend)
    # a few dozen float64 roundings: sums of at most 49 terms of size one
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-13)
    g = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, a, w in zip(
        ("q", "k", "v", "bias"),
        torch.autograd.grad(actual, leaves, g),
        torch.autograd.grad(wanted, leaves, g),
        strict=True,
    ):
        torch.testing.assert_close(a, w, rtol=0, atol=1e-12, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_low_precision_is_as_good_as_plain_pytorch(case, backend, dtype):
    q, k, v, window, rule = make(case, dtype)
    actual = partitioned_attention(q, k, v, window, **rule, backend=backend)
    wide = {**rule, "rel_bias": rule["rel_bias"].double()}
    reference = run_brute(q.double(), k.double(), v.double(), window, wide)
    plain = run_brute(q, k, v, window, rule)
    assert_close_to_reference(actual, plain, reference)


@needs_native
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_behind_the_native_forward(case):
    q, k, v, window, rule = make(case, torch.float32)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, rule["rel_bias"])]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    actual = partitioned_attention(*leaves[:3], window, **{**rule, "rel_bias": leaves[3]}, backend="native")
    wanted = run_brute(*wide[:3], window, {**rule, "rel_bias": wide[3]})
    g = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    for a, w in zip(torch.autograd.grad(actual, leaves, g), torch.autograd.grad(wanted, wide, g.double()), strict=True):
        torch.testing.assert_close(a.double(), w, rtol=1e-5, atol=2e-5)  # float32 sums of some dozens of terms


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias_and_with_float32_bias_for_half_precision(backend):
    q, k, v, window, rule = make(CASES[2], torch.bfloat16)
    with_half = partitioned_attention(q, k, v, window, **rule, backend=backend)
    rule["rel_bias"] = rule["rel_bias"].float()
    assert torch.equal(partitioned_attention(q, k, v, window, **rule, backend=backend), with_half)
    rule["rel_bias"] = None
    wanted = run_brute(q.double(), k.double(), v.double(), window, rule)
    assert_close_to_reference(
        partitioned_attention(q, k, v, window, **rule, backend=backend), run_brute(q, k, v, window, rule), wanted
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_do_not_matter_even_as_nan(backend):
    q, k, v, window, rule = make(CASES[3], torch.float32)
    clean = partitioned_attention(q, k, v, window, **rule, backend=backend)
    hidden = ~rule["key_mask"]
    k, v = k.clone(), v.clone()
    k[hidden], v[hidden] = torch.nan, torch.nan
    assert torch.equal(partitioned_attention(q, k, v, window, **rule, backend=backend), clean)


@needs_native
def test_native_does_not_depend_on_batch_threads_or_strides():
    q, k, v, window, rule = make(((14, 21), (7, 7), "window", (3, 3), 3, 32, False, False), torch.float32)
    together = partitioned_attention(q, k, v, window, **rule, backend="native")
    apart = [partitioned_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], window, **rule) for b in range(2)]
    assert torch.equal(together, torch.cat(apart))
    copied = partitioned_attention(*(x.contiguous() for x in (q, k, v)), window, **rule, backend="native")
    assert torch.equal(together, copied)
    turned = [x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for x in (q, k, v)]  # heads first in memory
    spread = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]  # gaps between channels
    for others in (turned, spread):
        assert torch.equal(partitioned_attention(*others, window, **rule, backend="native"), together)
    torch.set_num_threads(2)
    assert torch.equal(partitioned_attention(q, k, v, window, **rule, backend="native"), together)


@needs_native
def test_native_with_large_windows():
    """More keys than one run of sums, and channels that are no multiple of a vector."""
    q, k, v, window, rule = make(((14, 12), (14, 12), "window", (0, 0), 1, 40, False, False), torch.float32)
    wide = {**rule, "rel_bias": rule["rel_bias"].double()}
    reference = partitioned_attention(q.double(), k.double(), v.double(), window, **wide, backend="reference")
    plain = partitioned_attention(q, k, v, window, **rule, backend="sdpa")
    assert_close_to_reference(partitioned_attention(q, k, v, window, **rule, backend="native"), plain, reference)


# ---------------------------------------------------------------- as an operator


def test_the_operator_holds_under_opcheck():
    q, k, v, window, rule = make(CASES[3])
    rule["rel_bias"].requires_grad_()
    torch.library.opcheck(
        torch.ops.mmeff.partitioned_attention,
        (q, k, v, rule["rel_bias"], rule["key_mask"], window, "window", rule["shift"], 0.5, "auto"),
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_keeps_the_operator():
    """A traced graph must compute from its inputs, not replay what it saw."""
    q, k, v, window, _ = make(CASES[0], torch.float32)
    traced = torch.jit.trace(lambda q, k, v: partitioned_attention(q, k, v, window), (q, k, v), check_trace=False)
    assert torch.equal(traced(2 * q, k, v), partitioned_attention(2 * q, k, v, window))


def test_autocast_does_not_reach_inside():
    q, k, v, window, rule = make(CASES[0], torch.float32)
    wanted = partitioned_attention(q, k, v, window, **rule, backend="sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(partitioned_attention(q, k, v, window, **rule, backend="sdpa"), wanted)


def test_auto_and_explain_agree(monkeypatch):
    q, k, v, window, rule = make(CASES[0], torch.float32)
    for switched_off in (False, True):
        if switched_off:
            monkeypatch.setenv("MMEFF_NATIVE", "0")
        with record() as calls:
            partitioned_attention(q, k, v, window, **rule)
        assert [call.backend for call in calls] == [explain_partitioned(q, k, v, window, **rule).chosen]
        assert calls[0].density == pytest.approx(6 / 24)
    assert calls[0].backend == "sdpa"
    with pytest.raises(BackendUnavailable, match="MMEFF_NATIVE=0"):
        partitioned_attention(q, k, v, window, backend="native")
    assert native.unavailable() == "native kernels are switched off by MMEFF_NATIVE=0"


# ---------------------------------------------------------------- what is refused

GOOD = torch.zeros(1, 4, 6, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"window": 5},
            ValueError,
            "the window must divide the map, got a window of 5 rows on 4 .* pad the map to 5 rows",
        ),
        ({"window": (2, 7)}, ValueError, "got a window of 7 columns on 6 of the map 4 x 6"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 2.0}, TypeError, "window must be an integer or two"),
        ({"window": (2, 2, 2)}, TypeError, "window must be an integer or two"),
        ({"shift": 2}, ValueError, r"shift must be less than the window, got 2 of 2 rows; window // 2"),
        ({"partition": "grid", "shift": 1}, ValueError, "shift must be 0 with partition='grid'"),
        ({"partition": "grids"}, ValueError, "must be 'window' or 'grid', got 'grids'. Did you mean 'grid'"),
        ({"rel_bias": torch.zeros(2, 4, 4)}, ValueError, r"rel_bias must be .* = \(2, 3, 3\), got \(2, 4, 4\)"),
        ({"rel_bias": torch.zeros(2, 3, 3).double()}, ValueError, "rel_bias must be float32 or in the dtype of q"),
        ({"key_mask": torch.ones(1, 4, 6)}, ValueError, "key_mask must be bool"),
        ({"key_mask": torch.ones(3, 4, 6, dtype=torch.bool)}, ValueError, r"\(1 or 1, 4, 6\)"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite Python float"),
        ({"backend": "nativ"}, ValueError, "Did you mean 'native'"),
        ({"q": GOOD[:, :3]}, ValueError, r"q must be .* like k, \(1, 4, 6, 2, 8\), or one window that all share"),
        ({"q": GOOD[0]}, ValueError, "q must be .* without an empty dimension"),
        ({"q": GOOD.long()}, TypeError, "q must be a floating-point tensor, got torch.int64"),
        ({"k": GOOD.double()}, ValueError, "k must share dtype and device with q"),
        ({"v": GOOD[..., :4]}, ValueError, "k and v must have the same shape"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"q": GOOD, "k": GOOD, "v": GOOD, "window": 2, **change}
    with pytest.raises(error, match=words):
        partitioned_attention(**arguments)
