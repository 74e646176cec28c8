"""From a selection to a layout: single key columns instead of blocks, and one selection for all heads of a group."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..layout import BlockLayout
from . import checks

_REDUCTIONS = ("sum", "max", "any")


def share_group(x: Tensor, Hk: int, how: str) -> Tensor:
    """Reduce scores or masks of query heads to one per key head, so that a group visits the same blocks.

    A kernel then reads the keys of a block once for the whole group.

    Args:
        x: (B, H, ...) scores or bool mask; H a multiple of Hk, and query head h belongs to key head h // (H / Hk).
        Hk: key heads.
        how: "sum" or "max" for scores, "any" (the union) for a mask.

    Returns: (B, Hk, ...), of the dtype of x. Spend the budget on it, make the layout, and widen that by `share_rows`.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: a score of -inf stays -inf under "max" only if all heads have it, under "sum" if any has.
    """
    who = "share_group"
    if how not in _REDUCTIONS:
        raise ValueError(f"{who}: how must be one of {', '.join(map(repr, _REDUCTIONS))}, got {how!r}.")
    is_mask = isinstance(x, Tensor) and x.dtype == torch.bool
    if not isinstance(x, Tensor) or is_mask != (how == "any") or not (is_mask or x.is_floating_point()):
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{who}: how={how!r} needs {'a bool mask' if how == 'any' else 'floating-point scores'}, got {got}; use "
            "'any' for masks, 'sum' or 'max' for scores."
        )
    checks.count(who, "Hk", Hk, "key heads")
    if x.ndim < 2 or x.shape[1] % Hk or not x.shape[1]:
        raise ValueError(
            f"{who}: x must be (B, H, ...) with H a multiple of Hk = {Hk}, got shape {tuple(x.shape)}; heads are the "
            "second axis of scores and masks."
        )
    groups = x.unflatten(1, (Hk, -1))
    if how == "any":
        return groups.any(2)
    return groups.sum(2) if how == "sum" else groups.amax(2)


def share_rows(layout: BlockLayout, H: int) -> BlockLayout:
    """Give a layout made for key heads to all query heads of their groups, at no cost in memory.

    Args:
        layout: for Hk heads, for example of a selection from `share_group`.
        H: query heads, a multiple of Hk.

    Returns: a BlockLayout for H heads in which the heads of a group address the same lists.
    Raises: ValueError if H is not a multiple of the layout's heads.
    """
    checks.count("share_rows", "H", H, "query heads")
    Hk = layout.row_of.shape[1]
    if H % Hk:
        raise ValueError(f"share_rows: H must be a multiple of the layout's {Hk} heads, got {H}; pass the query heads.")
    return dataclasses.replace(layout, row_of=layout.row_of.repeat_interleave(H // Hk, 1))


def stripe_layout(selected: Tensor, *, q_len: int, q_block: int, allow_empty_rows: bool = False) -> BlockLayout:
    """Make the layout of single key columns selected per query block: key blocks of one token.

    A gathering kernel reads such columns many at a time (128 wide where it feeds matrix units), so a query block pays
    for its selected keys rounded up to that width, and for scattered reads; it does not pay for whole blocks around
    each key. Where the selected keys lie together, `blocks_holding(selected, 128)` is the cheaper layout.

    Args:
        selected: (B|1, H|1, nQ, Nk) or (nQ, Nk) bool: the keys of each query block.
        q_len, q_block: tokens in the query sequence and in a query block.
        allow_empty_rows: as in `BlockLayout.from_block_mask`.

    Returns: a BlockLayout with kv_block 1 and kv_len Nk. Making it synchronises with the device.
    Raises: ValueError for a wrong shape or an empty row, TypeError for a mask that is not bool.
    Source: the stripe granularity of AnchorAttention (Zhang et al., 2025, arXiv:2505.23520).
    """
    if not isinstance(selected, Tensor) or selected.ndim not in (2, 4):
        got = f"shape {tuple(selected.shape)}" if isinstance(selected, Tensor) else type(selected).__name__
        raise ValueError(
            f"stripe_layout: selected must be a (B|1, H|1, nQ, Nk) or (nQ, Nk) tensor, one column per key, got {got}."
        )
    return BlockLayout.from_block_mask(
        selected,
        q_len=q_len,
        kv_len=selected.shape[-1],
        q_block=q_block,
        kv_block=1,
        allow_empty_rows=allow_empty_rows,
    )
