"""What must hold for a BlockLayout and for the masks it is made from, and what to tell users when it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import BlockLayout


def check_lists(layout: BlockLayout) -> None:
    """Raise ValueError naming the first rule that the lists of a layout break. Synchronises with the device."""
    M, P = layout.row_start.shape[0], 0 if layout.bitmap is None else layout.bitmap.shape[0]
    capacity = layout.col_idx.shape[0]

    def demand(holds: Tensor | bool, rule: str) -> None:
        if not bool(holds):
            raise ValueError(f"BlockLayout of shape {layout.shape}: {rule}.")

    # in this order, because the later rules read the lists that the earlier ones make safe to read
    demand(((layout.row_of >= 0) & (layout.row_of < M)).all(), f"row_of must lie in [0, {M})")
    demand((torch.minimum(layout.n_partial, layout.n_full) >= 0).all(), "n_partial and n_full must be >= 0")
    inside = (layout.row_start >= 0) & (layout.row_start + layout.n_visited <= capacity)
    demand(inside.all(), f"every list must lie inside col_idx, which holds {capacity} entries")
    partial = int(layout.n_partial.sum())
    demand(partial == P, f"bitmap must hold one slab per partial entry, {partial}, but it holds {P}")
    row, col, full, _ = layout.entries(torch.arange(M, device=layout.device))
    demand(((col >= 0) & (col < layout.nK)).all(), f"col_idx must lie in [0, {layout.nK}) wherever a list reads it")
    same_list = (row[1:] == row[:-1]) & (full[1:] == full[:-1])
    ascending = (col[1:] > col[:-1])[same_list].all()
    demand(ascending, "col_idx must ascend strictly within the partial and within the full entries")
    distinct = torch.unique(row * layout.nK + col).shape[0] == col.shape[0]
    demand(distinct, "a key block must not be both partial and full in one row")


def positive_int(name: str, value: object, who: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{who}: {name} must be an int (tokens), got {type(value).__name__} {value!r}; pass a number.")
    if value < 1:
        raise ValueError(f"{who}: {name} must be >= 1 token, got {value}; leave out sequences that have no tokens.")


def block_counts(who: str, *, q_len: int, kv_len: int, q_block: int, kv_block: int) -> tuple[int, int]:
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("q_block", q_block), ("kv_block", kv_block)):
        positive_int(name, value, who)
    return -(-q_len // q_block), -(-kv_len // kv_block)


def mask_4d(who: str, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a {mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{who}: mask must be a bool tensor where True attends, got {got}; compare it, e.g. mask > 0.")
    if mask.ndim == 2:
        mask = mask[None, None]
    if mask.ndim != 4 or 0 in mask.shape[:2]:
        raise ValueError(
            f"{who}: mask must have 4 dimensions (batch or 1, heads or 1, queries, keys) or 2 (queries, keys), got "
            f"shape {tuple(mask.shape)}; add leading dimensions of size 1 to share it over the batch and the heads."
        )
    return mask


def refuse_empty_rows(who: str, mask: Tensor, *, row: str, key: str) -> None:
    empty = ~mask.any(-1)
    n_empty = int(empty.sum())
    if n_empty:
        b, h, i = empty.nonzero()[0].tolist()
        raise ValueError(
            f"{who}: every {row} must attend to at least one {key}, but (b={b}, h={h}, row={i}) attends to none "
            f"({n_empty} of {empty.numel()} rows are empty); give each row a {key} (methods force the diagonal), or "
            "pass allow_empty_rows=True, which makes such rows give output 0 and log-sum-exp -inf."
        )
