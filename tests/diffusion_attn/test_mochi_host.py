"""MochiHost: the contract of all hosts, and what is Mochi's own."""

from __future__ import annotations

import pytest
import small_mochi as kit
import torch
from diffusers import MochiTransformer3DModel
from host_contract import GRID, SPARSE, TOLERANCE, HostContract
from masked_stock import masked_attentions

import mmeff
from mmeff.diffusion_attn import Radial
from mmeff.diffusion_attn.hosts.mochi import MochiHost


class TestMochi(HostContract):
    kit = kit


def test_a_branch_without_any_text():
    """As for an empty negative prompt where the pipeline is told to zero it: no text token is in use."""
    pipe = kit.make_pipe(force_zeros_for_empty_prompt=True)
    call = {"grid": GRID, "guidance_scale": 3.0, "negative_prompt": ""}
    stock = kit.generate(pipe, **call)
    with masked_attentions(kit.attentions(pipe.transformer), SPARSE, grid=GRID, text_len=kit.TEXT_TOKENS):
        expected = kit.generate(pipe, **call)
    with mmeff.accelerate(pipe, SPARSE) as handle:
        seen = []
        hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda module, args: seen.append(module.attn1.processor.session.now.text_valid.tolist())
        )
        out = kit.generate(pipe, **call)
        hook.remove()
    assert seen == [[0, 6], [0, 6]]
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert (out - stock).abs().max() > 1e-3 and handle.report().calls["sparse"] == 2 * kit.LAYERS


@pytest.mark.parametrize(
    ("dense", "compiled"), [(False, False), (True, True)], ids=["eager", "compiled, dense in part"]
)
def test_text_in_use_may_lie_anywhere(dense, compiled):
    """The stock processor moves it to the front and leaves it there; so do we, in every path."""
    transformer = kit.make_transformer()
    mask = torch.rand(2, kit.TEXT_TOKENS, generator=torch.Generator().manual_seed(1)) < 0.5
    assert (mask.int().diff(dim=1) > 0).any(dim=1).all(), "the test needs masks that are no prefix"
    dense_layers = (1,) if dense else ()
    settings = {"grid": GRID, "text_len": kit.TEXT_TOKENS, "dense_layers": dense_layers}
    with torch.no_grad(), masked_attentions(kit.attentions(transformer), SPARSE, **settings):
        expected = kit.forward(transformer, GRID, mask=mask)
    torch._dynamo.reset()
    with torch.no_grad(), mmeff.accelerate(transformer, SPARSE, dense_layers=dense_layers) as handle:
        if compiled:
            for block in transformer.transformer_blocks:
                block.compile(fullgraph=True, backend="eager")
        for given in (mask, mask.float()):
            torch.testing.assert_close(kit.forward(transformer, GRID, mask=given), expected, **TOLERANCE)
    assert handle.report().calls["dense"] == 2 * len(dense_layers)
    torch._dynamo.reset()


def test_sizes_are_found_by_position_and_by_name():
    transformer = kit.make_transformer()
    latents, text = torch.zeros(2, 4, 3, 10, 6), torch.zeros(2, 9, 32)
    mask = torch.arange(9) < torch.tensor([[9], [2]])
    for args, kwargs in (
        ((latents, text, torch.zeros(2), mask), {}),
        ((latents,), {"encoder_hidden_states": text, "encoder_attention_mask": mask}),
    ):
        grid, text_len, device, valid = MochiHost.sizes(transformer, args, kwargs)
        assert (grid, text_len, device.type, valid.tolist()) == ((3, 5, 3), 9, "cpu", [9, 2])
    assert MochiHost.sizes(transformer, (latents, text), {}) is None


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"height": 84}, "height=84 is not a multiple of 8 pixels, which the pipeline refuses"),
        ({"width": 88}, "width=88 is not a multiple of 16 pixels, the size of a token, which the transformer refuses"),
        ({"num_frames": 21}, "num_frames=21 is not 1 + a multiple of 6: the pipeline makes it 19"),
    ],
)
def test_a_plan_lists_reasons_instead_of_raising(sizes, reason):
    pipe = kit.make_pipe()
    assert mmeff.plan(pipe, SPARSE, **{**kit.plan_sizes(GRID), **sizes}).fallbacks == (reason,)
    if "num_frames" in sizes:
        assert kit.generate(pipe, grid=GRID, **sizes).shape[2] == GRID[0]  # latent frames: those of 19
    else:
        with pytest.raises((ValueError, RuntimeError)):
            kit.generate(pipe, grid=GRID, **sizes)


def test_the_plan_of_the_released_model():
    """The longest video of its makers, 163 frames of 480 x 848 pixels: 44,520 video tokens and 256 of text."""
    with torch.device("meta"):
        transformer = MochiTransformer3DModel(num_layers=2)
    plan = mmeff.plan(transformer, Radial(dense_steps=0, dense_layers=0), num_frames=163)
    rows = dict(plan.rows)
    assert rows["grid"] == "28 x 30 x 53 = 44520 video tokens, 256 text tokens in self-attention"
    assert plan.density < 1 and plan.fallbacks == ()
