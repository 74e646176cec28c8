"""Layouts as operators of torch.library see them: a tuple of tensors, by which the layout is recognised again.

An operator takes tensors and numbers, not objects, but what backends derive from a layout (buckets, orders, transposes)
must be found again at the next call. So every layout is known by the identity of its tensors for as long as it lives; one
that arrives as tensors alone, as the constants of an exported program do, is made anew and kept for a while.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .bounds import Bounds

if TYPE_CHECKING:
    from .block_layout import BlockLayout

Lists = tuple[Tensor | None, ...]

MAX_ADOPTED = 32

_live: weakref.WeakValueDictionary[tuple[int, ...], BlockLayout] = weakref.WeakValueDictionary()
_adopted: OrderedDict[tuple[int, ...], BlockLayout] = OrderedDict()


def lists_of(layout: BlockLayout) -> Lists:
    """Return the tensors that stand for a layout in an operator's arguments."""
    bounds = layout.bounds
    q_bounds, k_bounds = (None, None) if bounds is None else (bounds.q_bounds, bounds.k_bounds)
    return (
        layout.row_start, layout.n_partial, layout.n_full, layout.col_idx, layout.row_of, layout.q_valid,
        layout.kv_valid, layout.bitmap, q_bounds, k_bounds,
    )  # fmt: skip


def remember(layout: BlockLayout) -> None:
    """Know the layout by its tensors for as long as it lives."""
    _live[_key(lists_of(layout))] = layout


def layout_of(lists: Lists, *, q_len: int, kv_len: int, q_block: int, kv_block: int) -> BlockLayout:
    """Return the layout that the tensors came from, with everything derived from it; or make it of them."""
    from .block_layout import BlockLayout

    key = _key(lists)
    found = _live.get(key)
    if found is None:
        names = ("row_start", "n_partial", "n_full", "col_idx", "row_of", "q_valid", "kv_valid", "bitmap")
        fields: dict[str, Any] = dict(zip(names, lists[:8], strict=True))
        q_bounds, k_bounds = lists[8:]
        if q_bounds is not None and k_bounds is not None:
            fields["bounds"] = Bounds(q_bounds, k_bounds)
        found = BlockLayout(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block, **fields)
        _adopted[key] = found
        while len(_adopted) > MAX_ADOPTED:
            _adopted.popitem(last=False)
    return found


def _key(lists: Lists) -> tuple[int, ...]:
    # a live layout keeps its tensors alive, so no other tensor can have their ids
    return tuple(id(x) for x in lists)
