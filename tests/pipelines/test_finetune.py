"""Fine-tuning learns, resumes, leaves the pipeline as it says, writes what loads again, and refuses what it cannot do."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mmeff
from mmeff import tiny, training, video_io
from mmeff.errors import BackendUnavailable, MediaError, NothingAccelerated, UnsupportedModel
from mmeff.pipelines import finetune as finetune_module
from mmeff.pipelines import finetune_models
from mmeff.pipelines.finetune import ADAPTER, FinetuneRecipe, _mix, finetune, held_out_loss
from mmeff.pipelines.finetune_data import ClipSize, GeneratedClips, VideoFolder, read_clip
from mmeff.registry import build
from mmeff.tiny import clips, codec, video_model

RADIAL = build("radial", block=12, drop_below=32, dense_steps=0, dense_layers=0)
SHORT = FinetuneRecipe(
    method=RADIAL, lora_rank=4, steps=4, batch=2, lr=3e-3, warmup=1, frames=5, height=48, width=48, text_tokens=8,
    held_out=2, held_out_levels=2, held_out_every=2, checkpoint_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def embedded():
    return tiny.video_pipeline()


@pytest.fixture
def pipeline(embedded):
    """The tiny pipeline with a transformer of its own, so that a test may ruin it."""
    fresh = copy.copy(embedded)
    fresh.transformer = copy.deepcopy(embedded.transformer)
    return fresh


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def progress(now, steps, row):
        if now >= step and "held_out" in row and now:
            raise Interrupted

    return progress


def weights(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


# -------------------------------------------------------------------- learning


def test_an_adapter_lowers_the_held_out_loss_on_longer_clips(pipeline, tmp_path):
    recipe = replace(SHORT, frames=clips.stretched(4), steps=6, lora_rank=16, lr=5e-3, held_out_every=100)
    done = finetune(pipeline, GeneratedClips(), recipe, tmp_path)
    assert [step for step, _ in done.held_out] == [0, 6]
    assert done.final < 0.95 * done.untuned  # it falls by a tenth
    assert 0.2 < done.report["density"] < 0.3
    assert not done.report["fallbacks"]
    assert done.report["calls"]["dense"] == 0


def test_velocity_and_mixture_are_the_schedulers(embedded):
    """`_mix` against diffusers' own forward process, and the velocity against the derivative of it."""
    scheduler = video_model.scheduler()
    scheduler.set_timesteps(10)
    x, noise = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2)
    sigmas = scheduler.sigmas[[1, 4, 8]]
    level = sigmas / (video_model.SHIFT - (video_model.SHIFT - 1) * sigmas)  # undo the shift, which `_mix` applies
    mixed, target, sigma = _mix(x, noise, level.numpy(), finetune_models.trainable(embedded).shift)
    torch.testing.assert_close(sigma, sigmas)
    torch.testing.assert_close(mixed, scheduler.scale_noise(x, scheduler.timesteps[[1, 4, 8]], noise))
    later = _mix(x, noise, level.numpy(), 3.0)[0] + 0.1 * target
    torch.testing.assert_close(later, (sigmas + 0.1).view(3, 1, 1, 1, 1) * (noise - x) + x)


def test_held_out_loss_is_the_same_for_every_recipe(pipeline):
    model, data = finetune_models.trainable(pipeline), GeneratedClips()
    data.prepare(model, SHORT.size, 3, None)
    one = held_out_loss(model, data.held_out(), SHORT)
    other = replace(SHORT, seed=5, batch=5, lr=1.0, shift=7.0, sigma_std=3.0, method=None)
    assert held_out_loss(model, data.held_out(), other) == pytest.approx(one, rel=1e-5)
    with mmeff.accelerate(pipeline.transformer, replace(RADIAL, decay=0.0, drop_below=4096)):
        assert held_out_loss(model, data.held_out(), SHORT) != pytest.approx(one, rel=1e-3)


def test_a_run_resumes_to_the_same_weights(pipeline, tmp_path):
    straight = finetune(copy.deepcopy(pipeline), GeneratedClips(), SHORT, tmp_path / "a")
    with pytest.raises(Interrupted):
        finetune(pipeline, GeneratedClips(), SHORT, tmp_path / "b", progress=interrupt_at(2))
    assert not (tmp_path / "b" / "result").exists()
    resumed = finetune(pipeline, GeneratedClips(), SHORT, tmp_path / "b")
    for name, value in weights(straight.folder).items():
        torch.testing.assert_close(weights(resumed.folder)[name], value, atol=1e-6, rtol=0, msg=name)
    assert dict(resumed.held_out) == pytest.approx(dict(straight.held_out))
    assert resumed.final == pytest.approx(straight.final)


def test_an_interruption_takes_everything_off(pipeline, tmp_path):
    before = copy.deepcopy(pipeline.transformer.state_dict())
    with pytest.raises(Interrupted):
        finetune(pipeline, GeneratedClips(), SHORT, tmp_path, progress=interrupt_at(2))
    net = pipeline.transformer
    assert ADAPTER not in getattr(net, "peft_config", {})
    assert all("lora" not in name for name, _ in net.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert {type(p).__name__ for p in net.attn_processors.values()} == {"WanAttnProcessor"}
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", [RADIAL, build("vmoba", chunks=((1,), (3, 3)), dense_steps=0)])
def test_checkpointed_activations_change_no_weight(pipeline, tmp_path, method):
    """The blocks are recomputed under the method: dense recomputation would give other gradients, or an error."""
    recipe = replace(SHORT, method=method, steps=2, frames=clips.stretched(1))
    plain = finetune(copy.deepcopy(pipeline), GeneratedClips(), recipe, tmp_path / "a")
    again = finetune(pipeline, GeneratedClips(), replace(recipe, gradient_checkpointing=True), tmp_path / "b")
    for name, value in weights(plain.folder).items():
        torch.testing.assert_close(weights(again.folder)[name], value, atol=1e-6, rtol=0, msg=name)
    assert not pipeline.transformer.is_gradient_checkpointing
    assert not again.report["fallbacks"]


def test_checkpointing_that_was_on_is_replaced_and_put_back(pipeline, tmp_path):
    pipeline.transformer.enable_gradient_checkpointing()
    done = finetune(pipeline, GeneratedClips(), replace(SHORT, steps=1), tmp_path)
    assert not done.report["fallbacks"]
    assert pipeline.transformer.is_gradient_checkpointing


def test_accumulated_parts_are_averaged(pipeline, tmp_path, monkeypatch):
    """Three forwards of the same clips are one step with the gradient of one forward."""
    original = finetune_module._batch
    monkeypatch.setattr(finetune_module, "_batch", lambda model, data, recipe, part: original(model, data, recipe, 0))
    rows = {}
    for parts in (1, 3):
        recipe = replace(SHORT, accumulate=parts, steps=1)
        finetune(copy.deepcopy(pipeline), GeneratedClips(), recipe, tmp_path / str(parts))
        rows[parts] = next(row for row in training.logged(tmp_path / str(parts)) if "loss" in row)
    assert rows[3]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[3]["norm"] == pytest.approx(rows[1]["norm"], rel=1e-4)


# -------------------------------------------------------------------- what is written


def test_the_adapter_loads_again(embedded, pipeline, tmp_path):
    done = finetune(pipeline, GeneratedClips(), replace(SHORT, lora_alpha=8), tmp_path / "work", out=tmp_path / "out")
    files = {p.name for p in done.folder.iterdir()}
    assert files == {
        "pytorch_lora_weights.safetensors", "method.yaml", "log.jsonl", "curve.png", "README.md", "finetune.json",
    }  # fmt: skip
    fresh = copy.copy(embedded)
    fresh.transformer = copy.deepcopy(embedded.transformer)
    fresh.load_lora_weights(str(done.folder))
    model, data = finetune_models.trainable(fresh), GeneratedClips()
    data.prepare(model, SHORT.size, SHORT.held_out, None)
    with mmeff.accelerate(fresh.transformer, str(done.folder / "method.yaml")):
        assert held_out_loss(model, data.held_out(), SHORT) == pytest.approx(done.final, rel=1e-5)
    card = (done.folder / "README.md").read_text()
    assert "radial" in card and tiny.NOTE in card and f"{done.final:.5f}" in card
    assert json.loads((done.folder / "finetune.json").read_text())["held_out"]["tuned"] == done.final
    pipeline.unload_lora_weights()  # the pipeline was left tuned
    assert not getattr(pipeline.transformer, "peft_config", {})


def test_full_training_writes_a_transformer_that_loads_again(pipeline, tmp_path):
    from diffusers import WanTransformer3DModel

    recipe = replace(SHORT, lora_rank=0, method=None, steps=2)
    done = finetune(pipeline, GeneratedClips(), recipe, tmp_path)
    assert not (done.folder / "method.yaml").exists()
    fresh = copy.copy(pipeline)
    fresh.transformer = WanTransformer3DModel.from_pretrained(done.folder, subfolder="transformer")
    assert video_model.attach_if_present(fresh, done.folder)
    model, data = finetune_models.trainable(fresh), GeneratedClips()
    data.prepare(model, SHORT.size, SHORT.held_out, None)
    # the position table travels as float16
    assert held_out_loss(model, data.held_out(), recipe) == pytest.approx(done.final, rel=1e-3)


# -------------------------------------------------------------------- clips


@pytest.fixture
def folder(tmp_path):
    """Four videos of 7 frames with captions; the third is larger than a clip."""
    videos, labels = clips.sample(9, 0, 4, frames=7)
    rows = []
    for i, (video, text) in enumerate(zip(videos, labels.prompts(), strict=True)):
        frames = (video * 255).round().astype(np.uint8)
        if i == 2:
            frames = frames.repeat(2, axis=1).repeat(3, axis=2)
        video_io.write(tmp_path / f"{i}.mp4", frames, fps=8)
        rows.append(json.dumps({"file": f"{i}.mp4", "text": text}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_training_on_a_folder_of_videos(pipeline, folder, tmp_path):
    done = finetune(pipeline, VideoFolder(folder), replace(SHORT, steps=2, held_out=1), tmp_path / "work")
    assert np.isfinite(done.final)
    assert len(list((tmp_path / "work" / "encoded").iterdir())) == 4
    assert done.data["videos"] == 4


def test_latents_of_a_folder_are_the_vaes(pipeline, folder, tmp_path):
    """Against the tiny codec's own formula; the video format rounds colours."""
    data, model = VideoFolder(folder), finetune_models.trainable(pipeline)
    data.prepare(model, SHORT.size, 2, tmp_path / "work")
    latents, texts = data.held_out()
    direct = codec.pack(torch.stack([read_clip(folder / f"{i}.mp4", SHORT.size) for i in (2, 3)]))
    torch.testing.assert_close(latents, direct, atol=2e-3, rtol=0)
    assert texts == [row[1] for row in data.rows[2:]]


def test_an_epoch_sees_every_video_once(pipeline, folder, tmp_path):
    data = VideoFolder(folder)
    data.prepare(finetune_models.trainable(pipeline), SHORT.size, 1, tmp_path / "work")
    seen = [data.training(3, step, 1)[1][0] for step in range(6)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == sorted(row[1] for row in data.rows[:3])
    assert data.training(3, 1, 2)[1] == seen[2:4]


def test_a_clip_covers_the_size_from_its_centre(folder):
    clip = read_clip(folder / "2.mp4", ClipSize(frames=3, height=48, width=48))
    assert clip.shape == (3, 48, 48, 3)
    whole = torch.from_numpy(video_io.read(folder / "2.mp4").frames[:3].astype(np.float32) / 255)  # 96 x 144
    middle = whole[:, :, 24:120].reshape(3, 48, 2, 48, 2, 3).mean(dim=(2, 4))
    assert (clip - middle).abs().mean() < 0.01


@pytest.mark.parametrize(
    ("manifest", "error", "text"),
    [
        ("", ValueError, "lists no video"),
        ("{", ValueError, "line 1 is not JSON"),
        ('{"file": "0.mp4"}', ValueError, "must be"),
        ('{"file": "0.mp4", "text": " "}', ValueError, "empty text"),
        ('{"file": "nine.mp4", "text": "a"}', MediaError, "nine.mp4"),
    ],
)
def test_a_manifest_is_checked(folder, manifest, error, text):
    (folder / "manifest.jsonl").write_text(manifest)
    with pytest.raises(error, match=text):
        VideoFolder(folder)


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.jsonl"):
        VideoFolder(tmp_path)


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"frames": 6}, ValueError, "pass 5 or 7"),
        ({"height": 40}, ValueError, "multiple of 16"),
        ({"lora_targets": ("to_z",)}, ValueError, "Did you mean"),
        ({"method": replace(RADIAL, block=4096)}, ValueError, "Radial.block must be"),
        ({"method": replace(RADIAL, dense_layers=(9,))}, ValueError, "dense_layers"),
        ({"method": replace(RADIAL, dense_layers=4)}, NothingAccelerated, "all"),
        ({"height": 32}, ValueError, "48 x 48"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(pipeline, tmp_path, changes, error, text):
    with pytest.raises(error, match=text):
        finetune(pipeline, GeneratedClips(), replace(SHORT, **changes), tmp_path / "work")
    assert not (tmp_path / "work" / "checkpoint.safetensors").exists()
    assert not getattr(pipeline.transformer, "peft_config", {})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": replace(RADIAL, dense_steps=2)}, "no denoising steps"),
        ({"method": replace(RADIAL, last_dense_steps=2)}, "no denoising steps"),
        ({"steps": 0}, "steps must be an int >= 1"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"text_dropout": 1.5}, r"text_dropout must be in \[0, 1\]"),
        ({"lora_targets": ()}, "must name modules"),
    ],
)
def test_recipes_are_validated(changes, text):
    with pytest.raises(ValueError, match=text):
        replace(SHORT, **changes)


def test_too_few_videos_and_too_short_ones(pipeline, folder, tmp_path):
    with pytest.raises(ValueError, match="held_out must be smaller than the 4 videos"):
        finetune(pipeline, VideoFolder(folder), replace(SHORT, held_out=4), tmp_path / "work")
    with pytest.raises(MediaError, match=r"0\.mp4 gives no clip of 9 frames"):
        finetune(pipeline, VideoFolder(folder), replace(SHORT, frames=9), tmp_path / "work")
    finetune(pipeline, VideoFolder(folder), replace(SHORT, steps=1), tmp_path / "work")  # the folder is not spoilt


def test_a_folder_that_is_not_ours_is_not_replaced(pipeline, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="something else"):
        finetune(pipeline, GeneratedClips(), SHORT, tmp_path / "work", out=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_unsupported_pipelines(embedded, pipeline):
    from diffusers import DDIMScheduler, UniPCMultistepScheduler

    with pytest.raises(UnsupportedModel, match="WanPipeline"):
        finetune_models.trainable(pipeline.transformer)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(UnsupportedModel, match="flow-matching"):
        finetune_models.trainable(pipeline)
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    assert finetune_models.trainable(pipeline).shift == 5.0
    for field, value in (("boundary_ratio", 0.9), ("expand_timesteps", True)):
        changed = copy.copy(embedded)
        changed._internal_dict = type(embedded._internal_dict)({**embedded.config, field: value})
        with pytest.raises(UnsupportedModel, match="Wan"):
            finetune_models.trainable(changed)


def test_peft_is_named_where_it_is_missing(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackendUnavailable, match=r"mmeff\[train\]"):
        finetune(pipeline, GeneratedClips(), SHORT, tmp_path)


def test_other_adapters_and_half_precision_are_refused(pipeline, tmp_path):
    from peft import LoraConfig

    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    with pytest.raises(ValueError, match="already has the adapters style"):
        finetune(pipeline, GeneratedClips(), SHORT, tmp_path)
    pipeline.unload_lora_weights()
    pipeline.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        finetune(pipeline, GeneratedClips(), replace(SHORT, lora_rank=0), tmp_path)


def test_an_adapter_of_a_bfloat16_transformer_is_float32(pipeline, tmp_path):
    pipeline.transformer.to(torch.bfloat16)
    done = finetune(pipeline, GeneratedClips(), replace(SHORT, steps=2), tmp_path)
    assert {w.dtype for w in weights(done.folder).values()} == {torch.float32}
    assert np.isfinite(done.final)


# -------------------------------------------------------------------- the command line


def test_command_line(tmp_path, monkeypatch):
    from mmeff.cli import app

    monkeypatch.setenv("MMEFF_TRAIN_ENVIRONMENT", "1")  # a test must not be started again
    options = (
        "train video tiny-video --method radial -s block=12 -s drop_below=32 -s dense_layers=0 --frames 5 --lora-rank 2 --steps 1 "
        f"--held-out 1 --out {tmp_path / 'out'} --work {tmp_path / 'work'}"
    )
    ran = CliRunner().invoke(app, options.split())
    assert ran.exit_code == 0, ran.output
    assert "held-out loss" in ran.output
    config = json.loads((tmp_path / "work" / "config.json").read_text())
    assert config["method"]["dense_steps"] == 0 and config["method"]["block"] == 12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("video some/model", "--data"),
        ("video tiny-video -s block=12", "no method"),
        ("video tiny-video --method radial -s block", "field=value"),
        ("video tiny-video --method radial -s dense_steps=3", "no denoising steps"),
        ("tiny-long --only both", "--only"),
    ],
)
def test_command_line_errors(options, text, monkeypatch):
    from mmeff.cli import app

    monkeypatch.setenv("MMEFF_TRAIN_ENVIRONMENT", "1")
    ran = CliRunner().invoke(app, ["train", *options.split()])
    assert isinstance(ran.exception, ValueError)
    assert text in str(ran.exception)
