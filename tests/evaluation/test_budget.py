"""One budget for all methods of a comparison: whose it is, what it does to each, and what cannot reach it."""

from __future__ import annotations

import pytest

import mmeff
from mmeff import tiny
from mmeff.diffusion_attn import Radial
from mmeff.evaluation.budget import equal_budgets, layer_mean
from mmeff.evaluation.embedded import sample_questions
from mmeff.pruning import AdaptInfer, DivPrune, FastV


@pytest.fixture(scope="module")
def embedded():
    return tiny.vlm()


def test_the_first_method_sets_the_budget_of_the_others(embedded):
    model, processor = embedded
    given = [FastV(layer=2, keep=0.25), DivPrune(), AdaptInfer()]
    found = mmeff.compare(model, given, sample_questions()[:1], processor=processor, repeats=1, new_tokens=3)
    variants = found.measured["variants"]
    assert found.remark.startswith("One budget for all methods: visual tokens are 0.5 of all")
    assert "that of fastv as given" in found.remark and found.remark in str(found)
    assert found.to_dict()["remark"] == found.remark
    assert found.reports["fastv"].method == FastV(layer=2, keep=0.25).to_dict()
    for name in ("fastv", "divprune", "adaptinfer"):
        assert variants[name]["tokens"]["mean over layers"] == pytest.approx(72, abs=0.5)
    row = dict(zip(found.columns, found.rows[2], strict=True))
    assert (row["variant"], row["tokens at last"], row["mean over layers"]) == ("divprune", 72.0, 72.0)
    assert float(row["prefill operations"]) < 0.6
    dense = dict(zip(found.columns, found.rows[0], strict=True))
    assert (dense["tokens at last"], dense["prefill operations"]) == (144.0, "1.000")
    assert row["cache KiB"] < 0.6 * dense["cache KiB"]


def test_native_and_several_settings_of_one_method_stay(embedded):
    model, _ = embedded
    mixed = [FastV(keep=0.25), DivPrune()]
    assert equal_budgets(model, mixed, sample_questions(), "native")[0] == mixed
    settings = [FastV(keep=0.25), FastV(keep=0.5)]
    kept, words = equal_budgets(model, settings, sample_questions(), None)
    assert kept == settings and "its own setting" in words
    assert equal_budgets(model, [DivPrune()], sample_questions(), None) == ([DivPrune()], "")


def test_a_budget_sets_one_method_too(embedded):
    model, _ = embedded
    ([method], words) = equal_budgets(model, [FastV()], sample_questions(), 0.5)
    assert layer_mean(model, method, sample_questions()) == pytest.approx(0.5) and "as asked for" in words


def test_the_mean_of_settings_in_tokens_needs_the_pictures(embedded):
    model, _ = embedded
    (one, *_) = sample_questions()
    method = FastV(layer=2, keep=36)
    assert layer_mean(model, method, one) == pytest.approx((2 + 4 * 36 / 144) / 6)
    two = {**one, "images": one["images"] * 2}
    assert layer_mean(model, method, [two]) == pytest.approx((2 + 4 * 36 / 288) / 6)


@pytest.mark.parametrize(
    ("methods", "budget", "message"),
    [
        ([DivPrune(), FastV()], 0.25, r"FastV prunes first before layer 2 of 6.* at least 0\.3333 of all"),
        ([DivPrune(keep=0.2), FastV()], None, r"FastV prunes first before layer 2 of 6"),
        ([DivPrune()], 1.5, r"must be a fraction of the visual tokens in \(0, 1\], got 1\.5"),
        ([DivPrune()], "all", r"or \"native\", got 'all'"),
        ([FastV(keep=0.5), FastV(keep=0.25)], 0.5, "two settings of fastv are the same"),
    ],
)
def test_mistakes_come_before_anything_runs(embedded, tmp_path, methods, budget, message):
    model, processor = embedded
    with pytest.raises(ValueError, match=message):
        mmeff.compare(
            model, methods, sample_questions(), processor=processor, budget=budget, out=tmp_path / "r", repeats=1
        )
    assert not (tmp_path / "r" / "report.html").exists()


def test_sparse_attention_has_no_budget():
    with pytest.raises(ValueError, match=r"which radial does not drop; leave budget=0\.5 out"):
        mmeff.compare(tiny.video_pipeline(), Radial(), "a red square", budget=0.5)
