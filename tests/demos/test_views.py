"""HTML of the page: escaped throughout, and honest about what was measured when."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from demos import views
from demos.wishes import Progress, Result, Variant
from mmeff.report import Plan

NASTY = "<script>alert(1)</script>\"' onload='x"


def result(*, earlier=None, speedup=0.8, kind="video", **fields):
    dense = Variant(
        name="dense", seconds=2.0, steps=20, dense_steps=20, earlier=earlier, files={"media": "runs/a/dense.mp4"}
    )
    other = Variant(
        name=NASTY, seconds=2.0 / speedup, steps=20, dense_steps=5, speedup=speedup, predicted=1.07, density=0.48, psnr=32.6,
        corrected_psnr=33.3, ssim=0.967, files={"media": "runs/a/x.mp4", "config": "runs/a/x-config.yaml"}, remarks=(NASTY,),
        report=NASTY,
    )  # fmt: skip
    given = {
        "run": SimpleNamespace(name="a"), "model": NASTY, "kind": kind, "note": NASTY, "prompt": NASTY, "seed": 3, "settings": {},
        "variants": (dense, other), "plans": {}, "reports": {}, "frames": 17, "size": (48, 48), "fps": 8.0,
        "environment": {"cpu": NASTY, "threads": "1", "torch": "2"}, **fields,
    }  # fmt: skip
    return Result(**given)


def plan(**fields):
    return Plan(
        **{"method": {"method": "m"}, "model": NASTY, "host": "h", "rows": (("note", NASTY), (NASTY, NASTY)), **fields}
    )


def spec(shown):
    """What the player is told."""
    return json.loads(unescape(re.search(r'data-spec="([^"]*)"', views.player(shown)).group(1)))


@pytest.mark.parametrize(
    "drawn",
    [
        views.table(result()), views.player(result()), views.banner(NASTY), views.error_box(NASTY), views.hint(NASTY),
        views.stopped(NASTY), views.plans({NASTY: plan(fallbacks=(NASTY,), density=0.5, predicted_speedup=1.1)}),
        views.progress(Progress(stage="running", variant=NASTY)), views.header({"cpu": NASTY}),
    ],
)  # fmt: skip
def test_everything_is_escaped(drawn):
    class Seen(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag != "script" and "onload" not in dict(attributes)

    Seen().feed(drawn)
    assert "&lt;script&gt;" in drawn


def test_the_player_gets_its_words_whole():
    found = spec(result())
    assert (
        found["prompt"] == NASTY
        and found["panels"][1]["name"] == NASTY
        and found["frames"] == 17
        and found["pixelated"]
    )


def test_a_loss_is_shown_as_one_and_a_gain_too():
    assert '<span class="mm-loss">0.80' in views.table(result(speedup=0.8))
    assert '<span class="mm-gain">1.25' in views.table(result(speedup=1.25))
    assert '<span class="">1.00' in views.table(result(speedup=1.001))


def test_a_dense_run_of_another_moment_is_said():
    drawn = views.table(result(earlier=130.0, speedup=1.25))
    assert "2 min ago" in drawn and "for an earlier comparison" in drawn and f"{views.ABOUT}1.25" in drawn
    assert "mm-gain" not in drawn and views.ABOUT not in views.table(result())
    assert spec(result(earlier=1.0))["panels"][1]["line"] == f"2.50 s · {views.ABOUT}0.80{views.TIMES}"


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (60, "1 min"), (7200, "2 h"), (200_000, "2 d")])
def test_how_long_ago(seconds, text):
    assert views.ago(seconds) == text


def test_a_plan_that_finds_nothing_says_so():
    drawn = views.plans({"radial": plan(fallbacks=("nothing would run: too small",))})
    assert "no sparse attention at these sizes" in drawn and 'class="mm-warn">nothing would run' in drawn


@pytest.mark.parametrize(
    ("at", "text", "percent"),
    [
        (Progress(stage="waiting", before=1), "1 run is before yours", 0),
        (Progress(stage="waiting", before=3), "3 runs are before yours", 0),
        (Progress(stage="loading"), "loading the model, only this once", 0),
        (Progress(stage="running", variant="gna", number=2, variants=4, step=5, steps=10), "gna: step 5 of 10", 38),
        (Progress(stage="measuring", variants=4), "comparing with dense", 100),
    ],
)
def test_progress(at, text, percent):
    drawn = views.progress(at)
    assert text in drawn and f'aria-valuenow="{percent}"' in drawn
