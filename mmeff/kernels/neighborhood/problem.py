"""What the neighborhood backends are asked: tensors that fit each other and the rule, checked by the operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rule import Rule


@dataclass(frozen=True, eq=False)
class Problem:
    """One call, validated: q (B, *grid, H, D), k and v (B, *grid, Hk, D), extra keys (B, T, Hk, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    rule: Rule
    rel_bias: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None
    scale: float
    with_lse: bool

    @property
    def B(self) -> int:
        """Batch."""
        return self.q.shape[0]

    @property
    def H(self) -> int:
        """Query heads."""
        return self.q.shape[-2]

    @property
    def Hk(self) -> int:
        """Key and value heads; H is a multiple of it."""
        return self.k.shape[-2]

    @property
    def D(self) -> int:
        """Channels of a head."""
        return self.q.shape[-1]

    @property
    def N(self) -> int:
        """Tokens of the grid."""
        return self.rule.N

    @property
    def T(self) -> int:
        """Extra keys."""
        return 0 if self.extra_k is None else self.extra_k.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What scores, log-sum-exp and gradients accumulate in: float32, or float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        extras = "" if self.rel_bias is None else ", with rel_bias"
        extras += f", {self.T} extra keys" if self.T else ""
        return f"q {tuple(self.q.shape)}, k/v {tuple(self.k.shape)}, {self.q.dtype} on {self.q.device}, {self.rule}{extras}"


@dataclass(frozen=True, eq=False)
class BackwardProblem:
    """The gradient of one call.

    delta (B, N, H) is sum(dout * out) - dlse in the accumulation dtype, so that the gradient of a scaled score is
    weight * (dout . v - delta), for the output and the log-sum-exp together. lse (B, H, N) is there if the forward
    kept it.
    """

    forward: Problem
    dout: Tensor  # like q
    delta: Tensor
    lse: Tensor | None
    need_bias: bool


@dataclass(frozen=True)
class Gradients:
    """What a backward returns, shaped like the inputs; None for what the problem does not have or need."""

    q: Tensor
    k: Tensor
    v: Tensor
    rel_bias: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None
