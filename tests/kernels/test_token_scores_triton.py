"""The Triton kernels of token_scores, in the interpreter or on a GPU, against the whole matrix in float64."""

from __future__ import annotations

import os

import pytest
import torch
from token_scores_oracle import check, results, tensors

from mmeff.errors import BackendUnavailable
from mmeff.kernels import record, token_scores
from mmeff.kernels.token_scores import triton_impl

pytestmark = pytest.mark.interpreter
# a hidden key may hold anything, which numpy remarks on
NAN_IS_MEANT = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("R", "Nk", "D"), [(1, 1, 8), (1, 200, 24), (17, 127, 40), (70, 129, 64), (3, 65, 130)])
def test_sums_over_rows(triton_device, dtype, R, Nk, D):
    q, k = (x.to(triton_device) for x in tensors(1, R, Nk, 2, 1, D, dtype))
    check(q, k, backend="triton")


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("Hk", [1, 2, 4])
@pytest.mark.parametrize("per_batch", [False, True])
def test_grouped_queries_positions_padding_and_weights_together(triton_device, with_lse, Hk, per_batch):
    q, k = (x.to(triton_device) for x in tensors(2, 13, 150, 4, Hk, 40))
    g = torch.Generator().manual_seed(3)
    positions = torch.randint(-1, 150, (2, 13) if per_batch else (13,), generator=g).to(triton_device)
    key_mask = (torch.rand(2, 150, generator=g) < 0.8).to(triton_device)
    weights = torch.rand(2, 4, 13, generator=g).to(triton_device)
    causal = torch.arange(150, device=triton_device) <= positions[..., None]
    visible = (causal[:, None] if per_batch else causal) & key_mask[:, None, None]
    lse = (torch.randn(2, 4, 13, generator=g) + 3).to(triton_device) if with_lse else None
    check(q, k, visible, weights, lse=lse, backend="triton", row_positions=positions, key_mask=key_mask)


@pytest.mark.parametrize("shape", [(13,), (1, 1, 13), (2, 1, 13), (1, 4, 13)])
def test_weights_broadcast(triton_device, shape):
    q, k = (x.to(triton_device) for x in tensors(2, 13, 30, 4, 2, 24))
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(triton_device)
    check(q, k, weights=weights, backend="triton")


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_causal_attention_that_every_key_receives(triton_device, order):
    q, k = (x.to(triton_device) for x in tensors(1, 139, 139, 2, 1, 24))
    positions = {
        "ascending": torch.arange(139),
        "descending": torch.arange(139).flip(0),
        "shuffled": torch.randperm(139, generator=torch.Generator().manual_seed(0)),
    }[order].to(triton_device)
    visible = torch.arange(139, device=triton_device) <= positions[:, None]
    check(q, k, visible, backend="triton", row_positions=positions.to(torch.int32))


def test_splits_of_the_keys_change_nothing(triton_device, monkeypatch):
    q, k = (x.to(triton_device) for x in tensors(1, 2, 300, 2, 1, 24))
    positions = torch.tensor([40, 299], device=triton_device)  # row 0 sees nothing of the later splits
    visible = torch.arange(300, device=triton_device) <= positions[:, None]
    tile = triton_impl.blocks("forward", q, 4)["BLOCK_N"]
    monkeypatch.setattr(triton_impl, "TILES_PER_SPLIT", 1)
    assert 300 // tile > 1
    check(q, k, visible, backend="triton", row_positions=positions)


@NAN_IS_MEANT
def test_rows_that_see_nothing_and_keys_that_nobody_sees(triton_device):
    q, k = tensors(2, 4, 90, 2, 1, 24)
    key_mask = torch.ones(2, 90, dtype=torch.bool)
    key_mask[0, :5] = False
    key_mask[1] = False
    positions = torch.tensor([-1, 4, 80, 66])
    q[1], q[0, :2] = torch.nan, torch.nan
    k[0, :5], k[0, 81:], k[1] = torch.nan, torch.inf, torch.nan
    arguments = {"row_positions": positions.to(triton_device), "key_mask": key_mask.to(triton_device)}
    inputs = {"q_rows": q.to(triton_device), "k": k.to(triton_device)}
    got = results(lambda **x: token_scores(**x, **arguments, backend="triton"), inputs)
    want = results(lambda **x: token_scores(**x, **arguments, backend="reference"), inputs)
    assert got["scores"][1].eq(0).all() and got["q_rows"][1].eq(0).all() and got["k"][1].eq(0).all()
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    total = got["scores"].sum(-1)
    torch.testing.assert_close(total, torch.tensor([[2.0, 2.0], [0.0, 0.0]], device=triton_device))


def test_rows_with_a_given_lse_of_minus_infinity_contribute_zero(triton_device):
    q, k = (x.to(triton_device) for x in tensors(1, 3, 20, 2, 1, 24))
    lse = torch.full((1, 2, 3), 3.0, device=triton_device)
    lse[:, :, 1] = -torch.inf
    q[:, 1] = torch.nan
    inputs = {"q_rows": q, "k": k, "lse": lse}
    got = results(lambda **x: token_scores(**x, backend="triton"), inputs)
    want = results(lambda **x: token_scores(**x, backend="reference"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_no_rows_give_zeros(triton_device):
    q, k = (x.to(triton_device).requires_grad_() for x in tensors(1, 0, 10, 2, 1, 8))
    got = token_scores(q, k, backend="triton")
    got.sum().backward()
    assert torch.equal(got, torch.zeros_like(got)) and torch.equal(k.grad, torch.zeros_like(k))


def test_any_strides(triton_device):
    q, k = (x.to(triton_device) for x in tensors(2, 5, 30, 2, 1, 24))
    spread = [torch.stack([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for x in (q, k)]
    assert not any(x.is_contiguous() or x.stride(-1) == 1 for x in spread)
    mask = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).lt(0.7).to(triton_device).t()
    check(*spread, mask[:, None, None], backend="triton", key_mask=mask)


@pytest.mark.parametrize(
    ("needed", "with_lse"), [("q_rows", False), ("k", False), ("weights", False), ("q_rows", True), ("lse", True)]
)
def test_gradients_that_are_not_needed_change_nothing(triton_device, needed, with_lse):
    q, k = (x.to(triton_device) for x in tensors(1, 5, 30, 2, 1, 8))
    every = {"q_rows": q, "k": k, "weights": torch.rand(5, device=triton_device)}
    if with_lse:
        every["lse"] = torch.full((1, 2, 5), 3.0, device=triton_device)
    want = results(lambda **x: token_scores(**x, backend="reference"), every)
    rest = {name: x for name, x in every.items() if name != needed}
    got = results(lambda **x: token_scores(**x, **rest, backend="triton"), {needed: every[needed]})
    for name in ("scores", needed):
        torch.testing.assert_close(got[name], want[name])


def test_the_operator_keeps_the_rules_of_pytorch(triton_device):
    q, k = (x.to(triton_device).requires_grad_() for x in tensors(1, 3, 20, 2, 1, 8))
    positions = torch.tensor([0, 5, 19], device=triton_device)
    arguments = (
        q,
        k,
        positions,
        None,
        torch.rand(3, device=triton_device, requires_grad=True),
        None,
        0.3,
        "triton",
        True,
    )
    torch.library.opcheck(torch.ops.mmeff.token_scores.default, arguments)


def test_one_graph_when_compiled(triton_device):
    q, k = (x.to(triton_device) for x in tensors(1, 3, 20, 2, 1, 8))

    def compute(q_rows, k):
        return token_scores(q_rows, k, backend="triton") * 2

    want = results(compute, {"q_rows": q, "k": k})
    got = results(torch.compile(compute, fullgraph=True, backend="aot_eager"), {"q_rows": q, "k": k})
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_what_the_kernels_refuse(triton_device):
    for dtype, D, reason in (
        (torch.float64, 8, "take float32, float16 and bfloat16, got torch.float64"),
        (torch.float32, 300, "heads of up to 256 channels, got 300"),
    ):
        q, k = (x.to(triton_device) for x in tensors(1, 3, 20, 2, 1, D, dtype))
        with pytest.raises(BackendUnavailable, match=reason):
            token_scores(q, k, backend="triton")


def test_auto_takes_triton_on_a_gpu_and_never_the_interpreter(triton_device):
    q, k = (x.to(triton_device) for x in tensors(1, 3, 20, 2, 1, 8))
    with record() as calls:
        token_scores(q, k)
    assert calls[0].backend == ("chunked" if INTERPRETED else "triton")
