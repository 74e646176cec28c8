"""CosmosHost on small stock pipelines of Cosmos 1, 2 and 2.5."""

from __future__ import annotations

import pytest
import small_cosmos
import torch
from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosVideoToWorldPipeline,
)
from family_checks import RADIAL, WINDOW, Case, FamilyChecks
from masked_stock import masked_attentions
from small_cosmos import LAYERS, PIXELS, generate, make_pipe, make_transformer
from torch.utils.flop_counter import FlopCounterMode

import mmeff
from mmeff.diffusion_attn.hosts.cosmos import CosmosHost
from mmeff.tiny import video_model

GRID = (5, 3, 5)
NOISY = {"atol": 1e-4, "rtol": 1e-5}  # Cosmos starts from noise of 80 and more, where float32 is this coarse
IMAGE = torch.rand(1, 3, 3 * PIXELS, 5 * PIXELS, generator=torch.Generator().manual_seed(3))


def attentions(pipe):
    return [block.attn1 for block in pipe.transformer.transformer_blocks]


class TestCosmos(FamilyChecks):
    case = Case(
        make_pipe=make_pipe,
        generate=generate,
        attentions=attentions,
        sizes=lambda grid: small_cosmos.sizes(make_pipe(), grid),
        grids=(GRID, (7, 5, 3), (3, 1, 11)),
        host="cosmos",
        forwards=2,
        layers=LAYERS,
        close=NOISY,
    )


def embeddings(seed):
    return torch.randn(1, 16, video_model.TEXT_DIM, generator=torch.Generator().manual_seed(seed))


EMBEDDED = {"prompt": None, "prompt_embeds": embeddings(0), "negative_prompt_embeds": embeddings(1)}


@pytest.mark.parametrize(
    ("build", "call", "grid"),
    [
        ({"kind": CosmosVideoToWorldPipeline, "mask": 1}, {"image": IMAGE}, GRID),
        ({"kind": Cosmos2TextToImagePipeline, "second": True}, {}, (1, 7, 11)),
        ({"kind": Cosmos2VideoToWorldPipeline, "mask": 1, "second": True}, {"image": IMAGE}, GRID),
        ({"kind": Cosmos2_5_PredictBasePipeline, "mask": 1, "second": True, "extra_pos_embed_type": None,
          "use_crossattn_projection": True, "crossattn_proj_in_channels": video_model.TEXT_DIM,
          "encoder_hidden_states_channels": video_model.TEXT_DIM}, EMBEDDED, GRID),
    ],
    ids=["Cosmos 1 video to world", "Cosmos 2 text to image", "Cosmos 2 video to world", "Cosmos 2.5"],
)  # fmt: skip
def test_the_other_pipelines(build, call, grid):
    pipe = make_pipe(**build)
    stock = generate(pipe, grid=grid, **call)
    with masked_attentions(attentions(pipe), WINDOW, grid=grid, dense_calls=2):
        expected = generate(pipe, grid=grid, steps=3, **call)
    with mmeff.accelerate(pipe, WINDOW, dense_steps=1) as handle:
        torch.testing.assert_close(generate(pipe, grid=grid, steps=3, **call), expected, **NOISY)
    report = handle.report()
    sparse = {"sparse": 2 * LAYERS}
    assert report.steps == {0: {"dense": 2 * LAYERS}, 1: sparse, 2: sparse} and report.fallbacks == {}
    assert report.density == pytest.approx(WINDOW.layout(grid=grid).density)
    assert torch.equal(generate(pipe, grid=grid, **call), stock)
    plan = mmeff.plan(pipe, WINDOW, **small_cosmos.sizes(pipe, grid))
    assert plan.density == pytest.approx(report.density) and plan.fallbacks == ()


def test_cross_attention_to_images_stays_as_it_is():
    model = make_transformer(img_context_dim_in=12, img_context_num_tokens=5, img_context_dim_out=32)
    text, images = embeddings(0), torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2))
    before = [block.attn2.processor for block in model.transformer_blocks]
    with mmeff.accelerate(model, RADIAL) as handle:
        forward(model, (text, images))
        assert [block.attn2.processor for block in model.transformer_blocks] == before
    assert handle.report().calls == {"sparse": LAYERS, "full": 0, "dense": 0}


def forward(model, text, grid=GRID):
    F, H, W = grid
    latents = torch.randn(1, 4, F, 2 * H, 2 * W, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(latents, torch.ones(1), text, padding_mask=torch.zeros(1, 1, 8, 8)).sample


def test_calls_with_other_keys_or_masks_run_dense_and_say_why():
    model = make_transformer()
    attention = model.transformer_blocks[0].attn1
    stock = attention.processor

    def call_oddly(module, args):
        x = args[0]
        mask = torch.ones(1, 2, 75, 75, dtype=torch.bool).tril()
        assert torch.equal(attention(x, attention_mask=mask), stock(attention, x, attention_mask=mask))
        assert torch.equal(attention(x, x.flip(1)), stock(attention, x, x.flip(1)))

    with mmeff.accelerate(model, RADIAL) as handle:
        model.transformer_blocks[0].register_forward_pre_hook(call_oddly)
        forward(model, embeddings(0))
    report = handle.report()
    assert report.layers[0]["dense"] == 2 and report.layers[0]["sparse"] == 1
    assert report.fallbacks == {"self-attention was called with other keys or with a mask": 2}


# ---------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 100}, "width=100 is not a multiple of 16 pixels, which the pipeline refuses"),
        ({"num_frames": 30}, "num_frames=30 is not 1 + a multiple of 8: the pipeline makes it 25"),
    ],
)
def test_a_plan_lists_what_the_pipeline_changes_or_refuses(change, reason):
    pipe = make_pipe()
    size = {"num_frames": 33, "height": 48, "width": 80, **change}
    plan = mmeff.plan(pipe, RADIAL, **size)
    assert plan.fallbacks == (reason,)
    call = {"num_inference_steps": 1, "max_sequence_length": 8, "output_type": "latent", **size}
    if "width" in change:
        with pytest.raises(ValueError, match="divisible by 16"):
            pipe("a", **call)
    else:
        with mmeff.accelerate(pipe, RADIAL) as handle:
            pipe("a", **call)
        assert handle.report().density == pytest.approx(plan.density)


def test_a_bare_transformer_is_planned_at_the_pipelines_defaults():
    rows = dict(mmeff.plan(make_transformer(), RADIAL.replace(block=512)).rows)
    assert rows["grid"].startswith("16 x 44 x 80 = 56320 video tokens, 0 text tokens") and "Cosmos 1" in rows["VAE"]


@pytest.mark.parametrize("images", [False, True])
def test_predictions_follow_the_multiply_adds(images):
    dims = {"img_context_dim_in": 12, "img_context_num_tokens": 5, "img_context_dim_out": 32} if images else {}
    model, counter = make_transformer(**dims), FlopCounterMode(display=False)
    text = embeddings(0)
    with counter:
        forward(model, (text, torch.ones(1, 5, 12)) if images else text)
    work, C = CosmosHost.work(model, 75, 16), 32
    # the step's embedding and the images' projection, which the plan leaves out
    other = C * C + C * 3 * C + LAYERS * 3 * (4 * C + 4 * 3 * C) + 4 * C + 4 * 2 * C + (5 * 12 * 32 if images else 0)
    expected = work.outside + LAYERS * (work.layer + work.attention) + other
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=1e-6)
