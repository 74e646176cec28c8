"""Generated clips: one coloured shape that moves in one direction over a flat background, and a detector that reads them.

The text of a clip is `a {colour} {shape} moving {direction}`. Clips are a pure function of (seed, index), so a split
is a range of seeds and two splits never share a clip. The detector is what judges generated videos: it knows nothing of
the prompt and answers colour, shape and direction from pixels alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.20),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (0.95, 0.90, 0.15),
    "magenta": (0.90, 0.20, 0.90),
    "cyan": (0.15, 0.90, 0.90),
}
SHAPES = ("square", "cross", "ring")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}

SIZE = 48  # pixels, both sides
FRAMES = 17
RADIUS = (8.4, 9.6)  # pixels
TRAVEL = (22.0, 27.0)  # pixels between the first and the last frame; capped so that the shape stays inside
MARGIN = 1.0

# Seeds: a split is a seed, and the seed sequence of numpy keeps (seed, index) streams apart.
TRAIN_SEED, GATE_SEED, HELDOUT_SEED = 1_000, 2_000, 3_000
TUNE_SEED, TUNE_HELDOUT_SEED = 4_000, 5_000  # fine-tuning: its clips, and those that only its loss is measured on


@dataclass(frozen=True, kw_only=True)
class ClipLabels:
    """What a batch of clips shows: integer arrays of shape (B,) into COLOURS, SHAPES and DIRECTIONS."""

    colour: np.ndarray
    shape: np.ndarray
    direction: np.ndarray

    def prompts(self) -> list[str]:
        """The text of every clip."""
        colours, directions = list(COLOURS), list(DIRECTIONS)
        return [
            prompt(colours[c], SHAPES[s], directions[d])
            for c, s, d in zip(self.colour, self.shape, self.direction, strict=True)
        ]


def prompt(colour: str, shape: str, direction: str) -> str:
    """The one sentence form that the tiny video model was trained on."""
    return f"a {colour} {shape} moving {direction}"


def all_prompts() -> list[str]:
    """Every prompt of the grammar, colour-major."""
    return [prompt(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def prompt_index(labels: ClipLabels) -> np.ndarray:
    """The position of every clip's text in `all_prompts()`, shape (B,)."""
    return (labels.colour * len(SHAPES) + labels.shape) * len(DIRECTIONS) + labels.direction


def stretched(times: int) -> int:
    """Frames of a clip whose latent video, and so whose tokens, are `times` those of `FRAMES` frames: 17, 35, 71, ..."""
    if times < 1:
        raise ValueError(f"times must be >= 1, got {times}; 2 and 4 are what fine-tuning on longer clips is shown for")
    return times * (FRAMES + 1) - 1


def sample(
    seed: int, index: int, batch: int, *, frames: int = FRAMES, pooled: bool = False
) -> tuple[np.ndarray, ClipLabels]:
    """Render a batch of clips.

    Args:
        seed: the split; index: the batch inside the split; batch: clips B.
        frames: frames of a clip; the travel is spread over them.
        pooled: return 2 x 2 averages, 24 x 24 pixels, which is all that the tiny codec keeps, at a third of the time.
    Returns:
        float32 videos (B, frames, 48, 48, 3) in [0, 1], and their labels.
    """
    rng = np.random.default_rng([seed, index])
    labels = ClipLabels(
        colour=rng.integers(len(COLOURS), size=batch),
        shape=rng.integers(len(SHAPES), size=batch),
        direction=rng.integers(len(DIRECTIONS), size=batch),
    )
    radius = rng.uniform(*RADIUS, size=batch)
    background = rng.uniform(0.08, 0.38, size=(batch, 3))
    jitter = rng.uniform(-0.04, 0.04, size=(batch, 3))
    steps = np.array(list(DIRECTIONS.values()), dtype=np.float64)[labels.direction]  # (B, 2) unit (dy, dx)
    room = SIZE - 2 * (radius + MARGIN)
    travel = np.minimum(rng.uniform(*TRAVEL, size=batch), room)
    low, high = radius + MARGIN, SIZE - radius - MARGIN
    start = rng.uniform(size=(batch, 2)) * (high - low)[:, None] + low[:, None]
    for axis in range(2):
        moved = steps[:, axis] != 0
        span = (high - low - travel)[moved]
        begin = low[moved] + rng.uniform(size=batch)[moved] * span
        start[moved, axis] = np.where(steps[moved, axis] > 0, begin, begin + travel[moved])
    phase = np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1)
    centre = start[:, None] + phase[None, :, None] * (steps * travel[:, None])[:, None]  # (B, F, 2)
    cover = coverage(labels.shape, centre, radius)
    if pooled:
        cover = cover.reshape(batch, frames, SIZE // 2, 2, SIZE // 2, 2).mean(axis=(3, 5))
    cover = cover[..., None]
    ink = np.clip(np.array(list(COLOURS.values()))[labels.colour] + jitter, 0, 1)
    paper = background.astype(np.float32)[:, None, None, None]
    return paper + (ink.astype(np.float32)[:, None, None, None] - paper) * cover, labels


def coverage(shape: np.ndarray, centre: np.ndarray, radius: np.ndarray, *, size: int = SIZE) -> np.ndarray:
    """Anti-aliased float32 masks (B, F, size, size) of shapes (B,) at centres (B, F, 2) in pixels with radii (B,)."""
    axis = (np.arange(size) + 0.5).astype(np.float32)
    centre, r = centre.astype(np.float32), radius.astype(np.float32)[:, None, None, None]
    dy = axis[None, None, :, None] - centre[..., 0][..., None, None]
    dx = axis[None, None, None, :] - centre[..., 1][..., None, None]
    ay, ax = np.abs(dy), np.abs(dx)
    arm = 0.32 * r
    distance = np.empty(np.broadcast_shapes(ay.shape, ax.shape), dtype=np.float32)
    for kind in np.unique(shape):  # signed distance to the outline, in pixels
        i = shape == kind
        if kind == 0:
            distance[i] = np.maximum(ay[i], ax[i]) - 0.85 * r[i]
        elif kind == 1:
            distance[i] = np.minimum(np.maximum(ay[i] - arm[i], ax[i] - r[i]), np.maximum(ax[i] - arm[i], ay[i] - r[i]))
        else:
            distance[i] = np.abs(np.sqrt(dy[i] ** 2 + dx[i] ** 2) - 0.72 * r[i]) - 0.28 * r[i]
    return np.clip(0.5 - distance, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What the detector read from clips; every array has shape (B,). Labels are -1 where nothing was found."""

    found: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    direction: np.ndarray

    def score(self, labels: ClipLabels) -> dict[str, float]:
        """Fractions of clips found, and found with the right colour, shape, direction, and all three."""
        colour = self.found & (self.colour == labels.colour)
        shape = self.found & (self.shape == labels.shape)
        direction = self.found & (self.direction == labels.direction)
        parts = {"found": self.found, "colour": colour, "shape": shape, "direction": direction}
        parts["all"] = colour & shape & direction
        return {name: float(np.mean(value)) for name, value in parts.items()}


_TEMPLATE_RADII = np.linspace(RADIUS[0], RADIUS[1], 3) / 2


def detect(videos: np.ndarray) -> Detection:
    """Read colour, shape and direction from videos (B, F, h, w, 3) in [0, 1], h = w a multiple of 24.

    The background is the per-clip median colour; the object is what differs from it. A clip counts as found when the
    object covers 12 to 130 of the 24 x 24 cells in every frame and moves by more than 3.2 cells in all.
    """
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.shape[2] != videos.shape[3] or videos.shape[2] % 24:
        raise ValueError(f"detect needs videos of shape (B, F, 24k, 24k, 3), got {tuple(videos.shape)}")
    batch, frames, size = videos.shape[:3]
    k = size // 24
    cells = videos.reshape(batch, frames, 24, k, 24, k, 3).mean(axis=(3, 5))
    background = np.median(cells.reshape(batch, -1, 3), axis=1)
    strength = np.abs(cells - background[:, None, None, None]).max(axis=-1)
    mask = np.clip((strength - 0.12) / 0.25, 0, 1)  # (B, F, 24, 24), soft
    area = mask.sum(axis=(2, 3))
    axis = np.arange(24) + 0.5
    safe = np.maximum(area, 1e-6)
    cy = (mask.sum(axis=3) * axis).sum(axis=2) / safe
    cx = (mask.sum(axis=2) * axis).sum(axis=2) / safe
    quarter = max(1, frames // 4)
    shift = np.stack([c[:, -quarter:].mean(axis=1) - c[:, :quarter].mean(axis=1) for c in (cy, cx)], axis=1)
    found = (area > 12).all(axis=1) & (area < 130).all(axis=1) & (np.abs(shift).max(axis=1) > 3.2)
    vertical = np.abs(shift[:, 0]) > np.abs(shift[:, 1])
    direction = np.where(vertical, np.where(shift[:, 0] < 0, 2, 3), np.where(shift[:, 1] < 0, 0, 1))

    weight = mask[..., None] ** 2
    ink = (cells * weight).sum(axis=(1, 2, 3)) / np.maximum(weight.sum(axis=(1, 2, 3)), 1e-6)
    palette = np.array(list(COLOURS.values()))
    colour = np.argmin(((ink[:, None] - palette[None]) ** 2).sum(axis=-1), axis=1)
    shape = _match_shape(mask, cy, cx)
    lost = ~found
    for labels in (colour, shape, direction):
        labels[lost] = -1
    return Detection(found=found, colour=colour, shape=shape, direction=direction)


def _match_shape(mask: np.ndarray, cy: np.ndarray, cx: np.ndarray) -> np.ndarray:
    """The shape whose template, drawn at every frame's centroid, overlaps best (soft intersection over union)."""
    batch, frames = cy.shape
    centre = np.stack([cy, cx], axis=-1)
    best = np.full((batch, len(SHAPES)), -1.0)
    for kind in range(len(SHAPES)):
        for radius in _TEMPLATE_RADII:
            template = coverage(np.full(batch, kind), centre, np.full(batch, radius), size=24)
            overlap = np.minimum(mask, template).sum(axis=(1, 2, 3))
            union = np.maximum(mask, template).sum(axis=(1, 2, 3))
            best[:, kind] = np.maximum(best[:, kind], overlap / np.maximum(union, 1e-6))
    return best.argmax(axis=1)
