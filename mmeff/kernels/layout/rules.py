"""What must hold for a BlockLayout and for the masks it is made from, and what to tell users when it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .block_layout import BlockLayout


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
    if layout.bounds is None:
        demand(partial == P, f"bitmap must hold one slab per partial entry, {partial}, but it holds {P}")
    for name, valid, length, block in (
        ("q_valid", layout.q_valid, layout.q_len, layout.q_block),
        ("kv_valid", layout.kv_valid, layout.kv_len, layout.kv_block),
    ):
        most = valid_counts(length, block, layout.device)
        demand(((valid >= 0) & (valid <= most)).all(), f"{name} must lie between 0 and the tokens that the block has")
    row, col, full, _ = layout.entries(torch.arange(M, device=layout.device))
    demand(((col >= 0) & (col < layout.nK)).all(), f"col_idx must lie in [0, {layout.nK}) wherever a list reads it")
    same_list = (row[1:] == row[:-1]) & (full[1:] == full[:-1])
    ascending = (col[1:] > col[:-1])[same_list].all()
    demand(ascending, "col_idx must ascend strictly within the partial and within the full entries")
    distinct = torch.unique(row * layout.nK + col).shape[0] == col.shape[0]
    demand(distinct, "a key block must not be both partial and full in one row")


def check_fields(layout: BlockLayout) -> None:
    """Raise ValueError unless the tensors of a layout have the shapes and dtypes that belong together."""
    device = layout.row_start.device
    M = layout.row_start.shape[0] if layout.row_start.ndim == 1 else -1
    wanted: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        "row_start": (torch.int64, (None,)),
        "n_partial": (torch.int32, (M,)),
        "n_full": (torch.int32, (M,)),
        "col_idx": (torch.int32, (None,)),
        "row_of": (torch.int64, (None, None, layout.nQ)),
        "bitmap": (torch.bool, (None, layout.q_block, layout.kv_block)),
        "q_valid": (torch.int32, (None, layout.nQ)),
        "kv_valid": (torch.int32, (None, layout.nK)),
    }
    for name, (dtype, shape) in wanted.items():
        x = getattr(layout, name)
        if x is None and name == "bitmap":
            continue
        fits = x.ndim == len(shape) and all(w is None or w == s for w, s in zip(shape, x.shape, strict=True))
        if x.dtype != dtype or not fits or x.device != device:
            letters = ", ".join("*" if w is None else str(w) for w in shape)
            raise ValueError(
                f"BlockLayout.{name} must be a {dtype} tensor of shape ({letters}) on {device}, got {x.dtype} "
                f"{tuple(x.shape)} on {x.device}; from_block_mask and from_dense_mask build all lists consistently."
            )
    batches = {x.shape[0] for x in (layout.row_of, layout.q_valid, layout.kv_valid)} - {1}
    if len(batches) > 1:
        raise ValueError(
            f"BlockLayout: row_of, q_valid and kv_valid must agree in batch or have 1, got {sorted(batches)}."
        )
    bounds = layout.bounds
    if bounds is None:
        return
    if layout.bitmap is not None:
        raise ValueError("BlockLayout: partial blocks are described by a bitmap or by bounds, got both; pass one.")
    if (bounds.q_len, bounds.kv_len) != (layout.q_len, layout.kv_len) or bounds.q_bounds.device != device:
        raise ValueError(
            f"BlockLayout.bounds must be for Nq={layout.q_len} queries and Nk={layout.kv_len} keys on {device}, got "
            f"{bounds.q_len} and {bounds.kv_len} on {bounds.q_bounds.device}."
        )


def valid_counts(length: int, block: int, device: torch.device) -> Tensor:
    """Return (1, nBlocks) int32, the tokens that the sequence gives to each block."""
    starts = torch.arange(0, length, block, device=device, dtype=torch.int32)
    return (length - starts).clamp(max=block)[None]


def valids(
    who: str,
    q_valid: Tensor | None,
    kv_valid: Tensor | None,
    *,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the counts of tokens in use, (B|1, nQ) and (B|1, nK) int32 on `device`, as given or as the lengths say."""
    result = []
    for name, given, length, block in (("q_valid", q_valid, q_len, q_block), ("kv_valid", kv_valid, kv_len, kv_block)):
        whole = valid_counts(length, block, device)
        if given is None:
            result.append(whole)
            continue
        counts = given if given.ndim == 2 else given[None]
        if (
            given.is_floating_point()
            or given.dtype == torch.bool
            or counts.ndim != 2
            or counts.shape[1:] != whole.shape[1:]
        ):
            raise ValueError(
                f"{who}: {name} must be integers of shape ({whole.shape[1]},) or (B|1, {whole.shape[1]}), the tokens in "
                f"use of each block, got {given.dtype} {tuple(given.shape)}."
            )
        counts = counts.to(device)
        if bool(((counts < 0) | (counts > whole)).any()):
            raise ValueError(
                f"{who}: {name} must lie between 0 and the tokens that each block has ({block}, and {int(whole[0, -1])} in "
                f"the last), got {int(counts.min())} to {int(counts.max())}."
            )
        result.append(counts.to(torch.int32))
    return result[0], result[1]


def block_counts(who: str, *, q_len: int, kv_len: int, q_block: int, kv_block: int) -> tuple[int, int]:
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("q_block", q_block), ("kv_block", kv_block)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(
                f"{who}: {name} must be an int (tokens), got {type(value).__name__} {value!r}; pass a number."
            )
        least = 1 if name.endswith("block") else 0
        if value < least:
            raise ValueError(f"{who}: {name} must be >= {least} token{'s' * (least != 1)}, got {value}.")
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


def refuse_empty_rows(who: str, mask: Tensor, *, row: str, key: str, unused: Tensor | None = None) -> None:
    """Raise ValueError if a row of the mask holds no True, unless it is `unused` (broadcastable to the rows)."""
    empty = ~mask.any(-1)
    if unused is not None:
        empty = empty & ~unused
    n_empty = int(empty.sum())
    if n_empty:
        b, h, i = empty.nonzero()[0].tolist()
        raise ValueError(
            f"{who}: every {row} must attend to at least one {key}, but (b={b}, h={h}, row={i}) attends to none "
            f"({n_empty} of {empty.numel()} rows are empty); give each row a {key} (methods force the diagonal), or "
            "pass allow_empty_rows=True, which makes such rows give output 0 and log-sum-exp -inf."
        )
