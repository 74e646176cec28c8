"""Generated scenes: coloured shapes on a textured background, and questions with one right answer each.

A scene is a pure function of (seed, index); a split is a seed. Seven kinds of question, all answered in one or two words:

    colour_of    what color is the circle ?          shape_at     what shape is at the top left ?
    shape_of     what shape is red ?                 colour_at    what color is at the top left ?
    count        how many objects are there ?        where        where is the red circle ?
    exists       is there a red circle ?

A question is only asked where the scene determines the answer (a unique circle, exactly one object in the quadrant, ...).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.75, 0.18),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.12),
    "purple": (0.60, 0.15, 0.80),
    "cyan": (0.10, 0.85, 0.90),
    "orange": (1.00, 0.55, 0.08),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
KINDS = ("colour_of", "shape_of", "count", "exists", "shape_at", "colour_at", "where")

SIZE = 96  # pixels
RADIUS = (7.0, 10.5)
TRAIN_SEED, GATE_SEED, HELDOUT_SEED, PRUNING_SEED = 11_000, 12_000, 13_000, 14_000


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of scenes. Objects are padded to five; `count` (B,) says how many are real.

    colour, shape: (B, 5) integers; centre: (B, 5, 2) as (y, x) in pixels; radius: (B, 5); owner: (B, 96, 96) index of the
    object that covers a pixel, or -1.
    """

    images: np.ndarray  # (B, 96, 96, 3) float32 in [0, 1]
    count: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    owner: np.ndarray

    def __len__(self) -> int:
        return len(self.count)


@dataclass(frozen=True)
class Question:
    """A question about one scene, its answer, and its kind (one of KINDS)."""

    text: str
    answer: str
    kind: str


def sample(seed: int, index: int, batch: int) -> Scenes:
    """Render batch `index` of the split `seed`."""
    rng = np.random.default_rng([seed, index])
    count = rng.integers(2, 6, size=batch)
    colour = rng.integers(len(COLOURS), size=(batch, 5))
    shape = rng.integers(len(SHAPES), size=(batch, 5))
    radius = rng.uniform(*RADIUS, size=(batch, 5)).astype(np.float32)
    centre = np.stack([_place(rng, count[b], radius[b]) for b in range(batch)])

    images = background(rng, batch)
    clutter(rng, images)
    owner = np.full((batch, SIZE, SIZE), -1, dtype=np.int64)
    shade = ink(rng, colour)
    for b in range(batch):
        for o in range(count[b]):
            rows, columns, cover = coverage(shape[b, o], centre[b, o], radius[b, o])
            window = images[b, rows, columns]
            window += (shade[b, o] - window) * cover[..., None]
            owner[b, rows, columns][cover > 0.5] = o
    images += rng.normal(0, 0.015, size=images.shape).astype(np.float32)
    return Scenes(
        images=np.clip(images, 0, 1), count=count, colour=colour, shape=shape, centre=centre, radius=radius, owner=owner
    )


def _place(rng: np.random.Generator, count: int, radius: np.ndarray) -> np.ndarray:
    """Centres (5, 2) that keep objects apart, inside the picture, and clear of the lines between the quadrants."""
    while True:
        centre = np.zeros((5, 2), dtype=np.float32)
        placed = 0
        for _ in range(200):
            if placed == count:
                return centre
            r = radius[placed]
            spot = rng.uniform(r + 1, SIZE - r - 1, size=2).astype(np.float32)
            if (np.abs(spot - SIZE / 2) < 5).any():
                continue
            apart = np.linalg.norm(centre[:placed] - spot, axis=1) > radius[:placed] + r + 3
            if apart.all():
                centre[placed] = spot
                placed += 1


def ink(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """Slightly varied float32 shades (B, O, 3) of the colours (B, O)."""
    plain = np.array(list(COLOURS.values()), dtype=np.float32)[colour]
    dimmed = plain * rng.uniform(0.88, 1.0, size=(*colour.shape, 1))
    return np.clip(dimmed + rng.uniform(-0.04, 0.04, size=(*colour.shape, 3)), 0, 1).astype(np.float32)


def background(rng: np.random.Generator, batch: int, *, size: int = SIZE) -> np.ndarray:
    """Muted colour with smooth waves, (B, size, size, 3)."""
    base = rng.uniform(0.25, 0.55, size=(batch, 1, 1, 3)).astype(np.float32)
    axis = np.linspace(0, 2 * np.pi, size, dtype=np.float32)
    wave = np.zeros((batch, size, size), dtype=np.float32)
    for _ in range(3):
        fy, fx = rng.uniform(-5, 5, size=(2, batch, 1)).astype(np.float32)
        phase = rng.uniform(0, 2 * np.pi, size=(batch, 1, 1)).astype(np.float32)
        wave += np.sin((fy * axis)[:, :, None] + (fx * axis)[:, None, :] + phase)
    tint = rng.uniform(0.4, 1.0, size=(batch, 1, 1, 3)).astype(np.float32)
    return base + 0.035 * wave[..., None] * tint


def clutter(rng: np.random.Generator, images: np.ndarray) -> None:
    """Small coloured dots, too small to be objects, drawn in place."""
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    size = images.shape[1]
    for image in images:
        for _ in range(rng.integers(3, 8)):
            r = rng.uniform(1.0, 2.0)
            y, x = rng.uniform(3, size - 3, size=2)
            rows, columns, cover = coverage(0, np.array([y, x]), r, size=size)
            window = image[rows, columns]
            window += (palette[rng.integers(len(palette))] - window) * (0.8 * cover)[..., None]


def coverage(shape: int, centre: np.ndarray, radius: float, *, size: int = SIZE) -> tuple[slice, slice, np.ndarray]:
    """The rows and columns of a picture that a shape can touch, and its anti-aliased coverage there."""
    reach = int(np.ceil(radius)) + 1
    spans = []
    for c in centre:
        middle = int(c)
        spans.append(slice(max(0, middle - reach), min(size, middle + reach + 1)))
    dy = (np.arange(spans[0].start, spans[0].stop) + 0.5 - centre[0])[:, None]
    dx = (np.arange(spans[1].start, spans[1].stop) + 0.5 - centre[1])[None, :]
    ay, ax = np.abs(dy), np.abs(dx)
    if shape == 0:
        distance = np.sqrt(dy**2 + dx**2) - 0.95 * radius
    elif shape == 1:
        distance = np.maximum(ay, ax) - 0.82 * radius
    elif shape == 2:  # upward triangle: a base line and two slanted sides
        distance = np.maximum(dy - 0.75 * radius, (ax * 2 - dy - 0.95 * radius) / np.sqrt(5.0))
    else:
        arm = 0.30 * radius
        distance = np.minimum(np.maximum(ay - arm, ax - radius), np.maximum(ax - arm, ay - radius))
    return spans[0], spans[1], np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def quadrant(centre: np.ndarray, *, size: int = SIZE) -> np.ndarray:
    """The index into QUADRANTS of centres (..., 2) in a picture of `size` pixels."""
    return 2 * (centre[..., 0] > size / 2) + (centre[..., 1] > size / 2)


def ask(scenes: Scenes, b: int, rng: np.random.Generator, count: int) -> list[Question]:
    """Draw `count` questions about scene `b`; kinds are drawn evenly among those the scene can answer."""
    n = int(scenes.count[b])
    colours, shapes = scenes.colour[b, :n], scenes.shape[b, :n]
    places = quadrant(scenes.centre[b, :n])
    names = list(COLOURS)
    options: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for s in range(len(SHAPES)):
        if (shapes == s).sum() == 1:
            answer = names[colours[shapes == s][0]]
            options["colour_of"].append(Question(f"what color is the {SHAPES[s]} ?", answer, "colour_of"))
    for c, name in enumerate(names):
        if (colours == c).sum() == 1:
            answer = SHAPES[shapes[colours == c][0]]
            options["shape_of"].append(Question(f"what shape is {name} ?", answer, "shape_of"))
    options["count"].append(Question("how many objects are there ?", NUMBERS[n], "count"))
    for q, where in enumerate(QUADRANTS):
        if (places == q).sum() == 1:
            here = int(np.flatnonzero(places == q)[0])
            options["shape_at"].append(Question(f"what shape is at the {where} ?", SHAPES[shapes[here]], "shape_at"))
            options["colour_at"].append(Question(f"what color is at the {where} ?", names[colours[here]], "colour_at"))
    for o in range(n):
        if ((colours == colours[o]) & (shapes == shapes[o])).sum() == 1:
            text = f"where is the {names[colours[o]]} {SHAPES[shapes[o]]} ?"
            options["where"].append(Question(text, QUADRANTS[places[o]], "where"))
    options["exists"] = existence(colours, shapes, rng)
    kinds = [kind for kind in KINDS if options[kind]]
    questions = []
    for pick in rng.integers(len(kinds), size=count):
        choices = options[kinds[pick]]
        questions.append(choices[rng.integers(len(choices))])
    return questions


def existence(colours: np.ndarray, shapes: np.ndarray, rng: np.random.Generator) -> list[Question]:
    """One true and one false statement; the false one joins a colour and a shape that are both there, where it can."""
    names = list(COLOURS)
    present = {(int(c), int(s)) for c, s in zip(colours, shapes, strict=True)}
    hard = [(int(c), int(s)) for c in set(colours) for s in set(shapes) if (int(c), int(s)) not in present]
    absent = hard or [(c, s) for c in range(len(names)) for s in range(len(SHAPES)) if (c, s) not in present]
    yes = sorted(present)[rng.integers(len(present))]
    no = sorted(absent)[rng.integers(len(absent))]
    return [
        Question(f"is there a {names[c]} {SHAPES[s]} ?", answer, "exists")
        for (c, s), answer in ((yes, "yes"), (no, "no"))
    ]


def words() -> list[str]:
    """Every word of every question and answer, in a fixed order."""
    text = "what color is the shape at how many objects are there a where ? yes no top bottom left right"
    return list(dict.fromkeys([*text.split(), *NUMBERS.values(), *COLOURS, *SHAPES]))
