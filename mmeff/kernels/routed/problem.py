"""What the backends of routed attention are asked, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..block_sparse.problem import Problem
from ..layout import BlockLayout


@dataclass(frozen=True, eq=False)
class RoutedProblem:
    """One call of routed_attention: q (B, Nq, H, D), k and v (B, Nk, Hk, D), routes (B|1, H|1, Nq, nK) bool.

    kv_valid (B|1, nK) int32 counts the tokens in use at the start of each key block; None is all that the sequence has.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
    kv_valid: Tensor | None
    kv_block: int
    scale: float
    return_lse: bool
    training: bool

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the two matrix products of dense attention."""
        B, Nq, H, D = self.q.shape
        return 2 * B * H * Nq * self.k.shape[1] * D

    @cached_property
    def share(self) -> float:
        """Fraction of the key blocks that the queries picked, 0 to 1. Waits for the device."""
        return int(self.routes.sum()) / max(self.routes.numel(), 1)

    @cached_property
    def is_full(self) -> bool:
        """Whether every query picked every key, so that this is dense attention. Waits for the device."""
        return self.kv_valid is None and self.share == 1

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether some query picked no key in use. Waits for the device."""
        picks = self.routes if self.kv_valid is None else self.routes & (self.kv_valid > 0)[:, None, None]
        return not bool(picks.any(-1).all())

    @property
    def mask_elements(self) -> int:
        """Elements of the dense mask of `masked`."""
        B = self.routes.shape[0] if self.kv_valid is None else max(self.routes.shape[0], self.kv_valid.shape[0])
        return B * self.routes.shape[1] * self.q.shape[1] * self.k.shape[1]

    def counts(self) -> Tensor:
        """Return the tokens in use of each key block, (B|1, nK) int32."""
        Nk, device = self.k.shape[1], self.k.device
        whole = (Nk - torch.arange(0, Nk, self.kv_block, device=device, dtype=torch.int32)).clamp(max=self.kv_block)
        return whole[None] if self.kv_valid is None else torch.minimum(self.kv_valid.clamp(min=0), whole)

    @cached_property
    def masked(self) -> Problem:
        """The same problem as dense attention under a mask: one block of all queries and all keys."""
        Nq, Nk, k, v = self.q.shape[1], self.k.shape[1], self.k, self.v
        q_block, kv_block = max(Nq, 1), max(Nk, 1)
        if self.is_full:
            every = torch.ones(1, 1, dtype=torch.bool, device=k.device)
            layout = BlockLayout.from_block_mask(every, q_len=Nq, kv_len=Nk, q_block=q_block, kv_block=kv_block)
        else:
            mask = self.routes.repeat_interleave(self.kv_block, -1)[..., :Nk]
            if self.kv_valid is not None:
                # padding lies between the keys of this one block, so its counts cannot tell: it must be finite itself
                used = torch.arange(self.kv_block, device=k.device) < self.counts()[..., None]
                used = used.flatten(1)[:, :Nk]
                mask = mask & used[:, None, None]
                k, v = (x.masked_fill(~used[:, :, None, None], 0.0) for x in (k, v))
            layout = BlockLayout.from_dense_mask(mask, q_block=q_block, kv_block=kv_block, allow_empty_rows=True)
        return Problem(self.q, k, v, layout, self.scale, self.return_lse, self.training)

    def __str__(self) -> str:
        return (
            f"q {tuple(self.q.shape)}, k/v {tuple(self.k.shape)}, {self.q.dtype} on {self.q.device}, key blocks of "
            f"{self.kv_block}, {self.share:.3g} of them picked"
        )
