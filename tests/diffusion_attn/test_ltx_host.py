"""LTXHost on small stock pipelines: text-to-video, image-to-video and keyframes."""

from __future__ import annotations

import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline
from family_checks import CLOSE, RADIAL, Case, FamilyChecks
from masked_stock import masked_attentions
from small_ltx import LAYERS, SPATIAL, TEMPORAL, generate, make_pipe, make_transformer
from torch.utils.flop_counter import FlopCounterMode

import mmeff
from mmeff.diffusion_attn.hosts import ltx

GRID = (5, 3, 5)
IMAGE = torch.rand(1, 3, 3 * SPATIAL, 5 * SPATIAL, generator=torch.Generator().manual_seed(3))


def sizes(grid):
    F, H, W = grid
    return {"num_frames": (F - 1) * TEMPORAL + 1, "height": H * SPATIAL, "width": W * SPATIAL}


def attentions(pipe):
    return [block.attn1 for block in pipe.transformer.transformer_blocks]


class TestLTX(FamilyChecks):
    case = Case(
        make_pipe=make_pipe,
        generate=generate,
        attentions=attentions,
        sizes=sizes,
        grids=(GRID, (7, 5, 3), (3, 1, 11)),
        host="ltx",
        layers=LAYERS,
    )


def compare(pipe, text_len=0, **call):
    """A generation under a handle and one whose SDPA is masked; returns the handle's report."""
    with masked_attentions(attentions(pipe), RADIAL, grid=GRID, text_len=text_len, text_first=True):
        expected = generate(pipe, **call)
    with mmeff.accelerate(pipe, RADIAL) as handle:
        torch.testing.assert_close(generate(pipe, **call), expected, **CLOSE)
    report = handle.report()
    assert report.calls == {"sparse": 2 * LAYERS, "full": 0, "dense": 0} and report.fallbacks == {}
    return report


def test_image_to_video():
    compare(make_pipe(kind=LTXImageToVideoPipeline), image=IMAGE)


# ---------------------------------------------------------------------------- the grid from coordinates


@pytest.mark.parametrize(
    ("call", "keyframe_tokens"),
    [
        ({}, 0),
        ({"image": IMAGE}, 0),
        ({"image": IMAGE, "frame_index": 9}, 15),
        ({"image": [IMAGE, IMAGE, IMAGE], "video": [None] * 3, "frame_index": [0, 8, 3], "strength": [1, 1, 0.5]}, 30),
    ],
    ids=["text only", "first frame", "one keyframe", "three"],
)
def test_keyframes_are_seen_by_everything(call, keyframe_tokens, monkeypatch):
    pipe = make_pipe(kind=LTXConditionPipeline)
    read = []
    monkeypatch.setattr(ltx._grid_at_the_end, "read", lambda coords: read.append(1) or ltx._read_grid(coords))
    report = compare(pipe, keyframe_tokens, **call)
    assert len(read) == 1  # in the two steps of one generation
    assert report.density == pytest.approx(RADIAL.layout(grid=GRID, text_len=keyframe_tokens).density)


def test_a_late_start_counts_steps_from_its_own_first():
    pipe = make_pipe(kind=LTXConditionPipeline)
    latents = torch.zeros(1, 8, *GRID)
    with mmeff.accelerate(pipe, RADIAL, dense_steps=1) as handle:
        generate(pipe, steps=4, denoise_strength=0.5, latents=latents)
    assert handle.report().steps == {0: {"dense": LAYERS}, 1: {"sparse": LAYERS}}


def coordinates(F, H, W, at=0):
    t, y, x = torch.meshgrid(torch.arange(F) + at, torch.arange(H), torch.arange(W), indexing="ij")
    return torch.stack((t * 0.2, y * 32.0, x * 32.0)).flatten(1)[None]


def forward(model, coords, tokens=None, **call):
    tokens = coords.shape[2] if tokens is None else tokens
    latents = torch.randn(coords.shape[0], tokens, 8, generator=torch.Generator().manual_seed(1))
    text, mask = torch.zeros(coords.shape[0], 4, 32), torch.ones(coords.shape[0], 4)
    with torch.no_grad():
        return model(latents, text, torch.ones(coords.shape[0]), mask, video_coords=coords, **call).sample


@pytest.mark.parametrize(
    ("coords", "grid", "before"),
    [
        (coordinates(3, 2, 5), (3, 2, 5), 0),
        (coordinates(1, 1, 1), (1, 1, 1), 0),
        (coordinates(4, 1, 1), (4, 1, 1), 0),
        (coordinates(1, 3, 1), (1, 3, 1), 0),
        (torch.cat((coordinates(1, 2, 5, at=2), coordinates(3, 2, 5)), 2), (3, 2, 5), 10),
        (torch.cat((coordinates(1, 1, 7, at=2), coordinates(3, 2, 5)), 2), (3, 2, 5), 7),
        (torch.cat((coordinates(2, 2, 5, at=1), coordinates(1, 2, 5, at=4), coordinates(3, 2, 5)), 2), (3, 2, 5), 30),
    ],
)
def test_the_grid_is_found_in_coordinates(coords, grid, before):
    assert ltx._read_grid(coords) == (grid, before)
    assert ltx._read_grid(coords.repeat(2, 1, 1)) == (grid, before)


@pytest.mark.parametrize(
    "coords",
    [
        coordinates(3, 4, 5)[:, :, torch.randperm(60, generator=torch.Generator().manual_seed(0))],
        torch.cat((coordinates(3, 4, 5), coordinates(3, 4, 5) + 1)),
        coordinates(3, 4, 5)[:, [0, 2, 1]],
        coordinates(3, 4, 5)[:, :2],
    ],
    ids=["shuffled", "differs by sample", "column-major", "two axes"],
)
def test_coordinates_of_no_single_video_run_dense_and_say_so(coords):
    assert ltx._read_grid(coords) is None
    if coords.shape[1] == 3:
        model = make_transformer()
        stock = forward(model, coords)
        handle = mmeff.accelerate(model, RADIAL)
        assert torch.equal(forward(model, coords), stock)
        report = handle.report()
        assert report.calls == {"sparse": 0, "full": 0, "dense": LAYERS} and handle.recorder.forwards == 1
        assert list(report.fallbacks.items()) == [
            ("video_coords does not end in the raster of one video, the same for every sample", LAYERS)
        ]
        handle.remove()


def test_coordinates_are_read_again_when_they_change_in_place(monkeypatch):
    read = []
    monkeypatch.setattr(ltx._grid_at_the_end, "read", lambda coords: read.append(1) or ltx._read_grid(coords))
    model, coords = make_transformer(), coordinates(3, 4, 5)
    with mmeff.accelerate(model, RADIAL) as handle:
        forward(model, coords)
        forward(model, coords, num_frames=1, height=1, width=1)  # the model ignores these, and so must the host
        assert len(read) == 1
        coords.copy_(coordinates(5, 3, 4))
        forward(model, coords)
        assert len(read) == 2
        with torch.inference_mode():
            forward(model, coordinates(5, 3, 4))
        assert len(read) == 3
    assert set(handle.recorder.densities[0]) == {RADIAL.layout(grid=g).density for g in ((3, 4, 5), (5, 3, 4))}


# ---------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"height": 100}, "height=100 is not a multiple of 32 pixels, which the pipeline refuses"),
        ({"num_frames": 20}, "num_frames=20 is not 1 + a multiple of 4: the pipeline makes it 17"),
    ],
)
def test_a_plan_lists_what_the_pipeline_changes_or_refuses(change, reason):
    plan = mmeff.plan(make_pipe(), RADIAL, **{**sizes(GRID), **change})
    assert plan.fallbacks == (reason,)
    if "num_frames" in change:
        pipe = make_pipe()
        with mmeff.accelerate(pipe, RADIAL) as handle:
            pipe("a", height=96, width=160, num_frames=20, num_inference_steps=1, output_type="latent")
        assert handle.report().density == pytest.approx(plan.density)
    else:
        with pytest.raises(ValueError, match="divisible by 32"):
            make_pipe()("a", height=100, width=160, num_frames=17, num_inference_steps=1, output_type="latent")


def test_a_bare_transformer_is_planned_at_the_pipelines_defaults():
    plan = mmeff.plan(make_transformer(), RADIAL.replace(block=128))
    rows = dict(plan.rows)
    assert rows["grid"].startswith("21 x 16 x 22 = 7392 video tokens, 0 text tokens") and "assumed" in rows["VAE"]


def test_predictions_follow_the_multiply_adds():
    model, counter = make_transformer(), FlopCounterMode(display=False)
    with counter:
        forward(model, coordinates(5, 6, 7))
    work = ltx.LTXHost.work(model, 210, 4)
    counted = counter.get_total_flops() / 2
    C = 32
    step = 256 * C + C * C + 6 * C * C  # the embedding of the step, which the plan leaves out
    expected = work.outside + LAYERS * (work.layer + work.attention) + step
    assert counted == pytest.approx(expected, rel=1e-3)
