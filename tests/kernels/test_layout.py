"""BlockLayout: storage form, constructors, counts, transposition, messages."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeff.kernels import BlockLayout
from mmeff.kernels.calibration import sparse_ratio

LENGTHS = [1, 17, 127, 129, 200]
property_test = settings(max_examples=40, deadline=None)


def random_dense_mask(seed, B, H, Nq, Nk, q_block, kv_block):
    """A mask whose blocks are some empty, some full and some partial, and in which no row is empty."""
    g = torch.Generator().manual_seed(seed)
    nQ, nK = -(-Nq // q_block), -(-Nk // kv_block)
    kind = torch.randint(0, 3, (B, H, nQ, nK), generator=g)
    kind = kind.repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3)[:, :, :Nq, :Nk]
    mask = (kind == 2) | ((kind == 1) & (torch.rand(B, H, Nq, Nk, generator=g) < 0.5))
    return mask | torch.nn.functional.one_hot(torch.randint(0, Nk, (B, H, Nq), generator=g), Nk).bool()


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "B": st.integers(1, 2),
        "H": st.integers(1, 3),
        "Nq": st.integers(1, 70),
        "Nk": st.integers(1, 70),
        "q_block": st.sampled_from([1, 8, 16, 24]),
        "kv_block": st.sampled_from([1, 8, 16, 24]),
    }
)


def block_to_dense(mask, q_len, kv_len, q_block, kv_block):
    return mask.repeat_interleave(q_block, -2).repeat_interleave(kv_block, -1)[..., :q_len, :kv_len]


# ---------------------------------------------------------------- storage form


def test_lists_are_partial_then_full_and_ascending():
    mask = torch.tensor(
        [
            [1, 1, 1, 0, 0, 0, 1, 1],
            [1, 1, 0, 0, 0, 0, 1, 1],
            [0, 0, 1, 1, 0, 1, 0, 0],
            [0, 0, 1, 1, 0, 0, 0, 0],
        ]
    ).bool()
    layout = BlockLayout.from_dense_mask(mask, q_block=2, kv_block=2)
    assert layout.row_start.tolist() == [0, 3]
    assert layout.n_partial.tolist() == [1, 1]
    assert layout.n_full.tolist() == [2, 1]
    assert layout.col_idx.tolist() == [1, 0, 3, 2, 1]
    assert layout.row_of.tolist() == [[[0, 1]]]
    assert layout.bitmap.tolist() == [[[True, False], [False, False]], [[False, True], [False, False]]]
    assert layout.col_idx.dtype == torch.int32
    layout.check()


def test_a_mask_with_leading_ones_is_stored_once():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    shared = BlockLayout.from_block_mask(mask, q_len=64, kv_len=64, q_block=16, kv_block=16)
    per_head = BlockLayout.from_block_mask(mask.repeat(2, 3, 1, 1), q_len=64, kv_len=64, q_block=16, kv_block=16)
    assert shared.col_idx.shape == (16,)
    assert shared.shape == (1, 1, 64, 64)
    assert per_head.col_idx.shape == (16 * 6,)
    assert per_head.shape == (2, 3, 64, 64)


def test_valid_counts_of_ragged_blocks():
    mask = torch.ones(9, 3, dtype=torch.bool)
    layout = BlockLayout.from_block_mask(mask, q_len=129, kv_len=34, q_block=16, kv_block=16)
    assert layout.q_valid.tolist() == [[16] * 8 + [1]]
    assert layout.kv_valid.tolist() == [[16, 16, 2]]
    assert layout.is_full and layout.density == 1.0


def test_a_ragged_last_block_that_is_all_true_is_full():
    layout = BlockLayout.from_dense_mask(torch.ones(17, 33, dtype=torch.bool), q_block=16, kv_block=16)
    assert layout.bitmap is None
    assert layout.n_full.tolist() == [3, 3]


def test_no_dense_mask_is_built_for_a_million_tokens():
    N, block = 2**20, 4096
    mask = torch.eye(N // block, dtype=torch.bool)
    layout = BlockLayout.from_block_mask(mask, q_len=N, kv_len=N, q_block=block, kv_block=block)
    assert layout.density == pytest.approx(block / N)
    assert layout.transpose().density == layout.density


@pytest.mark.parametrize("N", [64, 256])
@pytest.mark.parametrize("window", [10, 64])
def test_lists_agree_with_flex_attention(N, window):
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    def rule(b, h, q, k):
        return (q >= k) & (q - k <= window * (h + 1))

    theirs = create_block_mask(rule, 1, 2, N, N, device="cpu", BLOCK_SIZE=16)
    layout = BlockLayout.from_dense_mask(create_mask(rule, 1, 2, N, N, device="cpu"), q_block=16, kv_block=16)
    for h in range(2):
        for i in range(N // 16):
            row = int(layout.row_of[0, h, i])
            start, partial, full = int(layout.row_start[row]), int(layout.n_partial[row]), int(layout.n_full[row])
            cols = layout.col_idx[start : start + partial + full].tolist()
            want_partial = theirs.kv_indices[0, h, i, : theirs.kv_num_blocks[0, h, i]].tolist()
            want_full = theirs.full_kv_indices[0, h, i, : theirs.full_kv_num_blocks[0, h, i]].tolist()
            assert (cols[:partial], cols[partial:]) == (sorted(want_partial), sorted(want_full))


# ---------------------------------------------------------------- round trips


@property_test
@given(shapes)
def test_dense_mask_round_trip(shape):
    mask = random_dense_mask(**shape)
    layout = BlockLayout.from_dense_mask(mask, q_block=shape["q_block"], kv_block=shape["kv_block"])
    layout.check()
    assert torch.equal(layout.to_dense_mask(), mask)
    assert layout.density == pytest.approx(mask.float().mean().item(), rel=1e-5)
    assert layout.attended_pairs == int(mask.sum())
    assert layout.is_full == bool(mask.all())
    assert not layout.has_empty_rows


@property_test
@given(shapes)
def test_block_mask_round_trip(shape):
    blocks = shape["q_block"], shape["kv_block"]
    nQ, nK = -(-shape["Nq"] // blocks[0]), -(-shape["Nk"] // blocks[1])
    mask = random_dense_mask(shape["seed"], shape["B"], shape["H"], nQ, nK, 1, 1)
    sizes = {"q_len": shape["Nq"], "kv_len": shape["Nk"], "q_block": blocks[0], "kv_block": blocks[1]}
    layout = BlockLayout.from_block_mask(mask, **sizes)
    layout.check()
    dense = block_to_dense(mask, **sizes)
    assert torch.equal(layout.block_mask(), mask)
    assert torch.equal(layout.to_dense_mask(), dense)
    assert layout.attended_pairs == int(dense.sum())
    assert layout.block_density == pytest.approx(mask.double().mean().item())
    again = BlockLayout.from_dense_mask(dense, q_block=blocks[0], kv_block=blocks[1])
    assert torch.equal(again.col_idx, layout.col_idx) and torch.equal(again.n_full, layout.n_full)


@property_test
@given(shapes)
def test_transpose_is_an_involution(shape):
    mask = random_dense_mask(**shape)
    layout = BlockLayout.from_dense_mask(mask, q_block=shape["q_block"], kv_block=shape["kv_block"])
    flipped = layout.transpose()
    flipped.check()
    assert torch.equal(flipped.to_dense_mask(), mask.transpose(2, 3))
    assert flipped.attended_pairs == layout.attended_pairs
    twice = flipped.transpose()
    for field in dataclasses.fields(BlockLayout):
        a, b = getattr(layout, field.name), getattr(twice, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif field.name != "_derived":
            assert a == b, field.name
    assert layout.transpose() is flipped, "the transpose is cached"


def test_transpose_lists_unvisited_key_blocks_as_empty_rows():
    mask = torch.tensor([[True, False], [True, False]])
    flipped = BlockLayout.from_block_mask(mask, q_len=8, kv_len=8, q_block=4, kv_block=4).transpose()
    assert flipped.n_full.tolist() == [2, 0]
    assert flipped.has_empty_rows


# ---------------------------------------------------------------- addressing


def hand_built(**changes):
    """Two query blocks of 4 and a ragged one of 2 tokens over three key blocks; rows 0 and 2 share a list."""
    fields = {
        "q_len": 10,
        "kv_len": 11,
        "q_block": 4,
        "kv_block": 4,
        "row_start": torch.tensor([0, 4]),
        "n_partial": torch.tensor([1, 0], dtype=torch.int32),
        "n_full": torch.tensor([1, 2], dtype=torch.int32),
        "col_idx": torch.tensor([2, 0, -1, -1, 1, 2, -1, -1], dtype=torch.int32),  # padded to 4 per row
        "row_of": torch.tensor([[[0, 1, 0]]]),
        "bitmap": torch.tensor([[[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]]).bool(),
    }
    return BlockLayout(**{**fields, **changes})


def test_padded_and_shared_lists_stand_for_the_mask_they_spell():
    layout = hand_built()
    layout.check()
    wanted = torch.zeros(10, 11, dtype=torch.bool)
    wanted[:4, :4] = True
    wanted[4:8, 4:] = True
    wanted[8:, :4] = True
    bitmap = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()  # beyond kv_len: ignored
    wanted[:4, 8:] = bitmap
    wanted[8:, 8:] = bitmap[:2]
    assert torch.equal(layout.to_dense_mask()[0, 0], wanted)
    assert layout.attended_pairs == int(wanted.sum())
    assert layout.visited_blocks == 6
    assert torch.equal(layout.transpose().to_dense_mask()[0, 0], wanted.T)


def test_empty_rows_are_counted_per_query_and_only_inside_the_sequence():
    no_full = {"n_full": torch.tensor([0, 2], dtype=torch.int32)}
    assert hand_built(**no_full).has_empty_rows  # query 3 has no bit inside the keys
    first_two = torch.zeros(1, 4, 4, dtype=torch.bool)
    first_two[:, :2, 0] = True
    only_tail = {"bitmap": first_two, "row_of": torch.tensor([[[1, 1, 0]]])}
    assert not hand_built(**no_full, **only_tail).has_empty_rows  # its queries 2 and 3 lie beyond the sequence


def test_density_counts_a_head_specific_mask_over_heads():
    mask = torch.stack([torch.eye(4).bool(), torch.ones(4, 4).bool()])[None]
    layout = BlockLayout.from_block_mask(mask, q_len=4, kv_len=4, q_block=1, kv_block=1)
    assert layout.density == (4 + 16) / 32
    assert layout.block_density == (4 + 16) / 32


# ---------------------------------------------------------------- cost, text, device


def test_predicted_speedup_is_ratio_over_block_density():
    layout = BlockLayout.from_block_mask(torch.eye(4).bool(), q_len=64, kv_len=64, q_block=16, kv_block=16)
    assert layout.predicted_speedup(ratio=1.0) == pytest.approx(4.0)
    assert layout.predicted_speedup() == pytest.approx(4 * sparse_ratio("cpu"))
    full = BlockLayout.from_block_mask(torch.ones(4, 4).bool(), q_len=64, kv_len=64, q_block=16, kv_block=16)
    assert full.predicted_speedup() == sparse_ratio("cpu")
    for ratio in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"ratio must be > 0 .* got"):
            layout.predicted_speedup(ratio=ratio)


def test_repr_tells_density():
    layout = BlockLayout.from_block_mask(torch.eye(4).bool(), q_len=64, kv_len=64, q_block=16, kv_block=16)
    assert re.search(r"Nq=64, Nk=64, blocks 16x16, block density 0\.25, 0% of them partial", repr(layout))


def test_to_moves_every_tensor_and_returns_itself_when_there():
    layout = hand_built()
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert {x.device.type for x in vars(moved).values() if isinstance(x, torch.Tensor)} == {"meta"}


def test_tables_derived_during_inference_can_be_saved_for_a_backward_pass():
    layout = hand_built()
    with torch.inference_mode():
        first = layout.derived("table", lambda layout: layout.row_of + 1)
    assert not first.is_inference()
    assert layout.derived("table", lambda layout: layout.row_of) is first


def test_layout_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        hand_built().q_len = 3


# ---------------------------------------------------------------- messages


def test_empty_block_rows_are_refused_by_name():
    mask = torch.ones(2, 3, 4, 4, dtype=torch.bool)
    mask[1, 0, 2] = mask[1, 2, 3] = False
    sizes = {"q_len": 64, "kv_len": 64, "q_block": 16, "kv_block": 16}
    wanted = r"\(b=1, h=0, row=2\) attends to none \(2 of 24 rows are empty\).*allow_empty_rows=True"
    with pytest.raises(ValueError, match=wanted):
        BlockLayout.from_block_mask(mask, **sizes)
    layout = BlockLayout.from_block_mask(mask, **sizes, allow_empty_rows=True)
    assert layout.has_empty_rows
    assert torch.equal(layout.block_mask(), mask)


def test_empty_queries_of_a_dense_mask_are_refused_by_name():
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[7] = False
    with pytest.raises(ValueError, match=r"every query must .* \(b=0, h=0, row=7\).*allow_empty_rows=True"):
        BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16)
    assert BlockLayout.from_dense_mask(mask, q_block=16, kv_block=16, allow_empty_rows=True).has_empty_rows


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.ones(1, 1, 4, 5).bool()}, ValueError, r"\(B\|1, H\|1, 4, 4\) .* got \(1, 1, 4, 5\)"),
        ({"mask": torch.ones(1, 1, 4, 4)}, TypeError, r"bool tensor where True attends, got a torch.float32 tensor"),
        ({"mask": [[True]]}, TypeError, r"bool tensor where True attends, got list"),
        ({"mask": torch.ones(4).bool()}, ValueError, r"4 dimensions .* or 2 .*got shape \(4,\)"),
        ({"q_len": -1}, ValueError, r"q_len must be >= 0 tokens, got -1"),
        ({"kv_block": 16.0}, TypeError, r"kv_block must be an int \(tokens\), got float 16.0"),
        ({"q_block": True}, TypeError, r"q_block must be an int \(tokens\), got bool"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"mask": torch.ones(1, 1, 4, 4).bool(), "q_len": 64, "kv_len": 64, "q_block": 16, "kv_block": 16}
    arguments.update(change)
    with pytest.raises(error, match=message):
        BlockLayout.from_block_mask(arguments.pop("mask"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"col_idx": torch.zeros(8)}, r"BlockLayout.col_idx must be a torch.int32 tensor .* got torch.float32"),
        ({"row_of": torch.zeros(1, 1, 4, dtype=torch.int64)}, r"row_of must be .* shape \(\*, \*, 3\).*\(1, 1, 4\)"),
        ({"n_full": torch.zeros(3, dtype=torch.int32)}, r"n_full must be .* shape \(2\).*\(3,\)"),
        ({"bitmap": torch.zeros(1, 4, 3).bool()}, r"bitmap must be .* shape \(\*, 4, 4\).*\(1, 4, 3\)"),
    ],
)
def test_the_constructor_checks_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        hand_built(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_of": torch.tensor([[[0, 1, 2]]])}, r"row_of must lie in \[0, 2\)"),
        ({"n_partial": torch.tensor([1, -1], dtype=torch.int32)}, "must be >= 0"),
        ({"row_start": torch.tensor([0, 7])}, "must lie inside col_idx, which holds 8"),
        ({"bitmap": None}, "one slab per partial entry, 1, but it holds 0"),
        ({"col_idx": torch.tensor([2, 0, 0, 0, 1, 3, 0, 0], dtype=torch.int32)}, r"col_idx must lie in \[0, 3\)"),
        ({"col_idx": torch.tensor([2, 0, 0, 0, 2, 1, 0, 0], dtype=torch.int32)}, "ascend strictly"),
        ({"col_idx": torch.tensor([2, 0, 0, 0, 1, 1, 0, 0], dtype=torch.int32)}, "ascend strictly"),
        ({"col_idx": torch.tensor([2, 2, 0, 0, 1, 2, 0, 0], dtype=torch.int32)}, "not be both partial and full"),
    ],
)
def test_check_names_the_broken_rule(change, message):
    with pytest.raises(ValueError, match=message):
        hand_built(**change).check()
