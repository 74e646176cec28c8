"""WanHost: nothing stays on a model after removal, nothing passes between models, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from small_wan import FULL, LAYERS, SPARSE, generate, make_pipe, make_transformer

import mmeff
from mmeff.errors import AlreadyAccelerated, NothingAccelerated, UnsupportedModel


def snapshot(module):
    """What a module's instance holds: identities, and the content of containers."""

    def content(value):
        return sorted(map(str, value)) if isinstance(value, (dict, set)) else id(value)

    return {name: content(value) for name, value in module.__dict__.items()}


def snapshots(transformer):
    return [snapshot(transformer)] + [snapshot(block.attn1) for block in transformer.blocks]


# ---------------------------------------------------------------------------- what stays: nothing


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
def test_remove_restores_the_instance_and_the_output(used):
    pipe = make_pipe()
    stock = generate(make_pipe())
    if used:  # a run leaves diffusers' own registry in the instance
        generate(pipe)
    before = snapshots(pipe.transformer)
    handle = mmeff.accelerate(pipe, SPARSE)
    assert snapshots(pipe.transformer) != before
    generate(pipe)
    handle.remove()
    handle.remove()
    assert snapshots(pipe.transformer) == before
    assert torch.equal(generate(pipe), stock)


def test_an_exception_inside_a_forward_restores_and_leaves_no_state():
    pipe = make_pipe()
    stock = generate(pipe)
    before = snapshots(pipe.transformer)

    def fail(module, args):
        raise FloatingPointError("in the middle of a forward")

    with pytest.raises(FloatingPointError), mmeff.accelerate(pipe, SPARSE):
        pipe.transformer.blocks[1].register_forward_pre_hook(fail)
        generate(pipe)
    pipe.transformer.blocks[1]._forward_pre_hooks.clear()
    assert snapshots(pipe.transformer) == before
    assert torch.equal(generate(pipe), stock)

    with mmeff.accelerate(pipe, SPARSE) as handle:
        hook = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(FloatingPointError):
            generate(pipe)
        hook.remove()
        handle.reset()
        generate(pipe)
        assert handle.report().calls["sparse"] == 2 * 2 * LAYERS


def test_disabled_is_stock_and_unrecorded():
    pipe = make_pipe()
    stock = generate(pipe)
    with mmeff.accelerate(pipe, SPARSE) as handle:
        handle.enabled = False
        assert torch.equal(generate(pipe), stock)
        assert handle.report().calls == {} and handle.recorder.forwards == 0
        handle.enabled = True
        assert not torch.equal(generate(pipe), stock)


def test_two_pipelines_two_configs_no_crosstalk():
    other = SPARSE.replace(block=12, dense_layers=2)
    expected = []
    for seed, method in ((0, SPARSE), (1, other)):
        pipe = make_pipe(seed)
        with mmeff.accelerate(pipe, method):
            expected.append(generate(pipe))
    one, two = make_pipe(0), make_pipe(1)
    with mmeff.accelerate(one, SPARSE) as first, mmeff.accelerate(two, other) as second:
        assert torch.equal(generate(one), expected[0])
        assert torch.equal(generate(two), expected[1])
        assert torch.equal(generate(one), expected[0])
    assert first.report().calls["sparse"] == 2 * 2 * 2 * LAYERS
    assert second.report().calls == {"sparse": 2 * 2, "full": 0, "dense": 2 * 2 * 2}


def test_settings_written_while_installed_reach_the_stock_processor():
    pipe = make_pipe()
    originals = [block.attn1.processor for block in pipe.transformer.blocks]
    handle = mmeff.accelerate(pipe, SPARSE)
    for block in pipe.transformer.blocks:
        block.attn1.set_attention_backend("native")
    handle.remove()
    assert [block.attn1.processor for block in pipe.transformer.blocks] == originals
    assert all(p._attention_backend == "native" for p in originals)


def test_a_processor_that_the_user_set_since_stays():
    pipe = make_pipe()
    originals = [block.attn1.processor for block in pipe.transformer.blocks]
    handle = mmeff.accelerate(pipe, SPARSE)
    theirs = WanAttnProcessor()
    pipe.transformer.blocks[1].attn1.set_processor(theirs)
    generate(pipe, steps=1)
    assert set(handle.report().layers) == {0, 2}
    handle.remove()
    assert [block.attn1.processor for block in pipe.transformer.blocks] == [originals[0], theirs, originals[2]]


class CountingHook(ModelHook):
    """A hook that replaces the forward, as caches do."""

    calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("order", ["theirs, ours", "ours, theirs"])
def test_other_hooks_survive_in_any_order(order):
    pipe, theirs = make_pipe(), CountingHook()
    stock = generate(pipe)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    if order == "theirs, ours":
        registry.register_hook(theirs, "theirs")
        handle = mmeff.accelerate(pipe, SPARSE)
    else:
        handle = mmeff.accelerate(pipe, SPARSE)
        registry.register_hook(theirs, "theirs")
    generate(pipe)
    assert theirs.calls == 4 and handle.report().calls["sparse"] == 4 * LAYERS
    handle.remove()
    assert torch.equal(generate(pipe), stock) and theirs.calls == 8
    registry.remove_hook("theirs")
    assert torch.equal(generate(pipe), stock) and theirs.calls == 8


def test_a_wrapper_put_around_forward_later_survives():
    """accelerate's CPU offload wraps `forward` in this way."""
    pipe = make_pipe()
    stock = generate(pipe)
    handle = mmeff.accelerate(pipe, SPARSE)
    inner, seen = pipe.transformer.forward, []
    pipe.transformer.forward = lambda *args, **kwargs: (seen.append(1), inner(*args, **kwargs))[1]
    handle.remove()
    assert torch.equal(generate(pipe), stock) and len(seen) == 4
    with mmeff.accelerate(pipe, SPARSE) as again:
        generate(pipe)
    assert again.report().calls["sparse"] == 4 * LAYERS


# ---------------------------------------------------------------------------- what is refused


def test_a_second_method_of_the_stage_is_refused_and_the_first_stays():
    pipe = make_pipe()
    handle = mmeff.accelerate(pipe, SPARSE)
    with pytest.raises(AlreadyAccelerated, match="already runs radial"):
        mmeff.accelerate(pipe, FULL)
    generate(pipe, steps=1)
    assert handle.report().accelerated == 2 * LAYERS
    handle.remove()
    mmeff.accelerate(pipe, FULL).remove()


class OtherProcessor(WanAttnProcessor):
    """What an adapter would bring."""


def test_processors_that_are_not_stock_are_refused():
    pipe = make_pipe()
    pipe.transformer.blocks[1].attn1.set_processor(OtherProcessor())
    before = snapshots(pipe.transformer)
    with pytest.raises(UnsupportedModel, match=r"blocks\.1\.attn1 has the processor OtherProcessor"):
        mmeff.accelerate(pipe, SPARSE)
    assert snapshots(pipe.transformer) == before


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"ring_degree": 2, "ulysses_degree": 1}, "ring attention shows a device only a part of the keys"),
        ({"ring_degree": 1, "ulysses_degree": 2, "ulysses_anything": True}, "ulysses_anything splits tokens"),
    ],
)
def test_tokens_split_in_other_ways_than_ulysses_are_refused(degrees, message):
    pipe = make_pipe()
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(**degrees))
    pipe.transformer.blocks[0].attn1.processor._parallel_config = config
    with pytest.raises(UnsupportedModel, match=message):
        mmeff.accelerate(pipe, SPARSE)


def test_a_compiled_transformer_is_refused():
    compiled = SimpleNamespace(transformer=SimpleNamespace(_orig_mod=make_transformer()), scheduler=None)
    with pytest.raises(UnsupportedModel, match=r"wrapped by torch\.compile; accelerate the pipeline before"):
        mmeff.accelerate(compiled, SPARSE)


def test_a_bare_transformer_knows_no_steps():
    with pytest.raises(UnsupportedModel, match="dense_steps=1 and last_dense_steps=0 count denoising steps"):
        mmeff.accelerate(make_transformer(), SPARSE, dense_steps=1)


def test_layers_that_are_not_there_leave_nothing_installed():
    pipe = make_pipe()
    before = snapshots(pipe.transformer)
    with pytest.raises(ValueError, match="this model of 3 layers, got 7"):
        mmeff.accelerate(pipe, SPARSE, dense_layers=(7,))
    assert snapshots(pipe.transformer) == before
    mmeff.accelerate(pipe, SPARSE).remove()


def test_a_schedule_that_leaves_nothing_is_an_error():
    pipe = make_pipe()
    with (
        pytest.raises(NothingAccelerated, match="12 layer calls were dense: its schedule leaves"),
        mmeff.accelerate(pipe, SPARSE, dense_steps=2),
    ):
        generate(pipe, steps=2)


@pytest.mark.parametrize("fields", [{"dense_steps": 3}, {"dense_steps": 1, "last_dense_steps": 2}])
def test_more_dense_steps_than_there_are_fail_before_the_first(fields):
    pipe, ran = make_pipe(), []
    stock = generate(pipe, steps=2)
    pipe.transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with mmeff.accelerate(pipe, SPARSE, **fields):
        with pytest.raises(ValueError, match=r"this generation has 2, so nothing of it would be sparse; lower them"):
            generate(pipe, steps=2)
        assert not ran
        generate(pipe, steps=4)
    assert torch.equal(generate(pipe, steps=2), stock)


def test_a_grid_smaller_than_a_block_fails_before_the_first_step():
    pipe, ran = make_pipe(), []
    pipe.transformer.patch_embedding.register_forward_hook(lambda *_: ran.append(1))
    with mmeff.accelerate(pipe, SPARSE, block=40, drop_below=128, dense_steps=1) as handle:
        with pytest.raises(ValueError, match=r"Radial\.block must be <= F\*H\*W = 1\*6\*6 = 36"):
            generate(pipe, frames=1)
        assert not ran
        generate(pipe, frames=17)
        assert handle.report().steps == {0: {"dense": 2 * LAYERS}, 1: {"sparse": 2 * LAYERS}}
