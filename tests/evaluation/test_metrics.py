"""Metrics against closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mmeff.evaluation import metrics


def noise(seed=0, T=5, H=24, W=32):
    return np.random.default_rng(seed).uniform(0.2, 0.8, (T, H, W, 3))


# ---------------------------------------------------------------- PSNR


@pytest.mark.parametrize("error", [0.001, 0.01, 0.1])
def test_psnr_of_a_constant_error(error):
    a = noise()
    score = metrics.psnr(a, a + error)
    assert score.per_frame == pytest.approx([-20 * math.log10(error)] * 5, rel=1e-6)
    assert score.mean == pytest.approx(-20 * math.log10(error)) and score.identical == 0


def test_psnr_is_per_frame_and_the_mean_is_of_decibels():
    a = noise(T=3)
    b = a + np.array([0.1, 0.01, 0.001])[:, None, None, None]
    score = metrics.psnr(a, b)
    assert score.per_frame == pytest.approx([20, 40, 60])
    assert score.mean == pytest.approx(40)


def test_psnr_matches_its_definition_on_noise():
    a, b = noise(0), noise(1)
    mse = ((a - b) ** 2).mean((1, 2, 3))
    assert metrics.psnr(a, b).per_frame == pytest.approx((-10 * np.log10(mse)).tolist(), rel=1e-6)


def test_identical_frames_are_infinite_counted_and_left_out_of_the_mean():
    a = noise(T=4)
    b = a.copy()
    b[2:] += 0.1
    score = metrics.psnr(a, b)
    assert score.per_frame[:2] == (math.inf, math.inf)
    assert score.identical == 2 and score.mean == pytest.approx(20)


def test_identical_videos():
    a = noise()
    for metric in (metrics.psnr, metrics.background_corrected_psnr):
        score = metric(a, a)
        assert score.mean == math.inf and score.identical == 5 and str(score) == "identical"
        plain = json.loads(json.dumps(score.to_dict(), allow_nan=False))
        assert (
            plain["mean"] is None and plain["per_frame"] == [None] * 5 and plain["identical_frames"] == plain["frames"]
        )
    assert metrics.ssim(a, a).per_frame == (1.0,) * 5
    assert metrics.ssim(a, a).to_dict()["mean"] == 1.0


def test_uint8_floats_and_tensors_agree():
    a, b = ((noise(s) * 255).astype(np.uint8) for s in (0, 1))
    expected = metrics.psnr(a / 255.0, b / 255.0)
    assert metrics.psnr(a, b) == expected
    assert metrics.psnr(torch.from_numpy(a), torch.from_numpy(b)) == expected
    single = metrics.psnr(torch.from_numpy(a / 255.0).float(), b)
    assert single.mean == pytest.approx(expected.mean, abs=1e-4)


def test_chunks_do_not_show():
    a, b = noise(0, T=2 * metrics.CHUNK + 3), noise(1, T=2 * metrics.CHUNK + 3)
    for metric in (metrics.psnr, metrics.ssim):
        whole = metric(a, b)
        assert len(whole.per_frame) == len(a)
        for t in (0, metrics.CHUNK, len(a) - 1):
            assert whole.per_frame[t] == pytest.approx(metric(a[t : t + 1], b[t : t + 1]).mean, rel=1e-12)


# ---------------------------------------------------------------- SSIM


def test_ssim_of_two_flat_frames():
    a, b = np.full((2, 16, 16, 3), 0.4), np.full((2, 16, 16, 3), 0.5)
    c1 = 0.01**2  # no variance, so only the luminance term is left
    expected = (2 * 0.4 * 0.5 + c1) / (0.4**2 + 0.5**2 + c1)
    assert metrics.ssim(a, b).per_frame == pytest.approx([expected] * 2, abs=1e-9)


def test_ssim_falls_with_noise_and_is_symmetric():
    a, n = noise(0), noise(1) - 0.5
    values = [metrics.ssim(a, (a + s * n).clip(0, 1)).mean for s in (0.02, 0.1, 0.5)]
    assert 1 > values[0] > values[1] > values[2]
    b = (a + 0.1 * n).clip(0, 1)
    assert metrics.ssim(a, b).mean == pytest.approx(metrics.ssim(b, a).mean, rel=1e-12)


# ---------------------------------------------------------------- background


def scene(background, colour=(0.9, 0.1, 0.1)):
    video = np.empty((4, 24, 24, 3))
    video[:] = background
    for t in range(4):
        video[t, 8:14, 2 + 4 * t : 8 + 4 * t] = colour
    return video


def test_a_shifted_background_costs_raw_psnr_and_not_the_corrected_one():
    a = scene((0.3, 0.4, 0.5))
    b = a + 0.05  # everything moves, the object too
    assert metrics.psnr(a, b).mean == pytest.approx(-20 * math.log10(0.05))
    assert metrics.background_corrected_psnr(a, b).mean > 100
    assert metrics.background_shift(a, b) == pytest.approx(0.05)


def test_corrected_psnr_is_the_psnr_of_what_is_left():
    a = scene((0.3, 0.4, 0.5))
    b = scene((0.33, 0.38, 0.5))  # the background moves, the object stays: after the correction only the object differs
    share = 6 * 6 / (24 * 24)
    mse = share * (0.03**2 + 0.02**2) / 3
    assert metrics.background_corrected_psnr(a, b).mean == pytest.approx(-10 * math.log10(mse))
    assert metrics.background_shift(a, b) == pytest.approx(0.03)


def test_a_deformed_object_costs_both():
    a, b = scene((0.3, 0.4, 0.5)), scene((0.3, 0.4, 0.5), colour=(0.1, 0.9, 0.1))
    assert metrics.background_corrected_psnr(a, b).mean == pytest.approx(metrics.psnr(a, b).mean)
    assert metrics.background_shift(a, b) == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "metric", [metrics.psnr, metrics.ssim, metrics.background_corrected_psnr, metrics.background_shift]
)
@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (noise(T=5), noise(T=4), ValueError, r"one shape, got \(5, 24, 32, 3\) and \(4, 24, 32, 3\)"),
        (noise()[0], noise()[0], ValueError, r"video a must be \(T, H, W, 3\).*got \(24, 32, 3\)"),
        (noise(), noise() * 255, ValueError, r"video b must be finite and in \[0, 1\], got values in \["),
        (noise() * np.nan, noise(), ValueError, "video a must be finite"),
        (noise()[:0], noise()[:0], ValueError, "at least one frame"),
        (noise().astype(np.int64), noise(), TypeError, "video a must be float in .* or uint8 in .*, got torch.int64"),
    ],
)
def test_wrong_videos(metric, a, b, error, message):
    with pytest.raises(error, match=message):
        metric(a, b)


def test_frames_smaller_than_the_window():
    with pytest.raises(ValueError, match="ssim needs frames of at least 11x11 pixels, its window, got 32x10"):
        metrics.ssim(noise(H=10), noise(H=10))
    assert metrics.ssim(noise(H=11, W=11), noise(H=11, W=11)).mean == 1


# ---------------------------------------------------------------- latency


def test_latency():
    found = metrics.latency([1.2, 1.0, 1.1])
    assert (found.median, found.min, found.max, found.count) == (1.1, 1.0, 1.2, 3)
    assert found.spread == pytest.approx(0.2 / 1.1)
    assert str(found) == "1.10 s (3 runs, spread 18%)"
    assert found.to_dict()["median_s"] == 1.1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(312.4, "312 s"), (12.345, "12.35 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs"), (0.0, "0 ms")],
)
def test_latency_of_one_run(seconds, text):
    found = metrics.latency([seconds])
    assert found.spread == 0 and str(found) == f"{text} (one run, spread unknown)"


@pytest.mark.parametrize("seconds", [[], [1.0, math.nan], [math.inf], [-1.0]])
def test_wrong_timings(seconds):
    with pytest.raises(ValueError, match="at least one finite timing in seconds, none negative"):
        metrics.latency(seconds)
