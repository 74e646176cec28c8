"""The committed models: intact, loaded by the stock classes, and as good as their cards say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import mmeff
from mmeff import tiny
from mmeff.evaluation import gates_image
from mmeff.evaluation.questions import ask_scenes
from mmeff.tiny import clips, export, scenes, stills, train_vlm

DATA = tiny.data_folder()


MODELS = ["tiny-vlm", "tiny-video", "tiny-video-vlm", "tiny-vla", "tiny-image", "tiny-backbones"]


@pytest.mark.parametrize("name", [*MODELS, "samples"])
def test_hashes(name):
    export.verify(DATA / name)


@pytest.mark.parametrize("name", MODELS)
def test_size_and_card(name):
    size = sum(p.stat().st_size for p in (DATA / name).rglob("*") if p.is_file())
    assert size <= export.LIMIT
    card = (DATA / name / "README.md").read_text()
    assert "What it cannot tell you" in card
    gate = json.loads((DATA / name / "gate.json").read_text())
    assert f"## Gate: {'passed' if gate['passed'] else 'missed'}" in card
    assert not list((DATA / name).rglob("*.bin")) and not list((DATA / name).rglob("*.pt"))


def test_verify_notices_a_change(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    export.seal(tmp_path, "card", {})
    export.verify(tmp_path)
    (tmp_path / "weights").write_bytes(b"2")
    with pytest.raises(ValueError, match="weights"):
        export.verify(tmp_path)


def test_vlm_answers_as_recorded():
    """64 held-out questions through `generate`: within 4 standard errors of the card's figure."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model, processor = tiny.vlm()
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    recorded = json.loads((DATA / "tiny-vlm" / "gate.json").read_text())["held_out"]["exact_match"]
    found = ask_scenes(model, processor, seed=scenes.HELDOUT_SEED, count=64)
    assert abs(found.exact_match - recorded) <= 4 * np.sqrt(recorded * (1 - recorded) / 64)


def test_vlm_pruning_separates_policies():
    """Random pruning at the input costs far more than the class token's attention, as the gate demands."""
    from mmeff.evaluation.gates import class_attention

    model, _ = tiny.vlm()
    with torch.inference_mode():
        dense, randomly, chosen = (
            train_vlm.evaluate(model, seed=scenes.GATE_SEED, count=256, policy=p)["exact_match"]
            for p in (None, train_vlm.random_tokens(36), class_attention)
        )
    assert dense - randomly > 0.06
    assert chosen > randomly + 0.04


def test_video_pipeline_is_stock_and_draws_what_is_asked():
    from diffusers import WanPipeline

    pipeline = tiny.video_pipeline()
    assert type(pipeline) is WanPipeline
    prompts = ["a red square moving left", "a cyan ring moving down"]
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    video = pipeline(
        prompts, height=48, width=48, num_frames=17, num_inference_steps=12, guidance_scale=2.0, max_sequence_length=16,
        generator=noise, output_type="np",
    ).frames  # fmt: skip
    read = clips.detect(video)
    assert read.found.all()
    assert [list(clips.COLOURS)[c] for c in read.colour] == ["red", "cyan"]
    assert [list(clips.DIRECTIONS)[d] for d in read.direction] == ["left", "down"]


def test_image_pipeline_is_stock_and_draws_what_is_asked():
    """As good as the card says, within 4 standard errors; at the pipeline's own number of text tokens too."""
    from diffusers import FluxPipeline

    pipeline = tiny.image_pipeline()
    assert type(pipeline) is FluxPipeline and "tiny model" in pipeline.mmeff_note
    recorded = json.loads((DATA / "tiny-image" / "gate.json").read_text())["dense"]["all"]
    assert recorded >= 0.85
    _, labels = stills.sample(stills.HELDOUT_SEED + 1, 0, 16, pooled=True)
    read = stills.detect(gates_image.draw(pipeline, labels.prompts(), seed=5, steps=10))
    assert read.score(labels)["all"] >= recorded - 4 * np.sqrt(recorded * (1 - recorded) / 16) - 1 / 16
    image = pipeline("a green cross in the center", height=48, width=48, num_inference_steps=6, output_type="np").images
    found = stills.detect(image)
    names = (list(stills.COLOURS)[found.colour[0]], stills.SHAPES[found.shape[0]], list(stills.PLACES)[found.place[0]])
    assert names == ("green", "cross", "center")


def test_the_image_models_table_is_current():
    """The card and the page that quotes it hold the figures of gate.json, which holds those of every method of the gate."""
    gate = json.loads((DATA / "tiny-image" / "gate.json").read_text())
    assert [{k: r[k] for k in f} for r, f in zip(gate["sparse"], gates_image.SPARSE, strict=True)] == json.loads(
        json.dumps(gates_image.SPARSE)
    )
    assert gates_image.table(gate) in (DATA / "tiny-image" / "README.md").read_text()
    page = DATA.parent / "docs" / "training.md"
    if page.is_file():  # an installed package has no docs
        assert gates_image.table(gate) in page.read_text()


def test_an_image_of_another_size_runs_sparse():
    pipeline = tiny.image_pipeline()
    with mmeff.accelerate(pipeline, "gna", window=(1, 5, 5)) as handle:
        image = pipeline(
            "a red ring in the center", height=36, width=58, num_inference_steps=2, max_sequence_length=12, output_type="np"
        ).images  # fmt: skip
        assert handle.report().accelerated
    assert image.shape == (1, 36, 58, 3) and np.isfinite(image).all()


def test_other_sizes_run_with_an_interpolated_position_table():
    pipeline = tiny.video_pipeline()
    with mmeff.accelerate(pipeline, "radial", block=5, drop_below=8, dense_steps=1, dense_layers=0) as handle:
        video = pipeline(
            "a red square moving left", height=32, width=64, num_frames=11, num_inference_steps=2, guidance_scale=1.0,
            max_sequence_length=16, output_type="np",
        ).frames  # fmt: skip
        assert handle.report().accelerated
    assert video.shape == (1, 11, 32, 64, 3)
    assert np.isfinite(video).all()


def test_without_its_table_a_folder_is_refused(tmp_path):
    import shutil

    shutil.copytree(DATA / "tiny-video", tmp_path / "m")
    (tmp_path / "m" / "transformer" / "position_table.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="position_table"):
        tiny.load_video(tmp_path / "m")
