"""What every host of a diffusers family owes, as a base class of tests; a family says only how its small pipelines are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from masked_stock import masked_attentions

import mmeff
from mmeff.diffusion_attn import GNA, Radial, RectifiedSpaAttn, SlidingTile, VMoBA
from mmeff.errors import AlreadyAccelerated, UnsupportedModel

RADIAL = Radial(decay=0.2, block=6, drop_below=16, dense_steps=0, dense_layers=0, backend="gather")
FULL = Radial(decay=1e6, block=6, drop_below=0, dense_steps=0, dense_layers=0)
WINDOW = GNA(window=(0.6, 0.5, 0.5), tile=(2, 2, 3), backend="gather")
METHODS = {
    "radial": RADIAL,
    "gna": WINDOW,
    "sliding tile": SlidingTile(tile=(2, 2, 2), window=(0.5, 0.5, 0.5)),
    "vmoba": VMoBA(chunks=((2, 2), (1, 2, 3)), threshold=None, top_k=2),
    "rectified": RectifiedSpaAttn(drop=0.6, block=8, first_frame=False, dense_steps=0, dense_layers=0),
}
CLOSE = {"atol": 3e-5, "rtol": 1e-5}


@dataclass(frozen=True)
class Case:
    """A family under test.

    make_pipe(seed) and generate(pipe, prompt, steps=, grid=) -> latents; `attentions(pipe)` the modules in layer order;
    `sizes(grid)` what `mmeff.plan` takes for a grid; `forwards` of the transformer in a step; `static` the method of tests
    that need one layout for all.
    """

    make_pipe: Callable[..., Any]
    generate: Callable[..., torch.Tensor]
    attentions: Callable[[Any], list[Any]]
    sizes: Callable[[tuple[int, int, int]], dict[str, int]]
    grids: tuple[tuple[int, int, int], ...]
    host: str
    text_len: int = 0
    text_first: bool = False
    forwards: int = 1
    layers: int = 3
    static: Any = RADIAL
    graphs: int = 1  # of its compiled blocks, as many as without a handle
    close: Any = field(default_factory=lambda: CLOSE)
    prompts: tuple[str, str] = ("a red circle moving left", "a blue square moving up")

    def masked(self, pipe, method, grid, **settings):
        text = {"text_len": self.text_len, "text_first": self.text_first}
        return masked_attentions(self.attentions(pipe), method, grid=grid, **text, **settings)

    @property
    def grid(self):
        return self.grids[0]


def snapshots(pipe, case):
    """What the instances of the transformer and its attentions hold: identities, and the content of containers."""

    def content(value):
        return sorted(map(str, value)) if isinstance(value, (dict, set)) else id(value)

    modules = [pipe.transformer, *case.attentions(pipe)]
    return [{name: content(value) for name, value in module.__dict__.items()} for module in modules]


class FamilyChecks:
    """Derive a class named Test... with a `case`."""

    case: Case

    def pytest_generate_tests(self, metafunc):
        if "any_method" in metafunc.fixturenames:
            image = self.case.grid[0] == 1  # Radial sees all of a frame
            names = [name for name in METHODS if not (image and name == "radial")]
            metafunc.parametrize("any_method", [METHODS[name] for name in names], ids=names)

    @pytest.mark.parametrize("nth", range(3))
    def test_sparse_is_the_same_mask_through_sdpa(self, any_method, nth):
        """Two prompts at once, on odd grids."""
        case, pipe, method = self.case, self.case.make_pipe(), any_method
        grid, prompts = case.grids[nth], list(case.prompts)
        stock = case.generate(pipe, prompts, grid=grid)
        with case.masked(pipe, method, grid):
            expected = case.generate(pipe, prompts, grid=grid)
        with mmeff.accelerate(pipe, method) as handle:
            out = case.generate(pipe, prompts, grid=grid)
        torch.testing.assert_close(out, expected, **case.close)
        assert (out - stock).abs().max() > 1e-3  # the mask matters, so the comparison can fail
        report = handle.report()
        assert report.calls == {"sparse": 2 * case.forwards * case.layers, "full": 0, "dense": 0}
        assert report.fallbacks == {} and report.host == case.host
        if not method.dynamic:
            assert report.density == pytest.approx(method.layout(grid=grid, text_len=case.text_len).density)

    def test_gradients_reach_the_weights_through_the_mask(self):
        case, pipe = self.case, self.case.make_pipe()
        model, calls = pipe.transformer, []
        hook = model.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
        case.generate(pipe, steps=1)
        hook.remove()
        args, kwargs = calls[-1]
        weights = [getattr(attention, name).weight for attention in case.attentions(pipe) for name in ("to_q", "to_k")]

        def gradients():
            out = model(*args, **{**kwargs, "return_dict": False})[0]
            return torch.autograd.grad(out.square().sum(), weights)

        with case.masked(pipe, case.static, case.grid):
            expected = gradients()
        with mmeff.accelerate(model, case.static) as handle:
            found = gradients()
        assert handle.report().calls["sparse"] == case.layers
        for ours, theirs in zip(found, expected, strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)

    def test_dense_steps_and_layers_run_stock_attention(self):
        case, pipe, method = self.case, self.case.make_pipe(), self.case.static
        with case.masked(pipe, method, case.grid, dense_calls=case.forwards, dense_layers=(0,)):
            expected = case.generate(pipe, steps=3)
        with mmeff.accelerate(pipe, method, dense_steps=1, dense_layers=1) as handle:
            torch.testing.assert_close(case.generate(pipe, steps=3), expected, **case.close)
            case.generate(pipe, steps=3)
        calls = 2 * case.forwards  # of each layer in each step of two generations
        mixed = {"sparse": calls * (case.layers - 1), "dense": calls}
        assert handle.report().steps == {0: {"dense": calls * case.layers}, 1: mixed, 2: mixed}

    @pytest.mark.parametrize("name", ["static", "vmoba"])
    def test_a_dense_schedule_and_a_disabled_handle_are_stock_bit_for_bit(self, name):
        case, pipe, method = self.case, self.case.make_pipe(), METHODS.get(name, self.case.static)
        stock = case.generate(pipe)
        handle = mmeff.accelerate(pipe, method, dense_layers=case.layers)
        assert torch.equal(case.generate(pipe), stock)
        assert handle.report().calls["dense"] == 2 * case.forwards * case.layers
        handle.remove()
        handle = mmeff.accelerate(pipe, method)
        handle.enabled = False
        assert torch.equal(case.generate(pipe), stock) and handle.recorder.forwards == 0
        handle.enabled = True
        assert not torch.equal(case.generate(pipe), stock)
        handle.remove()

    def test_a_full_layout_is_stock_bit_for_bit(self):
        case, pipe = self.case, self.case.make_pipe()
        stock = case.generate(pipe)
        with mmeff.accelerate(pipe, FULL) as handle:
            assert torch.equal(case.generate(pipe), stock)
        assert handle.report().calls == {"sparse": 0, "full": 2 * case.forwards * case.layers, "dense": 0}

    def test_remove_restores_the_instance_and_the_output(self):
        case, pipe, method = self.case, self.case.make_pipe(), self.case.static
        stock = case.generate(case.make_pipe())
        before = snapshots(pipe, case)
        handle = mmeff.accelerate(pipe, method)
        assert snapshots(pipe, case) != before
        case.generate(pipe)
        handle.remove()
        handle.remove()
        assert snapshots(pipe, case) == before
        assert torch.equal(case.generate(pipe), stock)

    def test_two_pipelines_at_once_do_not_touch_each_other(self):
        case, method, other = self.case, self.case.static, METHODS["sliding tile"]
        alone = []
        for seed, one in enumerate((method, other)):
            pipe = case.make_pipe(seed)
            with mmeff.accelerate(pipe, one):
                alone.append(case.generate(pipe, steps=1))
        first, second = case.make_pipe(0), case.make_pipe(1)
        with mmeff.accelerate(first, method) as h1, mmeff.accelerate(second, other) as h2:
            for _ in range(2):
                assert torch.equal(case.generate(first, steps=1), alone[0])
                assert torch.equal(case.generate(second, steps=1), alone[1])
        calls = {"sparse": 2 * case.forwards * case.layers, "full": 0, "dense": 0}
        assert h1.report().calls == h2.report().calls == calls

    @pytest.mark.parametrize("name", ["static", "rectified"])
    def test_sizes_may_change_between_generations(self, name):
        case, pipe, method = self.case, self.case.make_pipe(), METHODS.get(name, self.case.static)
        alone = []
        for grid in case.grids:
            with mmeff.accelerate(pipe, method):
                alone.append(case.generate(pipe, steps=1, grid=grid))
        with mmeff.accelerate(pipe, method) as handle:
            for grid, expected in (*zip(case.grids, alone, strict=True), (case.grids[0], alone[0])):
                assert torch.equal(case.generate(pipe, steps=1, grid=grid), expected)
            if not method.dynamic:
                assert handle.report().spans["layout"] == 3

    @pytest.mark.parametrize("name", ["static", "gna", "vmoba"])
    def test_the_plan_says_what_the_report_says(self, name):
        case, pipe = self.case, self.case.make_pipe()
        method = METHODS.get(name, case.static).replace(dense_steps=1, dense_layers=1)
        plan = mmeff.plan(pipe, method, num_inference_steps=3, **case.sizes(case.grid))
        with mmeff.accelerate(pipe, method) as handle:
            case.generate(pipe, steps=3)
        report, rows = handle.report(), dict(plan.rows)
        F, H, W = case.grid
        assert rows["grid"].startswith(f"{F} x {H} x {W} = {F * H * W} video tokens, {case.text_len} text tokens")
        assert rows["sparse layer calls"] == f"{2 * (case.layers - 1)} of {3 * case.layers}"
        assert report.calls["sparse"] == case.forwards * 2 * (case.layers - 1)
        assert plan.fallbacks == () and str(plan)
        if not method.dynamic:
            assert plan.density == pytest.approx(report.density)

    def test_processors_that_are_not_stock_and_second_methods_are_refused(self):
        case, pipe = self.case, self.case.make_pipe()
        attention = case.attentions(pipe)[1]
        stock = attention.processor
        attention.set_processor(type("Adapter", (type(stock),), {})())
        before = snapshots(pipe, case)
        with pytest.raises(UnsupportedModel, match=f"has the processor Adapter.*stock {type(stock).__name__}"):
            mmeff.accelerate(pipe, case.static)
        assert snapshots(pipe, case) == before
        attention.set_processor(stock)
        handle = mmeff.accelerate(pipe, case.static)
        with pytest.raises(AlreadyAccelerated, match=f"already runs {case.static.name()}"):
            mmeff.accelerate(pipe, FULL)
        handle.remove()

    @pytest.mark.parametrize("schedule", [{}, {"dense_steps": 1, "dense_layers": (-1,)}], ids=["sparse", "mixed"])
    def test_compiled_blocks_equal_eager_ones(self, schedule):
        case, pipe = self.case, self.case.make_pipe()
        with mmeff.accelerate(pipe, case.static, **schedule):
            eager = case.generate(pipe)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        handle = mmeff.accelerate(pipe, case.static, **schedule)
        attentions = case.attentions(pipe)
        blocks = [m for m in pipe.transformer.modules() if any(child in attentions for child in m.children())]
        assert len(blocks) == case.layers
        for block in blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(case.generate(pipe), eager, **case.close)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == case.graphs
        report = handle.report()
        sparse = 2 * case.layers if not schedule else case.layers - 1
        assert report.calls["sparse"] == case.forwards * sparse and set(report.backends) == {"gather"}
        torch._dynamo.reset()
