"""The tiny image model's parts are what they claim, through the stock classes: pictures, encoders, autoencoder, training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mmeff import training
from mmeff.evaluation import gates_image
from mmeff.tiny import export, flow, image_model, load_image, stills, train_image

TINY = {"half_steps": 2, "full_steps": 2, "half_batch": 4, "full_batch": 2}
TEXT = "a red square in the top left"


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    student = train_image.Student()
    torch.nn.init.normal_(student.net.proj_out.weight, std=0.05)  # it starts at zero
    pipeline = image_model.pipeline(student.net)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_are_a_function_of_seed_and_index():
    one, labels = stills.sample(1, 2, 4)
    again, same = stills.sample(1, 2, 4)
    assert np.array_equal(one, again) and labels.prompts() == same.prompts()
    assert one.shape == (4, 48, 48, 3) and one.min() >= 0 and one.max() <= 1
    for seed, index in ((1, 3), (2, 2)):
        assert not np.array_equal(one, stills.sample(seed, index, 4)[0])


def test_pooled_pictures_are_averages():
    whole, _ = stills.sample(5, 0, 3)
    pooled, _ = stills.sample(5, 0, 3, pooled=True)
    assert np.abs(whole.reshape(3, 24, 2, 24, 2, 3).mean(axis=(2, 4)) - pooled).max() < 1e-5


@pytest.mark.parametrize("pooled", [False, True])
def test_detector_reads_real_pictures(pooled):
    images, labels = stills.sample(9, 0, 240, pooled=pooled)
    assert set(stills.detect(images).score(labels).values()) == {1.0}


def test_the_detector_judges_each_part():
    """A picture of something else is found, and wrong in just what differs."""
    images, labels = stills.sample(9, 0, 240)
    for part, others in (("colour", stills.COLOURS), ("shape", stills.SHAPES), ("place", stills.PLACES)):
        wrong = stills.StillLabels(**{**vars(labels), part: (getattr(labels, part) + 1) % len(others)})
        expected = dict.fromkeys(("found", "colour", "shape", "place"), 1.0) | {part: 0.0, "all": 0.0}
        assert stills.detect(images).score(wrong) == expected


@pytest.mark.parametrize("spoil", ["noise", "blank", "two objects", "half an object"])
def test_detector_rejects_what_is_no_object(spoil):
    images, labels = stills.sample(9, 0, 24)
    if spoil == "noise":
        images = np.random.default_rng(0).uniform(size=images.shape)
    elif spoil == "blank":
        images = np.full_like(images, 0.3)
    elif spoil == "two objects":
        corner = np.zeros((1, 48, 48, 1))
        corner[:, 2:16, 2:16] = corner[:, 32:46, 32:46] = 1
        images = 0.2 * (1 - corner) + np.array([0.9, 0.1, 0.1]) * corner
        labels = labels.first(1)
    else:
        images = images.copy()
        for image, place in zip(images, labels.place, strict=True):
            y = round(list(stills.PLACES.values())[place][0] * 48)
            image[y:] = np.median(image.reshape(-1, 3), axis=0)
    assert stills.detect(images).score(labels)["found"] == 0.0


def test_detector_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"shape \(B, 48, 48, 3\)"):
        stills.detect(np.zeros((1, 30, 30, 3)))


def test_splits_share_nothing():
    seen = {}
    for seed in (stills.TRAIN_SEED + 1, stills.GATE_SEED, stills.HELDOUT_SEED):
        for index in range(4):
            for image in stills.sample(seed, index, 16, pooled=True)[0]:
                assert seen.setdefault(image.tobytes(), seed) == seed


def test_prompt_index_finds_the_prompt():
    _, labels = stills.sample(4, 0, 64, pooled=True)
    every = stills.all_prompts()
    assert len(set(every)) == 120
    assert [every[i] for i in stills.prompt_index(labels)] == labels.prompts()


# --- what surrounds the transformer ------------------------------------------------------------------------------------


def test_the_autoencoder_is_the_identity():
    vae = image_model.autoencoder()
    x = torch.rand(2, 3, 48, 48) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.sample()
        assert latents.shape == x.shape
        assert (latents - x).abs().max() < 2e-4  # float32 sums beside the constant, through the norm
        assert (vae.decode(x).sample - x).abs().max() < 2e-4
    assert all(torch.equal(p, p.half().float()) for p in vae.parameters()), "float16 storage must be exact"


def test_tokens_and_positions_are_the_pipelines(pipe):
    images, _ = stills.sample(1, 0, 2)
    latents = (torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1 - image_model.LATENT_MEAN) / image_model.LATENT_STD
    assert torch.equal(pipe._pack_latents(latents, 2, 3, 48, 48), image_model.pack(torch.from_numpy(images)))
    assert np.allclose(
        image_model.unpack(image_model.pack(torch.from_numpy(images)), (24, 24)).numpy(), images, atol=1e-6
    )
    _, ids = pipe.prepare_latents(1, 3, 48, 48, torch.float32, "cpu", torch.Generator())
    assert torch.equal(ids, image_model.positions())
    fine = image_model.positions().reshape(12, 2, 12, 2, 3)
    assert torch.equal(fine.mean(dim=(1, 3)).reshape(-1, 3), image_model.positions(pooled=True))


def test_text_features_are_the_pipelines(pipe):
    words, bag, _ = pipe.encode_prompt(TEXT, max_sequence_length=16)
    index = stills.all_prompts().index(TEXT)
    texts, bags = image_model.prompt_tables()
    assert torch.equal(words[0, :9], texts[index]) and torch.equal(bag[0], bags[index])
    assert words[0, 7].abs().sum() > 0 and not words[0, 8:].any(), "eight tokens, and padding that is zero"


def test_the_pooled_text_is_a_bag_of_words(pipe):
    def pooled(text):
        return pipe.encode_prompt(text, max_sequence_length=16)[1]

    assert torch.allclose(pooled(TEXT), pooled("left top the in square red a"), atol=1e-5)
    _, bags = image_model.prompt_tables()
    distances = torch.cdist(bags, bags) + 9 * torch.eye(len(bags))
    assert distances.min() > 1, "no two prompts are alike"


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [9, 16, 80])
def test_one_token_of_padding_stands_for_all(pipe, length):
    """The student's shortcut equals the transformer with all padding tokens, up to the order of float32 sums."""
    student = train_image.Student()
    student.net = pipe.transformer
    words, bags, ids = pipe.encode_prompt([TEXT, "a cyan ring in the center"], max_sequence_length=length)
    x, sigma = torch.randn(2, 576, 12), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        short = student(x, sigma, words[:, :9], bags, float(length - 8))
        whole = pipe.transformer(
            x, encoder_hidden_states=words, pooled_projections=bags, timestep=sigma, img_ids=image_model.positions(),
            txt_ids=ids, return_dict=False,
        )[0]  # fmt: skip
    assert short.abs().max() > 0.1
    assert (short - whole).abs().max() < 1e-4


def test_the_sampler_of_training_is_the_pipelines(pipe):
    _, labels = stills.sample(7, 0, 1, pooled=True)
    student = train_image.Student()
    student.net = pipe.transformer
    noise = torch.randn(1, 576, 12, generator=torch.Generator().manual_seed(3))
    ours = train_image.generate(student, labels, seed=3, steps=3)
    theirs = pipe(
        labels.prompts(), height=48, width=48, num_inference_steps=3, max_sequence_length=16, latents=noise, output_type="np"
    ).images  # fmt: skip
    assert np.abs(ours - theirs).max() < 1e-3


def test_training_resumes_to_the_same_weights(tmp_path):
    recipe = train_image.ImageRecipe(**TINY)
    straight = train_image.train(recipe, tmp_path / "a")
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
            train_image.train(recipe, tmp_path / "b")
    assert training.Run(tmp_path / "b", {"kind": "tiny-image", **vars(recipe)}).load()[1]["step"] == 2
    resumed = train_image.train(recipe, tmp_path / "b")
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    with pytest.raises(ValueError, match="other values of lr"):
        train_image.train(train_image.ImageRecipe(**TINY, lr=1e-3), tmp_path / "b")


def test_a_missed_gate_is_sealed_with_its_figures(tmp_path):
    """An untrained model draws nothing: the gate says so, the folder is complete all the same, and loads."""
    student = train_image.Student()
    export.export_image(student, tmp_path / "m")
    gate = gates_image.image_gate(
        tmp_path / "m", count=2, compared=1, padded=1, steps=2, methods=gates_image.SPARSE[:1], say=lambda line: None
    )
    assert not gate["passed"] and gate["dense"]["found"] == 0.0
    assert len(gate["sparse"]) == 1 and gate["sparse"][0]["density"] < 1
    rows = [{"step": 50, "loss": 1.0, "seconds": 90.0}, {"step": 100, "loss": 0.5, "seconds": 30.0}]
    gates_image.seal_image(tmp_path / "m", train_image.ImageRecipe(), gate, rows)
    export.verify(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "## Gate: missed" in card and "took 2 minutes" in card and "GNA, window" in card
    assert json.loads((tmp_path / "m" / "gate.json").read_text())["prompts"] == 2
    assert load_image(tmp_path / "m").transformer.dtype == torch.float32
