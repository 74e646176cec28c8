"""One token budget for all methods of a comparison: the mean of visual tokens over the layers, of all there were.

"N tokens" may mean those that are left at last, those of the first pruned layer, or a mean over layers, and published
settings mix all three. A comparison of several methods is only fair at one of them, and the mean over layers is what
prefill and the cache cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mmeff.accelerate import find_host
from mmeff.config import MethodConfig
from mmeff.pruning._base import TokenPruner, check_mean

Budget = float | Literal["native"] | None


def check_budget(budget: Budget) -> None:
    """Raise ValueError unless a budget is None, "native", or a fraction in (0, 1]."""
    if budget in (None, "native"):
        return
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f'a budget is a fraction of the visual tokens, or "native", got {budget!r}; pass budget=0.25')
    check_mean("compare", budget)


def equal_budgets(
    model: Any, methods: Sequence[MethodConfig], inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], budget: Budget
) -> tuple[list[MethodConfig], str]:
    """The methods at one budget, and a sentence that says which.

    Args:
        methods: configs of stage pruning. inputs: as `compare_vlm` takes them; the pictures of the first one say how many
            visual tokens a setting in tokens is of.
        budget: a fraction; "native" leaves every method as it is; None is the budget of the first method, where every
            method is there once. The same method in several settings is a comparison of settings, which stay.
    Raises:
        ValueError: a method that cannot be set to the budget, in its own words.
    """
    check_budget(budget)
    pruners = [method for method in methods if isinstance(method, TokenPruner)]
    apart = len(pruners) > 1 and len({type(p) for p in pruners}) == len(pruners)
    if budget == "native" or (budget is None and not apart):
        words = "Every method keeps its own setting: their numbers of visual tokens differ." if len(pruners) > 1 else ""
        return list(methods), words
    layers = int(model.config.get_text_config().num_hidden_layers)
    if budget is None:
        mean = layer_mean(model, pruners[0], inputs)
        origin = f"that of {pruners[0].name()} as given"
    else:
        mean, origin = float(budget), "as asked for"
    kept: list[MethodConfig] = [p if budget is None and p is pruners[0] else p.at_budget(mean, layers) for p in pruners]
    rest = [{k: v for k, v in m.to_dict().items() if k not in ("keep", "budget")} for m in kept]
    for i, fields in enumerate(rest):
        if fields in rest[:i]:
            raise ValueError(
                f"at one budget of {mean:.4g} two settings of {kept[i].name()} are the same; leave one out, or compare their own "
                'settings with budget="native"'
            )
    return kept, f"One budget for all methods: visual tokens are {mean:.4g} of all on the mean over layers, {origin}."


def layer_mean(model: Any, method: TokenPruner, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> float:
    """The mean over layers of the visual tokens that a method's setting leaves, as a fraction of all there were."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    points = method.points(layers)
    visual = 0
    if any(isinstance(p.keep, int) for p in points):
        first = inputs if isinstance(inputs, Mapping) else inputs[0]
        width, height = first["images"][0].size
        host: Any = find_host(model, method)
        visual, _ = host.visual_tokens(model, images=len(first["images"]), frames=0, height=height, width=width)
    ends = [p.layer for p in points[1:]] + [layers]
    total, now = float(points[0].layer), 1.0
    for point, end in zip(points, ends, strict=True):
        now = min(now, point.keep if isinstance(point.keep, float) else point.count(visual) / visual)
        total += now * (end - point.layer)
    return total / layers
