"""Radial's layout against the published rule, re-implemented here the slow and obvious way, and off the block grid."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from mmeff.config import describe
from mmeff.diffusion_attn import Radial
from mmeff.registry import build, get

# ---------------------------------------------------------------------------- the rule, in the words of the paper's code


def pair_mask(i: int, j: int, N: int, *, block: int, decay: float, sink: bool, drop_below: int) -> np.ndarray:
    """Which tokens of frame j the tokens of frame i see: (N, N) bool."""
    if sink and j == 0:
        return np.ones((N, N), bool)
    distance = abs(i - j)
    group = len(bin(distance)) - 2 if distance else 0
    power = 1
    while power <= N:
        power *= 2
    window = N if distance <= 1 else max(block, power / 2**group * decay)
    mask = np.abs(np.arange(N)[:, None] - np.arange(N)[None, :]) <= window
    reach = power / 2**group
    if reach < drop_below and distance % int(drop_below / reach) != 0:
        mask[:] = False
    return mask


def worth_a_block(part: np.ndarray) -> bool:
    """More than 0.6 of the columns that keep a row keep more than a third of the rows."""
    rows_kept = part.sum(axis=0)
    return 5 * (3 * rows_kept > part.shape[0]).sum() > 3 * (rows_kept > 0).sum()


def published(F: int, N: int, text: int, **rule) -> np.ndarray:
    """The block map of the published code where N and text are multiples of the block."""
    B = rule["block"]
    assert N % B == 0 and text % B == 0
    per_frame, total = N // B, (F * N + text) // B
    mask = np.zeros((total, total), bool)
    for i in range(F):
        for j in range(F):
            tokens = pair_mask(i, j, N, **rule)
            for a in range(per_frame):
                for b in range(per_frame):
                    part = tokens[a * B : (a + 1) * B, b * B : (b + 1) * B]
                    mask[i * per_frame + a, j * per_frame + b] |= worth_a_block(part)
    if text:
        mask[F * N // B :, :] = True
        mask[:, F * N // B :] = True
    return mask


def corrected(F: int, N: int, text: int, **rule) -> np.ndarray:
    """The block map off the grid: every block that touches a frame pair is judged by the part it shares with the pair."""
    B, video = rule["block"], F * N
    total = -(-(video + text) // B)
    mask = np.zeros((total, total), bool)
    inside = [
        [[t - i * N for t in range(b * B, (b + 1) * B) if t // N == i and t < video] for b in range(total)]
        for i in range(F)
    ]
    for i in range(F):
        for j in range(F):
            tokens = pair_mask(i, j, N, **rule)
            for a in range(total):
                for b in range(total):
                    rows, columns = inside[i][a], inside[j][b]
                    if rows and columns:
                        mask[a, b] |= abs(i - j) <= 1 or worth_a_block(tokens[np.ix_(rows, columns)])
    if text:
        mask[video // B :, :] = True
        mask[:, video // B :] = True
    return mask


def blocks_of(method: Radial, grid: tuple[int, int, int], text: int = 0) -> np.ndarray:
    return method.layout(grid=grid, text_len=text).block_mask()[0, 0].numpy()


decays = st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.95, 1.0, 2.5])


@st.composite
def aligned(draw):
    block = draw(st.sampled_from([4, 5, 6, 8, 12, 16, 24, 32, 64, 128]))
    per_frame = draw(st.integers(1, max(1, min(9, 320 // block))))
    N = per_frame * block
    F = draw(st.integers(1, max(1, min(17, 1600 // N))))
    H = draw(st.sampled_from([d for d in range(1, N + 1) if N % d == 0]))
    text = block * draw(st.integers(0, 2))
    drop = draw(st.sampled_from([128, 128, 0, block, 37]))
    return (
        (F, H, N // H),
        text,
        {"block": block, "decay": draw(decays), "sink": draw(st.booleans()), "drop_below": drop},
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(aligned())
def test_equals_the_published_rule_on_aligned_grids(case):
    grid, text, rule = case
    F, H, W = grid
    np.testing.assert_array_equal(blocks_of(Radial(**rule), grid, text), published(F, H * W, text, **rule))


@pytest.mark.parametrize("block", [64, 128])
def test_equals_the_published_rule_at_a_real_frame_size(block):
    rule = {"block": block, "decay": 0.8, "sink": True, "drop_below": 128}
    np.testing.assert_array_equal(blocks_of(Radial(**rule), (5, 16, 32)), published(5, 512, 0, **rule))


@pytest.mark.parametrize(
    ("model", "grid", "density"),
    [
        ("wan2.1-14b", (18, 48, 80), 0.287),
        ("hunyuanvideo", (30, 48, 80), 0.275),
    ],
)
def test_density_of_the_published_settings(model, grid, density):
    layout = Radial.for_model(model).layout(grid=grid)
    assert layout.density == pytest.approx(density, abs=5e-4)


# ---------------------------------------------------------------------------- off the block grid


@st.composite
def any_grid(draw):
    block = draw(st.integers(1, 24))
    grid = draw(
        st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)).filter(lambda g: math.prod(g) >= block)
    )
    text = draw(st.one_of(st.just(0), st.integers(1, 40)))
    drop = draw(st.sampled_from([128, 0, 16, 40]))
    return grid, text, {"block": block, "decay": draw(decays), "sink": draw(st.booleans()), "drop_below": drop}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(any_grid())
def test_what_holds_on_every_grid(case):
    (F, H, W), text, rule = case
    B, N = rule["block"], H * W
    method = Radial(**rule)
    layout = method.layout(grid=(F, H, W), text_len=text)
    layout.check()
    mask = layout.block_mask()[0, 0].numpy()
    total = -(-(F * N + text) // B)
    assert mask.shape == (total, total) and layout.shape == (1, 1, F * N + text, F * N + text)
    assert mask.any(1).all() and mask.diagonal().all()
    if text:
        assert mask[F * N // B :].all() and mask[:, F * N // B :].all()
    if rule["sink"]:
        assert mask[:, : -(-N // B)].all()
    if N % B or text % B:
        tokens = layout.to_dense_mask()[0, 0].numpy()
        frame = np.arange(F * N) // N
        near = np.abs(frame[:, None] - frame[None, :]) <= 1
        assert tokens[: F * N, : F * N][near].all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(any_grid())
def test_straddling_blocks_are_judged_by_what_they_share(case):
    (F, H, W), text, rule = case
    if not (H * W % rule["block"] or text % rule["block"]):
        return
    expected = corrected(F, H * W, text, **rule)
    np.testing.assert_array_equal(blocks_of(Radial(**rule), (F, H, W), text), expected)


@pytest.mark.parametrize(
    ("grid", "text"),
    [((8, 12, 20), 0), ((16, 20, 20), 0), ((21, 45, 80), 0), ((21, 45, 80), 226), ((3, 45, 80), 77)],
    ids=["empty row upstream", "95% of near frames upstream", "native 720p", "720p with text", "ragged text"],
)
def test_sizes_on_which_the_published_code_fails(grid, text):
    F, H, W = grid
    mask = blocks_of(Radial(decay=0.2), grid, text)
    assert mask.any(1).all()
    starts = np.arange(len(mask)) * 128
    ends = np.minimum(starts + 128, F * H * W + text) - 1
    first, last = starts // (H * W), ends // (H * W)
    touches_near_frames = (first[:, None] <= last[None, :] + 1) & (first[None, :] <= last[:, None] + 1)
    assert mask[touches_near_frames].all()


def test_sparsity_off_the_grid_is_that_of_its_aligned_neighbour():
    ragged = Radial().layout(grid=(21, 45, 80)).density  # 3600 tokens a frame, 28.1 blocks
    aligned = Radial().layout(grid=(21, 48, 80)).density  # 3840 tokens a frame, 30 blocks
    assert ragged == pytest.approx(aligned, rel=0.05)


# ---------------------------------------------------------------------------- cost


def test_native_720p_builds_in_50_ms():
    method, seconds = Radial(), []
    for _ in range(5):
        started = time.process_time()  # of this process, because others share the machine
        method.layout(grid=(21, 45, 80))
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.050, seconds


class LargestTensor(TorchFunctionMode):
    """Remembers the most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("text", [0, 226])
def test_nothing_of_the_size_of_the_tokens_squared_is_made(text):
    with LargestTensor() as seen:
        layout = Radial().layout(grid=(21, 45, 80), text_len=text)
        assert layout.density < 0.3
    assert 0 < seen.elements <= 2 * (layout.nQ + 21) ** 2  # 0.01 % of N x N


def test_the_instrument_sees_a_large_tensor():
    with LargestTensor() as seen:
        torch.ones(1000, 1000)
    assert seen.elements == 1_000_000


# ---------------------------------------------------------------------------- the config


def test_layout_goes_to_the_device_of_q():
    q = torch.empty(1, 64, 1, 8, device="meta")
    assert Radial(block=4).layout(grid=(4, 4, 4), q=q).device.type == "meta"


def test_layout_does_not_follow_the_default_device():
    with torch.device("meta"):
        layout = Radial(block=4).layout(grid=(4, 4, 4))
    assert layout.device.type == "cpu" and layout.density > 0


def test_two_resolutions_from_one_config():
    method = Radial(block=16)
    small, large = method.layout(grid=(4, 8, 8)), method.layout(grid=(4, 8, 12))
    assert (small.q_len, large.q_len) == (256, 384)
    assert torch.equal(small.block_mask(), method.layout(grid=(4, 8, 8)).block_mask())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay": -0.1}, r"Radial\.decay must be finite and >= 0, got -0\.1"),
        ({"decay": float("nan")}, r"Radial\.decay must be finite"),
        ({"block": 0}, r"Radial\.block must be >= 1 token, got 0; the authors use 64 and 128"),
        ({"drop_below": -1}, r"Radial\.drop_below must be >= 0 tokens, got -1"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Radial(**fields)


def test_grid_smaller_than_a_block():
    with pytest.raises(ValueError, match=r"Radial\.block must be <= F\*H\*W = 2\*6\*6 = 72 .* got 128; pass block=8"):
        Radial().layout(grid=(2, 6, 6))
    assert Radial(block=72).layout(grid=(2, 6, 6)).is_full


def test_large_decay_without_dropping_is_dense_attention():
    assert Radial(decay=1e6, drop_below=0, block=8).layout(grid=(9, 6, 6), text_len=3).is_full


def test_smaller_decay_is_sparser():
    densities = [Radial(decay=d).layout(grid=(18, 48, 80)).density for d in (0.2, 0.5, 0.95)]
    assert densities == sorted(densities) and densities[0] < densities[-1]


def test_presets():
    assert Radial.for_model("wan2.1-14b") == Radial()
    wan22 = Radial.for_model("Wan2.2-A14B", last_dense_steps=2)
    assert (wan22.decay, wan22.block, wan22.dense_steps, wan22.last_dense_steps) == (0.8, 64, 11, 2)
    assert not Radial.for_model("hunyuanvideo").sink
    with pytest.raises(ValueError, match=r"no published setting for 'wan2\.1-1\.3b'\. Did you mean 'wan2\.1-14b'"):
        Radial.for_model("wan2.1-1.3b")
    with pytest.raises(TypeError, match="no field 'dekay'"):
        Radial.for_model("wan2.1-14b", dekay=1.0)


def test_registered_and_documented():
    assert get("radial") is Radial
    method = build("radial", decay=0.5, dense_layers=[0, -1])
    assert method.dense_layers == (0, -1) and build(method.to_dict()) == method
    assert all(f.doc for f in describe(Radial))
