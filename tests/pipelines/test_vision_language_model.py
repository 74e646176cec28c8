"""VisionLanguageModel: the stock model's own answers, batches, videos, streams, conversations, and errors before any work."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from mmeff import tiny
from mmeff.errors import MediaError, NothingAccelerated, UnknownMethod, UnsupportedModel
from mmeff.evaluation.questions import answer
from mmeff.pipelines import Cancelled, VisionLanguageModel
from mmeff.pruning import FastV
from mmeff.video_io import read
from tests.pipelines import small_processors
from tests.pruning.small_llava_onevision import SmallLlavaOnevision
from tests.pruning.small_qwen_vl import SmallQwen

SAMPLES = tiny.data_folder() / "samples"
CROSS, CIRCLE, MANY = (SAMPLES / name for name in ("scene-1.jpg", "scene-2.png", "scene-3.png"))
CLIP, OTHER_CLIP = SAMPLES / "clip-1.mp4", SAMPLES / "clip-2.mp4"
COLOR, WHERE, COUNT = "what color is the cross ?", "where is the yellow circle ?", "how many objects are there ?"
ON = {"suppress_tokens": [2], "new_tokens": 12}  # without its end token the model talks on


@pytest.fixture(scope="module")
def loaded():
    return tiny.vlm()


@pytest.fixture
def vlm(loaded):
    with VisionLanguageModel(loaded[0], processor=loaded[1]) as wrapper:
        yield wrapper


@pytest.fixture
def pruned(loaded):
    with VisionLanguageModel(loaded[0], FastV(keep=0.5), processor=loaded[1]) as wrapper:
        yield wrapper


@pytest.fixture(scope="module")
def qwen():
    return SmallQwen("qwen2_5_vl").model(), small_processors.qwen()


# ---------------------------------------------------------------- answers


def test_answers_are_the_stock_models(loaded, vlm):
    rows, questions = [[CROSS], [CIRCLE], [MANY]], [COLOR, WHERE, COUNT]
    stock = answer(*loaded, [[Image.open(p).convert("RGB") for p in row] for row in rows], questions, new_tokens=8)
    said = vlm.ask(questions, images=rows, new_tokens=8)
    assert [a.text for a in said] == stock and stock[0] == "white"
    assert [
        a.text for a in (vlm.ask(q, images=r[0], new_tokens=8) for q, r in zip(questions, rows, strict=True))
    ] == stock
    assert [a.tokens for a in said] == [2, 3, 2], "words and the end"
    assert [a.prompt_tokens for a in said] == [1 + 144 + len(q.split()) for q in questions], "pads are no tokens"


def test_what_is_measured(pruned):
    said = pruned.ask([COLOR, COUNT], images=[CROSS, MANY], new_tokens=4)
    assert {a.batch for a in said} == {2}
    seconds = said[0].seconds
    assert min(seconds.values()) > 0
    assert seconds["preparation"] + seconds["prefill"] + seconds["decode"] <= seconds["total"]
    assert pruned.ask(COLOR, images=CROSS, new_tokens=1).seconds["decode"] < seconds["prefill"]
    assert said[0].reports[0].tokens["kept from layer 2 on"] == 72
    json.dumps(said[0].to_dict())
    assert str(said[0]) == "white"


def test_methods_act_and_are_off_for_a_dense_call_and_gone_afterwards(loaded):
    model, processor = loaded
    with VisionLanguageModel(model, "fastv", processor=processor) as vlm:
        assert vlm.model is model and vlm.processor is processor
        assert vlm.ask(COLOR, images=CROSS).reports[0].calls["sparse"] > 0
        assert vlm.ask(COLOR, images=CROSS, dense=True).reports == ()
        vlm.handle.enabled = False
        assert vlm.ask(COLOR, images=CROSS).reports == ()
        vlm.handle.enabled = True
        vlm.use([FastV(keep=0.25)])
        assert vlm.ask(COLOR, images=CROSS).reports[0].tokens["kept from layer 2 on"] == 36
    with VisionLanguageModel(model, "divprune", processor=processor), pytest.raises(RuntimeError, match="closed"):
        vlm.ask(COLOR, images=CROSS)  # nothing is left on the model, or divprune could not be installed


def test_questions_of_a_batch_may_have_different_numbers_of_pictures(vlm, pruned):
    for wrapper in (vlm, pruned):
        asked, media = [COLOR, WHERE, COUNT], [CROSS, [CIRCLE, MANY], None]
        batch = wrapper.ask(asked, images=media, new_tokens=3)
        rows = [0, 1] if wrapper is pruned else [0, 1, 2]
        alone = [wrapper.ask(asked[i], images=media[i], new_tokens=3) for i in rows]
        assert [(batch[i].text, batch[i].prompt_tokens) for i in rows] == [(a.text, a.prompt_tokens) for a in alone]
        assert [a.prompt_tokens for a in batch] == [151, 295, 7]


def test_pictures_come_in_any_form(vlm):
    picture = Image.open(CROSS)
    forms = [CROSS, str(CROSS), picture, np.asarray(picture.convert("RGB")), [picture]]
    assert {vlm.ask(COLOR, images=form).text for form in forms} == {"white"}
    assert vlm.ask(f"<image>{COLOR}", images=CROSS).text == "white"


def test_generation_settings(vlm):
    greedy = vlm.ask(COLOR, images=CROSS, **ON)
    assert greedy.tokens == 12 and greedy.complete
    assert vlm.ask(COLOR, images=CROSS, num_beams=2, **ON).tokens == 12
    sampled = [
        vlm.ask(COLOR, images=CROSS, do_sample=True, temperature=30.0, seed=seed, **ON).text for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2] and greedy.text not in sampled
    state = torch.random.get_rng_state()
    vlm.ask(COLOR, images=CROSS, do_sample=True, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are its own"


def test_stop_strings_bring_the_tokenizer_that_they_need(vlm, monkeypatch):
    given = {}
    monkeypatch.setattr(vlm.model, "generate", lambda **arguments: given.update(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vlm.ask(WHERE, images=CIRCLE, stop_strings=["top"])
    assert given["stop_strings"] == ["top"] and given["tokenizer"] is vlm.processor.tokenizer


# ---------------------------------------------------------------- videos


def test_frames_of_a_video_are_pictures_where_the_processor_knows_no_videos(vlm, caplog):
    with caplog.at_level(logging.INFO, logger="mmeff"):
        said = vlm.ask(COUNT, video=CLIP, num_frames=2)
    (frames,) = said.frames
    assert (frames.indices, frames.shown_as) == ((0, 16), "images")
    assert "clip-1.mp4: frames [0, 16]" in caplog.text
    assert (
        said.prompt_tokens
        == vlm.ask(COUNT, images=[Image.fromarray(f) for f in read(CLIP, num_frames=2).frames]).prompt_tokens
    )
    assert len(vlm.ask(COUNT, video=CLIP).frames[0].indices) == 8
    assert vlm.ask(COUNT, video=CLIP, fps=1).frames[0].indices == tuple(read(CLIP, fps=1).indices)
    chosen = read(CLIP, indices=[3, 1])
    assert vlm.ask(COUNT, video=chosen).frames[0].indices == (3, 1)


def test_a_processor_of_videos_gets_a_video_with_its_times(qwen):
    model, processor = qwen
    with VisionLanguageModel(model, FastV(keep=0.5), processor=processor) as vlm:
        asked = vlm.question("what is in the video ?", video=CLIP, num_frames=4)
        assert [v.indices.tolist() for v in asked.videos] == [[0, 5, 10, 16]] and not asked.pictures
        as_video = vlm.ask(asked, new_tokens=4)
        as_images = vlm.ask("what is in the video ?", video=CLIP, num_frames=4, video_as="images", new_tokens=4)
    assert as_video.frames[0].shown_as == "video" and as_images.frames[0].shown_as == "images"
    assert as_video.frames[0].indices == as_images.frames[0].indices
    assert as_video.reports[0].tokens["visual tokens per prompt"] == as_video.prompt_tokens - 8, "words and marks apart"
    assert as_images.reports[0].tokens["visual tokens per prompt"] == as_images.prompt_tokens - 6 - 4 * 2


def test_the_frames_that_the_model_sees_are_the_ones_that_are_logged(qwen, monkeypatch):
    model, processor = qwen
    seen = {}
    kind = type(processor)
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, **given: seen.update(given) or call(self, **given))
    with VisionLanguageModel(model, processor=processor) as vlm:
        said = vlm.ask("what is in the video ?", video=CLIP, num_frames=4, new_tokens=1)
    assert np.array_equal(seen["videos"][0], read(CLIP, indices=said.frames[0].indices).frames)
    assert seen["do_sample_frames"] is False and seen["padding_side"] == "left"
    assert seen["video_metadata"][0]["frames_indices"] == [0, 5, 10, 16]
    assert seen["video_metadata"][0]["total_num_frames"] == 17 and seen["video_metadata"][0]["fps"] == 8


@pytest.mark.parametrize("family", ["qwen", "onevision"])
def test_batches_of_pictures_and_videos(family, qwen):
    if family == "qwen":
        model, processor = qwen
    else:
        small = SmallLlavaOnevision()
        model = small.model()
        processor = small_processors.onevision(small.pinpoints, model.config.text_config.vocab_size)
    asked = ["what is in the picture ?", "where is the ring ?", "what is in the video ?"]
    images, videos = [CROSS, [CIRCLE, MANY], [MANY]], [None, None, OTHER_CLIP]
    with VisionLanguageModel(model, FastV(keep=0.5), processor=processor) as vlm:
        batch = vlm.ask(asked, images=images, video=videos, num_frames=2, new_tokens=6)
        for i, said in enumerate(batch):
            shown = {"num_frames": 2} if videos[i] else {}
            alone = vlm.ask(asked[i], images=images[i], video=videos[i], new_tokens=6, **shown)
            assert (said.text, said.prompt_tokens, said.frames) == (alone.text, alone.prompt_tokens, alone.frames)
    assert len({said.text for said in batch}) > 1, "the questions are not all answered alike"


# ---------------------------------------------------------------- streams


def test_a_stream_says_what_ask_says(vlm, pruned):
    for wrapper in (vlm, pruned):
        whole = wrapper.ask(WHERE, images=CIRCLE)
        stream = wrapper.stream(WHERE, images=CIRCLE)
        pieces = list(stream)
        assert len(pieces) > 1 and "".join(pieces).strip() == whole.text == stream.result().text
        assert stream.result().tokens == whole.tokens and len(stream.result().reports) == len(whole.reports)
        assert list(stream) == [], "it has ended"


def test_a_stream_can_be_cancelled_and_the_model_is_free_again(pruned):
    talk = {"images": CROSS, "suppress_tokens": [2], "new_tokens": 300}
    with pruned.stream(COLOR, **talk) as stream:
        first = next(stream)
        with pytest.raises(RuntimeError, match="running already"):
            pruned.ask(COLOR, images=CROSS)
    said = stream.result()
    assert not said.complete and 1 <= said.tokens < 300 and said.text.startswith(first.strip())
    assert pruned.ask(COLOR, images=CROSS).text == "white"
    with pytest.raises(Cancelled, match="after 1 tokens"):
        pruned.ask(COLOR, cancel=lambda: True, **talk)


def test_an_error_in_the_thread_reaches_the_reader(vlm, monkeypatch):
    def broken(**_):
        raise torch.OutOfMemoryError("no memory for 3 tokens")

    monkeypatch.setattr(vlm.model, "generate", broken)
    stream = vlm.stream(COLOR, images=CROSS)
    with pytest.raises(torch.OutOfMemoryError, match="3 tokens"):
        list(stream)
    with pytest.raises(torch.OutOfMemoryError):
        stream.result()
    monkeypatch.undo()
    assert vlm.ask(COLOR, images=CROSS).text == "white"


def test_a_method_that_never_acts_is_an_error_in_a_stream_too(loaded):
    model, processor = loaded
    with VisionLanguageModel(model, FastV(keep=0.5), processor=processor) as vlm:
        monkey = vlm.handle.handles[0].recorder
        total, monkey.total = monkey.total, lambda kind: 0  # as if every call had fallen back to dense
        with pytest.raises(NothingAccelerated):
            list(vlm.stream(COLOR, images=CROSS))
        monkey.total = total
        assert vlm.ask(COLOR, images=CROSS).text == "white"


# ---------------------------------------------------------------- conversations


def test_a_conversation_reads_all_that_was_said(qwen):
    model, processor = qwen
    with VisionLanguageModel(model, FastV(keep=0.5), processor=processor) as vlm:
        talk = vlm.conversation()
        first = talk.ask("what is in the picture ?", images=CROSS, new_tokens=3)
        second = talk.ask("and in the video ?", video=CLIP, num_frames=2, new_tokens=3)
        third = talk.ask("where is the ring ?", new_tokens=3)  # without media of its own
        texts = [message["content"][-1]["text"] for message in talk.turns[-1][0].messages()]
        assert texts == [
            "what is in the picture ?",
            first.text,
            "and in the video ?",
            second.text,
            "where is the ring ?",
        ]
        assert second.prompt_tokens > first.prompt_tokens + 3 and third.prompt_tokens > second.prompt_tokens
        assert third.frames == second.frames and not first.frames
        count = third.reports[0].tokens["visual tokens per prompt"]
        assert count == second.reports[0].tokens["visual tokens per prompt"]
        with pytest.raises(Cancelled):
            talk.ask("and now ?", new_tokens=3, cancel=lambda: True)
        assert len(talk.turns) == 3, "what was cancelled leaves no trace"
        pieces = "".join(talk.stream("and now ?", new_tokens=3))
        assert len(talk.turns) == 4 and talk.turns[-1][1] == pieces.strip()


def test_without_a_chat_template(qwen):
    model, processor = qwen
    with VisionLanguageModel(model, processor=processor) as vlm:
        processor.chat_template, kept = None, processor.chat_template
        try:
            with pytest.raises(ValueError, match="a conversation needs a chat template"):
                vlm.conversation()
            with pytest.raises(ValueError, match="has no chat template; pass video_as='images'"):
                vlm.ask("what ?", video=CLIP, num_frames=2)
        finally:
            processor.chat_template = kept


# ---------------------------------------------------------------- mistakes, before the model runs


@pytest.mark.parametrize(
    ("question", "call", "error", "message"),
    [
        (None, {}, TypeError, "a question must be a text or a list of texts, got NoneType"),
        ([], {}, ValueError, "the list of questions is empty"),
        ([COLOR, 3], {"images": [CROSS, CROSS]}, TypeError, "question 1 must be a text, got 3"),
        (" ", {"images": CROSS}, ValueError, "the question must be a text that is not empty"),
        (COLOR, {}, ValueError, "fastv drops visual tokens, and there is no image; pass images or video, or dense=True"),
        (COLOR, {"images": "missing.png"}, MediaError, "missing.png"),
        (COLOR, {"images": 3}, TypeError, "image 0 must be a path, a PIL image or a uint8 array"),
        (COLOR, {"images": np.zeros((2, 4, 4, 3), np.uint8)}, ValueError, "image 0 must be uint8 (H, W, 3)"),
        ([COLOR] * 2, {"images": [CROSS]}, ValueError, "images must be a list with one entry per question"),
        ([COLOR] * 2, {"images": CROSS}, ValueError, "images must be a list with one entry per question"),
        (COLOR, {"video": "missing.mp4"}, MediaError, "missing.mp4"),
        (COLOR, {"video": np.zeros((2, 4, 4, 3), np.uint8)}, TypeError, "a video must be a path or a mmeff.video_io.Video"),
        (COLOR, {"images": CROSS, "num_frames": 4}, ValueError, "pass video too, or leave them out"),
        (COLOR, {"video": CLIP, "num_frames": 4, "fps": 2}, ValueError, "num_frames and fps"),
        (COLOR, {"video": CLIP, "video_as": "film"}, ValueError, "video_as must be one of auto, video, images"),
        (COLOR, {"video": CLIP, "video_as": "video"}, ValueError, "LlavaProcessor takes no videos"),
        (f"<image> <image> {COLOR}", {"images": CROSS}, ValueError, "has 2 marks <image> for 1 images"),
        (COLOR, {"images": CROSS, "new_tokens": 0}, ValueError, "new_tokens must be an int >= 1"),
        (COLOR, {"images": CROSS, "max_new_tokens": 3}, TypeError, "max_new_tokens cannot be set for the generation"),
        (COLOR, {"images": CROSS, "temprature": 1.0}, TypeError, "has no setting 'temprature'. Did you mean 'temperature'"),
        (COLOR, {"images": CROSS, "temperature": 0.5}, ValueError, "temperature only act on sampling; pass do_sample=True"),
        (COLOR, {"images": CROSS, "seed": 1}, ValueError, "seed only act on sampling"),
        (COLOR, {"images": CROSS, "seed": -1, "do_sample": True}, ValueError, "seed must be an int in"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_model_runs(question, call, error, message, pruned, monkeypatch):
    monkeypatch.setattr(pruned.model, "generate", lambda **_: pytest.fail("the model ran"))
    with pytest.raises(error) as raised:
        pruned.ask(question, **call)
    assert message in str(raised.value)
    if not isinstance(question, list):
        with pytest.raises(error):
            pruned.stream(question, **call)


def test_mistakes_with_questions_and_streams(vlm):
    asked = vlm.question(COLOR, images=CROSS)
    with pytest.raises(TypeError, match="pass Questions only"):
        vlm.ask(asked, images=CROSS)
    with pytest.raises(TypeError, match="pass Questions only"):
        vlm.ask([asked, COLOR])
    with pytest.raises(TypeError, match="stream takes one question"):
        vlm.stream([COLOR], images=[CROSS])
    with pytest.raises(ValueError, match="an answer of 3 beams cannot be streamed"):
        vlm.stream(asked, num_beams=3)
    assert vlm.ask([asked, asked])[1].text == "white"


def test_mistakes_when_it_is_made(loaded, tmp_path):
    model, processor = loaded
    with pytest.raises(UnknownMethod, match="Did you mean 'FastV'"):
        VisionLanguageModel("/no/such/model", "fastvv")  # before the model is looked for
    with pytest.raises(
        UnsupportedModel, match="tiny-video is a pipeline of videos or pictures and answers no questions"
    ):
        VisionLanguageModel("tiny-video", device="cpu")
    with pytest.raises(TypeError, match="needs its processor"):
        VisionLanguageModel(model)
    with pytest.raises(TypeError, match="loaded with its own processor"):
        VisionLanguageModel("tiny-vlm", processor=processor)
    with pytest.raises(TypeError, match="dtype can be chosen for a model that is loaded by name"):
        VisionLanguageModel(model, processor=processor, dtype="float32")
    with pytest.raises(TypeError, match="got Linear"):
        VisionLanguageModel(torch.nn.Linear(1, 1), processor=processor)
    with pytest.raises(UnsupportedModel, match="radial"):
        VisionLanguageModel(model, [FastV(), "radial"], processor=processor)
    with VisionLanguageModel(model, FastV(), processor=processor):  # nothing of those was left on the model
        pass


def test_a_name_brings_its_model_and_processor():
    with VisionLanguageModel("tiny-video-vlm", device="cpu", dtype="bfloat16") as vlm:
        assert vlm.model.dtype == torch.bfloat16 and vlm.source == "tiny-video-vlm"
        said = vlm.ask("how many objects are there ?", video=CLIP, new_tokens=3)
    assert len(said.frames[0].indices) == 8 and said.text


def test_no_code_of_a_repository_runs(tmp_path):
    (tmp_path / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Custom: pass\n")
    auto = {"AutoConfig": "custom.Custom", "AutoModelForImageTextToText": "custom.Custom"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": auto}))
    with pytest.raises((ValueError, TypeError, OSError)):
        VisionLanguageModel(str(tmp_path), device="cpu")
    assert not (tmp_path / "ran").exists()
