"""The Wan host beside what people already use: compiled blocks, context parallelism, adapters, offloading, saving."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
from small_wan import FULL, LAYERS, SPARSE, generate, make_pipe

import mmeff
from mmeff.diffusion_attn import Radial


@pytest.mark.parametrize("schedule", [{}, {"dense_steps": 1, "dense_layers": (-1,)}])
def test_compiled_blocks_share_one_graph(schedule):
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE, backend="gather", **schedule):
        eager = generate(pipe)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    handle = mmeff.accelerate(pipe, SPARSE, backend="gather", **schedule)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    compiled = generate(pipe)
    torch.testing.assert_close(compiled, eager, atol=2e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    report = handle.report()
    sparse = 2 * 2 * LAYERS if not schedule else 2 * (LAYERS - 1)
    assert report.calls["sparse"] == sparse and report.backends == {"gather": sparse}
    torch._dynamo.reset()


def _rank(rank, world, port, path):
    import os

    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: world  # diffusers asks it on CPUs too
    dist.init_process_group("gloo", rank=rank, world_size=world)
    pipe = make_pipe()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    handle = mmeff.accelerate(pipe, SPARSE)
    out = generate(pipe, steps=1, frames=11)  # a grid of 6 x 6 x 6
    if rank == 0:
        torch.save({"out": out, "calls": handle.report().calls}, path)
    dist.destroy_process_group()


def test_two_processes_with_ulysses_equal_one(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(2, port, str(tmp_path / "out.pt")), nprocs=2)
    split = torch.load(tmp_path / "out.pt", weights_only=True)
    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE) as handle:
        whole = generate(pipe, steps=1, frames=11)
    torch.testing.assert_close(split["out"], whole, atol=2e-5, rtol=1e-5)
    assert split["calls"] == handle.report().calls == {"sparse": 2 * LAYERS, "full": 0, "dense": 0}


def test_saving_and_reloading_needs_no_handle(tmp_path):
    from diffusers import WanPipeline

    pipe = make_pipe()
    stock = generate(pipe, steps=1)
    with mmeff.accelerate(pipe, SPARSE):
        pipe.save_pretrained(tmp_path)
        sparse = generate(pipe, steps=1)
    again = WanPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(again, steps=1), stock, atol=1e-6, rtol=1e-6)
    with mmeff.accelerate(again, SPARSE):
        torch.testing.assert_close(generate(again, steps=1), sparse, atol=1e-5, rtol=1e-5)


def test_lora_adapters_come_and_go_under_a_handle():
    from peft import LoraConfig

    pipe = make_pipe()
    with mmeff.accelerate(pipe, SPARSE) as handle:
        before = generate(pipe, steps=1)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        adapted = generate(pipe, steps=1)
        assert (adapted - before).abs().max() > 1e-4
        pipe.transformer.disable_adapters()
        torch.testing.assert_close(generate(pipe, steps=1), before, atol=1e-5, rtol=1e-5)
    assert handle.report().calls["sparse"] == 3 * 2 * LAYERS


def test_an_interrupted_generation_leaves_nothing_behind():
    pipe = make_pipe()
    stock = generate(pipe)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = True
        return kwargs

    with mmeff.accelerate(pipe, SPARSE, dense_steps=1):
        generate(pipe, steps=3, callback_on_step_end=stop)
        sparse = generate(pipe, steps=2)
        torch.testing.assert_close(generate(pipe, steps=2), sparse)
    assert torch.equal(generate(pipe), stock)


def test_two_pipelines_at_once_do_not_touch_each_other():
    one, two = make_pipe(0), make_pipe(1)
    stock = generate(two, steps=1)
    other = Radial(decay=0.2, block=7, drop_below=16, dense_steps=0, dense_layers=0)
    with mmeff.accelerate(two, other):
        alone = generate(two, steps=1)
    with mmeff.accelerate(one, SPARSE) as first, mmeff.accelerate(two, other) as second:
        generate(one, steps=1)
        assert torch.equal(generate(two, steps=1), alone)
        assert first.report().density != second.report().density
    with mmeff.accelerate(one, FULL):
        assert torch.equal(generate(two, steps=1), stock)


def test_gradient_checkpointing_computes_the_same_layers_again():
    from small_wan import make_transformer

    from mmeff.tiny import codec, video_model

    model = make_transformer().train()
    latents = torch.randn(1, codec.LATENT_CHANNELS, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    inputs = (latents, torch.tensor([500.0]), torch.randn(1, 8, video_model.TEXT_DIM))
    weight = model.blocks[0].attn1.to_k.weight

    def gradient():
        return torch.autograd.grad(model(*inputs, return_dict=False)[0].square().sum(), weight)[0]

    with mmeff.accelerate(model, SPARSE, backend="gather") as handle:
        kept = gradient()
        model.enable_gradient_checkpointing()
        again = gradient()
    torch.testing.assert_close(again, kept)
    assert handle.report().calls == {"sparse": 3 * LAYERS, "full": 0, "dense": 0}  # the second forward runs twice
