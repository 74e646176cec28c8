"""What every visual token pruner is made of: where it prunes, what it looks at, which tokens it takes.

A method only decides. At each of its prune points it is given a `LayerView`, through which it can ask for attention that
was paid to the visual tokens, for their embeddings, or for what the vision encoder saw, and it answers with a
`Decision`. Hosts do the rest: gathering, masks, caches, positions, padding, beams.

Two kinds. An `InputPruner` acts before the first decoder layer; a `LayerPruner` acts inside the language model, at one
layer or several, and takes per-layer specs such as "2:0.5,10:0.25".
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from mmeff.config import MethodConfig, option
from mmeff.pruning._schedule import PrunePoint, check_points, parse_schedule, scale_to_mean
from mmeff.pruning._select import share, top_k

PrunerT = TypeVar("PrunerT", bound="TokenPruner")

Rows = Literal["last", "text", "all"]
Where = Literal["before", "next"]
Need = Literal["class token", "encoder", "projector", "frames", "text ids"]


class Decision(NamedTuple):
    """What a method answers at a prune point.

    keep: (B, V) bool, True for tokens that stay. hidden: (B, V, D) values that replace the hidden states of kept tokens
    (merging), or None; entries of dropped tokens are ignored. merged: (B, V) bool, which of them are replaced; None for all.
    """

    keep: Tensor
    hidden: Tensor | None = None
    merged: Tensor | None = None


class Transition(NamedTuple):
    """How one sublayer changed each token that was present in it, (B, S) float32 each; unused places are masked by `real`.

    ratio: norm of the sublayer's output (before the residual) over the norm of its normalised input. cosine: between both.
    visual: (B, V) places of the view's visual tokens among the S.
    """

    ratio: Tensor
    cosine: Tensor
    real: Tensor
    visual: Tensor


class EncoderView(Protocol):
    """What the vision encoder saw, brought to one entry per visual token (the mean over its patches where tokens merge some).

    Layers count the encoder's own, negative ones from its end, so that -1 is the last and -2 the one whose output LLaVA uses.
    Entries of absent tokens are 0.
    """

    layers: int

    def received(self, layer: int, rows: Literal["class", "all"]) -> Tensor:
        """(B, V) float32: attention that each token's patches receive from the class token, or on the mean from all
        patches of the same picture; mean over heads. "class" needs `needs = {"class token"}`."""
        ...

    def keys(self, layer: int) -> Tensor:
        """(B, V, D) float32: key vectors of that layer's attention, mean over heads."""
        ...

    def features(self) -> Tensor:
        """(B, V, Dv): what entered the projector."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """The projector on (..., Dv) features of single tokens: (..., D), computed in the features' dtype."""
        ...


class LayerView(Protocol):
    """The model at a prune point, as a method sees it.

    B rows, H heads, T text tokens behind the last visual one, V visual tokens still present (both of the largest row; rows
    with fewer are padded at the end), D width of the language model. Markers such as newline embeddings inside a picture
    are no visual tokens: they always stay.
    """

    point: PrunePoint
    layers: int  # of the language model
    present: Tensor  # (B, V) bool: False where a row has no such token
    original: Tensor  # (B, V) index of each token among the row's original visual tokens
    initial: Tensor  # (B,) visual tokens that each row's prompt had at first
    counts: Tensor  # (B,) visual tokens to keep here
    frame: Tensor  # (B, V) which image, tile or video frame of the row the token lies in, from 0
    place: Tensor  # (B, V, 2) row and column in that frame's own grid
    raster: Tensor  # (B, V) index of each token among the original tokens of its frame, row by row from 0
    padded: Tensor | None  # (B, V) share of a token's area that pads the picture; None where the host cannot tell
    text: Tensor  # (B, T) bool: False where a row has no such text token; text tokens stand in order, from the left
    digest: Tensor  # (B,) int64: a hash of each row's real token ids, equal whatever the batch and for all its beams
    state: Any  # what `new_state` made for this installation

    def received(self, rows: Rows = "last", *, weights: Tensor | None = None, where: Where = "before") -> Tensor:
        """Softmax attention (B, H, V) float32 that chosen query rows paid to each visual token, summed over the rows.

        Args:
            rows: "last" the last token of the prompt; "text" the T text tokens; "all" every real token.
            weights: (B, H or 1, T) factors of the text rows; only with rows="text".
            where: "before": in the layer that just ran. "next": as the layer at the prune point would, were nothing dropped.
        The softmax runs over all visible keys, as in the model, before it is restricted to visual ones.
        """
        ...

    def text_attention(self, *, to: Literal["text", "visual"] = "text", where: Where = "before") -> Tensor:
        """(B, H, T, T) float32: attention from text row to text column, part of the softmax over all visible keys; or with
        to="visual" to the visual tokens, (B, H, T, V), for methods that treat pairs one by one: `received` needs less."""
        ...

    def embeddings(self) -> Tensor:
        """(B, V, D): what entered the first decoder layer at the visual tokens, the projected features."""
        ...

    def text_embeddings(self) -> Tensor:
        """(B, T, D): what entered the first decoder layer at the text tokens."""
        ...

    def text_ids(self) -> Tensor:
        """(B, T) int64: ids of the text tokens; those of absent ones mean nothing. Needs `needs = {"text ids"}`."""
        ...

    def hidden(self) -> Tensor:
        """(B, V, D): what enters layer `point.layer` at the visual tokens."""
        ...

    def transitions(self, layer: int) -> tuple[Transition, Transition]:
        """How the attention and the feed-forward sublayer of a watched layer changed the tokens; see `TokenPruner.watches`."""
        ...

    def inputs(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Everything that entered the first decoder layer: hidden states (B, S, D), which of them are real (B, S) bool, and
        the rotary (cos, sin) of their positions, (1 or B, S, head dim)."""
        ...

    def slots(self) -> Tensor:
        """(B, V): where the visual tokens lie among the S tokens of `inputs()`."""
        ...

    def encoder(self) -> EncoderView:
        """What the vision encoder saw; a method that asks lists what it wants in `needs`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenPruner(MethodConfig):
    """Base of methods that drop visual tokens. A subclass gives `points`, and `score` or `decide`."""

    stage: ClassVar[str] = "pruning"
    needs: ClassVar[frozenset[Need]] = frozenset()  # what a host must offer; checked when the method is installed

    quota: Literal["prompt", "frame"] = option(
        "prompt",
        "what a budget is shared over: all visual tokens of a prompt compete, or every image, tile or video frame keeps its share",
        unit="scope", source="tiled models keep a quota per tile in InternVL's and SmolVLM's ports of these methods",
    )  # fmt: skip
    cache: Literal["dynamic", "static"] = option(
        "dynamic",
        'the cache that generation runs on: one that grows, or one of fixed size (cache_implementation="static"), whose decoding '
        "steps can be compiled; the other kind is refused",
        unit="kind of cache", source="the default of transformers",
    )  # fmt: skip
    when: Literal["prefill", "decode"] = option(
        "prefill",
        "when tokens go: while the prompt is read, or at the first decoded token, out of the cache of a prompt that was read "
        "densely. The latter saves decoding only; it leaves losses and logits of the prompt alone, and prompts may be read in "
        "chunks",
        unit="phase", source="the papers prune in prefill",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.cache == "dynamic" or self.when == "prefill",
            "when",
            'be "prefill" with cache="static"',
            "a cache of fixed size does not get smaller once it is filled",
        )

    @abstractmethod
    def points(self, layers: int) -> tuple[PrunePoint, ...]:
        """Where and how much to prune in a model of `layers` layers, in ascending order of layers.

        Raises: ValueError if a point lies outside the model.
        """

    @abstractmethod
    def at_budget(self: PrunerT, mean: float, layers: int) -> PrunerT:
        """This method, set so that the mean of visual tokens over all layers is `mean` (a fraction) of those there were.

        Raises: ValueError with the least mean that can be reached, if it is more than that.
        """

    def score(self, view: LayerView) -> Tensor:
        """Scores (B, V); the highest are kept. A method that does not rank tokens one by one has its own `decide`."""
        raise NotImplementedError(f"{type(self).__name__} has its own decide()")

    def decide(self, view: LayerView) -> Decision:
        """Which tokens stay: those with the highest scores, `view.counts` of each row. Ties go to the earlier token."""
        return Decision(self.take(view, self.score(view)))

    def take(
        self, view: LayerView, scores: Tensor, counts: Tensor | None = None, *, among: Tensor | None = None
    ) -> Tensor:
        """(B, V) bool: the highest scores of each row, or of each of its frames with quota="frame".

        counts: (B,) tokens to take, where not `view.counts`. among: (B, V) bool, the present tokens that may be taken,
        where not all may.
        """
        counts = view.counts if counts is None else counts
        among = view.present if among is None else among
        if self.quota == "prompt":
            return top_k(scores, counts, among)
        return top_k(scores, share(counts, view.frame, among), among, groups=view.frame)

    def ranks(self) -> bool:
        """Whether `score` alone decides which tokens stay, so that another method may weigh the scores first."""
        return type(self).score is not TokenPruner.score and type(self).decide is TokenPruner.decide

    def why_not_from_cache(self) -> str | None:
        """A sentence why this method cannot choose once the prompt has been read (when="decode"), or None where it can.

        All that is left then are cached keys, the query of the prompt's last token, token ids and the places of tokens: of
        `LayerView`, `received("last")`, `text_ids` and the attributes.
        """
        return "it looks at states of the prompt that are gone by then"

    def remark(self, view: LayerView) -> str | None:
        """What the report should say about a prune point, such as a wish that this model cannot meet; None mostly."""
        return None

    # ---- for methods that look beyond one prompt, or at more than one layer; most have no use for these

    def watches(self, layers: int) -> frozenset[int]:
        """Layers whose sublayers are measured for `LayerView.transitions`."""
        return frozenset()

    def observes(self, layers: int) -> int | None:
        """A layer whose attention to visual tokens `observe` is told of, in prefill and at every decoded token."""
        return None

    def new_state(self) -> Any:
        """State of one installation, which views carry; None where prompts have nothing to do with each other."""
        return None

    def observe(self, state: Any, attention: Tensor, *, prefill: bool) -> None:
        """Take note of the attention (B, initial visual tokens) that the newest token paid in the observed layer, mean
        over heads; tokens that were dropped got 0."""

    def reset_episode(self, state: Any) -> None:
        """Forget what earlier prompts left in the state.

        Raises: TypeError for a method that keeps nothing.
        """
        raise TypeError(
            f"{type(self).__name__} keeps nothing from one prompt to the next, so it has no episode to reset"
        )


@dataclass(frozen=True, kw_only=True)
class InputPruner(TokenPruner):
    """Base of methods that drop visual tokens before the language model runs."""

    keep: float | int = option(
        0.25,
        "visual tokens kept: a fraction as a float, a number as an int",
        unit="fraction or tokens",
        source="a common setting of the comparisons in this field",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_keep(self, "keep")

    def points(self, layers: int) -> tuple[PrunePoint, ...]:
        return (PrunePoint(layer=0, keep=self.keep),)

    def at_budget(self: PrunerT, mean: float, layers: int) -> PrunerT:
        check_mean(type(self).__name__, mean)
        return self.replace(keep=float(mean))


@dataclass(frozen=True, kw_only=True)
class LayerPruner(TokenPruner):
    """Base of methods that drop visual tokens inside the language model."""

    least_layer: ClassVar[int] = 1  # the first that may be pruned before; 0 where scores do not need a layer that ran

    schedule: str = option(
        "",
        'where and how much to prune, in place of the method\'s own setting: "layer:keep" pairs such as "2:0.5,10:0.25", '
        "fractions of the tokens there were at first or numbers of tokens",
        unit="layer:fraction or layer:tokens", source="the grammar of UniPruneBench's per-layer specs",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule:
            check_points(type(self).__name__, parse_schedule(self.schedule), least=self.least_layer)

    @abstractmethod
    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        """The points of the method's own fields, for a model of `layers` layers."""

    def points(self, layers: int) -> tuple[PrunePoint, ...]:
        found = parse_schedule(self.schedule) if self.schedule else self.default_points(layers)
        check_points(type(self).__name__, found, least=self.least_layer, layers=layers)
        return found

    def at_budget(self: PrunerT, mean: float, layers: int) -> PrunerT:
        """As the base says; the layers of the points stay, and their fractions keep their proportions where they can."""
        who, points = type(self).__name__, [(p.layer, p.keep) for p in self.points(layers)]
        check_mean(who, mean)
        if len({type(keep) for _, keep in points if keep > 0}) > 1:
            raise ValueError(
                f"{who} cannot be set to a budget from fractions and numbers of tokens at once, got "
                f"{', '.join(f'{layer}:{keep}' for layer, keep in points)}; write either, whose proportions then stay"
            )
        largest = max(1, *(keep for _, keep in points))  # numbers give proportions only
        found = scale_to_mean([(layer, keep / largest) for layer, keep in points], mean, layers)
        if found is None and mean * layers < points[0][0]:
            raise ValueError(
                f"{who} prunes first before layer {points[0][0]} of {layers}, so the mean of visual tokens over layers is at "
                f"least {points[0][0] / layers:.4g} of all, got a budget of {mean:.4g}; raise the budget, or prune earlier "
                'through schedule="layer:keep,..."'
            )
        if found is None:
            last = min(layer for layer, keep in points if keep == 0)
            raise ValueError(
                f"{who} drops all visual tokens before layer {last} of {layers}, so their mean over layers is at most "
                f"{last / layers:.4g} of all, got a budget of {mean:.4g}; lower the budget, or drop them later through "
                'schedule="layer:keep,..."'
            )
        return self.replace(schedule=",".join(f"{layer}:{keep!r}" for layer, keep in found))


def check_mean(who: str, mean: float) -> None:
    """Raise ValueError unless a budget is a fraction in (0, 1]."""
    if not 0 < mean <= 1:
        raise ValueError(
            f"a budget for {who} must be a fraction of the visual tokens in (0, 1], got {mean}; divide numbers by the tokens"
        )


def require_keep(method: TokenPruner, field: str) -> None:
    """Raise ValueError unless a field is a fraction in (0, 1], or a number of tokens."""
    value = getattr(method, field)
    if isinstance(value, float):
        method.require(0 < value <= 1, field, "be a fraction in (0, 1] or a number of tokens", f"pass {field}=0.25")
    else:
        method.require(value >= 1, field, "be at least 1 token when it is an int", f"pass {field}=0.25 for a fraction")
