"""VideoGenerator: the stock pipeline's own frames, methods that act, clips that can be made again, and errors before any work."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import small_cogvideox
import small_cosmos
import small_flux
import small_hunyuan_video
import small_ltx
import small_wan
import torch
import yaml
from accelerate import cpu_offload
from diffusers import CogVideoXImageToVideoPipeline, LTXImageToVideoPipeline
from family_checks import RADIAL, WINDOW
from PIL import Image

from mmeff import tiny
from mmeff.errors import MediaError, NothingAccelerated, UnknownMethod, UnsupportedModel
from mmeff.pipelines import Cancelled, Clip, Recipe, VideoGenerator, repeat
from mmeff.video_io import read, to_uint8

SIZES = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
PROMPT, OTHER = "a red circle moving left", "a blue square moving up"
LTX = {"height": 96, "width": 160, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}


def wan(methods=None, **options):
    return VideoGenerator(small_wan.make_pipe(), methods, defaults=SIZES, **options)


def stock(seed, prompt=PROMPT, **call):
    """What the pipeline itself makes."""
    noise = torch.Generator().manual_seed(seed)
    output = small_wan.make_pipe()(prompt, **{**SIZES, **call}, generator=noise, output_type="np")
    return to_uint8(output.frames[0])


def picture(seed=0, height=40, width=64):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------- what is generated


def test_without_methods_the_clip_is_the_stock_pipelines_to_the_bit():
    with wan() as generator:
        clip = generator.generate(PROMPT, seed=3, guidance_scale=3.0)
    assert isinstance(clip, Clip)
    assert np.array_equal(clip.frames, stock(3, guidance_scale=3.0))
    assert clip.frames.shape == (9, 32, 32, 3)
    assert clip.reports == () and clip.seconds > 0


def test_methods_act_and_are_off_for_a_dense_call_and_gone_afterwards():
    pipe = small_wan.make_pipe()
    with VideoGenerator(pipe, [small_wan.SPARSE], defaults=SIZES) as generator:
        assert generator.pipe is pipe
        fast = generator.generate(PROMPT, seed=3)
        assert fast.reports[0].calls["sparse"] == 2 * 2 * small_wan.LAYERS  # steps, guidance branches, layers
        dense = generator.generate(PROMPT, seed=3, dense=True)
        again = generator.generate(PROMPT, seed=3)
        assert again.reports[0].calls == fast.reports[0].calls, "a report is of one call alone"
        generator.handle.enabled = False
        switched = generator.generate(PROMPT, seed=3)
    assert not np.array_equal(fast.frames, dense.frames)
    assert np.array_equal(again.frames, fast.frames)
    assert np.array_equal(dense.frames, stock(3)) and np.array_equal(switched.frames, dense.frames)
    assert dense.reports == switched.reports == () and dense.recipe.methods == switched.recipe.methods == ()
    with VideoGenerator(pipe, defaults=SIZES) as generator:
        assert np.array_equal(generator.generate(PROMPT, seed=3).frames, dense.frames)


def test_use_installs_other_methods():
    with wan("radial") as generator:
        generator.use({**small_wan.SPARSE.to_dict(), "decay": 0.5})
        assert generator.generate(PROMPT).recipe.methods[0]["decay"] == 0.5
        with pytest.raises(UnsupportedModel):
            generator.use("fastv")
        assert generator.methods[0].decay == 0.5, "what cannot be installed must not remove what is"
        generator.use(None)
        assert generator.handle is None and generator.generate(PROMPT).reports == ()


def test_a_batch_makes_the_clips_that_its_prompts_make_alone():
    with wan(small_wan.SPARSE) as generator:
        alone = [generator.generate(text, seed=seed) for text, seed in ((PROMPT, 5), (OTHER, 6))]
        single = generator.generate([PROMPT, OTHER], seed=5, batch_size=1)
        batch = generator.generate((PROMPT, OTHER), seed=[5, 6], negative_prompt=["", ""])
    for a, s, b in zip(alone, single, batch, strict=True):
        assert np.array_equal(a.frames, s.frames)
        assert np.abs(a.frames.astype(int) - b.frames).max() <= 1  # larger products round otherwise
        assert (a.batch, s.batch, b.batch) == (1, 1, 2)
        assert (b.recipe.prompt, b.recipe.seed) == (a.recipe.prompt, a.recipe.seed)
    assert not np.array_equal(batch[0].frames, batch[1].frames)


FAMILIES = {  # Mochi apart, whose small pipeline has no decoder
    "cogvideox": (
        small_cogvideox.make_pipe,
        {**small_cogvideox.plan_sizes((3, 3, 3)), "max_sequence_length": small_cogvideox.TEXT_TOKENS},
    ),
    "hunyuan video": (
        small_hunyuan_video.make_pipe,
        {
            **small_hunyuan_video.plan_sizes((3, 3, 3)),
            "max_sequence_length": small_hunyuan_video.TEXT_TOKENS,
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
    ),
    "ltx": (small_ltx.make_pipe, {"height": 96, "width": 160, "num_frames": 9, "max_sequence_length": 16}),
    "cosmos": (
        small_cosmos.make_pipe,
        {**small_cosmos.sizes(small_cosmos.make_pipe(), (3, 3, 5)), "max_sequence_length": 16},
    ),
    "flux": (
        small_flux.make_pipe,
        {**small_flux.sizes((1, 7, 11)), "max_sequence_length": small_flux.TEXT_TOKENS},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    make, call = FAMILIES[family]
    told = []
    method = WINDOW if family == "flux" else RADIAL  # Radial attends the whole of a single frame
    with VideoGenerator(make(), method, defaults={**call, "num_inference_steps": 2}) as generator:
        clip = generator.generate(PROMPT, seed=1, progress=lambda *step: told.append(step), out=tmp_path / "clip.mp4")
        dense = generator.generate(PROMPT, seed=1, dense=True)
        batch = generator.generate([PROMPT, OTHER], seed=[1, 2])
    assert clip.frames.ndim == 4 and clip.frames.shape == dense.frames.shape and clip.frames.std() > 0
    assert len(clip.frames) == 1 if family == "flux" else len(clip.frames) > 1
    assert clip.reports[0].calls["sparse"] > 0
    assert told == [(PROMPT, 1, 2), (PROMPT, 2, 2)]
    assert [b.frames.shape for b in batch] == [clip.frames.shape] * 2
    again = repeat(tmp_path / "clip.yaml", make())
    assert np.array_equal(again.frames, clip.frames)
    assert again.recipe == clip.recipe


@pytest.mark.parametrize(
    ("kind", "make", "call"),
    [
        (LTXImageToVideoPipeline, small_ltx.make_pipe, LTX),
        (CogVideoXImageToVideoPipeline, small_cogvideox.make_pipe, {**FAMILIES["cogvideox"][1], "num_inference_steps": 2}),
    ],
)  # fmt: skip
def test_image_to_video(kind, make, call, tmp_path):
    config = {"in_channels": 2 * small_cogvideox.LATENT_CHANNELS} if make is small_cogvideox.make_pipe else {}
    pipe = make(kind=kind, **config)
    Image.fromarray(picture(1)).save(tmp_path / "start.png")
    with VideoGenerator(pipe, defaults=call) as generator:
        first = generator.generate(PROMPT, image=tmp_path / "start.png", out=tmp_path / "clip.mp4")
        both = generator.generate([PROMPT, PROMPT], seed=[0, 0], image=[picture(1), Image.fromarray(picture(2))])
    assert np.array_equal(both[0].frames, first.frames) and not np.array_equal(both[1].frames, first.frames)
    (tmp_path / "start.png").unlink()  # a recipe must not depend on where the image was
    recipe = yaml.safe_load((tmp_path / "clip.yaml").read_text())
    assert recipe["image"] == "clip.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "clip.png")), picture(1))
    assert np.array_equal(repeat(tmp_path / "clip.mp4", pipe).frames, first.frames)


def test_a_pipeline_that_is_told_its_rate_is_told_that_of_the_file():
    with VideoGenerator(small_ltx.make_pipe(), defaults={**LTX, "num_inference_steps": 1}) as generator:
        own, slow = generator.generate(PROMPT), generator.generate(PROMPT, fps=6)
        same = generator.generate(PROMPT, frame_rate=6)
    assert (own.fps, own.recipe.settings["frame_rate"]) == (25, 25)  # LTX's own
    assert (slow.fps, slow.recipe.settings["frame_rate"]) == (6, 6) and same.fps == 6
    assert np.array_equal(slow.frames, same.frames) and not np.array_equal(slow.frames, own.frames)


# ---------------------------------------------------------------- files


def test_a_clip_and_its_yaml_each_make_it_again(tmp_path):
    method = {"method": "radial", "block": 6, "drop_below": 8, "dense_steps": 1, "dense_layers": 0}
    with VideoGenerator("tiny-video", method, device="cpu", dtype="float32") as generator:
        clip = generator.generate(PROMPT, seed=11, num_inference_steps=2, fps=12, guidance_scale=3.0)
    assert clip.frames.shape == (17, 48, 48, 3), "the embedded model comes with sizes that suit it"
    clip.save(tmp_path / "clip.mp4")
    recipe = Recipe.read(tmp_path / "clip.yaml")
    assert recipe == Recipe.read(tmp_path / "clip.mp4") == clip.recipe
    assert recipe.methods[0].items() >= method.items() and recipe.methods[0]["decay"] == 0.2, "resolved, not as typed"
    assert recipe.settings.items() >= {"height": 48, "num_inference_steps": 2, "guidance_scale": 3.0}.items()
    assert (recipe.model, recipe.seed, recipe.dtype, recipe.fps) == ("tiny-video", 11, "float32", 12)
    assert recipe.environment["torch"] == version("torch") and "tiny model" in recipe.note
    for file in ("clip.mp4", "clip.yaml"):
        assert np.array_equal(repeat(tmp_path / file, device="cpu").frames, clip.frames)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_the_recipe_changes_no_pixel_of_the_video(suffix, tmp_path):
    import av

    from mmeff.video_io import write

    frames = np.stack([picture(i, 31, 50) for i in range(7)])
    recipe = Recipe(model="", prompt="“é” ☃\nend", seed=2**63 - 1, fps=12.5, settings={"guidance_scale": 0.1})
    Clip(frames=frames, seconds=1.0, recipe=recipe).save(tmp_path / f"a{suffix}")
    write(tmp_path / f"b{suffix}", frames, fps=12.5)
    a, b = read(tmp_path / f"a{suffix}"), read(tmp_path / f"b{suffix}")
    assert np.array_equal(a.frames, b.frames) and np.array_equal(a.timestamps, b.timestamps) and a.fps == b.fps
    assert Recipe.read(tmp_path / f"a{suffix}") == recipe
    with av.open(str(tmp_path / f"a{suffix}")) as container:
        tags = {k.lower(): v for k, v in container.metadata.items()}
    assert tags["title"] == recipe.prompt and json.loads(tags["comment"])["seed"] == 2**63 - 1
    assert {f.name for f in tmp_path.iterdir()} == {f"a{suffix}", "a.yaml", f"b{suffix}"}


def test_clips_are_saved_as_soon_as_they_are_made(tmp_path):
    asked = []

    def cancel():
        asked.append(sorted(f.name for f in tmp_path.iterdir()))
        return len(asked) > 4

    with wan() as generator, pytest.raises(Cancelled) as stopped:
        generator.generate(
            [PROMPT, OTHER, PROMPT], batch_size=1, out=[tmp_path / f"{i}.mp4" for i in range(3)], cancel=cancel
        )
    assert asked == [[], [], ["0.mp4", "0.yaml"], ["0.mp4", "0.yaml"], ["0.mp4", "0.yaml", "1.mp4", "1.yaml"]]
    assert [clip.recipe.prompt for clip in stopped.value.done] == [PROMPT, OTHER]


def test_a_recipe_that_cannot_be_used(tmp_path):
    (tmp_path / "x.yaml").write_text("method: radial\n")
    with pytest.raises(ValueError, match=r"x\.yaml is no recipe of a clip"):
        repeat(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("mmeff: generate\nmodel: m\nprompt: p\nseed: 1\nfps: 8\nsteps: 3\n")
    with pytest.raises(TypeError, match="has no field 'steps'"):
        repeat(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("mmeff: generate\nmodel: m\nfps: 8\n")
    with pytest.raises(ValueError, match="got none of prompt, seed"):
        repeat(tmp_path / "x.yaml")
    with pytest.raises(MediaError, match="holds no recipe"):
        repeat(tiny.data_folder() / "samples" / "clip-1.mp4")
    (tmp_path / "x.mp4").write_text("not a video")
    with pytest.raises(MediaError, match=r"x\.mp4 cannot be read"):
        repeat(tmp_path / "x.mp4")
    with pytest.raises(FileNotFoundError, match="no video at"):
        repeat(tmp_path / "missing.mp4")
    with wan() as generator:
        generator.generate(PROMPT, out=tmp_path / "y.mp4")
    with pytest.raises(ValueError, match="built in memory and has no name; pass model="):
        repeat(tmp_path / "y.mp4")


# ---------------------------------------------------------------- a run that ends early


def test_cancelled_within_a_generation_the_next_one_is_untouched():
    told = []
    with wan(small_wan.SPARSE) as generator:
        whole = generator.generate(PROMPT, seed=3, num_inference_steps=3)
        with pytest.raises(Cancelled, match="after step 2 of 3"):
            generator.generate(
                PROMPT, seed=3, num_inference_steps=3, progress=lambda *step: told.append(step[1:]), cancel=lambda: len(told) == 2
            )  # fmt: skip
        assert told == [(1, 3), (2, 3)]
        assert np.array_equal(generator.generate(PROMPT, seed=3, num_inference_steps=3).frames, whole.frames)


def test_progress_counts_over_all_calls():
    told = []
    with wan() as generator:
        generator.generate([PROMPT, OTHER], batch_size=1, progress=lambda *step: told.append(step))
    assert told == [(PROMPT, 1, 4), (PROMPT, 2, 4), (OTHER, 3, 4), (OTHER, 4, 4)]


def test_a_method_that_never_acts_stops_the_job_after_one_call(tmp_path):
    calls = []
    with wan(small_wan.SPARSE.replace(dense_steps=2)) as generator, pytest.raises(NothingAccelerated, match="radial"):
        generator.generate([PROMPT, OTHER], batch_size=1, progress=lambda *step: calls.append(step), out=[
            tmp_path / "a.mp4", tmp_path / "b.mp4"])  # fmt: skip
    assert len(calls) == 2, "the second prompt must not be run"
    assert not list(tmp_path.iterdir())


def test_one_run_at_a_time_and_none_after_closing():
    found = []
    with wan() as generator:

        def second():
            try:
                found.append(generator.generate(OTHER))
            except RuntimeError as error:
                found.append(error)

        def other(*step):
            if not found:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

        generator.generate(PROMPT, progress=other)
    assert "running already" in str(found[0])
    with pytest.raises(RuntimeError, match="closed"):
        generator.generate(PROMPT)
    assert "closed" in repr(generator)


# ---------------------------------------------------------------- mistakes, before anything runs


@pytest.mark.parametrize(
    ("prompt", "call", "error", "message"),
    [
        (None, {}, TypeError, "a prompt must be a text or a list of texts, got NoneType"),
        ({"a": 1}, {}, TypeError, "got dict"),
        (b"a", {}, TypeError, "got bytes"),
        ([], {}, ValueError, "the list of prompts is empty"),
        (["a", 3], {}, TypeError, "prompt 1 must be a text, got 3"),
        ([PROMPT, " "], {}, ValueError, "prompt 1 must be a text that is not empty"),
        (PROMPT, {"image": picture()}, TypeError, "WanPipeline makes videos from text and takes no image"),
        (PROMPT, {"hieght": 64}, TypeError, "WanPipeline has no setting 'hieght'. Did you mean 'height'"),
        (PROMPT, {"generator": 1}, TypeError, "generator cannot be set for WanPipeline: pass seed"),
        (PROMPT, {"num_videos_per_prompt": 2}, TypeError, "pass a list of prompts"),
        (PROMPT, {"latents": 1}, TypeError, "call the stock pipeline, `generator.pipe`"),
        (PROMPT, {"attention_kwargs": torch.ones(1)}, TypeError, "attention_kwargs must be a number, a text"),
        (PROMPT, {"num_inference_steps": 0}, ValueError, "num_inference_steps must be an int >= 1, got 0"),
        (PROMPT, {"height": 48.0}, ValueError, "height must be an int >= 1, got 48.0"),
        (PROMPT, {"seed": -1}, ValueError, "seed must be an int in"),
        (PROMPT, {"seed": True}, ValueError, "seed must be an int in"),
        ([PROMPT] * 2, {"seed": [1]}, ValueError, "seed must have one value per prompt, got 1 for 2 prompts"),
        ([PROMPT] * 2, {"negative_prompt": ["a", None]}, TypeError, "negative_prompt 1 must be a text"),
        (PROMPT, {"fps": 0}, ValueError, "fps must be a positive number"),
        (PROMPT, {"batch_size": 0}, ValueError, "batch_size must be an int >= 1"),
        (PROMPT, {"out": "clip.gif"}, ValueError, "must end in .mp4, .mov, .mkv"),
        (PROMPT, {"out": "clip.png"}, ValueError, "WanPipeline makes videos; name it .mp4"),
        (PROMPT, {"out": "/no/such/folder/v.mp4"}, PermissionError, "is missing or not writable"),
        ([PROMPT] * 2, {"out": "v.mp4"}, ValueError, "out must be a list with one value per prompt"),
        ([PROMPT] * 2, {"out": ["v.mp4"] * 2}, ValueError, "names the same file twice"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(prompt, call, error, message, monkeypatch, tmp_path, text_to_video):
    monkeypatch.chdir(tmp_path)
    before = text_to_video.ran
    with pytest.raises(error) as raised:
        text_to_video.generator.generate(prompt, **call)
    assert message in str(raised.value)
    assert text_to_video.ran == before and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def text_to_video():
    """A generator, and how often its transformer ran."""
    pipe = small_wan.make_pipe()
    found = SimpleNamespace(generator=VideoGenerator(pipe, defaults=SIZES), ran=0)

    def count(*_):
        found.ran += 1

    pipe.transformer.register_forward_pre_hook(count)
    found.generator.generate(PROMPT)
    assert found.ran == 4, "the counter counts"
    return found


def test_mistakes_with_images(tmp_path):
    with VideoGenerator(small_ltx.make_pipe(kind=LTXImageToVideoPipeline), defaults=LTX) as generator:
        with pytest.raises(MediaError, match=r"missing\.png"):
            generator.generate(PROMPT, image=tmp_path / "missing.png")
        with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\), got float32 \(4, 4, 3\)"):
            generator.generate(PROMPT, image=np.zeros((4, 4, 3), np.float32))
        with pytest.raises(TypeError, match="image 1 must be a path, a PIL image or a uint8 array"):
            generator.generate([PROMPT] * 2, image=[picture(), 3])
        with pytest.raises(ValueError, match="image must have one value per prompt, got 1 for 2 prompts"):
            generator.generate([PROMPT] * 2, image=[picture()])
        with pytest.raises(ValueError, match="leave batch_size=2 out"):
            generator.generate([PROMPT] * 2, image=picture(), batch_size=2)
        with pytest.raises(ValueError, match="fps and frame_rate are one setting"):
            generator.generate(PROMPT, image=picture(), fps=8, frame_rate=8)
    pipe = small_cogvideox.make_pipe(kind=CogVideoXImageToVideoPipeline)
    with VideoGenerator(pipe) as generator, pytest.raises(TypeError, match="from an image and a text; pass image="):
        generator.generate(PROMPT)


def test_mistakes_when_it_is_made(tmp_path):
    pipe = small_wan.make_pipe()
    with pytest.raises(UnknownMethod, match="Did you mean 'Radial'"):
        VideoGenerator("/no/such/model", "radail")  # before the model is looked for
    with pytest.raises(UnsupportedModel, match="tiny-vlm is a vision-language model and makes no videos"):
        VideoGenerator("tiny-vlm", device="cpu")
    with pytest.raises(TypeError, match="device and dtype can be chosen for a model that is loaded by name"):
        VideoGenerator(pipe, device="cpu", dtype="float32")
    with pytest.raises(TypeError, match="needs a name or a diffusers pipeline, got Linear"):
        VideoGenerator(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="no setting 'hight'"):
        VideoGenerator(pipe, small_wan.SPARSE, defaults={"hight": 1})
    with pytest.raises(UnsupportedModel, match="fastv"):
        VideoGenerator(pipe, [small_wan.SPARSE, "fastv"])
    with VideoGenerator(pipe, small_wan.SPARSE):  # nothing of those was left on the pipeline
        pass


def test_no_code_of_a_repository_runs(tmp_path):
    (tmp_path / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Custom: pass\n")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": ["custom", "Custom"], "_diffusers_version": "0.42"})
    )
    with pytest.raises((ValueError, OSError)):
        VideoGenerator(str(tmp_path), device="cpu")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- memory


def test_offload_needs_somewhere_to_move_weights_from(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind in ("model", "sequential", "group"):
        with pytest.raises(
            ValueError, match=f"offload='{kind}' moves weights from a GPU to the CPU, and this runs on the CPU"
        ):
            wan(offload=kind)
    with pytest.raises(ValueError, match="offload must be one of none, model, group, sequential, got 'all'"):
        wan(offload="all")
    with pytest.raises(ValueError, match="offload_options are for offload='group'"):
        wan(offload_options={"use_stream": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TypeError, match="group offload has no setting 'use_streams'"):
        wan(offload="group", offload_options={"use_streams": True})
    with pytest.raises(TypeError, match="offload_to_disk_path cannot be set for group offload"):
        wan(offload="group", offload_options={"offload_to_disk_path": "weights"})


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offload_is_the_pipelines_own(kind, monkeypatch):
    """Without a GPU only what is asked of the pipeline can be seen."""
    pipe, asked = small_wan.make_pipe(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(pipe, name, lambda name=name, **given: asked.append((name, given)))

    def group(self, onload_device, offload_type="block_level", use_stream=False):
        asked.append(("group", {"device": onload_device, "offload_type": offload_type, "use_stream": use_stream}))

    monkeypatch.setattr(pipe, "enable_group_offload", group.__get__(pipe))
    VideoGenerator(pipe, offload=kind, offload_options={"use_stream": True} if kind == "group" else None).close()
    assert (
        asked
        == {
            "model": [("enable_model_cpu_offload", {"device": "cuda"})],
            "sequential": [("enable_sequential_cpu_offload", {"device": "cuda"})],
            "group": [("group", {"device": torch.device("cuda"), "offload_type": "leaf_level", "use_stream": True})],
        }[kind]
    )


def own_parts():
    """Parts that no other test uses: the hooks of offloading stay on them."""
    return {name: copy.deepcopy(part) for name, part in small_wan.shared_parts().items()}


HOOKS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    # not the text encoder, whose tied embeddings accelerate cannot put back on the CPU
    "sequential": lambda pipe: [cpu_offload(part, torch.device("cpu")) for part in (pipe.transformer, pipe.vae)],
    "group": lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_methods_act_under_the_hooks_of_offloading(kind):
    """From CPU to CPU, so that the hooks are there while nothing moves; a run that is cancelled frees them too."""
    with wan(small_wan.SPARSE) as generator:
        whole = generator.generate(PROMPT, seed=3)
    pipe, freed = small_wan.make_pipe(**own_parts()), []
    HOOKS[kind](pipe)
    with VideoGenerator(pipe, small_wan.SPARSE, defaults=SIZES) as generator:
        clip = generator.generate(PROMPT, seed=3)
        generator.offload = kind
        pipe.maybe_free_model_hooks = lambda: freed.append(kind)
        with pytest.raises(Cancelled):
            generator.generate(PROMPT, seed=3, cancel=iter((False, True)).__next__)
    assert clip.reports[0].calls["sparse"] > 0
    assert np.array_equal(clip.frames, whole.frames)
    assert freed == (["model"] if kind == "model" else [])


def test_importing_the_package_stays_light():
    code = "import sys, mmeff.pipelines; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    import mmeff.pipelines

    with pytest.raises(AttributeError, match="no attribute 'VideoGen'"):
        mmeff.pipelines.VideoGen  # noqa: B018
