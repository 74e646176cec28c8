"""FluxHost on small stock pipelines: joint attention with the text first, in dual and in single blocks."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxFillPipeline, FluxImg2ImgPipeline, FluxKontextPipeline
from family_checks import CLOSE, WINDOW, Case, FamilyChecks
from masked_stock import masked_attentions
from small_flux import (
    DUAL,
    LATENT_CHANNELS,
    LAYERS,
    PIXELS,
    SINGLE,
    TEXT_TOKENS,
    generate,
    make_pipe,
    make_transformer,
    sizes,
)
from torch.utils.flop_counter import FlopCounterMode

import mmeff
from mmeff.diffusion_attn.hosts import flux
from mmeff.tiny import video_model

GRID = (1, 7, 11)
IMAGE = torch.rand(1, 3, 7 * PIXELS, 11 * PIXELS, generator=torch.Generator().manual_seed(3))


def attentions(pipe):
    return [block.attn for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks)]


class TestFlux(FamilyChecks):
    case = Case(
        make_pipe=make_pipe,
        generate=generate,
        attentions=attentions,
        sizes=lambda grid: {**sizes(grid), "text_tokens": TEXT_TOKENS},
        grids=(GRID, (1, 13, 5), (1, 5, 17)),
        host="flux",
        text_len=TEXT_TOKENS,
        text_first=True,
        forwards=2,
        layers=LAYERS,
        static=WINDOW,
        graphs=3,  # the first single block gets tokens with other strides than the next
    )


def test_layers_count_through_dual_blocks_and_then_single_ones():
    pipe = make_pipe()
    with mmeff.accelerate(pipe, WINDOW, dense_layers=(0, DUAL)) as handle:
        generate(pipe)
    kinds = {layer: "dense" if layer in (0, DUAL) else "sparse" for layer in range(LAYERS)}
    assert {layer: next(iter(counts)) for layer, counts in handle.report().layers.items()} == kinds
    assert [name for name, _ in flux.FluxHost.attentions(pipe.transformer)] == [
        *(f"transformer_blocks.{i}.attn" for i in range(DUAL)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(SINGLE)),
    ]


def test_fused_projections_give_the_same():
    pipe = make_pipe()
    with mmeff.accelerate(pipe, WINDOW):
        expected = generate(pipe)
        pipe.transformer.fuse_qkv_projections()
        assert pipe.transformer.transformer_blocks[0].attn.fused_projections
        torch.testing.assert_close(generate(pipe), expected, **CLOSE)


def test_a_prompt_of_another_length_is_a_layout_of_its_own():
    pipe = make_pipe()
    with masked_attentions(attentions(pipe), WINDOW, grid=GRID, text_len=5, text_first=True):
        expected = generate(pipe, max_sequence_length=5)
    with mmeff.accelerate(pipe, WINDOW) as handle:
        generate(pipe)
        torch.testing.assert_close(generate(pipe, max_sequence_length=5), expected, **CLOSE)
    densities = {WINDOW.layout(grid=GRID, text_len=T).density for T in (TEXT_TOKENS, 5)}
    assert sorted(set(handle.recorder.densities[0])) == pytest.approx(sorted(densities))


def test_a_late_start_counts_steps_from_its_own_first():
    pipe = make_pipe(kind=FluxImg2ImgPipeline)
    call = {"image": IMAGE, "strength": 0.5, "steps": 4}
    with masked_attentions(attentions(pipe), WINDOW, grid=GRID, text_len=TEXT_TOKENS, text_first=True, dense_calls=2):
        expected = generate(pipe, **call)
    with mmeff.accelerate(pipe, WINDOW, dense_steps=1) as handle:
        torch.testing.assert_close(generate(pipe, **call), expected, **CLOSE)
    assert handle.report().steps == {0: {"dense": 2 * LAYERS}, 1: {"sparse": 2 * LAYERS}}


# ---------------------------------------------------------------------------- the grid from img_ids


def positions(H, W, dtype=torch.float32):
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1).to(dtype)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 7), (1, 7, 1), (1, 3, 5), (1, 300, 2), (1, 2, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grid_is_found_in_positions(grid, dtype):
    ids = positions(*grid[1:], dtype)
    assert flux._read_grid(ids) == flux._read_grid(ids[None]) == grid


@pytest.mark.parametrize(
    "ids",
    [
        torch.cat((positions(3, 5), positions(3, 5) + torch.tensor([1, 0, 0]))),
        positions(3, 5)[torch.randperm(15, generator=torch.Generator().manual_seed(0))],
        positions(3, 5)[:, [0, 2, 1]],
        positions(3, 5)[:-1],
        positions(3, 5)[:, :2],
    ],
    ids=["two images", "shuffled", "column-major", "ragged", "two axes"],
)
def test_other_positions_are_no_grid(ids):
    assert flux._read_grid(ids) is None


def test_positions_are_read_once_per_generation(monkeypatch):
    read = []
    monkeypatch.setattr(flux._grid_of, "read", lambda ids: read.append(1) or flux._read_grid(ids))
    pipe = make_pipe()
    with mmeff.accelerate(pipe, WINDOW):
        generate(pipe, steps=4)
        assert len(read) == 1
        generate(pipe, steps=4)
        assert len(read) == 2


def test_a_reference_image_runs_dense_and_says_so():
    pipe = make_pipe(kind=FluxKontextPipeline)
    call = {"image": IMAGE, "_auto_resize": False, "max_area": 28 * 44}
    stock = generate(pipe, **call)
    handle = mmeff.accelerate(pipe, WINDOW, dense_steps=1)
    assert torch.equal(generate(pipe, **call), stock)
    report = handle.report()
    assert report.calls == {"sparse": 0, "full": 0, "dense": 2 * 2 * LAYERS}
    assert report.steps == {0: {"dense": 2 * LAYERS}, 1: {"dense": 2 * LAYERS}}
    (reason,) = report.fallbacks
    assert "img_ids are not the raster of one image" in reason
    generate(pipe, max_area=28 * 44)  # without a reference image
    assert handle.report().calls["sparse"] == 2 * LAYERS
    handle.remove()


def test_filling_in_changes_channels_and_no_tokens():
    pipe = make_pipe(kind=FluxFillPipeline, in_channels=3 * 4 * LATENT_CHANNELS)
    call = {"image": IMAGE, "mask_image": torch.ones(1, 1, *IMAGE.shape[2:])}
    with masked_attentions(attentions(pipe), WINDOW, grid=GRID, text_len=TEXT_TOKENS, text_first=True):
        expected = generate(pipe, **call)
    with mmeff.accelerate(pipe, WINDOW) as handle:
        torch.testing.assert_close(generate(pipe, **call), expected, **CLOSE)
    assert handle.report().calls == {"sparse": 2 * LAYERS, "full": 0, "dense": 0}


def forward(model, grid, text=TEXT_TOKENS, **call):
    N = grid[1] * grid[2]
    latents = torch.randn(1, N, 4 * LATENT_CHANNELS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(
            latents,
            torch.ones(1, text, video_model.TEXT_DIM),
            torch.ones(1, 16),
            torch.ones(1),
            positions(*grid[1:]),
            torch.zeros(text, 3),
            **call,
        ).sample


def test_a_mask_in_the_attention_arguments_runs_dense_and_says_why():
    model = make_transformer()
    mask = torch.ones(TEXT_TOKENS + 77, TEXT_TOKENS + 77, dtype=torch.bool).tril()
    stock = forward(model, GRID, joint_attention_kwargs={"attention_mask": mask})
    handle = mmeff.accelerate(model, WINDOW)
    assert torch.equal(forward(model, GRID, joint_attention_kwargs={"attention_mask": mask}), stock)
    assert handle.report().fallbacks == {"self-attention was called with a mask": LAYERS}
    handle.remove()


# ---------------------------------------------------------------------------- the plan


def test_a_plan_lists_what_the_pipeline_changes():
    pipe = make_pipe()
    plan = mmeff.plan(pipe, WINDOW, height=30, width=44, text_tokens=TEXT_TOKENS)
    assert plan.fallbacks == ("height=30 is not a multiple of 4 pixels: the pipeline makes it 28",)
    with mmeff.accelerate(pipe, WINDOW) as handle:
        generate(pipe, height=30, width=44)
    assert handle.report().density == pytest.approx(plan.density)
    with pytest.raises(TypeError, match="num_frames"):
        mmeff.plan(pipe, WINDOW, num_frames=5)


def test_a_bare_transformer_is_planned_at_the_pipelines_defaults():
    rows = dict(mmeff.plan(make_transformer(), WINDOW.replace(tile=(1, 16, 16))).rows)
    assert rows["grid"].startswith("1 x 64 x 64 = 4096 video tokens, 512 text tokens") and "assumed" in rows["VAE"]


def test_predictions_follow_the_multiply_adds():
    model, counter = make_transformer(), FlopCounterMode(display=False)
    with counter:
        forward(model, GRID)
    work, C = flux.FluxHost.work(model, 77, TEXT_TOKENS), 32
    # what follows from the step and the pooled prompt alone: their embedding and the modulations
    other = 256 * C + C * C + 16 * C + C * C + DUAL * 12 * C * C + SINGLE * 3 * C * C + 2 * C * C
    expected = work.outside + LAYERS * (work.layer + work.attention) + other
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=1e-6)
