"""Pruning inside a decoder language model, for any family: hooks on the decoder layers, a ledger in the cache.

One forward pass of the model is one `Pass`. At a prune point the wanted tokens are gathered; from there on every layer gets
its rows of the rotary embedding, its rows and columns of the mask, and a cache layer that remembers which columns its
keys are. Positions stay original, so nothing outside the decoder layers changes.

What is needed of a family is small: decoder layers with `self_attn.q_proj/k_proj`, `input_layernorm`, and rotary
embeddings passed in as (cos, sin). A family's own file says where these are and what is visual.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmeff.errors import UnsupportedModel
from mmeff.handle import Handle
from mmeff.pruning._base import TokenPruner
from mmeff.pruning._schedule import PrunePoint
from mmeff.pruning.hosts._ahead import Given, carried, spare
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View, attention_of_last, gather_rows, projection, token_changes

if TYPE_CHECKING:
    from mmeff.pruning.hosts._eviction import Evictor


@dataclass
class Pass:
    """One forward pass: which original columns are still present, and what each layer is to be given."""

    base: int  # columns in the cache before this pass
    length: int  # columns that this pass adds
    visual: Tensor  # (B, q) bool, all False where nothing is pruned
    real: Tensor  # (B, q) bool, False on padding
    cache: Any
    prunes: bool
    cur: Tensor  # (B, n) columns present, relative to base, ascending
    alive: Tensor  # (B, n) bool, False on filler
    counts: Tensor  # (B,) visual tokens that each row's prompt had at first
    digest: Tensor  # (B,) hash of the row's real token ids
    ids: Tensor | None = None  # (B, q) token ids
    locate: Callable[[], Places] | None = None  # finds frames and markers once the vision encoder has run
    look: Callable[[], Any] | None = None  # gives what the vision encoder saw
    past_real: Tensor | None = None  # (B, base) bool, False on padding of earlier turns
    first: tuple[Any, Any] | None = None  # the arguments of decoder layer 0
    scored: tuple[int, Any] | None = None  # layer index, and the arguments it ran with
    ahead: dict[str, Given] = field(
        default_factory=dict
    )  # by projection, what scoring has projected of the layer that is about to run
    moved: dict[int, dict[str, Any]] = field(default_factory=dict)  # what watched sublayers did to their tokens
    complete: bool = True  # no filler among the present tokens
    masks: dict[int, Tensor | None] = field(default_factory=dict)  # per stage
    rotary: dict[int, Any] = field(default_factory=dict)
    changed: bool = False  # whether tokens are missing by now
    evicted: Pass | None = None  # the prompt whose tokens left the cache before this pass
    left: dict[int, Tensor] = field(default_factory=dict)  # per prune point, (B,) visual tokens kept
    _places: Places | None = None

    @property
    def places(self) -> Places:
        """Frames and markers; asked for once a prune point needs them."""
        if self._places is None:
            assert self.locate is not None
            self._places = self.locate()
        return self._places


class LanguagePruner:
    """Installs a `TokenPruner` on a list of decoder layers.

    Args:
        layers: the decoder layers. handle: owns hooks and the record. method: decides.
    """

    def __init__(self, layers: Any, method: TokenPruner, handle: Handle) -> None:
        self.layers = list(layers)
        self.points = {point.layer: point for point in method.points(len(self.layers))}
        self.first = min(self.points)
        self.method = method
        self.state = method.new_state()
        self.handle = handle
        self.now: Pass | None = None
        self._prompt: Tensor | None = (
            None  # (B, V) columns of the last prompt's visual tokens, -1 where a row has fewer
        )
        self._compiled_step: Callable[..., Any] | None = None
        if method.cache == "static":
            from mmeff.pruning.hosts._static_ledger import compiled_step

            self._compiled_step = compiled_step
        self._evictor: Evictor | None = None
        if method.when == "decode":
            from mmeff.pruning.hosts._eviction import Evictor  # which imports this module

            self._evictor = Evictor(self)
        hooked = {0, *range(max(0, self.first - 1), len(self.layers))}
        for index in sorted(hooked):
            hook = self.layers[index].register_forward_pre_hook(self._hook(index), with_kwargs=True)
            handle.on_remove(hook.remove)
        for index in self.points:
            for which in ("q", "k"):
                module = projection(self.layers[index], which)
                for remove in spare(module, which, lambda: {} if self.now is None else self.now.ahead):
                    handle.on_remove(remove)
        for index in method.watches(len(self.layers)):
            self._watch(index)
        self._observe(method.observes(len(self.layers)))
        _forget_compiled_graphs()
        handle.on_remove(_forget_compiled_graphs)

    def begin(
        self, *, cache: Any, visual: Tensor | None, real: Tensor | None, batch: int, length: int,
        device: torch.device, reason: str | None, ids: Tensor | None = None,
        locate: Callable[[Tensor], Places] | None = None, look: Callable[[], Any] | None = None, reading: bool = False,
    ) -> Pass:  # fmt: skip
        """Start a pass.

        Args:
            real: (B, columns) bool, False on padding: of the cache's columns and of this pass's, or of the latter alone.
            reason: why this pass must not prune although it has visual tokens, or None.
            reading: a prompt is being read, also where this pass is of one token.
        Raises:
            UnsupportedModel: the prompt has visual tokens, and the cache is not of the kind that the method is set to.
        """
        base = int(cache.get_seq_length()) if cache is not None else 0
        if visual is not None and self.handle.enabled:
            self._require_cache(cache)
        if visual is None:
            visual = torch.zeros(batch, length, dtype=torch.bool, device=device)
            prunes = False
        else:
            prunes = reason is None and self.handle.enabled and self._evictor is None
            if reason is not None and self.handle.enabled:
                self.handle.recorder.fallback(reason)
        past_real = None if real is None or real.shape[1] < base + length else real[:, :base]
        real = torch.ones_like(visual) if real is None else real[:, -length:]
        evicted = None
        if self._evictor is not None:
            if reading or length > 1 or not base:
                self._evictor.read(cache, base, visual, real, ids=ids, reason=reason, locate=locate)
            else:
                evicted = self._evictor.evict(cache, past_real)
        self.now = Pass(
            base=base,
            length=length,
            visual=visual,
            real=real,
            cache=cache,
            prunes=prunes,
            cur=torch.arange(length, device=device).expand(batch, -1),
            alive=torch.ones(batch, length, dtype=torch.bool, device=device),
            counts=visual.sum(dim=1),
            digest=digest_of(ids, real) if prunes else torch.zeros(batch, dtype=torch.long, device=device),
            ids=ids,
            locate=None if locate is None or ids is None else lambda: locate(ids),
            look=look,
            past_real=past_real,
            evicted=evicted,
        )
        if prunes:
            self._prompt = None
        return self.now

    def end(self) -> Pass | None:
        """Close the pass; returns it for the record."""
        done, self.now = self.now, None
        if self._evictor is not None:
            self._evictor.end()
        return done

    def _require_cache(self, cache: Any) -> None:
        who = self.method.name()
        if self.method.cache == "static":
            from mmeff.pruning.hosts._static_ledger import is_fixed

            if not is_fixed(cache):
                kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
                raise UnsupportedModel(
                    f'{who} is set to cache="static", a cache of fixed size whose layers are all StaticLayer, got '
                    f"{type(cache).__name__ if cache is not None else 'no cache'} of {', '.join(kinds) or 'no layers'}; "
                    'generate with cache_implementation="static", or set cache="dynamic"'
                )
            if "flash" in self._attention(self.first):
                raise UnsupportedModel(
                    f'{who} with cache="static" brings 4-D attention masks to the places of each layer, which '
                    f'{self._attention(self.first)} does not have; load the model with attn_implementation="sdpa"'
                )
            return
        from transformers.cache_utils import DynamicLayer

        from mmeff.pruning.hosts._ledger import PrunedLayer

        for index, layer in enumerate(cache.layers if cache is not None else ()):
            if index >= self.first and type(layer) not in (DynamicLayer, PrunedLayer):
                raise UnsupportedModel(
                    f"{who} shortens the key/value cache from layer {self.first} on, which a "
                    f"{type(layer).__name__} (layer {index} of {type(cache).__name__}) cannot follow; "
                    'generate with cache_implementation="dynamic" and without torch.compile, set cache="static" for a cache '
                    "of fixed size, or remove the handle"
                )

    def _attention(self, index: int) -> str:
        return str(self.layers[index].self_attn.config._attn_implementation)

    def _hook(self, index: int) -> Any:
        compiled_step = self._compiled_step

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if compiled_step is not None and torch.compiler.is_compiling():
                return compiled_step(index, args, kwargs) if index >= self.first else None
            now = self.now
            if now is None:
                return None
            if index == 0 and now.cache is None:
                now.cache = kwargs.get("past_key_values")  # made by the decoder, where the caller passed none
            if now.prunes and index == 0:
                now.first = (args, kwargs)
            if now.prunes and index in self.points:
                with self.handle.recorder.time("selection", now.visual.device):
                    args, kwargs = self._prune(index, args, kwargs, now)
            result = self._follow(index, args, kwargs, now) if index >= self.first else (args, kwargs)
            if now.prunes and index + 1 in self.points:
                now.scored = (index, result)
            return result

        return hook

    def _prune(self, index: int, args: Any, kwargs: Any, now: Pass) -> tuple[Any, Any]:
        """Choose tokens at a prune point and gather the hidden states; the rest follows in `_follow`."""
        point, hidden = self.points[index], args[0]
        if self._prompt is None:
            self._remember_prompt(now)
        view = View(self, point, now, (args, kwargs))
        decision = self.method.decide(view)
        remark = self.method.remark(view)
        if remark is not None:
            self.handle.recorder.remark(remark)
        wanted = decision.keep & view.present
        taken = thin(now, view, wanted)
        hidden = gather_rows(hidden, taken, dim=1)
        if decision.hidden is not None:
            b, v = (wanted if decision.merged is None else wanted & decision.merged).nonzero(as_tuple=True)
            place = torch.searchsorted(taken, view._slots.contiguous())
            hidden[b, place[b, v]] = decision.hidden[b, v].to(hidden.dtype)
        now.ahead = {} if decision.hidden is not None else carried(view.ahead, taken)
        now.scored = None
        now.masks.clear()
        now.rotary.clear()
        self.record(point, wanted, view)
        return (hidden, *args[1:]), kwargs

    def _remember_prompt(self, now: Pass) -> None:
        """Keep the columns of the visual tokens, which decoding refers to."""
        visual = now.places.visual
        now.counts = visual.sum(dim=1)
        width = int(now.counts.max())
        order = (~visual).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self._prompt = torch.where(visual.gather(1, order), order + now.base, -1)

    def record(self, point: PrunePoint, wanted: Tensor, view: View) -> None:
        """Enter what stays from a prune point on."""
        width = int(wanted.sum(dim=1).max())
        kept = torch.where(wanted, view.original, torch.iinfo(torch.long).max).sort(dim=1).values[:, :width]
        kept = torch.where(kept == torch.iinfo(torch.long).max, -1, kept)
        self.handle.recorder.kept[point.layer] = kept.cpu()

    def _follow(self, index: int, args: Any, kwargs: Any, now: Pass) -> Any:
        """Give a layer behind the first prune point its rows, its columns and its cache layer."""
        ledger = self._ledger(index, now)
        if not (now.changed or ledger is not None):
            return args, kwargs
        kwargs = dict(kwargs)
        if now.changed:
            if not now.rotary:
                now.rotary[0] = tuple(gather_rows(x, now.cur, dim=1) for x in kwargs["position_embeddings"])
            kwargs["position_embeddings"] = now.rotary[0]
            if "position_ids" in kwargs:
                kwargs["position_ids"] = None  # flash attention takes gaps in them for borders of packed sequences
            if ledger is not None:
                ledger.append(now.base, now.cur + now.base, now.alive, now.base + now.length, complete=now.complete)
        stage = self._stage(index)
        if stage not in now.masks:
            now.masks[stage] = self._mask(kwargs.get("attention_mask"), ledger, now, index)
        kwargs["attention_mask"] = now.masks[stage]
        return args, kwargs

    def _ledger(self, index: int, now: Pass) -> Any:
        """The layer's ledger, which a pass that prunes puts in place of a plain cache layer; None where nothing is pruned."""
        cache = now.cache
        layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        if getattr(layer, "cols", None) is not None:
            return layer
        if not now.changed or cache is None:
            return None
        return adopt_layer(cache, index, now.cur, self.handle)

    def _stage(self, index: int) -> int:
        return max(layer for layer in self.points if layer <= index)

    def _mask(self, mask: Tensor | None, ledger: Any, now: Pass, index: int) -> Tensor | None:
        """The model's own mask, restricted to the rows and columns that are left.

        A mask of None (plain causal, nothing padded) stays None as long as no filler is among the keys.
        """
        complete = now.complete and (ledger is None or ledger.complete)
        if mask is None and complete:
            return None
        if ledger is None:
            cols, valid = now.cur, now.alive
        elif now.changed:  # the chunk is in the ledger already
            cols, valid = ledger.cols, ledger.valid
        else:
            cols, valid = ledger.columns(now.base, now.cur + now.base, now.alive)
        rows = now.cur + now.base
        if mask is None:
            if "flash" in self._attention(index):
                return valid
            causal = (rows[:, :, None] >= cols[:, None, :])[:, None]
            return _see_self(causal & valid[:, None, None], rows, cols, now.alive)
        if mask.ndim == 2:  # flash attention: 1 = real key
            return mask.gather(1, cols).bool() & valid
        if mask.ndim != 4:
            raise UnsupportedModel(
                f"attention masks of {mask.ndim} dimensions cannot be followed by {self.method.name()}"
            )
        batch, queries = now.cur.shape
        mask = mask.expand(batch, -1, -1, -1)
        if now.changed:
            mask = mask.gather(2, now.cur[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, cols[:, None, None, :].expand(-1, mask.shape[1], queries, -1))
        if complete:
            return mask
        if mask.dtype == torch.bool:
            return _see_self(mask & valid[:, None, None], rows, cols, now.alive)
        blocked = mask.masked_fill(~valid[:, None, None], torch.finfo(mask.dtype).min)
        itself = (rows[:, :, None] == cols[:, None, :]) & ~now.alive[:, :, None]
        return blocked.masked_fill(itself[:, None], 0.0)

    # ---- for methods that look at several layers, or at decoding

    def _watch(self, index: int) -> None:
        """Measure how the sublayers of a layer change tokens, in passes that prune."""

        def measure(kind: str) -> Any:
            def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                now = self.now
                if now is not None and now.prunes:
                    entered = args[0] if args else kwargs["hidden_states"]
                    left = output[0] if isinstance(output, tuple) else output
                    with self.handle.recorder.time("selection", now.visual.device):
                        seen = now.moved.setdefault(index, {"cur": now.cur, "alive": now.alive})
                        seen[kind] = token_changes(entered, left)

            return hook

        for kind, module in (("attention", self.layers[index].self_attn), ("mlp", self.layers[index].mlp)):
            self.handle.on_remove(module.register_forward_hook(measure(kind), with_kwargs=True).remove)

    def _observe(self, index: int | None) -> None:
        """Tell the method what the newest token looks at in one layer."""
        if index is None:
            return

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            now = self.now
            if now is None or not self.handle.enabled or self._prompt is None:
                return
            if now.cache is None:
                raise ValueError(
                    f"{self.method.name()} reads what generated tokens look at from the cache; call the model with "
                    "use_cache=True"
                )
            if not now.prunes and now.length > 1:
                return  # a further turn of text is no generated token
            with self.handle.recorder.time("selection", now.visual.device):
                seen = attention_of_last(self.layers[index], now, now.cache.layers[index], args, kwargs)
                columns = self._prompt
                at = columns.clamp(min=0)
                attention = torch.where(columns >= 0, seen.gather(1, at), 0.0)
                self.method.observe(self.state, attention, prefill=now.prunes)

        self.handle.on_remove(self.layers[index].register_forward_hook(hook, with_kwargs=True).remove)


def thin(now: Pass, view: View, wanted: Tensor) -> Tensor:
    """Leave a pass the wanted visual tokens (B, V) of a view and its other tokens; their places (B, n) among those present."""
    keep = torch.zeros_like(now.alive).scatter_(1, view._slots, wanted)
    real = now.real.gather(1, now.cur) & now.alive
    # 2 = stays, 1 = the row's own padding, 0 = dropped. Rows that keep fewer tokens are filled up with padding
    # first, and then with dropped tokens that nothing may look at.
    rank = torch.where(real & (keep | ~view.is_visual), 2, torch.where(~real & now.alive, 1, 0))
    longest = int((rank == 2).sum(dim=1).max())
    taken = rank.argsort(dim=1, descending=True, stable=True)[:, :longest].sort(dim=1).values
    now.alive = (rank > 0).gather(1, taken)
    now.complete = bool(now.alive.all())
    now.cur = now.cur.gather(1, taken)
    now.changed = True
    now.left[view.point.layer] = wanted.sum(dim=1)
    return taken


def adopt_layer(cache: Any, index: int, rows: Tensor, handle: Handle) -> Any:
    """The ledger in place of a cache layer, put there where it is a plain one; for as many rows as `rows` has."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    from mmeff.pruning.hosts._ledger import PrunedLayer
    from mmeff.pruning.hosts._static_ledger import PrunedStaticLayer

    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer, first = cache.layers[index], index == 0
    attached = lambda: handle.installed  # noqa: E731
    if isinstance(layer, (PrunedLayer, PrunedStaticLayer)):  # of an earlier turn, or one that was reset
        return layer
    if isinstance(layer, StaticLayer):
        cache.layers[index] = PrunedStaticLayer.adopt(layer, attached, speaks_for_all=first)
    else:
        cache.layers[index] = PrunedLayer.adopt(layer, len(rows), rows.device, attached, speaks_for_all=first)
    return cache.layers[index]


def digest_of(ids: Tensor | None, real: Tensor) -> Tensor:
    """(B,) int64: a hash of each row's real token ids in order; padding in front of them does not matter."""
    if ids is None:
        return torch.zeros(len(real), dtype=torch.long, device=real.device)
    place = real.cumsum(dim=1)
    mixed = (ids.long() + 1) * 6364136223846793005 + place * 1442695040888963407
    mixed = (mixed ^ (mixed >> 29)) * 3202034522624059733
    return (mixed * real).sum(dim=1)


def _see_self(mask: Tensor, rows: Tensor, cols: Tensor, alive: Tensor) -> Tensor:
    """Let filler queries see themselves, so that no row of the mask is empty."""
    itself = (rows[:, :, None] == cols[:, None, :]) & ~alive[:, :, None]
    return mask | itself[:, None]


def _forget_compiled_graphs() -> None:
    """Hooks are not guarded by compiled graphs: without this, a graph compiled before keeps running without them."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
