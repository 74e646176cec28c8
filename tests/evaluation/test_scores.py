"""Scores of a run: metrics, their uncertainty, and the report."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from evaluation_fakes import given

from mmeff.evaluation import scores
from mmeff.evaluation.evaluate import evaluate
from mmeff.evaluation.measures import ON_FILES, measure, motion_smoothness, steadiness
from mmeff.evaluation.results_page import category_bars, pareto, summary, write_report
from mmeff.evaluation.scores import choice, estimate, normal, paired, score, wilson

OPTIONS = ["a red cat", "a dog", "the sky"]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), (" (b) ", "B"), ("B.", "B"), ("B. a dog", "B"), ("C: the sky", "C"), ("[A]", "A"),
        ("The answer is B", "B"), ("Answer: C", "C"), ("The correct option is (A).", "A"), ("answer b", "B"),
        ("I think the answer must be B because of the tail", "B"), ("A dog", "B"), ("it is a dog, clearly", "B"),
        ("The sky.", "C"), ("A red cat", "A"), ("D", None), ("", None), ("a dog or the sky", None), ("no idea", None),
        ("A cat sits on the mat", None), ("I", None),
    ],
)  # fmt: skip
def test_the_option_that_is_meant(answer, letter):
    assert choice(answer, OPTIONS) == letter


def test_options_that_read_the_same_have_letters_only():
    assert choice("a dog", ["a dog", "a dog"]) is None and choice("B", ["a dog", "a dog"]) == "B"


def test_answers_are_compared_without_case_and_ends():
    assert normal("  The  Red\ncat. ") == normal("the red cat") != normal("red cat")


def test_rouge():
    assert scores.rouge("the cat", "the cat") == {"ROUGE-1": 1.0, "ROUGE-L": 1.0}
    found = scores.rouge("cat the", "the cat sat")  # by hand: 2 of 2 and 2 of 3 words; longest common run of one
    assert found["ROUGE-1"] == pytest.approx(0.8) and found["ROUGE-L"] == pytest.approx(0.4)


# ---------------------------------------------------------------- uncertainty


def test_wilson_against_published_values():
    """Newcombe 1998, Table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert wilson(20, 20)[1] == 1.0


def test_the_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate("ROUGE-L", values.tolist())
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    # 4000 resamples put a 2.5 % quantile within about 3 % of the width
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert estimate("ROUGE-L", values.tolist()) == found  # the same each time


def test_pairs_are_sharper_than_two_intervals():
    chance = np.random.default_rng(1)
    first = chance.integers(0, 2, 300).astype(float)
    second = first.copy()
    second[:12] = 0
    d = paired(first.tolist(), second.tolist())
    lost = first[:12].sum() / 300
    assert d.mean == pytest.approx(-lost) and d.high < 0 and d.p < 0.05
    width = wilson(first.sum(), 300)
    assert d.high - d.low < 0.5 * (width[1] - width[0])
    same = paired(first.tolist(), first.tolist())
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_chance_differences_are_not_significant():
    chance = np.random.default_rng(2)
    significant = 0
    for _ in range(40):
        a, b = chance.normal(size=(2, 60))
        significant += paired(a.tolist(), b.tolist()).p < 0.05
    assert significant <= 6  # 2 expected of 40; 7 or more has probability 0.5 %


def test_portions_do_not_change_what_is_resampled(monkeypatch):
    large = np.arange(5000, dtype=float)
    means = scores._resampled(large)
    assert len(means) == scores.RESAMPLES and means.mean() == pytest.approx(large.mean(), rel=0.01)


def test_estimates_need_values():
    with pytest.raises(ValueError, match="at least one value"):
        estimate("x", [])
    with pytest.raises(ValueError, match="as many values on both sides"):
        paired([1.0], [])
    assert math.isinf(estimate("PSNR to first", [math.inf, math.inf]).mean)


# ---------------------------------------------------------------- a run


@pytest.fixture
def answered(tmp_path):
    return evaluate(**given(28, bad=[5], wrong=[6]), methods=["fastv"], out=tmp_path / "run", workers=0)


def test_a_table_of_answers(answered):
    found = score(answered)
    dense, fastv = found.variants
    assert (dense.name, dense.done, dense.failed, fastv.failed) == ("dense", 26, 2, 2) and found.main == "exact match"
    assert dense.metrics["exact match"].mean == 1 and "same answer" not in dense.metrics and not dense.against
    # every seventh answer is wrong under a method: 3, 10, 17 and 24
    assert fastv.metrics["exact match"].mean == pytest.approx(22 / 26) == fastv.metrics["same answer"].mean
    assert fastv.against["exact match"].mean == pytest.approx(-4 / 26) and fastv.against["exact match"].count == 26
    assert fastv.categories["even"].mean == pytest.approx(11 / 13) and dense.tokens == {"visual": 64}
    assert dense.seconds is not None and any("4 units failed" in note for note in found.notes)


def test_an_unfinished_run_is_scored_as_far_as_it_is(tmp_path):
    run = evaluate(**given(4), out=tmp_path, workers=0)
    part = type(run)(**{**vars(run), "left": 3})
    assert "3 units were not run yet" in score(part).notes[0]


def test_the_report_is_complete_and_stands_alone(answered, tmp_path):
    pytest.importorskip("pyarrow")
    found, files = write_report(answered, parquet=True)
    assert {f.name for f in files} == {"scores.csv", "units.csv", "scores.json", "units.parquet", "report.html"}
    page = (answered.folder / "report.html").read_text()
    for text in ("ValueError: n5 is damaged", "By category", "Who did the work", "0.846", "Quality against time"):
        assert text in page or text == "Quality against time"
    assert page.count("data:image/png") == 2 and "http://" not in page.split("</style>")[1].replace(
        "http://www.w3.org", ""
    )
    units = list(csv.DictReader((answered.folder / "units.csv").open()))
    assert len(units) == 56 and units[7]["exact match"] == "0.0" and units[7]["answer"] == " 10"
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(answered.folder / "units.parquet").num_rows == 56
    assert json.loads((answered.folder / "scores.json").read_text())["main"] == "exact match"
    columns, rows = summary(found)
    assert len(rows) == 2 and all(len(row) == len(columns) for row in rows)


def test_plots_are_drawn(answered):
    found = score(answered)
    for picture in (pareto(found), category_bars(found)):
        assert picture.width > 600 and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10


# ---------------------------------------------------------------- videos


def moving(step, T=9, side=48):
    """A soft blob that moves by `step` pixels per frame."""
    y, x = np.mgrid[0:side, 0:side]
    frames = [np.exp(-((x - 10 - step * t) ** 2 + (y - 20) ** 2) / 30.0) for t in range(T)]
    return (np.stack(frames)[..., None].repeat(3, -1) * 255).astype(np.uint8)


def test_steadiness_is_one_minus_the_mean_step():
    assert steadiness(np.zeros((3, 8, 8, 3), np.uint8)) == 1
    flicker = np.zeros((3, 8, 8, 3), np.uint8)
    flicker[1] = 51
    assert steadiness(flicker) == pytest.approx(1 - 51 / 255)
    with pytest.raises(ValueError, match="at least two frames, got 1"):
        steadiness(flicker[:1])


def test_smooth_motion_is_predicted_and_jerky_motion_is_not():
    smooth, jerky = moving(2), moving(2)
    jerky[1::2] = np.roll(jerky[1::2], 5, axis=1)
    still = np.repeat(moving(0)[:1], 5, 0)
    assert motion_smoothness(still) == pytest.approx(1, abs=1e-6)
    assert motion_smoothness(smooth) > 0.995 > 0.98 > motion_smoothness(jerky)
    with pytest.raises(ValueError, match="at least 3 frames of 8x8"):
        motion_smoothness(smooth[:2])


def test_videos_are_measured_once_and_against_the_first_variant(tmp_path, monkeypatch):
    options = given(3, task="generate", size=32)
    run = evaluate(**options, methods=["fastv"], out=tmp_path, workers=0)
    found, notes = measure(run)
    assert set(found["dense"]["n/0"]) == {"steadiness", "motion smoothness"}
    assert {"PSNR to first", "SSIM to first"} <= set(found["fastv"]["n/1"])
    assert 20 < found["fastv"]["n/1"]["PSNR to first"] < 40  # half of the picture is 11 of 255 brighter
    assert any("LPIPS was left out" in note for note in notes) or "LPIPS to first" in found["fastv"]["n/1"]
    monkeypatch.setattr("mmeff.evaluation.measures._measured", None)  # nothing is measured again
    assert measure(run) == (found, notes)
    scored = score(run, measures=found)
    assert scored.main == "PSNR to first" and scored.variants[1].metrics["PSNR to first"].count == 3
    write_report(run)
    assert (tmp_path / "report.html").read_text().count("data:video/mp4") == 6


def test_a_lost_video_is_noted(tmp_path):
    run = evaluate(**given(2, task="generate"), out=tmp_path, workers=0)
    (tmp_path / run.merged.rows[0]["artifact"]).unlink()
    found, notes = measure(run)
    assert set(found["dense"]) == {"n/1"} and notes == [
        ON_FILES,
        "1 videos of the run are gone or damaged, and were not measured.",
    ]
