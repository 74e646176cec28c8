"""What every vision-language host owes, as functions over a small random model of its family.

Tolerance 1e-5 on logits of order 10: both sides are float32 and differ in the order of sums only (measured 1e-6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

import mmeff
from mmeff.pruning import FastV
from mmeff.pruning._base import Decision, LayerPruner, LayerView
from mmeff.pruning._schedule import PrunePoint


class Family(Protocol):
    """A small random model of one family, and prompts for it."""

    def model(self, *, attention: str = "sdpa", seed: int = 0) -> Any: ...

    def prompts(self) -> dict[str, torch.Tensor]:
        """A left-padded batch of at least three rows with different numbers of visual tokens, whose padding overlaps other rows' pictures."""
        ...

    def row(self, inputs: dict[str, torch.Tensor], b: int) -> dict[str, torch.Tensor]:
        """Row b alone, without its padding."""
        ...

    def visual(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, S) bool, found independently of the host: tokens that may be dropped."""
        ...


@dataclass(frozen=True, kw_only=True)
class EveryThird(LayerPruner):
    """Keeps visual tokens by a fixed pattern of their own number, so that it can act at any layer, 0 included."""

    source = "none: for tests"
    least_layer = 0

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        return (PrunePoint(layer=0, keep=0.4),)

    def decide(self, view: LayerView) -> Decision:
        return Decision(self.take(view, -((view.original * 7 + 3) % 11).float()))


SCHEDULES = ("0:0.5", "2:0.5", "0:0.75,1:0.5,3:0.2")


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": 5, "do_sample": False, **kwargs}
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **kwargs)


def assert_same_run(fast: Any, slow: Any, *, atol: float = 1e-5) -> None:
    assert torch.equal(fast.sequences, slow.sequences)
    for step, (a, b) in enumerate(zip(fast.logits, slow.logits, strict=True)):
        difference = (a - b).abs().max().item()
        assert difference <= atol, f"step {step}: logits differ by {difference}"


def dropped_columns(visual: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Bool (B, S): the columns of visual tokens that are not in `kept` (B, K), numbers among each row's visual tokens."""
    rank = visual.cumsum(dim=1) - 1
    stays = torch.zeros_like(visual)
    for b in range(len(visual)):
        for k in kept[b].tolist():
            stays[b] |= visual[b] & (rank[b] == k)
    return visual & ~stays


class MaskedReference:
    """A full-length eager model whose columns are hidden from given layers on; `hidden[layer]` is bool (B, S)."""

    def __init__(self, layers: Any, hidden: dict[int, torch.Tensor]) -> None:
        self.hooks = []
        for index, layer in enumerate(layers):
            stages = [k for k in hidden if k <= index]
            if stages:
                self.hooks.append(layer.register_forward_pre_hook(self._hook(hidden[max(stages)]), with_kwargs=True))

    @staticmethod
    def _hook(hidden: torch.Tensor) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"].clone()
            rows = hidden.repeat_interleave(len(mask) // len(hidden), dim=0)
            wide = torch.zeros(len(mask), mask.shape[-1], dtype=torch.bool)
            wide[:, : rows.shape[1]] = rows
            # a hidden column still sees itself, so that no row of the mask is empty; nothing else looks at it
            size, first = mask.shape[-2], mask.shape[-1] - mask.shape[-2]
            itself = (
                torch.eye(size, mask.shape[-1], dtype=torch.bool) if not first else torch.zeros(1, 1, dtype=torch.bool)
            )
            blocked = wide[:, None, None] & ~itself
            mask = mask.expand(len(wide), -1, -1, -1).masked_fill(blocked, torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def language(model: Any) -> Any:
    """The decoder layers, found by their place in the model."""
    inner = model.model
    return getattr(inner, "language_model", None) or inner.text_model


def equals_masked_reference(family: Family, method: LayerPruner, *, attention: str = "sdpa", **search: Any) -> None:
    """Tokens identical, logits within 1e-5, and different from those of the unpruned model."""
    model, reference = family.model(attention=attention), family.model(attention="eager")
    inputs = family.prompts()
    with mmeff.accelerate(model, method) as handle:
        fast = generate(model, inputs, **search)
        report = handle.report()
    beams = search.get("num_beams", 1)
    visual = family.visual(reference, inputs)
    hidden = {layer: dropped_columns(visual, kept[::beams]) for layer, kept in report.kept.items()}
    for layer, columns in hidden.items():
        point = next(p for p in method.points(len(language(model).layers)) if p.layer == layer)
        left = (visual & ~columns).sum(1).tolist()
        assert left == [point.count(n) for n in visual.sum(1).tolist()]
    with MaskedReference(language(reference).layers, hidden):
        slow = generate(reference, inputs, **search)
    assert_same_run(fast, slow)
    plain = generate(reference, inputs, **search)
    assert (plain.logits[0] - fast.logits[0]).abs().max() > 0.1, "pruning changed nothing: the check could not fail"


def rows_equal_rows_alone(family: Family, method: LayerPruner, *, attention: str = "sdpa") -> None:
    model = family.model(attention=attention)
    inputs = family.prompts()
    with mmeff.accelerate(model, method) as handle:
        together = generate(model, inputs)
        kept = handle.report().kept
        for b in range(len(inputs["input_ids"])):
            one = generate(model, family.row(inputs, b))
            assert torch.equal(one.sequences[0, -5:], together.sequences[b, -5:])
            assert (one.logits[0][0] - together.logits[0][b]).abs().max() < 1e-5
            for layer, alone in handle.report().kept.items():
                mine = kept[layer][b]
                assert torch.equal(alone[0], mine[mine >= 0])


def remove_restores(family: Family) -> None:
    model = family.model()
    inputs = family.prompts()
    before, state = generate(model, inputs), set(model.__dict__)
    handle = mmeff.accelerate(model, FastV(layer=1, keep=0.25))
    changed = generate(model, inputs)
    handle.remove()
    after = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert not torch.equal(before.logits[0], changed.logits[0])
    assert set(model.__dict__) == state
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [h for h in hooks if getattr(h, "__module__", "").startswith("mmeff")]


def keeping_everything_is_the_identity(family: Family) -> None:
    model = family.model()
    inputs = family.prompts()
    before = generate(model, inputs)
    with mmeff.accelerate(model, EveryThird(schedule="0:1.0,2:1.0")):
        after = generate(model, inputs)
    assert torch.equal(before.sequences, after.sequences)
    assert (before.logits[0] - after.logits[0]).abs().max() < 1e-5


def scores_equal_eager_attention(family: Family, *, layer: int = 2) -> None:
    """`received` and `text_attention` equal sums over the eager attention matrix of the same layer, for every kind of row.

    The matrix is float32: in float64 transformers' mask makes rows of padding NaN.
    """
    model = family.model(attention="eager")
    inputs = family.prompts()
    visual = family.visual(model, inputs)
    out = model(**inputs, output_attentions=True)
    found: dict[str, Any] = {}

    @dataclass(frozen=True, kw_only=True)
    class Probe(EveryThird):
        def decide(self, view: LayerView) -> Decision:
            for where in ("before", "next"):
                for rows in ("last", "text", "all"):
                    found[where, rows] = view.received(rows, where=where)  # type: ignore[arg-type]
                found[where, "across"] = view.text_attention(to="visual", where=where)  # type: ignore[arg-type]
                found[where, "inside"] = view.text_attention(where=where)  # type: ignore[arg-type]
            found["view"] = view
            return Decision(view.present)

    with mmeff.accelerate(model, Probe(schedule=f"{layer}:0.5")):
        model(**inputs, logits_to_keep=1, use_cache=True)
    real = inputs["attention_mask"].bool()
    view = found["view"]
    for where, index in (("before", layer - 1), ("next", layer)):
        matrix = out.attentions[index].double()
        for b in range(len(visual)):
            columns = visual[b].nonzero()[:, 0]
            text = [i for i in range(int(columns.max()) + 1, matrix.shape[-1]) if real[b, i]]
            text = [i for i in text if i not in family_markers(family, model, inputs, b)]
            rows = {"last": [matrix.shape[-1] - 1], "text": text, "all": real[b].nonzero()[:, 0].tolist()}
            for name, chosen in rows.items():
                expected = matrix[b][:, chosen].sum(1)[:, columns]
                mine = found[where, name][b][:, view.present[b]]
                difference = (mine - expected).abs().max().item()
                assert difference < 1e-5, f"{where}, {name}, row {b}: attention differs by {difference}"
            across = found[where, "across"][b][:, view.text[b]][:, :, view.present[b]]
            assert (across - matrix[b][:, text][:, :, columns]).abs().max() < 1e-5
            inside = matrix[b][:, text][:, :, text]
            mine = found[where, "inside"][b][:, view.text[b]][:, :, view.text[b]]
            assert (mine - inside).abs().max() < 1e-5


def family_markers(family: Family, model: Any, inputs: dict[str, torch.Tensor], b: int) -> set[int]:
    """Columns of row b that belong to a picture and are no visual tokens; families that have such override `markers`."""
    markers = getattr(family, "markers", None)
    return set() if markers is None else set(markers(model, inputs)[b].nonzero()[:, 0].tolist())
