"""Generated clips with one to three moving shapes, and questions with one right answer each.

A clip is eight frames of 48 x 48 pixels: the objects of `scenes`, each still or moving at constant speed in one of four
directions, over a textured background that stays. A batch is a pure function of (seed, index); a split is a seed. Eight
kinds of question, answered in one or two words:

    direction       which way does the red circle move ?       where_first   where is the red circle first ?
    colour_moving   what color is moving left ?                where_last    where is the red circle last ?
    shape_moving    what shape is moving left ?                count         how many objects are there ?
    colour_of       what color is the circle ?                 exists        is there a red circle ?

The answer to `direction`, and what follows `is moving`, is left, right, up, down or still. A question is only asked where
the clip determines the answer. No frame alone tells a direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmeff.tiny import scenes
from mmeff.tiny.scenes import COLOURS, QUADRANTS, SHAPES, Question

SIZE = 48  # pixels, both sides
FRAMES = 8
OBJECTS = 3  # at most
RADIUS = (5.5, 7.0)  # pixels
TRAVEL = (13.0, 26.0)  # pixels between the first and the last frame
CLEAR = 2.5  # pixels that first and last centres keep from the lines between the quadrants
MOTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}
NUMBERS = {1: "one", 2: "two", 3: "three"}
KINDS = ("direction", "colour_moving", "shape_moving", "where_first", "where_last", "colour_of", "count", "exists")
TRAIN_SEED, GATE_SEED, HELDOUT_SEED, PRUNING_SEED = 21_000, 22_000, 23_000, 24_000


@dataclass(frozen=True, kw_only=True)
class Motions:
    """A batch of clips. Objects are padded to three; `count` (B,) says how many are real.

    colour, shape, motion: (B, 3) integers; path: (B, 3, F, 2) centres as (y, x) in pixels; radius: (B, 3);
    owner: (B, F, 48, 48) index of the object that covers a pixel, or -1.
    """

    videos: np.ndarray  # (B, F, 48, 48, 3) float32 in [0, 1]
    count: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    motion: np.ndarray
    path: np.ndarray
    radius: np.ndarray
    owner: np.ndarray

    def __len__(self) -> int:
        return len(self.count)

    def frames(self, which: np.ndarray | None = None) -> scenes.Scenes:
        """Frames as single pictures, clip after clip: all of them, or those that `which` (K,) names."""
        chosen = np.arange(self.videos.shape[1]) if which is None else which

        def each(values: np.ndarray) -> np.ndarray:
            return np.repeat(values, len(chosen), axis=0)

        return scenes.Scenes(
            images=self.videos[:, chosen].reshape(-1, *self.videos.shape[2:]),
            count=each(self.count), colour=each(self.colour), shape=each(self.shape), radius=each(self.radius),
            centre=self.path[:, :, chosen].transpose(0, 2, 1, 3).reshape(-1, OBJECTS, 2),
            owner=self.owner[:, chosen].reshape(-1, *self.owner.shape[2:]),
        )  # fmt: skip


def sample(seed: int, index: int, batch: int, *, most: int = OBJECTS) -> Motions:
    """Render batch `index` of the split `seed`.

    Args:
        batch: clips B. most: objects that a clip may have; one is the start of the curriculum.
    """
    if not 1 <= most <= OBJECTS:
        raise ValueError(f"most must be in [1, {OBJECTS}] objects, got {most}")
    rng = np.random.default_rng([seed, index])
    count = rng.integers(1, most + 1, size=batch)
    colour = rng.integers(len(COLOURS), size=(batch, OBJECTS))
    shape = rng.integers(len(SHAPES), size=(batch, OBJECTS))
    motion = rng.integers(len(MOTIONS), size=(batch, OBJECTS))
    radius = rng.uniform(*RADIUS, size=(batch, OBJECTS)).astype(np.float32)
    path = np.stack([_paths(rng, count[b], radius[b], motion[b]) for b in range(batch)])

    still = scenes.background(rng, batch, size=SIZE)
    scenes.clutter(rng, still)
    shade = scenes.ink(rng, colour)
    videos = np.repeat(still[:, None], FRAMES, axis=1)
    owner = np.full((batch, FRAMES, SIZE, SIZE), -1, dtype=np.int64)
    for b in range(batch):
        for o in range(count[b]):
            for f in range(FRAMES):
                rows, columns, cover = scenes.coverage(shape[b, o], path[b, o, f], radius[b, o], size=SIZE)
                window = videos[b, f, rows, columns]
                window += (shade[b, o] - window) * cover[..., None]
                owner[b, f, rows, columns][cover > 0.5] = o
    videos += 0.015 * rng.standard_normal(size=videos.shape, dtype=np.float32)
    return Motions(
        videos=np.clip(videos, 0, 1), count=count, colour=colour, shape=shape, motion=motion, path=path, radius=radius,
        owner=owner,
    )  # fmt: skip


def _paths(rng: np.random.Generator, count: int, radius: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Centres (3, F, 2) that stay inside, never meet, and begin and end clear of the lines between the quadrants."""
    steps = np.array(list(MOTIONS.values()), dtype=np.float64)[motion]
    phase = np.linspace(0.0, 1.0, FRAMES)[:, None]
    tries = 64
    while True:
        path = np.zeros((OBJECTS, FRAMES, 2))
        for o in range(count):
            low, high = radius[o] + 0.5, SIZE - radius[o] - 0.5
            first = rng.uniform(low, high, size=(tries, 2))
            last = first + steps[o] * rng.uniform(*TRAVEL, size=(tries, 1))
            ends = np.stack([first, last], axis=1)
            good = ((ends > low) & (ends < high) & (np.abs(ends - SIZE / 2) > CLEAR)).all(axis=(1, 2))
            drawn = first[:, None] + phase * (last - first)[:, None]  # (tries, F, 2)
            for p in range(o):
                gap = np.linalg.norm(drawn - path[p], axis=2).min(axis=1)
                good &= gap > radius[o] + radius[p] + 1
            if not good.any():
                break
            path[o] = drawn[good.argmax()]
        else:
            return path.astype(np.float32)


def ask(batch: Motions, b: int, rng: np.random.Generator, count: int) -> list[Question]:
    """Draw `count` questions about clip `b`; kinds are drawn evenly among those the clip can answer."""
    n = int(batch.count[b])
    colours, shapes, motions = batch.colour[b, :n], batch.shape[b, :n], batch.motion[b, :n]
    first, last = (scenes.quadrant(batch.path[b, :n, f], size=SIZE) for f in (0, -1))
    names, ways = list(COLOURS), list(MOTIONS)
    options: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for o in range(n):
        if ((colours == colours[o]) & (shapes == shapes[o])).sum() > 1:
            continue
        name = f"{names[colours[o]]} {SHAPES[shapes[o]]}"
        options["direction"].append(Question(f"which way does the {name} move ?", ways[motions[o]], "direction"))
        options["where_first"].append(Question(f"where is the {name} first ?", QUADRANTS[first[o]], "where_first"))
        options["where_last"].append(Question(f"where is the {name} last ?", QUADRANTS[last[o]], "where_last"))
    for m, way in enumerate(ways):
        if (motions == m).sum() == 1:
            o = int(np.flatnonzero(motions == m)[0])
            colour, shape = names[colours[o]], SHAPES[shapes[o]]
            options["colour_moving"].append(Question(f"what color is moving {way} ?", colour, "colour_moving"))
            options["shape_moving"].append(Question(f"what shape is moving {way} ?", shape, "shape_moving"))
    for s, shape in enumerate(SHAPES):
        if (shapes == s).sum() == 1:
            answer = names[colours[shapes == s][0]]
            options["colour_of"].append(Question(f"what color is the {shape} ?", answer, "colour_of"))
    options["count"].append(Question("how many objects are there ?", NUMBERS[n], "count"))
    options["exists"] = scenes.existence(colours, shapes, rng)
    kinds = [kind for kind in KINDS if options[kind]]
    questions = []
    for pick in rng.integers(len(kinds), size=count):
        choices = options[kinds[pick]]
        questions.append(choices[rng.integers(len(choices))])
    return questions


def frame_words(frames: int = FRAMES) -> list[str]:
    """The word in front of every frame's image tokens; it tells the language model when it looks."""
    return [f"frame{i + 1}" for i in range(frames)]


def prompt(question: str, frames: int = FRAMES) -> str:
    """The text of one turn about a clip, with an image mark for every frame; the model's chat template makes the same.

        answer(model, processor, [[picture(frame) for frame in video]], [prompt("which way does the red circle move ?")])

    Args:
        frames: at most 8; the model knows no later frame's word.
    """
    if not 1 <= frames <= FRAMES:
        raise ValueError(f"frames must be in [1, {FRAMES}], got {frames}; sample the video down to {FRAMES} frames")
    return "".join(f"{word} <image> " for word in frame_words(frames)) + question


def words() -> list[str]:
    """Every word of every question, answer and prompt: those of `scenes` first, in their order, so that ids agree."""
    text = "one first last which way does move moving still up down"
    return list(dict.fromkeys([*scenes.words(), *text.split(), *frame_words()]))
