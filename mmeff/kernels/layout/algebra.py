"""Union, intersection and complement of layouts.

They work block by block on the kinds *empty*, *partial* and *full*; only blocks that stay partial need their pairs, and
those become bitmaps. So a layout with bounds that meets another one trades its tables for a bitmap of its partial blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import build

if TYPE_CHECKING:
    from .block_layout import BlockLayout

Rule = Callable[[Tensor, Tensor], Tensor]
Pairs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, row, key block (E,) -> (E, q_block, kv_block)


def union(a: BlockLayout, b: BlockLayout) -> BlockLayout:
    """Return the layout in which a pair attends if it does in a or in b."""
    _check_equal("union", a, b)
    return _combine(a, b, lambda x, y: x | y)


def intersection(a: BlockLayout, b: BlockLayout) -> BlockLayout:
    """Return the layout in which a pair attends if it does in a and in b."""
    _check_equal("intersection", a, b)
    return _combine(a, b, lambda x, y: x & y)


def complement(a: BlockLayout) -> BlockLayout:
    """Return the layout in which a pair of tokens in use attends if it does not in a."""
    some, every = _kinds(a)
    in_use = (a.q_valid[:, None, :, None] > 0) & (a.kv_valid[:, None, None, :] > 0)
    some, every, in_use = torch.broadcast_tensors(some, every, in_use)
    return _layout(a, full=in_use & ~some, open_blocks=in_use & some & ~every, pairs=lambda *at: ~_pairs(a, *at))


def _combine(a: BlockLayout, b: BlockLayout, rule: Rule) -> BlockLayout:
    (some_a, every_a), (some_b, every_b) = _kinds(a), _kinds(b)
    # the rule of pairs holds for whole blocks too: what every pair does, and what some pair may do
    every, some = rule(every_a, every_b), rule(some_a, some_b)
    return _layout(
        a,
        full=every,
        open_blocks=some & ~every,
        pairs=lambda *at: rule(_pairs(a, *at), _pairs(b, *at)),
    )


def _layout(like: BlockLayout, *, full: Tensor, open_blocks: Tensor, pairs: Pairs) -> BlockLayout:
    """Make the layout of the full blocks, and of what the pairs of the open blocks turn out to be."""
    batch, head, row, col = open_blocks.nonzero(as_tuple=True)
    slabs = pairs(batch, head, row, col)
    q_valid = like.q_valid.expand(open_blocks.shape[0], -1)[batch, row]
    kv_valid = like.kv_valid.expand(open_blocks.shape[0], -1)[batch, col]
    slabs = slabs & (torch.arange(like.q_block, device=like.device) < q_valid[:, None])[:, :, None]
    slabs = slabs & (torch.arange(like.kv_block, device=like.device) < kv_valid[:, None])[:, None, :]
    count = slabs.sum((-2, -1))
    whole = count == q_valid.long() * kv_valid
    partial = torch.zeros_like(open_blocks)
    partial[batch, head, row, col] = (count > 0) & ~whole
    full = full.clone()
    full[batch, head, row, col] |= whole & (count > 0)
    bitmap = slabs[(count > 0) & ~whole]
    fields = build.lists(partial, full)
    return dataclasses.replace(
        like, **fields, bitmap=bitmap if bitmap.shape[0] else None, bounds=None, known_pairs=None
    )


def _kinds(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Return which blocks are visited and which of them are full, (B, H, nQ, nK) bool each."""
    M = layout.row_start.shape[0]
    entries = layout.entries(torch.arange(M, device=layout.device))
    some = torch.zeros(M, layout.nK, dtype=torch.bool, device=layout.device)
    every = some.clone()
    some[entries.row, entries.col] = True
    every[entries.row, entries.col] = entries.full
    shape = (layout.batch, *layout.row_of.shape[1:], layout.nK)
    return some[layout.row_of].expand(shape), every[layout.row_of].expand(shape)


def _pairs(layout: BlockLayout, batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return which pairs of some blocks attend, (E, q_block, kv_block) bool; blocks may be empty, partial or full."""
    some, every = (
        x.expand(int(batch.max()) + 1 if batch.numel() else 1, -1, -1, -1) if x.shape[0] == 1 else x
        for x in _kinds(layout)
    )
    head = head if some.shape[1] > 1 else torch.zeros_like(head)
    result = every[batch, head, row, col][:, None, None].repeat(1, layout.q_block, layout.kv_block)
    partial = some[batch, head, row, col] & ~every[batch, head, row, col]
    if not bool(partial.any()):
        return result
    at = batch[partial] if layout.row_of.shape[0] > 1 else torch.zeros_like(batch[partial])
    base = layout.row_of[at, head[partial], row[partial]]
    # the position of each block among the partial entries of its row
    slab = layout.partial_start[base] + _rank(layout)[base, col[partial]]
    result[partial] = layout.slabs(row[partial], col[partial], slab)
    return result


def _rank(layout: BlockLayout) -> Tensor:
    """(M, nK) int64: the place of a key block in its row's list, where it is in the list."""
    M = layout.row_start.shape[0]
    entries = layout.entries(torch.arange(M, device=layout.device))
    rank = torch.zeros(M, layout.nK, dtype=torch.int64, device=layout.device)
    rank[entries.row, entries.col] = entries.slab - layout.partial_start[entries.row]
    return rank


def _check_equal(what: str, a: BlockLayout, b: BlockLayout) -> None:
    for name in ("q_len", "kv_len", "q_block", "kv_block", "device"):
        x, y = getattr(a, name), getattr(b, name)
        if x != y:
            raise ValueError(
                f"The {what} of two layouts needs equal {name}, got {x} and {y}; build both for one problem."
            )
    for name, x, y in (("batch", a.batch, b.batch), ("heads", a.shape[1], b.shape[1])):
        if x != y and 1 not in (x, y):
            raise ValueError(f"The {what} of two layouts needs equal {name} or 1, got {x} and {y}.")
    for name in ("q_valid", "kv_valid"):
        x, y = getattr(a, name), getattr(b, name)
        if x.shape != y.shape or not bool((x == y).all()):
            raise ValueError(f"The {what} of two layouts needs equal {name} (tokens in use per block); they differ.")
