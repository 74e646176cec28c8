"""Runs: what they yield, what they leave, and what keeps visitors apart. On the embedded model, with few steps."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import small_flux
import small_ltx
import yaml
from diffusers import LTXImageToVideoPipeline
from PIL import Image

from demos.kept import DenseRuns
from demos.models import Offer
from demos.presets import SIZES, preset
from demos.service import Service
from demos.settings import Settings
from demos.turns import Busy
from demos.wishes import Progress, Result, Wish
from mmeff.pipelines import Cancelled, Clip, Recipe, VideoGenerator, repeat
from mmeff.registry import build

FEW = {**SIZES["tiny-video"], "num_inference_steps": 4}


@pytest.fixture(scope="module")
def service():
    made = Service(Settings(models=("tiny-video",), per_user=2, queue=3))
    yield made
    made.close()


def method(name="radial", **fields):
    return build(name, **{**preset("tiny-video", name), "dense_steps": 1, **fields})


def wish(prompt="a red square moving left", *methods, **fields):
    return Wish(**{"model": "tiny-video", "prompt": prompt, "methods": methods or (method(),), "sizes": FEW, **fields})


def run(service, asked, user="me"):
    *progress, result = service.generating.run(asked, user)
    assert isinstance(result, Result) and all(isinstance(one, Progress) for one in progress)
    return progress, result


def frames(result, name):
    return np.asarray(result.run.data["frames"][name])


def test_a_run_from_waiting_to_files(service, tmp_path):
    both = (method(), method("gna"))
    progress, result = run(service, wish("a cyan ring moving down", *both, seed=5))
    stages = list(dict.fromkeys((one.stage, one.variant) for one in progress))
    assert stages[0] == ("waiting", "") and stages[-1] == ("measuring", "")
    assert [one for one in stages if one[0] == "running"] == [("running", name) for name in ("dense", "radial", "gna")]
    steps = [(one.step, one.steps) for one in progress if one.stage == "running" and one.variant == "gna"]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]

    dense, radial, gna = result.variants
    assert [v.name for v in result.variants] == ["dense", "radial", "gna"]
    assert dense.speedup == 1 and dense.earlier is None and dense.dense_steps == dense.steps == 4
    assert radial.dense_steps == 1 and radial.speedup == pytest.approx(dense.seconds / radial.seconds)
    assert 0.4 < radial.density < 0.6 and radial.predicted > 1 and 10 < radial.psnr < 60 and 0 < radial.ssim < 1
    assert result.note.startswith("a tiny model") and result.frames == 17 and result.size == (48, 48)
    json.dumps(result.to_dict())

    folder = result.run.folder
    assert {address.rsplit("/", 1)[1] for v in result.variants for address in v.files.values()} == {
        "dense.mp4", "dense.yaml", "radial.mp4", "radial.yaml", "radial-config.yaml", "radial-difference.mp4",
        "dense-and-radial.mp4", "gna.mp4", "gna.yaml", "gna-config.yaml", "gna-difference.mp4", "dense-and-gna.mp4",
    }  # fmt: skip
    assert service.runs.file(result.run.name, "radial.mp4") == folder / "radial.mp4"
    assert service.runs.file(result.run.name, "radial.npy") is None  # the exact frames are not published
    assert build(folder / "gna-config.yaml") == both[1]
    assert np.array_equal(repeat(folder / "radial.yaml").frames, frames(result, "radial"))

    for name in ("radial", "gna"):
        pair = service.generating.frames(result.run.name, name, 8)
        assert np.array_equal(pair[0], frames(result, "dense")[8]) and np.array_equal(pair[1], frames(result, name)[8])
        assert service.generating.difference(result.run.name, name, 16).width > 100
        assert service.generating.schedule(result.run.name, name).width > 100
    for bad in (("dense", 0), ("other", 0), ("gna", 17), ("gna", -1), ("gna", 0.5)):
        with pytest.raises(ValueError, match=r"variant must be one of radial, gna|frame must be in"):
            service.generating.frames(result.run.name, *bad)
    with pytest.raises(ValueError, match="this result is not kept any more"):
        service.generating.frames("../..", "gna", 0)


def test_dense_is_made_once_and_said_to_be_earlier(service):
    first = run(service, wish("a blue square moving up"))[1]
    progress, again = run(service, wish("a blue square moving up", method("slidingtile")))
    assert again.variants[0].earlier > 0 and again.variants[0].seconds == first.variants[0].seconds
    assert not any(one.variant == "dense" for one in progress)
    assert np.array_equal(frames(again, "dense"), frames(first, "dense"))
    for other in (
        wish("a blue square moving up", seed=1),
        wish("a blue square moving up", sizes={**FEW, "num_inference_steps": 3}),
    ):
        assert run(service, other)[1].variants[0].earlier is None


def test_warm_up_happens_once_for_a_method_and_size(service):
    run(service, wish("a red ring moving left"))  # dense is warm now, whichever test came before
    asked = wish("a red ring moving left", method(decay=0.3))
    assert [one.variant for one in run(service, asked)[0] if one.stage == "warming up"] == ["radial"]
    assert [one.variant for one in run(service, asked)[0] if one.stage == "warming up"] == []


def test_plans(service):
    plans = service.generating.plan(wish("", method(), method(decay=0.5)))
    assert list(plans) == ["radial decay=0.2", "radial decay=0.5"]
    assert all(0 < plan.density <= 1 and plan.predicted_speedup for plan in plans.values())
    with pytest.raises(ValueError, match=r"would accelerate nothing here: nothing would run: SlidingTile.window"):
        run(service, wish("a red square moving left", build("slidingtile")))


def test_visitors_at_once_get_what_they_get_alone(service):
    asked = {
        "one": wish("a red square moving left", method(), seed=1), "two": wish("a blue ring moving up", method("gna"), seed=2),
        "three": wish("a green cross moving down", method("vmoba"), seed=3),
    }  # fmt: skip
    found, errors = {}, []

    def visit(user):
        try:
            found[user] = run(service, asked[user], user)[1]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=visit, args=(user,)) for user in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for user, one in asked.items():
        name = one.methods[0].name()
        alone = run(service, one, user)[1]
        assert found[user].prompt == one.prompt and list(found[user].reports) == [name]
        for variant in ("dense", name):
            assert np.array_equal(frames(found[user], variant), frames(alone, variant))


@pytest.mark.parametrize("variant", ["dense", "radial"])
def test_cancel_between_steps(service, variant):
    asked = wish("a white square moving right", seed=9 + (variant == "dense"), sizes={**FEW, "num_inference_steps": 12})
    with pytest.raises(Cancelled, match=r"cancelled after step [2-6] of 12"):
        for news in service.generating.run(asked, "me"):
            if news.stage == "running" and news.variant == variant and news.step == 2:
                assert service.cancel("another") == 0 and service.cancel("me") == 1
    assert service.turns.waiting == 0 and service.models.load(service.models.offers["tiny-video"]).handle is None


def test_a_reader_that_leaves_cancels(service):
    news = service.generating.run(wish("a red cross moving right", seed=77), "me")
    for one in news:
        if one.stage == "running":
            break
    assert service.turns.waiting == 1
    news.close()
    assert service.turns.waiting == 0


@pytest.fixture
def offer_small(service):
    """Offer a small random pipeline as if it had been named when the demo was started."""

    def offer(pipe, kind, **defaults):
        service.models.offers["small"] = Offer(name="small", source="/srv/models/small", kind=kind, embedded=False)
        service.models._loaded["small"] = VideoGenerator(pipe, defaults=defaults)

    yield offer
    service.models.offers.pop("small"), service.models._loaded.pop("small")


def test_a_first_frame_for_models_that_take_one(service, offer_small):
    sizes = {"height": 96, "width": 160, "num_frames": 9, "num_inference_steps": 2}
    offer_small(small_ltx.make_pipe(kind=LTXImageToVideoPipeline), "video", max_sequence_length=16)
    found = service.generating.defaults("small")
    assert found["takes_image"] and found["note"] == ""
    pixels = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 64, 3), np.uint8)) for seed in (1, 2)]
    radial = build("radial", block=4, dense_layers=0, drop_below=8, dense_steps=1)
    one, two = (
        run(service, wish("a red square", radial, model="small", sizes=sizes, image=image))[1] for image in pixels
    )
    assert two.variants[0].earlier is None and not np.array_equal(frames(one, "dense"), frames(two, "dense"))
    start = one.variants[1].files["image"].rsplit("/", 1)[1]
    assert np.array_equal(np.asarray(Image.open(service.runs.file(one.run.name, start))), np.asarray(pixels[0]))
    assert yaml.safe_load((one.run.folder / "radial.yaml").read_text())["image"] == start


def test_pictures(service, offer_small):
    offer_small(small_flux.make_pipe(), "image", max_sequence_length=small_flux.TEXT_TOKENS)
    gna = build("gna", window=(1, 4, 4), tile=(1, 2, 2), dense_steps=1)
    asked = wish("a red circle", gna, model="small", sizes={"height": 48, "width": 64, "num_inference_steps": 3})
    result = run(service, asked)[1]
    assert result.kind == "image" and result.frames == 1 and result.size == (64, 48)
    assert {address.rsplit("/", 1)[1] for v in result.variants for address in v.files.values()} == {
        "dense.png", "dense.yaml", "gna.png", "gna.yaml", "gna-config.yaml", "gna-difference.png",
    }  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(result.run.folder / "gna.png")), frames(result, "gna")[0])
    assert result.variants[1].dense_steps == 1


def test_limits(service):
    held = [service.turns.admit(user) for user in ("me", "me", "you")]
    for one in held:
        one.__enter__()
    try:
        with pytest.raises(Busy, match="you have 2 runs"):
            run(service, wish())
        with pytest.raises(Busy, match="the server has 3 runs"):
            run(service, wish(), "someone")
    finally:
        for one in held:
            one.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 2001}, "at most 2000 characters, got 2001"),
        ({"methods": ()}, "no method is chosen"),
        ({"methods": tuple(method(decay=d) for d in (0.1, 0.2, 0.3, 0.4))}, "at most 3 methods"),
        ({"methods": (method(), method())}, "the same method twice"),
        ({"seed": -1}, "the seed must be a whole number from 0 on, got -1"),
        ({"seed": None}, "the seed must be a whole number"),
        ({"sizes": {"num_inference_steps": 101}}, r"steps must be a whole number in \[1, 100\], got 101"),
        ({"sizes": {"num_frames": 0}}, r"frames must be a whole number in \[1, 161\], got 0"),
        ({"sizes": {"height": 10_000, "width": 10_000}}, "at most 1,638,400 pixels here, got 100,000,000"),
        ({"sizes": {"width": -16}}, "width must be a whole number of pixels"),
        ({"sizes": {"guidance_scale": float("nan")}}, r"guidance must be a number in \[0, 100\], got nan"),
        ({"sizes": FEW | {"height": 50}}, "divisible by 16"),
        ({"sizes": FEW, "methods": (method(dense_steps=9),)}, "dense_steps=9|leaves no layer and step"),
        ({"model": "other"}, "one that this demo offers"),
        ({"image": Image.new("RGB", (48, 48))}, "makes videos from text and takes no image"),
    ],
)
def test_what_cannot_run(service, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(service, wish(**{"prompt": "a red square moving left", **change}) if "methods" not in change else Wish(
            **{"model": "tiny-video", "prompt": "a red square moving left", "sizes": FEW, **change}
        ))  # fmt: skip
    assert service.turns.waiting == 0


def test_defaults_say_what_a_model_takes(service):
    found = service.generating.defaults("tiny-video")
    assert {name: found[name] for name in SIZES["tiny-video"]} == SIZES["tiny-video"]
    assert not found["takes_image"] and not found["needs_image"] and "tiny model" in found["note"]


def test_files_never_name_the_servers_folders(service):
    result = run(service, wish("a red square moving left"))[1]
    for address in result.variants[1].files.values():
        assert "/tmp" not in address and str(result.run.folder.parent) not in address
    text = (result.run.folder / "radial.yaml").read_text()
    assert str(result.run.folder) not in text and yaml.safe_load(text)["model"] == "tiny-video"


def test_the_newest_dense_runs_that_fit_are_kept():
    def clip(frames):
        return Clip(
            frames=np.zeros((frames, 10, 10, 3), np.uint8),
            seconds=1.0,
            recipe=Recipe(model="m", prompt="p", seed=0, fps=8.0),
        )

    kept = DenseRuns(0.001)  # 1000 bytes, 300 of a frame
    for key in "abc":
        kept.put(key, clip(1))
    assert kept.get("a").clip.frames.shape[0] == 1
    kept.put("d", clip(1))
    assert kept.get("b") is None and kept.get("a") and kept.get("d") and len(kept) == 3
    kept.put("large", clip(4))
    assert kept.get("large") is None
