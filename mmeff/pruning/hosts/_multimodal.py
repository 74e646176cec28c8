"""What the vision-language families of transformers share: root hooks, refusals, accounting and the dry run.

A family's own file says where its decoder and its vision encoder are, which tokens are visual and how they lie in pictures
and frames, and how what the encoder saw is brought to them.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mmeff.config import MethodConfig
from mmeff.errors import UnsupportedModel
from mmeff.handle import Handle, Host, describe_model
from mmeff.pruning._base import EncoderView, Need, TokenPruner
from mmeff.pruning.hosts._cost import Cost
from mmeff.pruning.hosts._encoder import Capture
from mmeff.pruning.hosts._language import LanguagePruner, Pass
from mmeff.pruning.hosts._places import Places
from mmeff.pruning.hosts._view import View
from mmeff.report import DENSE, SPARSE, Plan


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a chunk of a prompt was called with: token ids (B, q), the model's keyword arguments, and what its vision encoder
    saw of it.

    generate() runs the encoder before the first forward, and repeats every row for its beams after that. Rows are those
    before that, `kwargs` has both what generate() was called with and what the forward was.
    """

    ids: Tensor
    kwargs: Mapping[str, Any]
    seen: Capture


@dataclass(frozen=True, kw_only=True)
class Given:
    """What generate() gave the vision encoder: rows of the prompt, keyword arguments, and those it then went on with."""

    rows: int
    kwargs: dict[str, Any]
    rest: dict[str, Any]

    def brought(self, encoded: Mapping[str, Any] | None) -> bool:
        """Whether the features that a forward is called with are those."""
        mine = self.rest.get("mm_encoder_outputs") or {}
        return any(mine.get(kind) is found for kind, found in (encoded or {}).items())

    def joined(self, kwargs: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """These arguments and those of the forward, of which every n-th row stands for a row of the prompt."""
        n = batch // self.rows
        rows = {k: v[::n] if torch.is_tensor(v) and v.ndim and len(v) == batch else v for k, v in kwargs.items()}
        positions = kwargs.get("position_ids")
        if torch.is_tensor(positions):
            rows["position_ids"] = positions[..., ::n, :]  # some families have axes in front of the rows
        return {**self.kwargs, **rows, "mm_encoder_outputs": self.kwargs["mm_encoder_outputs"]}


class VisionLanguageHost(Host):
    """Base of families: a subclass names its class and answers the questions below.

    Reports time "vision encoder", "prefill" (the forward that reads the prompt, selection included), "selection" and
    "decode". `inputs` are the keyword arguments that bring pictures.
    """

    stage = "pruning"
    architecture: ClassVar[tuple[str, str]]  # module and class in transformers
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    # ---- what a family says

    @classmethod
    def language(cls, model: Any) -> Any:
        """The decoder, which has `layers`."""
        return model.model.language_model

    @classmethod
    @abstractmethod
    def eyes(cls, model: Any) -> Any:
        """The vision encoder, whose calls are timed."""

    @classmethod
    def projector(cls, model: Any) -> Any | None:
        """The module that brings single tokens from the encoder's width to the decoder's, or None where there is none."""
        return None

    @classmethod
    def offers(cls, model: Any) -> frozenset[Need]:
        """What methods may ask for."""
        return frozenset()

    @classmethod
    def visual_ids(cls, model: Any) -> tuple[int, ...]:
        """Token ids that stand for visual tokens; empty where the model has none."""
        found = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
        return tuple(i for i in found if i is not None)

    @classmethod
    @abstractmethod
    def places(cls, model: Any, prompt: Prompt) -> Places:
        """Where the visual tokens of a prompt lie, which of them are markers, and how they lie in frames."""

    @classmethod
    def encoder(cls, model: Any, prompt: Prompt, view: View) -> EncoderView:
        """What the vision encoder saw, by visual token; only for families that offer it. The view has n rows for each of the
        prompt's where there are beams."""
        raise NotImplementedError(f"the {cls.name} host offers nothing of its encoder")

    @classmethod
    @abstractmethod
    def visual_tokens(cls, model: Any, **sizes: int) -> tuple[int, str]:
        """How many visual tokens a prompt of these sizes has, and how that number comes about; sizes as in `plan`."""

    @classmethod
    def prepare(cls, model: Any, pruner: LanguagePruner, handle: Handle) -> None:
        """Install what only this family needs."""

    # ---- what follows from it

    @classmethod
    def matches(cls, model: Any) -> bool:
        module = sys.modules.get(cls.architecture[0])
        return module is not None and isinstance(model, getattr(module, cls.architecture[1]))

    @classmethod
    def modules(cls, model: Any) -> list[Any]:
        return [model]

    @classmethod
    def why_not(cls, model: Any, method: MethodConfig) -> str | None:
        if not isinstance(method, TokenPruner):
            return f"{method.name()} does not drop visual tokens"
        if not cls.visual_ids(model):
            return "its config has no image_token_id, so its visual tokens cannot be found"
        decoder = cls.language(model)
        layer = decoder.layers[0]
        missing = [n for n in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(layer.self_attn, n)]
        if missing:
            return f"its decoder layers ({type(layer).__name__}) lack {', '.join(missing)}, which scoring needs"
        kinds = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            return f"its decoder has layers of {', '.join(sorted(kinds))}, whose caches cannot be followed"
        lacking = sorted(method.needs - cls.offers(model) - {"text ids"})  # ids are part of every call that prunes
        if lacking:
            return f"the method needs the {' and the '.join(lacking)}, which the {cls.name} host does not have for this model"
        if method.when == "decode" and (reason := method.why_not_from_cache()) is not None:
            return f'when="decode" chooses after the prompt has been read, and {reason}'
        if method.cache == "static" and method.observes(len(decoder.layers)) is not None:
            return 'cache="static" is for compiled decoding, and the method follows what every decoded token looks at'
        return None

    @classmethod
    def install(cls, model: Any, method: MethodConfig, handle: Handle) -> None:
        assert isinstance(method, TokenPruner)
        pruner = LanguagePruner(cls.language(model).layers, method, handle)
        handle.on_reset_episode(lambda: method.reset_episode(pruner.state))
        cls.prepare(model, pruner, handle)
        Session(cls, model, pruner, handle)

    @classmethod
    def plan(
        cls, model: Any, method: MethodConfig, *, text_tokens: int = 64, images: int = 1, batch: int = 1,
        new_tokens: int = 32, frames: int = 0, height: int = 0, width: int = 0,
    ) -> Plan:  # fmt: skip
        """Count tokens, prefill operations and cache bytes for a prompt of `images` pictures and `text_tokens` tokens.

        Args: frames: of one video in place of the pictures; height, width: of each picture or frame in pixels, where the
            model's number of tokens depends on it (0: the size the model is made for).
        """
        assert isinstance(method, TokenPruner)
        visual, how = cls.visual_tokens(model, images=images, frames=frames, height=height, width=width)
        text = model.config.get_text_config()
        cost = Cost.of(text, torch.tensor([], dtype=model.dtype).element_size())
        layers = text.num_hidden_layers
        points = {point.layer: point for point in method.points(layers)}
        seen, now = [], visual
        for layer in range(layers):
            if layer in points:
                now = min(now, points[layer].count(visual))
            seen.append(now)
        dense = cost.prefill([visual + text_tokens] * layers)
        late = method.when == "decode"
        fast = dense if late else cost.prefill([v + text_tokens for v in seen])
        saved = batch * cost.cache_bytes(sum(visual - v for v in seen))
        total = batch * cost.cache_bytes(layers * (visual + text_tokens + new_tokens))
        kept = ", ".join(f"{seen[k]} from layer {k} on" for k in sorted(points))
        return Plan(
            method=method.to_dict(), model=describe_model(model), host=cls.name,
            rows=(
                ("visual tokens", f"{visual} ({how})"),
                ("kept", kept),
                ("mean over layers", f"{sum(seen) / layers:.1f}"),
                ("prefill operations", f"{fast / dense:.3f} of dense"),
                ("predicted prefill speedup", f"{dense / fast:.2f}x (by operations, selection apart)"),
                ("cache", f"{saved / 2**20:.2f} of {total / 2**20:.2f} MiB saved{' once decoding has begun' if late else ''}"),
                *([("pruned", "at the first decoded token; the prompt is read densely")] if late else []),
            ),
            density=sum(seen) / (layers * visual), predicted_speedup=dense / fast,
        )  # fmt: skip


class Session:
    """Root hooks of one installation: they tell the pruner where the visual tokens are, and time and count what ran."""

    def __init__(self, host: type[VisionLanguageHost], model: Any, pruner: LanguagePruner, handle: Handle) -> None:
        self.host, self.model, self.pruner, self.handle = host, model, pruner, handle
        self._clock = ExitStack()
        self._eye = ExitStack()
        self._seen = Capture(host.eyes(model), handle, wanted=bool(pruner.method.needs & {"encoder", "class token", "projector"}))  # fmt: skip
        self._totals: dict[str, float] = {}
        self._prompts = 0
        eyes = host.eyes(model)
        for hook in (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
            eyes.register_forward_pre_hook(self._look),
            eyes.register_forward_hook(self._looked, always_call=True),
        ):
            handle.on_remove(hook.remove)
        projector = host.projector(model)
        if projector is not None:
            self._seen.watch_projector(projector, handle)
        self._given: Given | None = None
        self._prompt: dict[str, Any] | None = None  # keyword arguments of a prompt that generate() is reading
        self._note_what_generate_encodes()
        if pruner.method.when == "decode":
            self._note_what_generate_reads()
        else:
            self._refuse_chunked_prefill()
        if pruner.method.cache == "static":
            # kept out of graphs, in which it would not be raised
            self._refuse_compiled_prefill = torch.compiler.disable(refuse_compiled_prefill)
            self._time_compiled_steps()
        self._refuse_assistants()

    # ---- refusals

    def _refuse_chunked_prefill(self) -> None:
        """Chunks of one prompt look like turns of a conversation to hooks, and each would be pruned by its own last token."""

        def check(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> None:
            if getattr(generation_config, "prefill_chunk_size", None) is not None and self.handle.enabled:
                raise ValueError(
                    f"{self.pruner.method.name()} selects tokens once per prompt and cannot follow prefill_chunk_size="
                    f"{generation_config.prefill_chunk_size}; generate without it, prune out of the cache with "
                    'when="decode", or remove the handle'
                )

        self._wrap("_prefill", check)

    def _refuse_assistants(self) -> None:
        """Candidates of an assistant are taken back by cropping the cache, and its drafts see the whole picture."""

        def check(*args: Any, **kwargs: Any) -> None:
            if self.handle.enabled:
                raise ValueError(
                    f"{self.pruner.method.name()} cannot run under assisted decoding, whose drafts and checks read the cache "
                    "in several tokens at once; generate without assistant_model and prompt_lookup_num_tokens, or remove "
                    "the handle"
                )

        self._wrap("_assisted_decoding", check)

    def _wrap(self, name: str, check: Any) -> None:
        """Call `check` before a method of the model, on this instance alone."""

        def checking(original: Any) -> Any:
            def checked(*args: Any, **kwargs: Any) -> Any:
                check(*args, **kwargs)
                return original(*args, **kwargs)

            return checked

        self._replace(name, checking)

    def _replace(self, name: str, change: Any) -> None:
        """Put `change` of a method of the model in its place, on this instance alone."""
        model = self.model
        if not hasattr(model, name):
            return
        own = model.__dict__.get(name)  # somebody else's wrapper on this instance
        setattr(model, name, change(getattr(model, name)))
        self.handle.on_remove(lambda: setattr(model, name, own) if own else model.__dict__.pop(name, None))

    def _note_what_generate_reads(self) -> None:
        """Chunks of a prompt know their own tokens only, and one of a single token looks like a decoded one."""

        def reading(original: Any) -> Any:
            def read(input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # fmt: skip
                self._prompt = dict(model_kwargs)
                try:
                    return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
                finally:
                    self._prompt = self._given = None

            return read

        self._replace("_prefill", reading)

    def _time_compiled_steps(self) -> None:
        """Hooks of a compiled step leave no time; its caller does."""

        def timing(original: Any) -> Any:
            def compiled(*args: Any, **kwargs: Any) -> Any:
                step = original(*args, **kwargs)

                def timed(*args: Any, **kwargs: Any) -> Any:
                    with self.handle.recorder.time("decode", self.model.device):
                        return step(*args, **kwargs)

                return timed

            return compiled

        self._replace("get_compiled_call", timing)

    def _note_what_generate_encodes(self) -> None:
        """Features reach the forward without pictures and their sizes: keep those, and what the encoder sees from here on."""

        def note(inputs_tensor: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            self._seen.clear()
            # beams change these objects in place
            encoded = {k: copy.copy(v) for k, v in (model_kwargs.get("mm_encoder_outputs") or {}).items()}
            given = {**model_kwargs, "mm_encoder_outputs": encoded}
            self._given = Given(rows=len(inputs_tensor), kwargs=given, rest=model_kwargs)

        self._wrap("_maybe_prepare_encoder_kwargs_for_generation", note)

    # ---- one forward

    def _look(self, module: Any, args: Any) -> None:
        self._eye.enter_context(self.handle.recorder.time("vision encoder", next(module.parameters()).device))

    def _looked(self, module: Any, args: Any, output: Any) -> None:
        self._eye.close()

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = any(kwargs.get(name) is not None for name in self.host.inputs) or bool(kwargs.get("mm_encoder_outputs"))
        if self.pruner.method.cache == "static" and torch.compiler.is_compiling():
            if seen:
                self._refuse_compiled_prefill(self.pruner.method.name())
            return  # the cache says all that a decoding step has to know
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens: Any = ids if ids is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return  # the model complains about it in its own words
        batch, length = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        reading = self._prompt is not None
        mask = self._mask_of(kwargs.get("attention_mask"), cache, length) if seen else kwargs.get("attention_mask")
        visual = locate = look = reason = None
        if seen:
            visual = torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)
            given = self._given
            if given is None or not (reading or given.brought(kwargs.get("mm_encoder_outputs"))):
                self._seen.clear()
                given = None
            reason = self._why_dense(ids, mask, kwargs, generates=given is not None)
            if ids is not None:
                for token in self.host.visual_ids(model):
                    visual |= ids == token
                n, asked = (1, kwargs) if given is None else (batch // given.rows, given.joined(kwargs | (self._prompt or {}), batch))  # fmt: skip
                locate = lambda ids: self._places(ids, n, asked)  # noqa: E731
                look = lambda: self._look_up(Prompt(ids=ids[::n], kwargs=asked, seen=self._seen))  # noqa: E731
        now = self.pruner.begin(
            cache=cache, visual=visual, real=mask.bool() if torch.is_tensor(mask) and mask.ndim == 2 else None, batch=batch,
            length=length, device=tokens.device, reason=reason, ids=ids, locate=locate, look=look, reading=reading,
        )  # fmt: skip
        if not seen and not now.base and length > 1 and self.handle.enabled and self.pruner.method.when == "prefill":
            self.handle.recorder.fallback("the prompt has no image or video")
        self.handle.recorder.forwards += seen or not now.base
        self._clock.enter_context(self.handle.recorder.time("prefill" if length > 1 or reading else "decode", tokens.device))  # fmt: skip

    def _places(self, ids: Tensor, n: int, asked: Mapping[str, Any]) -> Places:
        """Of all tokens of a prompt, each row of which stands n times in `ids`."""
        positions = asked.get("position_ids")
        if torch.is_tensor(positions):
            asked = {**asked, "position_ids": positions[..., -ids.shape[1] :]}
        return self.host.places(self.model, Prompt(ids=ids[::n], kwargs=asked, seen=self._seen)).repeat(n)

    def _mask_of(self, mask: Any, cache: Any, length: int) -> Any:
        """The (batch, columns) mask of a pass: generate() makes the 4-D one itself where a cache has a fixed size. What is
        real is what the last token sees."""
        if self.pruner.method.cache != "static" or cache is None:
            return mask
        if isinstance(mask, dict):  # by kind of layer, of which there is one
            mask = mask.get("full_attention")
        if not (torch.is_tensor(mask) and mask.ndim == 4):
            return mask
        last = mask[:, 0, -1, : int(cache.get_seq_length()) + length]
        return last if last.dtype == torch.bool else last == 0

    def _look_up(self, prompt: Prompt) -> Any:
        return lambda view: self.host.encoder(self.model, prompt, cast(View, view))

    def _why_dense(self, ids: Any, mask: Any, kwargs: dict[str, Any], *, generates: bool) -> str | None:
        if ids is None:
            return "the model was called with inputs_embeds alone, so its visual tokens cannot be found; pass input_ids"
        if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2):
            return "the attention mask is not the usual (batch, tokens) one"
        if self.pruner.method.when == "decode":
            return None  # prompts are read densely, whatever is asked of them
        if kwargs.get("labels") is not None and self.handle.enabled:
            raise ValueError(
                f"{self.pruner.method.name()} drops tokens of the prompt, so a loss over it means nothing; call the model "
                "without labels, set handle.enabled = False for the loss, or prune under generate()"
            )
        # generate() reads the last logits alone, of models too that know no logits_to_keep
        keep = kwargs.get("logits_to_keep", int(generates))
        if torch.is_tensor(keep) or keep != 1:
            return "logits of every prompt token were asked for; prune under generate(), or pass logits_to_keep=1"
        if kwargs.get("output_hidden_states"):
            return "the hidden states of every prompt token were asked for"
        return None

    def _after(self, model: Any, args: Any, output: Any) -> None:
        if self.pruner.method.cache == "static" and torch.compiler.is_compiling():
            return
        self._clock.close()
        done = self.pruner.end()
        self._seen.clear()
        if self._prompt is None:
            self._given = None
        if done is not None and done.evicted is not None:
            done = done.evicted
        if done is None or not (done.prunes or done.visual.any()):
            return
        layers = len(self.pruner.layers)
        for layer in range(layers):
            acted = done.changed and layer >= self.pruner.first
            self.handle.recorder.call(layer, SPARSE if acted else DENSE)
        if done.changed:
            self._count(done, layers)
            self.handle.recorder.places = done.places.of_tokens()

    def _count(self, done: Pass, layers: int) -> None:
        """Means over all prompts so far: tokens, operations and cache of prefill, against those without pruning."""
        recorder, text = self.handle.recorder, self.model.config.get_text_config()
        if not recorder.tokens:  # the record was reset
            self._totals, self._prompts = {}, 0
        cost = Cost.of(text, torch.tensor([], dtype=self.model.dtype).element_size())
        before = done.counts.float()
        now, left = before, []
        for layer in range(layers):
            now = done.left[layer].float() if layer in done.left else now
            left.append(now)
        table = torch.stack([before, *left]).cpu()  # (1 + layers, B)
        rest = (done.real.sum(dim=1) - done.counts).float().cpu()
        rows = table.shape[1]
        mine = {"visual tokens per prompt": float(table[0].sum())}
        mine |= {f"kept from layer {point} on": float(table[1 + point].sum()) for point in self.pruner.points}
        mine["kept at last"] = float(table[-1].sum())
        mine["mean over layers"] = float(table[1:].mean(dim=0).sum())
        dense = [cost.prefill([float(table[0, b] + rest[b])] * layers) for b in range(rows)]
        read = dense if self.pruner.method.when == "decode" else None
        fast = read or [cost.prefill([float(v + rest[b]) for v in table[1:, b]]) for b in range(rows)]
        mine["prefill operations, of dense"] = sum(f / d for f, d in zip(fast, dense, strict=True))
        if self.pruner.method.cache == "static":  # what is allocated, which is what a cache of fixed size costs
            places = [layer.keys.shape[-2] for layer in done.cache.layers]
            mine["cache of fixed size, KiB"] = rows * cost.cache_bytes(sum(places)) / 1024
            mine["cache of fixed size, dense, KiB"] = (
                rows * cost.cache_bytes(layers * done.cache.get_max_length()) / 1024
            )
        else:
            mine["cache of the prompt, KiB"] = cost.cache_bytes(float((table[1:] + rest).sum())) / 1024
            mine["cache of the prompt, dense, KiB"] = cost.cache_bytes(float(layers * (table[0] + rest).sum())) / 1024
        self._prompts += rows
        for name, value in mine.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
            digits = 4 if "operations" in name else 1
            recorder.tokens[name] = round(self._totals[name] / self._prompts, digits)
        for layer in range(layers):
            share = table[1 + layer] / table[0].clamp(min=1)
            recorder.densities[layer].append(float(share.mean()))


def refuse_compiled_prefill(name: str) -> None:
    raise UnsupportedModel(
        f"{name} chooses tokens while a prompt is read, which cannot be compiled; read it uncompiled, as "
        'generate(cache_implementation="static") does, or compile decoding steps alone'
    )
