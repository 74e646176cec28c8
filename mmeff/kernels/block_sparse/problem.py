"""What the block-sparse backends are asked: tensors that fit each other and the layout, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BlockLayout


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of block_sparse_attention, validated: q (B, Nq, H, D), k and v (B, Nk, Hk, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout
    scale: float
    return_lse: bool  # the caller wants the log-sum-exp
    training: bool = False  # a backward pass may follow, which reads the log-sum-exp

    @property
    def want_lse(self) -> bool:
        """Whether the log-sum-exp is to be returned."""
        return self.return_lse or self.training

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no query, or no key."""
        return 0 in self.q.shape or 0 in self.k.shape

    def without_padding(self) -> tuple[Tensor, Tensor]:
        """Return k and v with zeros where the layout says that no token is in use, for backends that read them all."""
        if not self.layout.has_padding:
            return self.k, self.v
        unused = ~self.layout.tokens_in_use()[1][:, :, None, None]
        return self.k.masked_fill(unused, 0.0), self.v.masked_fill(unused, 0.0)

    @property
    def B(self) -> int:
        """Batch."""
        return self.q.shape[0]

    @property
    def H(self) -> int:
        """Query heads."""
        return self.q.shape[2]

    @property
    def Hk(self) -> int:
        """Key and value heads; H is a multiple of it."""
        return self.k.shape[2]

    @property
    def D(self) -> int:
        """Channels of a head."""
        return self.q.shape[3]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the two matrix products of dense attention."""
        return 2 * self.B * self.H * self.layout.q_len * self.layout.kv_len * self.D

    def __str__(self) -> str:
        return f"q {tuple(self.q.shape)}, k/v {tuple(self.k.shape)}, {self.q.dtype} on {self.q.device}, {self.layout}"


@dataclass(frozen=True, eq=False)
class BackwardProblem:
    """The gradients of one call: what it computed, and the gradients of that. One of dout and dlse is given.

    lse is (B, H, Nq), natural log, whichever backend computed it. Where the call was part of a larger softmax, out and lse
    are those of the whole, and the gradients are this part's. `needs` says which of dq, dk, dv are wanted.
    """

    forward: Problem
    out: Tensor
    lse: Tensor
    dout: Tensor | None
    dlse: Tensor | None
    needs: tuple[bool, bool, bool]

    @property
    def layout(self) -> BlockLayout:
        """The layout of the forward call."""
        return self.forward.layout

    def shift(self) -> Tensor:
        """Return what is taken from dout v^T before it meets the weights: rowsum(dout * out) - dlse, (B, H, Nq)."""
        dtype = self.lse.dtype
        shift = torch.zeros_like(self.lse)
        if self.dout is not None:
            shift = (self.dout.to(dtype) * self.out.to(dtype)).sum(-1).transpose(1, 2)
        return shift if self.dlse is None else shift - self.dlse

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the five matrix products of the backward pass of dense attention."""
        return self.forward.multiply_adds * 5 // 2


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which scores, log-sum-exp and gradients accumulate: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_problem(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None, return_lse: bool
) -> Problem:
    """Check that the arguments fit each other; every backend relies on it. Raises TypeError or ValueError.

    Looks at shapes, dtypes and devices only, so that torch.compile can trace it.
    """
    who = "block_sparse_attention"
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"{who}: layout must be a BlockLayout, got {type(layout).__name__}; build one with "
            "BlockLayout.from_block_mask or BlockLayout.from_dense_mask."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{who}: {name} must be a floating-point tensor, got {got}; cast or convert it first.")
        if x.ndim != 4 or 0 in x.shape[2:]:
            raise ValueError(
                f"{who}: {name} must be (B, N, H, D) with at least one head and one channel, got shape {tuple(x.shape)}; "
                "heads are second to last, so transpose(1, 2) a heads-first tensor."
            )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{who}: q, k and v must share dtype and device, got q {q.dtype} on {q.device} and {name} {x.dtype} on "
                f"{x.device}; cast or move {name}."
            )
    if v.shape != k.shape:
        raise ValueError(
            f"{who}: k and v must have the same shape (B, Nk, Hk, D), got k {tuple(k.shape)} and v {tuple(v.shape)}; "
            "value heads of another width are not supported."
        )
    B, Nq, H, D = q.shape
    _, Nk, Hk, _ = k.shape
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(
            f"{who}: q and k must agree in batch and head width, got q (B={B}, D={D}) and k (B={k.shape[0]}, "
            f"D={k.shape[3]}); expand the batch of k and v, or check that the tensors are heads-last."
        )
    if H % Hk:
        raise ValueError(
            f"{who}: the query heads must be a multiple of the key/value heads, got H={H} and Hk={Hk}; pass the k "
            "and v heads of the model unrepeated, or repeated to H."
        )
    if (layout.q_len, layout.kv_len) != (Nq, Nk):
        raise ValueError(
            f"{who}: the layout must be for these sequences: it has q_len={layout.q_len}, kv_len={layout.kv_len}, but "
            f"q has Nq={Nq} and k has Nk={Nk} tokens; build the layout with q_len={Nq}, kv_len={Nk}."
        )
    lB, lH = layout.shape[:2]
    if lB not in (1, B) or lH not in (1, H):
        raise ValueError(
            f"{who}: the layout's batch must be 1 or B={B} and its heads 1 or H={H}, got B={lB}, H={lH}; use 1 to "
            "share it."
        )
    if layout.device != q.device:
        raise ValueError(
            f"{who}: the layout must be on the device of q, got layout on {layout.device} and q on {q.device}; pass "
            f"layout.to({str(q.device)!r})."
        )
    if scale is None:
        scale = D**-0.5
    elif isinstance(scale, Tensor) or not math.isfinite(scale):
        raise ValueError(
            f"{who}: scale must be a finite Python float, got {scale!r}; leave it out for 1/sqrt(D) = {D**-0.5:.4g}, "
            "or multiply q by a learned scale first."
        )
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return Problem(q, k, v, layout, float(scale), bool(return_lse), training)
