"""What layouts are made from and turned into: bounds, tokens in use, algebra, plans, and the forms of other libraries."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeff.kernels import BlockLayout
from mmeff.kernels.layout import Bounds
from mmeff.kernels.layout.identity import layout_of, lists_of

property_test = settings(max_examples=40, deadline=None)


def random_layout(seed, B=1, H=2, Nq=50, Nk=40, q_block=8, kv_block=16):
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (B, H, -(-Nq // q_block), -(-Nk // kv_block)), generator=g)
    kind = kind.repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3)[:, :, :Nq, :Nk]
    mask = (kind == 2) | ((kind == 1) & (torch.rand(B, H, Nq, Nk, generator=g) < 0.5))
    return mask, BlockLayout.from_dense_mask(mask, q_block=q_block, kv_block=kv_block, allow_empty_rows=True)


def random_bounds(seed, Nq, Nk, axes):
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(-5, 6, (axes, Nq), generator=g)
    windows = [(lo, lo + torch.randint(0, 12, (Nq,), generator=g)) for lo in low]
    keys = [torch.randint(-5, 6, (Nk,), generator=g) for _ in range(axes)]
    return Bounds.points(windows, keys), windows, keys


# ---------------------------------------------------------------- bounds


@given(st.integers(0, 2**20), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 4, 16]))
@property_test
def test_bounds_are_the_mask_of_their_intervals(seed, Nq, Nk, axes, block):
    bounds, windows, keys = random_bounds(seed, Nq, Nk, axes)
    mask = torch.ones(Nq, Nk, dtype=torch.bool)
    for (lo, hi), key in zip(windows, keys, strict=True):
        mask &= (lo[:, None] <= key) & (key <= hi[:, None])
    bounds, mask = bounds.with_free(keys=1), torch.nn.functional.pad(mask, (0, 1), value=True)  # no row is empty
    layout = BlockLayout.from_bounds(bounds, q_block=block, kv_block=block)
    layout.check()
    assert torch.equal(layout.to_dense_mask()[0, 0], mask)
    assert layout.attended_pairs == int(mask.sum())
    assert torch.equal(layout.transpose().to_dense_mask()[0, 0], mask.T)
    same = BlockLayout.from_dense_mask(mask, q_block=block, kv_block=block)
    assert (same.block_mask() & ~layout.block_mask()).sum() == 0  # nothing that attends is skipped


def test_causal_and_band():
    i, j = torch.arange(5)[:, None], torch.arange(9)
    causal = BlockLayout.from_bounds(Bounds.causal(5, 9), q_block=2, kv_block=4)
    assert torch.equal(causal.to_dense_mask()[0, 0], j <= i + 4)
    chunk = BlockLayout.from_bounds(Bounds.causal(5, 9, offset=2), q_block=2, kv_block=4)
    assert torch.equal(chunk.to_dense_mask()[0, 0], j <= i + 2)
    band = BlockLayout.from_bounds(Bounds.band(5, 9, before=1, after=2, offset=1), q_block=2, kv_block=4)
    assert torch.equal(band.to_dense_mask()[0, 0], (i + 1 - 1 <= j) & (j <= i + 1 + 2))
    assert causal.bitmap is None and causal.bounds is not None


def test_bounds_follow_a_reordering_and_free_tokens_attend_to_all():
    bounds, _, _ = random_bounds(0, 12, 12, 2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    index = torch.arange(12)
    mask = bounds.attends(index[:, None], index)
    assert torch.equal(bounds.reordered(order).attends(index[:, None], index), mask[order][:, order])
    free = bounds.with_free(queries=2, keys=3)
    mask = free.attends(torch.arange(14)[:, None], torch.arange(15))
    assert mask[12:].all() and mask[:, 12:].all()


def test_bad_bounds_are_named():
    good = torch.zeros(1, 2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"q_bounds must be an int32 tensor of shape \(A, 2, N\).*int64"):
        Bounds(good.long(), good)
    with pytest.raises(ValueError, match="1 <= A <= 6 axes"):
        Bounds(good.expand(7, 2, 4), good.expand(7, 2, 4))
    with pytest.raises(ValueError, match=r"share axes and device, got 1 axes .* 2"):
        Bounds(good, good.expand(2, 2, 4))
    layout = BlockLayout.from_block_mask(torch.ones(1, 1).bool(), q_len=5, kv_len=4, q_block=8, kv_block=8)
    fields = {name: getattr(layout, name) for name in ("row_start", "n_partial", "n_full", "col_idx", "row_of")}
    with pytest.raises(ValueError, match="bounds must be for Nq=5 queries and Nk=4 keys"):
        BlockLayout(q_len=5, kv_len=4, q_block=8, kv_block=8, bounds=Bounds(good, good), **fields)


# ---------------------------------------------------------------- tokens in use


@given(st.integers(0, 2**20), st.booleans())
@property_test
def test_padding_inside_the_sequence_attends_to_nothing(seed, per_batch):
    g = torch.Generator().manual_seed(seed)
    B = 2 if per_batch else 1
    mask = torch.rand(2, 3, 5, 4, generator=g) < 0.5
    q_valid = torch.randint(0, 9, (B, 5), generator=g).clamp(max=torch.tensor([8, 8, 8, 8, 2]))
    kv_valid = torch.randint(0, 6, (B, 4), generator=g).clamp(max=torch.tensor([5, 5, 5, 3]))
    layout = BlockLayout.from_block_mask(
        mask, q_len=34, kv_len=18, q_block=8, kv_block=5, q_valid=q_valid, kv_valid=kv_valid, allow_empty_rows=True
    )
    layout.check()
    dense = mask.repeat_interleave(8, 2).repeat_interleave(5, 3)[:, :, :34, :18]
    q_used = (torch.arange(8) < q_valid[..., None]).flatten(1)[:, :34]
    k_used = (torch.arange(5) < kv_valid[..., None]).flatten(1)[:, :18]
    want = dense & q_used[:, None, :, None] & k_used[:, None, None, :]
    assert torch.equal(layout.to_dense_mask(), want)
    assert layout.attended_pairs == int(want.sum())
    assert layout.has_empty_rows == bool((~want.any(-1)).any())
    assert layout.transpose().attended_pairs == int(want.sum())


def test_valid_counts_share_a_mask_over_the_batch():
    layout = BlockLayout.from_block_mask(
        torch.ones(2, 2).bool(), q_len=8, kv_len=8, q_block=4, kv_block=4, kv_valid=torch.tensor([[4, 1], [4, 3]])
    )
    assert layout.shape == (2, 1, 8, 8) and layout.row_of.shape == (1, 1, 2)
    assert layout.attended_pairs == 8 * 5 + 8 * 7 and layout.has_padding and not layout.is_full


def test_a_padded_tail_is_kept_for_the_tensor_that_says_it():
    layout = BlockLayout.from_block_mask(torch.ones(3, 3).bool(), q_len=11, kv_len=11, q_block=4, kv_block=4)
    used = torch.tensor([5, 2])
    padded = layout.with_tail(5, used)
    inside = torch.arange(11) < (6 + used)[:, None]
    assert torch.equal(padded.to_dense_mask(), inside[:, None, :, None] & inside[:, None, None])
    assert layout.with_tail(5, used) is padded and layout.with_tail(5, used.clone()) is not padded
    padded = layout.with_tail(5, used)
    used[0] = 1  # written to since
    assert layout.with_tail(5, used).attended_pairs == 7**2 + 8**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_valid": torch.tensor([4, 5])}, "kv_valid must lie between 0 and the tokens that each block has"),
        ({"q_valid": torch.tensor([4.0, 4.0])}, r"q_valid must be integers of shape \(2,\) or \(B\|1, 2\)"),
        ({"q_valid": torch.tensor([4, 4, 4])}, r"q_valid must be integers of shape \(2,\)"),
        ({"kv_valid": torch.tensor([0, 0])}, "every query block must attend to at least one key block"),
    ],
)
def test_bad_counts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.from_block_mask(torch.ones(2, 2).bool(), q_len=8, kv_len=8, q_block=4, kv_block=4, **change)


# ---------------------------------------------------------------- algebra


@given(st.integers(0, 2**20), st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
@property_test
def test_algebra_is_that_of_the_masks(seed, shapes):
    mask_a, a = random_layout(seed, B=shapes[0])
    mask_b, b = random_layout(seed + 1, B=shapes[1], H=1)
    for layout, mask in ((a | b, mask_a | mask_b), (a & b, mask_a & mask_b), (~a, ~mask_a), (~~a, mask_a)):
        layout.check()
        assert torch.equal(layout.to_dense_mask(), mask.expand_as(layout.to_dense_mask()))
        # blocks that turn out whole are full: nothing is masked that need not be
        again = BlockLayout.from_dense_mask(mask, q_block=8, kv_block=16, allow_empty_rows=True)
        assert layout.partial_share == again.partial_share and layout.block_density == again.block_density


def test_algebra_of_bounds_and_of_padding():
    bounds, _, _ = random_bounds(3, 30, 30, 2)
    a = BlockLayout.from_bounds(bounds.with_free(keys=2), q_block=8, kv_block=8)
    b = BlockLayout.from_bounds(Bounds.causal(30, 32), q_block=8, kv_block=8)
    assert torch.equal((a | b).to_dense_mask(), a.to_dense_mask() | b.to_dense_mask())
    assert torch.equal((a & b).to_dense_mask(), a.to_dense_mask() & b.to_dense_mask())
    sizes = {"q_len": 8, "kv_len": 8, "q_block": 4, "kv_block": 4}
    padded = BlockLayout.from_block_mask(torch.eye(2).bool(), **sizes, kv_valid=torch.tensor([4, 2]))
    inverse = ~padded
    assert torch.equal(inverse.to_dense_mask() | padded.to_dense_mask(), (torch.arange(8) < 6).expand(1, 1, 8, 8))
    plain = BlockLayout.from_block_mask(torch.eye(2).bool(), **sizes)
    with pytest.raises(ValueError, match="equal kv_valid"):
        plain | padded
    with pytest.raises(ValueError, match="equal q_block, got 8 and 4"):
        a & plain.transpose() if a.q_len == 8 else BlockLayout.from_block_mask(
            torch.ones(1, 2).bool(), q_len=8, kv_len=8, q_block=8, kv_block=4
        ) & plain


# ---------------------------------------------------------------- plans


@given(st.integers(0, 2**20), st.integers(1, 5))
@property_test
def test_pieces_of_a_split_plan_make_up_the_rows(seed, most):
    _, layout = random_layout(seed)
    plan = layout.split_plan(most)
    assert ((plan.n_partial + plan.n_full) <= most).all()
    base = layout.row_of.reshape(-1)
    for row in range(base.shape[0]):
        pieces = (plan.row == row).nonzero()[:, 0].tolist()
        cols, slabs = [], []
        for full in (False, True):
            for p in pieces:
                partial, whole, start = int(plan.n_partial[p]), int(plan.n_full[p]), int(plan.start[p])
                listed = layout.col_idx[start : start + partial + whole].tolist()
                cols += listed[partial:] if full else listed[:partial]
                slabs += [] if full else range(int(plan.slab[p]), int(plan.slab[p]) + partial)
        start, n = int(layout.row_start[base[row]]), int(layout.n_visited[base[row]])
        assert cols == layout.col_idx[start : start + n].tolist()
        first = int(layout.partial_start[base[row]])
        assert slabs == list(range(first, first + int(layout.n_partial[base[row]])))


def test_long_rows_come_first_and_only_they_are_split():
    mask = torch.zeros(40, 40).bool().fill_diagonal_(True)
    mask[17] = True
    layout = BlockLayout.from_block_mask(mask, q_len=40, kv_len=40, q_block=1, kv_block=1)
    assert layout.row_order()[0] == 17 and layout.row_order().dtype == torch.int32
    plan = layout.split_plan()
    assert torch.bincount(plan.row).tolist() == [1] * 17 + [5] + [1] * 22  # at least 8 entries, and 4 x the mean


# ---------------------------------------------------------------- other libraries' forms


@given(st.integers(0, 2**20))
@property_test
def test_csr_lists_the_visited_blocks(seed):
    _, layout = random_layout(seed, B=2)
    indptr, indices, partial = layout.to_csr()
    blocks = torch.zeros(2 * 2 * layout.nQ, layout.nK, dtype=torch.bool)
    for row in range(blocks.shape[0]):
        cols = indices[indptr[row] : indptr[row + 1]].long()
        assert (cols.diff() > 0).all()
        blocks[row, cols] = True
    assert torch.equal(blocks.view_as(layout.block_mask()), layout.block_mask())
    assert int(partial.sum()) == int(layout.n_partial.sum())


@pytest.mark.parametrize("kind", ["bitmap", "bounds", "padding"])
def test_flex_attention_reads_the_same_mask(kind):
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    if kind == "bitmap":
        mask, layout = random_layout(0, B=2)
        mask = mask | ~mask.any(-1, keepdim=True)
        layout = BlockLayout.from_dense_mask(mask, q_block=8, kv_block=16)
    elif kind == "bounds":
        layout = BlockLayout.from_bounds(Bounds.band(50, 40, before=15, after=30), q_block=8, kv_block=16)
    else:
        layout = BlockLayout.from_block_mask(
            torch.ones(7, 3).bool(), q_len=50, kv_len=40, q_block=8, kv_block=16, kv_valid=torch.tensor([[9, 16, 8]])
        )
    mask = layout.to_dense_mask()
    flex = layout.to_flex()
    assert torch.equal(create_mask(flex.mask_mod, 2, 2, 50, 40, device="cpu"), mask.expand(2, 2, 50, 40))
    visited = layout.block_mask().sum(-1)
    assert torch.equal((flex.kv_num_blocks + flex.full_kv_num_blocks).expand(*visited.shape), visited.int())
    q, k, v = (torch.randn(2, 2, n, 16) for n in (50, 40, 40))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex), want)


# ---------------------------------------------------------------- identity and size


def test_a_layout_is_known_by_its_lists_and_rebuilt_from_them():
    _, layout = random_layout(5)
    sizes = {"q_len": layout.q_len, "kv_len": layout.kv_len, "q_block": layout.q_block, "kv_block": layout.kv_block}
    assert layout_of(lists_of(layout), **sizes) is layout
    copies = tuple(None if x is None else x.clone() for x in lists_of(layout))
    adopted = layout_of(copies, **sizes)
    assert adopted is not layout and adopted is layout_of(copies, **sizes)
    assert torch.equal(adopted.to_dense_mask(), layout.to_dense_mask())


def test_static_layouts_of_115200_tokens_are_fast_and_small():
    N, block = 115_200, 128
    bounds = Bounds.band(N, N, before=5000, after=5000)
    times = []
    for _ in range(5):
        start = time.process_time()
        layout = BlockLayout.from_bounds(bounds, q_block=block, kv_block=block)
        times.append(time.process_time() - start)
    size = sum(x.numel() * x.element_size() for x in lists_of(layout) if x is not None)
    assert min(times) < 0.05 and size < 64 * 2**20


@pytest.mark.parametrize("kind", ["bitmap", "bounds", "full"])
def test_visited_shares_are_those_of_the_dense_mask(kind):
    draw = torch.Generator().manual_seed(3)
    if kind == "bitmap":
        mask = torch.rand(2, 3, 23, 31, generator=draw) < 0.4
        layout = BlockLayout.from_dense_mask(mask, q_block=5, kv_block=7, allow_empty_rows=True)
    elif kind == "bounds":
        layout = BlockLayout.from_bounds(Bounds.band(23, 31, before=6, after=3), q_block=5, kv_block=7)
    else:
        picked = torch.rand(1, 2, 5, 5, generator=draw) < 0.5
        layout = BlockLayout.from_block_mask(picked, q_len=23, kv_len=31, q_block=5, kv_block=7, allow_empty_rows=True)
    dense, shares = layout.to_dense_mask(), layout.visited_shares()
    for i in range(layout.nQ):
        for j in range(layout.nK):
            part = dense[..., i * 5 : (i + 1) * 5, j * 7 : (j + 1) * 7].double()
            torch.testing.assert_close(shares[..., i, j], part.mean((-1, -2)), atol=1e-15, rtol=0)
