"""The video VLM: its prompt is what training packs, its training runs and resumes, and the committed weights answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import mmeff
from mmeff import tiny, training
from mmeff.evaluation.questions import ask_motions, chat, picture
from mmeff.tiny import export, motions, scenes, train_video_vlm, train_vlm, video_vlm_model, vlm_model

DATA = tiny.data_folder() / "tiny-video-vlm"
SHORT = {
    "see_steps": 1,
    "follow_steps": 1,
    "read_steps": 2,
    "join_steps": 2,
    "batch": 2,
    "whole_batch": 2,
    "questions": 4,
}


def test_processor_writes_the_prompt_that_training_packs():
    processor, drawn = video_vlm_model.processor(), motions.sample(5, 0, 1)
    question = "which way does the red circle move ?"
    text = motions.prompt(question)
    assert chat(processor, question, motions.FRAMES) == text
    frames = [picture(x) for x in drawn.videos[0]]
    batch = processor(text=[text], images=frames, return_tensors="pt")
    ids = batch["input_ids"][0]
    assert (ids[video_vlm_model.VISUAL_PLACES] == vlm_model.SPECIAL.index("<image>")).all()
    assert processor.tokenizer.decode(ids[video_vlm_model.WORD_PLACES]).split() == motions.frame_words()
    assert processor.tokenizer.decode(ids[video_vlm_model.FIRST :]) == question
    assert (batch["pixel_values"] - vlm_model.pixels(drawn.videos[0])).abs().max() < 1e-6


def test_packed_questions_equal_single_turns():
    torch.manual_seed(0)
    net, drawn = video_vlm_model.model().eval(), motions.sample(5, 0, 2)
    processor = video_vlm_model.processor()
    packed = train_vlm.pack(drawn, training.rng(1, 1), 3, processor.tokenizer, ask=motions.ask)
    frames = [picture(x) for video in drawn.videos for x in video]
    with torch.no_grad():
        together, _ = train_video_vlm.read(net, train_video_vlm.look(net, drawn.videos), packed, None)
        for q in range(3):
            texts = [motions.prompt(row[q].text + " " + row[q].answer) for row in packed.questions]
            for b, text in enumerate(texts):
                one = processor(text=[text], images=frames[8 * b : 8 * b + 8], return_tensors="pt")
                alone = net(**one).logits[0, video_vlm_model.FIRST :]
                assert (together[b, q, : len(alone)] - alone).abs().max() < 1e-4


def test_kept_tokens_come_back_in_order_at_their_places():
    """Keeping every token by name is keeping all; the states returned are those of the tokens that were named."""
    torch.manual_seed(0)
    net, drawn = video_vlm_model.model().eval(), motions.sample(5, 1, 2)
    packed = train_vlm.pack(drawn, training.rng(1, 1), 2, video_vlm_model.tokenizer(), ask=motions.ask)
    some = torch.tensor([[3, 40, 41, 200], [0, 1, 100, 287]])
    with torch.no_grad():
        features = train_video_vlm.look(net, drawn.videos)
        everything = torch.arange(video_vlm_model.VISUAL).expand(2, -1)
        whole, _ = train_video_vlm.read(net, features, packed, None)
        named, _ = train_video_vlm.read(net, features, packed, everything)
        _, first = train_video_vlm.read(net, features, packed, some, layer=0)
    assert torch.equal(whole, named)
    assert torch.equal(first, features.gather(1, some[..., None].expand(-1, -1, features.shape[-1])))


def test_motion_truth_follows_the_paths():
    drawn = motions.sample(6, 0, 3)
    truth = train_video_vlm.motion_truth(drawn, train_vlm.patch_truth(drawn.frames()))
    seen = 0
    for b in range(3):
        for o in range(drawn.count[b]):
            for f in range(motions.FRAMES):
                y, x = (drawn.path[b, o, f] // vlm_model.PATCH).astype(int)
                token = f * video_vlm_model.PER_FRAME + y * video_vlm_model.SIDE + x
                if truth["motion"][b, token] < 0:
                    continue  # the centre's patch may hold less than a third of a small object
                seen += 1
                come = (drawn.path[b, o, f] - drawn.path[b, o, 0]) / 24
                assert truth["motion"][b, token] == drawn.motion[b, o] and truth["frame"][b, token] == f
                assert np.allclose(truth["come"][b, token], come, atol=1e-5)
    assert seen > 20


def test_it_starts_from_the_image_model():
    image, _ = tiny.vlm()
    net = video_vlm_model.model(tiny.data_folder() / "tiny-vlm")
    assert torch.equal(net.lm_head.weight, image.lm_head.weight)
    table = net.model.vision_tower.embeddings.position_embedding.weight
    before = image.model.vision_tower.embeddings.position_embedding.weight
    assert table.shape == (37, 128)
    assert torch.allclose(table[1], before[[1, 2, 13, 14]].mean(dim=0), atol=1e-6)


def test_training_runs_all_stages_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_video_vlm, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(train_video_vlm, "evaluate", lambda net, **_: {"questions": 0})
    recipe = train_video_vlm.VideoVlmRecipe(**SHORT)
    straight = train_video_vlm.train(recipe, tmp_path / "a")
    rows = training.logged(tmp_path / "a")
    assert [row["stage"] for row in rows if "stage" in row] == ["see", "follow", "read", "join"]

    class Stop(Exception):
        pass

    def stop(step, *_):
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        train_video_vlm.train(recipe, tmp_path / "b", progress=stop)
    resumed = train_video_vlm.train(recipe, tmp_path / "b")
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_export_round_trip(tmp_path):
    torch.manual_seed(0)
    net = video_vlm_model.model()
    export.export_video_vlm(net, tmp_path / "m")
    loaded, processor = tiny.load_vlm(tmp_path / "m")
    assert (loaded.lm_head.weight - net.lm_head.weight).abs().max() < 1e-3
    assert processor.chat_template == video_vlm_model.CHAT_TEMPLATE


def test_the_committed_folder_is_sealed_and_small():
    export.verify(DATA)
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) <= export.LIMIT
    gate = json.loads((DATA / "gate.json").read_text())
    card = (DATA / "README.md").read_text()
    assert f"## Gate: {'passed' if gate['passed'] else 'missed'}" in card
    assert "What it cannot tell you" in card


def test_it_answers_as_recorded():
    """64 held-out questions through `generate`: within 4 standard errors of the card's figure."""
    model, processor = tiny.video_vlm()
    recorded = json.loads((DATA / "gate.json").read_text())["held_out"]["exact_match"]
    found = ask_motions(model, processor, seed=motions.HELDOUT_SEED, count=64)
    assert abs(found.exact_match - recorded) <= 4 * np.sqrt(recorded * (1 - recorded) / 64)


def test_direction_is_read_from_the_order_of_frames():
    """Played backwards, the same frames get the opposite answer."""
    from mmeff.evaluation.questions import answer

    model, processor = tiny.video_vlm()
    drawn = motions.sample(motions.HELDOUT_SEED, 500, 24, most=1)
    moving = [b for b in range(24) if drawn.motion[b, 0] < 4]
    asked = [
        motions.prompt(f"which way does the {list(scenes.COLOURS)[drawn.colour[b, 0]]} {scenes.SHAPES[drawn.shape[b, 0]]} move ?")
        for b in moving
    ]  # fmt: skip
    wanted = [list(motions.MOTIONS)[drawn.motion[b, 0]] for b in moving]
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    forward = answer(model, processor, [[picture(x) for x in drawn.videos[b]] for b in moving], asked, new_tokens=2)
    backward = answer(
        model, processor, [[picture(x) for x in drawn.videos[b, ::-1]] for b in moving], asked, new_tokens=2
    )
    right = [f == w and b == opposite[w] for f, b, w in zip(forward, backward, wanted, strict=True)]
    assert np.mean(right) > 0.7


def test_pruning_methods_take_its_frames():
    model, processor = tiny.video_vlm()
    with mmeff.accelerate(model, "fastv", layer=2, keep=0.25) as handle:
        ask_motions(model, processor, seed=motions.GATE_SEED, count=4)
        assert handle.report().kept[2].shape[1] == 72
