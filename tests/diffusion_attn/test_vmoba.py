"""VMoBA: its picks against the published rule written the slow way, and its attention and gradients against a mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_reference, plain_attention

from mmeff.diffusion_attn import VMoBA, vmoba
from mmeff.diffusion_attn.vmoba import _partition
from mmeff.kernels import record
from mmeff.registry import build, get

CPU = torch.device("cpu")
GRID = (5, 6, 7)  # ragged against every cut below
CUTS = [(2,), (0.4,), (3, 4), (2, 4, 3)]


def tokens(N, B=2, H=3, D=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, N, H, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


# ---------------------------------------------------------------------------- the rule, in words


def chunk_of_token(grid, cut):
    """The chunk of every token, by its coordinates."""
    F, H, W = grid
    if len(cut) == 1:
        return torch.tensor([t // int(cut[0] * H * W) for t in range(F * H * W)])
    ct, ch, cw = (F, *cut) if len(cut) == 2 else cut
    nh, nw = math.ceil(H / ch), math.ceil(W / cw)
    return torch.tensor(
        [((f // ct) * nh + h // ch) * nw + w // cw for f in range(F) for h in range(H) for w in range(W)]
    )


def published_gate(q, k, chunk):
    """gamma[c, h, s] = mean key of chunk c times query s, for one sample: q, k (S, H, D)."""
    return torch.stack([torch.einsum("hd,shd->hs", k[chunk == c].mean(0), q) for c in range(int(chunk.max()) + 1)])


def published_groups(gamma, scope):
    """Index tuples of the entries that share a threshold, group after group."""
    C, H, S = gamma.shape
    entries = [(c, h, s) for c in range(C) for h in range(H) for s in range(S)]
    key = {
        "query_head": lambda c, h, s: (h, s), "head_global": lambda c, h, s: h, "block": lambda c, h, s: c,
        "overall": lambda c, h, s: 0,
    }[scope]  # fmt: skip
    groups = {}
    for entry in entries:
        groups.setdefault(key(*entry), []).append(entry)
    return groups.values()


def published_threshold(gamma, chunk, tau, scope):
    """Steps 1 to 4 of the threshold selection, group by group."""
    picked = torch.zeros_like(gamma, dtype=torch.bool)
    for group in published_groups(gamma, scope):
        scores = torch.stack([gamma[e] for e in group])
        own = torch.tensor([int(chunk[s]) == c for c, _, s in group])
        span = scores.max() - scores.min()
        n = (scores - scores.min()) / (span if span > 1e-6 else 1)
        total = n.sum() + 1e-6
        need = max(0.0, tau - float((n * own).sum() / total))
        ranked = sorted((i for i in range(len(group)) if not own[i]), key=lambda i: (-float(n[i]), i))
        held = 0.0
        for i in ranked:  # ranks 0..k inclusive, k the first at which the running share reaches the need
            picked[group[i]] = True
            held += float(n[i])
            if held / float(total) >= need:
                break
        for i, entry in enumerate(group):
            picked[entry] |= bool(own[i])
    return picked


def published_top_k(gamma, chunk, k, scope):
    C, H, S = gamma.shape
    first = gamma.clone()
    for s in range(S):
        first[int(chunk[s]), :, s] += 1e9
    picked = torch.zeros_like(gamma, dtype=torch.bool)
    budget = {"query_head": k, "head_global": k * S, "overall": k * H * S}[scope]
    for group in published_groups(gamma, scope):
        for entry in sorted(group, key=lambda e: -float(first[e]))[:budget]:
            picked[entry] = True
    return picked


def picks(method, q, k, grid, layer=0):
    """(B, C, H, S), as the published gate is laid out."""
    return method.routes(grid=grid, q=q, k=k, layer=layer).picked.permute(0, 3, 1, 2)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("scope", ["query_head", "head_global", "block", "overall"])
@pytest.mark.parametrize("tau", [0.0, 0.25, 0.7])
def test_threshold_selection_is_the_published_one(cut, scope, tau):
    grid = (3, 4, 5)
    q, k, _ = tokens(60, H=2, dtype=torch.float64)
    chunk = chunk_of_token(grid, cut)
    found = picks(VMoBA(chunks=(cut,), scope=scope, threshold=tau), q, k, grid)
    for b in range(2):
        assert torch.equal(found[b], published_threshold(published_gate(q[b], k[b], chunk), chunk, tau, scope))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("scope", ["query_head", "head_global", "overall"])
@pytest.mark.parametrize("k_chunks", [1, 2, 50])
def test_top_k_selection_is_the_published_one(cut, scope, k_chunks):
    grid = (3, 4, 5)
    q, k, _ = tokens(60, B=1, H=2, dtype=torch.float64)
    chunk = chunk_of_token(grid, cut)
    found = picks(VMoBA(chunks=(cut,), scope=scope, top_k=k_chunks), q, k, grid)
    assert torch.equal(found[0], published_top_k(published_gate(q[0], k[0], chunk), chunk, k_chunks, scope))


@pytest.mark.parametrize("scope", ["query_head", "head_global", "block", "overall"])
def test_choosing_in_portions_changes_nothing(monkeypatch, scope):
    q, k, _ = tokens(210)
    method = VMoBA(chunks=((2, 4, 3),), scope=scope)
    assert len(list(method._portions(q, 18))) == 1
    whole = method.routes(grid=GRID, q=q, k=k).picked
    monkeypatch.setitem(vmoba.CHUNK_BYTES, "cpu", 4 * 2 * 18 * 3 * 50)
    assert len(list(method._portions(q, 18))) == {"query_head": 5, "head_global": 3}.get(scope, 1)
    assert torch.equal(method.routes(grid=GRID, q=q, k=k).picked, whole)


# ---------------------------------------------------------------------------- the partition


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    st.one_of(
        st.tuples(st.floats(0.1, 4)), st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    ),
)  # fmt: skip
def test_partition_round_trip(grid, cut):
    N = math.prod(grid)
    if len(cut) == 1 and int(cut[0] * grid[1] * grid[2]) < 1:
        with pytest.raises(ValueError, match=r"VMoBA\.chunks must make chunks of at least one token"):
            VMoBA(chunks=(cut,)).check_grid(grid)
        return
    part = _partition(grid, cut, CPU)
    chunk = chunk_of_token(grid, cut)
    assert torch.equal(part.chunk_of, chunk)
    assert torch.equal(part.valid.long(), torch.bincount(chunk))
    slots = torch.arange(N) if part.slots is None else part.slots
    used = (torch.arange(part.size) < part.valid[:, None]).flatten()[: len(slots)]
    assert torch.equal(slots[used].sort().values, torch.arange(N))  # every token once
    at = torch.arange(len(slots)) // part.size
    assert torch.equal(chunk[slots[used]], at[used])  # and in its chunk
    assert part.even == bool((part.valid == part.size).all())


def test_tokens_lie_in_a_chunk_as_published():
    """2-D chunks in the order (nh, nw, t, ch, cw), 3-D ones in (nt, nh, nw, ct, ch, cw)."""
    index = torch.arange(4 * 6 * 8).view(4, 6, 8)
    two = index.view(4, 2, 3, 4, 2).permute(1, 3, 0, 2, 4).flatten()
    three = index.view(2, 2, 2, 3, 4, 2).permute(0, 2, 4, 1, 3, 5).flatten()
    assert torch.equal(_partition((4, 6, 8), (3, 2), CPU).slots, two)
    assert torch.equal(_partition((4, 6, 8), (2, 3, 2), CPU).slots, three)
    assert _partition((4, 6, 8), (2,), CPU).slots is None


def test_layers_take_turns():
    method = VMoBA(chunks=((1,), (2, 2), (2, 2, 2)), first_layer=2, top_k=(1, 2, 3))
    assert [method.turn(layer) for layer in range(6)] == [1, 2, 0, 1, 2, 0]
    q, k, _ = tokens(4 * 4 * 4)
    sizes = [method.routes(grid=(4, 4, 4), q=q, k=k, layer=layer).picked for layer in (2, 3, 4)]
    assert [x.shape[-1] for x in sizes] == [4, 4, 8]
    assert [int(x.sum(-1).unique()) for x in sizes] == [1, 2, 3]


# ---------------------------------------------------------------------------- attention


def mask_of(method, q, k, grid, text, text_valid, layer=0):
    mask = method.routes(grid=grid, q=q, k=k, text_len=text, layer=layer).to_dense_mask(text)
    video = math.prod(grid)
    used = torch.ones(q.shape[0], video + text, dtype=torch.bool)
    if text_valid is not None:
        used[:, video:] = torch.arange(text) < text_valid[:, None]
    return mask & used[:, None, None, :] & used[:, None, :, None]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(("text", "text_valid"), [(0, None), (11, None), (11, (4, 11)), (40, (0, 33))])
def test_attention_and_its_gradients_are_those_of_the_mask(cut, text, text_valid):
    method = VMoBA(chunks=(cut,))
    q, k, v = tokens(210 + text)
    text_valid = None if text_valid is None else torch.tensor(text_valid)
    mask = mask_of(method, q, k, GRID, text, text_valid)
    assert 0 < mask[..., :210, :210].float().mean() < 1

    def run(attend, *x):
        x = [y.detach().clone().requires_grad_() for y in x]
        out = attend(*x)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        return [out, *torch.autograd.grad((out * weight).sum(), x)]

    ours = run(lambda *x: method.attend(*x, grid=GRID, text_len=text, text_valid=text_valid), q, k, v)
    plain = run(lambda *x: plain_attention(*x, mask)[0], q, k, v)
    exact = run(lambda *x: plain_attention(*x, mask)[0], *(x.double() for x in (q, k, v)))
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_close_to_reference(a, p, e, name=name)


@pytest.mark.parametrize("backend", ["gather", "sdpa", "reference"])
def test_every_backend(backend):
    q, k, v = tokens(210 + 5)
    want = VMoBA().attend(q, k, v, grid=GRID, text_len=5, layer=2)
    with record() as calls:
        out = VMoBA(backend=backend).attend(q, k, v, grid=GRID, text_len=5, layer=2)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert backend in {call.backend for call in calls}


def test_padded_text_may_hold_anything_and_gives_nothing():
    q, k, v = tokens(210 + 9)
    valid = torch.tensor([9, 3])
    clean = VMoBA().attend(q, k, v, grid=GRID, text_len=9, text_valid=valid)
    for x in (q, k, v):
        x[1, 213:] = torch.nan
    out = VMoBA().attend(q, k, v, grid=GRID, text_len=9, text_valid=valid)
    assert torch.equal(out, clean) and (out[1, 213:] == 0).all()


def test_batch_rows_are_independent():
    q, k, v = tokens(210)
    method = VMoBA(scope="overall", chunks=((2, 4, 3),))
    # the published scope "overall" spans heads and queries of a sample, not samples
    both = method.attend(q, k, v, grid=GRID)
    one = method.attend(q[1:], k[1:], v[1:], grid=GRID)
    torch.testing.assert_close(both[1:], one, atol=1e-6, rtol=1e-5)


def test_enough_chunks_are_dense_attention():
    q, k, v = tokens(210 + 6)
    for layer in range(3):
        out = VMoBA(top_k=10_000).attend(q, k, v, grid=GRID, text_len=6, layer=layer)
        dense = plain_attention(q, k, v, torch.ones(1, 1, 216, 216, dtype=torch.bool))[0]
        torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(which, value):
    q, k, v = tokens(210)
    {"q": q, "k": k}[which][1, 17, 0, 3] = value
    with pytest.raises(ValueError, match=rf"VMoBA: {which} must be finite, got \d+ NaN or infinite of"):
        VMoBA().attend(q, k, v, grid=GRID)


def test_density_counts_pairs():
    q, k, _ = tokens(210)
    routes = VMoBA(chunks=((2, 4, 3),)).routes(grid=GRID, q=q, k=k)
    assert routes.density == pytest.approx(routes.to_dense_mask().float().mean().item())


# ---------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 1.5}, r"VMoBA\.threshold must be in \[0, 1\], got 1\.5; the authors use 0\.25"),
        ({"threshold": None}, r"threshold must be a number where top_k is None, got None"),
        ({"threshold": 0.5, "top_k": 3}, r"threshold must be None where top_k is given, got 0\.5; pass either"),
        ({"top_k": 3, "scope": "block"}, r"scope must not be 'block' with top_k, which counts chunks per query"),
        ({"top_k": (1, 2)}, r"top_k must have one number per entry of chunks \(3\), or be one number, got \(1, 2\)"),
        ({"top_k": 0}, r"top_k must be >= 1 chunk, a query's own, got 0"),
        ({"chunks": ()}, r"chunks must hold at least one way to cut, got \(\)"),
        ({"chunks": ((1, 2, 3, 4),)}, r"chunks must hold \(frames,\), \(rows, columns\) or"),
        ({"chunks": ((1.5, 2),)}, r"whole but for the first kind, got \(\(1\.5, 2\),\)"),
        ({"chunks": ((0,),)}, r"positive"),
        ({"first_layer": -1}, r"first_layer must be >= 0, got -1"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        VMoBA(**fields)


def test_there_is_no_block_layout():
    with pytest.raises(TypeError, match=r"VMoBA has no block layout.*VMoBA\.routes"):
        VMoBA().layout(grid=GRID)
    q, k, v = tokens(210)
    with pytest.raises(TypeError, match="takes no layout"):
        VMoBA().attend(q, k, v, grid=GRID, layout=object())


def test_presets():
    base = VMoBA.for_model("77x480x832")
    assert (base.threshold, base.chunks, base.scope, base.dense_steps) == (0.25, VMoBA().chunks, "query_head", 12)
    assert VMoBA.for_model("77x480x832-topk").top_k == (3, 20, 15)
    counts = VMoBA.for_model("77X448x832")
    assert counts.top_k == (2, 6, 18) and counts.threshold is None
    speed = VMoBA.for_model("speed-test", backend="gather")
    part = _partition((21, 30, 52), speed.chunks[0], CPU)
    assert part.size == 455 and len(part.valid) == 3 * 6 * 4 and part.even and speed.threshold == 0.3
    with pytest.raises(ValueError, match=r"no published setting for '77x480x83'\. Did you mean '77x480x832'"):
        VMoBA.for_model("77x480x83")
    with pytest.raises(TypeError, match="chunk_size"):
        VMoBA.for_model("77x480x832", chunk_size=3)


def test_registered_and_travels():
    assert get("vmoba") is VMoBA and VMoBA().dynamic
    method = build("vmoba", chunks=[[0.5], [2, 3]], top_k=[1, 2])
    assert method.chunks == ((0.5,), (2, 3)) and method.top_k == (1, 2) and method.threshold is None
    assert build(method.to_dict()) == method
