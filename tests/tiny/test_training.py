"""Both recipes learn, resume to the same weights, and refuse to mix; the padding shortcut is exact."""

from __future__ import annotations

import json

import pytest
import torch

from mmeff import training
from mmeff.tiny import codec, flow, scenes, train_video, train_vlm, video_model, vlm_model

TINY = {"frame_steps": 2, "clip_steps": 2, "frame_batch": 4, "clip_batch": 2}


def test_padding_as_one_key_equals_padding():
    """One zero key with log(count) stands for `count` zero keys: float32, same sums in another order."""
    torch.manual_seed(0)
    student = train_video.Student().eval()
    x = torch.randn(2, codec.LATENT_CHANNELS, 9, 24, 24)
    text = train_video.prompt_table()[:2]
    with torch.no_grad():
        student.net.proj_out.weight.normal_(std=0.1)  # it starts at zero
        short = student(x, torch.tensor([0.5, 0.9]), text, 26.0, None)
        long = torch.cat([text[:, :-1], torch.zeros(2, 26, video_model.TEXT_DIM)], dim=1)
        student.padding.bias = None
        whole = student.net(x, torch.tensor([500.0, 900.0]), long, return_dict=False)[0]
    assert short.abs().max() > 0.1
    assert (short - whole).abs().max() < 1e-4


def test_video_training_resumes_to_the_same_weights(tmp_path):
    recipe = train_video.VideoRecipe(**TINY)
    straight = train_video.train(recipe, tmp_path / "a")
    # stop after two steps: the checkpoint of a shorter loop, continued
    steps = []

    class Stop(Exception):
        pass

    original = training.MuonWithAdamW.step

    def step(self, *args, **kwargs):
        if len(steps) == 2:
            raise Stop
        steps.append(1)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "CHECKPOINT_EVERY", 1)
        patch.setattr(training.MuonWithAdamW, "step", step)
        with pytest.raises(Stop):
            train_video.train(recipe, tmp_path / "b")
    assert training.Run(tmp_path / "b", {"kind": "tiny-video", **vars(recipe)}).load()[1]["step"] == 2
    resumed = train_video.train(recipe, tmp_path / "b")
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    training.Run(tmp_path, {"kind": "x", "lr": 1.0})
    training.Run(tmp_path, {"kind": "x", "lr": 1.0})
    with pytest.raises(ValueError, match="other values of lr"):
        training.Run(tmp_path, {"kind": "x", "lr": 2.0})


def test_vlm_training_runs_all_stages_and_logs(tmp_path):
    recipe = train_vlm.VlmRecipe(see_steps=2, read_steps=2, join_steps=2, batch=2, questions=3)
    net = train_vlm.train(recipe, tmp_path)
    assert not net.training
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6


def test_packed_questions_equal_single_turns():
    """A packed question gets the logits that it gets alone behind the picture, at its own positions."""
    torch.manual_seed(0)
    net = vlm_model.model().eval()
    batch = scenes.sample(5, 0, 2)
    packed = train_vlm.pack(batch, training.rng(1, 1), 4, vlm_model.tokenizer())
    with torch.no_grad():
        features, _ = train_vlm.look(net, vlm_model.pixels(batch.images))
        together = train_vlm.read(net, features, packed, None)
        for q in range(4):
            ids = packed.ids[:, q]
            prompt = torch.cat([torch.ones(2, 1, dtype=torch.long), torch.full((2, 144), 4), ids], dim=1)
            alone = net(input_ids=prompt, pixel_values=vlm_model.pixels(batch.images)).logits[:, 145:]
            assert (together[:, q] - alone).abs().max() < 1e-4


def test_pixels_are_what_the_processor_makes():
    from mmeff.evaluation.questions import picture

    batch = scenes.sample(5, 0, 2)
    processed = vlm_model.processor().image_processor([picture(x) for x in batch.images], return_tensors="pt")
    assert (processed["pixel_values"] - vlm_model.pixels(batch.images)).abs().max() < 1e-6


def test_schedule():
    rate = [
        training.warmup_constant_linear(s, steps=100, lr=1.0, warmup=10, constant=0.5) for s in (0, 9, 10, 49, 75, 99)
    ]
    assert rate == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.02])
