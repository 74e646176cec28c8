"""What kernels derive from the lists of a BlockLayout: the transpose, the order of rows, pieces of long rows, counts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .block_layout import BlockLayout

# Elements of pair masks that exist at a time while pairs are counted.
COUNT_ELEMENTS = 2**25


class SplitPlan(NamedTuple):
    """Pieces of the rows of `row_of`, flattened; a short row is one piece. Pieces of a row are adjacent, rows ascend."""

    row: Tensor  # (S,) int64 row
    start: Tensor  # (S,) int64, first entry in `col_idx`
    n_partial: Tensor  # (S,) int32 entries: partial ones first,
    n_full: Tensor  # (S,) int32 then full ones
    slab: Tensor  # (S,) int64 row of `bitmap` of the first partial entry


@torch.library.custom_op("mmeff::block_mask", mutates_args=())
def block_mask(
    row_start: Tensor, n_partial: Tensor, n_full: Tensor, col_idx: Tensor, row_of: Tensor, nK: int
) -> Tensor:
    """Return the visited blocks, (B|1, H|1, nQ, nK) bool. An operator, because the length of the lists is data."""
    n = n_partial.long() + n_full
    row = torch.repeat_interleave(torch.arange(n.shape[0], device=n.device), n)
    slot = torch.arange(row.shape[0], device=n.device) - (n.cumsum(0) - n)[row]
    visited = torch.zeros(n.shape[0], nK, dtype=torch.bool, device=n.device)
    visited[row, col_idx[row_start[row] + slot].long()] = True
    return visited[row_of]


@block_mask.register_fake
def _(row_start: Tensor, n_partial: Tensor, n_full: Tensor, col_idx: Tensor, row_of: Tensor, nK: int) -> Tensor:
    return row_of.new_empty((*row_of.shape, nK), dtype=torch.bool)


def transpose(layout: BlockLayout) -> BlockLayout:
    """Return the layout with queries and keys exchanged."""
    B, H, nQ = layout.row_of.shape
    M = B * H * layout.nK
    entries = layout.entries(layout.row_of.reshape(-1))
    new_row = entries.row // nQ * layout.nK + entries.col if nQ else entries.row
    # the entries run over ascending query blocks, so a stable sort keeps those ascending within each list
    order = torch.argsort(new_row * 2 + entries.full, stable=True)
    full = entries.full[order]
    n_full = torch.bincount(new_row[entries.full], minlength=M)
    n_partial = torch.bincount(new_row[~entries.full], minlength=M)
    n = n_full + n_partial
    bitmap = layout.bitmap
    return dataclasses.replace(
        layout,
        q_len=layout.kv_len,
        kv_len=layout.q_len,
        q_block=layout.kv_block,
        kv_block=layout.q_block,
        row_start=n.cumsum(0) - n,
        n_partial=n_partial.to(torch.int32),
        n_full=n_full.to(torch.int32),
        col_idx=(entries.row[order] % max(nQ, 1)).to(torch.int32),
        row_of=torch.arange(M, device=layout.device).view(B, H, layout.nK),
        bitmap=None if bitmap is None else bitmap[entries.slab[order][~full]].transpose(1, 2).contiguous(),
        bounds=None if layout.bounds is None else layout.bounds.swapped(),
        q_valid=layout.kv_valid,
        kv_valid=layout.q_valid,
    )


def row_order(layout: BlockLayout) -> Tensor:
    """Return the rows of `row_of`, flattened, longest list first (longest processing time first), (R,) int32."""
    n = layout.n_visited[layout.row_of.reshape(-1)]
    return torch.argsort(n, descending=True, stable=True).to(torch.int32)


def split_plan(layout: BlockLayout, max_entries: int | None) -> SplitPlan:
    """Cut the rows of `row_of` into pieces of at most `max_entries` entries; a row without entries is one piece."""
    base = layout.row_of.reshape(-1)
    n, n_partial = layout.n_visited[base], layout.n_partial[base].long()
    if max_entries is None:
        max_entries = max(8, -(-4 * int(n.sum()) // max(n.shape[0], 1)))
    pieces = (-(-n // max_entries)).clamp(min=1)
    row = torch.repeat_interleave(torch.arange(n.shape[0], device=layout.device), pieces)
    piece = torch.arange(row.shape[0], device=layout.device) - (pieces.cumsum(0) - pieces)[row]
    first = piece * max_entries
    size = (n[row] - first).clamp(max=max_entries)
    partial = (n_partial[row] - first).clamp(min=0).minimum(size)
    return SplitPlan(
        row=row,
        start=layout.row_start[base][row] + first,
        n_partial=partial.to(torch.int32),
        n_full=(size - partial).to(torch.int32),
        slab=layout.partial_start[base][row] + first.minimum(n_partial[row]),
    )


def count_pairs(layout: BlockLayout) -> tuple[int, int]:
    """Return the attending pairs and the queries that attend to nothing, both over `layout.shape`."""
    B, H = layout.shape[:2]
    nQ = layout.nQ
    base = layout.row_of.expand(B, H, nQ).reshape(-1)
    q_valid = layout.q_valid[:, None].expand(B, H, nQ).reshape(-1)
    kv_valid = layout.kv_valid.expand(B, layout.nK)
    pairs = unused = 0
    # only rows with partial entries need a count per query; the others are settled by their lists
    plain = layout.n_partial[base] == 0
    for rows in _batches(layout, base, plain):
        entries = layout.entries(base[rows])
        at = rows[entries.row]
        keys = torch.zeros(rows.shape[0], dtype=torch.int64, device=layout.device)
        batch = at // max(H * nQ, 1)
        full = entries.full
        keys.index_add_(0, entries.row[full], kv_valid[batch[full], entries.col[full]].long())
        per_query = keys[:, None]
        if not bool(full.all()):
            partial = ~full
            col, batch = entries.col[partial], batch[partial]
            attends = layout.slabs(at[partial] % nQ, col, entries.slab[partial])
            used = torch.arange(layout.kv_block, device=layout.device) < kv_valid[batch, col][:, None]
            per_query = keys[:, None].repeat(1, layout.q_block)
            per_query.index_add_(0, entries.row[partial], (attends & used[:, None]).sum(-1))
        in_use = torch.arange(layout.q_block, device=layout.device) < q_valid[rows, None]
        pairs += int((per_query * in_use).sum())
        # a query that is not in use is empty too, whatever its block visits
        last = nQ * layout.q_block - layout.q_len
        exists = torch.full_like(rows, layout.q_block) - last * (rows % max(nQ, 1) == nQ - 1)
        slots = torch.arange(layout.q_block, device=layout.device) < exists[:, None]
        unused += int((slots & ((per_query == 0) | ~in_use)).sum())
    return pairs, unused


def visited_shares(layout: BlockLayout) -> Tensor:
    """Return which share of each block's pairs of tokens in use attends, (batch, H|1, nQ, nK) float64: 1 where all do."""
    B, H, nQ, nK = layout.batch, layout.row_of.shape[1], layout.nQ, layout.nK
    base = layout.row_of.expand(B, H, nQ).reshape(-1)
    q_valid, kv_valid = (x.expand(B, -1) for x in (layout.q_valid, layout.kv_valid))
    shares = torch.zeros(base.shape[0], nK, device=layout.device, dtype=torch.float64)
    for rows in _batches(layout, base, layout.n_partial[base] == 0):
        entries = layout.entries(base[rows])
        at, col = rows[entries.row], entries.col
        value = entries.full.double()
        partial = ~entries.full
        if bool(partial.any()):
            row, key, batch = at[partial] % nQ, col[partial], at[partial] // max(H * nQ, 1)
            queries, keys = q_valid[batch, row], kv_valid[batch, key]
            attends = layout.slabs(row, key, entries.slab[partial])
            attends = attends & (torch.arange(layout.q_block, device=layout.device) < queries[:, None])[:, :, None]
            attends = attends & (torch.arange(layout.kv_block, device=layout.device) < keys[:, None])[:, None]
            value[partial] = attends.sum((1, 2)).double() / (queries * keys).clamp(min=1)
        shares[at, col] = value
    return shares.view(B, H, nQ, nK)


def _batches(layout: BlockLayout, base: Tensor, plain: Tensor) -> list[Tensor]:
    """Rows without partial entries all at once, the others in batches whose pair masks fit COUNT_ELEMENTS."""
    every = torch.arange(base.shape[0], device=layout.device)
    masked = every[~plain]
    batches = [every[plain]] if bool(plain.any()) else []
    if masked.numel():
        slabs = layout.n_partial[base[masked]].long().cumsum(0) * layout.q_block * layout.kv_block
        batch = (slabs - 1) // COUNT_ELEMENTS
        batches += list(masked.split(torch.unique_consecutive(batch, return_counts=True)[1].tolist()))
    return batches
