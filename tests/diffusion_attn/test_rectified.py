"""Rectified SpaAttn against its formulas written out block by block, and what must hold on any grid, text and base."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_reference, plain_attention

from mmeff.diffusion_attn import GNA, Radial, RectifiedSpaAttn, VMoBA, rectified
from mmeff.diffusion_attn._base import timed_by
from mmeff.diffusion_attn._ordered import OrderedLayout
from mmeff.kernels import BlockLayout, record
from mmeff.kernels.permute import gilbert_permutation
from mmeff.registry import build, get
from mmeff.report import Recorder

RAGGED, SMALL = (5, 6, 7), {"block": 16, "first_frame": False}


def tokens(N, B=2, H=3, D=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, N, H, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def smooth(grid, H=2, D=16, seed=0):
    """Tokens of a video that changes slowly: random waves over its coordinates, alike from token to token."""
    g = torch.Generator().manual_seed(seed)
    at = torch.stack(torch.meshgrid(*(torch.arange(n) / n for n in grid), indexing="ij"), -1).view(-1, 3)

    def waves():
        directions = torch.randn(3, H * D, generator=g)
        return torch.sin(2 * at @ directions + 6 * torch.rand(H * D, generator=g)).view(1, -1, H, D)

    return waves(), waves(), waves()


def dense(q, k, v):
    return plain_attention(q, k, v, torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool))[0]


# ---------------------------------------------------------------------------- the formulas, head by head, block by block


def touching(grid, position, B):
    """M_nb: whether a token of block a has a 26-neighbour, or itself, in block b."""
    n = -(-math.prod(grid) // B)
    mask = torch.zeros(n, n, dtype=torch.bool)
    index = {p: i for i, p in enumerate(itertools.product(*(range(s) for s in grid)))}
    for p, i in index.items():
        for shift in itertools.product((-1, 0, 1), repeat=3):
            j = index.get(tuple(a + s for a, s in zip(p, shift, strict=True)))
            if j is not None:
                mask[int(position[i]) // B, int(position[j]) // B] = True
    return mask


def written_out(q, k, v, text, *, B, drop, p_th, forced):
    """Steps 1 to 8 for one head: q, k, v (N + T, D) in the order of the blocks, N a multiple of B. Returns S and the output."""
    D, N = q.shape[1], q.shape[0] - text
    n = N // B
    qb, kb, vb = (x[:N].view(n, B, D) for x in (q, k, v))
    qm, km, vm = (x.mean(1) for x in (qb, kb, vb))
    scores = qm @ torch.cat((km, k[N:])).T / D**0.5
    e = scores.softmax(-1)
    E_text = e[:, n:].sum(1, keepdim=True)
    p = torch.cat((B * e[:, :n], E_text), 1) / (B * e[:, :n].sum(1, keepdim=True) + E_text)
    aq, ak = ((x - m[:, None]).abs().mean(1) for x, m in ((qb, qm), (kb, km)))
    error = (aq @ km.T).abs() + (qm @ ak.T).abs()
    C = (qm @ km.T).abs() > error
    S = torch.zeros(n, n, dtype=torch.bool)
    columns = n + 1 if text else n
    for i in range(n):
        order = p[i, :columns].argsort(descending=True)
        taken = max(int((p[i, order].cumsum(0) <= p_th).sum()) + 1, int((1 - drop) * n))
        for j in order[:taken].tolist():
            if j < n:
                S[i, j] = True
    S |= forced
    out = torch.empty_like(q)
    for i in range(n):
        rows = slice(i * B, (i + 1) * B)
        keys = [j * B + t for j in range(n) if S[i, j] for t in range(B)] + list(range(N, N + text))
        sparse = (q[rows] @ k[keys].T / D**0.5).softmax(-1) @ v[keys]
        left = ~S[i] & C[i]
        R = p[i, :n][~left].sum() + p[i, n]
        out[rows] = R * sparse + p[i, :n][left] @ vm[left]
    out[N:] = (q[N:] @ k.T / D**0.5).softmax(-1) @ v
    return S, out, C


@pytest.mark.parametrize("order", ["gilbert", "raster"])
@pytest.mark.parametrize("text", [0, 16, 21])
@pytest.mark.parametrize(("drop", "p_th"), [(0.75, 0.3), (0.95, 0.1), (0.4, 0.6)])
@pytest.mark.parametrize("first_frame", [True, False])
def test_selection_and_output_are_the_formulas_on_aligned_grids(order, text, drop, p_th, first_frame):
    grid, B = (4, 8, 8), 16
    N = math.prod(grid)
    method = RectifiedSpaAttn(drop=drop, p_threshold=p_th, block=B, order=order, first_frame=first_frame)
    q, k, v = (2 * x for x in tokens(N + text, B=1, H=2, dtype=torch.float64))
    q[:, :N] += q[:, :N].view(1, -1, B, 2, 16).mean(2).repeat_interleave(B, 1) * 3  # so that some means are worth it
    k[:, :N] += q[:, :N].roll(40, 1)
    curve = torch.arange(N) if order == "raster" else gilbert_permutation(grid, (2, 1, 0)).perm
    perm = torch.cat((curve, torch.arange(N, N + text)))
    position = curve.argsort()
    forced = touching(grid, position, B)
    if first_frame:
        holds = torch.zeros(N // B, dtype=torch.bool)
        holds[position[: 8 * 8] // B] = True
        forced |= holds[:, None] & holds
    out = method.attend(q, k, v, grid=grid, text_len=text)
    found = method.kernel_layout(grid=grid, text_len=text, q=q, k=k)
    mask = (found.layout if isinstance(found, OrderedLayout) else found).block_mask()
    compensable = []
    for h in range(2):
        S, expected, C = written_out(
            *(x[0, perm, h] for x in (q, k, v)), text, B=B, drop=drop, p_th=p_th, forced=forced
        )
        assert torch.equal(mask[0, h, : N // B, : N // B], S)
        assert mask[0, h, N // B :].all() and mask[0, h, :, N // B :].all()
        torch.testing.assert_close(out[0, perm, h], expected, atol=1e-11, rtol=1e-9)
        compensable.append(C & ~S)
    some = torch.stack(compensable)
    assert not some.all() and (some.any() or drop < 0.5)  # the sample exercises the gain test


# ---------------------------------------------------------------------------- what must hold


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 25),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from([True, "ipar", "gapr", False]),
    st.sampled_from(["gilbert", "raster"]),
    st.booleans(),
)
def test_weights_sum_to_one(grid, text, block, drop, rectify, order, near):
    q, k, v = tokens(math.prod(grid) + text, H=2)
    method = RectifiedSpaAttn(drop=drop, block=block, rectify=rectify, order=order, neighbours=near)
    out = method.attend(3 * q, k, torch.ones_like(v), grid=grid, text_len=text)
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-4, rtol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 25),
    st.integers(1, 40),
    st.sampled_from([True, "ipar", "gapr", False]),
    st.sampled_from(["gilbert", "raster"]),
)
def test_drop_0_is_dense_attention(grid, text, block, rectify, order):
    q, k, v = tokens(math.prod(grid) + text, H=2)
    out = RectifiedSpaAttn(drop=0, block=block, rectify=rectify, order=order).attend(q, k, v, grid=grid, text_len=text)
    torch.testing.assert_close(out, dense(q, k, v), atol=1e-4, rtol=0)


@pytest.mark.parametrize("order", ["gilbert", "raster"])
@pytest.mark.parametrize("text", [0, 20])
def test_rectification_brings_smooth_videos_closer_to_dense(order, text):
    grid = (8, 12, 16)
    words = tokens(text, B=1, H=2)
    q, k, v = (torch.cat((x, y / 2), 1) for x, y in zip(smooth(grid), words, strict=True))
    method = RectifiedSpaAttn(drop=0.75, block=32, order=order, first_frame=False)
    want = dense(q, k, v)
    layout = method.kernel_layout(grid=grid, text_len=text, q=q, k=k)
    assert layout.density < 0.65

    def error(rectify):
        out = method.replace(rectify=rectify).attend(q, k, v, grid=grid, text_len=text, layout=layout)
        return float((out - want).square().mean().sqrt())

    assert error(True) < 0.9 * error(False)
    assert error("ipar") < 0.3 * error(False)  # where blocks are smooth, the gain test refuses much that would help


def test_a_layout_that_is_passed_is_used():
    q, k, v = tokens(210)
    method = RectifiedSpaAttn(**SMALL)
    for text_free in (method, method.replace(order="raster")):
        layout = text_free.kernel_layout(grid=RAGGED, q=q, k=k)
        with timed_by(recorder := Recorder()):
            again = text_free.attend(q, k, v, grid=RAGGED, layout=layout)
        torch.testing.assert_close(again, text_free.attend(q, k, v, grid=RAGGED))
        assert "layout" not in recorder.seconds() and "selection" in recorder.seconds()


def test_layout_in_raster_order_is_the_selected_one():
    q, k, v = tokens(210 + 9)
    method = RectifiedSpaAttn(order="raster", rectify=False, **SMALL)
    layout = method.layout(grid=RAGGED, text_len=9, q=q, k=k)
    layout.check()
    assert layout.density < 1
    out = method.attend(q, k, v, grid=RAGGED, text_len=9)
    torch.testing.assert_close(out, plain_attention(q, k, v, layout.to_dense_mask())[0], atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"layout needs order='raster' or a base, got order='gilbert'.*kernel_layout"):
        RectifiedSpaAttn().layout(grid=RAGGED, q=q, k=k)
    with pytest.raises(ValueError, match="selects blocks by q and k, so its layout needs both"):
        method.layout(grid=RAGGED, q=q)


def test_kernel_layout_comes_with_its_order():
    q, k, v = tokens(210 + 9)
    method = RectifiedSpaAttn(rectify=False, **SMALL)
    ordered = method.kernel_layout(grid=RAGGED, text_len=9, q=q, k=k)
    mask = ordered.layout.to_dense_mask()[:, :, ordered.inverse][..., ordered.inverse]
    out = method.attend(q, k, v, grid=RAGGED, text_len=9)
    torch.testing.assert_close(out, plain_attention(q, k, v, mask)[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rectify", [True, "gapr", False])
@pytest.mark.parametrize("order", ["gilbert", "raster"])
def test_padded_text_is_as_if_it_were_not_there(rectify, order):
    q, k, v = tokens(210 + 23)
    method = RectifiedSpaAttn(rectify=rectify, order=order, **SMALL)
    valid = torch.tensor([23, 10])
    for x in (q, k, v):
        x[1, 220:] = torch.nan
    out = method.attend(q, k, v, grid=RAGGED, text_len=23, text_valid=valid)
    assert (out[1, 220:] == 0).all()
    short = method.attend(*(x[1:, :220] for x in (q, k, v)), grid=RAGGED, text_len=10)
    torch.testing.assert_close(out[1:, :220], short, atol=2e-6, rtol=1e-5)
    whole = method.attend(*(x[:1] for x in (q, k, v)), grid=RAGGED, text_len=23)
    torch.testing.assert_close(out[:1], whole, atol=2e-6, rtol=1e-5)


def test_padded_text_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in tokens(210 + 8))
    poisoned = [x.detach().clone() for x in (q, k, v)]
    for x in poisoned:
        x[0, 213:] = torch.nan
        x.requires_grad_()
    valid = torch.tensor([3, 8])
    grads = []
    for x in ((q, k, v), poisoned):
        out = RectifiedSpaAttn(**SMALL).attend(*x, grid=RAGGED, text_len=8, text_valid=valid)
        grads.append(torch.autograd.grad(out.square().sum(), x))
    for clean, dirty in zip(*grads, strict=True):
        assert torch.equal(clean, dirty) and (dirty[0, 213:] == 0).all()


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite(which, value):
    q, k, v = tokens(210)
    {"q": q, "k": k}[which][1, 17, 0, 3] = value
    with pytest.raises(ValueError, match=rf"RectifiedSpaAttn: {which} must be finite, got 1 NaN or infinite of"):
        RectifiedSpaAttn(**SMALL).attend(q, k, v, grid=RAGGED)


# ---------------------------------------------------------------------------- gradients


def by_hand(q, k, v, layout, compensated, block):
    """The rectified output for a fixed selection in raster order without text, in plain differentiable PyTorch."""
    B, N, H, D = q.shape
    n = -(-N // block)
    member = torch.zeros(n, N, dtype=q.dtype)
    member[torch.arange(N) // block, torch.arange(N)] = 1
    counts = member.sum(1)

    def mean(x):
        return torch.einsum("nt,bthd->bnhd", member / counts[:, None], x)

    scores = torch.einsum("bnhd,bmhd->bhnm", mean(q), mean(k)) * D**-0.5 + counts.log()
    weights = scores.softmax(-1) * compensated
    sparse = plain_attention(q, k, v, layout.to_dense_mask())[0]
    tail = torch.einsum("bhnm,bmhd->bnhd", weights, mean(v))
    factor = (1 - weights.sum(-1)).transpose(1, 2)[..., None]
    at = torch.arange(N) // block
    return factor[:, at] * sparse + tail[:, at]


def test_gradients_are_exact_for_the_selection():
    q, k, v = (2 * x for x in tokens(210))
    k[:, :] += q.roll(30, 1)
    method = RectifiedSpaAttn(order="raster", **SMALL)
    layout = method.layout(grid=RAGGED, q=q, k=k)
    cut = rectified._cut(layout, RAGGED, 0)
    compensated = method._compensated(q, k, cut, layout)
    assert 0 < compensated.float().mean() < 1

    def run(attend, *x):
        x = [y.detach().clone().requires_grad_() for y in x]
        out = attend(*x)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        return [out, *torch.autograd.grad((out * weight).sum(), x)]

    ours = run(lambda *x: method.attend(*x, grid=RAGGED), q, k, v)
    plain = run(lambda *x: by_hand(*x, layout, compensated, 16), q, k, v)
    exact = run(lambda *x: by_hand(*x, layout, compensated, 16), *(x.double() for x in (q, k, v)))
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_close_to_reference(a, p, e, name=name)


@pytest.mark.parametrize("base", [None, GNA(window=(3, 4, 4), tile=(2, 4, 4))], ids=["curve", "padded tiles"])
@pytest.mark.parametrize("text", [0, 7])
def test_gradients_in_another_order_against_differences(base, text):
    grid = (3, 5, 6)
    q, k, v = tokens(90 + text, B=1, H=1, D=4, dtype=torch.float64)
    choice = {} if base is not None else SMALL
    method = RectifiedSpaAttn(base=base, rectify="ipar", **choice)
    layout = method.kernel_layout(grid=grid, text_len=text, q=q, k=k)
    weight = tokens(90 + text, B=1, H=1, D=4, seed=3, dtype=torch.float64)[0]

    def loss(*x):
        return (method.attend(*x, grid=grid, text_len=text, layout=layout) * weight).sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(loss(*leaves), leaves)
    for i, direction in enumerate(tokens(90 + text, B=1, H=1, D=4, seed=5, dtype=torch.float64)):
        step = 1e-5 * direction
        moved = [[x + sign * step if i == j else x for j, x in enumerate((q, k, v))] for sign in (1, -1)]
        slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-5
        torch.testing.assert_close((grads[i] * direction).sum(), slope, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------- any base

BASES = [
    Radial(block=16, decay=0.2, drop_below=8, dense_steps=0, dense_layers=0),
    GNA(window=(1, 3, 3), block=16),
    GNA(window=(3, 4, 4), stride=(1, 2, 2), tile=(2, 4, 4)),
    RectifiedSpaAttn(),  # stands for none: the method's own choice
]


def over(base, **fields):
    return (
        RectifiedSpaAttn(**SMALL, **fields)
        if isinstance(base, RectifiedSpaAttn)
        else RectifiedSpaAttn(base=base, **fields)
    )


@pytest.mark.parametrize("base", BASES, ids=["radial", "gna", "gna in padded tiles", "own"])
@pytest.mark.parametrize(("text", "valid"), [(0, None), (9, None), (9, (4, 9))])
def test_weights_sum_to_one_over_any_base(base, text, valid):
    q, k, v = tokens(210 + text)
    valid = None if valid is None else torch.tensor(valid)
    out = over(base).attend(2 * q, k, torch.ones_like(v), grid=RAGGED, text_len=text, text_valid=valid)
    want = torch.ones_like(out)
    if valid is not None:
        want[0, 214:] = 0
    torch.testing.assert_close(out, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("base", BASES[:3], ids=["radial", "gna", "gna in padded tiles"])
@pytest.mark.parametrize("text", [0, 9])
def test_unrectified_is_the_base(base, text):
    q, k, v = tokens(210 + text)
    out = over(base, rectify=False).attend(q, k, v, grid=RAGGED, text_len=text)
    assert torch.equal(out, base.attend(q, k, v, grid=RAGGED, text_len=text))
    assert not torch.allclose(over(base, rectify="ipar").attend(q, k, v, grid=RAGGED, text_len=text), out, atol=1e-3)


@pytest.mark.parametrize("base", BASES[:3], ids=["radial", "gna", "gna in padded tiles"])
def test_a_base_is_rectified_towards_dense(base):
    grid = (6, 12, 10)
    q, k, v = smooth(grid)
    want = dense(q, k, v)

    def error(rectify):
        return float((over(base, rectify=rectify).attend(q, k, v, grid=grid) - want).square().mean())

    assert error(True) < error(False)


def test_partly_visited_blocks_count_by_their_share(monkeypatch):
    """A window that moves by single tokens visits many blocks in part: counted as visited, they lose what they are worth."""
    grid, base = (6, 12, 10), GNA(window=(3, 5, 5), tile=(2, 3, 5))
    q, k, v = smooth(grid)
    want, frame, method = dense(q, k, v), base.kernel_layout(grid=grid), over(base, rectify="ipar")
    assert frame.layout.partial_share > 0.3

    def error():
        fresh = dataclasses.replace(frame, layout=dataclasses.replace(frame.layout))  # which derives its shares anew
        return float((method.attend(q, k, v, grid=grid, layout=fresh) - want).square().mean())

    by_share = error()
    monkeypatch.setattr(BlockLayout, "visited_shares", lambda layout: layout.block_mask().double())
    assert by_share < 0.2 * error()  # measured 0.05


def test_padded_tiles_are_pooled_by_their_tokens():
    """A base in padded tiles against the same blocks listed by hand, in video order with one block per tile."""
    grid, tile = (3, 4, 5), (2, 3, 3)
    base = GNA(window=(1, 3, 3), tile=tile)
    q, k, v = tokens(60, B=1, H=1, dtype=torch.float64)
    out = over(base, rectify="ipar").attend(q, k, v, grid=grid)
    at = [[f // 2 * 4 + h // 3 * 2 + w // 3] for f, h, w in itertools.product(*map(range, grid))]
    member = torch.zeros(8, 60, dtype=torch.float64).scatter_(0, torch.tensor(at).T, 1)
    mean = [torch.einsum("nt,td->nd", member / member.sum(1, keepdim=True), x[0, :, 0]) for x in (q, k, v)]
    p = (mean[0] @ mean[1].T / 4 + member.sum(1).log()).softmax(-1)
    pairs = base.layout(grid=grid).to_dense_mask()[0, 0]
    sizes = member.sum(1)
    visited = member @ pairs.double() @ member.T / (sizes[:, None] * sizes)
    assert ((visited > 0) & (visited < 1)).any(), "no block is visited in part"
    weights = p * (1 - visited)
    sparse = plain_attention(q, k, v, pairs)[0][0, :, 0]
    rows = torch.tensor(at)[:, 0]
    expected = (1 - weights.sum(1))[rows, None] * sparse + (weights @ mean[2])[rows]
    torch.testing.assert_close(out[0, :, 0], expected, atol=1e-12, rtol=1e-10)


def test_over_a_static_base_hosts_keep_the_layout():
    base = GNA(window=(3, 4, 4), windows_per_layer=((3, 4, 4), (1, 4, 4)))
    method = RectifiedSpaAttn(base=base)
    assert not method.dynamic and RectifiedSpaAttn().dynamic
    assert method.layout_key(0) == base.layout_key(0) != method.layout_key(1)
    assert method.layout(grid=RAGGED).density == base.layout(grid=RAGGED).density
    assert type(method.kernel_layout(grid=RAGGED)) is type(base.kernel_layout(grid=RAGGED))


def test_the_schedule_of_the_base_counts_too():
    base = Radial(dense_steps=3, dense_layers=(-1,), last_dense_steps=1)
    method = RectifiedSpaAttn(base=base, dense_steps=1, dense_layers=1)
    acting = {
        (s, i)
        for s, i in itertools.product(range(6), range(4))
        if not method.is_dense(step=s, num_steps=6, layer=i, num_layers=4)
    }
    assert acting == set(itertools.product((3, 4), (1, 2)))
    assert RectifiedSpaAttn(base=base, dense_steps=0).counts_steps
    assert not RectifiedSpaAttn(base=base.replace(dense_steps=0, last_dense_steps=0), dense_steps=0).counts_steps


def test_a_base_without_blocks_says_so():
    q, k, v = tokens(210)
    with pytest.raises(TypeError, match="VMoBA has no block layout"):
        RectifiedSpaAttn(base=VMoBA()).attend(q, k, v, grid=RAGGED)


# ---------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop": 1.5}, r"RectifiedSpaAttn\.drop must be in \[0, 1\], got 1\.5"),
        ({"p_threshold": -0.1}, r"p_threshold must be in \[0, 1\], got -0\.1"),
        ({"block": 0}, r"block must be >= 1 token, got 0"),
        ({"base": Radial(), "drop": 0.5}, r"drop must be left at 0\.75 where base is given, got 0\.5; the base says"),
        ({"base": Radial(), "order": "raster"}, r"order must be left at 'gilbert' where base is given"),
        ({"base": RectifiedSpaAttn()}, r"base must be another method"),
        ({"base": Radial(backend="sdpa")}, r"base must have backend='auto'"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        RectifiedSpaAttn(**fields)


def test_the_grid_of_the_base_is_checked():
    with pytest.raises(ValueError, match=r"Radial\.block must be <= F\*H\*W"):
        RectifiedSpaAttn(base=Radial()).check_grid((2, 6, 6))
    RectifiedSpaAttn().check_grid((2, 6, 6))


def test_travels_with_its_base(tmp_path):
    method = RectifiedSpaAttn(base=GNA(window=("all", 0.5, 7)), rectify="ipar")
    plain = method.to_dict()
    assert plain["base"]["method"] == "gna" and plain["base"]["window"] == ["all", 0.5, 7]
    method.to_yaml(tmp_path / "a.yaml")
    assert build(tmp_path / "a.yaml") == method and build(plain) == method and hash(build(plain)) == hash(method)
    assert build("rectifiedspaattn", base="radial") == RectifiedSpaAttn(base=Radial())
    assert build("rectifiedspaattn", base={"method": "radial", "decay": 1}).base == Radial(decay=1.0)


def test_presets():
    assert (
        RectifiedSpaAttn.for_model("wan2.1-t2v-14b")
        == RectifiedSpaAttn()
        == RectifiedSpaAttn.for_model("Wan2.2-TI2V-5B")
    )
    expert = RectifiedSpaAttn.for_model("wan2.2-t2v-a14b", last_dense_steps=1)
    assert (expert.drop, expert.dense_steps, expert.last_dense_steps, expert.dense_layers) == (0.85, 3, 1, 2)
    assert RectifiedSpaAttn.for_model("flux").dense_layer_ids(57) == frozenset(range(37, 57))
    assert RectifiedSpaAttn.for_model("hunyuanvideo", base=Radial()).drop == RectifiedSpaAttn().drop
    with pytest.raises(ValueError, match=r"no published setting for 'wan2\.1-t2v'\. Did you mean 'wan2\.1-t2v-14b'"):
        RectifiedSpaAttn.for_model("wan2.1-t2v")


def test_registered_and_timed():
    assert get("rectifiedspaattn") is RectifiedSpaAttn
    q, k, v = tokens(210)
    with timed_by(recorder := Recorder()), record() as calls:
        RectifiedSpaAttn(**SMALL).attend(q, k, v, grid=RAGGED)
    assert {"selection", "permute", "rectification"} <= set(recorder.seconds())
    assert [c.operator for c in calls] == ["block_sparse_attention"] and calls[0].density < 1


def test_one_image_has_no_first_frame():
    q, k, _ = tokens(24 * 24, B=1, H=1)
    with_flag, without = (
        RectifiedSpaAttn(block=16, first_frame=flag).kernel_layout(grid=(1, 24, 24), q=q, k=k) for flag in (True, False)
    )
    assert with_flag.density == without.density < 0.6


def test_what_is_forced_is_visited():
    method = RectifiedSpaAttn(block=16, drop=1.0, p_threshold=0.0, neighbours=False, first_frame=False)
    q, k, _ = tokens(210)
    alone = method.kernel_layout(grid=RAGGED, q=q, k=k).layout.block_mask()
    assert alone.diagonal(dim1=-2, dim2=-1).all() and (alone.sum(-1) <= 2).all()
    near = method.replace(neighbours=True).kernel_layout(grid=RAGGED, q=q, k=k).layout.block_mask()
    curve = gilbert_permutation(RAGGED, (2, 1, 0))
    assert near[:, :, touching(RAGGED, curve.inverse, 16)].all() and (near | alone).equal(near)
    first = method.replace(first_frame=True).kernel_layout(grid=RAGGED, q=q, k=k).layout.block_mask()
    blocks = (curve.inverse[: 6 * 7] // 16).unique()
    assert first[:, :, blocks][..., blocks].all()
