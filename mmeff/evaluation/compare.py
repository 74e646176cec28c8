"""Dense against fast on the same inputs: the same seeds, alternating runs, medians, quality beside speed.

`compare` is the Python verb; `compare_video` and `compare_vlm` do the work for one kind of model; `embedded` is the main job,
which runs both on the models that the library carries.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmeff.accelerate import find_host
from mmeff.config import MethodConfig
from mmeff.evaluation.budget import Budget, equal_budgets
from mmeff.evaluation.compare_video import check_picture, compare_video
from mmeff.evaluation.compare_vlm import checked_cases, compare_vlm
from mmeff.evaluation.comparison import Comparison, Tick, finish, silent
from mmeff.evaluation.run_folder import RunFolder
from mmeff.registry import build


def compare(
    model_or_pipeline: Any,
    methods: Any,
    inputs: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    processor: Any = None,
    budget: Budget = None,
    overwrite: bool = False,
    tick: Tick = silent,
    **settings: Any,
) -> Comparison:
    """Run a model dense and with each method on the same inputs.

    Args:
        model_or_pipeline: what `accelerate` takes.
        methods: one method or a list: configs, names, mappings or YAML paths, all of one stage.
        inputs: prompts for a pipeline (a string or a list of strings); for a vision-language model a mapping or a list of
            mappings with `question`, and `images` (PIL images).
        out: a folder for videos, pictures, report.json and report.html; None writes nothing.
        processor: the vision-language model's processor.
        budget: for methods that drop visual tokens, the mean of visual tokens over layers, as a fraction of all: every method
            is set to it. None is the budget of the first method where several methods are compared, each once; "native"
            keeps each method's own setting. What was done is stated in the result.
        overwrite: replace a finished run in `out`.
        tick: progress callback (what, done, total).
        settings: passed on to `compare_video` or `compare_vlm`; a pipeline needs no processor.
    Returns:
        a `Comparison`; print it for the table.
    Raises:
        as `accelerate`; ValueError for inputs that do not fit the model.
    """
    configs = resolve(methods)
    stages = {config.stage for config in configs}
    if len(stages) != 1:
        raise ValueError(f"compare takes methods of one stage at a time, got {', '.join(sorted(stages))}")
    for config in configs:
        find_host(model_or_pipeline, config)  # complains before any work
    if stages == {"diffusion_attn"}:
        if budget is not None:
            raise ValueError(
                f"a budget is a share of visual tokens, which {configs[0].name()} does not drop; leave budget={budget!r} out"
            )
        check_picture(model_or_pipeline, **settings)  # complains before there is a folder
        folder = RunFolder(out, overwrite=overwrite) if out is not None else None
        result = compare_video(model_or_pipeline, configs, inputs, folder=folder, tick=tick, **settings)
    else:
        cases = checked_cases(processor, inputs)
        configs, remark = equal_budgets(model_or_pipeline, configs, cases, budget)
        folder = RunFolder(out, overwrite=overwrite) if out is not None else None
        result = compare_vlm(
            model_or_pipeline, processor, configs, cases, remark=remark, folder=folder, tick=tick, **settings
        )
    if folder is not None:
        finish(folder, [result], title=f"Dense against {', '.join(dict.fromkeys(c.name() for c in configs))}")
    return result


def resolve(methods: Any) -> list[MethodConfig]:
    """Configs from one method or a sequence of them.

    Raises:
        ValueError: no method, or the same config twice.
    """
    many = methods if isinstance(methods, Sequence) and not isinstance(methods, str) else [methods]
    configs = [build(method) for method in many]
    if not configs:
        raise ValueError("compare got no method; pass at least one, such as 'radial' or 'fastv'")
    return configs
