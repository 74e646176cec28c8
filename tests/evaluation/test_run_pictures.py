"""Pictures of an accelerated run beside its dense one."""

from __future__ import annotations

import numpy as np
import pytest

from mmeff.evaluation import run_pictures
from mmeff.evaluation.run_pictures import LEAST, difference, difference_map, difference_video, scale_of, schedule_map
from mmeff.report import Report


@pytest.fixture
def pair():
    dense = np.full((3, 24, 32, 3), 100, np.uint8)
    other = dense.copy()
    other[1, 4:8, 4:8, 1] = 228
    return dense, other


def test_difference_is_the_largest_channel_whatever_its_sign(pair):
    dense, other = pair
    apart = difference(dense, other)
    assert apart.shape == (3, 24, 32) and apart.dtype == np.float32
    assert apart[1, 5, 5] == pytest.approx(128 / 255) and apart.sum() == pytest.approx(16 * 128 / 255)
    assert np.array_equal(apart, difference(other, dense))
    assert np.allclose(difference(dense / 255.0, other / 255.0), apart)
    with pytest.raises(ValueError, match="one shape"):
        difference(dense, other[:2])


def test_heat_is_black_where_equal_and_brightest_where_they_differ_most(pair):
    heat = difference_video(*pair)
    assert heat.shape == (3, 24, 32, 3) and heat.dtype == np.uint8
    light = heat.astype(int).sum(-1)
    assert light[0].max() <= 8 and light[1, 5, 5] == light.max() > 500


def test_the_scale_does_not_blow_up_rounding():
    assert scale_of(np.zeros((1, 2, 2))) == LEAST
    assert scale_of(np.full((1, 2, 2), 1 / 255)) == LEAST and scale_of(np.full((1, 2, 2), 0.5)) == 0.5


def test_difference_map_draws_one_frame(pair):
    quiet, loud = (np.asarray(difference_map(*pair, frame=frame)) for frame in (0, 1))
    assert quiet.shape == loud.shape and not np.array_equal(quiet, loud)
    with pytest.raises(ValueError, match=r"frame must be in \[0, 2\], got 3"):
        difference_map(*pair, frame=3)


def report(layers, steps):
    return Report(method={"method": "radial"}, model="m", host="h", layers=layers, steps=steps)


@pytest.fixture
def drawn(monkeypatch):
    """The values and the subtitle that a map was drawn from."""
    seen = {}
    original = run_pictures.chart

    class Watched:
        def __init__(self, *size):
            self.inner = original(*size)

        def __enter__(self):
            figure, axes = self.inner.__enter__()
            draw = axes.imshow
            axes.imshow = lambda values, **options: (seen.update(values=values), draw(values, **options))[1]
            return figure, axes

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    monkeypatch.setattr(run_pictures, "chart", Watched)
    monkeypatch.setattr(
        run_pictures, "titles", lambda axes, title, subtitle: seen.update(title=title, subtitle=subtitle)
    )
    return seen


def test_schedule_map_of_dense_layers_and_dense_steps(drawn):
    sparse = {"dense": 2, "sparse": 6, "density": 0.25}
    layers = {0: {"dense": 8}, 1: sparse, 2: {**sparse, "density": 0.5}}
    steps = {0: {"dense": 6}, **{step: {"dense": 2, "sparse": 4} for step in (1, 2, 3)}}
    schedule_map(report(layers, steps))
    want = np.ones((3, 4))
    want[1, 1:], want[2, 1:] = 0.25, 0.5
    assert np.allclose(drawn["values"], want)
    assert drawn["subtitle"] == "1 of 4 steps dense; where sparse, 37.5% of the pairs"


def test_schedule_map_says_where_it_estimates(drawn):
    layers = {0: {"dense": 1, "sparse": 3, "density": 0.5}, 1: {"sparse": 4, "density": 0.5}}
    schedule_map(report(layers, {0: {"dense": 1, "sparse": 1}, 1: {"sparse": 2}, 2: {"sparse": 2}, 3: {"sparse": 2}}))
    assert drawn["subtitle"].endswith("mixed cells are estimated")


def test_schedule_map_needs_steps():
    with pytest.raises(ValueError, match="needs the report of a run with denoising steps"):
        schedule_map(report({0: {"sparse": 1}}, {}))
