"""block_sparse_attention: every backend against float64, in forward and gradient, and its invariances."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_reference, gradient_terms, plain_attention, weighted_terms

from mmeff.kernels import BlockLayout, Bounds, block_sparse_attention, explain, merge_attention
from mmeff.kernels.block_sparse import gather
from mmeff.kernels.layout.identity import lists_of

property_test = settings(max_examples=20, deadline=None)


def tensors(B, Nq, Nk, H, Hk, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, Nq, H, D), (B, Nk, Hk, D), (B, Nk, Hk, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def random_mask(B, H, Nq, Nk, block, seed=0, kinds=3):
    """Blocks that are empty, full or (kinds=3) partial; every query attends to something."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, kinds, (B, H, -(-Nq // block), -(-Nk // block)), generator=g)
    kind[..., 0] = 1  # full
    kind = kind.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :Nq, :Nk]
    return (kind == 1) | ((kind == 2) & (torch.rand(B, H, Nq, Nk, generator=g) < 0.5))


def cotangent(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def results(attend, q, k, v, with_lse=True):
    """out, lse and the gradients of q, k, v under a fixed random cotangent of both."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v) if with_lse else (attend(q, k, v), None)
    loss = (out * cotangent(out)).sum()
    if lse is not None:
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = loss + (finite * torch.randn(lse.shape, generator=torch.Generator().manual_seed(2)).to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    named = {"out": out, "lse": lse, "dq": grads[0], "dk": grads[1], "dv": grads[2]}
    return {name: x for name, x in named.items() if x is not None}


def check_against_oracle(q, k, v, mask, layout, backend, with_lse):
    def plain(q, k, v):
        if backend == "sdpa" and q.dtype != torch.float64:  # judged by the very operator that it must call rightly
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        out, lse = plain_attention(q, k, v, mask)
        return (out, lse) if with_lse else out

    def ours(q, k, v):
        return block_sparse_attention(q, k, v, layout, backend=backend, return_lse=with_lse)

    actual = results(ours, q, k, v, with_lse)
    same_dtype = results(plain, q, k, v, with_lse)
    reference = results(plain, q.double(), k.double(), v.double(), with_lse)
    for name in reference:
        terms = gradient_terms(q, k, v, cotangent(q)) if name in ("dq", "dk") else 0.0
        weighted = weighted_terms(q, k, cotangent(q)) if name in ("dk", "dv") else 0.0
        assert_close_to_reference(
            actual[name], same_dtype[name], reference[name], name=f"{backend} {name}", terms=terms, weighted=weighted
        )


# ---------------------------------------------------------------- against the oracle

BACKEND_CASES = [("gather", True), ("gather", False), ("sdpa", False), ("reference", True)]


@pytest.mark.parametrize(("backend", "with_lse"), BACKEND_CASES)
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 1), (17, 17), (127, 129), (129, 127), (200, 200), (1, 200), (200, 1)])
def test_awkward_lengths(backend, with_lse, block, Nq, Nk):
    q, k, v = tensors(1, Nq, Nk, 2, 2, 40)
    mask = random_mask(1, 2, Nq, Nk, block)
    layout = BlockLayout.from_dense_mask(mask, q_block=block, kv_block=block)
    check_against_oracle(q, k, v, mask, layout, backend, with_lse)


@pytest.mark.parametrize(("backend", "with_lse"), BACKEND_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [24, 64])
def test_dtypes(backend, with_lse, dtype, D):
    q, k, v = tensors(2, 129, 129, 2, 2, D, dtype)
    mask = random_mask(1, 2, 129, 129, 16)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
    check_against_oracle(q, k, v, mask, layout, backend, with_lse)


@pytest.mark.parametrize(("backend", "with_lse"), BACKEND_CASES)
@pytest.mark.parametrize("kinds", [2, 3], ids=["full blocks", "partial blocks"])
@pytest.mark.parametrize(("mB", "mH"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("Hk", [1, 2, 4])
def test_grouped_queries_and_masks_per_batch_and_head(backend, with_lse, kinds, mB, mH, Hk):
    q, k, v = tensors(2, 70, 90, 4, Hk, 24)
    mask = random_mask(mB, mH, 70, 90, 16, kinds=kinds)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
    check_against_oracle(q, k, v, mask, layout, backend, with_lse)


@pytest.mark.parametrize(("q_block", "kv_block"), [(64, 16), (16, 64), (256, 256), (1, 7)])
def test_uneven_and_oversized_blocks(q_block, kv_block):
    q, k, v = tensors(1, 90, 75, 2, 1, 24)
    mask = random_mask(1, 2, 90, 75, 16)
    layout = BlockLayout.from_dense_mask(mask, q_block=q_block, kv_block=kv_block)
    check_against_oracle(q, k, v, mask, layout, "gather", True)


@pytest.mark.parametrize(("backend", "with_lse"), [("gather", True), ("gather", False), ("reference", True)])
def test_empty_rows_give_zero_and_minus_infinity(backend, with_lse):
    q, k, v = tensors(1, 70, 70, 2, 2, 24)
    mask = random_mask(1, 2, 70, 70, 16)
    mask[0, 0, 16:32] = False  # a whole query block
    mask[0, 1, 40] = False  # one query of a partial block
    mask[0, 1, 69] = False  # the last query
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16, allow_empty_rows=True)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        check_against_oracle(q, k, v, mask, layout, backend, with_lse)
    out, lse = block_sparse_attention(q, k, v, layout, backend="gather", return_lse=True)
    assert out[0, 16:32, 0].eq(0).all() and out[0, [40, 69], 1].eq(0).all()
    assert lse[0, 0, 16:32].eq(-torch.inf).all() and lse.isinf().sum() == 18


def test_empty_queries_are_zero_even_where_the_dense_kernel_returns_nan(monkeypatch):
    q, k, v = tensors(1, 32, 32, 2, 2, 24)
    mask = random_mask(1, 2, 32, 32, 16)
    mask[0, 1, 20] = False
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16, allow_empty_rows=True)
    dense = F.scaled_dot_product_attention

    def with_nan(q, k, v, attn_mask=None, **options):
        out = dense(q, k, v, attn_mask=attn_mask, **options)
        return out if attn_mask is None else out.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)

    monkeypatch.setattr(F, "scaled_dot_product_attention", with_nan)
    check_against_oracle(q, k, v, mask, layout, "gather", with_lse=False)


def test_a_layout_that_visits_nothing():
    q, k, v = (x.requires_grad_() for x in tensors(1, 20, 20, 2, 2, 8))
    layout = BlockLayout.from_block_mask(
        torch.zeros(2, 2).bool(), q_len=20, kv_len=20, q_block=16, kv_block=16, allow_empty_rows=True
    )
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    out.sum().backward()
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    assert all(x.grad.eq(0).all() for x in (q, k, v))


def test_scale_is_honoured():
    q, k, v = tensors(1, 40, 40, 2, 2, 24)
    layout = BlockLayout.from_dense_mask(random_mask(1, 2, 40, 40, 16), q_block=16, kv_block=16)
    for backend in ("gather", "sdpa", "reference"):
        got = block_sparse_attention(q, k, v, layout, scale=0.7, backend=backend)
        want = plain_attention(q.double(), k.double(), v.double(), layout.to_dense_mask(), 0.7)[0]
        assert_close_to_reference(got, want.float(), want, name=backend)


@pytest.mark.parametrize("which", ["out", "lse", "both"])
@pytest.mark.parametrize("mH", [1, 2])
def test_gradcheck(which, mH):
    q, k, v = (x.requires_grad_() for x in tensors(1, 11, 9, 2, 1, 3, torch.float64))
    layout = BlockLayout.from_dense_mask(random_mask(1, mH, 11, 9, 4), q_block=4, kv_block=4)

    def attend(q, k, v):
        out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="gather")
        return {"out": out, "lse": lse, "both": (out, lse)}[which]

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_gradients_of_some_inputs_only():
    q, k, v = tensors(1, 40, 40, 2, 2, 24)
    layout = BlockLayout.from_dense_mask(random_mask(1, 2, 40, 40, 16), q_block=16, kv_block=16)
    everything = results(lambda *x: block_sparse_attention(*x, layout, backend="gather"), q, k, v, with_lse=False)
    cotangent = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    for i, name in enumerate(("dq", "dk", "dv")):
        inputs = [x.clone().requires_grad_(j == i) for j, x in enumerate((q, k, v))]
        block_sparse_attention(*inputs, layout, backend="gather").backward(cotangent)
        assert torch.equal(inputs[i].grad, everything[name])


def test_many_chunks_equal_one(monkeypatch):
    q, k, v = tensors(2, 200, 200, 4, 2, 24)
    mask = random_mask(1, 4, 200, 200, 16)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
    monkeypatch.setattr(gather, "CHUNK_BYTES_PER_THREAD", 1)  # one row at a time
    check_against_oracle(q, k, v, mask, layout, "gather", True)
    monkeypatch.setattr(gather, "CHUNK_BYTES_PER_THREAD", 2**40)
    check_against_oracle(q, k, v, mask, layout, "gather", True)


# ---------------------------------------------------------------- memory: poison, views, what autograd keeps


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("N", [17, 127, 200])
@pytest.mark.parametrize("with_lse", [True, False])
def test_tails_and_fresh_memory_full_of_nan_do_not_leak(poisoned_memory, N, with_lse):
    big = [torch.cat([x, torch.full_like(x, torch.nan)], 1) for x in tensors(2, N, N, 4, 2, 24)]
    q, k, v = (x[:, :N] for x in big)  # NaN lies right behind each sequence
    mask = random_mask(1, 4, N, N, 64)
    layout = BlockLayout.from_dense_mask(mask, q_block=64, kv_block=64)
    out = block_sparse_attention(q, k, v, layout, backend="gather", return_lse=with_lse)
    assert not any(x.isnan().any() for x in (out if with_lse else (out,)))
    check_against_oracle(q, k, v, mask, layout, "gather", with_lse)


def test_unvisited_key_blocks_are_never_read():
    q, k, v = tensors(1, 64, 64, 2, 2, 24)
    blocks = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]]).bool()
    layout = BlockLayout.from_block_mask(blocks, q_len=64, kv_len=64, q_block=16, kv_block=16)
    clean = results(lambda *x: block_sparse_attention(*x, layout, backend="gather", return_lse=True), q, k, v)
    for x in (k, v):
        x[:, 16:32] = x[:, 48:] = torch.nan
    poisoned = results(lambda *x: block_sparse_attention(*x, layout, backend="gather", return_lse=True), q, k, v)
    for name in clean:
        assert torch.equal(clean[name], poisoned[name]), name
    assert poisoned["dk"][:, 16:32].eq(0).all() and poisoned["dv"][:, 48:].eq(0).all()


def test_heads_first_storage_and_expanded_keys():
    q, k, v = tensors(2, 50, 50, 4, 4, 24)
    layout = BlockLayout.from_dense_mask(random_mask(1, 4, 50, 50, 16), q_block=16, kv_block=16)
    want = block_sparse_attention(q, k, v, layout, backend="gather")
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(block_sparse_attention(*views, layout, backend="gather"), want)
    one = k[:1, :, :1].expand(2, 50, 4, 24)
    want = block_sparse_attention(q, one.contiguous(), one.contiguous(), layout, backend="gather")
    assert torch.equal(block_sparse_attention(q, one, one, layout, backend="gather"), want)


def test_autograd_keeps_the_inputs_and_the_results_but_no_scores():
    q, k, v = (x.requires_grad_() for x in tensors(1, 256, 256, 2, 2, 16))
    layout = BlockLayout.from_dense_mask(random_mask(1, 2, 256, 256, 16), q_block=16, kv_block=16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, lse = block_sparse_attention(q, k, v, layout, backend="gather", return_lse=True)
    floats = {x.data_ptr() for x in kept if x.is_floating_point()}
    assert floats == {x.data_ptr() for x in (q, k, v, out, lse)}


def test_a_layout_first_used_in_inference_mode_still_trains():
    q, k, v = tensors(1, 40, 40, 4, 2, 24)
    mask = random_mask(1, 4, 40, 40, 16)
    with torch.inference_mode():
        layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
        for backend in ("gather", "sdpa", "reference"):
            block_sparse_attention(q, k, v, layout, backend=backend)
    for backend in ("gather", "sdpa", "reference"):
        check_against_oracle(q, k, v, mask, layout, backend, with_lse=False)


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_autocast_does_not_reach_inside(backend):
    q, k, v = tensors(1, 40, 40, 2, 2, 24)
    layout = BlockLayout.from_dense_mask(random_mask(1, 2, 40, 40, 16), q_block=16, kv_block=16)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, layout, backend=backend, return_lse=True)

    want = results(attend, q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(attend, q, k, v)
    # the reference leaves its backward to autograd, which does follow an autocast around backward()
    for name in want if backend == "gather" else ("out", "lse"):
        assert torch.equal(got[name], want[name]), name


# ---------------------------------------------------------------- invariances

sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "B": st.integers(1, 2),
        "Nq": st.integers(1, 60),
        "Nk": st.integers(1, 60),
        "block": st.sampled_from([8, 16]),
    }
)


def close(a, b, name=""):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


@property_test
@given(sizes, st.booleans())
def test_a_full_layout_is_dense_attention(s, with_lse):
    q, k, v = tensors(s["B"], s["Nq"], s["Nk"], 4, 2, 8, seed=s["seed"])
    mask = torch.ones(s["Nq"], s["Nk"], dtype=torch.bool)
    layout = BlockLayout.from_dense_mask(mask, q_block=s["block"], kv_block=s["block"])

    def dense(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)

    want = results(dense, q, k, v, with_lse=False)
    for backend in ("gather", "sdpa"):
        got = results(lambda *x, b=backend: block_sparse_attention(*x, layout, backend=b), q, k, v, with_lse=False)
        for name in want:
            close(got[name], want[name], f"{backend} {name}")


@property_test
@given(sizes, st.data())
def test_splitting_the_keys_anywhere_and_merging_changes_nothing(s, data):
    q, k, v = tensors(s["B"], s["Nq"], s["Nk"], 2, 2, 8, seed=s["seed"])
    mask = random_mask(s["B"], 2, s["Nq"], s["Nk"], s["block"], s["seed"])
    part_of = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=s["Nk"], max_size=s["Nk"])))
    block = {"q_block": s["block"], "kv_block": s["block"], "allow_empty_rows": True}
    whole = BlockLayout.from_dense_mask(mask, **block)
    parts = [BlockLayout.from_dense_mask(mask & (part_of == p), **block) for p in range(3)]

    def merged(q, k, v):
        pieces = [block_sparse_attention(q, k, v, part, return_lse=True, backend="gather") for part in parts]
        return merge_attention([out for out, _ in pieces], [lse for _, lse in pieces])

    want = results(lambda *x: block_sparse_attention(*x, whole, return_lse=True, backend="gather"), q, k, v)
    got = results(merged, q, k, v)
    for name in want:
        close(got[name], want[name], name)


@property_test
@given(sizes, st.permutations(range(4)))
def test_head_permutation_equivariance(s, order):
    q, k, v = tensors(s["B"], s["Nq"], s["Nk"], 4, 4, 8, seed=s["seed"])
    mask = random_mask(1, 4, s["Nq"], s["Nk"], s["block"], s["seed"])
    block = {"q_block": s["block"], "kv_block": s["block"]}
    out = block_sparse_attention(q, k, v, BlockLayout.from_dense_mask(mask, **block), backend="gather")
    q, k, v = (x[:, :, order] for x in (q, k, v))
    permuted = block_sparse_attention(q, k, v, BlockLayout.from_dense_mask(mask[:, order], **block), backend="gather")
    close(permuted, out[:, :, order])


@property_test
@given(sizes, st.sampled_from([1, 2]), st.sampled_from([1, 4]))
def test_grouped_queries_equal_repeated_keys(s, Hk, mH):
    q, k, v = tensors(s["B"], s["Nq"], s["Nk"], 4, Hk, 8, seed=s["seed"])
    mask = random_mask(1, mH, s["Nq"], s["Nk"], s["block"], s["seed"])
    layout = BlockLayout.from_dense_mask(mask, q_block=s["block"], kv_block=s["block"])

    def repeated(q, k, v):
        k, v = (x.repeat_interleave(4 // Hk, 2) for x in (k, v))
        return block_sparse_attention(q, k, v, layout, return_lse=True, backend="gather")

    want = results(repeated, q, k, v)
    got = results(lambda *x: block_sparse_attention(*x, layout, return_lse=True, backend="gather"), q, k, v)
    for name in want:
        close(got[name], want[name], name)


@property_test
@given(sizes)
def test_calling_a_full_block_partial_changes_nothing(s):
    q, k, v = tensors(s["B"], s["Nq"], s["Nk"], 2, 2, 8, seed=s["seed"])
    mask = random_mask(1, 2, s["Nq"], s["Nk"], s["block"], s["seed"], kinds=2)
    layout = BlockLayout.from_dense_mask(mask, q_block=s["block"], kv_block=s["block"])
    # the first full entry of every row becomes a partial one with every bit set
    relabelled = dataclasses.replace(
        layout,
        n_partial=torch.ones_like(layout.n_partial),
        n_full=layout.n_full - 1,
        bitmap=torch.ones(layout.n_full.shape[0], s["block"], s["block"], dtype=torch.bool),
    )
    relabelled.check()
    assert torch.equal(relabelled.to_dense_mask(), layout.to_dense_mask())
    assert relabelled.attended_pairs == layout.attended_pairs
    want = results(lambda *x: block_sparse_attention(*x, layout, return_lse=True, backend="gather"), q, k, v)
    got = results(lambda *x: block_sparse_attention(*x, relabelled, return_lse=True, backend="gather"), q, k, v)
    for name in want:
        close(got[name], want[name], name)


def test_rows_shared_by_address_equal_rows_stored_twice():
    q, k, v = tensors(2, 64, 64, 4, 2, 24)
    lists = BlockLayout.from_dense_mask(random_mask(1, 1, 64, 64, 16), q_block=16, kv_block=16)
    shared = dataclasses.replace(lists, row_of=torch.tensor([[[0, 1, 1, 3]] * 2 + [[2, 2, 0, 3]] * 2]))
    dense = shared.to_dense_mask()
    assert gather.make_plan(shared, 2, 4, 2).stack == 2, "the heads of a group share their lists here"
    check_against_oracle(q, k, v, dense, shared, "gather", True)
    per_head = dataclasses.replace(lists, row_of=torch.tensor([[[0, 1, 1, 3], [2, 2, 0, 3]] * 2]))
    assert gather.make_plan(per_head, 2, 4, 2).stack == 1
    check_against_oracle(q, k, v, per_head.to_dense_mask(), per_head, "gather", True)


def test_batch_rows_are_independent():
    q, k, v = tensors(3, 50, 50, 2, 2, 24)
    layout = BlockLayout.from_dense_mask(random_mask(1, 2, 50, 50, 16), q_block=16, kv_block=16)
    want = block_sparse_attention(q, k, v, layout, backend="gather")
    k[1], v[2] = 1e4, torch.nan
    got = block_sparse_attention(q, k, v, layout, backend="gather")
    assert torch.equal(got[0], want[0]) and not torch.equal(got[1], want[1]) and got[2].isnan().all()


# ---------------------------------------------------------------- every backend at once, and the operator itself

EVERY = ["native", "gather", "sdpa", "reference", "auto"]


def usable(backend, *problem):
    if backend == "auto":
        return True
    return next(row for row in explain(*problem).rows if row.backend == backend).usable


@given(
    seed=st.integers(0, 2**20),
    Nq=st.integers(1, 1000),
    Nk=st.integers(1, 1000),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    blocks=st.sampled_from([(16, 16), (64, 64), (64, 128), (1, 7), (100, 33)]),
    kinds=st.sampled_from([2, 3]),
    empty=st.booleans(),
    strided=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_any_layout_and_length(seed, Nq, Nk, heads, blocks, kinds, empty, strided):
    H, Hk = heads
    q, k, v = tensors(1, Nq, Nk, H, Hk, 16, seed=seed)
    if strided:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    mask = random_mask(1, H, Nq, Nk, 32, seed=seed, kinds=kinds)
    if empty:
        mask[:, :, Nq // 2 :: 3] = False
    layout = BlockLayout.from_dense_mask(mask, q_block=blocks[0], kv_block=blocks[1], allow_empty_rows=True)
    for backend in EVERY:
        if usable(backend, q, k, v, layout):
            check_against_oracle(q, k, v, mask, layout, backend, with_lse=backend != "sdpa")


@pytest.mark.parametrize("backend", ["native", "gather", "reference"])
def test_padding_may_hold_anything(backend):
    q, k, v = tensors(2, 70, 90, 4, 2, 24)
    mask = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    layout = BlockLayout.from_block_mask(
        mask, q_len=70, kv_len=90, q_block=16, kv_block=16, allow_empty_rows=True,
        q_valid=torch.tensor([[16, 3, 0, 16, 6], [16, 16, 16, 16, 1]]),
        kv_valid=torch.tensor([[16, 16, 9, 0, 16, 10], [16, 16, 16, 16, 16, 0]]),
    )  # fmt: skip
    if not usable(backend, q, k, v, layout):
        pytest.skip(f"{backend} cannot run here")
    dense = layout.to_dense_mask()
    q_used, k_used = layout.tokens_in_use()
    check_against_oracle(q, k, v, dense, layout, backend, with_lse=True)
    clean = results(lambda *x: block_sparse_attention(*x, layout, backend=backend, return_lse=True), q, k, v)
    q, k, v = (x.masked_fill(~used[:, :, None, None], torch.nan) for x, used in ((q, q_used), (k, k_used), (v, k_used)))
    poisoned = results(lambda *x: block_sparse_attention(*x, layout, backend=backend, return_lse=True), q, k, v)
    for name, x in clean.items():
        assert torch.equal(poisoned[name], x), name


@pytest.mark.parametrize("sizes", [(0, 8, 8), (1, 0, 8), (1, 8, 0), (0, 0, 0)])
def test_zero_sizes(sizes):
    B, Nq, Nk = sizes
    q, k, v = (torch.randn(B, n, 2, 8, requires_grad=True) for n in (Nq, Nk, Nk))
    layout = BlockLayout.from_block_mask(
        torch.ones(1, 1, -(-Nq // 4), -(-Nk // 4)).bool(), q_len=Nq, kv_len=Nk, q_block=4, kv_block=4,
        allow_empty_rows=True,
    )  # fmt: skip
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    assert out.shape == q.shape and lse.shape == (B, 2, Nq)
    assert (out == 0).all() and (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.shape == x.shape and (g == 0).all() for g, x in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize("kind", ["blocks", "bitmap", "bounds"])
def test_the_operator_is_sound_and_keeps_one_graph(kind):
    q, k, v = tensors(1, 40, 40, 2, 1, 16)
    if kind == "blocks":
        layout = BlockLayout.from_block_mask(torch.eye(3).bool(), q_len=40, kv_len=40, q_block=16, kv_block=16)
    elif kind == "bitmap":
        layout = BlockLayout.from_dense_mask(random_mask(1, 2, 40, 40, 16), q_block=16, kv_block=16)
    else:
        layout = BlockLayout.from_bounds(Bounds.causal(40, 40), q_block=16, kv_block=16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    arguments = (*leaves, *lists_of(layout), layout.q_block, layout.kv_block, 0.25, True, True, "gather")
    torch.library.opcheck(torch.ops.mmeff.block_sparse_attention, arguments)

    def attend(q, k, v):
        out, lse = block_sparse_attention(q * 1.5, k, v, layout, return_lse=True)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), attend(*leaves))
    for x, y in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(attend(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_a_static_layout_can_be_exported():
    layout = BlockLayout.from_bounds(Bounds.causal(40, 40), q_block=16, kv_block=16)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return block_sparse_attention(q, k, v, layout)

    inputs = tuple(tensors(1, 40, 40, 2, 1, 16))
    exported = torch.export.export(Layer(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), Layer()(*inputs))
