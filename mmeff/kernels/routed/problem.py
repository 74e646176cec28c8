"""What the backends of routed attention are asked, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..block_sparse.problem import Problem
from ..layout import BlockLayout


@dataclass(frozen=True, eq=False)
class RoutedProblem:
    """One call of routed_attention: q (B, Nq, H, D), k and v (B, Nk, Hk, D), routes (B|1, H|1, Nq, nK) bool."""

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
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

    def masked(self) -> Problem:
        """Return the same problem as dense attention under a mask: one block of all queries and all keys."""
        mask = self.routes.repeat_interleave(self.kv_block, -1)[..., : self.k.shape[1]]
        layout = BlockLayout.from_dense_mask(
            mask, q_block=max(mask.shape[2], 1), kv_block=max(mask.shape[3], 1), allow_empty_rows=True
        )
        return Problem(self.q, self.k, self.v, layout, self.scale, self.return_lse, self.training)

    def __str__(self) -> str:
        return (
            f"q {tuple(self.q.shape)}, k/v {tuple(self.k.shape)}, {self.q.dtype} on {self.q.device}, key blocks of "
            f"{self.kv_block}, {self.share:.3g} of them picked"
        )
