"""How close two videos are, and how long something took.

Two videos of the same prompt and seed, dense and accelerated, are compared frame by frame with PSNR and SSIM. Raw PSNR
punishes a slightly different flat background more than a deformed object, so it never stands alone:
`background_corrected_psnr` removes that shift first, and `background_shift` measures it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 8  # frames compared at a time: SSIM keeps about a dozen float64 copies of them
SSIM_WINDOW = 11  # pixels; the standard Gaussian window of sigma 1.5


@dataclass(frozen=True, kw_only=True)
class Score:
    """One quality metric of a pair of videos.

    Fields: `metric` its name; `unit` "dB" or ""; `per_frame` one value per frame; `mean` their mean over the frames
    that differ, because the PSNR of two identical frames is infinite and one of them would hide all others;
    `identical` how many frames are equal bit by bit. `mean` is infinite only for the PSNR of two videos that are
    equal throughout.
    """

    metric: str
    unit: str
    per_frame: tuple[float, ...]
    mean: float
    identical: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. JSON has no infinity, so an infinite PSNR is null, and `identical_frames` says why."""
        return {
            "metric": self.metric,
            "unit": self.unit,
            "mean": self.mean if math.isfinite(self.mean) else None,
            "per_frame": [v if math.isfinite(v) else None for v in self.per_frame],
            "frames": len(self.per_frame),
            "identical_frames": self.identical,
        }

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "identical"
        return f"{self.mean:.2f} {self.unit}" if self.unit else f"{self.mean:.4f}"


def psnr(a: Any, b: Any) -> Score:
    """Peak signal-to-noise ratio of two videos, frame by frame.

    Args: a, b: (T, H, W, 3), float in [0, 1] or uint8; arrays or tensors.
    Returns: a `Score` in dB. Identical frames score inf and are left out of the mean, which can only lower it.
    Raises: ValueError for different or wrong shapes and for values outside [0, 1]; TypeError for other dtypes.
    Numerics: float64, data range 1; torchmetrics takes its logarithm of 10 in float32, which is 5e-8 relative. The mean
        is of the frames' dB, not the dB of the mean error.
    Source: torchmetrics `peak_signal_noise_ratio`.
    """
    return _score("psnr", "dB", _psnr_frames, *_pair(a, b))


def ssim(a: Any, b: Any) -> Score:
    """Structural similarity of two videos, frame by frame; 1 for identical frames.

    Args: a, b: (T, H, W, 3), float in [0, 1] or uint8; at least 11 pixels on both sides, the size of the window.
    Returns: a `Score`, whose mean runs over all frames.
    Raises: ValueError for different, wrong or too small shapes and for values outside [0, 1]; TypeError for other
        dtypes.
    Numerics: float64, data range 1, Gaussian window 11x11 of sigma 1.5, over RGB.
    Source: torchmetrics `structural_similarity_index_measure`.
    """
    x, y = _pair(a, b)
    if min(x.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, its window, "
            f"got {x.shape[2]}x{x.shape[1]}"
        )
    return _score("ssim", "", _ssim_frames, x, y)


def background_corrected_psnr(a: Any, b: Any) -> Score:
    """PSNR after removing the shift of the background between two videos.

    Sparse attention tends to move a flat background by a few percent, evenly: a loss worth reporting, but it swamps
    everything else in raw PSNR. Here each video's median colour, over all of its frames, is subtracted before the
    error is taken. The median is the background as long as that covers more than half of the clip.

    Args, Returns, Raises: as `psnr`.
    Numerics: float64, data range 1; shifted values are not clipped. Two videos that differ by a constant only score far
        above 100 dB rather than inf, unless the subtraction happens to be exact.
    """
    x, y = _pair(a, b)
    return _score("background_corrected_psnr", "dB", _psnr_frames, x - _median_colour(x), y - _median_colour(y))


def background_shift(a: Any, b: Any) -> float:
    """How far the median colour of b is from that of a: the largest difference over R, G and B, in [0, 1].

    Args, Raises: as `psnr`. Returns: a float; report it beside `background_corrected_psnr`, which hides it.
    """
    x, y = _pair(a, b)
    return float((_median_colour(x) - _median_colour(y)).abs().max())


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    x, y = _unit_video(a, "a"), _unit_video(b, "b")
    if x.shape != y.shape:
        raise ValueError(
            f"videos to compare must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}; "
            "compare the same frames at the same size"
        )
    return x, y


def _unit_video(video: Any, name: str) -> Tensor:
    """(T, H, W, 3) float64 in [0, 1] on the CPU."""
    import torch

    x = video.detach().cpu() if isinstance(video, torch.Tensor) else torch.from_numpy(np.array(video))
    if x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
        raise ValueError(f"video {name} must be (T, H, W, 3) with at least one frame, got {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return x.double() / 255
    if not x.is_floating_point():
        raise TypeError(f"video {name} must be float in [0, 1] or uint8 in [0, 255], got {x.dtype}")
    low, high = float(x.min()), float(x.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails both
        raise ValueError(f"video {name} must be finite and in [0, 1], got values in [{low:.4g}, {high:.4g}]")
    return x.double().clamp(0, 1)


def _score(metric: str, unit: str, frames: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Score:
    values: list[float] = []
    for start in range(0, len(x), CHUNK):
        values += frames(x[start : start + CHUNK], y[start : start + CHUNK]).tolist()
    equal = (x == y).flatten(1).all(1).tolist()
    # decided here and not by the metric: SSIM of equal frames may come out as 1 - 1e-16
    exact = math.inf if unit == "dB" else 1.0
    values = [exact if same else value for same, value in zip(equal, values, strict=True)]
    finite = [v for v in values if math.isfinite(v)]
    return Score(
        metric=metric,
        unit=unit,
        per_frame=tuple(values),
        mean=math.fsum(finite) / len(finite) if finite else math.inf,
        identical=sum(equal),
    )


def _psnr_frames(x: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3)).reshape(-1)


def _ssim_frames(x: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = x.permute(0, 3, 1, 2).contiguous(), y.permute(0, 3, 1, 2).contiguous()
    values = structural_similarity_index_measure(
        x, y, gaussian_kernel=True, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none"
    )
    return values.reshape(-1)  # type: ignore[union-attr]  # a pair only with return_full_image


def _median_colour(x: Tensor) -> Tensor:
    return x.reshape(-1, 3).median(0).values


# ---------------------------------------------------------------- time


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Repeated timings of one thing, in seconds. `spread` is (max - min) / median: 0.05 means they lie within 5 %."""

    median: float
    min: float
    max: float
    spread: float
    count: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain JSON types; seconds."""
        return {
            "median_s": self.median, "min_s": self.min, "max_s": self.max, "spread": self.spread, "count": self.count
        }  # fmt: skip

    def __str__(self) -> str:
        runs = f"{self.count} runs, spread {self.spread:.0%}" if self.count > 1 else "one run, spread unknown"
        return f"{_seconds(self.median)} ({runs})"


def latency(seconds: Iterable[float]) -> Latency:
    """Median, extremes and spread of repeated timings; warm-up runs must be left out by the caller.

    Args: seconds: at least one timing, all finite and not negative.
    Raises: ValueError otherwise.
    """
    values: Sequence[float] = [float(s) for s in seconds]
    if not values or not all(math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(f"latency needs at least one finite timing in seconds, none negative, got {list(values)}")
    median = statistics.median(values)
    spread = (max(values) - min(values)) / median if median else 0.0
    return Latency(median=median, min=min(values), max=max(values), spread=spread, count=len(values))


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:.0f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.3g} ms" if value >= 1e-3 or value == 0 else f"{value * 1e6:.3g} µs"
