"""The `LayerView` of a running model: attention is recomputed for the rows a method asks for, and for no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmeff.kernels import token_scores
from mmeff.pruning._base import EncoderView, Rows, Transition, Where
from mmeff.pruning._schedule import PrunePoint
from mmeff.report import Span

if TYPE_CHECKING:
    from mmeff.pruning.hosts._language import LanguagePruner, Pass

CHUNK_BYTES = 64 * 2**20  # of attention of text rows at a time


class Projected(NamedTuple):
    """Values (B, R, C) of a projection of the layer at a prune point, before norm and rotary embedding.

    slots: (B, R) places among the present tokens; None for all of them. span: the time it took, inside of the selection.
    """

    slots: Tensor | None
    values: Tensor
    span: Span


class View:
    """See `LayerView`. `entering` are the arguments of the layer at the prune point, as the model gave them."""

    def __init__(self, pruner: LanguagePruner, point: PrunePoint, now: Pass, entering: tuple[Any, Any]) -> None:
        self.pruner, self.point, self.now, self._entering = pruner, point, now, entering
        self.layers = len(pruner.layers)
        self.state = pruner.state
        self.ahead: dict[str, Projected] = {}  # by projection, "q" or "k"
        self._normed: Tensor | None = None  # what the layer at the prune point projects
        self._asked: dict[tuple[Rows, Where], Any] = {}
        places = now.places
        self.is_visual = places.visual.gather(1, now.cur) & now.alive  # (B, n) among the present tokens
        width = int(self.is_visual.sum(dim=1).max())
        order = (~self.is_visual).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self.present = self.is_visual.gather(1, order)
        self._slots = order  # (B, V) places among the present tokens; behind a row's visual tokens come its other ones
        self._columns = now.cur.gather(1, order)  # (B, V) columns of the chunk
        rank = places.visual.cumsum(dim=1) - 1
        self.original = rank.gather(1, self._columns)
        self.initial = now.counts
        counts = [point.count(n) for n in now.counts.tolist()]
        self.counts = torch.tensor(counts, device=now.cur.device)
        self.frame = self._at(places.frame)
        self.raster = _rank_in_frame(places.frame, places.visual).gather(1, self._columns) * self.present
        self.place = torch.stack([self._at(places.row), self._at(places.column)], dim=-1)
        self.padded = None if places.padded is None else self._at(places.padded)
        self.digest = now.digest
        pictured = places.visual | places.marker
        behind = pictured.flip(1).cumsum(dim=1).flip(1) == 0  # no visual token at or behind this column
        wanted = (behind & now.real).gather(1, now.cur) & now.alive
        rows = int(wanted.sum(dim=1).max())
        self._text_slots = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :rows]
        self.text = wanted.gather(1, self._text_slots)

    def _at(self, x: Tensor) -> Tensor:
        return x.gather(1, self._columns) * self.present

    # ---- attention

    def received(self, rows: Rows = "last", *, weights: Tensor | None = None, where: Where = "before") -> Tensor:
        if weights is not None and rows != "text":
            raise ValueError(f'weights are factors of the text rows; pass rows="text" with them, got rows={rows!r}')
        slots, factors = self._query_rows(rows)
        asked = None
        if weights is not None:
            factors = weights.float() * self.text[:, None]
            some = rows_that_count(factors)
            if some is not None:
                slots = slots.gather(1, some)
                factors = factors.gather(2, some[:, None].expand(-1, factors.shape[1], -1))
                asked = self._project(slots, where)
        q, k, visible, before, scale = asked or self._queries_and_keys(rows, slots, where)
        scores = token_scores(q, k, row_positions=slots + before, key_mask=visible, weights=factors, scale=scale)
        at = (self._slots + before)[:, None].expand(-1, scores.shape[1], -1)
        return scores.gather(2, at) * self.present[:, None]

    def text_attention(self, *, to: Literal["text", "visual"] = "text", where: Where = "before") -> Tensor:
        q, k, visible, before, scale = self._queries_and_keys("text", self._text_slots, where)
        B, T, H, _ = q.shape
        slots, there = (self._text_slots, self.text) if to == "text" else (self._slots, self.present)
        out = torch.empty(B, H, T, slots.shape[1], device=q.device, dtype=torch.float32)
        k = k.float().transpose(1, 2).repeat_interleave(H // k.shape[2], dim=1)
        keys = torch.arange(k.shape[2], device=q.device)
        columns = (slots + before)[:, None, None]
        step = max(1, CHUNK_BYTES // (4 * B * H * k.shape[2]))
        for start in range(0, T, step):
            part = q[:, start : start + step].float().transpose(1, 2)
            scores = (part @ k.transpose(2, 3)) * scale
            reach = keys <= (self._text_slots[:, start : start + step] + before)[:, None, :, None]
            scores = scores.masked_fill(~(reach & visible[:, None, None]), float("-inf"))
            seen = scores.softmax(-1).nan_to_num(0.0)
            out[:, :, start : start + step] = seen.gather(3, columns.expand(-1, H, part.shape[2], -1))
        return out * self.text[:, None, :, None] * there[:, None, None, :]

    def _queries_and_keys(self, rows: Rows, slots: Tensor, where: Where) -> tuple[Tensor, Tensor, Tensor, int, float]:
        """Queries of `rows`, the present tokens at `slots`, all keys, which of them are visible, how many are of earlier turns,
        and the scale; projected once, however often a method asks."""
        found: tuple[Tensor, Tensor, Tensor, int, float]
        if (rows, where) not in self._asked:
            self._asked[rows, where] = self._project(slots, where, stay=rows == "text")
        found = self._asked[rows, where]
        return found

    def _project(self, slots: Tensor, where: Where, *, stay: bool = False) -> tuple[Tensor, Tensor, Tensor, int, float]:
        """As `_queries_and_keys`. stay: the slots are those of all text, which no method drops."""
        now = self.now
        if where == "next":
            index, (args, given) = self.point.layer, self._entering
            hidden = args[0]
            rotary = tuple(gather_rows(x, now.cur, dim=1) for x in given["position_embeddings"])
            new = None
        else:
            if now.scored is None or now.scored[0] != self.point.layer - 1:
                raise RuntimeError(f"layer {self.point.layer - 1} has not run in this pass")
            index, (args, given) = now.scored
            hidden, rotary = args[0], given["position_embeddings"]
            new = keys_of(now.cache.layers[index]).transpose(1, 2) if now.cache is not None else None
        layer = self.pruner.layers[index]
        if where == "next" and stay and bool(self.text.all()):
            raw = self._ahead(layer, "q", hidden, slots)
        else:
            raw = project(layer, "q", gather_rows(hidden, slots, dim=1))
        q = turn(layer, "q", raw, *(gather_rows(x, slots, dim=1) for x in rotary))
        k = new
        if k is None:
            raw = self._ahead(layer, "k", hidden, None) if where == "next" else project(layer, "k", hidden)
            k = turn(layer, "k", raw, *rotary)
            past = None if now.cache is None or index >= len(now.cache.layers) else now.cache.layers[index]
            if where == "next" and past is not None and past.is_initialized and past.keys.numel():
                k = torch.cat([keys_of(past).transpose(1, 2), k], dim=1)
        before = k.shape[1] - hidden.shape[1]
        visible = now.real.gather(1, now.cur) & now.alive
        if before:
            visible = torch.cat([visible_before(now, index, before), visible], dim=1)
        return q, k, visible, before, layer.self_attn.scaling

    def _ahead(self, layer: Any, which: str, hidden: Tensor, slots: Tensor | None) -> Tensor:
        """The layer's own projection of the tokens at `slots`, or of all, which it is spared where they stay; what it is spared
        does not count as selection."""
        if which not in self.ahead:
            if self._normed is None:
                self._normed = layer.input_layernorm(hidden)
            x = self._normed if slots is None else gather_rows(self._normed, slots, dim=1)
            with self.pruner.handle.recorder.time("selection", hidden.device) as span:
                raw = projection(layer, which)(x)
            span.share = 0.0  # inside of a span that counts
            self.ahead[which] = Projected(slots, raw, span)
        return self.ahead[which].values

    def _query_rows(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Places (B, R) of the query rows among the present tokens, and weights (B, 1, R) that blank the unused ones."""
        now = self.now
        if rows == "last":
            return torch.full((len(now.cur), 1), now.cur.shape[1] - 1, device=now.cur.device), None
        if rows == "text":
            return self._text_slots, self.text.float()[:, None]
        wanted = now.real.gather(1, now.cur) & now.alive
        width = int(wanted.sum(dim=1).max())
        order = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        return order, wanted.gather(1, order).float()[:, None]

    # ---- states

    def embeddings(self) -> Tensor:
        hidden, _, _ = self.inputs()
        return gather_rows(hidden, self._columns, dim=1) * self.present[..., None]

    def text_embeddings(self) -> Tensor:
        hidden, _, _ = self.inputs()
        return gather_rows(hidden, self.now.cur.gather(1, self._text_slots), dim=1) * self.text[..., None]

    def text_ids(self) -> Tensor:
        assert self.now.ids is not None  # passes without ids do not prune
        return self.now.ids.gather(1, self.now.cur.gather(1, self._text_slots))

    def hidden(self) -> Tensor:
        return gather_rows(self._entering[0][0], self._slots, dim=1).mul_(self.present[..., None])

    def inputs(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        assert self.now.first is not None
        args, kwargs = self.now.first
        return args[0], self.now.real, kwargs["position_embeddings"]

    def slots(self) -> Tensor:
        return self._columns

    def transitions(self, layer: int) -> tuple[Transition, Transition]:
        seen = self.now.moved.get(layer)
        if seen is None:
            raise RuntimeError(f"layer {layer} was not watched, or has not run before layer {self.point.layer}")
        at = torch.searchsorted(seen["cur"].contiguous(), self._columns.contiguous())
        at = at.clamp(max=seen["cur"].shape[1] - 1)
        real = self.now.real.gather(1, seen["cur"]) & seen["alive"]
        first, second = (
            Transition(ratio=seen[kind][0], cosine=seen[kind][1], real=real, visual=at) for kind in ("attention", "mlp")
        )
        return first, second

    def encoder(self) -> EncoderView:
        assert self.now.look is not None
        found: EncoderView = self.now.look()(self)
        return found


def rows_that_count(factors: Tensor) -> Tensor | None:
    """Places (B, R) of the rows whose factors (B, 1 or H, T) are not all 0, and of a few others where rows of the batch have
    fewer of them; None where that leaves nothing out."""
    counts = (factors != 0).any(1)
    most = max(1, int(counts.sum(1).max()))
    return None if most == counts.shape[1] else (~counts).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


def project(layer: Any, which: str, hidden: Tensor) -> Tensor:
    """Queries or keys (B, R, H * D) of a decoder layer for given inputs, as its projection makes them."""
    found: Tensor = projection(layer, which)(layer.input_layernorm(hidden))
    return found


def projection(layer: Any, which: str) -> Any:
    """The module that makes a decoder layer's queries, "q", or keys, "k"."""
    return getattr(layer.self_attn, f"{which}_proj")


def turn(layer: Any, which: str, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, R, H, D) after norm and rotary embedding."""
    attention = layer.self_attn
    x = projected.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None:
        x = norm(x)
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = x.shape[-1] // 2
    turned = x * cos  # the halves are added in place: half the memory traffic of putting them side by side first
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def attention_of_last(layer: Any, now: Pass, ledger: Any, args: Any, kwargs: Any) -> Tensor:
    """(B, columns) float32: what the newest token of each row looked at, mean over heads, by original column.

    Called behind the layer, whose arguments are already restricted to the tokens present and whose keys are all cached.
    """
    hidden = args[0][:, -1:]
    cos, sin = (x[:, -1:].expand(len(hidden), -1, -1) for x in kwargs["position_embeddings"])
    q, k = turn(layer, "q", project(layer, "q", hidden), cos, sin), ledger.keys.transpose(1, 2)
    B, total = len(hidden), now.base + now.length
    if hasattr(ledger, "columns"):
        if now.changed:  # the chunk is in the ledger already
            cols, valid = ledger.cols, ledger.valid
        else:
            cols, valid = ledger.columns(now.base, now.cur + now.base, now.alive)
    else:
        cols = torch.arange(total, device=q.device).expand(B, -1)
        valid = torch.ones_like(cols, dtype=torch.bool)
    real = now.real if now.past_real is None else torch.cat([now.past_real, now.real], dim=1)
    if real.shape[1] == total:
        valid = valid & real.gather(1, cols)
    seen = token_scores(q, k, key_mask=valid, scale=layer.self_attn.scaling).mean(dim=1)
    return torch.zeros(B, total, device=q.device, dtype=seen.dtype).scatter_add_(1, cols, seen * valid)


def token_changes(entered: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of a sublayer's output over that of its input, and the cosine between both, (B, S) float32 each."""
    a, b = entered.float(), left.float()
    long, longer = a.norm(dim=-1), b.norm(dim=-1)
    cosine = torch.linalg.vecdot(a, b) / (long.clamp(min=1e-8) * longer.clamp(min=1e-8))
    return longer / long.clamp(min=torch.finfo(torch.float32).tiny), cosine


def visible_before(now: Pass, index: int, count: int) -> Tensor:
    """Which keys of earlier turns may be looked at, (B, count): not their padding, and not their filler."""
    past, batch, device = now.past_real, len(now.cur), now.cur.device
    ledger = now.cache.layers[index]
    if getattr(ledger, "cols", None) is None:
        return torch.ones(batch, count, dtype=torch.bool, device=device) if past is None else past[:, :count]
    if ledger.seen > now.base:  # the chunk is in the ledger already
        cols, valid = ledger.cols, ledger.valid
    else:
        nothing = now.cur[:, :0]
        cols, valid = ledger.columns(now.base, nothing, nothing.bool())
    return valid[:, :count] if past is None else past.gather(1, cols[:, :count]) & valid[:, :count]


def keys_of(layer: Any) -> Tensor:
    """(B, H, keys, D): the keys that a cache layer holds; one of fixed size has room for more."""
    length = getattr(layer, "cumulative_length", None)
    return layer.keys if length is None else layer.keys[:, :, : int(length)]


def gather_rows(x: Tensor, rows: Tensor, *, dim: int) -> Tensor:
    """Gather per-batch `rows` (B, n) of x along the sequence axis `dim`; a batch of one is expanded first.

    x is (B|1, q, ...) with dim 1, or (..., B|1, q) with dim -1.
    """
    if dim == 1:  # vectors are copied whole, for which gather() takes fifteen times as long
        start = x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
        return x.flatten(0, 1).index_select(0, (rows + start).flatten()).view(*rows.shape, *x.shape[2:])
    x = x.expand(*x.shape[:-2], len(rows), -1)
    return x.gather(-1, rows.expand(*x.shape[:-2], -1, -1))


def _rank_in_frame(frame: Tensor, visual: Tensor) -> Tensor:
    """(B, q): how many visual tokens of the same frame come before each; frames may take turns, as the tiles of a picture
    that is read line by line do."""
    label = frame.masked_fill(~visual, int(frame.max()) + 1)
    order = label.argsort(dim=1, stable=True)
    ahead = label.gather(1, order)
    start = torch.searchsorted(ahead, ahead)  # of each frame, on its left edge
    rank = torch.arange(frame.shape[1], device=frame.device) - start
    return torch.empty_like(rank).scatter_(1, order, rank)
