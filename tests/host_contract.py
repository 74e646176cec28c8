"""What every host with text inside self-attention owes, as tests that a family's test file inherits.

A family gives its `kit`: a module such as `small_hunyuan_video`, with

    make_pipe(seed), make_transformer(seed), generate(pipe, prompt, *, grid, steps, **call) -> Tensor
    attentions(transformer)   the self-attention modules in layer order
    plan_sizes(grid)          what `mmeff.plan` takes for the grid that `generate` makes
    forward(transformer, grid, rows) -> Tensor   one forward with two padded prompts, or with some of them
    call_attention(attention) -> Tensors         a call of a layer by itself
    LAYERS, TEXT_TOKENS, TEXT_FIRST, PROMPTS     two prompts of different lengths, shorter than TEXT_TOKENS
    GUIDED, FORWARDS          arguments of a guided `generate`, and its forwards per step
    HOST, GRAPHS              the host's name; graphs of its compiled blocks, as many as without a handle

The oracle is the stock processor with a dense mask in SDPA (`masked_stock`).
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
from masked_stock import masked_attentions
from torch.utils.flop_counter import FlopCounterMode

import mmeff
from mmeff.accelerate import find_host
from mmeff.diffusion_attn import GNA, Radial, RectifiedSpaAttn, SlidingTile, VMoBA
from mmeff.errors import NothingAccelerated, UnsupportedModel

SPARSE = Radial(decay=0.05, block=5, drop_below=16, sink=False, dense_steps=0, dense_layers=0)
FULL = SPARSE.replace(decay=1e6, drop_below=0)
METHODS = {
    "radial": SPARSE,
    "radial of ragged blocks": SPARSE.replace(block=7, decay=0.2, sink=True),
    "gna": GNA(window=(0.6, 0.5, 0.5), tile=(2, 2, 3)),
    "sliding tile": SlidingTile(tile=(2, 2, 2), window=(0.5, 0.5, 0.5)),
    "vmoba": VMoBA(chunks=((1,), (2, 2), (2, 2, 2)), threshold=None, top_k=2),
    "rectified": RectifiedSpaAttn(drop=0.6, block=8, first_frame=False, dense_steps=0, dense_layers=0),
}
GRID = (4, 5, 5)
GRIDS = [(7, 5, 3), (5, 3, 7), GRID]
TOLERANCE = {"atol": 3e-5, "rtol": 1e-5}


def snapshots(modules):
    """What the instances hold: identities, and the content of containers."""

    def content(value):
        return sorted(map(str, value)) if isinstance(value, (dict, set)) else id(value)

    return [{name: content(value) for name, value in module.__dict__.items()} for module in modules]


def _attention_flops(counted):
    """Of the products of queries, keys and values: those of SDPA, or of batched matrices where SDPA is made of them."""
    by_operator = counted.get_flop_counts()["Global"]
    return sum(n for op, n in by_operator.items() if "attention" in str(op) or str(op).endswith("bmm"))


class HostContract:
    kit = None  # a module

    def forward(self, transformer, *, grad=False, **which):
        with torch.set_grad_enabled(grad):
            return self.kit.forward(transformer, GRID, **which)

    def masked(self, transformer, method, grid, **settings):
        text = {"text_len": self.kit.TEXT_TOKENS, "text_first": self.kit.TEXT_FIRST}
        return masked_attentions(self.kit.attentions(transformer), method, grid=grid, **text, **settings)

    # ------------------------------------------------------------------------ what is computed

    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_sparse_is_the_same_mask_through_sdpa(self, method, grid):
        """Two prompts of different lengths, with guidance: padding differs within a batch and between branches."""
        kit, pipe = self.kit, self.kit.make_pipe()
        call = {"prompt": kit.PROMPTS, "grid": grid, **kit.GUIDED}
        stock = kit.generate(pipe, **call)
        with self.masked(pipe.transformer, method, grid):
            expected = kit.generate(pipe, **call)
        with mmeff.accelerate(pipe, method) as handle:
            out = kit.generate(pipe, **call)
        torch.testing.assert_close(out, expected, **TOLERANCE)
        assert (out - stock).abs().max() > 1e-3  # the mask matters, so the comparison can fail
        report = handle.report()
        assert report.calls == {"sparse": 2 * kit.FORWARDS * kit.LAYERS, "full": 0, "dense": 0}
        assert report.fallbacks == {} and report.density < 1

    @pytest.mark.parametrize("backend", ["gather", "reference"])
    def test_a_backend_that_is_named_runs(self, backend):
        kit, pipe = self.kit, self.kit.make_pipe()
        with self.masked(pipe.transformer, SPARSE, GRID):
            expected = kit.generate(pipe, grid=GRID)
        with mmeff.accelerate(pipe, SPARSE, backend=backend) as handle:
            torch.testing.assert_close(kit.generate(pipe, grid=GRID), expected, **TOLERANCE)
        assert set(handle.report().backends) == {backend}

    def test_a_full_layout_gives_the_stock_output_bit_for_bit(self):
        kit, pipe = self.kit, self.kit.make_pipe()
        stock = kit.generate(pipe, kit.PROMPTS, grid=GRID, **kit.GUIDED)
        with mmeff.accelerate(pipe, FULL) as handle:
            assert torch.equal(kit.generate(pipe, kit.PROMPTS, grid=GRID, **kit.GUIDED), stock)
        assert handle.report().calls == {"sparse": 0, "full": 2 * kit.FORWARDS * kit.LAYERS, "dense": 0}

    def test_a_dense_schedule_gives_the_stock_output_bit_for_bit(self):
        kit, pipe = self.kit, self.kit.make_pipe()
        stock = kit.generate(pipe, grid=GRID)
        with pytest.raises(NothingAccelerated), mmeff.accelerate(pipe, SPARSE, dense_steps=2) as handle:
            assert torch.equal(kit.generate(pipe, grid=GRID), stock)
        assert handle.report().calls == {"sparse": 0, "full": 0, "dense": 2 * kit.LAYERS}

    def test_dense_steps_and_layers_run_stock_attention(self):
        kit, pipe = self.kit, self.kit.make_pipe()
        with self.masked(pipe.transformer, SPARSE, GRID, dense_calls=kit.FORWARDS, dense_layers=(0, kit.LAYERS - 1)):
            expected = kit.generate(pipe, grid=GRID, steps=3, **kit.GUIDED)
        with mmeff.accelerate(pipe, SPARSE, dense_steps=1, dense_layers=(0, -1)):
            torch.testing.assert_close(kit.generate(pipe, grid=GRID, steps=3, **kit.GUIDED), expected, **TOLERANCE)

    def test_batch_rows_are_independent(self):
        transformer = self.kit.make_transformer()
        with mmeff.accelerate(transformer, SPARSE):
            both = self.forward(transformer)
            alone = torch.cat([self.forward(transformer, rows=[row]) for row in (0, 1)])
        torch.testing.assert_close(both, alone, **TOLERANCE)

    def test_gradients_reach_the_weights_through_the_mask(self):
        kit, transformer = self.kit, self.kit.make_transformer()
        attention = kit.attentions(transformer)[0]
        weights = [attention.to_k.weight, attention.to_v.weight, attention.to_q.weight]

        def gradients():
            return torch.autograd.grad(self.forward(transformer, grad=True).square().sum(), weights)

        with self.masked(transformer, SPARSE, GRID):
            expected = gradients()
        with mmeff.accelerate(transformer, SPARSE, backend="gather") as handle:
            found = gradients()
        for ours, theirs in zip(found, expected, strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)
        assert handle.report().calls["sparse"] == kit.LAYERS

    def test_compiled_blocks_compute_and_count_the_same(self):
        kit, transformer = self.kit, self.kit.make_transformer()
        stock = self.forward(transformer)
        with mmeff.accelerate(transformer, SPARSE, backend="gather", dense_layers=1):
            eager = self.forward(transformer)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with mmeff.accelerate(transformer, SPARSE, backend="gather", dense_layers=1) as handle:
            blocks = [
                m for m in transformer.modules() if any(child in kit.attentions(transformer) for child in m.children())
            ]
            for block in blocks:
                block.compile(fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(self.forward(transformer), eager, **TOLERANCE)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == kit.GRAPHS
            report = handle.report()
            assert report.calls == {"sparse": kit.LAYERS - 1, "full": 0, "dense": 1}
            handle.enabled = False
            torch.testing.assert_close(self.forward(transformer), stock, **TOLERANCE)
        torch._dynamo.reset()

    # ------------------------------------------------------------------------ what is counted

    def test_the_schedule_is_counted_in_steps_over_two_generations(self):
        kit, pipe = self.kit, self.kit.make_pipe()
        with mmeff.accelerate(pipe, SPARSE, dense_steps=1, last_dense_steps=1, dense_layers=(-1,)) as handle:
            for generation in (1, 2):
                kit.generate(pipe, grid=GRID, steps=3, **kit.GUIDED)
                calls = kit.FORWARDS * generation
                dense = {"dense": calls * kit.LAYERS}
                report = handle.report()
                assert report.steps == {0: dense, 1: {"sparse": calls * (kit.LAYERS - 1), "dense": calls}, 2: dense}
                assert sorted(report.layers) == list(range(kit.LAYERS))
                assert report.layers[kit.LAYERS - 1] == {"dense": 3 * calls}
                assert handle.recorder.forwards == 3 * calls and report.fallbacks == {}
        assert report.host == kit.HOST

    def test_a_change_of_resolution_is_followed(self):
        kit, pipe = self.kit, self.kit.make_pipe()
        expected = {}
        for grid in GRIDS:
            with self.masked(pipe.transformer, SPARSE, grid):
                expected[grid] = kit.generate(pipe, grid=grid)
        with mmeff.accelerate(pipe, SPARSE) as handle:
            for grid in [*GRIDS, GRIDS[0]]:
                torch.testing.assert_close(kit.generate(pipe, grid=grid), expected[grid], **TOLERANCE)
        assert handle.report().spans["layout"] == len(GRIDS)
        densities = {SPARSE.layout(grid=grid, text_len=kit.TEXT_TOKENS).density for grid in GRIDS}
        assert set(handle.recorder.densities[0]) == densities

    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_the_plan_says_what_the_report_says(self, method):
        kit, pipe = self.kit, self.kit.make_pipe()
        method = method.replace(dense_steps=1, dense_layers=1)
        plan = mmeff.plan(pipe, method, num_inference_steps=3, text_tokens=kit.TEXT_TOKENS, **kit.plan_sizes(GRID))
        with mmeff.accelerate(pipe, method) as handle:
            kit.generate(pipe, grid=GRID, steps=3)
        report = handle.report()
        assert plan.fallbacks == () and (method.dynamic or plan.density == pytest.approx(report.density))
        rows = dict(plan.rows)
        assert rows["grid"] == f"4 x 5 x 5 = 100 video tokens, {kit.TEXT_TOKENS} text tokens in self-attention"
        assert rows["sparse layer calls"] == f"{report.calls['sparse']} of {3 * kit.LAYERS}"

    def test_the_work_of_a_plan_is_what_the_profiler_counts(self):
        kit, transformer = self.kit, self.kit.make_transformer()
        host = find_host(transformer, SPARSE)
        with FlopCounterMode(display=False) as counted:
            self.forward(transformer, rows=[0])
        work = host.work(transformer, 100, kit.TEXT_TOKENS)
        assert work.attention == pytest.approx(_attention_flops(counted) / 2 / kit.LAYERS, rel=0.05)
        total = kit.LAYERS * (work.attention + work.layer) + work.outside
        # what is done once per sample is left out
        assert total == pytest.approx(counted.get_total_flops() / 2, rel=0.05)

    # ------------------------------------------------------------------------ what stays, and what is refused

    def test_remove_restores_the_instances_and_the_output(self):
        kit, pipe = self.kit, self.kit.make_pipe()
        stock = kit.generate(pipe, grid=GRID)
        modules = [pipe.transformer, *kit.attentions(pipe.transformer)]
        before = snapshots(modules)
        handle = mmeff.accelerate(pipe, SPARSE)
        assert all(a != b for a, b in zip(snapshots(modules), before, strict=True))
        assert not torch.equal(kit.generate(pipe, grid=GRID), stock)
        handle.enabled = False
        assert torch.equal(kit.generate(pipe, grid=GRID), stock)
        handle.remove()
        assert snapshots(modules) == before
        assert torch.equal(kit.generate(pipe, grid=GRID), stock)

    def test_two_pipelines_two_configs_no_crosstalk(self):
        kit, other = self.kit, METHODS["radial of ragged blocks"]
        one, two = kit.make_pipe(0), kit.make_pipe(1)
        stock = kit.generate(two, grid=GRID)
        with mmeff.accelerate(two, other):
            alone = kit.generate(two, grid=GRID)
        with mmeff.accelerate(one, SPARSE) as first, mmeff.accelerate(two, other) as second:
            kit.generate(one, grid=GRID)
            assert torch.equal(kit.generate(two, grid=GRID), alone)
        assert first.report().density != second.report().density
        with mmeff.accelerate(one, SPARSE):
            assert torch.equal(kit.generate(two, grid=GRID), stock)

    def test_processors_that_are_not_stock_are_refused(self):
        kit, pipe = self.kit, self.kit.make_pipe()
        attention = kit.attentions(pipe.transformer)[1]
        attention.processor = type("OtherProcessor", (type(attention.processor),), {})()
        before = snapshots([pipe.transformer])
        with pytest.raises(UnsupportedModel, match=r"blocks\.1\.attn1? has the processor OtherProcessor"):
            mmeff.accelerate(pipe, SPARSE)
        assert snapshots([pipe.transformer]) == before

    def test_a_call_outside_the_forward_is_dense_and_says_so(self):
        kit, transformer = self.kit, self.kit.make_transformer()
        attention = kit.attentions(transformer)[0]
        with torch.no_grad(), mmeff.accelerate(transformer, SPARSE) as handle:
            handle.enabled = False
            expected = kit.call_attention(attention)
            handle.enabled = True
            for ours, theirs in zip(kit.call_attention(attention), expected, strict=True):
                assert torch.equal(ours, theirs)
        (reason,) = handle.report().fallbacks
        assert "outside the forward" in reason
