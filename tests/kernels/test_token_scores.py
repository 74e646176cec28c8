"""token_scores: column sums of the attention of chosen rows, against the whole matrix."""

from __future__ import annotations

import os
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from token_scores_oracle import check, results, tensors

from mmeff.errors import BackendUnavailable
from mmeff.kernels import record, token_scores
from mmeff.kernels.token_scores import chunked

BACKENDS = ["reference", "chunked"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("R", "Nk"), [(1, 1), (1, 200), (17, 127), (129, 129), (5, 17)])
def test_sums_over_rows(backend, dtype, R, Nk):
    check(*tensors(2, R, Nk, 4, 4, 24, dtype), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("Hk", [1, 2, 4])
@pytest.mark.parametrize("per_batch", [False, True])
def test_grouped_queries_positions_padding_and_weights_together(backend, with_lse, Hk, per_batch):
    q, k = tensors(2, 13, 50, 4, Hk, 40)
    g = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 50, (2, 13) if per_batch else (13,), generator=g)
    key_mask = torch.rand(2, 50, generator=g) < 0.8
    weights = torch.rand(2, 4, 13, generator=g)
    causal = torch.arange(50) <= positions[..., None]
    visible = (causal[:, None] if per_batch else causal) & key_mask[:, None, None]
    lse = torch.randn(2, 4, 13, generator=g) + 3 if with_lse else None
    check(q, k, visible, weights, lse=lse, backend=backend, row_positions=positions, key_mask=key_mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(13,), (1, 1, 13), (2, 1, 13), (1, 4, 13), (2, 4, 13)])
@pytest.mark.parametrize("Hk", [2, 4])
def test_weights_broadcast(backend, shape, Hk):
    q, k = tensors(2, 13, 30, 4, Hk, 24)
    check(q, k, weights=torch.rand(shape, generator=torch.Generator().manual_seed(0)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_attention_that_every_key_receives(backend, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES_PER_THREAD", 2 * 129 * 4 * 20)  # 20 rows of the two heads at a time
    q, k = tensors(1, 129, 129, 4, 2, 24)
    check(q, k, torch.ones(129, 129).tril().bool(), backend=backend, row_positions=torch.arange(129))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_lse_is_the_one_computed_otherwise(backend):
    q, k = tensors(2, 9, 33, 4, 2, 24)
    positions = torch.tensor([-1, 0, 3, 3, 32, 7, 8, 20, 31])
    scores = torch.einsum("brhd,bkhd->bhrk", q, k.repeat_interleave(2, 2)) * 24**-0.5
    lse = scores.masked_fill(torch.arange(33) > positions[:, None], -torch.inf).logsumexp(-1)
    want = token_scores(q, k, row_positions=positions, backend=backend)
    got = token_scores(q, k, row_positions=positions, lse=lse, backend=backend)
    torch.testing.assert_close(got, want)
    # over part of the keys, the LSE of all of them normalises
    got = token_scores(q, k[:, :20], row_positions=positions, lse=lse.double(), backend=backend)
    torch.testing.assert_close(got, want[..., :20])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    q, k = tensors(2, 5, 30, 4, 2, 24)
    spread = [torch.stack([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for x in (q, k)]
    assert not any(x.is_contiguous() for x in spread)
    weights = torch.rand(5, generator=torch.Generator().manual_seed(0))[:, None].expand(5, 2)[:, 1]
    mask = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).lt(0.7).t()
    check(*spread, mask[:, None, None], weights, backend=backend, key_mask=mask)


def test_scale_is_honoured():
    q, k = tensors(1, 5, 30, 2, 2, 24)
    check(q, k, scale=0.9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_contribute_zero(backend):
    q, k = tensors(2, 3, 20, 2, 1, 24)
    positions = torch.tensor([-1, 4, 19])
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    key_mask[0, :5] = False  # row 1 of batch 0 sees nothing either
    key_mask[1] = False
    q[1], q[0, :2] = torch.nan, torch.nan  # whatever they hold
    q.requires_grad_()
    got = token_scores(q, k.requires_grad_(), row_positions=positions, key_mask=key_mask, backend=backend)
    got[..., 7].sum().backward()
    torch.testing.assert_close(got.sum(-1), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert got[1].eq(0).all()
    assert q.grad[1].eq(0).all() and q.grad[0, :2].eq(0).all() and q.grad[0, 2].ne(0).any()
    assert k.grad[1].eq(0).all() and k.grad[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_a_given_lse_of_minus_infinity_contribute_zero(backend):
    q, k = tensors(1, 3, 20, 2, 1, 24)
    lse = torch.full((1, 2, 3), 3.0)
    lse[:, :, 1] = -torch.inf
    want = token_scores(q[:, [0, 2]], k, lse=lse[:, :, [0, 2]], backend=backend)
    q[:, 1] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k, lse)]
    got = token_scores(q, k, lse=lse, backend=backend)
    torch.testing.assert_close(got, want)
    dq, dk, dlse = torch.autograd.grad(got[..., 3].sum(), inputs)
    assert dq[:, 1].eq(0).all() and dlse[:, :, 1].eq(0).all() and dlse[:, :, 0].ne(0).all() and dk.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_may_hold_anything(backend):
    q, k = tensors(2, 3, 20, 2, 1, 24)
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    key_mask[:, 9:12] = False
    positions = torch.tensor([3, 15, -1])  # nobody reaches 16

    def compute(q_rows, k):
        return token_scores(q_rows, k, key_mask=key_mask, row_positions=positions, backend=backend)

    want = results(compute, {"q_rows": q, "k": k})
    k[:, 9:12], k[:, 16:] = torch.nan, torch.inf
    got = results(compute, {"q_rows": q, "k": k})
    assert got["scores"][..., 16:].eq(0).all() and got["scores"][..., 9:12].eq(0).all()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_a_row_at_position_p_sees_keys_up_to_and_including_p():
    q, k = tensors(1, 1, 10, 1, 1, 8)
    got = token_scores(q, k, row_positions=torch.tensor([6]))
    assert got[0, 0, 6] > 0 and got[0, 0, 7:].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_zeros(backend):
    q, k = (x.requires_grad_() for x in tensors(2, 0, 10, 4, 2, 8))
    got = token_scores(q, k, weights=torch.ones(0), row_positions=torch.ones(0).long(), backend=backend)
    assert torch.equal(got, torch.zeros(2, 4, 10))
    got.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunks_of_rows_change_nothing(monkeypatch, rows):
    q, k = tensors(2, 13, 30, 4, 2, 24)
    positions, weights = torch.arange(13) * 2 - 2, torch.rand(2, 4, 13)
    given = {"q_rows": q, "k": k, "weights": weights}
    want = results(lambda **x: token_scores(**x, row_positions=positions), given)
    monkeypatch.setattr(chunked, "CHUNK_BYTES_PER_THREAD", 2 * 30 * 4 * rows // torch.get_num_threads())
    got = results(lambda **x: token_scores(**x, row_positions=positions), given)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_matrix_in_memory(backend, monkeypatch):
    q, k = (x.requires_grad_() for x in tensors(1, 512, 512, 4, 2, 8))
    matrix, chunk = 4 * 512 * 512 * 4, 2**18
    monkeypatch.setattr(chunked, "CHUNK_BYTES_PER_THREAD", chunk // torch.get_num_threads())
    with torch.profiler.profile(profile_memory=True) as profile:
        token_scores(q, k, weights=torch.ones(512), backend=backend).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert (0 < largest <= 2 * chunk) if backend == "chunked" else (largest >= matrix)


def test_autocast_does_not_reach_inside():
    q, k = tensors(1, 5, 30, 2, 2, 24)
    want = token_scores(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_scores(q, k), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradcheck(backend, with_lse):
    q, k = (x.requires_grad_() for x in tensors(1, 3, 5, 2, 1, 3, torch.float64))
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    lse = torch.full((1, 2, 3), 1.5, dtype=torch.float64, requires_grad=True) if with_lse else None
    positions = torch.tensor([-1, 2, 4])

    def compute(q, k, weights, lse):
        return token_scores(q, k, row_positions=positions, weights=weights, lse=lse, backend=backend)

    assert torch.autograd.gradcheck(compute, (q, k, weights, lse))


@pytest.mark.parametrize("needed", [{"q_rows"}, {"k"}, {"weights"}, {"lse"}, {"k", "lse"}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_not_needed_change_nothing(backend, needed):
    q, k = tensors(2, 5, 30, 4, 2, 8)
    every = {"q_rows": q, "k": k, "weights": torch.rand(2, 1, 5), "lse": torch.full((2, 4, 5), 3.0)}
    want = results(lambda **x: token_scores(**x, backend=backend), every)
    some = {name: every[name] for name in needed}
    rest = {name: every[name] for name in every if name not in needed}
    got = results(lambda **x: token_scores(**x, **rest, backend=backend), some)
    for name in got:
        assert torch.equal(got[name], want[name]), name


def samples():
    q, k = (x.requires_grad_() for x in tensors(2, 5, 12, 4, 2, 8))
    positions, mask = torch.tensor([0, 3, 11, -1, 7]), torch.rand(2, 12).lt(0.8)
    weights, lse = torch.rand(1, 4, 5, requires_grad=True), torch.full((2, 4, 5), 2.0, requires_grad=True)
    yield q, k, None, None, None, None, 0.3, "auto", True
    yield q, k, positions, mask, weights, None, 0.3, "chunked", True
    yield q, k.detach(), positions, None, weights.detach(), lse, 0.3, "reference", False


@pytest.mark.parametrize("sample", range(3))
def test_the_operator_keeps_the_rules_of_pytorch(sample):
    torch.library.opcheck(torch.ops.mmeff.token_scores.default, list(samples())[sample])


def test_one_graph_when_compiled():
    q, k = tensors(2, 5, 30, 4, 2, 8)
    positions, mask = torch.arange(5) * 6, torch.rand(2, 30) < 0.8
    given = {"q_rows": q, "k": k, "weights": torch.rand(5), "lse": torch.full((2, 4, 5), 3.0)}
    for names in (("q_rows", "k"), tuple(given)):
        inputs = {name: given[name] for name in names}

        def compute(**inputs):
            return token_scores(**inputs, row_positions=positions, key_mask=mask) * 2

        want = results(compute, inputs)
        got = results(torch.compile(compute, fullgraph=True, backend="aot_eager"), inputs)
        for name in want:
            assert torch.equal(got[name], want[name]), name


def test_the_choice_is_recorded():
    q, k = (x.requires_grad_() for x in tensors(1, 5, 30, 2, 2, 24))
    with record() as calls:
        token_scores(q, k).sum().backward()
        token_scores(q, k, backend="reference")
    assert [(call.operator, call.backend, call.density) for call in calls] == [
        ("token_scores", "chunked", None),
        ("token_scores", "reference", None),
    ]
    assert calls[0].reason.startswith("auto: cache-sized chunks") and calls[1].reason == "named by the caller"


def test_a_named_backend_runs_or_raises():
    q, k = tensors(1, 5, 30, 2, 2, 24, torch.float64)
    with pytest.raises(BackendUnavailable, match="token_scores: backend 'triton' cannot run this problem: "):
        token_scores(q, k, backend="triton")
    with pytest.raises(ValueError, match=r"'auto' or one of 'triton', 'chunked', 'reference', got 'chunk'.*'chunked'"):
        token_scores(q, k, backend="chunk")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_triton_kernels_compile_for_a_gpu_that_is_not_here(dtype):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmeff.kernels.token_scores import triton_impl, triton_kernels

    flags = {"HAS_POS", "HAS_MASK", "HAS_WEIGHTS", "CENTRED", "NEED_ROWS", "NEED_Q"}
    pointers = {"q": f"*{'bf16' if dtype == torch.bfloat16 else 'fp32'}", "positions": "*i64", "key_mask": "*i1"}
    pointers |= dict.fromkeys(("weights", "lse", "grad", "per_row", "dq", "dk", "out"), "*fp32")
    pointers["k"] = pointers["q"]
    for name, direction in (
        ("lse_kernel", "forward"),
        ("columns_kernel", "forward"),
        ("rows_kernel", "backward"),
        ("keys_kernel", "backward"),
    ):
        kernel = getattr(triton_kernels, name)
        tiles = triton_impl.blocks(direction, torch.empty(0, 128, dtype=dtype), 4096)
        options = {key: tiles.pop(key) for key in ("num_warps", "num_stages")}
        values = {**tiles, **dict.fromkeys(flags, True), "UPCAST": False, "q_d": 1, "k_d": 1}
        values["PRECISION"] = "ieee" if dtype == torch.float32 else "tf32"
        signature, constants, aligned = {}, {}, {}
        for i, argument in enumerate(kernel.arg_names):
            signature[argument] = pointers.get(argument, "fp32" if argument == "scale" else "i32")
            if argument in values:
                signature[argument], constants[i,] = "constexpr", values[argument]
            elif argument in ("q", "k", "q_b", "q_r", "q_h", "k_b", "k_n", "k_h", "D"):
                aligned[i,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= 99 * 1024, f"{name}: more shared memory than an Ada GPU has"


@pytest.mark.slow
def test_few_rows_cost_less_than_a_tenth_of_a_dense_layer():
    N, H, Hk, D, R = 2880, 32, 8, 128, 32
    q, k, v = (torch.randn(1, N, heads, D) for heads in (H, Hk, Hk))
    rows, positions = q[:, -R:], torch.arange(N - R, N)

    def ours():
        token_scores(rows, k, row_positions=positions)

    def dense():
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)

    def seconds(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them measure who else is on the machine
    try:
        ours(), dense()
        assert statistics.median(seconds(ours) / seconds(dense) for _ in range(3)) < 0.1
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 20), st.integers(1, 60), st.sampled_from([1, 2, 4]), st.booleans())
def test_columns_add_up_to_the_number_of_rows(seed, R, Nk, Hk, causal):
    q, k = tensors(2, R, Nk, 4, Hk, 8, seed=seed)
    positions = torch.randint(0, Nk, (R,), generator=torch.Generator().manual_seed(seed)) if causal else None
    total = token_scores(q, k, row_positions=positions).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, R))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_rows": torch.ones(2, 3, 4, 8).long()}, TypeError, "q_rows must be a floating-point tensor, got torch.int"),
        ({"k": torch.ones(10, 2, 8)}, ValueError, r"k must be \(B, N, H, D\), got shape \(10, 2, 8\)"),
        ({"k": torch.ones(2, 10, 2, 6)}, ValueError, r"agree in batch, head width.*\(2, 10, 2, 6\)"),
        ({"k": torch.ones(2, 10, 3, 8)}, ValueError, r"multiple of the key heads.*\(2, 10, 3, 8\)"),
        ({"row_positions": torch.ones(3)}, ValueError, r"integers of shape \(R,\) = \(3,\).*torch.float32"),
        ({"row_positions": torch.ones(4).long()}, ValueError, r"\(B, R\) = \(2, 3\), got torch.int64 \(4,\)"),
        ({"key_mask": torch.ones(2, 10)}, ValueError, r"bool of shape \(B, Nk\) = \(2, 10\).*torch.float32"),
        ({"key_mask": torch.ones(1, 10).bool()}, ValueError, r"\(2, 10\).*torch.bool \(1, 10\)"),
        ({"weights": torch.ones(2, 3)}, ValueError, r"\(2\|1, 4\|1, 3\), got torch.float32 \(2, 3\); .* w\[:, None\]"),
        ({"weights": torch.ones(3).long()}, ValueError, "weights must be floating-point"),
        ({"weights": torch.ones(3, device="meta")}, ValueError, "weights must be on cpu like k, got meta"),
        ({"lse": torch.ones(2, 3, 4)}, ValueError, r"\(B, H, R\) = \(2, 4, 3\), got torch.float32 \(2, 3, 4\)"),
        ({"lse": torch.ones(2, 4, 3).half()}, ValueError, "lse must be float32.*got torch.float16.*return_lse=True"),
        ({"weights": [1.0, 1.0, 1.0]}, TypeError, "weights must be a tensor or None, got list"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite Python float, got inf"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"q_rows": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 10, 2, 8), **change}
    with pytest.raises(error, match=message):
        token_scores(arguments.pop("q_rows"), arguments.pop("k"), **arguments)
