"""What the hosts of timm's window attention share: finding the layers, switching them, planning.

A family names the block class of timm that cuts a map into windows and the one method of it that does so. On the instance,
that method is shadowed by a `Switch`, which asks at every call whether the method takes it, and otherwise calls timm's own.
Reading order: this file, then one family, such as `swin.py`.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from mmeff.config import MethodConfig
from mmeff.handle import Handle, Host, describe_model
from mmeff.kernels import record
from mmeff.report import DENSE, SPARSE, Plan
from mmeff.vision_backbones._windowed import WindowMethod


class WindowFamily(Host):
    """A host for the window attention of one family of timm models.

    Class attributes: `module` and `blocks` name timm's block classes; `attribute` their method that is replaced.
    """

    stage = "vision_backbones"
    module: ClassVar[str]
    blocks: ClassVar[tuple[str, ...]]
    attribute: ClassVar[str]

    # ---------------------------------------------------------------- what a family says

    @classmethod
    @abstractmethod
    def call(cls, block: Any, x: Any) -> Any:
        """The `WindowCall` that the block makes of x (B, H, W, C), which may be on the meta device."""

    @classmethod
    @abstractmethod
    def obstacle(cls, block: Any) -> str | None:
        """Why our operator cannot stand in for this block's attention as it is now, or None."""

    @classmethod
    @abstractmethod
    def run(cls, block: Any, x: Any, rest: tuple[Any, ...], method: Any) -> Any:
        """What the replaced method of the block returns, computed with `method.attend`."""

    # ---------------------------------------------------------------- the Host

    @classmethod
    def layers(cls, model: Any) -> list[tuple[str, Any]]:
        """Name and block of every window attention, in the order of the model; empty for anything else."""
        loaded = sys.modules.get(cls.module)
        if loaded is None or not hasattr(model, "named_modules"):  # nobody can have made one, or it is no model
            return []
        kinds = tuple(getattr(loaded, name) for name in cls.blocks)
        return [(name, block) for name, block in model.named_modules() if isinstance(block, kinds)]

    @classmethod
    def matches(cls, model: Any) -> bool:
        return bool(cls.layers(model))

    @classmethod
    def modules(cls, model: Any) -> list[Any]:
        return [block for _, block in cls.layers(model)]

    @classmethod
    def why_not(cls, model: Any, method: MethodConfig) -> str | None:
        if not isinstance(method, WindowMethod):
            return f"{type(method).__name__} does not compute window attention, which is all that this host can replace"
        if hasattr(model, "_orig_mod"):
            return "it is wrapped by torch.compile; accelerate the model before compiling it"
        for name, block in cls.layers(model):
            other = vars(block).get(cls.attribute)
            if other is not None and not isinstance(other, Switch):  # ours: that the stage is taken is said elsewhere
                return f"{name}.{cls.attribute} was replaced by a {type(other).__name__}; take that back first"
        return None

    @classmethod
    def prepare(cls, model: Any, method: Any) -> list[Callable[[], None]]:
        """Change what the method needs beside the attention; return how to take it back."""
        return []

    @classmethod
    def install(cls, model: Any, method: MethodConfig, handle: Handle) -> None:
        handle.on_remove(model.register_forward_pre_hook(_Counter(handle)).remove)
        for undo in cls.prepare(model, method):
            handle.on_remove(undo)
        for layer, (_, block) in enumerate(cls.layers(model)):
            setattr(block, cls.attribute, Switch(cls, block, layer, handle))
            handle.on_remove(lambda block=block: block.__dict__.pop(cls.attribute, None))  # type: ignore[misc]

    @classmethod
    def plan(
        cls, model: Any, method: MethodConfig, *, height: int | None = None, width: int | None = None, batch: int = 1
    ) -> Plan:
        """What would happen to images of this size; the model runs without its weights and computes nothing.

        Args:
            height, width: pixels; None is the size that the model was made for, and width is height where only that is given.
            batch: images at once. Whether a backward pass may follow is asked of torch.is_grad_enabled().
        Returns: a Plan whose rows say for each geometry which layers the method takes, and why others stay with timm.
        Raises: TypeError or ValueError for sizes that are not positive ints; and what timm raises for a size it refuses.
        """
        size = _default_size(model)
        height = size[0] if height is None else height
        width = (height if size[0] != height else size[1]) if width is None else width
        calls = _probe(cls, model, method, batch, height, width)
        groups: dict[tuple[str, str | None], list[int]] = {}
        for layer, ((_, block), call) in enumerate(zip(cls.layers(model), calls, strict=True)):
            reason = cls.obstacle(block) or method.why_not(call)  # type: ignore[attr-defined]
            if call.pads and not method.pads:  # type: ignore[attr-defined]
                reason = f"timm refuses it, because the window does not divide the map; {type(method).__name__}(pad=True) pads"
            groups.setdefault((str(call), reason), []).append(layer)
        rows = [("images", f"{batch} of {height} x {width} pixels")]
        taken = sum(len(layers) for (_, reason), layers in groups.items() if reason is None)
        rows.append(("layers", f"{taken} of {len(calls)} window attentions on the operator, the others stay with timm"))
        for (geometry, reason), layers in groups.items():
            rows.append(
                (f"layer{_ranges(layers)}", f"{geometry}: {'on the operator' if reason is None else 'with timm'}")
            )
        reasons = {reason: None for _, reason in groups if reason is not None}
        densities = [call.density for call in calls]
        return Plan(
            method=method.to_dict(),
            model=describe_model(model),
            host=cls.name,
            rows=tuple(rows),
            density=sum(densities) / len(densities),
            fallbacks=tuple(reasons),
        )


class Switch:
    """One layer under a handle, in the place of the block's own method.

    A deep copy or a pickle of the model gets timm's method back: a handle belongs to one model.
    """

    def __init__(self, family: type[WindowFamily], block: Any, layer: int, handle: Handle) -> None:
        self.family = family
        self.block = block
        self.layer = layer
        self.handle = handle

    def __call__(self, x: Any, *rest: Any) -> Any:
        family, block, handle = self.family, self.block, self.handle
        stock = getattr(type(block), family.attribute)
        if not handle.enabled:
            return stock(block, x, *rest)
        method: Any = handle.method
        call = family.call(block, x)
        reason = family.obstacle(block) or method.why_not(call)
        if reason is None and call.pads and not method.pads:
            return stock(block, x, *rest)  # which says what size it wants
        if torch.compiler.is_compiling():
            return stock(block, x, *rest) if reason is not None else family.run(block, x, rest, method)
        if reason is not None:
            handle.recorder.fallback(reason)
            handle.recorder.call(self.layer, DENSE)
            return stock(block, x, *rest)
        with record() as calls:
            out = family.run(block, x, rest, method)
        for kernel in calls[:1]:
            handle.recorder.call(self.layer, SPARSE, density=call.density, backend=kernel.backend)
        return out

    def __reduce__(self) -> Any:
        return Stock, (self.block, self.family.attribute)


class _Counter:
    """A hook that counts the forwards of a model under a handle; a copy of the model gets one that does nothing."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def __call__(self, module: Any, args: Any) -> None:
        if self.handle.enabled and not torch.compiler.is_compiling():
            self.handle.recorder.forwards += 1

    def __reduce__(self) -> Any:
        return _Silent, ()


class _Silent:
    def __call__(self, module: Any, args: Any) -> None:
        return None


class Stock:
    """timm's own method of a block, for copies of a model whose original is accelerated."""

    def __init__(self, block: Any, attribute: str) -> None:
        self.block = block
        self.attribute = attribute

    def __call__(self, *args: Any) -> Any:
        return getattr(type(self.block), self.attribute)(self.block, *args)


# ---------------------------------------------------------------- the dry run


class _Probe:
    """Notes the map that reaches a block, and lets it pass."""

    def __init__(self, family: type[WindowFamily], block: Any, calls: list[Any]) -> None:
        self.family = family
        self.block = block
        self.calls = calls

    def __call__(self, x: Any, *rest: Any) -> Any:
        self.calls.append(self.family.call(self.block, x))
        return x


def _probe(family: type[WindowFamily], model: Any, method: Any, batch: int, height: int, width: int) -> list[Any]:
    """The calls of one forward, from a copy of the model without storage."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    shell = copy.deepcopy(model, memo)
    first = next(model.parameters())
    calls: list[Any] = []
    for _, block in family.layers(shell):
        setattr(block, family.attribute, _Probe(family, block, calls))
    channels = getattr(model, "in_chans", 3)
    family.prepare(shell, method)
    shell(torch.empty(batch, channels, height, width, dtype=first.dtype, device="meta"))
    return [call._replace(device=first.device) for call in calls]


def _default_size(model: Any) -> tuple[int, int]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    height, width = tuple(cfg.get("input_size", (3, 224, 224)))[-2:]
    return height, width


def _ranges(numbers: list[int]) -> str:
    """` 3` for one number, `s 0-3, 7` for [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{'s' if len(numbers) > 1 else ''} {text}"
