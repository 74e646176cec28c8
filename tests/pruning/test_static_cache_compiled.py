"""Compiled decoding over a pruned cache of fixed size: one graph without breaks, for every prompt of the same sizes.

Backend "eager" runs the captured graph as it is: what is checked is capture, not code generation.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import mmeff
from mmeff.errors import UnsupportedModel

from . import host_checks as checks
from .conftest import prompts, random_llava
from .small_qwen_vl import SmallQwen

METHOD = checks.EveryThird(schedule="0:0.75,1:0.4", cache="static")
UNCOMPILED = {"cache_implementation": "static", "disable_compile": True}


def compiled():
    config = CompileConfig(backend="eager", fullgraph=True, mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless asked like this
    return {"cache_implementation": "static", "compile_config": config}


def llava(seed):
    return prompts([18, 5, 29], images=[2, 1, 3], seed=seed)


def check_one_graph(model, inputs):
    """Two prompts of the same sizes, against uncompiled steps; returns the last run."""
    with mmeff.accelerate(model, METHOD) as handle:
        counters.clear()
        for seed in (3, 4):
            handle.reset()
            fast = checks.generate(model, inputs(seed), **compiled())
            assert handle.report().spans["decode"] == 4, "compiled steps are timed too"
            checks.assert_same_run(fast, checks.generate(model, inputs(seed), **UNCOMPILED))
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"] and not counters["recompiles"]
    return fast


def test_one_graph_for_prompts_of_the_same_sizes_qwen():
    torch._dynamo.reset()
    qwen = SmallQwen("qwen2_5_vl")
    check_one_graph(qwen.model(layers=2), lambda seed: qwen.inputs(qwen.items, seed=seed))


def test_one_graph_for_prompts_of_the_same_sizes_llava_and_none_of_before():
    """Graphs do not guard hooks: one of the unpruned model must not serve the pruned one, nor the other way round."""
    torch._dynamo.reset()
    model = random_llava(layers=2)
    plain = checks.generate(model, llava(4), **compiled())
    pruned = check_one_graph(model, llava)
    assert (plain.logits[-1] - pruned.logits[-1]).abs().max() > 0.1
    checks.assert_same_run(checks.generate(model, llava(4), **compiled()), plain, atol=0.0)


def test_a_compiled_prefill_is_refused():
    from transformers import StaticCache

    model, inputs = random_llava(layers=2), prompts([9])
    torch._dynamo.reset()
    with mmeff.accelerate(model, METHOD), pytest.raises(UnsupportedModel, match="compile decoding steps alone"):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
        torch.compile(model.__call__, backend="eager")(**inputs, past_key_values=cache, logits_to_keep=1)
