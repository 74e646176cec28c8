"""What the hosts of all diffusers families share: finding the transformers, refusing what cannot work, installing, planning.

A family is a subclass of `Family` with one transformer class, one stock processor and a few facts. Reading order: this file,
`_processor.py` (the call of a layer), `_denoiser.py` (the state of a forward), then one family, such as `wan.py`.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from typing import Any, ClassVar

from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import SparseAttention
from mmeff.diffusion_attn.hosts._planning import Dimensions, Work, make_plan
from mmeff.handle import Handle, Host
from mmeff.report import Plan


class Family(Host):
    """A host for one transformer class of diffusers.

    Class attributes: `module` and `transformer` name the class; `components` the pipeline's attributes that may hold one;
    `joint` whether the text tokens are inside self-attention.
    """

    stage = "diffusion_attn"
    module: ClassVar[str]
    transformer: ClassVar[str]
    components: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")
    joint: ClassVar[bool] = False

    # ---------------------------------------------------------------- what a family says

    @classmethod
    @abstractmethod
    def attentions(cls, transformer: Any) -> list[tuple[str, Any]]:
        """Name and module of every self-attention, in layer order; no refiner and no cross-attention."""

    @classmethod
    @abstractmethod
    def processors(cls) -> tuple[type, type]:
        """The stock processor class and our SparseProcessor for it. Imports diffusers."""

    @classmethod
    @abstractmethod
    def sizes(cls, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """(grid, text_len, device, text_valid) of a forward from its arguments, or None if they do not tell.

        text_valid: (B,) text tokens in use where prompts are padded, else None. Where the forward cannot be sparse, the
        grid is a str, the reason.
        """

    @classmethod
    @abstractmethod
    def dimensions(cls, model: Any, transformer: Any, **sizes: Any) -> Dimensions:
        """The token grid that the pipeline makes of a user's sizes."""

    @classmethod
    @abstractmethod
    def work(cls, transformer: Any, video: int, text: int) -> Work:
        """Multiply-adds of a forward over `video` and `text` tokens."""

    # ---------------------------------------------------------------- the Host

    @classmethod
    def transformers(cls, model: Any) -> list[Any]:
        """The family's transformers of a pipeline, or the model itself if it is one; empty for anything else."""
        loaded = sys.modules.get(cls.module)
        if loaded is None:  # then nobody can have made one
            return []
        parts = [getattr(model, name, None) for name in cls.components]
        if all(part is None for part in parts):
            parts = [model]
        kind = getattr(loaded, cls.transformer)
        found = [part for part in parts if isinstance(getattr(part, "_orig_mod", part), kind)]
        return list({id(part): part for part in found}.values())

    @classmethod
    def matches(cls, model: Any) -> bool:
        return bool(cls.transformers(model))

    @classmethod
    def modules(cls, model: Any) -> list[Any]:
        return cls.transformers(model)

    @classmethod
    def why_not(cls, model: Any, method: MethodConfig) -> str | None:
        if not isinstance(method, SparseAttention):
            return f"{type(method).__name__} is not a SparseAttention, which this host needs to lay out its tokens"
        if method.counts_steps and not hasattr(model, "scheduler"):
            return (
                f"dense_steps={method.dense_steps} and last_dense_steps={method.last_dense_steps} count denoising steps, "
                "which a transformer alone does not know; pass the pipeline, or set both to 0"
            )
        from mmeff.diffusion_attn.hosts._processor import parallel_obstacle

        stock, _ = cls.processors()
        for transformer in cls.transformers(model):
            if hasattr(transformer, "_orig_mod"):
                return "its transformer is wrapped by torch.compile; accelerate the pipeline before compiling it"
            for name, attention in cls.attentions(transformer):
                processor = attention.processor
                processor = getattr(processor, "original", processor)  # ours: that the stage is taken is said elsewhere
                if type(processor) is not stock:
                    return (
                        f"{name} has the processor {type(processor).__name__}, and only the stock {stock.__name__} can be "
                        f"replaced without losing what another one adds; give it a {stock.__name__} or unload the adapter "
                        "first"
                    )
                obstacle = parallel_obstacle(getattr(processor, "_parallel_config", None))
                if obstacle is not None:
                    return obstacle
        return None

    @classmethod
    def install(cls, model: Any, method: MethodConfig, handle: Handle) -> None:
        from mmeff.diffusion_attn.hosts._denoiser import Session, watch

        assert isinstance(method, SparseAttention)  # why_not has refused everything else
        _, ours = cls.processors()
        session = Session(handle, method, pipeline=model if hasattr(model, "scheduler") else None)
        for transformer in cls.transformers(model):
            attentions = cls.attentions(transformer)
            method.dense_layer_ids(len(attentions))  # complains about layers that are not there
            watch(transformer, session, num_layers=len(attentions), sizes=cls.sizes)
            for layer, (_, attention) in enumerate(attentions):
                _replace(attention, ours(attention.processor, layer, session), handle)

    @classmethod
    def _plan(
        cls, model: Any, method: MethodConfig, *, num_inference_steps: int, batch: int, text_tokens: int, **sizes: Any
    ) -> Plan:
        """Make the plan of a generation; families pass the sizes that their `dimensions` takes."""
        assert isinstance(method, SparseAttention)
        transformer = cls.transformers(model)[0]
        found = cls.dimensions(model, transformer, **sizes)
        if cls.joint:
            found.text_len += text_tokens
        found.rows.append(("batch", f"{batch} (one layout serves all)"))
        F, H, W = found.grid
        return make_plan(
            model,
            method,
            host=cls.name,
            sizes=found,
            num_steps=num_inference_steps,
            num_layers=len(cls.attentions(transformer)),
            work=cls.work(transformer, F * H * W, found.text_len if cls.joint else text_tokens),
        )


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    """An argument of a forward, passed by position or by name; None if it was not passed."""
    return args[index] if len(args) > index else kwargs.get(name)


def _replace(attention: Any, processor: Any, handle: Handle) -> None:
    original = attention.processor

    def put(one: Any) -> None:
        if hasattr(attention, "set_processor"):
            attention.set_processor(one)
        else:  # Mochi's attention has no setter
            attention.processor = one

    def undo() -> None:
        if attention.processor is processor:  # one that the user has set since stays
            put(original)

    put(processor)
    handle.on_remove(undo)
