"""How masks of blocks or of pairs become the lists of a BlockLayout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lists(partial: Tensor | None, full: Tensor) -> dict[str, Any]:
    """Return the list fields of the layout that visits the given blocks.

    Args:
        partial, full: (B, H, nQ, nK) bool each and disjoint; None where no block is partial.
    """
    B, H, nQ, nK = full.shape
    M = B * H * nQ
    n_full = full.reshape(M, nK).sum(-1)
    if partial is None:
        n_partial, col_idx = torch.zeros_like(n_full), full.reshape(M, nK).nonzero()[:, 1]
    else:
        n_partial = partial.reshape(M, nK).sum(-1)
        # (M, 2, nK): nonzero runs over rows, then partial before full, then ascending key blocks
        col_idx = torch.stack((partial.reshape(M, nK), full.reshape(M, nK)), 1).nonzero()[:, 2]
    n = n_partial + n_full
    return {
        "row_start": n.cumsum(0) - n,
        "n_partial": n_partial.to(torch.int32),
        "n_full": n_full.to(torch.int32),
        "col_idx": col_idx.to(torch.int32),
        "row_of": torch.arange(M, device=full.device).view(B, H, nQ),
    }


def in_blocks(mask: Tensor, q_block: int, kv_block: int) -> Tensor:
    """Cut a mask (B, H, Nq, Nk) into blocks, (B, H, nQ, nK, q_block, kv_block), False beyond its ends."""
    B, H, Nq, Nk = mask.shape
    nQ, nK = -(-Nq // q_block), -(-Nk // kv_block)
    padded = torch.nn.functional.pad(mask, (0, nK * kv_block - Nk, 0, nQ * q_block - Nq))
    return padded.view(B, H, nQ, q_block, nK, kv_block).transpose(3, 4)


def lists_of_slabs(slabs: Tensor, q_valid: Tensor, kv_valid: Tensor) -> dict[str, Any]:
    """Return the list fields and the bitmap of the layout in which the pairs of `slabs` attend.

    Args:
        slabs: (B, H, nQ, nK, q_block, kv_block) bool, False for tokens that are not in use.
        q_valid, kv_valid: (B|1, nQ) and (B|1, nK) tokens in use.
    """
    pairs = slabs.sum((-2, -1))
    full = pairs == (q_valid[:, :, None] * kv_valid[:, None, :])[:, None]
    full &= pairs > 0
    partial = (pairs > 0) & ~full
    bitmap = slabs[partial]
    return {**lists(partial, full), "bitmap": bitmap if bitmap.shape[0] else None}
