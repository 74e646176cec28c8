"""The native backend of block_sparse_attention: every path against float64, and what must not change a result."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_reference, gradient_terms, plain_attention

from mmeff.kernels import BlockLayout, native_build
from mmeff.kernels.block_sparse import native
from mmeff.kernels.block_sparse.problem import BackwardProblem, Problem
from mmeff.kernels.layout import Bounds, rules

COMPILER = os.environ.get("CC") or next(filter(shutil.which, native_build.COMPILERS), None)
# a compiler that refuses the source is a failure of these tests, not a reason to skip them
pytestmark = pytest.mark.skipif(
    COMPILER is None or native_build.instruction_set() is None, reason="no C compiler, or no AVX2"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(B, Nq, Nk, H, Hk, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, Nq, H, D), (B, Nk, Hk, D), (B, Nk, Hk, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def random_mask(B, H, Nq, Nk, q_block, kv_block, seed=0):
    """Blocks that are empty, full or partial, and now and then a query that attends to nothing."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (B, H, -(-Nq // q_block), -(-Nk // kv_block)), generator=g)
    kind = kind.repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3)[:, :, :Nq, :Nk]
    mask = (kind == 1) | ((kind == 2) & (torch.rand(B, H, Nq, Nk, generator=g) < 0.5))
    return mask & (torch.rand(B, H, Nq, 1, generator=g) < 0.95)


def cotangents(q, seed=1):
    g = torch.Generator().manual_seed(seed)
    B, N, H, _ = q.shape
    return torch.randn(q.shape, generator=g).to(q.dtype), torch.randn(B, H, N, generator=g)


def run(q, k, v, layout, scale=None, dout=None, dlse=None, needs=(True, True, True)):
    """out, lse and the gradients by the native backend; the cotangents default to fixed random ones for both results."""
    problem = Problem(q, k, v, layout, q.shape[-1] ** -0.5 if scale is None else scale, True, True)
    out, lse = native.attend(problem)
    if dout is None and dlse is None:
        dout, dlse = cotangents(q)
    grads = native.backward(BackwardProblem(problem, out, lse, dout, dlse, needs))
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def plain(q, k, v, mask, scale=None, dtype=None):
    """The same by plain PyTorch and autograd, in the dtype of the inputs or another one."""
    dout, dlse = cotangents(q)
    q, k, v = (x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in (q, k, v))
    out, lse = plain_attention(q, k, v, mask, scale)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    grads = torch.autograd.grad((out * dout).sum() + (finite * dlse).sum(), (q, k, v))
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def check(q, k, v, mask, layout, scale=None, summed=0):
    """Compare everything with float64. `summed`: terms of a key's gradients, where plain PyTorch may have them exactly.

    It does where a query has one key, whose weight is 1; recomputed from the log-sum-exp it is a rounding away.
    """
    actual = run(q, k, v, layout, scale)
    same_dtype, reference = plain(q, k, v, mask, scale), plain(q, k, v, mask, scale, torch.float64)
    dout = cotangents(q)[0]
    sizes = {"dq": gradient_terms(q, k, v, dout, scale)}
    sizes["dk"] = sizes["dq"] * max(1.0, summed**0.5)
    sizes["dv"] = dout.abs().max().item() * summed**0.5
    for name in NAMES:
        terms = sizes.get(name, 0.0)
        assert_close_to_reference(actual[name], same_dtype[name], reference[name], name=name, terms=terms)
    return actual


def check_forward(q, k, v, mask, layout):
    """For scores of hundreds: q times scale is a visible rounding more, and a float32 LSE too coarse for gradients."""
    actual, same_dtype, reference = (
        run(q, k, v, layout),
        plain(q, k, v, mask),
        plain(q, k, v, mask, None, torch.float64),
    )
    for name in ("out", "lse"):
        assert_close_to_reference(actual[name], same_dtype[name], reference[name], name=name, times=4.0)
    assert all(actual[name].isfinite().all() for name in ("dq", "dk", "dv"))


def check_random(B, Nq, Nk, H, Hk, D, q_block, kv_block, dtype=torch.float32, seed=0, mB=1, mH=1, **options):
    q, k, v = tensors(B, Nq, Nk, H, Hk, D, dtype, seed)
    mask = random_mask(mB, mH, Nq, Nk, q_block, kv_block, seed)
    layout = BlockLayout.from_dense_mask(mask, q_block=q_block, kv_block=kv_block, allow_empty_rows=True)
    return check(q, k, v, mask, layout, **options)


def equal(a, b):
    for name in NAMES:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("kv_block", [1, 7, 16, 64, 128, 455])
@pytest.mark.parametrize("q_block", [1, 7, 16, 64, 128, 455])
def test_block_sizes(q_block, kv_block):
    check_random(1, 150, 171, 2, 2, 24, q_block, kv_block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 8, 24, 33, 40, 64, 80, 128, 256, 320])
def test_head_widths(D, dtype):
    check_random(1, 70, 150, 2, 1, D, 16, 64, dtype)


@settings(max_examples=25, deadline=None)
@given(
    Nq=st.integers(1, 300),
    Nk=st.integers(1, 300),
    q_block=st.integers(1, 300),
    kv_block=st.integers(1, 300),
    D=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_sizes(Nq, Nk, q_block, kv_block, D, dtype, seed):
    check_random(1, Nq, Nk, 2, 1, D, q_block, kv_block, dtype, seed, summed=2 * Nq)


@pytest.mark.parametrize(("mB", "mH"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("Hk", [1, 2, 4])
def test_grouped_queries_and_masks_per_batch_and_head(Hk, mB, mH):
    check_random(2, 70, 90, 4, Hk, 24, 16, 32, mB=mB, mH=mH)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.3, 0.7, 1e-5])
def test_scale(scale, dtype):
    check_random(1, 60, 90, 2, 2, 24, 16, 16, dtype, scale=scale)


def test_a_layout_that_visits_nothing():
    q, k, v = tensors(1, 40, 40, 2, 2, 8)
    layout = BlockLayout.from_block_mask(
        torch.zeros(3, 3).bool(), q_len=40, kv_len=40, q_block=16, kv_block=16, allow_empty_rows=True
    )
    results = run(q, k, v, layout)
    assert results["lse"].eq(-torch.inf).all()
    assert all(results[name].eq(0).all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", [15.0, -15.0, 200.0])
def test_scores_that_rise_or_fall_along_the_keys(to, dtype):
    """The running maximum lags behind, and is replaced many times or never; a step looks at 256 keys."""
    q, k, v = tensors(1, 20, 1100, 1, 1, 16, dtype)
    q[..., 0], k[..., 0] = 4.0, torch.linspace(-to, to, 1100)[None, :, None].to(dtype)
    mask = torch.ones(1, 1, 20, 1100).bool()
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=64)
    (check if abs(to) < 100 else check_forward)(q, k, v, mask, layout)


def test_large_scores_do_not_overflow():
    q, k, v = tensors(1, 40, 300, 1, 1, 16)
    mask = random_mask(1, 1, 40, 300, 16, 64)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=64, allow_empty_rows=True)
    check_forward(q * 60, k * 60, v, mask, layout)


# ---------------------------------------------------------------- what partial entries and padding say


@pytest.mark.parametrize(("q_block", "kv_block"), [(16, 16), (64, 24), (7, 64)])
@pytest.mark.parametrize("kind", ["causal", "band", "windows"])
def test_bounds(kind, q_block, kv_block):
    if kind == "causal":
        bounds, Nq, Nk = Bounds.causal(120, 150), 120, 150
    elif kind == "band":
        bounds, Nq, Nk = Bounds.band(150, 120, before=20, after=9), 150, 120
    else:  # 3-D windows with six axes' worth of tables, and text that sees everything
        grid = [x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(5), torch.arange(6), indexing="ij")]
        windows = [(x - 1, x + 1) for x in grid]
        bounds, Nq, Nk = Bounds.points(windows * 2, grid * 2).with_free(5, 5), 125, 125
    mask = bounds.attends(torch.arange(Nq)[:, None], torch.arange(Nk)[None])[None, None]
    # by hand: the band leaves whole query blocks without keys, which from_bounds refuses
    some, every = bounds.block_kinds(
        q_block, kv_block, rules.valid_counts(Nq, q_block, CPU), rules.valid_counts(Nk, kv_block, CPU)
    )
    layout = BlockLayout.from_block_mask(
        some, q_len=Nq, kv_len=Nk, q_block=q_block, kv_block=kv_block, allow_empty_rows=True
    )
    layout = dataclasses.replace(layout, n_partial=layout.n_full, n_full=layout.n_partial, bounds=bounds)
    assert bool(some.any()) and torch.equal(layout.to_dense_mask(), mask)
    q, k, v = tensors(2, Nq, Nk, 2, 1, 24)
    check(q, k, v, mask, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_block", "kv_block"), [(16, 16), (16, 72), (100, 33)])
def test_padding_inside_the_sequence_may_hold_anything(q_block, kv_block, dtype):
    Nq, Nk = 150, 210
    whole = rules.valid_counts(Nq, q_block, CPU), rules.valid_counts(Nk, kv_block, CPU)
    g = torch.Generator().manual_seed(0)
    counts = [(torch.rand(2, x.shape[1], generator=g) * (x + 1)).int() for x in whole]
    counts[1][:, 0], counts[0][:, 0] = 0, whole[0][0, 0]
    blocks = torch.rand(1, 2, counts[0].shape[1], counts[1].shape[1], generator=g) < 0.7
    layout = BlockLayout.from_block_mask(
        blocks, q_len=Nq, kv_len=Nk, q_block=q_block, kv_block=kv_block, q_valid=counts[0], kv_valid=counts[1],
        allow_empty_rows=True,
    )  # fmt: skip
    mask = layout.to_dense_mask()
    q, k, v = tensors(2, Nq, Nk, 2, 2, 24, dtype)
    want = check(q, k, v, mask, layout)
    q_used, kv_used = layout.tokens_in_use()
    unused = (~q_used, ~kv_used, ~kv_used)
    assert all(bool(x.any()) for x in unused)
    poisoned = [x.masked_fill(u[:, :, None, None], torch.nan) for x, u in zip((q, k, v), unused, strict=True)]
    dout, dlse = cotangents(q)
    dout = dout.masked_fill(unused[0][:, :, None, None], torch.nan)
    dlse = dlse.masked_fill(unused[0][:, None], torch.nan)
    equal(run(*poisoned, layout, dout=dout, dlse=dlse), want)
    for name, x in zip(("out", "dk", "dv"), unused, strict=True):
        assert want[name][x].eq(0).all()


def test_calling_a_full_block_partial_changes_no_bit():
    q, k, v = tensors(1, 130, 150, 2, 2, 24)
    mask = random_mask(1, 2, 130, 150, 16, 64)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=64, allow_empty_rows=True)
    padded = torch.nn.functional.pad(mask, (0, layout.nK * 64 - 150, 0, layout.nQ * 16 - 130))
    masks = padded.unflatten(3, (layout.nK, 64)).unflatten(2, (layout.nQ, 16)).transpose(3, 4)
    visited = masks.flatten(-2).any(-1)
    as_partial = BlockLayout.from_block_mask(
        visited, q_len=130, kv_len=150, q_block=16, kv_block=64, allow_empty_rows=True
    )
    as_partial = dataclasses.replace(
        as_partial, n_partial=as_partial.n_full, n_full=as_partial.n_partial, bitmap=masks[visited].contiguous()
    )
    assert torch.equal(as_partial.to_dense_mask(), mask) and bool((layout.n_full > 0).any())
    equal(run(q, k, v, as_partial), run(q, k, v, layout))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_are_honoured(dtype):
    q, k, v = tensors(2, 50, 60, 4, 2, 24, dtype)
    mask = random_mask(1, 4, 50, 60, 16, 16)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16, allow_empty_rows=True)
    dout, dlse = cotangents(q)
    want = run(q, k, v, layout, dout=dout, dlse=dlse)

    def heads_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def channels_apart(x):
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]

    dlse = dlse.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (heads_first, channels_apart):
        views = [other(x) for x in (q, k, v)]
        assert not any(x.is_contiguous() for x in views)
        equal(run(*views, layout, dout=other(dout), dlse=dlse), want)
    one = k[:1, :, :1].expand(2, 60, 2, 24)
    ones = torch.ones((), dtype=dtype).expand(q.shape)
    equal(
        run(q, one, one, layout, dout=ones), run(q, one.contiguous(), one.contiguous(), layout, dout=ones.contiguous())
    )


def test_shared_lists_that_are_not_contiguous():
    q, k, v = tensors(2, 64, 64, 2, 1, 16)
    layout = BlockLayout.from_dense_mask(
        random_mask(2, 2, 64, 64, 16, 16), q_block=16, kv_block=16, allow_empty_rows=True
    )
    spread = dataclasses.replace(
        layout,
        row_of=layout.row_of.transpose(0, 2).contiguous().transpose(0, 2),
        n_full=torch.stack((layout.n_full, layout.n_full), 1)[:, 0],
    )
    assert not spread.row_of.is_contiguous() and not spread.n_full.is_contiguous()
    equal(run(q, k, v, spread), run(q, k, v, layout))


@pytest.fixture
def poisoned_memory(monkeypatch):
    """torch.empty returns NaN, so that an element nobody wrote shows; the work space is fresh as well."""
    monkeypatch.setattr(native._workspace, "memory", torch.empty(0, dtype=torch.uint8))
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [17, 127, 200])
def test_tails_and_fresh_memory_full_of_nan_do_not_leak(poisoned_memory, N, dtype):
    q, k, v = (torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :N] for x in tensors(2, N, N, 4, 2, 25, dtype))
    mask = random_mask(1, 4, N, N, 64, 64)
    layout = BlockLayout.from_dense_mask(mask, q_block=64, kv_block=64, allow_empty_rows=True)
    check(q, k, v, mask, layout)


def test_unvisited_key_blocks_do_not_reach_the_result():
    q, k, v = tensors(1, 64, 64, 2, 2, 24)
    blocks = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]]).bool()
    layout = BlockLayout.from_block_mask(blocks, q_len=64, kv_len=64, q_block=16, kv_block=16)
    clean = run(q, k, v, layout)
    for x in (k, v):
        x[:, 16:32] = x[:, 48:] = torch.nan
    equal(run(q, k, v, layout), clean)
    assert clean["dk"][:, 16:32].eq(0).all() and clean["dv"][:, 48:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_an_attended_token_is_not_hidden(dtype):
    for which in range(3):
        inputs = tensors(1, 40, 40, 1, 1, 24, dtype)
        inputs[which][0, 3, 0, 5] = torch.nan
        layout = BlockLayout.from_block_mask(torch.eye(3).bool(), q_len=40, kv_len=40, q_block=16, kv_block=16)
        out = run(*inputs, layout)["out"]
        assert out[0, 3].isnan().any() and not out[0, 16:].isnan().any()


# ---------------------------------------------------------------- what must not change a result


def ragged_problem(dtype=torch.float32):
    q, k, v = tensors(2, 200, 230, 4, 2, 40, dtype)
    mask = random_mask(1, 4, 200, 230, 32, 48)
    mask[0, 1, :, 100:] = False
    return (q, k, v, BlockLayout.from_dense_mask(mask, q_block=32, kv_block=48, allow_empty_rows=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_repetition(dtype):
    problem = ragged_problem(dtype)
    want = run(*problem)
    equal(run(*problem), want)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        equal(run(*problem), want)


@pytest.mark.parametrize("threads", [1, 2])
def test_five_or_seven_products(monkeypatch, threads):
    problem = ragged_problem()
    results = []
    torch.set_num_threads(threads)
    for fused in (True, False):
        monkeypatch.setattr(native, "is_fused", lambda work, threads, fused=fused: fused)
        results.append(run(*problem))
    equal(*results)


def test_waves_of_one_pair(monkeypatch):
    problem = ragged_problem()
    want = run(*problem)
    monkeypatch.setattr(native, "PACKED_BYTES_PER_THREAD", 1)
    torch.set_num_threads(2)
    equal(run(*problem), want)
    waves = native._waves(problem[-1], 2, 4, 2, 1)
    assert [w.pairs for w in waves] == [1] * 4 and [w.first for w in waves] == [0, 1, 2, 3]


def test_work_space_is_kept_only_while_it_is_small(monkeypatch):
    problem = ragged_problem()
    empty = torch.empty(0, dtype=torch.uint8)
    monkeypatch.setattr(native._workspace, "memory", empty)
    want = run(*problem)
    assert native._workspace.memory.numel() > 0
    monkeypatch.setattr(native._workspace, "memory", empty)
    monkeypatch.setattr(native, "KEPT_BYTES_PER_THREAD", 1)
    equal(run(*problem), want)
    assert native._workspace.memory is empty


def test_heads_are_given_to_threads_only_where_that_is_faster():
    assert native.is_fused([10, 10], 1) and native.is_fused([10, 10], 2) and native.is_fused([10] * 3, 2)
    assert not native.is_fused([10], 2) and not native.is_fused([100, 1, 1], 2) and not native.is_fused([10] * 8, 64)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_some_inputs_and_some_results(monkeypatch, fused):
    monkeypatch.setattr(native, "is_fused", lambda work, threads: fused)
    q, k, v, layout = ragged_problem()
    dout, dlse = cotangents(q)
    everything = run(q, k, v, layout, dout=dout)
    for i, name in enumerate(("dq", "dk", "dv")):
        for needs in (tuple(j == i for j in range(3)), tuple(j != i for j in range(3))):
            results = run(q, k, v, layout, dout=dout, needs=needs)
            for need, other in zip(needs, ("dq", "dk", "dv"), strict=True):
                if need:
                    assert torch.equal(results[other], everything[other]), (name, other)
                else:
                    assert results[other] is None
    both, of_lse = run(q, k, v, layout, dout=dout, dlse=dlse), run(q, k, v, layout, dlse=dlse)
    assert of_lse["dv"].eq(0).all()
    for name in ("dq", "dk"):
        torch.testing.assert_close(everything[name] + of_lse[name], both[name], rtol=1e-4, atol=1e-5)


def test_the_log_sum_exp_is_returned_when_it_is_wanted():
    q, k, v, layout = ragged_problem()
    plain_call = native.attend(Problem(q, k, v, layout, 0.2, False))
    assert plain_call[1] is None
    for problem in (Problem(q, k, v, layout, 0.2, True), Problem(q, k, v, layout, 0.2, False, True)):
        out, lse = native.attend(problem)
        assert torch.equal(out, plain_call[0]) and lse.shape == (2, 4, 200) and lse.dtype == torch.float32


# ---------------------------------------------------------------- other processors

OTHER_BUILDS = {name: tuple(flags.values()) for name, flags in native_build.X86_BUILDS.items()} | {"portable": ()}


@pytest.fixture(params=OTHER_BUILDS)
def other_build(request, monkeypatch):
    """The same source for narrower vectors, down to what any processor has."""
    name = request.param
    if name != "portable" and not native_build.processor_flags().issuperset(native_build.X86_BUILDS[name]):
        pytest.skip(f"this processor does not have {name}")
    native_build._build.cache_clear()
    monkeypatch.setattr(native_build, "instruction_set", lambda: (name, OTHER_BUILDS[name]))
    yield name
    native_build._build.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(other_build, dtype):
    assert native._build().isa == other_build
    check_random(1, 90, 171, 2, 1, 24, 16, 64, dtype)
    check_random(1, 90, 100, 2, 2, 80, 64, 7, dtype)
    bounds = Bounds.causal(77, 77)
    mask = bounds.attends(torch.arange(77)[:, None], torch.arange(77)[None])[None, None]
    q, k, v = tensors(1, 77, 77, 2, 1, 40, dtype)
    check(q * 5, k, v, mask, BlockLayout.from_bounds(bounds, q_block=16, kv_block=32))


# ---------------------------------------------------------------- when it runs


def test_why_not(monkeypatch):
    def why_not(dtype=torch.float32, device="cpu"):
        layout = BlockLayout.from_block_mask(torch.ones(1, 1).bool(), q_len=8, kv_len=8, q_block=16, kv_block=16)
        x = torch.zeros(1, 8, 1, 8, dtype=dtype, device=device)
        problem = Problem(x, x, x, layout, 1.0, False)
        backward = BackwardProblem(problem, x, x[..., 0], x, None, (True, True, True))
        assert native.BACKWARD.why_not(backward) == native.FORWARD.why_not(problem)
        return native.FORWARD.why_not(problem)

    for dtype in DTYPES:
        assert why_not(dtype) is None
    assert why_not(torch.float64) == (
        "it computes in float32, for float32, bfloat16 and float16 inputs, and q is torch.float64"
    )
    assert why_not(device="meta") == "it runs on CPUs only, and q is on meta"
    monkeypatch.setenv("MMEFF_NATIVE", "0")
    assert why_not() == "native kernels are switched off by MMEFF_NATIVE=0"


def test_cost_grows_with_the_visited_blocks_and_their_waste(monkeypatch):
    monkeypatch.setenv("MMEFF_CALIBRATE", "0")

    def costs(blocks, q_block=64, kv_block=64, N=2048):
        n, m = -(-N // q_block), -(-N // kv_block)
        mask = torch.zeros(n, m).bool()
        mask[:, : int(blocks * m)] = True
        layout = BlockLayout.from_block_mask(mask, q_len=N, kv_len=N, q_block=q_block, kv_block=kv_block)
        q = torch.empty(1, N, 4, 64)
        problem = Problem(q, q, q, layout, 1.0, False)
        backward = BackwardProblem(problem, q, q[..., 0], q, None, (True, True, True))
        return native.FORWARD.cost(problem), native.BACKWARD.cost(backward)

    for quarter, half, tiny_keys, tiny_queries in zip(
        costs(0.25), costs(0.5), costs(0.5, kv_block=1), costs(0.5, q_block=1), strict=True
    ):
        assert 0 < quarter < half < tiny_queries < tiny_keys
