"""The manipulation task: deterministic, drawn as it is, ruled as it says, and solved by its expert only by following words."""

from __future__ import annotations

import numpy as np
import pytest

from mmeff.tiny import manipulation as m
from mmeff.tiny import scenes

STAY = len(m.MOVES) // 2
OPEN, CLOSE = 0, 1


def act(x: int = STAY, y: int = STAY, grip: int = OPEN) -> np.ndarray:
    return np.array([[x, y, grip]])


def one(**changes) -> m.State:
    """One environment with objects in a row at y = 20 and rings at y = 80."""
    centre = np.array([[[20.0, 20.0], [20.0, 50.0], [20.0, 80.0], [80.0, 30.0], [80.0, 66.0]]])
    state = {"gripper": np.array([[50.0, 50.0]]), "closed": np.array([False]), "held": np.array([-1]), "centre": centre}
    return m.State(**(state | changes))


def test_an_episode_is_a_function_of_seed_and_number():
    tables, state = m.sample(5, range(4))
    alone, start = m.sample(5, [2])
    for name in ("colour", "shape", "radius", "cloth", "pick", "place"):
        assert np.array_equal(getattr(alone, name)[0], getattr(tables, name)[2])
    assert np.array_equal(start.centre[0], state.centre[2]) and np.array_equal(start.gripper[0], state.gripper[2])
    assert not np.array_equal(m.sample(6, [2])[1].centre, start.centre)
    assert not np.array_equal(state.centre[0], state.centre[1])
    assert len({m.TRAIN_SEED, m.GATE_SEED, m.HELDOUT_SEED, m.AGGREGATE_SEED}) == 4


def test_tables_name_one_object_and_one_ring():
    tables, state = m.sample(7, range(64))
    for b in range(64):
        names = {tables.instruction(b, pick, place) for pick in range(m.OBJECTS) for place in range(m.OBJECTS, m.ITEMS)}
        assert len(names) == m.OBJECTS * m.RINGS
        assert tables.instructions()[b] in names
        apart = np.linalg.norm(state.centre[b, :, None] - state.centre[b, None], axis=-1) + 1e9 * np.eye(m.ITEMS)
        assert (apart > tables.radius[b, :, None] + tables.radius[b, None]).all()
    assert not m.succeeded(tables, state).any()


def test_pictures_show_the_state():
    """Read back from the pixels: colours, places and the gripper, for many states along episodes."""
    tables, start = m.sample(8, range(24))
    states, _ = m.demonstrate(tables, start, np.random.default_rng(0), noise=0.3)
    palette = np.array(list(scenes.COLOURS.values()))
    widths: dict[bool, list[int]] = {True: [], False: []}
    for state in states[::6]:
        images, owner = m.render(tables, state)
        assert images.shape == (24, 96, 96, 3) and images.min() >= 0 and images.max() <= 1
        for b in range(24):
            for item in range(m.ITEMS):
                mask = owner[b] == item
                if mask.sum() < 30:  # under the gripper, another object or the edge
                    continue
                colour = ((images[b][mask].mean(axis=0) - palette) ** 2).sum(axis=1).argmin()
                assert colour == tables.colour[b, item]
                away = np.argwhere(mask) + 0.5 - state.centre[b, item]
                assert np.linalg.norm(away, axis=1).max() < tables.radius[b, item] + 1.5
            mask = owner[b] == m.GRIPPER
            assert images[b][mask].max() < 0.55  # edges are blended
            if 20 < state.gripper[b, 1] < 76:
                columns = np.flatnonzero(mask.any(axis=0)) + 0.5
                assert abs((columns.min() + columns.max()) / 2 - state.gripper[b, 1]) <= 1.0
                widths[bool(state.closed[b])].append(int(columns.max() - columns.min()))
    assert max(widths[True]) < min(widths[False])


def test_rings_are_hollow_and_a_held_object_lies_on_top():
    tables, state = m.sample(9, [0])
    ring, thing = int(tables.place[0]), int(tables.pick[0])
    spot = state.centre[0, ring]
    far = np.array([[8.0, 8.0]]) if spot.min() > 40 else np.array([[88.0, 88.0]])
    empty = m.render(tables, m.State(gripper=far, closed=state.closed, held=state.held, centre=state.centre))[1]
    assert empty[0, int(spot[0]), int(spot[1])] == -1
    centre = state.centre.copy()
    centre[0, thing] = spot
    covered = m.render(tables, m.State(gripper=far, closed=state.closed, held=state.held, centre=centre))[1]
    assert covered[0, int(spot[0]), int(spot[1])] == thing
    assert (covered == ring).sum() > 0.9 * (empty == ring).sum()


def test_moves_and_edges():
    after = m.step(one(), act(x=4, y=1))
    assert after.gripper.tolist() == [[50.0 + m.MOVES[1], 50.0 + m.MOVES[4]]]
    corner = one(gripper=np.array([[9.0, 95.0]]))
    assert m.step(corner, act(x=4, y=0)).gripper.tolist() == [[m.REACH[0], m.REACH[1]]]


def test_grasping():
    beside = one(gripper=np.array([[20.0 + m.GRASP + 0.5, 50.0]]))
    assert m.step(beside, act(grip=CLOSE)).held.tolist() == [-1]
    above = one(gripper=np.array([[20.0 + m.GRASP - 0.5, 50.0]]))
    assert m.step(above, act(grip=OPEN)).held.tolist() == [-1]
    taken = m.step(above, act(grip=CLOSE))
    assert taken.held.tolist() == [1] and taken.closed.all()
    assert np.array_equal(taken.centre[:, 1], taken.gripper)
    carried = m.step(taken, act(x=0, y=4, grip=CLOSE))
    assert np.array_equal(carried.centre[:, 1], carried.gripper) and carried.held.tolist() == [1]
    dropped = m.step(carried, act(x=4, grip=OPEN))
    assert dropped.held.tolist() == [-1] and np.array_equal(dropped.centre[:, 1], dropped.gripper)
    left = m.step(dropped, act(y=4))
    assert np.array_equal(left.centre, dropped.centre)
    assert above.held.tolist() == [-1] and above.centre[0, 1].tolist() == [20.0, 50.0]  # nothing is changed in place


def test_a_ring_cannot_be_taken():
    over = one(gripper=np.array([[80.0, 30.0]]))
    assert m.step(over, act(grip=CLOSE)).held.tolist() == [-1]


def test_success_needs_the_right_object_released_on_the_right_ring():
    tables, _ = m.sample(1, [0])
    pick, place = int(tables.pick[0]), int(tables.place[0])
    other, elsewhere = (pick + 1) % 3, 7 - place
    for thing, ring, off, held, expected in (
        (pick, place, m.GOAL - 0.1, -1, True),
        (pick, place, m.GOAL + 0.1, -1, False),
        (pick, place, 0.0, pick, False),
        (other, place, 0.0, -1, False),
        (pick, elsewhere, 0.0, -1, False),
    ):
        state = one(held=np.array([held]))
        state.centre[0, thing] = state.centre[0, ring] + [off, 0]
        assert m.succeeded(tables, state).tolist() == [expected]


def test_expert_succeeds_and_recovers_from_noise():
    tables, start = m.sample(m.GATE_SEED, range(200))
    _, length = m.demonstrate(tables, start, np.random.default_rng(0))
    assert length.max() < m.HORIZON and 12 < length.mean() < 25
    _, length = m.demonstrate(tables, start, np.random.default_rng(0), noise=0.3, horizon=3 * m.HORIZON)
    assert length.max() < 3 * m.HORIZON


def test_expert_lets_go_of_a_wrong_object():
    state = one(gripper=np.array([[20.0, 20.0]]), held=np.array([0]), closed=np.array([True]))
    action = m.expert(state, np.array([2]), np.array([3]))
    assert action.tolist() == [[4, STAY, OPEN]]


def test_following_other_words_fails():
    tables, start = m.sample(10, range(48))
    wrong = m.Tables(**(vars(tables) | {"pick": (tables.pick + 1) % 3}))
    states, length = m.demonstrate(wrong, start, np.random.default_rng(0))
    assert length.max() < m.HORIZON
    assert not any(m.succeeded(tables, state).any() for state in states)


def test_rollout_rests_finished_episodes_and_counts_steps():
    tables, start = m.sample(11, range(6))
    seen: list[tuple[int, list[str]]] = []
    now = [start]

    def policy(images: np.ndarray, instructions: list[str]) -> np.ndarray:
        seen.append((len(images), instructions))
        assert np.array_equal(images, m.render(tables, now[0])[0])
        action = m.expert(now[0], tables.pick, tables.place)
        now[0] = now[0].where(m.succeeded(tables, now[0]), m.step(now[0], action))
        return action

    went = m.rollout(policy, tables, start)
    assert went.success.all()
    _, length = m.demonstrate(tables, start, np.random.default_rng(0))
    assert went.steps.tolist() == length.tolist()
    assert len(went.states) == len(seen) == length.max()
    assert went.running.sum(axis=0).tolist() == length.tolist()
    assert all(n == 6 and words == tables.instructions() for n, words in seen)
    last = int(length.argmin())
    assert np.array_equal(went.states[-1].gripper[last], went.states[length.min()].gripper[last])


def test_random_actions_fail():
    tables, start = m.sample(12, range(32))
    draw = np.random.default_rng(0)
    went = m.rollout(lambda images, _: draw.integers([5, 5, 2], size=(len(images), 3)), tables, start)
    assert went.success.mean() < 0.05
    assert (went.steps[~went.success] == m.HORIZON).all()


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("x0 y4 close", (0, 4, 1)),
        ("x2 y2 open", (2, 2, 0)),
        ("", (2, 2, 0)),
        ("y4 x0 close", (2, 2, 1)),
        ("x1", (1, 2, 0)),
    ],
)
def test_action_words(text, action):
    assert m.read_action(text) == action


def test_join():
    (_, a), (_, b) = m.sample(13, [0, 1]), m.sample(13, [2])
    both = m.join(a, b)
    assert np.array_equal(both.centre, m.sample(13, range(3))[1].centre)
    assert np.array_equal(both.take([2]).gripper, b.gripper)
