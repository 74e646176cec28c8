"""The tile simulator: against counting in the dense mask, and against published figures."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeff.kernels.simulator import best_strides, best_tiles, simulate

property_test = settings(max_examples=60, deadline=None)


def sees(length, w, s, d, causal, query, key):
    """The rule of one axis, for one query and one key, as its definition reads."""
    if query % d != key % d:
        return False
    last = (length - 1 - query % d) // d
    p, j = query // d, key // d
    if causal:
        leader = min(p // s * s + s - 1, last)
        return j <= p and leader - j < w
    leader = min(p // s * s + s // 2, last)
    left, right = w // 2, w // 2 + w % 2 - 1
    centre = min(max(leader, left), last - right)
    return centre - left <= j <= centre + right


def count_by_hand(grid, window, stride, dilation, causal, q_tile, kv_tile):
    """Look at every pair of tokens: pairs, and per pair of tiles how many of its pairs attend."""

    def tile_of(token, tile):
        return tuple((x % d, x // d // t) for x, d, t in zip(token, dilation, tile, strict=True))

    tokens = list(itertools.product(*map(range, grid)))
    q_size = {t: sum(tile_of(x, q_tile) == t for x in tokens) for t in {tile_of(x, q_tile) for x in tokens}}
    kv_size = {t: sum(tile_of(x, kv_tile) == t for x in tokens) for t in {tile_of(x, kv_tile) for x in tokens}}
    hits = {}
    for q, k in itertools.product(tokens, tokens):
        if all(sees(*axis) for axis in zip(grid, window, stride, dilation, causal, q, k, strict=True)):
            pair = tile_of(q, q_tile), tile_of(k, kv_tile)
            hits[pair] = hits.get(pair, 0) + 1
    full = sum(n == q_size[q] * kv_size[k] for (q, k), n in hits.items())
    dense = [
        {tuple(x // t for x, t in zip(token, tile, strict=True)) for token in tokens} for tile in (q_tile, kv_tile)
    ]
    return {"pairs": sum(hits.values()), "visited": len(hits), "full": full, "total": len(dense[0]) * len(dense[1])}


@st.composite
def problems(draw):
    n = draw(st.integers(1, 3))
    grid, window, stride, dilation = [], [], [], []
    for _ in range(n):
        length = draw(st.integers(1, {1: 24, 2: 9, 3: 5}[n]))
        d = draw(st.integers(1, min(3, length)))
        w = draw(st.integers(1, length // d))
        grid.append(length)
        dilation.append(d)
        window.append(w)
        stride.append(draw(st.integers(1, w)))
    sizes = st.lists(st.integers(1, 6), min_size=n, max_size=n)
    causal = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return tuple(map(tuple, (grid, window, stride, dilation, causal, draw(sizes), draw(sizes))))


@property_test
@given(problems())
def test_counts_equal_those_of_the_dense_mask(problem):
    grid, window, stride, dilation, causal, q_tile, kv_tile = problem
    got = simulate(grid, window, stride, q_tile=q_tile, kv_tile=kv_tile, dilation=dilation, causal=causal)
    want = count_by_hand(*problem)
    assert got.attended_pairs == want["pairs"]
    assert got.visited_tiles == want["visited"]
    assert got.full_tiles == want["full"]
    assert got.total_tiles == want["total"]
    assert got.perfectly_block_sparse == (want["full"] == want["visited"])
    assert math.isclose(got.flop_bound, math.prod(grid) ** 2 / want["pairs"])


def test_the_hand_count_is_not_blind():
    """What the property test relies on: both kinds of tile occur, and a window moved by one is noticed."""
    axis = ((9,), (4,), (1,), (1,), (False,), (3,), (2,))
    counts = count_by_hand(*axis)
    assert 0 < counts["full"] < counts["visited"] < counts["total"] and counts["pairs"] == 36
    assert [k for k in range(9) if sees(9, 4, 1, 1, False, 4, k)] == [2, 3, 4, 5], "an even window leans left"


HUNYUAN = {"grid": (30, 48, 80), "window": (18, 24, 24), "kv_tile": (2, 8, 8)}
FLUX = {"grid": (256, 256), "window": 80, "q_tile": (16, 8), "kv_tile": (16, 8)}


@pytest.mark.parametrize(
    ("sizes", "stride", "bound", "perfect"),
    [
        (HUNYUAN | {"q_tile": (2, 8, 8)}, (16, 8, 8), 11.11, True),
        (HUNYUAN | {"q_tile": (4, 8, 8)}, (16, 8, 8), 11.11, True),
        (HUNYUAN | {"q_tile": (2, 8, 8)}, 1, 5.44, False),
        (FLUX, 16, 10.24, True),
        (FLUX, 1, 7.51, False),
    ],
)
def test_published_bounds(sizes, stride, bound, perfect):
    got = simulate(stride=stride, **sizes)
    assert round(got.tile_bound, 2) == bound
    assert got.perfectly_block_sparse is perfect
    assert round(got.flop_bound, 2) == (11.11 if len(got.grid) == 3 else 10.24)
    assert f"{bound:.2f}x by tiles" in str(got)
    assert ("perfectly block-sparse" in str(got)) is perfect


def test_a_window_over_the_whole_grid_is_dense():
    got = simulate((5, 7), (5, 7), q_tile=(2, 3), kv_tile=(3, 2))
    assert got.tile_bound == got.flop_bound == got.density == 1 and got.perfectly_block_sparse


def test_dense_attention_has_no_dilation_classes():
    got = simulate((12,), 6, dilation=2, q_tile=3, kv_tile=3)
    assert got.tile_bound == got.flop_bound == 2 and got.perfectly_block_sparse


@property_test
@given(problems())
def test_best_strides_beat_every_other_and_are_the_smallest_of_them(problem):
    grid, window, _, dilation, causal, q_tile, kv_tile = problem
    sizes = {"q_tile": q_tile, "kv_tile": kv_tile, "dilation": dilation, "causal": causal}
    best = best_strides(grid, window, **sizes)
    every = [simulate(grid, window, s, **sizes) for s in itertools.product(*(range(1, w + 1) for w in window))]
    assert best.tile_bound == max(s.tile_bound for s in every)
    equal = [s.stride for s in every if s.tile_bound == best.tile_bound]
    assert best.stride in equal and all(b <= e for s in equal for b, e in zip(best.stride, s, strict=True))


def test_best_strides_of_a_video():
    assert best_strides(q_tile=(4, 8, 8), **HUNYUAN).stride == (16, 8, 8)


def test_best_tiles_ranks_every_shape():
    sizes = {"grid": (12, 16), "window": (6, 8)}
    found = best_tiles(q_tokens=4, kv_tokens=8, top=100, **sizes)
    assert len({(s.q_tile, s.kv_tile) for s in found}) == 3 * 4
    assert all(math.prod(s.q_tile) == 4 and math.prod(s.kv_tile) == 8 for s in found)
    bounds = [s.tile_bound for s in found]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[-1]
    assert found[0] == best_strides(q_tile=found[0].q_tile, kv_tile=found[0].kv_tile, **sizes)
    fixed = best_tiles(q_tokens=4, kv_tokens=8, stride=1, top=2, **sizes)
    assert len(fixed) == 2 and all(s.stride == (1, 1) for s in fixed)


def test_dilation_and_causality_are_named():
    text = str(simulate((8, 8), 2, dilation=(1, 2), causal=(True, False), q_tile=2, kv_tile=2))
    assert "dilation 1x2" in text and "causal (True, False)" in text and "with partial tiles" in text


GOOD = {"grid": (8, 8), "window": 4, "q_tile": 2, "kv_tile": 2}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": ()}, ValueError, r"grid must be a tuple of extents"),
        ({"grid": 8}, ValueError, r"grid must be a tuple of extents"),
        ({"grid": (8, 0)}, ValueError, r"grid must be >= 1 along each axis, got \(8, 0\)"),
        ({"window": (4, 4, 4)}, ValueError, r"window must be one number or one per axis \(2\), got \(4, 4, 4\)"),
        ({"window": 4.0}, TypeError, r"window must be integers, got float 4.0"),
        ({"window": 9}, ValueError, r"9 \* 1 > 8 on axis 0.*a window of 8 sees the whole axis"),
        ({"dilation": (1, 3)}, ValueError, r"4 \* 3 > 8 on axis 1.*a window of 2"),
        ({"stride": (4, 5)}, ValueError, r"got stride 5 for window 4 on axis 1"),
        ({"q_tile": 0}, ValueError, r"q_tile must be >= 1"),
        ({"kv_tile": True}, TypeError, r"kv_tile must be integers, got bool True"),
        ({"causal": 1}, ValueError, r"causal must be one bool or one per axis \(2\), got 1"),
    ],
)
def test_bad_input_is_refused_with_its_values(change, error, message):
    with pytest.raises(error, match=message):
        simulate(**GOOD | change)


@pytest.mark.parametrize("name", ["q_tokens", "kv_tokens", "top"])
def test_best_tiles_refuses_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"best_tiles: {name} must be >= 1"):
        best_tiles((8, 8), 4, **{"q_tokens": 4, "kv_tokens": 4, "top": 1, name: 0})
