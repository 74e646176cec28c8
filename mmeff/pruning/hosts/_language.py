"""Pruning inside a decoder language model, for any family: hooks on the decoder layers, a ledger in the cache.

One forward pass of the model is one `Pass`. At a prune point the wanted tokens are gathered; from there on every layer gets
its rows of the rotary embedding, its rows and columns of the mask, and a cache layer that remembers which columns its
keys are. Positions stay original, so nothing outside the decoder layers changes.

What is needed of a family is small: decoder layers with `self_attn.q_proj/k_proj`, `input_layernorm`, and rotary
embeddings passed in as (cos, sin). A family's own file says where these are and what is visual.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from mmeff.errors import UnsupportedModel
from mmeff.handle import Handle
from mmeff.kernels import token_scores
from mmeff.pruning._base import PrunePoint, Rows, TokenPruner
from mmeff.report import DENSE, SPARSE


@dataclass
class Pass:
    """One forward pass: which original columns are still present, and what each layer is to be given."""

    base: int  # columns in the cache before this pass
    length: int  # columns that this pass adds
    visual: torch.Tensor  # (B, q) bool, all False where nothing is pruned
    real: torch.Tensor  # (B, q) bool, False on padding
    cache: Any
    prunes: bool
    cur: torch.Tensor  # (B, n) columns present, relative to base
    alive: torch.Tensor  # (B, n) bool, False on filler
    counts: torch.Tensor  # (B,) visual tokens that each row's prompt had at first
    past_real: torch.Tensor | None = None  # (B, base) bool, False on padding of earlier turns
    scored: tuple[int, Any] | None = None  # layer index, and the arguments it ran with
    complete: bool = True  # no filler among the present tokens
    masks: dict[int, torch.Tensor | None] = field(default_factory=dict)  # per stage
    rotary: dict[int, Any] = field(default_factory=dict)
    changed: bool = False  # whether tokens are missing by now


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
        self.handle = handle
        self.now: Pass | None = None
        for index in range(self.first - 1, len(self.layers)):
            hook = self.layers[index].register_forward_pre_hook(self._hook(index), with_kwargs=True)
            handle.on_remove(hook.remove)
        _forget_compiled_graphs()
        handle.on_remove(_forget_compiled_graphs)

    def begin(
        self, *, cache: Any, visual: torch.Tensor | None, real: torch.Tensor | None, batch: int, length: int,
        device: torch.device, reason: str | None,
    ) -> Pass:  # fmt: skip
        """Start a pass. `reason` says why this pass must not prune although it has visual tokens, or is None.

        Raises:
            UnsupportedModel: the prompt has visual tokens, and the cache has a fixed size.
        """
        base = cache.get_seq_length() if cache is not None else 0
        if visual is not None and cache is not None and self.handle.enabled:
            self._require_dynamic(cache)
        if visual is None:
            visual = torch.zeros(batch, length, dtype=torch.bool, device=device)
            prunes = False
        else:
            prunes = reason is None and self.handle.enabled
            if reason is not None and self.handle.enabled:
                self.handle.recorder.fallback(reason)
        self.now = Pass(
            base=base,
            length=length,
            visual=visual,
            real=torch.ones_like(visual) if real is None else real,
            cache=cache,
            prunes=prunes,
            cur=torch.arange(length, device=device).expand(batch, -1),
            alive=torch.ones(batch, length, dtype=torch.bool, device=device),
            counts=visual.sum(dim=1),
        )
        return self.now

    def end(self) -> Pass | None:
        """Close the pass; returns it for the record."""
        done, self.now = self.now, None
        return done

    def _require_dynamic(self, cache: Any) -> None:
        from transformers.cache_utils import DynamicLayer

        from mmeff.pruning.hosts._ledger import PrunedLayer

        for index, layer in enumerate(cache.layers):
            if index >= self.first and type(layer) not in (DynamicLayer, PrunedLayer):
                raise UnsupportedModel(
                    f"{self.method.name()} shortens the key/value cache from layer {self.first} on, which a "
                    f"{type(layer).__name__} (layer {index} of {type(cache).__name__}) cannot follow; "
                    'generate with cache_implementation="dynamic" and without torch.compile, or remove the handle'
                )

    def _hook(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now = self.now
            if now is None:
                return None
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
        view = View(self, point, now)
        counts = torch.tensor([point.count(n) for n in now.counts.tolist()], device=hidden.device)
        wanted = self.method.select(self.method.score(view), counts, view.present)
        keep = torch.zeros_like(now.alive).scatter_(1, view.slots, wanted)
        visual = now.visual.gather(1, now.cur) & now.alive
        real = now.real.gather(1, now.cur) & now.alive
        # 2 = stays, 1 = the row's own padding, 0 = dropped. Rows that keep fewer tokens are filled up with padding
        # first, and then with dropped tokens that nothing may look at.
        rank = torch.where(real & (keep | ~visual), 2, torch.where(~real & now.alive, 1, 0))
        longest = int((rank == 2).sum(dim=1).max())
        taken = rank.argsort(dim=1, descending=True, stable=True)[:, :longest].sort(dim=1).values
        now.alive = (rank > 0).gather(1, taken)
        now.complete = bool(now.alive.all())
        now.cur = now.cur.gather(1, taken)
        now.changed, now.scored = True, None
        now.masks.clear()
        now.rotary.clear()
        self._record(point, wanted, view)
        gathered = hidden.gather(1, taken[..., None].expand(-1, -1, hidden.shape[-1]))
        return (gathered, *args[1:]), kwargs

    def _record(self, point: PrunePoint, wanted: torch.Tensor, view: View) -> None:
        width = int(wanted.sum(dim=1).max())
        kept = torch.where(wanted, view.original, torch.iinfo(torch.long).max).sort(dim=1).values[:, :width]
        kept = torch.where(kept == torch.iinfo(torch.long).max, -1, kept)
        self.handle.recorder.kept[point.layer] = kept.cpu()

    def _follow(self, index: int, args: Any, kwargs: Any, now: Pass) -> Any:
        """Give a layer behind the first prune point its rows, its columns and its cache layer."""
        from mmeff.pruning.hosts._ledger import PrunedLayer

        cache = now.cache
        ledger: Any = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        if now.changed and cache is not None and not isinstance(ledger, PrunedLayer):
            from transformers.cache_utils import DynamicLayer

            while len(cache.layers) <= index:
                cache.layers.append(DynamicLayer())
            ledger = PrunedLayer.adopt(
                cache.layers[index], len(now.cur), now.cur.device, attached=lambda: self.handle.installed
            )
            cache.layers[index] = ledger
        pruned = isinstance(ledger, PrunedLayer)
        if not (now.changed or pruned):
            return args, kwargs
        kwargs = dict(kwargs)
        stage = self._stage(index)
        if stage not in now.masks:
            now.masks[stage] = self._mask(kwargs.get("attention_mask"), ledger if pruned else None, now, index)
        kwargs["attention_mask"] = now.masks[stage]
        if now.changed:
            if not now.rotary:
                now.rotary[0] = tuple(_rows(x, now.cur, dim=1) for x in kwargs["position_embeddings"])
                if kwargs.get("position_ids") is not None:
                    now.rotary[1] = _rows(kwargs["position_ids"], now.cur, dim=-1)
            kwargs["position_embeddings"] = now.rotary[0]
            if 1 in now.rotary:
                kwargs["position_ids"] = now.rotary[1]
            if pruned:
                ledger.append(now.base, now.cur + now.base, now.alive, now.base + now.length, complete=now.complete)
        return args, kwargs

    def _stage(self, index: int) -> int:
        return max(layer for layer in self.points if layer <= index)

    def _mask(self, mask: torch.Tensor | None, ledger: Any, now: Pass, index: int) -> torch.Tensor | None:
        """The model's own mask, restricted to the rows and columns that are left.

        A mask of None (plain causal, nothing padded) stays None as long as no filler is among the keys.
        """
        complete = now.complete and (ledger is None or ledger.complete)
        if mask is None and complete:
            return None
        if ledger is None:
            cols, valid = now.cur, now.alive
        else:
            cols, valid = ledger.columns(now.base, now.cur + now.base, now.alive)
        rows = now.cur + now.base
        if mask is None:
            if "flash" in str(self.layers[index].self_attn.config._attn_implementation):
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


class View:
    """A `LayerView` over the layer before a prune point: attention is recomputed for the chosen rows alone."""

    def __init__(self, pruner: LanguagePruner, point: PrunePoint, now: Pass) -> None:
        self.pruner, self.point, self.now = pruner, point, now
        visual = now.visual.gather(1, now.cur) & now.alive
        width = int(visual.sum(dim=1).max())
        order = (~visual).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self.present = visual.gather(1, order)  # (B, V)
        self.slots = order  # (B, V) places among the present tokens; behind a row's visual tokens come its other ones
        rank = now.visual.cumsum(dim=1) - 1
        self.original = rank.gather(1, now.cur.gather(1, order))

    def received(self, rows: Rows) -> torch.Tensor:
        now = self.now
        if now.scored is None or now.scored[0] != self.point.layer - 1:
            raise RuntimeError(f"layer {self.point.layer - 1} has not run in this pass")
        index, (args, kwargs) = now.scored
        layer, hidden = self.pruner.layers[index], args[0]
        chosen, weight = self._rows(rows)
        cos, sin = (_rows(x, chosen, dim=1) if x.shape[0] > 1 or chosen.shape[0] > 1 else x[:, chosen[0]]
                    for x in kwargs["position_embeddings"])  # fmt: skip
        picked = hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))
        q = _project(layer, "q", picked, cos, sin)
        if now.cache is not None:
            k = now.cache.layers[index].keys.transpose(1, 2)
        else:
            k = _project(layer, "k", hidden, *kwargs["position_embeddings"])
        before = k.shape[1] - hidden.shape[1]  # keys of earlier turns
        visible = now.real.gather(1, now.cur) & now.alive
        if before:
            visible = torch.cat([self._visible_before(index, before), visible], dim=1)
        scores = token_scores(
            q, k, row_positions=chosen + before, key_mask=visible, weights=weight, scale=layer.self_attn.scaling
        )
        at = (self.slots + before)[:, None].expand(-1, scores.shape[1], -1)
        return scores.gather(2, at) * self.present[:, None]

    def _visible_before(self, index: int, count: int) -> torch.Tensor:
        """Which keys of earlier turns may be looked at, (B, count): not their padding, and not their filler."""
        past = self.now.past_real
        batch, device = len(self.now.cur), self.now.cur.device
        if past is None:
            return torch.ones(batch, count, dtype=torch.bool, device=device)
        ledger = self.now.cache.layers[index]
        if not hasattr(ledger, "columns"):
            return past[:, :count]
        nothing = self.now.cur[:, :0]
        cols, valid = ledger.columns(self.now.base, nothing, nothing.bool())
        return past.gather(1, cols[:, :count]) & valid[:, :count]

    def _rows(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Places (B, R) of the query rows among the present tokens, and weights (B, 1, R) that blank the unused ones."""
        now = self.now
        size = now.cur.shape[1]
        if rows == "last":
            return torch.full((len(now.cur), 1), size - 1, device=now.cur.device), None
        wanted = now.real.gather(1, now.cur) & now.alive
        if rows == "text":
            visual = now.visual.gather(1, now.cur)
            behind = visual.flip(1).cumsum(dim=1).flip(1) == 0  # no visual token at or behind this place
            wanted &= behind
        width = int(wanted.sum(dim=1).max())
        order = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        return order, wanted.gather(1, order).float()[:, None]


def _project(layer: Any, which: str, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys (B, R, H, D) of a decoder layer for given inputs, after norm and rotary embedding."""
    attention = layer.self_attn
    x = getattr(attention, f"{which}_proj")(layer.input_layernorm(hidden))
    x = x.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None:
        x = norm(x)
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def _rows(x: torch.Tensor, rows: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Gather per-batch `rows` (B, n) of x along the sequence axis `dim`; a batch of one is expanded first.

    x is (B|1, q, ...) with dim 1, or (..., B|1, q) with dim -1.
    """
    if dim == 1:
        x = x.expand(len(rows), *x.shape[1:])
        return x.gather(1, rows.reshape(*rows.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
    x = x.expand(*x.shape[:-2], len(rows), -1)
    return x.gather(-1, rows.expand(*x.shape[:-2], -1, -1))


def _see_self(mask: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Let filler queries see themselves, so that no row of the mask is empty."""
    itself = (rows[:, :, None] == cols[:, None, :]) & ~alive[:, :, None]
    return mask | itself[:, None]


def count_layers(handle: Handle, total: int, first: int, acted: bool) -> None:
    """Enter one prefill into the record: layers behind the first prune point are sparse when it acted."""
    for layer in range(total):
        handle.recorder.call(layer, SPARSE if acted and layer >= first else DENSE)


def _forget_compiled_graphs() -> None:
    """Hooks are not guarded by compiled graphs: without this, a graph compiled before keeps running without them."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
