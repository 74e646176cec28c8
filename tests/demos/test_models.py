"""Models: by name, on first use, one at a time, nothing that was not offered."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest

import demos.models
from demos.models import Models
from demos.settings import Settings
from demos.turns import Turns


def models(*names):
    return Models(Settings(models=names), Turns(per_user=9, total=9))


@pytest.fixture
def folders(tmp_path):
    for name, file, content in (
        ("wan", "model_index.json", {"_class_name": "WanPipeline"}),
        ("flux", "model_index.json", {"_class_name": "FluxPipeline"}),
        ("llava", "config.json", {}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content))
    return tmp_path


def test_kinds_and_names_of_folders(folders):
    found = models("tiny-video", *(str(folders / name) for name in ("wan", "flux", "llava")))
    assert {offer.name: offer.kind for offer in found.offers.values()} == {
        "tiny-video": "video", "wan": "video", "flux": "image", "llava": "vlm",
    }  # fmt: skip
    assert found.names("video") == ["tiny-video", "wan"] and found.offers["tiny-video"].embedded
    assert str(folders) not in str(list(found.offers))


def test_names_that_lead_nowhere(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="it is no model folder"):
        models(str(folders))
    with pytest.raises(FileNotFoundError, match="no model at nonsense"):
        models("nonsense")
    (tmp_path / "other" / "wan").mkdir(parents=True)
    (tmp_path / "other" / "wan" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="both called 'wan'"):
        models(str(folders / "wan"), str(tmp_path / "other" / "wan"))


@pytest.mark.parametrize("name", ["../etc", "/etc/passwd", "black-forest-labs/FLUX.1-dev", "", None, 3])
def test_nothing_else_is_loaded(name):
    with pytest.raises(ValueError, match=r"model must be one that this demo offers here \(tiny-video\)"):
        models("tiny-video", "tiny-vlm").offer(name, "video")


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="tiny-vlm"):
        models("tiny-video", "tiny-vlm").offer("tiny-video", "vlm")


def test_loaded_once_and_stock_again_after_each_use(monkeypatch):
    made, uses = [], []

    class Fake:
        pipe = SimpleNamespace(set_progress_bar_config=lambda **_: None)

        def __init__(self, source, **_):
            made.append(source)

        def use(self, methods):
            uses.append(methods)

    monkeypatch.setattr("mmeff.pipelines.VideoGenerator", Fake, raising=False)
    found = models("tiny-video")
    assert not found.loaded("tiny-video")
    loads = []

    def visit():
        with (
            found.turns.admit("a") as ticket,
            found.use("tiny-video", ticket, loading=lambda: loads.append(1)) as model,
        ):
            assert isinstance(model, Fake)

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["tiny-video"] and loads == [1] and uses == [None] * 4 and found.loaded("tiny-video")
    with pytest.raises(ZeroDivisionError), found.turns.admit("a") as ticket, found.use("tiny-video", ticket):
        raise ZeroDivisionError
    assert uses == [None] * 5


def test_an_embedded_model_that_is_not_there_is_not_offered(monkeypatch, tmp_path):
    (tmp_path / "tiny-video").mkdir()
    monkeypatch.setattr("mmeff.tiny.data_folder", lambda: tmp_path)
    assert list(models("tiny-video", "tiny-image").offers) == ["tiny-video"]
    with pytest.raises(ValueError, match="none of the models tiny-image is there"):
        models("tiny-image")


@pytest.mark.parametrize("name", sorted(demos.models.EMBEDDED))
def test_embedded_kinds_agree_with_the_library(name):
    from mmeff.pipelines.loading import EMBEDDED

    assert (EMBEDDED[name] == "vlm") == (demos.models.EMBEDDED[name] == "vlm")
