"""What every sparse attention for diffusion transformers shares: when it acts, and how a layout becomes an output.

A method says *where* to attend: `layout(grid=...)` gives a BlockLayout. This base says *when* (dense first and last steps,
dense layers) and runs the kernel. It knows no model; `hosts/` do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor

from mmeff.config import MethodConfig, option
from mmeff.diffusion_attn._ordered import KernelLayout, OrderedLayout
from mmeff.kernels import BlockLayout, block_sparse_attention
from mmeff.report import Recorder

SparseT = TypeVar("SparseT", bound="SparseAttention")

Grid = tuple[int, int, int]  # (F, H, W): latent frames, rows and columns of tokens


@dataclass(frozen=True)
class Expected:
    """What a plan says of one layer: the fraction of pairs that attend, and the speedup of attention over dense."""

    density: float
    speedup: float


_recorder: ContextVar[Recorder | None] = ContextVar("mmeff_diffusion_recorder", default=None)


@contextmanager
def timed_by(recorder: Recorder) -> Iterator[None]:
    """Inside the block, `timed` spans of this thread go to `recorder`. Hosts enter it around a method's call."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def timed(name: str, device: torch.device) -> AbstractContextManager[object, bool | None]:
    """A span for the report: methods wrap what they do besides attention ("layout", "selection", "permute") in it."""
    recorder = _recorder.get()
    return nullcontext() if recorder is None else recorder.time(name, device)


@dataclass(frozen=True, kw_only=True)
class SparseAttention(MethodConfig, ABC):
    """Base of every method of this room: the schedule, the checks and the call of the kernel.

    A call is dense if its step is among the first `dense_steps` or the last `last_dense_steps`, or its layer is among
    `dense_layers`. Steps are denoising steps, however many forwards (guidance branches) each of them takes.
    """

    stage: ClassVar[str] = "diffusion_attn"
    dynamic: ClassVar[bool] = False  # whether the layout depends on q and k; if not, hosts build it once and keep it

    dense_steps: int = option(0, "first denoising steps that run dense", unit="steps")
    last_dense_steps: int = option(0, "last denoising steps that run dense", unit="steps")
    dense_layers: int | tuple[int, ...] = option(
        0,
        "layers that run dense: a number n means the first n; a list names them, negative ones from the end",
        unit="layers",
    )
    backend: Literal["auto", "triton", "native", "gather", "sdpa", "reference"] = option(
        "auto",
        "kernel backend of the sparse calls; a named one runs or raises, auto takes the fastest",
        source="mmeff.kernels",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.dense_steps >= 0, "dense_steps", "be >= 0 steps")
        self.require(self.last_dense_steps >= 0, "last_dense_steps", "be >= 0 steps")
        if isinstance(self.dense_layers, int):
            self.require(
                self.dense_layers >= 0,
                "dense_layers",
                "be >= 0 layers",
                "pass a list such as (-1,) to count from the end",
            )

    @property
    def per_head(self) -> bool:
        """Whether the pattern depends on a head's number, so that a part of the heads cannot be served by itself."""
        return False

    # ---------------------------------------------------------------- when

    def dense_layer_ids(self, num_layers: int) -> frozenset[int]:
        """The layers that the schedule keeps dense, as ids in [0, num_layers).

        Raises: ValueError if `dense_layers` lists a layer that the model does not have.
        """
        if isinstance(self.dense_layers, int):
            return frozenset(range(min(self.dense_layers, num_layers)))
        for layer in self.dense_layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"{type(self).__name__}.dense_layers must list layers in [-{num_layers}, {num_layers - 1}] for this "
                    f"model of {num_layers} layers, got {layer} in {self.dense_layers}; leave it out."
                )
        return frozenset(layer % num_layers for layer in self.dense_layers)

    def is_dense(self, *, step: int | None, num_steps: int | None, layer: int, num_layers: int) -> bool:
        """Whether the schedule keeps this layer dense in this step.

        Args:
            step: denoising step, counted from 0 in steps and never in calls; None where there are no steps.
            num_steps: steps of the whole generation; None where there are no steps.
            layer, num_layers: the layer, counted from 0, and how many the model has.
        Raises: ValueError if the schedule counts steps and the caller knows none, or for layers as `dense_layer_ids`.
        """
        if layer in self.dense_layer_ids(num_layers):
            return True
        if not self.counts_steps:
            return False
        if step is None or num_steps is None:
            raise ValueError(
                f"{type(self).__name__} keeps {self.dense_steps} first and {self.last_dense_steps} last steps dense, so "
                f"is_dense needs the step and the number of steps, got step={step}, num_steps={num_steps}."
            )
        return step < self.dense_steps or step >= num_steps - self.last_dense_steps

    def at_every_step(self: SparseT) -> SparseT:
        """This method without dense steps, for runs of a step or two that warm up."""
        return self.replace(dense_steps=0, last_dense_steps=0)

    def check_steps(self, num_steps: int) -> None:
        """Raise ValueError if the schedule keeps more steps dense than a generation of `num_steps` has."""
        if self.dense_steps + self.last_dense_steps > num_steps:
            raise ValueError(
                f"{type(self).__name__} keeps dense_steps={self.dense_steps} first and last_dense_steps="
                f"{self.last_dense_steps} last steps dense, but this generation has {num_steps}, so nothing of it would be "
                f"sparse; lower them, e.g. dense_steps={max(num_steps // 4, 0)}."
            )

    @property
    def counts_steps(self) -> bool:
        """Whether the schedule depends on the denoising step."""
        return self.dense_steps > 0 or self.last_dense_steps > 0

    # ---------------------------------------------------------------- where

    def check_grid(self, grid: Grid, text_len: int = 0) -> None:
        """Raise ValueError or TypeError if this method cannot serve the grid. Hosts call it before the first step.

        Methods with limits of their own extend it.
        """
        name = type(self).__name__
        if len(grid) != 3 or any(type(n) is not int for n in grid) or type(text_len) is not int:
            raise TypeError(
                f"{name} needs grid=(F, H, W) of three ints and text_len as an int, got grid={grid!r}, "
                f"text_len={text_len!r}; F counts latent frames, H and W token rows and columns."
            )
        if min(grid) < 1 or text_len < 0:
            raise ValueError(
                f"{name} needs a grid of at least one token along every axis and text_len >= 0, got grid={grid}, "
                f"text_len={text_len}; the grid counts tokens after the patch embedding."
            )

    @abstractmethod
    def layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> BlockLayout:
        """The key blocks of every query block.

        Args:
            grid: (F, H, W) tokens of the video, frame-major. text_len: text tokens T, behind the video.
            q, k: (B, N, H, D) queries and keys, N = F*H*W + T; required where `dynamic`. Elsewhere q only says on which
                device the layout is wanted.
            layer: the layer that asks.
        Returns: a BlockLayout for N queries and keys, in the order of the tokens, in which no row is empty; on the device
            of q, else on the CPU.
        Raises: as `check_grid`.
        """

    def kernel_layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> KernelLayout:
        """What `attend` runs on: hosts keep it and pass it to `attend`, plans read density and speedup from it.

        Args: as `layout`.
        Returns: the same pairs as `layout`, in an order of tokens and in blocks that suit the kernel; here `layout` itself.
            Methods that run in an order of their own return an OrderedLayout.
        Raises: as `check_grid`.
        """
        return self.layout(grid=grid, text_len=text_len, q=q, k=k, layer=layer)

    def layout_key(self, layer: int) -> Hashable:
        """Layers with equal keys share one layout, or one expectation where the layout is dynamic; by default all do."""
        return None

    def expect(self, *, grid: Grid, text_len: int = 0, layer: int = 0, ratio: float | None = None) -> Expected:
        """What a plan may say of a layer before anything runs.

        Args:
            grid, text_len, layer: as `layout`. ratio: throughput of the kernel per visited pair, relative to dense attention;
                None is that of this machine's processor, as `BlockLayout.predicted_speedup`.
        Returns: density and predicted attention speedup; of the layout, or, where that depends on the data, of the one
            that random queries and keys of one head give. Trained ones are more peaked, and selected by mass they need less.
        Raises: as `check_grid`.
        """
        if self.dynamic:
            q, k = self._random_tokens(grid, text_len)
            layout = self.kernel_layout(grid=grid, text_len=text_len, q=q, k=k, layer=layer)
        else:
            layout = self.kernel_layout(grid=grid, text_len=text_len, layer=layer)
        # a full layout goes to the model's own attention
        return Expected(layout.density, 1.0 if layout.is_full else layout.predicted_speedup(ratio))

    @staticmethod
    def _random_tokens(grid: Grid, text_len: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, math.prod(grid) + text_len, 1, 64, generator=generator)
        return q, k

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid,
        text_len: int = 0,
        layer: int = 0,
        text_valid: Tensor | None = None,
        layout: KernelLayout | None = None,
    ) -> Tensor:
        """Sparse self-attention over the tokens of a video and its text.

        Args:
            q, k, v: (B, N, H, D), N = F*H*W + T, video first, text last, rotary embedding applied.
            grid: (F, H, W). text_len: T. layer: the layer that asks.
            text_valid: (B,) integers, text tokens in use of each sample where prompts are padded at their end; the
                padding is never attended, and its own output is 0. None uses all T.
            layout: what `kernel_layout` (or `layout`, to run in the order of the video) returned for these sizes, to
                save building it again.
        Returns: (B, N, H, D) in the dtype of q.
        Raises: ValueError for tensors that do not fit the grid, and as `check_grid` and the kernel.
        Numerics: those of `block_sparse_attention`.
        """
        self.check_tokens(q, k, v, grid=grid, text_len=text_len, text_valid=text_valid)
        if layout is None:
            with timed("layout", q.device):
                layout = self.kernel_layout(grid=grid, text_len=text_len, q=q, k=k, layer=layer)
        ordered = layout if isinstance(layout, OrderedLayout) else None
        blocks = layout.layout if isinstance(layout, OrderedLayout) else layout
        if text_valid is not None:
            # the text comes last in every order and fills blocks from their start, so only its blocks lose tokens
            blocks = blocks.with_tail(text_len, text_valid)
        if ordered is None:
            return cast(Tensor, block_sparse_attention(q, k, v, blocks, backend=self.backend))
        with timed("permute", q.device):
            q, k, v = ordered.arrange(q), ordered.arrange(k), ordered.arrange(v)
        out = cast(Tensor, block_sparse_attention(q, k, v, blocks, backend=self.backend))
        with timed("permute", q.device):
            return ordered.restore(out)

    def check_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, text_len: int, text_valid: Tensor | None = None
    ) -> None:
        """Raise ValueError unless q, k and v are (B, N, H, D) with N = F*H*W + T, and as `check_grid`."""
        self.check_grid(grid, text_len)
        F, H, W = grid
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[1] != F * H * W + text_len:
                raise ValueError(
                    f"{type(self).__name__}.attend: {name} must be (B, N, H, D) with N = F*H*W + text_len = "
                    f"{F}*{H}*{W} + {text_len} = {F * H * W + text_len}, got shape {tuple(x.shape)}; tokens are second, "
                    "video first and text last."
                )
        if text_valid is not None and (text_valid.shape != (q.shape[0],) or text_valid.is_floating_point()):
            raise ValueError(
                f"{type(self).__name__}.attend: text_valid must be integers of shape (B,) = ({q.shape[0]},), the text tokens "
                f"in use of each sample, got {text_valid.dtype} {tuple(text_valid.shape)}."
            )
