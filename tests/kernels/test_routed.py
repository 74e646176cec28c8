"""routed_attention: every query picks its own key blocks; against float64, in forward and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_reference, gradient_terms, plain_attention

from mmeff.kernels import BlockLayout, block_sparse_attention, record, routed_attention
from mmeff.kernels.routed import explain_routed, grouped

property_test = settings(max_examples=25, deadline=None)
BACKENDS = ["grouped", "sdpa", "reference"]


def problem(seed=0, B=2, Nq=70, Nk=90, H=4, Hk=2, D=24, kv_block=13, share=0.4, rB=2, rH=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, Nq, H, D), (B, Nk, Hk, D), (B, Nk, Hk, D)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    routes = torch.rand(rB, rH, Nq, -(-Nk // kv_block), generator=g) < share
    return q, k, v, routes


def dense(routes, kv_block, Nk, kv_valid=None):
    mask = routes.repeat_interleave(kv_block, -1)[..., :Nk]
    if kv_valid is None:
        return mask
    return mask & (torch.arange(kv_block) < kv_valid.view(-1, routes.shape[-1], 1)).flatten(1)[:, None, None, :Nk]


def cotangent(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def results(attend, q, k, v, with_lse=True):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v) if with_lse else (attend(q, k, v), None)
    loss = (out * cotangent(out)).sum()
    if lse is not None:
        loss = (
            loss
            + (
                lse.masked_fill(lse == -torch.inf, 0.0)
                * torch.randn(lse.shape, generator=torch.Generator().manual_seed(2)).to(lse.dtype)
            ).sum()
        )
    found = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, (q, k, v)), strict=True))}
    return {name: x for name, x in found.items() if x is not None}


def check(q, k, v, routes, kv_block, backend, with_lse=True, times=2.0, kv_valid=None):
    mask = dense(routes, kv_block, k.shape[1], kv_valid)

    def plain(q, k, v):
        out, lse = plain_attention(q, k, v, mask)
        return (out, lse) if with_lse else out

    def ours(q, k, v):
        arguments = {"kv_block": kv_block, "kv_valid": kv_valid, "backend": backend, "return_lse": with_lse}
        return routed_attention(q, k, v, routes, **arguments)

    actual, same = results(ours, q, k, v, with_lse), results(plain, q, k, v, with_lse)
    reference = results(plain, q.double(), k.double(), v.double(), with_lse)
    for name in reference:
        terms = gradient_terms(q, k, v, cotangent(q)) if name in ("dq", "dk") else 0.0
        assert_close_to_reference(
            actual[name], same[name], reference[name], name=f"{backend} {name}", times=times, terms=terms
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(backend, dtype):
    q, k, v, routes = problem(dtype=dtype)
    routes[..., 0] = True
    check(q, k, v, routes, 13, backend, with_lse=backend != "sdpa", times=3.0 if backend == "sdpa" else 2.0)


@pytest.mark.parametrize(("rB", "rH"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("kv_block", [1, 7, 64, 200])
def test_shared_routes_and_key_blocks_of_any_size(rB, rH, kv_block):
    q, k, v, routes = problem(rB=rB, rH=rH, kv_block=kv_block)
    check(q, k, v, routes, kv_block, "grouped")


@given(st.integers(0, 2**20), st.integers(1, 150), st.integers(1, 150), st.integers(1, 60), st.floats(0, 1))
@property_test
def test_any_lengths_and_queries_without_picks(seed, Nq, Nk, kv_block, share):
    q, k, v, routes = problem(seed, Nq=Nq, Nk=Nk, kv_block=kv_block, share=share, D=16)
    check(q, k, v, routes, kv_block, "grouped")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rB", [1, 2])
def test_padding_within_key_blocks(backend, rB):
    q, k, v, routes = problem()
    kv_valid = torch.randint(0, 14, (rB, 7), generator=torch.Generator().manual_seed(5))
    kv_valid[:, 0] = 4
    kv_valid[:, 3] = 0
    if backend == "sdpa":  # it promises nothing for a query without keys
        routes[..., 0] = True
    else:
        routes[0, :, 5] = torch.arange(7) == 3  # one of those
    check(q, k, v, routes, 13, backend, kv_valid=kv_valid, with_lse=backend != "sdpa")
    check(q, k, v, routes, 13, backend, kv_valid=kv_valid[0], with_lse=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend):
    q, k, v, routes = problem()
    routes[..., 0] = True
    kv_valid = torch.tensor([[13, 0, 5, 13, 1, 13, 12], [2, 13, 13, 0, 0, 7, 12]], dtype=torch.int32)
    unused = ~(torch.arange(13) < kv_valid[..., None]).flatten(1)[:, :90, None, None]
    poisoned = [x.masked_fill(unused, torch.nan) for x in (k, v)]

    def attend(*x):
        return routed_attention(*x, routes, kv_block=13, kv_valid=kv_valid, backend=backend)

    clean, dirty = results(attend, q, k, v, False), results(attend, q, *poisoned, False)
    for name, x in clean.items():
        assert torch.equal(dirty[name], x), name
    assert (clean["dk"].masked_select(unused) == 0).all() and (clean["dv"].masked_select(unused) == 0).all()


def test_chunks_of_heads_agree_with_all_at_once(monkeypatch):
    q, k, v, routes = problem()
    whole = routed_attention(q, k, v, routes, kv_block=13, backend="grouped")
    monkeypatch.setitem(grouped.CHUNK_BYTES, "cpu", 1000)
    assert len(list(grouped._groups(_problem(q, k, v, routes)))) > 3
    torch.testing.assert_close(routed_attention(q, k, v, routes, kv_block=13, backend="grouped"), whole)
    check(q, k, v, routes, 13, "grouped")


def _problem(q, k, v, routes):
    from mmeff.kernels.routed.problem import RoutedProblem

    return RoutedProblem(q, k, v, routes, None, 13, 0.2, True, True)


def test_routes_of_whole_blocks_are_a_block_layout():
    q, k, v, _ = problem(Nq=64, Nk=96)
    mask = torch.rand(2, 4, 4, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[..., 0] = True
    layout = BlockLayout.from_block_mask(mask, q_len=64, kv_len=96, q_block=16, kv_block=16)
    out = routed_attention(q, k, v, mask.repeat_interleave(16, 2), kv_block=16, backend="grouped")
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, layout, backend="reference"))


def test_the_choice_and_the_kernel_within_are_recorded():
    q, k, v, routes = problem()
    with record() as calls:
        routed_attention(q, k, v, routes, kv_block=13, backend="grouped")
    assert [c.operator for c in calls] == ["routed_attention", "block_sparse_attention"]
    assert calls[0].density == pytest.approx(routes.float().mean().item())
    assert "within routed_attention" in calls[1].reason
    table = explain_routed(q, k, v, routes, kv_block=13)
    assert {row.backend for row in table.rows} == set(BACKENDS) and table.chosen in BACKENDS
    assert "key blocks of 13" in str(table)


def test_a_backend_of_block_sparse_attention_computes_the_groups():
    q, k, v, routes = problem()
    with record() as calls:
        routed_attention(q, k, v, routes, kv_block=13, backend="gather")
    assert [(c.operator, c.backend) for c in calls] == [
        ("routed_attention", "grouped"), ("block_sparse_attention", "gather"),
    ]  # fmt: skip
    assert "named by the caller" in calls[1].reason
    check(q, k, v, routes, 13, "gather")


def test_a_large_problem_is_judged_without_its_mask():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40_000, 1, 4, generator=g) for _ in range(3))
    routes = torch.rand(1, 1, 40_000, 4, generator=g) < 0.5
    rows = {row.backend: row for row in explain_routed(q, k, v, routes, kv_block=10_000).rows}
    assert not rows["sdpa"].usable and "its dense mask would have 1,600,000,000 elements" in rows["sdpa"].reason
    rows = {row.backend: row for row in explain_routed(q, k, v, torch.ones_like(routes), kv_block=10_000).rows}
    assert rows["sdpa"].usable  # everything picked needs no mask


def test_everything_picked_is_dense_attention():
    q, k, v, routes = problem()
    out = routed_attention(q, k, v, torch.ones_like(routes), kv_block=13, backend="sdpa")
    torch.testing.assert_close(out, plain_attention(q, k, v, torch.ones(1, 1, 70, 90, dtype=torch.bool))[0])


def test_zero_sizes_non_contiguous_inputs_and_one_graph():
    q, k, v, routes = problem()
    empty = routed_attention(q[:0], k[:0], v[:0], routes[:1], kv_block=13)
    assert empty.shape == (0, 70, 4, 24)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    want = routed_attention(q, k, v, routes, kv_block=13, backend="grouped")
    assert torch.equal(routed_attention(*strided, routes, kv_block=13, backend="grouped"), want)
    compiled = torch.compile(
        lambda *x: routed_attention(*x, kv_block=13, backend="grouped"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v, routes), want)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.mmeff.routed_attention, (*leaves, routes, None, 13, 0.2, True, True, "grouped"))
    kv_valid = torch.full((1, 7), 5, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.mmeff.routed_attention, (*leaves, routes, kv_valid, 13, 0.2, False, True, "grouped")
    )
    compiled = torch.compile(
        lambda *x: routed_attention(*x, kv_block=13, kv_valid=kv_valid, backend="grouped"),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    want = routed_attention(q, k, v, routes, kv_block=13, kv_valid=kv_valid, backend="grouped")
    torch.testing.assert_close(compiled(q, k, v, routes), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"routes": torch.ones(2, 4, 70, 7)}, TypeError, "routes must be a bool tensor.*float32"),
        ({"routes": torch.ones(2, 4, 70, 6).bool()}, ValueError, r"nK = ceil\(Nk / kv_block\) = ceil\(90 / 13\)"),
        ({"kv_valid": torch.ones(6).int()}, ValueError, r"kv_valid must be \(nK,\) = \(7,\) or \(B\|1, nK\)"),
        ({"kv_valid": torch.ones(7)}, TypeError, "kv_valid must be an int32 or int64 tensor .*float32"),
        ({"kv_block": 0}, ValueError, "kv_block must be an int >= 1"),
        ({"k": torch.ones(2, 90, 3, 24)}, ValueError, "Hk dividing H=4"),
        ({"v": torch.ones(2, 90, 2, 24).half()}, ValueError, "share dtype and device"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite Python float"),
        ({"backend": "groupd"}, ValueError, "'grouped'"),
    ],
)
def test_messages(change, error, message):
    q, k, v, routes = problem()
    arguments = {"q": q, "k": k, "v": v, "routes": routes, "kv_block": 13, **change}
    with pytest.raises(error, match=message):
        routed_attention(**arguments)
