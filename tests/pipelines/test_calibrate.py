"""Calibration: what is watched is what a pruner would see, fitted methods load, and data is checked before it is used."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import mmeff
from mmeff import tiny
from mmeff.errors import MediaError
from mmeff.evaluation.embedded import sample_questions
from mmeff.pipelines.calibrate import Watcher, calibrate_adaptinfer, calibrate_debiased, generated, listed, watch
from mmeff.pruning import AdaptInfer, DivPrune, FastV
from mmeff.registry import build


@pytest.fixture(scope="module")
def embedded():
    return tiny.vlm()


@pytest.fixture(scope="module")
def samples():
    return [(case["images"], case["question"]) for case in sample_questions()]


def test_a_watcher_sees_the_attention_of_every_layer_and_changes_nothing(samples):
    model, processor = tiny.vlm(attention="eager")
    seen = {}

    def see(view):
        seen[view.point.layer] = view.received("text", where="next").mean(1) / view.text.sum(1, keepdim=True)

    assert watch(model, processor, samples[:1], Watcher.showing(see), batch=1, tick=lambda done: None) == 1
    pictures, question = samples[0]
    inputs = processor(text=[f"<image>{question}"], images=pictures, return_tensors="pt")
    with torch.inference_mode():
        maps = model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"][0] == model.config.image_token_id
    last = int(visual.nonzero()[-1])
    assert sorted(seen) == list(range(6))
    for layer, attention in enumerate(maps):
        expected = attention[0].mean(0)[last + 1 :][:, visual].mean(0)
        torch.testing.assert_close(seen[layer][0], expected, atol=1e-6, rtol=1e-4)


def test_batches_do_not_matter(embedded, samples):
    model, processor = embedded
    one, three = (
        calibrate_adaptinfer(model, processor, samples, budget=0.7, batch=batch).figures["text on picture"]
        for batch in (1, 3)
    )
    assert one == pytest.approx(three, rel=1e-3) and len(one) == 6


def test_a_fitted_adaptinfer_loads_and_meets_its_budget(embedded, tmp_path):
    model, processor = embedded
    ticks = []
    found = calibrate_adaptinfer(model, processor, generated("tiny-vlm", 12), budget=0.7, batch=5, tick=ticks.append)
    assert found.samples == 12 and ticks == [5, 10, 12]
    found.method.to_yaml(tmp_path / "a.yaml")
    method = build(tmp_path / "a.yaml")
    assert isinstance(method, AdaptInfer) and method == found.method
    assert [p.layer - 1 for p in method.points(6)] == found.figures["changes at layers"]
    assert mmeff.plan(model, method).density == pytest.approx(0.7, abs=0.01)


def test_a_fitted_debiased_takes_out_the_trend_of_its_scores(embedded):
    model, processor = embedded
    samples, inner, scores = list(generated("tiny-vlm", 12)), FastV(layer=2), []
    found = calibrate_debiased(model, processor, samples, inner, batch=4, padding=0.3)
    watch(
        model, processor, samples, Watcher.showing(lambda view: scores.append(inner.score(view)), inner), batch=4,
        tick=lambda done: None,
    )  # fmt: skip
    mean = torch.cat(scores).double().mean(0).log().numpy()
    assert found.method.rate == pytest.approx(np.polyfit(np.arange(144), mean, 1)[0], rel=1e-6)
    assert found.method.padding == 0.3 and found.method.inner == inner


def test_what_cannot_be_fitted(embedded, samples):
    model, processor = embedded
    with pytest.raises(ValueError, match="calibration needs samples, got none"):
        calibrate_adaptinfer(model, processor, [], budget=0.5)
    with pytest.raises(ValueError, match=r"Debiased\.inner must be a method that ranks tokens"):
        calibrate_debiased(model, processor, samples, DivPrune())
    with pytest.raises(ValueError, match="same visual tokens"):
        calibrate_adaptinfer(
            model, processor, [samples[0], (samples[0][0] * 2, samples[0][1])], budget=0.5, batch=1
        )  # fmt: skip


def test_generated_questions_are_fresh_and_stop_where_they_should():
    found = list(generated("tiny-vlm", 66))
    assert len(found) == 66 and len({question for _, question in found}) > 20
    clip, question = next(iter(generated("tiny-video-vlm", 1)))
    assert len(clip) == 8 and question.startswith("frame1 <image>")


def test_listed_questions(tmp_path):
    sample_questions()[0]["images"][0].save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "what ?"}, {"image": ["a.png", "a.png"], "question": "how ?"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = listed(tmp_path)
    assert [(len(pictures), question) for pictures, question in found] == [(1, "what ?"), (2, "how ?")]
    assert len(listed(tmp_path / "questions.jsonl", 1)) == 1


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"image": "a.png"}', ValueError, "line 1, must be .*KeyError: 'question'"),
        ('{"image": [], "question": "a"}', ValueError, "an image and a question"),
        ("no json", ValueError, "line 1, must be"),
        ('{"image": "b.png", "question": "a"}', FileNotFoundError, r"names .*b\.png, which does not exist"),
    ],
)
def test_wrong_lists(tmp_path, line, error, message):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(error, match=message):
        listed(tmp_path / "q.jsonl")


def test_files_that_are_no_pictures_are_found_when_they_are_read(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "a"}')
    with pytest.raises(MediaError, match=r"a\.png"):
        list(listed(tmp_path / "q.jsonl"))
    with pytest.raises(FileNotFoundError, match="no questions at"):
        listed(tmp_path / "none")
