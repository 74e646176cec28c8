"""WanHost on a small stock WanPipeline: what is computed, and what is counted."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from small_wan import FULL, LAYERS, SPARSE, generate, make_pipe, make_transformer

import mmeff
from mmeff.diffusion_attn import Radial
from mmeff.tiny import codec, video_model


class MaskedProcessor(WanAttnProcessor):
    """The stock processor with a mask from a given call on: the independent way to the same result."""

    def __init__(self, mask, dense_calls=0):
        super().__init__()
        self.mask, self.left = mask, dense_calls

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        self.left -= 1
        mask = self.mask if self.left < 0 else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def generate_masked(pipe, method, grid, *, dense_calls=0, layers=range(LAYERS), **call):
    """A generation in which the method's mask goes through SDPA, without the host."""
    mask = method.layout(grid=grid).to_dense_mask()
    for layer in layers:
        pipe.transformer.blocks[layer].attn1.set_processor(MaskedProcessor(mask, dense_calls))
    try:
        return generate(pipe, **call)
    finally:
        for layer in layers:
            pipe.transformer.blocks[layer].attn1.set_processor(WanAttnProcessor())


# ---------------------------------------------------------------------------- what is computed


def test_a_full_layout_gives_the_stock_frames_bit_for_bit():
    pipe = make_pipe()
    stock = generate(pipe, frames=5, output="np")
    with mmeff.accelerate(pipe, FULL) as handle:
        assert torch.equal(generate(pipe, frames=5, output="np"), stock)
    report = handle.report()
    assert report.calls == {"sparse": 0, "full": 2 * 2 * LAYERS, "dense": 0}
    assert report.density == 1 and report.backends == {}  # the model's own attention served them
    assert torch.equal(generate(pipe, frames=5, output="np"), stock)


@pytest.mark.parametrize("backend", ["auto", "gather", "reference"])
def test_sparse_is_the_same_mask_through_sdpa(backend):
    pipe = make_pipe()
    stock = generate(pipe)
    expected = generate_masked(pipe, SPARSE, (5, 6, 6))
    with mmeff.accelerate(pipe, SPARSE, backend=backend) as handle:
        out = generate(pipe)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    assert (out - stock).abs().max() > 1e-2  # the mask matters, so the comparison can fail
    report = handle.report()
    assert report.calls == {"sparse": 2 * 2 * LAYERS, "full": 0, "dense": 0}
    assert sum(report.backends.values()) == 2 * 2 * LAYERS
    if backend != "auto":
        assert set(report.backends) == {backend}


def test_dense_steps_and_layers_run_stock_attention():
    pipe = make_pipe()
    expected = generate_masked(pipe, SPARSE, (5, 6, 6), dense_calls=2 * 1, layers=[1, 2], steps=3)
    with mmeff.accelerate(pipe, SPARSE, dense_steps=1, dense_layers=1):
        torch.testing.assert_close(generate(pipe, steps=3), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [{"height": 80, "width": 48, "frames": 9}, {"height": 32, "width": 64, "frames": 7}])
def test_any_size(size):
    pipe = make_pipe()
    grid = ((size["frames"] - 1) // 2 + 1, size["height"] // 8, size["width"] // 8)
    method = Radial(decay=0.2, block=7, drop_below=16, dense_steps=0, dense_layers=0)
    expected = generate_masked(pipe, method, grid, steps=1, **size)
    with mmeff.accelerate(pipe, method) as handle:
        out = generate(pipe, steps=1, **size)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    assert handle.report().density < 1


def test_batch_rows_are_independent():
    pipe = make_pipe()
    prompts = ["a red circle moving left", "a blue square moving up"]
    latents = torch.randn(2, codec.LATENT_CHANNELS, 5, 24, 24, generator=torch.Generator().manual_seed(1))
    with mmeff.accelerate(pipe, SPARSE):
        both = generate(pipe, prompts, latents=latents)
        alone = torch.cat([generate(pipe, p, latents=latents[i : i + 1]) for i, p in enumerate(prompts)])
    torch.testing.assert_close(both, alone, atol=2e-5, rtol=1e-5)


def test_fused_projections_give_the_same():
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE):
        expected = generate(pipe)
        pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(generate(pipe), expected, atol=2e-5, rtol=1e-5)


def test_gradients_reach_the_weights_through_the_mask():
    model = make_transformer()
    latents = torch.randn(1, codec.LATENT_CHANNELS, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    inputs = (latents, torch.tensor([500.0]), torch.randn(1, 8, video_model.TEXT_DIM))
    weight = model.blocks[0].attn1.to_k.weight

    def gradient():
        return torch.autograd.grad(model(*inputs, return_dict=False)[0].square().sum(), weight)[0]

    with mmeff.accelerate(model, SPARSE, backend="gather") as handle:
        with torch.inference_mode():
            model(*inputs)
        (of_grid,) = model.blocks[0].attn1.processor.session._layouts.values()
        (kept,) = of_grid.values()  # made while sampling, it must serve training too
        assert not kept.layout.col_idx.is_inference()
        sparse = gradient()
    for block in model.blocks:
        block.attn1.set_processor(MaskedProcessor(SPARSE.layout(grid=(3, 6, 6)).to_dense_mask()))
    torch.testing.assert_close(sparse, gradient(), atol=1e-5, rtol=1e-3)
    assert handle.report().calls["sparse"] == 2 * LAYERS


# ---------------------------------------------------------------------------- what is counted


def test_the_schedule_is_counted_in_steps_over_two_generations():
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE, dense_steps=1, last_dense_steps=1, dense_layers=(-1,)) as handle:
        for generation in (1, 2):
            generate(pipe, steps=4)
            calls = 2 * generation  # two guidance branches
            dense, mixed = {"dense": calls * LAYERS}, {"sparse": calls * (LAYERS - 1), "dense": calls}
            report = handle.report()
            assert report.steps == {0: dense, 1: mixed, 2: mixed, 3: dense}
            density = SPARSE.layout(grid=(5, 6, 6)).density
            layer = {"sparse": 2 * calls, "dense": 2 * calls, "density": pytest.approx(density)}
            assert report.layers == {0: layer, 1: layer, 2: {"dense": 4 * calls}}
            assert report.density == pytest.approx(density)
            assert handle.recorder.forwards == 4 * calls
            spans = {"denoising, sparse steps": 2 * calls, "denoising, dense steps": 2 * calls, "layout": 1}
            assert report.spans == spans and all(s > 0 for s in report.seconds.values())
            assert report.fallbacks == {}


def test_without_guidance_a_step_is_one_forward():
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE, dense_steps=1) as handle:
        generate(pipe, steps=2, guidance_scale=1.0)
    assert handle.report().steps == {0: {"dense": LAYERS}, 1: {"sparse": LAYERS}}


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_a_pipeline_that_names_no_step_is_followed_by_its_scheduler(scheduler, monkeypatch):
    """Image-to-video and older pipelines open the cache context with a name only, or not at all."""
    parts = {"scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)}
    pipe = make_pipe(**(parts if scheduler == "unipc" else {}))
    plain = type(pipe.transformer).cache_context
    monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda self, name, **kwargs: plain(self, name))
    with mmeff.accelerate(pipe, SPARSE, dense_steps=1, last_dense_steps=1) as handle:
        generate(pipe, steps=3)
        generate(pipe, steps=3)
    calls = 2 * 2 * LAYERS
    assert handle.report().steps == {0: {"dense": calls}, 1: {"sparse": calls}, 2: {"dense": calls}}


def test_a_late_start_in_the_schedule_counts_from_its_own_first_step():
    """As in video-to-video: the last two of four timesteps run."""
    pipe = make_pipe()
    pipe.scheduler.set_timesteps(4)
    pipe._num_timesteps = 2
    inputs = {
        "hidden_states": torch.zeros(1, codec.LATENT_CHANNELS, 5, 24, 24),
        "encoder_hidden_states": torch.zeros(1, 8, video_model.TEXT_DIM),
    }
    with torch.no_grad(), mmeff.accelerate(pipe, SPARSE, dense_steps=1) as handle:
        for t in pipe.scheduler.timesteps[2:]:
            out = pipe.transformer(timestep=t.expand(1), **inputs).sample
            pipe.scheduler.step(out, t, inputs["hidden_states"])
    assert handle.report().steps == {0: {"dense": LAYERS}, 1: {"sparse": LAYERS}}


class SchedulerWithoutSteps:
    """One that keeps no step index."""

    timesteps = (1, 0)


def test_unknown_steps_run_dense_and_say_so():
    pipe = make_pipe()
    handle = mmeff.accelerate(pipe, SPARSE, dense_steps=1)
    pipe.scheduler = SchedulerWithoutSteps()
    with torch.no_grad():
        pipe.transformer(
            torch.zeros(1, codec.LATENT_CHANNELS, 5, 24, 24), torch.ones(1), torch.zeros(1, 8, video_model.TEXT_DIM)
        )
    report = handle.report()
    assert report.calls == {"sparse": 0, "full": 0, "dense": LAYERS}
    assert list(report.fallbacks.values()) == [LAYERS] and "tells neither its step" in next(iter(report.fallbacks))
    handle.remove()


def test_two_experts_share_the_steps_and_count_their_own_layers():
    pipe = make_pipe(transformer_2=make_transformer(1), boundary_ratio=0.7)
    boundary = 0.7 * pipe.scheduler.config.num_train_timesteps
    with mmeff.accelerate(pipe, SPARSE, dense_steps=1, dense_layers=1) as handle:
        generate(pipe, steps=4)
    high = int((pipe.scheduler.timesteps >= boundary).sum())
    assert 2 <= high < 4, "the test needs sparse steps in both experts"
    mixed = {"dense": 2, "sparse": 2 * (LAYERS - 1)}
    assert handle.report().steps == {0: {"dense": 2 * LAYERS}, 1: mixed, 2: mixed, 3: mixed}
    assert handle.report().spans["layout"] == 1
    assert all(type(b.attn1.processor) is WanAttnProcessor for b in pipe.transformer_2.blocks)


def test_layouts_are_kept_per_grid_and_handle():
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE) as handle:
        generate(pipe, steps=1)
        generate(pipe, steps=1, frames=5)
        generate(pipe, steps=1)
        assert handle.report().spans["layout"] == 2
        densities = {SPARSE.layout(grid=(f, 6, 6)).density for f in (5, 3)}
        assert set(handle.recorder.densities[0]) == densities


def test_calls_that_cannot_be_sparse_run_dense_and_say_why():
    pipe = make_pipe()
    attention = pipe.transformer.blocks[0].attn1
    stock = WanAttnProcessor()

    def call_oddly(module, args):
        hidden, rope = args[0], args[3]
        mask = torch.ones(180, 180, dtype=torch.bool).tril()
        assert torch.equal(attention(hidden, None, mask, rope), stock(attention, hidden, None, mask, rope))
        assert torch.equal(attention(hidden[:, :20]), stock(attention, hidden[:, :20]))

    with mmeff.accelerate(pipe, SPARSE) as handle:
        assert torch.equal(attention(torch.ones(1, 180, 32)), stock(attention, torch.ones(1, 180, 32)))
        hook = pipe.transformer.blocks[0].register_forward_pre_hook(call_oddly)
        generate(pipe, steps=1, guidance_scale=1.0)
        hook.remove()
    report = handle.report()
    assert report.layers[0]["dense"] == 3 and report.layers[0]["sparse"] == 1
    reasons = [[r for r in report.fallbacks if words in r] for words in ("outside the forward", "a mask", "20 tokens")]
    assert [len(found) for found in reasons] == [1, 1, 1] and set(report.fallbacks.values()) == {1}


def test_a_first_block_cache_beside_it_is_counted_as_what_ran():
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE) as handle:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # every later step skips all but layer 0
        generate(pipe, steps=3)
        pipe.transformer.disable_cache()
    assert handle.report().calls["sparse"] == 2 * (LAYERS + 1 + 1)
    assert torch.equal(generate(pipe), generate(make_pipe()))


def test_a_report_says_that_there_was_no_compiler(monkeypatch):
    pipe = make_pipe()
    monkeypatch.setenv("MMEFF_NATIVE", "0")
    with mmeff.accelerate(pipe, SPARSE) as handle:
        generate(pipe, steps=1)
    (remark,) = handle.report().remarks
    assert remark.startswith("no native kernels") and "MMEFF_NATIVE=0" in remark and remark in str(handle.report())
    monkeypatch.delenv("MMEFF_NATIVE")
    with mmeff.accelerate(pipe, SPARSE, backend="native") as handle:
        generate(pipe, steps=1)
    assert handle.report().remarks == () and set(handle.report().backends) == {"native"}
