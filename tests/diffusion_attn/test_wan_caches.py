"""Diffusers' caches beside a sparse method: what is computed is sparse, what a cache skips is skipped as without us."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_group_offloading,
)
from masked_stock import masked_attentions
from small_wan import FULL, LAYERS, SPARSE, generate, make_pipe

import mmeff

STEPS = 6
GRID = (5, 6, 6)


def broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks.*attn1",),
        current_timestep_callback=lambda: int(pipe._current_timestep),
    )


# The cache, and how many of the steps' calls of a layer it lets through for (layer 0, later layers); None: it decides by value.
CACHES = {
    "first block": (lambda pipe: FirstBlockCacheConfig(threshold=1e9), (STEPS, 1)),
    "taylorseer": (lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2,
                                                        cache_identifiers=[r"blocks\.\d+\.attn1"]), None),
    "pyramid attention broadcast": (broadcast, None),
    "magcache": (lambda pipe: MagCacheConfig(threshold=1e9, max_skip_steps=2, retention_ratio=0.3,
                                             num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)), None),
}  # fmt: skip


def run(pipe, cache):
    pipe.transformer.enable_cache(cache(pipe))
    try:
        return generate(pipe, steps=STEPS)
    finally:
        pipe.transformer.disable_cache()


@pytest.mark.parametrize("name", CACHES)
def test_sparse_under_a_cache_equals_masked_stock_under_it(name):
    cache, expected = CACHES[name]
    pipe, stock = make_pipe(), make_pipe()
    with mmeff.accelerate(pipe, SPARSE) as handle:
        sparse = run(pipe, cache)
        report = handle.report()
    attentions = [block.attn1 for block in stock.transformer.blocks]
    with masked_attentions(attentions, SPARSE, grid=GRID):
        reference = run(stock, cache)
    torch.testing.assert_close(sparse, reference, atol=2e-5, rtol=1e-4)
    calls = [report.layers[layer]["sparse"] for layer in range(LAYERS)]
    assert sum(calls) < 2 * STEPS * LAYERS, "the cache skipped nothing: the test says nothing about it"
    if expected is not None:
        assert calls == [2 * expected[0]] + [2 * expected[1]] * (LAYERS - 1)
    assert not report.fallbacks
    assert torch.equal(generate(pipe), generate(make_pipe()))


@pytest.mark.parametrize("name", CACHES)
def test_dense_steps_are_counted_in_steps_under_a_cache(name):
    cache, _ = CACHES[name]
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE, dense_steps=2, last_dense_steps=1) as handle:
        run(pipe, cache)
        steps = handle.report().steps
    for step, calls in steps.items():
        assert set(calls) == {"dense"} if step in (0, 1, STEPS - 1) else set(calls) == {"sparse"}, (step, calls)


def test_offloaded_groups_of_blocks():
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE):
        whole = generate(pipe)
    apply_group_offloading(
        pipe.transformer, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=1,
    )  # fmt: skip
    with mmeff.accelerate(pipe, SPARSE) as handle:
        assert torch.equal(generate(pipe), whole)
    assert handle.report().calls["sparse"] == 2 * 2 * LAYERS


def test_a_full_layout_under_a_cache_is_the_cache():
    cache, _ = CACHES["taylorseer"]
    pipe = make_pipe()
    stock = run(pipe, cache)
    with mmeff.accelerate(pipe, FULL):
        torch.testing.assert_close(run(pipe, cache), stock, atol=2e-5, rtol=1e-4)
