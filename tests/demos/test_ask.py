"""The tab Ask: its checks, its page, and real answers of the embedded models."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from demos import tab_ask, views_ask
from demos.app import Page
from demos.asking import Asking, _Kept, curve_name
from demos.models import Models
from demos.queries import Asked, Query, Reply, Step
from demos.results import Results
from demos.runs import Runs
from demos.settings import Settings
from demos.tab_ask import CLIP, PICTURE, Panel, sample
from demos.turns import Turns
from mmeff.errors import MediaError
from mmeff.pipelines import Cancelled
from mmeff.registry import build
from mmeff.report import TokenPlaces
from mmeff.video_io import read

FASTV = build("fastv", keep=0.25)


@pytest.fixture(scope="module")
def asking():
    settings = Settings(models=("tiny-vlm", "tiny-video-vlm"), device="cpu")
    turns, runs = Turns(per_user=2, total=8), Runs(settings.kept_results, settings.kept_results_mb)
    results = Results()
    yield Asking(settings, Models(settings, turns), turns, runs, lambda: results)
    runs.close()


def about_picture(**fields):
    given = {
        "model": "tiny-vlm",
        "question": "what color is the cross ?",
        "image": Image.open(sample("scene-1.jpg")),
        "methods": (FASTV,),
    }
    return Query(**{**given, **fields})


@pytest.fixture(scope="module")
def answered(asking):
    """Everything that a run about a picture yields, and its result."""
    *steps, result = asking.run(about_picture(methods=(FASTV, build("divprune", keep=0.25))), "a visitor")
    return steps, result


# ---------------------------------------------------------------- what is refused before anything runs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "  "}, "the question is empty"),
        ({"question": "x" * 3000}, "at most 2000 characters, got 3000"),
        ({"image": None}, "nothing to look at"),
        ({"video": "clip"}, "take the other one away"),
        ({"image": None, "video": "clip"}, "choose tiny-video-vlm to ask about a clip"),
        ({"methods": ()}, "no method is chosen"),
        ({"methods": (FASTV,) * 4}, "at most 3 methods"),
        ({"new_tokens": 0}, r"whole number in \[1, 256\], got 0"),
        ({"new_tokens": True}, "got True"),
    ],
)
def test_a_query_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        about_picture(**fields).check(Settings())


def test_only_models_that_answer_questions_are_asked(asking):
    with pytest.raises(ValueError, match="one that this demo offers here"):
        next(asking.run(about_picture(model="tiny-video"), "a visitor"))
    with pytest.raises(ValueError, match="one that this demo offers here"):
        asking.plan(about_picture(model="/etc"))


# ---------------------------------------------------------------- real answers


def test_the_plan_counts_what_the_run_keeps(asking, answered):
    plan = asking.plan(about_picture())["fastv"]
    assert dict(plan.rows)["kept"] == "36 from layer 2 on"
    reply = answered[1].replies[1]
    assert (reply.visual, reply.last, reply.mean) == (144, 36, 72)
    assert reply.predicted == pytest.approx(plan.predicted_speedup, rel=0.02)


def test_answers_come_one_after_the_other_and_are_right(answered):
    steps, result = answered
    assert [reply.name for reply in result.replies] == ["dense", "fastv", "divprune"]
    assert {reply.text for reply in result.replies} == {"white"}
    talking = [step.variant for step in steps if step.stage == "answering"]
    assert list(dict.fromkeys(talking)) == ["dense", "fastv", "divprune"] and talking == sorted(
        talking, key=["dense", "fastv", "divprune"].index
    )
    assert any(step.texts.get("dense") == "white" and "fastv" not in step.texts for step in steps), (
        "dense is streamed before"
    )


def test_times_and_memory_are_told_apart(answered):
    dense, fastv, _ = answered[1].replies
    assert dense.selection is None and fastv.selection > 0
    assert fastv.cache_kib < dense.cache_kib and fastv.operations < 1 == dense.operations
    assert fastv.prefill_speedup > 0 and dense.predicted is None
    assert answered[1].rounds >= 1 and "cpu" in answered[1].environment
    plain = answered[1].to_dict()
    assert plain["answers"][1]["last"] == 36 and "tiny model" in plain["note"]


def test_kept_tokens_by_layer(asking, answered):
    run = answered[1].run.name
    seen, early, words = asking.kept(run, "fastv", 1, 0)
    assert words == "144 of 144 tokens" and np.array_equal(early, seen.resize(early.size, 0))
    _, late, words = asking.kept(run, "fastv", 2, 0)
    assert words == "36 of 144 tokens" and np.asarray(late).mean() < np.asarray(early).mean()
    with pytest.raises(ValueError, match="variant must be one of fastv, divprune"):
        asking.kept(run, "dense", 2, 0)
    with pytest.raises(ValueError, match=r"picture must be in \[0, 0\], got 1"):
        asking.kept(run, "fastv", 2, 1)
    with pytest.raises(ValueError, match="not kept any more"):
        asking.kept("../../etc", "fastv", 2, 0)


def test_clips_are_asked_frame_by_frame_and_unknown_words_are_named(asking):
    clip = read(sample("clip-1.mp4"), num_frames=8)
    query = Query(model="tiny-video-vlm", question="which way does the yellow dog move ?", video=clip, methods=(FASTV,))
    *_, result = asking.run(query, "a visitor")
    assert result.unknown == ("dog",) and "“dog”" in views_ask.answers(result)
    assert result.pictures == 8 and len(result.frames) == 8 and result.replies[0].text == "up"
    strip = asking.strip(result.run.name, "fastv", 5)
    left = [int(words.split()[0]) for _, words in strip]
    assert sum(left) == 72 and len(left) == 8
    assert sum(int(words.split()[0]) for _, words in asking.strip(result.run.name, "fastv", 0)) == 288


def test_the_curve_of_the_model_is_known(asking, answered):
    figures, name, tokens = asking.curve(answered[1].run.name, "fastv")
    assert name == "FastV" and tokens == 72 and {"dense", "FastV", "random"} <= {f.method for f in figures}
    service = SimpleNamespace(asking=asking)
    chart = tab_ask.curve(service, answered[1].run.name, "fastv")
    assert "this run: 72 tokens" in chart and "1500 questions" in chart


def test_where_no_curve_is_known_the_page_says_so():
    service = SimpleNamespace(asking=SimpleNamespace(curve=lambda run, variant: ([], "FastV", 72.0)))
    assert "No accuracy curve is known" in tab_ask.curve(service, "run", "fastv")


def test_cancelling_ends_the_answer_and_leaves_the_model_stock(asking):
    run = asking.run(about_picture(), "another")
    for step in run:
        if step.stage == "answering":
            assert asking.turns.cancel("another") == 1
            break
    with pytest.raises(Cancelled):
        list(run)
    assert asking.turns.waiting == 0
    vlm = asking.models.load(asking.models.offer("tiny-vlm"))
    assert vlm.methods == () and vlm.ask("what color is the cross ?", images=sample("scene-1.jpg")).text == "white"


def test_a_reader_that_goes_away_ends_the_run(asking):
    run = asking.run(about_picture(), "gone")
    next(run)
    run.close()
    assert asking.turns.waiting == 0


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (None, "dense"), (FASTV, "FastV"), (build("randompruning"), "random"), (build("randompruning", layer=2), "random, layer 2"),
        (build("sparsevlm"), "SparseVLM"), (build("sparsevlm", version="v2"), "SparseVLM+"), (build("debiased"), "Debiased FastV"),
    ],
)  # fmt: skip
def test_methods_find_their_curve(method, name):
    assert curve_name(method) == name
    assert name in Results().choices("method", topic="pruning-tiny-vlm")


def test_tokens_without_a_place_cannot_be_drawn():
    nowhere = TokenPlaces(np.zeros(4, int), np.full((4, 4), np.nan), np.zeros(4, bool))
    with pytest.raises(ValueError, match="cannot be told"):
        _Kept({0: np.array([1])}, nowhere).overlay([Image.new("RGB", (8, 8))], 0, 0)


def test_of_a_picture_that_is_seen_whole_and_in_tiles_the_tiles_are_drawn():
    boxes = np.array([[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1]], float)
    places = TokenPlaces(np.zeros(3, int), boxes, np.array([False, True, True]))
    image, words = _Kept({0: np.array([0, 2])}, places).overlay([Image.new("RGB", (200, 200), "white")], 0, 0)
    assert words == "1 of 2 tokens"
    assert np.asarray(image)[100, 20].mean() < 120 < np.asarray(image)[100, 180].mean()


def reply(**fields):
    return Reply(
        **{"name": "fastv", "text": "red", "tokens": 2, "prefill": 0.01, "decode": 0.01, "total": 0.02, **fields}
    )


def test_html_of_visitors_and_models_is_escaped():
    run = SimpleNamespace(name="r")
    found = Asked(
        run=run, model="m", note="", question="<img src=x>", replies=(reply(name="dense"), reply(text="<b>", remarks=("<i>",), report="<u>")),
        plans={}, layers=6, pictures=1, stages={}, rounds=3, unknown=("<script>",), environment={"cpu": "c"},
    )  # fmt: skip
    page = (
        views_ask.table(found)
        + views_ask.answers(found)
        + views_ask.talking(["<a>"], Step(stage="answering", texts={"<a>": "<p>"}))
    )
    for raw in ("<img", "<b>fastv</b> <i>", "<u>", "<script>", "<a>", "<p><p>"):
        assert raw not in page
    assert "&lt;script&gt;" in page and "&lt;img src=x&gt;" in page


def test_losses_are_shown_as_losses():
    row = views_ask._row(reply(prefill_speedup=0.8, total_speedup=1.2), dense=False)
    assert 'mm-loss">0.80' in row and 'mm-gain">1.20' in row


# ---------------------------------------------------------------- the page, on a service that answers from a script


class Scripted:
    """Answers as `Asking` does, without any model."""

    def __init__(self, news):
        self.news, self.asked = news, []

    def note(self, model):
        return "tiny"

    def plan(self, query):
        query.check(Settings())
        return {}

    def run(self, query, user):
        self.asked.append((query, user))
        for one in self.news:
            if isinstance(one, Exception):
                raise one
            yield one


def panel_on(asking, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    models = SimpleNamespace(names=lambda *kinds: ["tiny-vlm", "tiny-video-vlm"])
    panel = Panel(SimpleNamespace(models=models, asking=asking), Page(Settings()), ["tiny-vlm", "tiny-video-vlm"])
    with gr.Blocks():
        panel.draw()
        panel.wire()
    return panel


def values(panel, tmp_path, **changed):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    given = {"kind": PICTURE, "image": str(picture), "video": None, "question": "what ?", "model": "tiny-vlm", "chosen": ["fastv"],
             "new_tokens": 4, "frames": 8}  # fmt: skip
    return [*{**given, **changed}.values(), *(value for form in panel.forms for value in form.values())]


REQUEST = SimpleNamespace(session_hash="me")


def test_the_page_shows_the_answers_as_they_grow_then_the_table(tmp_path, monkeypatch):
    result = Asked(run=SimpleNamespace(name="r"), model="tiny-vlm", note="", question="what ?", replies=(reply(name="dense"), reply()), plans={},
                   layers=6, pictures=1, stages={"fastv": (2,)}, rounds=3, environment={"cpu": "c"})  # fmt: skip
    asking = Scripted([Step(stage="answering", variant="dense", texts={"dense": "re"}), result])
    panel = panel_on(asking, tmp_path, monkeypatch)
    first, growing, last = panel.answer(REQUEST, *values(panel, tmp_path))
    assert "waits for its turn" in first[panel.answers]
    assert "<p>re<span" in growing[panel.answers] and "dense is answering" in growing[panel.progress]
    assert (
        "<table" in last[panel.table]
        and last[panel.layer]["value"] == 2
        and last[panel.variant]["choices"] == ["fastv"]
    )
    ((query, user),) = asking.asked
    assert user == "me" and query.methods == (build("fastv"),) and query.image.size == (32, 32)


def test_a_cancelled_run_is_a_line_and_other_errors_are_messages(tmp_path, monkeypatch):
    panel = panel_on(Scripted([Cancelled("cancelled while dense was answering")]), tmp_path, monkeypatch)
    *_, last = panel.answer(REQUEST, *values(panel, tmp_path))
    assert "Stopped: cancelled while dense" in last[panel.progress]
    panel = panel_on(Scripted([ValueError("<b>no</b>")]), tmp_path, monkeypatch)
    with pytest.raises(gr.Error, match="&lt;b&gt;no"):
        list(panel.page.run(panel.answer)(REQUEST, *values(panel, tmp_path)))


def test_files_of_the_server_are_refused(tmp_path, monkeypatch):
    panel = panel_on(Scripted([]), tmp_path, monkeypatch)
    with pytest.raises(MediaError, match="uploaded here"):
        list(panel.answer(REQUEST, *values(panel, tmp_path, image="/etc/passwd")))
    with pytest.raises(ValueError, match=r"frames of a clip must be a whole number in \[1, 32\]"):
        list(panel.answer(REQUEST, *values(panel, tmp_path, frames=1000)))
    assert "nothing to look at" in panel.look_ahead(*values(panel, tmp_path, image=None))


def test_changing_to_a_clip_changes_model_and_question(tmp_path, monkeypatch):
    panel = panel_on(Scripted([]), tmp_path, monkeypatch)
    image, video, _, _, model, question = panel.swap(CLIP)
    assert (image["visible"], video["visible"], model) == (False, True, "tiny-video-vlm") and "move" in question
