"""CogVideoXHost: the contract of all hosts, and what is CogVideoX's own."""

from __future__ import annotations

import pytest
import small_cogvideox as kit
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from host_contract import GRID, SPARSE, TOLERANCE, HostContract
from masked_stock import masked_attentions

import mmeff
from mmeff.diffusion_attn import Radial
from mmeff.diffusion_attn.hosts.cogvideox import CogVideoXHost
from mmeff.errors import UnsupportedModel


class TestCogVideoX(HostContract):
    kit = kit


def check(pipe, grid, *, steps=2, calls=2, **call):
    """Sparse is the same mask through SDPA in every forward of a generation; returns the sparse frames."""
    stock = kit.generate(pipe, grid=grid, steps=steps, **call)
    settings = {"grid": grid, "text_len": kit.TEXT_TOKENS, "text_first": True}
    with masked_attentions(kit.attentions(pipe.transformer), SPARSE, **settings):
        expected = kit.generate(pipe, grid=grid, steps=steps, **call)
    with mmeff.accelerate(pipe, SPARSE) as handle:
        out = kit.generate(pipe, grid=grid, steps=steps, **call)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert (out - stock).abs().max() > 1e-3
    assert handle.report().calls == {"sparse": calls * kit.LAYERS, "full": 0, "dense": 0}
    return out


@pytest.mark.parametrize(("frames", "grid"), [(29, (4, 5, 5)), (25, (4, 5, 5)), (17, (3, 5, 7))])
def test_two_latent_frames_to_a_token(frames, grid):
    """CogVideoX 1.5: eight, seven and five latent frames; the pipeline makes their number even."""
    pipe = kit.make_pipe(patch_size_t=2, sample_width=14)  # the widest that its rotation knows
    latents = check(pipe, grid, num_frames=frames, **kit.GUIDED)
    assert latents.shape[1] == 2 * grid[0]
    plan = mmeff.plan(pipe, SPARSE, text_tokens=kit.TEXT_TOKENS, **{**kit.plan_sizes(grid), "num_frames": frames})
    rows = dict(plan.rows)
    F, H, W = grid
    assert rows["grid"] == f"{F} x {H} x {W} = {F * H * W} video tokens, 11 text tokens in self-attention"
    assert ("latent frames" in rows) == (frames != 29) and plan.fallbacks == ()


@pytest.mark.parametrize("patch_size_t", [None, 2])
def test_image_to_video(patch_size_t):
    """The image joins the latents as further channels."""
    ofs = {"ofs_embed_dim": 8} if patch_size_t else {}
    pipe = kit.make_pipe(
        kind=CogVideoXImageToVideoPipeline, in_channels=2 * kit.LATENT_CHANNELS, patch_size_t=patch_size_t, **ofs
    )
    image = torch.rand(1, 3, 80, 80, generator=torch.Generator().manual_seed(5))
    frames = 13 if patch_size_t is None else 29
    check(pipe, GRID, image=image, num_frames=frames, **kit.GUIDED)


@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_video_to_video_counts_the_steps_that_it_takes(scheduler):
    """It enters its schedule late: of four timesteps the last two run."""
    pipe = kit.make_pipe(kind=CogVideoXVideoToVideoPipeline, scheduler=scheduler)
    video = torch.rand(1, 13, 3, 80, 80, generator=torch.Generator().manual_seed(5))
    call = {"video": video, "strength": 0.5, "height": 80, "width": 80}
    check(pipe, GRID, steps=4, calls=2, **call)
    with mmeff.accelerate(pipe, SPARSE, dense_steps=1) as handle:
        for _ in range(2):
            kit.generate(pipe, steps=4, **call)
    assert handle.report().steps == {0: {"dense": 2 * kit.LAYERS}, 1: {"sparse": 2 * kit.LAYERS}}


def test_position_tables_instead_of_rotation():
    """CogVideoX 2B: nothing is rotated."""
    check(kit.make_pipe(use_rotary_positional_embeddings=False), GRID)


def test_a_timestep_that_is_no_view_of_the_schedule_is_looked_up():
    pipe = kit.make_pipe()
    with mmeff.accelerate(pipe, SPARSE, dense_steps=1, last_dense_steps=1) as handle, torch.no_grad():
        pipe.scheduler.set_timesteps(3)
        for t in [*pipe.scheduler.timesteps, torch.tensor(1234)]:
            pipe._current_timestep = t.clone()
            kit.forward(pipe.transformer, GRID)
    report = handle.report()
    dense, sparse = {"dense": kit.LAYERS}, {"sparse": kit.LAYERS}
    assert report.steps == {0: dense, 1: sparse, 2: dense}
    ((reason, times),) = report.fallbacks.items()
    assert "tells neither its step" in reason and times == kit.LAYERS  # of the timestep that is not in the schedule


def test_calls_with_a_mask_run_dense_and_say_why():
    transformer = kit.make_transformer()
    attention = kit.attentions(transformer)[0]
    video, text = torch.randn(1, 100, 32), torch.randn(1, kit.TEXT_TOKENS, 32)
    mask = torch.zeros(kit.HEADS, 111, 111).masked_fill(torch.ones(111, 111).triu(1).bool(), float("-inf"))
    expected = attention.processor(attention, video, text, mask)

    def call_oddly(module, args, kwargs):
        for ours, theirs in zip(attention.processor(attention, video, text, mask), expected, strict=True):
            assert torch.equal(ours, theirs)

    with torch.no_grad(), mmeff.accelerate(transformer, SPARSE) as handle:
        hook = transformer.transformer_blocks[0].register_forward_pre_hook(call_oddly, with_kwargs=True)
        kit.forward(transformer, GRID)
        hook.remove()
    report = handle.report()
    assert report.layers[0]["dense"] == 1 and report.layers[0]["sparse"] == 1
    assert report.fallbacks == {"self-attention was called with a mask": 1}


def test_a_mask_is_honoured_in_a_compiled_block():
    transformer = kit.make_transformer()
    attention = kit.attentions(transformer)[0]
    video, text = torch.randn(1, 100, 32), torch.randn(1, kit.TEXT_TOKENS, 32)
    mask = torch.zeros(kit.HEADS, 111, 111).masked_fill(torch.ones(111, 111).triu(1).bool(), float("-inf"))
    expected = attention.processor(attention, video, text, mask)
    torch._dynamo.reset()
    handle = mmeff.accelerate(transformer, SPARSE)
    compiled = torch.compile(attention.processor, backend="eager", fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(compiled(attention, video, text, mask), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    handle.remove()
    torch._dynamo.reset()


def test_fused_projections_bring_a_processor_that_is_refused():
    pipe = kit.make_pipe()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(UnsupportedModel, match="has the processor FusedCogVideoXAttnProcessor2_0"):
        mmeff.accelerate(pipe, SPARSE)
    pipe.transformer.unfuse_qkv_projections()
    mmeff.accelerate(pipe, SPARSE).remove()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"height": 84}, "height=84 is not a multiple of 8 pixels, which the pipeline refuses"),
        ({"width": 88}, "width=88 is not a multiple of 16 pixels, the size of a token, which the transformer refuses"),
        ({"num_frames": 12}, "num_frames=12 is not 1 + a multiple of 4: the pipeline makes it 9"),
    ],
)
def test_a_plan_lists_reasons_instead_of_raising(sizes, reason):
    pipe = kit.make_pipe()
    assert mmeff.plan(pipe, SPARSE, **{**kit.plan_sizes(GRID), **sizes}).fallbacks == (reason,)
    if "num_frames" in sizes:
        assert kit.generate(pipe, grid=GRID, steps=1, output="np", **sizes).shape[1] == 9
    else:
        with pytest.raises((ValueError, RuntimeError)):
            kit.generate(pipe, grid=GRID, steps=1, **sizes)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        ({}, "13 x 30 x 45 = 17550 video tokens, 226 text tokens in self-attention"),
        (
            {"patch_size_t": 2, "sample_height": 96, "sample_width": 170, "sample_frames": 81},
            "11 x 48 x 85 = 44880 video tokens, 226 text tokens in self-attention",
        ),
    ],
    ids=["CogVideoX-5b", "CogVideoX1.5-5b"],
)
def test_the_plans_of_the_released_models_take_their_own_sizes(config, grid):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(num_layers=1, use_rotary_positional_embeddings=True, **config)
    plan = mmeff.plan(transformer, Radial(dense_steps=0, dense_layers=0))
    assert dict(plan.rows)["grid"] == grid and plan.fallbacks == () and plan.density < 1


def test_sizes_are_found_by_position_and_by_name():
    transformer = kit.make_transformer(patch_size_t=2)
    latents, text = torch.zeros(2, 6, 4, 10, 6), torch.zeros(2, 9, 32)
    expected = ((3, 5, 3), 9, torch.device("cpu"), None)
    assert CogVideoXHost.sizes(transformer, (latents, text), {}) == expected
    assert CogVideoXHost.sizes(transformer, (), {"encoder_hidden_states": text, "hidden_states": latents}) == expected
    assert CogVideoXHost.sizes(transformer, (latents,), {}) is None
