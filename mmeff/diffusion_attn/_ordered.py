"""Layouts for tokens in another order than the video's: tiles or curves, whose blocks are small boxes of the grid.

A method whose blocks are compact in the grid runs in an order of its own. What its kernel visits, and so what a call
costs, is a matter of that order: hosts and plans therefore ask `SparseAttention.kernel_layout`, which gives an
OrderedLayout here and a plain BlockLayout where tokens stay as they are. Both answer `density`, `is_full`,
`predicted_speedup()` and `to`, and `attend` takes either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mmeff.kernels import BlockLayout
from mmeff.kernels.permute import PaddedTiles, Permutation


@dataclass(frozen=True, eq=False)
class OrderedLayout:
    """A layout over slots, and which token each slot holds.

    Args:
        layout: for the slots of the new order, its lengths the number of slots; its counts of tokens in use say which
            slots are padding.
        perm: (slots,) int64, the token of each slot; a slot of padding repeats some token.
        inverse: (N,) int64, the slot of each token.
    """

    layout: BlockLayout
    perm: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, layout: BlockLayout, order: PaddedTiles | Permutation, text_len: int = 0) -> OrderedLayout:
        """Join a layout and the order of the video's tokens; the text behind the video stays in place."""
        slots, tokens = order.perm.shape[0], len(order)
        text = torch.arange(text_len, device=order.perm.device)
        return cls(layout, torch.cat((order.perm, text + tokens)), torch.cat((order.inverse, text + slots)))

    def arrange(self, x: Tensor) -> Tensor:
        """Bring tokens (B, N, H, D) into the slots. What padding holds is no concern: the kernel never reads it."""
        return cast(Tensor, _Reorder.apply(x, self.perm, self.inverse))

    def restore(self, x: Tensor) -> Tensor:
        """Undo `arrange`."""
        return cast(Tensor, _Reorder.apply(x, self.inverse, self.perm))

    def to(self, device: torch.device | str) -> OrderedLayout:
        """Return this on `device`; itself when it is there already."""
        layout = self.layout.to(device)
        if layout is self.layout:
            return self
        return OrderedLayout(layout, self.perm.to(device), self.inverse.to(device))

    # ---------------------------------------------------------------- cost, in terms of tokens and not of slots

    @property
    def tokens(self) -> int:
        """Tokens N, without padding."""
        return self.inverse.shape[0]

    @property
    def density(self) -> float:
        """Fraction of the query-key pairs of tokens that attend, 0 to 1."""
        B, H = self.layout.shape[:2]
        return self.layout.attended_pairs / (B * H * self.tokens**2)

    @property
    def is_full(self) -> bool:
        """Whether every token attends to every token."""
        B, H = self.layout.shape[:2]
        return self.layout.attended_pairs == B * H * self.tokens**2

    def predicted_speedup(self, ratio: float | None = None) -> float:
        """As BlockLayout.predicted_speedup; the padding counts as work, the reordering does not count."""
        return self.layout.predicted_speedup(ratio) * (self.tokens / self.perm.shape[0]) ** 2


KernelLayout = BlockLayout | OrderedLayout


def on_device(
    layout: BlockLayout, order: PaddedTiles | None, text_len: int, device: torch.device | None
) -> KernelLayout:
    """Return a layout and its order on a device (None: the CPU), for methods that keep layouts on the CPU.

    What is made here is kept with `layout`, so that every call of a layer finds it and it goes when the layout goes.
    """
    target = layout.device if device is None else device
    if order is None:
        return layout if target == layout.device else layout.derived(("on", target), lambda here: here.to(target))

    def indices(here: BlockLayout) -> tuple[Tensor, Tensor]:
        made = OrderedLayout.of(here, order, text_len)
        return made.perm, made.inverse

    # the layout must not keep an object that holds the layout
    ordered = OrderedLayout(layout, *layout.derived("order", indices))
    return ordered if target == layout.device else layout.derived(("on", target), lambda here: ordered.to(target))


class _Reorder(torch.autograd.Function):
    """x[:, index]. The gradient comes back by reading at `back`: no atomics, and slots of padding have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, back = ctx.saved_tensors
        return _Reorder.apply(grad, back, index), None, None
