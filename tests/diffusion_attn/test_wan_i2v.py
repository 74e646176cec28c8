"""WanHost on the other Wan pipelines: image-to-video of 2.1 and 2.2, and TI2V with its timestep per token."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from family_checks import CLOSE, METHODS
from masked_stock import masked_attentions
from small_wan import FULL, LAYERS, SPARSE, shared_parts
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import mmeff
from mmeff.tiny import codec, video_model

C, IMAGE_DIM = codec.LATENT_CHANNELS, 16
CONDITIONED = C + codec.TEMPORAL + C  # the noise, a mask of the frames that are given, and those frames
IMAGE = torch.rand(1, 3, 80, 48, generator=torch.Generator().manual_seed(3))
GRID = (3, 5, 3)


def make_transformer(seed, **config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            **{
                "patch_size": (1, 8, 8),
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": CONDITIONED,
                "out_channels": C,
                "text_dim": video_model.TEXT_DIM,
                "freq_dim": 32,
                "ffn_dim": 48,
                "num_layers": LAYERS,
                **config,
            }
        ).eval()


def image_parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=IMAGE_DIM,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            )
        ).eval()
    size = {"height": 32, "width": 32}
    return {"image_encoder": encoder, "image_processor": CLIPImageProcessor(size=size, crop_size=size)}


def wan_21_i2v():
    """The image also enters through cross-attention, beside the text."""
    config = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 32}
    return WanImageToVideoPipeline(
        **shared_parts(), **image_parts(), transformer=make_transformer(0, **config), scheduler=video_model.scheduler()
    )


def wan_22_i2v():
    """Two experts; the image enters through channels alone."""
    experts = {"transformer": make_transformer(0), "transformer_2": make_transformer(1)}
    return WanImageToVideoPipeline(**shared_parts(), **experts, scheduler=video_model.scheduler(), boundary_ratio=0.8)


def wan_22_ti2v(kind):
    """The first frame is kept by a timestep of 0 for its tokens; the pipelines have its patches of 2 x 2 written in."""
    transformer = make_transformer(0, in_channels=C, patch_size=(1, 2, 2))
    return kind(**shared_parts(), transformer=transformer, scheduler=video_model.scheduler(), expand_timesteps=True)


SMALL = {"height": 16, "width": 48}  # with patches of 2 x 2, multiples of 16 pixels are multiples of 4 tokens
PIPELINES = {
    "2.1 I2V": (wan_21_i2v, {"image": IMAGE}, GRID),
    "2.2 I2V": (wan_22_i2v, {"image": IMAGE}, GRID),
    "2.2 I2V to a last image": (wan_22_i2v, {"image": IMAGE, "last_image": IMAGE.flip(-1)}, GRID),
    "2.2 TI2V of text": (lambda: wan_22_ti2v(WanPipeline), SMALL, (3, 4, 12)),
    "2.2 TI2V of an image": (lambda: wan_22_ti2v(WanImageToVideoPipeline), {**SMALL, "image": IMAGE}, (3, 4, 12)),
}


def experts(pipe):
    return [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]


def generate(pipe, *, steps=3, **call):
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        prompt="a red circle moving left",
        num_frames=5,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **{"height": 80, "width": 48, **call},
    ).frames
    return torch.as_tensor(np.asarray(out))


@pytest.mark.parametrize(
    ("pipeline", "method"),
    [(pipeline, method) for pipeline in PIPELINES for method in METHODS if method == "gna" or pipeline == "2.1 I2V"],
)
def test_sparse_is_the_same_mask_through_sdpa(pipeline, method):
    """With a dense first step, which is the first expert's: 2 guidance branches."""
    make, call, grid = PIPELINES[pipeline]
    pipe, method = make(), METHODS[method]
    stock = generate(pipe, **call)
    with ExitStack() as stack:
        for model, dense in zip(experts(pipe), (2, 0), strict=False):
            attentions = [block.attn1 for block in model.blocks]
            stack.enter_context(masked_attentions(attentions, method, grid=grid, dense_calls=dense))
        expected = generate(pipe, **call)
    with mmeff.accelerate(pipe, method, dense_steps=1) as handle:
        out = generate(pipe, **call)
        assert all(type(block.attn2.processor) is WanAttnProcessor for model in experts(pipe) for block in model.blocks)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert (out - stock).abs().max() > 1e-3  # the mask matters, so the comparison can fail
    report, sparse = handle.report(), {"sparse": 2 * LAYERS}
    assert report.steps == {0: {"dense": 2 * LAYERS}, 1: sparse, 2: sparse} and report.fallbacks == {}
    assert torch.equal(generate(pipe, **call), stock)
    size = {"num_frames": 5, "num_inference_steps": 3, "height": 80, "width": 48}
    size.update((name, value) for name, value in call.items() if name in size)
    plan = mmeff.plan(pipe, method.replace(dense_steps=1), **size)
    assert plan.fallbacks == ()
    if not method.dynamic:
        assert plan.density == pytest.approx(report.density)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_full_layouts_and_dense_schedules_are_stock_bit_for_bit(pipeline):
    make, call, _ = PIPELINES[pipeline]
    pipe = make()
    stock = generate(pipe, steps=2, **call)
    for method, kind in ((FULL, "full"), (SPARSE.replace(dense_layers=LAYERS), "dense")):
        handle = mmeff.accelerate(pipe, method)
        assert torch.equal(generate(pipe, steps=2, **call), stock)
        counts = dict.fromkeys(("sparse", "full", "dense"), 0)
        assert handle.report().calls == {**counts, kind: 2 * 2 * LAYERS}
        handle.remove()


def test_both_experts_of_image_to_video_run_and_count_their_own_layers():
    pipe = wan_22_i2v()
    ran = [0, 0]
    for i, model in enumerate(experts(pipe)):
        model.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    with mmeff.accelerate(pipe, SPARSE, dense_layers=1) as handle:
        generate(pipe, steps=4, image=IMAGE)
    assert sum(ran) == 8 and min(ran) >= 2
    assert handle.report().layers[0] == {"dense": 8} and handle.report().layers[1]["sparse"] == 8


def test_the_plan_counts_the_images_cross_attention():
    with_image, without = wan_21_i2v(), wan_22_i2v()
    shares = []
    for pipe in (with_image, without):
        rows = dict(mmeff.plan(pipe, SPARSE, num_frames=5, height=80, width=48).rows)
        shares.append(float(rows["self-attention's share"].split("%")[0]))
    assert shares[0] < shares[1]
