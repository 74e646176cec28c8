"""Token permutations: what ends up where, and that everything comes back."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeff.kernels import permute
from mmeff.kernels.permute import (
    Permutation,
    dilation_permutation,
    gilbert_permutation,
    identity,
    padded_tiles,
    tile_permutation,
)

property_test = settings(max_examples=60, deadline=None)
grids = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@st.composite
def grids_and(draw, largest=5):
    grid = draw(grids)
    return grid, tuple(draw(st.lists(st.integers(1, largest), min_size=len(grid), max_size=len(grid))))


def coordinates(permutation, grid):
    """(N, axes): where in the grid each position of the new order lies."""
    return np.stack(np.unravel_index(permutation.perm.numpy(), grid), 1)


def check_permutation(permutation, N):
    assert len(permutation) == N and permutation.perm.dtype == permutation.inverse.dtype == torch.int64
    assert sorted(permutation.perm.tolist()) == list(range(N))
    x = torch.randn(2, N, 3, generator=torch.Generator().manual_seed(0))
    moved = permutation(x)
    assert all(torch.equal(moved[:, i], x[:, t]) for i, t in enumerate(permutation.perm.tolist()))
    assert torch.equal(permutation.undo(moved), x)
    assert torch.equal(permutation.undo(permutation(x.transpose(0, 1), 0), 0), x.transpose(0, 1))


# ---------------------------------------------------------------- tiles and classes


@property_test
@given(grids_and())
def test_tiles_are_contiguous_and_in_raster_order(case):
    grid, tile = case
    got = tile_permutation(grid, tile)
    check_permutation(got, math.prod(grid))
    order = []
    for corner in itertools.product(*(range(0, n, t) for n, t in zip(grid, tile, strict=True))):
        box = [range(c, min(c + t, n)) for c, t, n in zip(corner, tile, grid, strict=True)]
        order.append([np.ravel_multi_index(point, grid) for point in itertools.product(*box)])
    assert got.perm.tolist() == [token for tile_ in order for token in tile_]
    assert got.counts.tolist() == [len(tile_) for tile_ in order]
    assert math.prod(got.groups) == len(order)


@property_test
@given(grids_and())
def test_padded_tiles_hold_the_same_tokens_and_zeros(case):
    grid, tile = case
    N, size = math.prod(grid), math.prod(tile)
    ragged, padded = tile_permutation(grid, tile), padded_tiles(grid, tile)
    assert torch.equal(padded.valid, ragged.counts) and padded.tile_size == size and padded.tiles == ragged.groups
    assert len(padded) == N
    x = 1 + torch.rand(2, N, 3, generator=torch.Generator().manual_seed(0))
    slots = padded(x)
    assert slots.shape == (2, len(padded.valid) * size, 3)
    tiles, at = slots.unflatten(1, (-1, size)), 0
    for i, count in enumerate(padded.valid.tolist()):
        assert torch.equal(tiles[:, i, :count], ragged(x)[:, at : at + count])
        assert tiles[:, i, count:].eq(0).all()
        at += count
    assert torch.equal(padded.undo(slots), x)
    along_0 = padded(x.transpose(0, 1), 0)
    assert torch.equal(along_0, slots.transpose(0, 1)) and torch.equal(padded.undo(along_0, 0), x.transpose(0, 1))
    if all(n % t == 0 for n, t in zip(grid, tile, strict=True)):
        assert torch.equal(padded.perm, ragged.perm)


def test_padding_is_zero_whatever_the_tokens_hold():
    x = torch.full((1, 3, 1), torch.nan)
    assert padded_tiles((3,), (2,))(x)[0, :, 0].isnan().tolist() == [True, True, True, False]


@property_test
@given(grids_and())
def test_dilation_classes_are_contiguous_and_in_raster_order(case):
    grid, dilation = case
    dilation = tuple(min(d, n) for d, n in zip(dilation, grid, strict=True))
    got = dilation_permutation(grid, dilation)
    check_permutation(got, math.prod(grid))
    order = []
    for r in itertools.product(*map(range, dilation)):
        members = itertools.product(*(range(a, n, d) for a, n, d in zip(r, grid, dilation, strict=True)))
        order.append([np.ravel_multi_index(point, grid) for point in members])
    assert got.perm.tolist() == [token for group in order for token in group]
    assert got.counts.tolist() == [len(group) for group in order]
    assert got.groups == dilation


# ---------------------------------------------------------------- the curve


def steps(grid, axes=None):
    return np.abs(np.diff(coordinates(gilbert_permutation(grid, axes), grid), axis=0))


@property_test
@given(grids, st.randoms(use_true_random=False))
def test_the_curve_visits_every_token_by_steps_to_neighbours(grid, random):
    axes = list(range(len(grid)))
    random.shuffle(axes)
    curve = gilbert_permutation(grid, tuple(axes))
    check_permutation(curve, math.prod(grid))
    assert curve.perm[0] == 0, "it starts at the origin"
    jumps = steps(grid, tuple(axes))
    assert (jumps.max(1, initial=0) <= 1).all(), "diagonal at most"
    if all(n % 2 == 0 for n in grid):
        assert (jumps.sum(1) == 1).all(), "along one axis at a time"


def test_plane_grids_need_a_diagonal_only_where_it_is_unavoidable():
    for grid in itertools.product(range(1, 24), repeat=2):
        diagonals = (steps(grid).sum(1) != 1).sum()
        # chessboard colours: with an odd long side and an even short one the two ends have the wrong colours
        assert diagonals == (1 if max(grid) % 2 and min(grid) % 2 == 0 else 0), grid


@pytest.mark.parametrize("grid", [(21, 45, 80), (13, 30, 52), (33, 45, 80)])
def test_videos_take_few_diagonals_and_little_time(grid):
    permute._gilbert.cache_clear()
    start = time.process_time()
    curve = gilbert_permutation(grid, (2, 1, 0))
    assert time.process_time() - start < 2, "about 0.1 s on one core"
    assert gilbert_permutation(grid, [2, 1, 0]) is curve, "made once"
    diagonals = (steps(grid, (2, 1, 0)).sum(1) != 1).mean()
    assert 0 < diagonals < 0.01


def test_stretches_of_the_curve_are_compact():
    grid, block = (16, 16, 16), 64
    blocks = coordinates(gilbert_permutation(grid), grid).reshape(-1, block, 3)
    extent = (blocks.max(1) - blocks.min(1) + 1).prod(1)
    assert extent.mean() < 3 * block, "a raster block of 64 tokens spans 64 tokens but is 16 long"
    longest = (blocks.max(1) - blocks.min(1) + 1).max(1)
    assert longest.mean() < 8


def test_axes_decide_the_direction():
    def direction(axes):
        return coordinates(gilbert_permutation((8, 8, 8), axes), (8, 8, 8))[-1].tolist()

    assert direction(None) == direction((0, 1, 2)) == [7, 0, 0], "it ends at the far end of the first axis"
    assert direction((2, 1, 0)) == [0, 0, 7]
    assert coordinates(gilbert_permutation((4, 20), (0, 1)), (4, 20))[-1].tolist() == [0, 19], "the longest side leads"


# ---------------------------------------------------------------- the object


def test_identity():
    assert torch.equal(identity(7)(torch.arange(7)[None])[0], torch.arange(7))
    check_permutation(identity(7), 7)


@property_test
@given(grids_and())
def test_composition_and_tail(case):
    grid, tile = case
    N = math.prod(grid)
    first, second = gilbert_permutation(grid), tile_permutation((N,), (3,))
    second = second.then(tile_permutation(grid, tile))
    both = first.then(second)
    check_permutation(both, N)
    x = torch.randn(1, N, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(both(x), second(first(x)))
    longer = both.with_tail(4)
    check_permutation(longer, N + 4)
    y = torch.cat((x, torch.ones(1, 4, 2)), 1)
    assert torch.equal(longer(y), torch.cat((both(x), torch.ones(1, 4, 2)), 1))


def test_of_makes_the_inverse():
    perm = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    made = Permutation.of(perm)
    check_permutation(made, 50)
    assert made.perm is perm


def test_gradients_flow_through_both_ways():
    order = padded_tiles((3, 5), (2, 2))
    x = torch.randn(1, 15, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order, (x,))
    assert torch.autograd.gradcheck(lambda x: order.undo(order(x).exp()), (x,))


def test_moving_keeps_it_and_everything_about_it():
    order = padded_tiles((3, 5), (2, 2))
    assert order.to("cpu") is order
    moved = order.to("meta")
    assert type(moved) is type(order) and moved.valid.device.type == "meta" and moved.tiles == order.tiles


def test_one_made_in_inference_mode_still_trains():
    permute._gilbert.cache_clear()
    with torch.inference_mode():
        made = [
            gilbert_permutation((3, 4)).with_tail(1),
            tile_permutation((13,), (4,)),
            Permutation.of(torch.arange(13)).then(identity(13)),
        ]
    for order in made[:2]:
        x = torch.randn(1, 13, requires_grad=True)
        order.undo(order(x).square()).sum().backward()
        assert torch.allclose(x.grad, 2 * x)


def test_repr_is_short():
    assert repr(gilbert_permutation((3, 4))) == "Permutation(N=12, cpu)"
    assert repr(padded_tiles((3, 4), (2, 2))) == "PaddedTiles(N=12, cpu)"


# ---------------------------------------------------------------- bad input


def bad_perm():
    return Permutation.of(torch.tensor([0, 2, 2]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tile_permutation((), ()), ValueError, r"grid must have 1 to 3 extents, got \(\)"),
        (lambda: tile_permutation((2, 2, 2, 2), (1,) * 4), ValueError, r"grid must have 1 to 3 extents"),
        (
            lambda: tile_permutation((4, 0), (1, 1)),
            ValueError,
            r"grid must be >= 1 token along each axis, got \(4, 0\)",
        ),
        (lambda: tile_permutation((4, 4), (2,)), ValueError, r"tile must have one extent per axis.*got \(2,\)"),
        (lambda: padded_tiles((4, 4), (2, 2.0)), TypeError, r"padded_tiles: tile must be integers.*got 2.0"),
        (lambda: dilation_permutation((4, 4), (1, 5)), ValueError, r"dilation must be <= the grid \(4, 4\).*\(1, 5\)"),
        (lambda: gilbert_permutation((4, 4), (0, 0)), ValueError, r"axes must name each of the 2 axes.*got \(0, 0\)"),
        (lambda: gilbert_permutation((4, True)), TypeError, r"must be integers"),
        (lambda: identity(0), ValueError, r"identity: N must be >= 1"),
        (bad_perm, ValueError, r"every number from 0 to 2 once, got 3 numbers from 0 to 2, 2 of them different"),
        (lambda: Permutation.of([0, 1]), ValueError, r"must be a non-empty int64 tensor.*got list"),
        (lambda: Permutation.of(torch.tensor([0.0])), ValueError, r"int64.*got torch.float32 \(1,\)"),
        (lambda: identity(3).then(identity(4)), ValueError, r"equally many tokens, got 3 and 4"),
        (lambda: identity(3).with_tail(-1), ValueError, r"tokens must be an int >= 0, got -1"),
        (
            lambda: identity(3)(torch.zeros(1, 4)),
            ValueError,
            r"to permute, axis 1 of x must hold 3 tokens, got.*\(1, 4\)",
        ),
        (lambda: identity(3).undo(torch.zeros(3), 1), ValueError, r"to undo, axis 1 of x"),
        (lambda: padded_tiles((3,), (2,)).undo(torch.zeros(1, 3)), ValueError, r"must hold 4 tokens"),
        (
            lambda: Permutation(perm=torch.arange(3), inverse=torch.arange(4)),
            ValueError,
            r"equally long, got 3 and 4",
        ),
        (
            lambda: dataclasses.replace(padded_tiles((3,), (2,)), tile_size=3),
            ValueError,
            r"2 tiles of 3 slots, got 4",
        ),
    ],
)
def test_bad_input_is_refused_with_its_values(make, error, message):
    with pytest.raises(error, match=message):
        make()
