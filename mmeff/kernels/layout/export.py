"""A BlockLayout in the forms of other libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .block_layout import BlockLayout


class Csr(NamedTuple):
    """Visited blocks as compressed sparse rows over (B|1, H|1, nQ), flattened; key blocks ascend within a row."""

    indptr: Tensor  # (R + 1,) int32
    indices: Tensor  # (E,) int32 key block
    partial: Tensor  # (E,) bool: only some pairs of the block attend


def dense_mask(layout: BlockLayout) -> Tensor:
    """Return the attention mask, (B|1, H|1, Nq, Nk) bool."""
    B, H = layout.shape[:2]
    nQ, nK = layout.nQ, layout.nK
    base = layout.row_of.expand(B, H, nQ).reshape(-1)
    entries = layout.entries(base)
    blocks = torch.zeros(B * H * nQ, nK, layout.q_block, layout.kv_block, dtype=torch.bool, device=layout.device)
    blocks[entries.row[entries.full], entries.col[entries.full]] = True
    partial = ~entries.full
    row, col = entries.row[partial], entries.col[partial]
    if row.numel():
        blocks[row, col] = layout.slabs(row % nQ, col, entries.slab[partial])
    padded = blocks.view(B, H, nQ, nK, layout.q_block, layout.kv_block).transpose(3, 4)
    mask = padded.reshape(B, H, nQ * layout.q_block, nK * layout.kv_block)[:, :, : layout.q_len, : layout.kv_len]
    q_used, k_used = layout.tokens_in_use()
    return mask & q_used[:, None, :, None] & k_used[:, None, None, :]


def csr(layout: BlockLayout) -> Csr:
    """Return the visited blocks as compressed sparse rows."""
    rows = layout.row_of.reshape(-1)
    entries = layout.entries(rows)
    order = torch.argsort(entries.row * max(layout.nK, 1) + entries.col)
    n = layout.n_visited[rows]
    indptr = torch.nn.functional.pad(n.cumsum(0), (1, 0))
    return Csr(indptr.to(torch.int32), entries.col[order].to(torch.int32), ~entries.full[order])


def flex(layout: BlockLayout) -> BlockMask:
    """Return the layout as FlexAttention's BlockMask, whose padded lists hold nK entries per row."""
    from torch.nn.attention.flex_attention import BlockMask

    B, H = layout.shape[:2]
    nQ, nK = layout.nQ, layout.nK
    rows = layout.row_of.expand(B, H, nQ).reshape(-1)
    entries = layout.entries(rows)
    # which bitmap a block reads: -1 for a full block, which attends throughout, -2 for one that is not visited
    slab = torch.full((rows.shape[0], nK), -2, dtype=torch.int64, device=layout.device)
    slab[entries.row, entries.col] = torch.where(entries.full, -1, entries.slab)
    slab = slab.view(B, H, nQ, nK)
    bitmap, bounds = layout.bitmap, layout.bounds
    q_used, k_used = layout.tokens_in_use()
    q_block, kv_block = layout.q_block, layout.kv_block

    def pair_attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b_q, b_k = (b if used.shape[0] > 1 else torch.zeros_like(b) for used in (q_used, k_used))
        at = slab[b if B > 1 else torch.zeros_like(b), h if H > 1 else torch.zeros_like(h), q // q_block, k // kv_block]
        attends = at == -1
        if bounds is not None:
            attends = attends | ((at >= 0) & bounds.attends(q, k))
        elif bitmap is not None:
            attends = attends | ((at >= 0) & bitmap[at.clamp(min=0), q % q_block, k % kv_block])
        return attends & q_used[b_q, q] & k_used[b_k, k]

    # a full block with tokens that are not in use needs the rule too
    whole = (layout.kv_valid[:, None, None, :] == kv_block) & (layout.q_valid[:, None, :, None] == q_block)
    visited = torch.zeros(rows.shape[0], nK, dtype=torch.bool, device=layout.device)
    visited[entries.row, entries.col] = True
    full = torch.zeros_like(visited)
    full[entries.row, entries.col] = entries.full
    full = full.view(B, H, nQ, nK) & whole
    partial = visited.view(B, H, nQ, nK) & ~full
    return BlockMask.from_kv_blocks(
        *_padded(partial),
        *_padded(full),
        (q_block, kv_block),
        pair_attends,
        (layout.q_len, layout.kv_len),
    )


def _padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (counts, indices) of a block mask, the marked key blocks first and ascending."""
    order = torch.argsort((~mask).to(torch.int8), dim=-1, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)
