"""Generated pictures: one coloured shape in one place of a flat background, and a detector that reads them.

The text of a picture is `a {colour} {shape} in the {place}`. Pictures are a pure function of (seed, index), so a split is a
range of seeds and two splits never share a picture. The detector is what judges generated pictures: it knows nothing of the
prompt and answers colour, shape and place from pixels alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmeff.tiny import clips

COLOURS = clips.COLOURS
SHAPES = (*clips.SHAPES, "triangle")
PLACES: dict[str, tuple[float, float]] = {  # (y, x) of the shape's centre, in picture sizes
    "top left": (0.26, 0.26),
    "top right": (0.26, 0.74),
    "bottom left": (0.74, 0.26),
    "bottom right": (0.74, 0.74),
    "center": (0.5, 0.5),
}

SIZE = 48  # pixels, both sides
RADIUS = (8.4, 9.6)  # pixels
JITTER = 1.5  # pixels that a centre may lie off its place, along both axes
AREA = (70.0, 330.0)  # pixels that a shape may cover to be found
OVERLAP = 0.7  # of the best template with what was found, as intersection over union

# Seeds: a split is a seed; those of the clips, scenes and motions lie below.
TRAIN_SEED, GATE_SEED, HELDOUT_SEED = 31_000, 32_000, 33_000


@dataclass(frozen=True, kw_only=True)
class StillLabels:
    """What a batch of pictures shows: integer arrays of shape (B,) into COLOURS, SHAPES and PLACES."""

    colour: np.ndarray
    shape: np.ndarray
    place: np.ndarray

    def prompts(self) -> list[str]:
        """The text of every picture."""
        colours, places = list(COLOURS), list(PLACES)
        return [
            prompt(colours[c], SHAPES[s], places[p])
            for c, s, p in zip(self.colour, self.shape, self.place, strict=True)
        ]

    def first(self, count: int) -> StillLabels:
        """The labels of the first `count` pictures."""
        return StillLabels(colour=self.colour[:count], shape=self.shape[:count], place=self.place[:count])


def prompt(colour: str, shape: str, place: str) -> str:
    """The one sentence form that the tiny image model was trained on."""
    return f"a {colour} {shape} in the {place}"


def all_prompts() -> list[str]:
    """Every prompt of the grammar, colour-major."""
    return [prompt(c, s, p) for c in COLOURS for s in SHAPES for p in PLACES]


def prompt_index(labels: StillLabels) -> np.ndarray:
    """The position of every picture's text in `all_prompts()`, shape (B,)."""
    return (labels.colour * len(SHAPES) + labels.shape) * len(PLACES) + labels.place


def words() -> list[str]:
    """Every word of the grammar, once."""
    return list(dict.fromkeys(word for text in all_prompts() for word in text.split()))


def sample(seed: int, index: int, batch: int, *, pooled: bool = False) -> tuple[np.ndarray, StillLabels]:
    """Render a batch of pictures.

    Args:
        seed: the split; index: the batch inside the split; batch: pictures B.
        pooled: return 2 x 2 averages, 24 x 24 pixels.
    Returns:
        float32 pictures (B, 48, 48, 3) in [0, 1], and their labels.
    """
    rng = np.random.default_rng([seed, index])
    labels = StillLabels(
        colour=rng.integers(len(COLOURS), size=batch),
        shape=rng.integers(len(SHAPES), size=batch),
        place=rng.integers(len(PLACES), size=batch),
    )
    radius = rng.uniform(*RADIUS, size=batch)
    paper = rng.uniform(0.08, 0.38, size=(batch, 3))
    ink = np.array(list(COLOURS.values()))[labels.colour] + rng.uniform(-0.04, 0.04, size=(batch, 3))
    centre = np.array(list(PLACES.values()))[labels.place] * SIZE + rng.uniform(-JITTER, JITTER, size=(batch, 2))
    cover = coverage(labels.shape, centre, radius)
    if pooled:
        cover = cover.reshape(batch, SIZE // 2, 2, SIZE // 2, 2).mean(axis=(2, 4))
    below, above = (x.astype(np.float32)[:, None, None] for x in (paper, np.clip(ink, 0, 1)))
    return below + (above - below) * cover[..., None], labels


def coverage(shape: np.ndarray, centre: np.ndarray, radius: np.ndarray, *, size: int = SIZE) -> np.ndarray:
    """Anti-aliased float32 masks (B, size, size) of shapes (B,) at centres (B, 2) in pixels with radii (B,)."""
    triangle = shape == SHAPES.index("triangle")
    out = clips.coverage(np.where(triangle, 0, shape), centre[:, None], radius, size=size)[:, 0]
    if triangle.any():
        axis = (np.arange(size) + 0.5).astype(np.float32)
        y, x, r = (v[triangle].astype(np.float32)[:, None, None] for v in (centre[:, 0], centre[:, 1], radius))
        # An upward one: a base, and two sides that rise by two for every one that they lean in.
        dy, ax = axis[None, :, None] - y, np.abs(axis[None, None, :] - x)
        distance = np.maximum(dy - 0.75 * r, (2 * ax - dy - 0.95 * r) / np.sqrt(5.0).astype(np.float32))
        out[triangle] = np.clip(0.5 - distance, 0.0, 1.0)
    return out


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What the detector read from pictures; every array has shape (B,). Labels are -1 where nothing was found."""

    found: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    place: np.ndarray

    def score(self, labels: StillLabels) -> dict[str, float]:
        """Fractions of pictures found, and found with the right colour, shape, place, and all three."""
        colour = self.found & (self.colour == labels.colour)
        shape = self.found & (self.shape == labels.shape)
        place = self.found & (self.place == labels.place)
        parts = {"found": self.found, "colour": colour, "shape": shape, "place": place, "all": colour & shape & place}
        return {name: float(np.mean(value)) for name, value in parts.items()}


def detect(images: np.ndarray) -> Detection:
    """Read colour, shape and place from pictures (B, 48, 48, 3) or (B, 24, 24, 3) in [0, 1].

    The background is a picture's median colour; the object is what differs from it. It counts as found when it covers a
    plausible area and one of the shapes, drawn around its middle, overlaps it well: two objects or confetti are not found.
    """
    if images.ndim != 4 or images.shape[1:] not in ((SIZE, SIZE, 3), (SIZE // 2, SIZE // 2, 3)):
        raise ValueError(f"detect needs pictures of shape (B, 48, 48, 3) or (B, 24, 24, 3), got {tuple(images.shape)}")
    batch, size = images.shape[:2]
    scale = size / SIZE
    background = np.median(images.reshape(batch, -1, 3), axis=1)
    strength = np.abs(images - background[:, None, None]).max(axis=-1)
    mask = np.clip((strength - 0.12) / 0.25, 0, 1)  # (B, size, size), soft
    area = mask.sum(axis=(1, 2)) / scale**2
    axis = np.arange(size) + 0.5
    safe = np.maximum(mask.sum(axis=(1, 2)), 1e-6)
    middle = np.stack([mask.sum(axis=2) @ axis, mask.sum(axis=1) @ axis], axis=1) / safe[:, None]  # (B, 2)
    overlap = _overlaps(mask, middle, scale)
    found = (area > AREA[0]) & (area < AREA[1]) & (overlap.max(axis=1) > OVERLAP)

    weight = mask[..., None] ** 2
    ink = (images * weight).sum(axis=(1, 2)) / np.maximum(weight.sum(axis=(1, 2)), 1e-6)
    palette = np.array(list(COLOURS.values()))
    colour = np.argmin(((ink[:, None] - palette) ** 2).sum(axis=-1), axis=1)
    centres = np.array(list(PLACES.values())) * size
    place = np.argmin(((middle[:, None] - centres) ** 2).sum(axis=-1), axis=1)
    shape = overlap.argmax(axis=1)
    for labels in (colour, shape, place):
        labels[~found] = -1
    return Detection(found=found, colour=colour, shape=shape, place=place)


def _overlaps(mask: np.ndarray, middle: np.ndarray, scale: float) -> np.ndarray:
    """Soft intersection over union (B, shapes) of masks with every shape, drawn so that its own middle is theirs."""
    batch, size = mask.shape[:2]
    best = np.zeros((batch, len(SHAPES)))
    for kind in range(len(SHAPES)):
        for radius in np.linspace(*RADIUS, 3) * scale:
            # A triangle's area lies below the point that it is drawn around.
            drop = 0.0 if SHAPES[kind] != "triangle" else _TRIANGLE_DROP * radius
            centre = middle - np.array([drop, 0.0])
            template = coverage(np.full(batch, kind), centre, np.full(batch, radius), size=size)
            shared, either = (f(mask, template).sum(axis=(1, 2)) for f in (np.minimum, np.maximum))
            best[:, kind] = np.maximum(best[:, kind], shared / np.maximum(either, 1e-6))
    return best


# The middle of a triangle's area lies a third of its height above its base: base at 0.75 r, apex at -0.95 r.
_TRIANGLE_DROP = 0.75 - (0.75 + 0.95) / 3
