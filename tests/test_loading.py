"""Models come in through their own libraries' `from_pretrained`: folders of real classes, and clear refusals."""

from __future__ import annotations

import json

import pytest
import torch

from mmeff import tiny
from mmeff.errors import UnsupportedModel
from mmeff.pipelines.loading import load, makes_pictures

DATA = tiny.data_folder()


def test_a_llava_folder(tmp_path):
    loaded = load(str(DATA / "tiny-vlm"), device="cpu")
    assert (loaded.kind, type(loaded.model).__name__) == ("vlm", "LlavaForConditionalGeneration")
    assert loaded.model.dtype == torch.float32
    assert loaded.processor.image_token == "<image>"


def test_a_wan_folder():
    loaded = load(str(DATA / "tiny-video"), device="cpu")
    assert (loaded.kind, type(loaded.model).__name__) == ("video", "WanPipeline")
    assert loaded.model.transformer.patch_embedding._forward_hooks, "the position table belongs to this folder"


def test_a_flux_folder():
    loaded = load(str(DATA / "tiny-image"), device="cpu")
    assert (loaded.kind, type(loaded.model).__name__) == ("video", "FluxPipeline")
    assert makes_pictures(loaded.model) and not makes_pictures(load("tiny-video", device="cpu").model)


@pytest.mark.parametrize("name", ["tiny-vlm", "tiny-video", "tiny-image"])
def test_dtype_is_honoured_for_embedded_models_too(name):
    model = load(name, device="cpu", dtype="bfloat16").model
    assert (model if name == "tiny-vlm" else model.transformer).dtype == torch.bfloat16


def test_an_embedded_model_says_what_it_is():
    assert "tiny model" in load("tiny-vlm", device="cpu").note


@pytest.mark.parametrize("name", ["missing", "./missing", "/missing/folder", "a/b/c"])
def test_nothing_there(name):
    with pytest.raises(FileNotFoundError, match="embedded models: tiny-video, tiny-vlm, tiny-video-vlm, tiny-image"):
        load(name)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"neither model_index.json .* nor config.json"):
        load(str(tmp_path))


def test_a_model_that_is_no_vision_language_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedModel, match="not a vision-language model"):
        load(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    """A folder with only a pickle must not be loaded."""
    import shutil

    shutil.copytree(DATA / "tiny-vlm", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(str(tmp_path / "m"))


def test_an_unknown_dtype():
    with pytest.raises(ValueError, match="dtype must be auto, float32"):
        load(str(DATA / "tiny-vlm"), dtype="float7")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "file_exists", refuse)
    with pytest.raises(FileNotFoundError, match=r"the hub could not be asked for it \(ConnectionError: offline\)"):
        load("someone/model")
