"""Cases: an operator, a shape, a dtype, what it attends to, a direction, and who is compared with whom.

A case is a frozen dataclass of plain values. Its `name` says all of it, and is what a results file is resumed by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

if TYPE_CHECKING:
    import torch

    from mmeff.kernels import BlockLayout

Direction = Literal["forward", "backward", "forward+backward"]
DTYPES = ("float32", "bfloat16", "float16")


class Unavailable(Exception):
    """A case, a backend or a peer cannot run here; the message says why, and becomes the reason of a skipped row."""


# ---------------------------------------------------------------- layout recipes


class Recipe(Protocol):
    """How to make the layout of a case: nothing of N x N is kept in a case, only what to build it from."""

    def build(self, *, N: int, H: int, device: torch.device) -> BlockLayout: ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class RandomBlocks:
    """Every query block of every head visits its own block and as many random ones as the sparsity leaves."""

    block: int
    sparsity: float  # fraction of the key blocks that a row leaves out
    shared: bool = False  # one layout for all heads

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"RandomBlocks.sparsity must be in [0, 1), got {self.sparsity}; 0 visits every block.")

    def build(self, *, N: int, H: int, device: torch.device) -> BlockLayout:
        from mmeff.kernels.block_sparse.measure import random_layout

        return random_layout(N, self.sparsity, H=1 if self.shared else H, block=self.block, device=device)

    def __str__(self) -> str:
        return f"random {self.block}-blocks, sparsity {self.sparsity:.3g}" + (
            ", shared by heads" if self.shared else ""
        )


@dataclass(frozen=True)
class MethodLayout:
    """The layout of a method of mmeff.diffusion_attn on a video's token grid."""

    method: str
    grid: tuple[int, int, int]  # latent frames, rows, columns
    fields: tuple[tuple[str, Any], ...] = ()
    text_len: int = 0

    def build(self, *, N: int, H: int, device: torch.device) -> BlockLayout:
        from mmeff.errors import UnknownMethod
        from mmeff.registry import build

        try:
            method: Any = build(self.method, **dict(self.fields))
        except (UnknownMethod, TypeError) as error:  # not there yet, or without such a field
            raise Unavailable(str(error)) from None
        return method.layout(grid=self.grid, text_len=self.text_len).to(device)

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self.fields)
        text = f", text {self.text_len}" if self.text_len else ""
        return f"{self.method}({fields}) on {'x'.join(map(str, self.grid))}{text}"


# ---------------------------------------------------------------- cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every case has: B, N, H, Hk (None: as many as H) and D, as in mmeff.shapes.

    bar is the ratio that a named backend is expected to reach against a named peer: (backend, peer, ratio). A missed bar is
    reported, never hidden, and stops nothing.
    """

    operator: ClassVar[str]
    differentiable: ClassVar[bool] = True

    N: int
    H: int
    D: int
    B: int = 1
    Hk: int | None = None
    dtype: str = "float32"
    direction: Direction = "forward"
    backends: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = ("sdpa",)
    bar: tuple[str, str, float] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"{type(self).__name__}.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.direction not in get_args(Direction):
            raise ValueError(
                f"{type(self).__name__}.direction must be one of {', '.join(get_args(Direction))}, got {self.direction!r}."
            )
        if self.direction != "forward" and not self.differentiable:
            raise ValueError(f"{type(self).__name__} is timed forward only, got direction {self.direction!r}.")

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.H if self.Hk is None else self.Hk

    @property
    def what(self) -> str:
        """What is attended to, or computed, in words."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Everything that the figures depend on, but for the backend, the peer and the machine."""
        heads = f"H{self.H}" if self.Hk is None else f"H{self.H}/{self.Hk}"
        shape = f"B{self.B} N{self.N} {heads} D{self.D}"
        return f"{self.operator} | {shape} {self.dtype} | {self.what} | {self.direction}"

    @property
    def shape(self) -> dict[str, int]:
        """The letters and their values, for a row."""
        return {"B": self.B, "N": self.N, "H": self.H, "Hk": self.kv_heads, "D": self.D}


@dataclass(frozen=True, kw_only=True)
class BlockSparse(Case):
    """block_sparse_attention over a layout."""

    operator: ClassVar[str] = "block_sparse_attention"

    layout: Recipe

    @property
    def what(self) -> str:
        return str(self.layout)


@dataclass(frozen=True, kw_only=True)
class Neighborhood(Case):
    """neighborhood_attention over a grid of N tokens."""

    operator: ClassVar[str] = "neighborhood_attention"

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    causal: tuple[bool, ...] | bool = False
    bias: bool = False  # with a relative position bias

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.prod(self.grid) != self.N:
            raise ValueError(f"Neighborhood: the grid {self.grid} has {math.prod(self.grid)} tokens, got N={self.N}.")

    @property
    def what(self) -> str:
        def each(value: tuple[int, ...] | int) -> str:
            return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

        text = f"grid {each(self.grid)}, window {each(self.window)}"
        for name in ("stride", "dilation"):
            value = getattr(self, name)
            text += "" if value == 1 else f", {name} {each(value)}"
        return text + (", causal" if self.causal else "") + (", bias" if self.bias else "")


@dataclass(frozen=True, kw_only=True)
class TokenScores(Case):
    """token_scores of the last `rows` rows, against one layer of dense causal attention over the same tokens."""

    operator: ClassVar[str] = "token_scores"
    differentiable: ClassVar[bool] = False

    rows: int

    @property
    def what(self) -> str:
        return f"last {self.rows} rows"


@dataclass(frozen=True, kw_only=True)
class Routed(Case):
    """routed_attention in which each query picks some random key blocks."""

    operator: ClassVar[str] = "routed_attention"

    kv_block: int
    picks: int

    @property
    def what(self) -> str:
        return f"{self.picks} of {-(-self.N // self.kv_block)} key blocks of {self.kv_block} per query"


@dataclass(frozen=True, kw_only=True)
class Merge(Case):
    """merge_attention of `parts` results, against one layer of dense attention over the same tokens."""

    operator: ClassVar[str] = "merge_attention"
    differentiable: ClassVar[bool] = False

    parts: int = 2

    @property
    def what(self) -> str:
        return f"{self.parts} parts"
