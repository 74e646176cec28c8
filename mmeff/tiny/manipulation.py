"""A small manipulation task, seen from above: "put the red square on the blue ring".

A table holds three objects (a colour and a shape each, no two alike), two rings of different colours, and a gripper. An
action is three tokens: a step along x, a step along y, and the gripper's command:

    x0 .. x4, y0 .. y4    -5, -2, 0, 2, 5 pixels        open, close

The gripper moves, a held object with it; then it obeys the command. Closing takes the nearest object within GRASP pixels,
opening lets go. An episode succeeds once the named object lies, released, within GOAL pixels of the named ring's centre.

A table is a pure function of (seed, episode); a split is a seed. Everything works on B episodes at once; positions are
(y, x) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mmeff.tiny import scenes

SIZE = scenes.SIZE
MOVES = (-5.0, -2.0, 0.0, 2.0, 5.0)  # pixels of the five bins of an axis
GRIPS = ("open", "close")
X_WORDS, Y_WORDS = (tuple(f"{axis}{i}" for i in range(len(MOVES))) for axis in "xy")
OBJECTS, RINGS = 3, 2
ITEMS = OBJECTS + RINGS  # objects first
RADIUS = (7.0, 8.5)
RING_RADIUS, RING_WIDTH = 12.0, 3.0
GRASP, GOAL = 9.0, 9.0
NEAR = 4.0  # pixels per axis within which the expert gives the gripper's command together with its last small step
REACH = (8.0, SIZE - 8.0)  # where the gripper can be
HORIZON = 40  # control steps of an episode
GRIPPER = ITEMS  # the gripper's number in `owner`
TRAIN_SEED, GATE_SEED, HELDOUT_SEED, AGGREGATE_SEED = 21_000, 22_000, 23_000, 24_000

Policy = Callable[[np.ndarray, list[str]], np.ndarray]  # images (B, 96, 96, 3), instructions -> actions (B, 3)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What does not change during B episodes.

    colour, shape, radius: (B, 5), the shape of a ring is 4; cloth: (B, 96, 96, 3) float32, the empty table; pick: (B,) the
    object to carry, place: (B,) the item number of the ring to put it on.
    """

    colour: np.ndarray
    shape: np.ndarray
    radius: np.ndarray
    cloth: np.ndarray
    pick: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.pick)

    def instructions(self) -> list[str]:
        """What each episode asks for."""
        return [self.instruction(b, int(self.pick[b]), int(self.place[b])) for b in range(len(self))]

    def instruction(self, b: int, pick: int, place: int) -> str:
        """The sentence that asks to put object `pick` of table `b` on ring `place`."""
        names = list(scenes.COLOURS)
        what = f"{names[self.colour[b, pick]]} {scenes.SHAPES[self.shape[b, pick]]}"
        return f"put the {what} on the {names[self.colour[b, place]]} ring"


@dataclass(frozen=True, kw_only=True)
class State:
    """What changes. gripper: (B, 2); closed: (B,) bool; held: (B,) object in the gripper or -1; centre: (B, 5, 2)."""

    gripper: np.ndarray
    closed: np.ndarray
    held: np.ndarray
    centre: np.ndarray

    def take(self, rows: Any) -> State:
        """The chosen rows."""
        return State(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def where(self, rows: np.ndarray, other: State) -> State:
        """This state in the rows (B,) that are True, and `other` elsewhere."""
        mixed = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            mixed[f.name] = np.where(rows.reshape(-1, *[1] * (mine.ndim - 1)), mine, theirs)
        return State(**mixed)


def sample(seed: int, episodes: Any) -> tuple[Tables, State]:
    """The tables of the numbered episodes of the split `seed`, and how they start."""
    parts = [_sample(np.random.default_rng([seed, int(e)])) for e in episodes]
    columns = {name: np.stack([p[name] for p in parts]) for name in parts[0]}
    moving = {f.name for f in fields(State)}
    return (
        Tables(**{k: v for k, v in columns.items() if k not in moving}),
        State(**{k: v for k, v in columns.items() if k in moving}),
    )


def _sample(rng: np.random.Generator) -> dict[str, Any]:
    kinds = rng.choice(len(scenes.COLOURS) * len(scenes.SHAPES), size=OBJECTS, replace=False)
    rings = rng.choice(len(scenes.COLOURS), size=RINGS, replace=False)
    radius = np.concatenate([rng.uniform(*RADIUS, size=OBJECTS), np.full(RINGS, RING_RADIUS)])
    cloth = scenes.background(rng, 1)
    scenes.clutter(rng, cloth)
    cloth += rng.normal(0, 0.015, size=cloth.shape)
    return {
        "colour": np.concatenate([kinds // len(scenes.SHAPES), rings]),
        "shape": np.concatenate([kinds % len(scenes.SHAPES), np.full(RINGS, len(scenes.SHAPES))]),
        "radius": radius,
        "cloth": np.clip(cloth[0], 0, 1).astype(np.float32),
        "pick": rng.integers(OBJECTS),
        "place": OBJECTS + rng.integers(RINGS),
        "gripper": rng.uniform(*REACH, size=2),
        "closed": np.bool_(False),
        "held": np.int64(-1),
        "centre": _spread(rng, radius),
    }


def _spread(rng: np.random.Generator, radius: np.ndarray) -> np.ndarray:
    """Centres (5, 2) of items that do not touch each other or the edge; large ones are laid first."""
    while True:
        centre = np.zeros((len(radius), 2))
        laid: list[int] = []
        for item in np.argsort(-radius, kind="stable"):
            for _ in range(50):
                spot = rng.uniform(radius[item] + 2, SIZE - radius[item] - 2, size=2)
                if all(np.linalg.norm(centre[o] - spot) > radius[o] + radius[item] + 3 for o in laid):
                    centre[item] = spot
                    laid.append(int(item))
                    break
        if len(laid) == len(radius):
            return centre


def step(state: State, action: np.ndarray) -> State:
    """The state after actions (B, 3): bin of x, bin of y, 1 to close and 0 to open."""
    moves = np.array(MOVES)
    gripper = np.clip(state.gripper + moves[action[:, 1::-1]], *REACH)
    rows = np.arange(len(gripper))
    centre, held = state.centre.copy(), state.held.copy()
    carried = held >= 0
    centre[rows[carried], held[carried]] = gripper[carried]
    closing = action[:, 2] == 1
    distance = np.linalg.norm(centre[:, :OBJECTS] - gripper[:, None], axis=-1)
    nearest = distance.argmin(axis=1)
    takes = closing & ~carried & (distance[rows, nearest] <= GRASP)
    held[takes] = nearest[takes]
    centre[rows[takes], nearest[takes]] = gripper[takes]
    held[~closing] = -1
    return State(gripper=gripper, closed=closing, held=held, centre=centre)


def succeeded(tables: Tables, state: State) -> np.ndarray:
    """Whether (B,) the named object lies released on the named ring."""
    rows = np.arange(len(tables))
    apart = np.linalg.norm(state.centre[rows, tables.pick] - state.centre[rows, tables.place], axis=-1)
    return (apart <= GOAL) & (state.held != tables.pick)


def expert(state: State, pick: np.ndarray, place: np.ndarray) -> np.ndarray:
    """What the scripted expert does: actions (B, 3) that carry object `pick` (B,) to ring `place` (B,).

    It goes to the object and closes, goes to the ring and opens. A wrong object in the gripper is let go.
    """
    rows = np.arange(len(state.held))
    carries = state.held == pick
    offset = state.centre[rows, np.where(carries, place, pick)] - state.gripper
    near = np.abs(offset).max(axis=-1) < NEAR
    bins = np.abs(offset[..., None] - np.array(MOVES)).argmin(axis=-1)
    close = np.where(carries, ~near, near & (state.held < 0))
    return np.stack([bins[:, 1], bins[:, 0], close.astype(np.int64)], axis=1)


def demonstrate(
    tables: Tables, state: State, rng: np.random.Generator, *, noise: float = 0.0, horizon: int = HORIZON
) -> tuple[list[State], np.ndarray]:
    """Let the expert act, every action replaced by a random one with probability `noise`, so that it must recover.

    Returns:
        the states before each step, those of finished episodes at rest, and the number of steps (B,) that each episode took, `horizon` where it did not succeed.
    """
    states, length = [], np.full(len(tables), horizon)
    done = np.zeros(len(tables), dtype=bool)
    for t in range(horizon):
        states.append(state)
        action = expert(state, tables.pick, tables.place)
        stray = np.stack([rng.integers(n, size=len(tables)) for n in (len(MOVES), len(MOVES), 2)], axis=1)
        action = np.where(rng.uniform(size=(len(tables), 1)) < noise, stray, action)
        state = state.where(done, step(state, action))
        now = succeeded(tables, state) & ~done
        length[now] = t + 1
        done |= now
        if done.all():
            break
    return states, length


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How B episodes went. success: (B,) bool; steps: (B,) control steps until success, or the horizon; states: the states
    that the policy saw, one per control step; running: (steps, B) which episodes were still going on then."""

    success: np.ndarray
    steps: np.ndarray
    states: list[State]
    running: np.ndarray


def rollout(policy: Policy, tables: Tables, state: State, *, horizon: int = HORIZON) -> Rollout:
    """Let a policy act in all episodes together. Finished ones stay in the batch, at rest, so that rows keep their place."""
    steps = np.full(len(tables), horizon)
    done = succeeded(tables, state)
    steps[done] = 0
    instructions = tables.instructions()
    states, running = [], []
    for t in range(horizon):
        if done.all():
            break
        states.append(state)
        running.append(~done)
        after = step(state, policy(render(tables, state)[0], instructions))
        state = state.where(done, after)
        now = succeeded(tables, state) & ~done
        steps[now] = t + 1
        done = done | now
    return Rollout(success=done, steps=steps, states=states, running=np.array(running).reshape(-1, len(tables)))


def render(tables: Tables, state: State) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (B, 96, 96, 3) in [0, 1], and the item (B, 96, 96) that owns each pixel, GRIPPER, or -1 for the table."""
    images = tables.cloth.copy()
    owner = np.full(images.shape[:3], -1, dtype=np.int64)
    palette = np.array(list(scenes.COLOURS.values()), dtype=np.float32)
    for b in range(len(tables)):
        held = int(state.held[b])
        order = [*range(OBJECTS, ITEMS), *(o for o in range(OBJECTS) if o != held), *([held] if held >= 0 else [])]
        for item in order:
            if item < OBJECTS:
                window = scenes.coverage(
                    int(tables.shape[b, item]), state.centre[b, item], float(tables.radius[b, item])
                )
            else:
                window = _ring(state.centre[b, item])
            _paint(images[b], owner[b], window, palette[tables.colour[b, item]], item)
        window = _fingers(state.gripper[b], bool(state.closed[b]))
        _paint(images[b], owner[b], window, np.zeros(3, dtype=np.float32), GRIPPER)
    return images, owner


def read_action(text: str) -> tuple[int, int, int]:
    """The action that words such as "x1 y4 close" stand for; what is no action word counts as no move, or as "open"."""
    said = [*text.split(), "", "", ""]
    stay = len(MOVES) // 2
    x = X_WORDS.index(said[0]) if said[0] in X_WORDS else stay
    y = Y_WORDS.index(said[1]) if said[1] in Y_WORDS else stay
    return x, y, int(said[2] == "close")


def join(first: Any, second: Any) -> Any:
    """The rows of two `Tables`, or of two `State`s, one after the other."""
    both = {f.name: np.concatenate([getattr(first, f.name), getattr(second, f.name)]) for f in fields(first)}
    return type(first)(**both)


def _paint(image: np.ndarray, owner: np.ndarray, window: Any, ink: np.ndarray, item: int) -> None:
    rows, columns, cover = window
    image[rows, columns] += (ink - image[rows, columns]) * cover[..., None]
    owner[rows, columns][cover > 0.5] = item


def _near(centre: np.ndarray, reach: int) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """Rows and columns within `reach` pixels of a centre, and their offsets from it."""
    rows, columns = (slice(max(0, int(c) - reach), min(SIZE, int(c) + reach + 1)) for c in centre)
    dy = np.arange(rows.start, rows.stop)[:, None] + 0.5 - centre[0]
    dx = np.arange(columns.start, columns.stop)[None] + 0.5 - centre[1]
    return rows, columns, dy, dx


def _ring(centre: np.ndarray) -> tuple[slice, slice, np.ndarray]:
    rows, columns, dy, dx = _near(centre, int(RING_RADIUS) + 2)
    middle = RING_RADIUS - RING_WIDTH / 2
    distance = np.abs(np.hypot(dy, dx) - middle) - RING_WIDTH / 2
    return rows, columns, np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _fingers(centre: np.ndarray, closed: bool) -> tuple[slice, slice, np.ndarray]:
    """Two upright bars left and right of the gripper's centre, closer together when it is closed, and a bridge above."""
    gap = 9.0 if closed else 12.5
    rows, columns, dy, dx = _near(centre, 16)
    bars = np.maximum(np.abs(np.abs(dx) - gap) - 1.5, np.abs(dy + 2.5) - 7.5)
    bridge = np.maximum(np.abs(dx) - gap, np.abs(dy + 9.0) - 1.5)
    return rows, columns, np.clip(0.5 - np.minimum(bars, bridge), 0, 1).astype(np.float32)


def words() -> list[str]:
    """Every word of instructions and actions that `scenes.words` lacks, in a fixed order."""
    return ["put", "on", "ring", *X_WORDS, *Y_WORDS, *GRIPS]
