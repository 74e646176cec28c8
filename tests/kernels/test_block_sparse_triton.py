"""The Triton kernels of block_sparse_attention, in the interpreter or on a GPU: against float64, forward and gradient."""

from __future__ import annotations

import math
import os

import pytest
import torch
from oracle import assert_close_to_reference, gradient_terms, plain_attention

from mmeff.kernels import BlockLayout
from mmeff.kernels.block_sparse import triton_configs, triton_impl
from mmeff.kernels.block_sparse.problem import BackwardProblem, Problem
from mmeff.kernels.block_sparse.triton_configs import Config
from mmeff.kernels.layout import Bounds

pytestmark = [
    pytest.mark.interpreter,
    # what is not in use may hold anything, and weights of pairs that do not attend may overflow; numpy remarks on both
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tensors(B, Nq, Nk, H, Hk, D, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, Nq, H, D), (B, Nk, Hk, D), (B, Nk, Hk, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]


def random_mask(B, H, Nq, Nk, block, seed=0, kinds=3):
    """Blocks that are empty, full or (kinds=3) partial; every query attends to something."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, kinds, (B, H, -(-Nq // block), -(-Nk // block)), generator=g)
    kind[..., 0] = 1  # full
    kind = kind.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :Nq, :Nk]
    return (kind == 1) | ((kind == 2) & (torch.rand(B, H, Nq, Nk, generator=g) < 0.5))


def cotangents(out, mask):
    """Random gradients of out and LSE; none for queries that attend to nothing, whose LSE is constant."""
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64)
    dlse = torch.randn(out.shape[0], out.shape[2], out.shape[1], generator=g, dtype=torch.float64)
    return dout, dlse * mask.any(-1).cpu()


def expected(q, k, v, mask, scale, dout, dlse):
    """out, lse, dq, dk, dv by plain PyTorch in the dtype of q."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = plain_attention(q, k, v, mask, scale)
    loss = (out * dout.to(out)).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse.to(lse)).sum()
    return [x.detach() for x in (out, lse, *torch.autograd.grad(loss, (q, k, v)))]


def run(q, k, v, layout, scale, dout, dlse, needs=(True, True, True), configs=None):
    configs = configs or {}
    problem = Problem(q, k, v, layout, scale, True)
    assert triton_impl.why_not(problem) is None
    out, lse = triton_impl.attend(problem, configs.get("forward"))
    gradients = BackwardProblem(problem, out, lse, dout.to(out), dlse.to(lse), needs)
    return [out, lse, *triton_impl.backward(gradients, configs)]


def check(q, k, v, layout, scale=None, configs=None, unused=None, times=2.0):
    """Compare everything with float64. `unused` replaces q, k, v by tensors in which nothing unused is NaN."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = layout.to_dense_mask()
    dout, dlse = cotangents(q, mask)
    actual = run(q, k, v, layout, scale, dout, dlse, configs=configs)
    q, k, v = unused or (q, k, v)
    plain = expected(q, k, v, mask, scale, dout, dlse)
    reference = expected(q.double(), k.double(), v.double(), mask, scale, dout, dlse)
    for name, *results in zip(("out", "lse", "dq", "dk", "dv"), actual, plain, reference, strict=True):
        terms = gradient_terms(q, k, v, dout.to(q)) if name in ("dq", "dk") else 0.0
        assert_close_to_reference(*results, name=name, terms=terms, times=times)
    return actual


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 1), (17, 17), (64, 64), (67, 65), (90, 1), (1, 90)])
def test_awkward_lengths(triton_device, block, Nq, Nk):
    q, k, v = tensors(1, Nq, Nk, 2, 2, 40, device=triton_device)
    mask = random_mask(1, 2, Nq, Nk, block).to(triton_device)
    check(q, k, v, BlockLayout.from_dense_mask(mask, q_block=block, kv_block=block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [3, 16, 24, 64, 130, 256])
def test_dtypes_and_head_widths(triton_device, dtype, D):
    q, k, v = tensors(1, 70, 70, 2, 2, D, dtype, triton_device)
    mask = random_mask(1, 2, 70, 70, 32).to(triton_device)
    check(q, k, v, BlockLayout.from_dense_mask(mask, q_block=32, kv_block=32))


@pytest.mark.parametrize(("mB", "mH"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("Hk", [1, 2, 4])
def test_grouped_queries_and_masks_per_batch_and_head(triton_device, mB, mH, Hk):
    q, k, v = tensors(2, 40, 50, 4, Hk, 24, device=triton_device)
    mask = random_mask(mB, mH, 40, 50, 16).to(triton_device)
    check(q, k, v, BlockLayout.from_dense_mask(mask, q_block=32, kv_block=16))


@pytest.mark.parametrize(("q_block", "kv_block"), [(64, 16), (16, 64), (256, 200), (1, 7), (49, 20), (8, 96)])
def test_uneven_and_oversized_blocks(triton_device, q_block, kv_block):
    Nq, Nk = (20, 30) if q_block == 1 else (90, 75)
    q, k, v = tensors(1, Nq, Nk, 2, 1, 24, device=triton_device)
    mask = random_mask(1, 2, Nq, Nk, 16).to(triton_device)
    check(q, k, v, BlockLayout.from_dense_mask(mask, q_block=q_block, kv_block=kv_block))


@pytest.mark.parametrize("tiles", [(16, 16), (32, 64), (64, 32)])
def test_tiles_smaller_than_blocks(triton_device, tiles):
    q, k, v = tensors(1, 100, 90, 2, 1, 24, device=triton_device)
    mask = random_mask(1, 1, 100, 90, 16).to(triton_device)
    layout = BlockLayout.from_dense_mask(mask, q_block=64, kv_block=70)
    check(q, k, v, layout, configs=dict.fromkeys(("forward", "dq", "dkdv"), Config(*tiles, 4, 2)))


@pytest.mark.parametrize("block", [16, 64])
def test_empty_rows_give_zero_and_minus_infinity(triton_device, block):
    q, k, v = tensors(1, 70, 70, 2, 2, 24, device=triton_device)
    mask = random_mask(1, 2, 70, 70, 16)
    mask[0, 0, 16:32] = False  # a whole query block
    mask[0, 1, [40, 69]] = False  # queries of partial blocks
    mask[0, 1, 50, :64] = False  # a query that finds nothing in its first blocks
    mask[0, 1, 50, 64] = True
    mask[0, :, :, 20] = False  # a key that nobody sees
    layout = BlockLayout.from_dense_mask(mask, q_block=block, kv_block=block, allow_empty_rows=True).to(triton_device)
    out, lse, dq, dk, dv = check(q, k, v, layout)
    assert out[0, 16:32, 0].eq(0).all() and dq[0, [40, 69], 1].eq(0).all() and dk[0, 20].eq(0).all()
    assert lse[0, 0, 16:32].eq(-torch.inf).all() and lse.isinf().sum() == 18


def test_a_layout_that_visits_nothing(triton_device):
    q, k, v = tensors(1, 20, 20, 2, 1, 8, device=triton_device)
    mask = torch.zeros(2, 2, dtype=torch.bool, device=triton_device)
    layout = BlockLayout.from_block_mask(
        mask, q_len=20, kv_len=20, q_block=16, kv_block=16, allow_empty_rows=True
    )  # fmt: skip
    out, lse, *grads = run(q, k, v, layout, 1.0, torch.ones_like(q), torch.ones(1, 2, 20))
    assert lse.eq(-torch.inf).all() and all(x.eq(0).all() for x in (out, *grads))


# ---------------------------------------------------------------- bounds and padding


@pytest.mark.parametrize("block", [16, 48])
@pytest.mark.parametrize("which", ["causal", "band", "grid", "text"])
def test_bounds(triton_device, which, block):
    if which == "causal":
        bounds = Bounds.causal(70, 90)
    elif which == "band":
        bounds = Bounds.band(70, 70, before=20, after=3)
    else:  # 3 x 3 windows over 8 x 9 tokens
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(9), indexing="ij")
        axes = [rows.flatten(), columns.flatten()]
        bounds = Bounds.points([(a - 1, a + 1) for a in axes], axes)
        if which == "text":
            bounds = bounds.with_free(queries=6, keys=6)
    layout = BlockLayout.from_bounds(bounds, q_block=block, kv_block=block).to(triton_device)
    q, k, v = tensors(2, bounds.q_len, bounds.kv_len, 2, 1, 24, device=triton_device)
    check(q, k, v, layout)


@pytest.mark.parametrize("vB", [1, 2])
@pytest.mark.parametrize("bounded", [False, True])
def test_tokens_that_are_not_in_use_may_hold_nan(triton_device, vB, bounded):
    g = torch.Generator().manual_seed(0)
    N, block = 70, 16
    in_sequence = torch.tensor([16, 16, 16, 16, 6])
    q_valid, kv_valid = (torch.randint(1, 17, (vB, 5), generator=g).minimum(in_sequence) for _ in range(2))
    q_valid[:, 3], kv_valid[:, 0], kv_valid[:, 2] = 0, 9, 0
    if bounded:
        bounds = Bounds.band(N, N, before=100, after=20)
        layout = BlockLayout.from_bounds(bounds, q_block=block, kv_block=block, q_valid=q_valid, kv_valid=kv_valid)
    else:
        mask = torch.rand(2, 2, 5, 5, generator=g) < 0.6
        mask[..., 0] = True
        layout = BlockLayout.from_block_mask(
            mask, q_len=N, kv_len=N, q_block=block, kv_block=block, q_valid=q_valid, kv_valid=kv_valid
        )
    layout = layout.to(triton_device)
    q, k, v = tensors(2, N, N, 2, 2, 24, device=triton_device)
    unused_q, unused_k = (~x.expand(2, N)[:, :, None, None] for x in layout.tokens_in_use())
    poisoned = [x.masked_fill(unused, torch.nan) for x, unused in ((q, unused_q), (k, unused_k), (v, unused_k))]
    check(*poisoned, layout, unused=(q, k, v))


def test_scores_far_below_zero(triton_device):
    """A key that is not there scores 0, which against such a log-sum-exp would weigh more than float32 can say."""
    q, k, v = tensors(1, 20, 20, 2, 2, 24, device=triton_device)
    q, k = q.abs() * 5 + 6, -k.abs() * 5 - 6
    layout = BlockLayout.from_dense_mask(random_mask(1, 2, 20, 20, 16).to(triton_device), q_block=16, kv_block=16)
    # gradients take the weights from a log-sum-exp of this size, which rounds more than the softmax of plain PyTorch
    lse = check(q, k, v, layout, times=8.0)[1]
    assert lse.max() < -128 * math.log(2)
    check(-q, k, v, layout, times=8.0)  # and far above


# ---------------------------------------------------------------- long rows


@pytest.mark.parametrize(("mH", "Hk"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("partial", [False, True])
def test_long_rows_run_in_pieces(triton_device, mH, Hk, partial):
    n = 18  # blocks
    q, k, v = tensors(1, n * 16, n * 16, 2, Hk, 16, device=triton_device)
    mask = torch.eye(n, dtype=torch.bool).expand(1, mH, n, n).clone()
    mask[:, 0, 3] = mask[:, -1, :, 15] = True  # text: a row that sees everything, a column that all see
    mask = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)
    if partial:
        mask[:, :, 48:64, :128:3] = False
        mask[:, :, :128:3, 240:256] = False
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16).to(triton_device)
    assert partial == bool(layout.n_partial.any())
    for plan in (triton_impl._row_plan(layout, 2 // Hk), triton_impl._column_plan(layout, 2 // Hk)):
        assert plan.slots > 1
    check(q, k, v, layout)


def test_a_plan_covers_every_entry_once_longest_first():
    counts = torch.tensor([[[3, 0, 90, 5, 1], [2, 2, 2, 80, 1]]])
    mask = torch.arange(128) < counts[..., None]
    layout = BlockLayout.from_block_mask(
        mask, q_len=5 * 16, kv_len=128 * 16, q_block=16, kv_block=16, allow_empty_rows=True
    )
    plan = triton_impl.make_plan(layout, counts, heads_per_kv=1)
    largest = math.ceil(triton_impl.LONG_ROW * counts.sum() / counts.numel())
    covered = torch.zeros(10, 128, dtype=torch.int64)
    slots, lengths = [], []
    for row, piece, pieces, slot in plan.items.tolist():
        n = int(counts.flatten()[row])
        lo, hi = n * piece // pieces, n * (piece + 1) // pieces
        assert hi - lo <= largest
        covered[row, lo:hi] += 1
        lengths.append((row // 5, -n / pieces))
        slots += [slot + piece] if pieces > 1 else []
        assert (slot < 0) == (pieces == 1)
    assert torch.equal(covered, mask.flatten(0, 2).long())
    assert sorted(slots) == list(range(plan.slots)) and plan.slots > 0
    assert lengths == sorted(lengths), "head after head, and within a head the longest first"
    assert sorted(plan.long_rows[:, 0].tolist()) == [2, 8]
    one_owner = triton_impl.make_plan(layout, counts, heads_per_kv=2)
    lengths = [-int(counts.flatten()[row]) / pieces for row, _, pieces, _ in one_owner.items.tolist()]
    assert lengths == sorted(lengths), "heads that read the same keys are ordered together"


def test_rows_shared_by_address(triton_device):
    mask = random_mask(1, 1, 64, 64, 16)
    lists = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
    fields = ("row_start", "n_partial", "n_full", "col_idx", "bitmap")
    shared = BlockLayout(
        q_len=64, kv_len=64, q_block=16, kv_block=16, **{name: getattr(lists, name) for name in fields},
        row_of=torch.tensor([[[0, 1, 1, 3]] * 2 + [[2, 2, 0, 3]] * 2]),
    ).to(triton_device)  # fmt: skip
    check(*tensors(2, 64, 64, 4, 2, 24, device=triton_device), shared)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scale_of_any_sign(triton_device, scale):
    q, k, v = tensors(1, 40, 40, 2, 2, 24, device=triton_device)
    mask = random_mask(1, 2, 40, 40, 16).to(triton_device)
    check(q, k, v, BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16), scale)


@pytest.mark.parametrize("view", ["heads first", "channels strided", "channels first", "sliced"])
def test_any_strides(triton_device, view):
    def as_view(x):
        if view == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if view == "channels strided":
            return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
        if view == "channels first":
            return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        return torch.cat((x, torch.full_like(x, torch.nan)), 1)[:, : x.shape[1]]

    q, k, v = (as_view(x) for x in tensors(2, 40, 50, 2, 1, 24, device=triton_device))
    assert not q.is_contiguous()
    mask = random_mask(1, 2, 40, 50, 16).to(triton_device)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
    want = check(q.contiguous(), k.contiguous(), v.contiguous(), layout)
    dout, dlse = cotangents(q, mask)
    got = run(q, k, v, layout, 24**-0.5, as_view(dout), dlse)
    assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("which", ["out", "lse"])
def test_gradient_through_one_result_only(triton_device, which):
    q, k, v = tensors(1, 40, 40, 2, 1, 24, device=triton_device)
    mask = random_mask(1, 2, 40, 40, 16).to(triton_device)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
    problem = Problem(q, k, v, layout, 0.2, True)
    out, lse = triton_impl.attend(problem)
    dout, dlse = (x.to(out) for x in cotangents(out, mask))
    zero = {"out": (dout, dlse * 0), "lse": (dout * 0, dlse)}[which]
    none = {"out": (dout, None), "lse": (None, dlse)}[which]
    got = triton_impl.backward(BackwardProblem(problem, out, lse, *none, (True, True, True)))
    plain = expected(q, k, v, mask, 0.2, *zero)[2:]
    reference = expected(q.double(), k.double(), v.double(), mask, 0.2, *zero)[2:]
    for name, *results in zip(("dq", "dk", "dv"), got, plain, reference, strict=True):
        assert_close_to_reference(*results, name=name, terms=gradient_terms(q, k, v, dout))


def test_gradients_of_some_inputs_only(triton_device):
    q, k, v = tensors(1, 40, 40, 2, 1, 24, device=triton_device)
    mask = random_mask(1, 2, 40, 40, 16).to(triton_device)
    layout = BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
    cotangent = cotangents(q, mask)
    everything = run(q, k, v, layout, 0.2, *cotangent)[2:]
    for i in range(3):
        some = run(q, k, v, layout, 0.2, *cotangent, needs=(i == 0, i == 1, i == 2))[2:]
        assert torch.equal(some[i], everything[i]), "the same, bit by bit"
        assert all(x is None for j, x in enumerate(some) if j != i)


def test_lse_only_where_it_is_wanted(triton_device):
    q, k, v = tensors(1, 20, 20, 2, 1, 24, device=triton_device)
    layout = BlockLayout.from_dense_mask(random_mask(1, 1, 20, 20, 16), q_block=16, kv_block=16).to(triton_device)
    with_lse = triton_impl.attend(Problem(q, k, v, layout, 1.0, False, training=True))
    without = triton_impl.attend(Problem(q, k, v, layout, 1.0, False))
    assert without[1] is None and with_lse[1].shape == (1, 2, 20)
    assert torch.equal(without[0], with_lse[0])


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("N", [17, 70])
def test_every_result_is_written(triton_device, poisoned_memory, N):
    q, k, v = tensors(1, N, N, 2, 1, 24, device=triton_device)
    mask = torch.zeros(1, 2, -(-N // 16), -(-N // 16), dtype=torch.bool)
    mask[:, 0, 0, 0] = True  # nearly every row and column is empty
    layout = BlockLayout.from_block_mask(
        mask, q_len=N, kv_len=N, q_block=16, kv_block=16, allow_empty_rows=True
    ).to(triton_device)  # fmt: skip
    check(q, k, v, layout)


# ---------------------------------------------------------------- what dispatch asks


def test_refusals(triton_device):
    layout = BlockLayout.from_block_mask(torch.ones(1, 1).bool(), q_len=16, kv_len=16, q_block=16, kv_block=16)
    refusal = triton_impl.why_not(Problem(*tensors(1, 16, 16, 1, 1, 8, torch.float64), layout, 1.0, False))
    assert "float16, bfloat16 and float32, not in float64" in refusal
    refusal = triton_impl.why_not(Problem(*tensors(1, 16, 16, 1, 1, 264), layout, 1.0, False))
    assert "at most 256 channels, and these have 264" in refusal


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter, which this process does not use")
def test_auto_never_takes_the_interpreter():
    q, k, v = tensors(1, 16, 16, 1, 1, 8)
    layout = BlockLayout.from_block_mask(torch.ones(1, 1).bool(), q_len=16, kv_len=16, q_block=16, kv_block=16)
    problem = Problem(q, k, v, layout, 1.0, False)
    assert triton_impl.FORWARD.cost(problem) == math.inf
    assert triton_impl.BACKWARD.cost(BackwardProblem(problem, q, q, q, None, (True,) * 3)) == math.inf


def test_the_sweep_keeps_the_fastest_candidate(triton_device, monkeypatch, tmp_path):
    from triton.runtime.errors import OutOfResources

    q, k, v = tensors(1, 20, 20, 1, 1, 16, device=triton_device)
    layout = BlockLayout.from_dense_mask(random_mask(1, 1, 20, 20, 16), q_block=16, kv_block=16).to(triton_device)
    first, second, third = (Config(16, 16, 4, stages) for stages in (1, 2, 3))
    seconds = iter([2.0, OutOfResources(2, 1, "shared memory"), 1.0] * 3)

    def fastest(run, rounds):
        run()
        time = next(seconds)
        if isinstance(time, Exception):
            raise time
        return time

    monkeypatch.setenv("MMEFF_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_configs, "_fastest", fastest)
    monkeypatch.setattr(triton_configs, "candidates", lambda *of: [first, second, third])
    device = triton_configs._Device("some GPU", "sm90")
    found = triton_configs._sweep(Problem(q, k, v, layout, 1.0, False, training=True), device, 1)
    assert found == {f"{kernel} float32 D16 blocks 16x16": third for kernel in ("forward", "dq", "dkdv")}
    assert triton_configs._tuned(device) == found
    triton_configs._tuned.cache_clear()


def test_a_candidate_that_computes_something_else_is_told_apart():
    x = torch.tensor([1.0, -torch.inf, 3.0])
    assert triton_configs._agree(x * (1 + 1e-7), x)
    assert not triton_configs._agree(x + 1e-3, x)
    assert not triton_configs._agree(torch.tensor([1.0, 0.0, 3.0]), x)
