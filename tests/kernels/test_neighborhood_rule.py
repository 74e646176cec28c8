"""The rule of neighborhood attention as the library reads it, in tables, tiles and boxes, against the rule spelled out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_oracle import CASES, axis_pairs, pairs

from mmeff.kernels.neighborhood import plan, triton_impl
from mmeff.kernels.neighborhood.rule import Axis, Rule

property_test = settings(max_examples=20, deadline=None)


@pytest.mark.parametrize("case", CASES)
def test_the_rule_is_the_oracles_and_the_reads_of_an_axis_agree(case):
    grid, *rule = CASES[case]
    for L, w, s, d, causal in zip(grid, *rule, strict=True):
        axis = Axis(L, w, s, d, causal)
        visible, offset = axis_pairs(L, w, s, d, causal)
        assert causal or (visible.sum(1) == w).all(), "every query has exactly the window's number of keys"
        assert visible.any(1).all() and visible.diagonal().all(), "a query sees itself"
        lo, hi = axis.windows()
        key, slot_visible, slot_offset = axis.slots()
        for i in range(L):
            seen = visible[i].nonzero()[:, 0]
            assert torch.equal(torch.arange(int(lo[i]), int(hi[i])) * d + i % d, seen)
            assert torch.equal(key[i][slot_visible[i]], seen)
            assert torch.equal(slot_offset[i][slot_visible[i]], offset[i, seen] + w - 1)
        assert axis.pairs == visible.sum()
        assert sum(n * len(classes) for n, classes in axis.class_lengths) == L


@property_test
@given(st.data())
def test_windows_keep_their_size_and_never_move_backwards(data):
    w, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    axis = Axis(data.draw(st.integers(w * d, 40)), w, data.draw(st.integers(1, w)), d, data.draw(st.booleans()))
    lo, hi = axis.windows()
    visible, _ = axis_pairs(axis.length, w, axis.stride, d, axis.causal)
    assert torch.equal(hi - lo, visible.sum(1))
    for r in range(d):
        assert (lo[r::d].diff() >= 0).all() and (hi[r::d].diff() >= 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_tiles_cover_every_pair_of_the_rule_once(case, bias):
    grid, *rule = CASES[case]
    axes = tuple(Axis(*each) for each in zip(grid, *rule, strict=True))
    visible, index = pairs(grid, *rule)
    flat = sum(
        x * math.prod(2 * w - 1 for w in rule[0][a + 1 :]) for a, x in enumerate(index)
    )  # row-major, as the bias is stored
    for sides in ((1,) * len(grid), (2,) * len(grid), (3, 4, 2)[: len(grid)], (64,) * len(grid)):
        cut = plan.make_plan(Rule(axes), sides, bias, torch.device("cpu"))
        N = math.prod(grid)
        seen = torch.zeros(N, N, dtype=torch.long)
        for combination in cut.combinations():
            mask = combination.visible()
            mask = torch.ones(cut.queries, cut.keys).bool() if mask is None else mask
            bias_index = combination.bias_index() if bias else None
            for queries, to, keys in combination.chunks(1, 0, 3):
                for q_row, to_row, k_row in zip(queries, to, keys, strict=True):
                    assert ((to_row == q_row) | (to_row == N)).all()
                    real = to_row < N
                    at = (q_row[real, None] * N + k_row)[mask[real]]
                    seen.view(-1).index_add_(0, at, torch.ones_like(at))
                    if bias:
                        assert torch.equal(bias_index[real][mask[real]], flat.view(-1)[at])
        assert torch.equal(seen, visible.long()), sides


@pytest.mark.parametrize("case", CASES)
def test_triton_tables_and_boxes(case):
    grid, *rule = CASES[case]
    axes = tuple(Axis(*each) for each in zip(grid, *rule, strict=True))
    for axis in axes:
        visible, _ = axis_pairs(axis.length, axis.window, axis.stride, axis.dilation, axis.causal)
        table = triton_impl.axis_table(axis)
        for i in range(axis.length):
            p, r = divmod(i, axis.dilation)
            for rows, seen in ((table[:2], visible[i]), (table[2:], visible[:, i])):
                first, behind = rows[:, r, p].tolist()
                assert list(range(first * axis.dilation + r, behind * axis.dilation + r, axis.dilation)) == (
                    seen.nonzero()[:, 0].tolist()
                )
    queries, keys = triton_impl.choose_boxes(triton_impl.three_axes(Rule(axes)), 64, 32)
    for box, most in ((queries, 64), (keys, 32)):
        assert 16 <= math.prod(box) <= most and all(side & (side - 1) == 0 for side in box)


def test_small_tiles_are_chosen_where_they_pay():
    axes = (Axis(56, 7, 1, 1, False),) * 2
    tile, work = plan.choose_tiles(Rule(axes), plan.Sizes(1, 2, 2, 32, 0, True, "cpu"), False)
    assert 8 <= math.prod(tile) <= 200
    assert work < plan.dense_work(plan.Sizes(1, 2, 2, 32, 0, True, "cpu"), 56 * 56) / 4
    strided, _ = plan.choose_tiles(
        Rule((Axis(56, 9, 4, 1, False),) * 2), plan.Sizes(1, 2, 2, 32, 0, False, "cpu"), False
    )
    assert all(side % 4 == 0 for side in strided), "tiles are whole groups of the stride"
