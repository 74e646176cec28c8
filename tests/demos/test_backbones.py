"""The tab Backbones: its checks, small models for real, and its page on a service that answers from a script."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from demos import views_backbones
from demos.app import Page
from demos.backbones import Backbones, _drawn
from demos.looks import DIRECTIONS, OURS, STOCK, STRENGTH, At, Look, Seen, Sight
from demos.settings import Settings
from demos.tab_ask import sample
from demos.tab_backbones import DIGITS, PAIRS, Panel, shown
from demos.turns import Turns
from mmeff.errors import MediaError, UnknownMethod, UnsupportedModel
from mmeff.pipelines import Cancelled

PICTURE = Image.open(sample("scene-2.png"))
SMALL = {"image": PICTURE, "size": 64}


@pytest.fixture(scope="module")
def backbones():
    return Backbones(Settings(), Turns(per_user=2, total=8))


def last(run):
    *steps, result = run
    return steps, result


# ---------------------------------------------------------------- the embedded models


def test_embedded_models_read_digits_that_they_never_saw(backbones):
    names = ("digits-biformer", "digits-dinat_s")
    assert set(names) <= set(backbones.names()) and backbones.note(names).startswith(
        "Tiny models: digits-biformer, digits-dinat_s."
    )
    assert "Random weights: nat_mini." in backbones.note(("digits-biformer", "nat_mini"))
    for path in shown()[: len(DIGITS)]:
        _, sight = last(backbones.run(Look(image=Image.open(path), models=names, batch=0), "v"))
        wanted = f"class {path.rpartition('-')[2][0]}"
        for one in sight.seen:
            assert one.classes[0][0] == wanted and one.classes[0][1] > 0.5 and not one.random and one.maps
            assert one.size == (48, 48) and one.parameters < 600_000
    _, sight = last(backbones.run(Look(**SMALL, models=names, batch=0), "v"))  # a coloured scene, at another size
    assert all(one.size == (64, 64) for one in sight.seen)
    with pytest.raises(UnsupportedModel, match="digits-biformer has no window attention"):
        list(backbones.run(Look(**SMALL, models=names, how=(OURS, STOCK)), "v"))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": None}, "no picture to look at"),
        ({"models": ("", "resnet18")}, "a name that timm knows"),
        ({"models": ("hf-hub:some/model", "resnet18")}, "addresses such as .* are not followed"),
        ({"models": ("../../etc/passwd", "resnet18")}, "addresses such as .* are not followed"),
        ({"how": (STOCK, "compiled")}, "how a model runs must be"),
        ({"size": 4096}, r"whole number in \[64, 512\]"),
        ({"batch": 100}, r"whole number in \[0, 8\], got 100"),
        ({"coloured": "rainbow"}, "maps must be drawn by"),
    ],
)
def test_a_look_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Look(**{"image": PICTURE, "models": ("resnet18", "resnet18"), **fields}).check()


def test_unknown_models_get_near_names_and_large_ones_are_not_built(backbones):
    with pytest.raises(UnknownMethod, match=r"'nat_minni'.*nat_mini"):
        list(backbones.run(Look(**SMALL, models=("nat_minni", "resnet18")), "v"))
    with pytest.raises(ValueError, match=r"at most 120 M parameters, and vit_giant_patch14_224 has \d+ M"):
        list(backbones.run(Look(image=PICTURE, models=("vit_giant_patch14_224", "resnet18")), "v"))
    assert backbones.turns.waiting == 0


def test_models_without_windows_cannot_run_ours(backbones):
    with pytest.raises(UnsupportedModel, match="no window attention that mmeff can take over; MaxViT"):
        list(backbones.run(Look(**SMALL, models=("resnet18", "resnet18"), how=(OURS, STOCK)), "v"))


def test_a_size_that_a_model_refuses_is_a_message(backbones):
    with pytest.raises(ValueError, match="refuses pictures of 100 x 100 pixels"):
        list(backbones.run(Look(image=PICTURE, size=100, models=("maxvit_pico_rw_256", "resnet18")), "v"))


# ---------------------------------------------------------------- real models


def test_two_models_look_at_one_picture(backbones):
    steps, sight = last(backbones.run(Look(**SMALL, models=("nat_mini", "resnet18"), batch=2), "v"))
    assert [step.stage for step in steps] == ["loading", "loading", "looking", "looking", "timing"]
    nat, resnet = sight.seen
    assert [shape for _, shape in nat.maps] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert len(resnet.maps) == 5 and nat.maps[0][0].size == (16, 16)
    assert nat.parameters == 19_984_174 and resnet.parameters == 11_689_512
    assert nat.random and nat.classes == () and nat.size == (64, 64)
    low, middle, high = nat.milliseconds[1], nat.milliseconds[0], nat.milliseconds[2]
    assert 0 < low <= middle <= high and sight.rounds >= 3 and "cpu" in sight.environment
    assert nat.speedup == pytest.approx(1 / resnet.speedup, rel=0.5)
    assert sight.to_dict()["models"][0]["random_weights"] is True


def test_multiply_adds_are_those_that_are_published(backbones):
    _, sight = last(backbones.run(Look(image=PICTURE, models=("nat_mini", "resnet18"), batch=0), "v"))
    assert sight.seen[0].gmacs == pytest.approx(2.7, abs=0.05)
    assert sight.seen[1].gmacs == pytest.approx(1.8, abs=0.05)
    assert sight.rounds == 0 and sight.seen[0].milliseconds is None


def test_one_model_both_ways_is_the_same_model(backbones):
    look = Look(**SMALL, models=("maxvit_pico_rw_256",) * 2, how=(STOCK, OURS), batch=1)
    _, sight = last(backbones.run(look, "v"))
    assert 0 <= sight.apart < 1e-4
    stock, ours = sight.seen
    assert stock.ran == () and "window attentions by mmeff" in ours.ran[0]
    assert stock.gmacs == pytest.approx(ours.gmacs, rel=0.02)
    page = views_backbones.sight(sight, look)
    assert "of their norm apart" in page and OURS in page


def test_trained_weights_of_the_folder_give_classes(tmp_path):
    torch.manual_seed(1)
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.safetensors")
    trained = Backbones(Settings(backbones=str(tmp_path)), Turns(per_user=2, total=8))
    _, sight = last(trained.run(Look(**SMALL, models=("resnet18", "resnet34"), batch=0), "v"))
    with_weights, without = sight.seen
    assert not with_weights.random and len(with_weights.classes) == 5 and without.classes == ()
    assert 0 < sum(p for _, p in with_weights.classes) <= 1
    assert "resnet34" in trained.note(("resnet18", "resnet34")) and "resnet18," not in trained.note(
        ("resnet18", "resnet34")
    )
    assert trained.note(("resnet18",)) == ""


def test_the_folder_of_checkpoints_must_be_there():
    with pytest.raises(ValueError, match="backbones must be a folder of checkpoints, and /nowhere is no folder"):
        Settings(backbones="/nowhere")


def test_a_broken_checkpoint_is_a_message(tmp_path):
    save_file({"nothing": torch.zeros(1)}, tmp_path / "nat_mini.safetensors")
    broken = Backbones(Settings(backbones=str(tmp_path)), Turns(per_user=2, total=8))
    with pytest.raises(ValueError, match="Missing"):
        list(broken.run(Look(**SMALL, models=("nat_mini", "resnet18"), batch=0), "v"))


def test_cancelling_stops_before_the_next_model(backbones):
    run = backbones.run(Look(**SMALL, models=("nat_mini", "resnet18")), "other")
    next(run)
    assert backbones.turns.cancel("other") == 1
    with pytest.raises(Cancelled):
        list(run)
    assert backbones.turns.waiting == 0


def test_only_a_few_models_stay_in_memory(backbones):
    for size in (64, 72, 80, 88, 96, 104):
        backbones._model("resnet10t", size, STOCK)
    assert len(backbones._models) == 4


# ---------------------------------------------------------------- maps as pictures


def test_maps_are_drawn_by_directions_or_strength():
    values = torch.zeros(8, 4, 6)
    values[0, :, 3:] = 5.0
    for coloured in (DIRECTIONS, STRENGTH):
        image = _drawn(values, coloured)
        assert image.size == (6, 4) and image.getpixel((0, 0)) != image.getpixel((5, 0))
    assert _drawn(values[:2], DIRECTIONS).mode == "RGB", "two channels make a picture too"
    assert _drawn(values, DIRECTIONS).tobytes() == _drawn(values, DIRECTIONS).tobytes()


# ---------------------------------------------------------------- the page


def seen(**fields):
    tiny = Image.new("RGB", (4, 4))
    return Seen(**{"name": "<b>m</b>", "how": STOCK, "random": True, "classes": (), "size": (64, 64), "parameters": 1000, "gmacs": 1.0,
                   "image": tiny, "maps": ((tiny, (8, 4, 4)),), **fields})  # fmt: skip


class Scripted:
    def __init__(self, *news):
        self.news = news

    def note(self, names):
        return f"Random weights: {', '.join(names)}. No classes"

    def run(self, look, user):
        yield from self.news


def panel_on(service):
    with gr.Blocks():
        panel = Panel(SimpleNamespace(backbones=service), Page(Settings()))
        panel.draw()
        panel.wire()
    return panel


REQUEST = SimpleNamespace(session_hash="me")


def test_the_page_says_that_weights_are_random_and_escapes_names():
    sight = Sight(seen=(seen(), seen(random=False, classes=(("<i>cat", 0.5),))), batch=1, rounds=0)
    page = views_backbones.sight(sight, Look(image=None, models=("m", "m")))
    assert "No classes: the weights are random" in page and "&lt;i&gt;cat" in page
    assert "<b>m</b>" not in page and "<i>cat" not in page and page.count("<img") == 4
    assert "Random weights" in panel_on(Scripted()).warn("<u>", "b") and "<u>" not in panel_on(Scripted()).warn(
        "<u>", "b"
    )


def test_the_page_shows_where_a_run_is_and_then_both_models(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    PICTURE.save(tmp_path / "p.png")
    sight = Sight(
        seen=(seen(milliseconds=(10.0, 9.0, 11.0), speedup=0.5), seen(milliseconds=(5.0, 4.0, 6.0), speedup=2.0)),
        batch=1,
        rounds=9,
    )
    panel = panel_on(Scripted(At(stage="looking", model="nat_mini"), sight))
    asked = ("nat_mini", "resnet18", STOCK, STOCK, 0, 1, DIRECTIONS)
    _, looking, done = panel.look(REQUEST, str(tmp_path / "p.png"), *asked)
    assert "nat_mini: looks at the picture" in looking[panel.progress]
    assert 'mm-loss">0.50' in done[panel.result] and "medians of 9 rounds" in done[panel.result]
    with pytest.raises(MediaError, match="uploaded here"):
        list(panel.look(REQUEST, "/etc/passwd", *asked))


def test_the_pairs_to_try_can_be_built(backbones):
    for first, how, second, other in PAIRS.values():
        Look(image=PICTURE, models=(first, second), how=(how, other)).check()
        assert {first, second} <= set(backbones.names())
