"""LLaVA-1.5: a CLIP tower, a two-layer projector and a Llama-like language model (transformers' `LlavaForConditionalGeneration`)."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch

from mmeff.config import MethodConfig
from mmeff.handle import Handle, Host, describe_model
from mmeff.pruning._base import TokenPruner
from mmeff.pruning.hosts._language import LanguagePruner, count_layers
from mmeff.report import Plan


class LlavaHost(Host):
    """Finds the decoder layers and the visual span of LLaVA-1.5 models.

    Its reports time "vision encoder", "prefill" (the forward that reads the prompt, selection included), "selection" and
    "decode".
    """

    name = "llava"
    stage = "pruning"
    models = "transformers LlavaForConditionalGeneration"

    @classmethod
    def matches(cls, model: Any) -> bool:
        module = sys.modules.get("transformers.models.llava.modeling_llava")
        return module is not None and isinstance(model, module.LlavaForConditionalGeneration)

    @classmethod
    def modules(cls, model: Any) -> list[Any]:
        return [model]

    @classmethod
    def why_not(cls, model: Any, method: MethodConfig) -> str | None:
        if not isinstance(method, TokenPruner):
            return f"{method.name()} does not prune inside the language model"
        layer = model.model.language_model.layers[0]
        missing = [n for n in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(layer.self_attn, n)]
        if missing:
            return f"its decoder layers ({type(layer).__name__}) lack {', '.join(missing)}, which scoring needs"
        return None

    @classmethod
    def install(cls, model: Any, method: MethodConfig, handle: Handle) -> None:
        assert isinstance(method, TokenPruner)
        _Session(model, LanguagePruner(model.model.language_model.layers, method, handle), handle)

    @classmethod
    def plan(
        cls,
        model: Any,
        method: MethodConfig,
        *,
        text_tokens: int = 64,
        images: int = 1,
        batch: int = 1,
        new_tokens: int = 32,
    ) -> Plan:
        """Count tokens, prefill operations and cache bytes for a prompt of `images` pictures and `text_tokens` tokens."""
        assert isinstance(method, TokenPruner)
        text, vision = model.config.text_config, model.config.vision_config
        layers = text.num_hidden_layers
        per_image = model.config.image_seq_length or (vision.image_size // vision.patch_size) ** 2
        visual = per_image * images
        seen, now = [], visual
        points = {point.layer: point for point in method.points(layers)}
        for layer in range(layers):
            if layer in points:
                now = min(now, points[layer].count(visual))
            seen.append(now)
        dense = [_layer_operations(text, visual + text_tokens)] * layers
        fast = [_layer_operations(text, v + text_tokens) for v in seen]
        width = (
            2
            * text.num_key_value_heads
            * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        )
        bytes_per = torch.tensor([], dtype=model.dtype).element_size() * width * batch
        saved = bytes_per * sum(visual - v for v in seen)
        total = bytes_per * layers * (visual + text_tokens + new_tokens)
        speedup = sum(dense) / sum(fast)
        kept = ", ".join(f"{seen[k]} from layer {k} on" for k in sorted(points))
        return Plan(
            method=method.to_dict(), model=describe_model(model), host=cls.name,
            rows=(
                ("visual tokens", f"{visual} ({images} x {per_image})"),
                ("kept", kept),
                ("mean over layers", f"{sum(seen) / layers:.1f}"),
                ("prefill operations", f"{sum(fast) / sum(dense):.3f} of dense"),
                ("predicted prefill speedup", f"{speedup:.2f}x (by operations, selection apart)"),
                ("cache", f"{saved / 2**20:.2f} of {total / 2**20:.2f} MiB saved"),
            ),
            density=sum(seen) / (layers * visual), predicted_speedup=speedup,
        )  # fmt: skip


def _layer_operations(text: Any, tokens: int) -> float:
    """Multiply-adds of one decoder layer over `tokens` tokens."""
    size, kv = text.hidden_size, text.num_key_value_heads / text.num_attention_heads
    linear = tokens * size * (2 * size + 2 * kv * size + 3 * text.intermediate_size)
    return linear + tokens * tokens * size  # causal: half of the two products with N x N


class _Session:
    """Root hooks of one installation: they tell the pruner where the visual tokens are, and time each phase."""

    def __init__(self, model: Any, pruner: LanguagePruner, handle: Handle) -> None:
        self.model, self.pruner, self.handle = model, pruner, handle
        self._clock = ExitStack()
        self._eye = ExitStack()
        for hook in (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
            model.model.vision_tower.register_forward_pre_hook(self._look),
            model.model.vision_tower.register_forward_hook(self._looked, always_call=True),
        ):
            handle.on_remove(hook.remove)
        self._guard_chunked_prefill()

    def _guard_chunked_prefill(self) -> None:
        """Chunks of one prompt look like turns of a conversation to hooks, and each would be pruned by its own last token."""
        model, name = self.model, self.pruner.method.name()
        own = model.__dict__.get("_prefill")  # somebody else's wrapper on this instance
        original = model._prefill

        def prefill(input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(generation_config, "prefill_chunk_size", None) is not None and self.handle.enabled:
                raise ValueError(
                    f"{name} selects tokens once per prompt and cannot follow prefill_chunk_size="
                    f"{generation_config.prefill_chunk_size}; generate without it, or remove the handle"
                )
            return original(input_ids, generation_config, model_kwargs, *args, **kwargs)

        model._prefill = prefill
        self.handle.on_remove(lambda: setattr(model, "_prefill", own) if own else model.__dict__.pop("_prefill", None))

    def _look(self, module: Any, args: Any) -> None:
        self._eye.enter_context(self.handle.recorder.time("vision encoder", next(module.parameters()).device))

    def _looked(self, module: Any, args: Any, output: Any) -> None:
        self._eye.close()

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens: Any = ids if ids is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return  # the model complains about it in its own words
        batch, length = tokens.shape[:2]
        seen = kwargs.get("pixel_values") is not None or bool(kwargs.get("mm_encoder_outputs"))
        mask: Any = kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        visual = None
        reason = self._why_dense(ids, mask, kwargs) if seen else None
        if seen:
            visual = (
                ids == model.config.image_token_id
                if ids is not None
                else torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)
            )
        real = mask[:, -length:].bool() if torch.is_tensor(mask) and mask.ndim == 2 else None
        now = self.pruner.begin(
            cache=cache, visual=visual, real=real, batch=batch, length=length, device=tokens.device, reason=reason
        )
        if now.base and real is not None:
            now.past_real = mask[:, : now.base].bool()
        self.handle.recorder.forwards += seen
        self._clock.enter_context(self.handle.recorder.time("prefill" if length > 1 else "decode", tokens.device))

    def _why_dense(self, ids: Any, mask: Any, kwargs: dict[str, Any]) -> str | None:
        if ids is None:
            return "the model was called with inputs_embeds alone, so its visual tokens cannot be found; pass input_ids"
        keep = kwargs.get("logits_to_keep", 0)
        if torch.is_tensor(keep) or keep != 1:
            return "logits of every prompt token were asked for; prune under generate(), or pass logits_to_keep=1"
        if kwargs.get("labels") is not None or kwargs.get("output_hidden_states"):
            return "a loss or the hidden states of every prompt token were asked for"
        if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2):
            return "the attention mask is not the usual (batch, tokens) one"
        return None

    def _after(self, model: Any, args: Any, output: Any) -> None:
        self._clock.close()
        done = self.pruner.end()
        if done is None or not done.visual.any():
            return
        pruner, recorder = self.pruner, self.handle.recorder
        layers = len(pruner.layers)
        count_layers(self.handle, layers, pruner.first, done.changed)
        if done.changed:
            before = done.counts.float().mean().item()
            recorder.tokens["visual tokens per prompt"] = round(before, 1)
            mean = 0.0
            for layer in range(layers):
                stage = max((k for k in pruner.points if k <= layer), default=None)
                mean += before if stage is None else (recorder.kept[stage] >= 0).sum(dim=1).float().mean().item()
            for point in pruner.points:
                left = (recorder.kept[point] >= 0).sum(dim=1).float().mean().item()
                recorder.tokens[f"kept from layer {point} on"] = round(left, 1)
                for layer in range(point, layers):
                    recorder.densities[layer] = [left / max(before, 1)]
            recorder.tokens["mean over layers"] = round(mean / layers, 1)


HOSTS = (LlavaHost,)
