"""Pruning out of the cache: a prompt is read densely, and its tokens leave the cache at the first decoded token.

What has to be remembered of a prompt is little: which columns are visual, and what entered the layers that score at its
last token. A prompt may be read in one pass or in several, so everything is gathered by cache until decoding begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmeff.errors import UnsupportedModel
from mmeff.kernels import token_scores
from mmeff.pruning._base import Rows, Where
from mmeff.pruning._schedule import PrunePoint
from mmeff.pruning.hosts._language import LanguagePruner, Pass, adopt_layer, digest_of, thin
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View, project, turn, visible_before

WAITING = "the prompt was read, and no token has been decoded at which its visual tokens could leave the cache"
NO_CACHE = "there is no cache that visual tokens could leave; call the model with use_cache=True"
CHANGED = "the cache was cropped or its rows were chosen anew between reading the prompt and decoding"


@dataclass
class Reading:
    """A prompt that has been read, or is being read; tensors are of its passes, in order."""

    start: int  # columns in the cache before it
    visual: list[Tensor] = field(default_factory=list)  # (B, q) bool
    real: list[Tensor] = field(default_factory=list)  # (B, q) bool
    ids: list[Tensor] = field(default_factory=list)  # (B, q)
    locate: Callable[[Tensor], Places] | None = None  # finds frames and markers from all ids
    entered: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)  # (B, 1, D) at the last token, and its rotary
    waits: bool = False  # has visual tokens, and can be pruned
    dense: bool = False  # may not be pruned, for a reason that was recorded


class Evictor:
    """Takes a pruner's tokens out of the cache when decoding begins."""

    def __init__(self, pruner: LanguagePruner) -> None:
        self.pruner = pruner
        self._prompts: weakref.WeakKeyDictionary[Any, Reading] = weakref.WeakKeyDictionary()
        self._now: Reading | None = None  # of the pass that is running, and its cache
        self._cache: Any = None
        scoring = {layer for point in pruner.points for layer in (point - 1, point) if layer >= 0}
        for index in sorted(scoring):
            hook = pruner.layers[index].register_forward_pre_hook(self._note(index), with_kwargs=True)
            pruner.handle.on_remove(hook.remove)

    def _note(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._now is not None:
                if self._cache is None and kwargs.get("past_key_values") is not None:
                    self._cache = kwargs["past_key_values"]  # made by the decoder, where the caller passed none
                    self._prompts[self._cache] = self._now
                cos, sin = kwargs["position_embeddings"]
                # copies, because views would keep the states of the whole prompt
                self._now.entered[index] = (
                    args[0][:, -1:].detach().clone(),
                    (cos[:, -1:].clone(), sin[:, -1:].clone()),
                )

        return hook

    def read(
        self, cache: Any, base: int, visual: Tensor, real: Tensor, *, ids: Tensor | None, reason: str | None,
        locate: Callable[[Tensor], Places] | None,
    ) -> None:  # fmt: skip
        """Take note of a pass that reads a prompt, or a part of it."""
        found = self._prompts.pop(cache, None) if cache is not None else None
        if not self.pruner.handle.enabled:
            return
        if found is None or not base:
            found = Reading(start=base)
        if cache is not None:
            self._prompts[cache] = found
        self._now, self._cache = found, cache
        if ids is None or reason is not None:
            found.dense = True
            self._no_longer_waits(found)
            return
        found.visual.append(visual)
        found.real.append(real)
        found.ids.append(ids)
        found.locate = locate or found.locate

    def end(self) -> None:
        """The pass is over."""
        found, cache = self._now, self._cache
        self._now = self._cache = None
        if found is None or found.dense or found.waits or not any(bool(x.any()) for x in found.visual):
            return
        found.waits = cache is not None
        self.pruner.handle.recorder.fallback(WAITING if found.waits else NO_CACHE)

    def evict(self, cache: Any, past_real: Tensor | None) -> Pass | None:
        """Prune what is waiting in this cache. `past_real` (B, columns): which of its columns are no padding.

        Returns: the prompt as a pass that was pruned, or None if nothing was.
        """
        found = self._prompts.pop(cache, None) if cache is not None else None
        pruner = self.pruner
        recorder = pruner.handle.recorder
        if found is None or not pruner.handle.enabled:
            return None
        if not found.waits:
            if not (found.start or found.dense):
                recorder.fallback("the prompt has no image or video")
            return None
        self._no_longer_waits(found)
        visual, real, ids = (torch.cat(parts, dim=1) for parts in (found.visual, found.real, found.ids))
        locate, keys = found.locate, cache.layers[pruner.first].keys
        if cache.get_seq_length() != found.start + ids.shape[1] or len(keys) != len(ids):
            recorder.fallback(CHANGED)
            return None
        assert locate is not None
        now = Pass(
            base=found.start, length=ids.shape[1], visual=visual, real=real, cache=cache, prunes=True,
            cur=torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1), alive=torch.ones_like(real),
            counts=visual.sum(dim=1), digest=digest_of(ids, real), ids=ids, locate=lambda: locate(ids),
            past_real=None if past_real is None else past_real[:, : found.start],
        )  # fmt: skip
        with recorder.time("selection", ids.device):
            now.counts = now.places.visual.sum(dim=1)
            self._select(now, found)
        return now

    def _no_longer_waits(self, found: Reading) -> None:
        said = self.pruner.handle.recorder.fallbacks
        if found.waits and said[WAITING] > 1:
            said[WAITING] -= 1
        elif found.waits:
            del said[WAITING]  # no error where the record was reset meanwhile
        found.waits = False

    def _select(self, now: Pass, found: Reading) -> None:
        pruner, total = self.pruner, now.base + now.length
        stages = {}
        for index, point in pruner.points.items():
            view = CacheView(pruner, point, now, found)
            decision = pruner.method.decide(view)
            remark = pruner.method.remark(view)
            if remark is not None:
                pruner.handle.recorder.remark(remark)
            wanted = decision.keep & view.present
            thin(now, view, wanted)
            pruner.record(point, wanted, view)
            stages[index] = now.cur, now.alive, now.complete
        # only now, for later points look at the keys of all that their last token saw
        for index in range(pruner.first, len(pruner.layers)):
            cur, alive, complete = stages[max(point for point in stages if point <= index)]
            adopt_layer(now.cache, index, cur, pruner.handle).thin(now.base, total, cur, alive, complete=complete)


class CacheView(View):
    """The `LayerView` of a prompt that has been read: its last token may be asked, and all that is known of tokens."""

    def __init__(self, pruner: LanguagePruner, point: PrunePoint, now: Pass, found: Reading) -> None:
        super().__init__(pruner, point, now, ((), {}))
        self._entered = found.entered

    def received(self, rows: Rows = "last", *, weights: Tensor | None = None, where: Where = "before") -> Tensor:
        """What the last token of the prompt looked at when it was read; nothing had been dropped then at any layer."""
        if rows != "last" or weights is not None:
            self._gone()
        now, index = self.now, self.point.layer - (where == "before")
        hidden, rotary = self._entered[index]
        layer = self.pruner.layers[index]
        q = turn(layer, "q", project(layer, "q", hidden), *(x.expand(len(hidden), -1, -1) for x in rotary))
        k = now.cache.layers[index].keys.transpose(1, 2)
        before, visible = k.shape[1] - now.length, now.real
        if before:
            visible = torch.cat([visible_before(now, index, before), visible], dim=1)
        scores = token_scores(q, k, key_mask=visible, scale=layer.self_attn.scaling)
        at = (self._columns + before)[:, None].expand(-1, scores.shape[1], -1)
        return scores.gather(2, at) * self.present[:, None]

    def _gone(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModel(
            f'{self.pruner.method.name()} asked for states of a prompt that has been read, which are gone; set when="prefill"'
        )

    text_attention = embeddings = text_embeddings = hidden = inputs = transitions = encoder = _gone
