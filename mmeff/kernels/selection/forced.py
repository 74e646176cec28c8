"""Forced sets: blocks that are visited whatever the scores say. Combine them with `|`, and with a budget's mask.

Each returns a bool mask that broadcasts to (1, 1, nQ, nK), the block mask of a BlockLayout. They depend on shapes
alone, so a method that uses the same grid for many steps makes them once. nQ and nK are numbers of blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks

Device = torch.device | str | None


class CausalBlocks(NamedTuple):
    """Key blocks as a causal mask sees them, each (1, 1, nQ, nK) bool."""

    visible: Tensor  # some query of the block may see some key of the block
    full: Tensor  # every query may see every key


def local(
    nQ: int, nK: int, width: int, *, q_block: int = 1, kv_block: int = 1, offset: int = 0, device: Device = None
) -> Tensor:
    """Force the key blocks near a query block's own position.

    Args:
        nQ, nK: query blocks and key blocks.
        width: key blocks to each side of those that hold the query block's own positions.
        q_block, kv_block: tokens in a block; only their ratio matters while offset is 0.
        offset: position of the first query among the keys, in tokens (0 unless a prefix was processed before).
        device: where to make the mask.

    Returns: (1, 1, nQ, nK) bool.
    Raises: ValueError or TypeError for sizes that are negative or not integers.
    """
    who = "local"
    _block_grid(who, nQ, nK, q_block=q_block, kv_block=kv_block, offset=offset)
    checks.count(who, "width", width, "blocks to each side", least=0)
    first = offset + torch.arange(nQ, device=device)[:, None] * q_block
    key = torch.arange(nK, device=device)
    near = (key >= first // kv_block - width) & (key <= (first + q_block - 1) // kv_block + width)
    return near[None, None]


def diagonal(
    nQ: int, nK: int, *, q_block: int = 1, kv_block: int = 1, offset: int = 0, device: Device = None
) -> Tensor:
    """Force the key blocks that hold a query block's own positions; then no row of self-attention is empty.

    Args: as for `local`, whose width is 0 here.
    Returns: (1, 1, nQ, nK) bool.
    Raises: ValueError or TypeError for sizes that are negative or not integers.
    """
    return local(nQ, nK, 0, q_block=q_block, kv_block=kv_block, offset=offset, device=device)


def columns(nK: int, blocks: Sequence[int] | slice | Tensor, *, device: Device = None) -> Tensor:
    """Force key blocks for every query.

    Args:
        nK: key blocks.
        blocks: their indices, negative ones from the end; or a slice of them; or an (nK,) bool tensor, for example
            from `blocks_holding`.
        device: where to make the mask; None leaves a bool tensor where it is.

    Returns: (1, 1, 1, nK) bool.
    Raises: ValueError for a block that does not exist, TypeError for anything else.
    """
    who = "columns"
    checks.count(who, "nK", nK, "key blocks")
    if isinstance(blocks, Tensor):
        if blocks.dtype != torch.bool or blocks.shape != (nK,):
            raise ValueError(
                f"{who}: a tensor of blocks must be bool of shape (nK,) = ({nK},), got {blocks.dtype} "
                f"{tuple(blocks.shape)}; pass indices as a list."
            )
        return (blocks if device is None else blocks.to(device))[None, None, None]
    indices = range(nK)[blocks] if isinstance(blocks, slice) else blocks
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"{who}: blocks must be integers, a slice or a bool tensor, got {index!r} among them.")
        if not -nK <= index < nK:
            raise ValueError(f"{who}: blocks must lie in [{-nK}, {nK}), got {index}; nK counts blocks, not tokens.")
    taken = {index % nK for index in indices}
    return torch.tensor([j in taken for j in range(nK)], device=device)[None, None, None]


def sink(nK: int, n: int = 1, *, device: Device = None) -> Tensor:
    """Force the first n key blocks for every query.

    Args:
        nK: key blocks; n: how many of them. More than nK means all.
        device: where to make the mask.

    Returns: (1, 1, 1, nK) bool.
    Raises: ValueError or TypeError for sizes that are negative or not integers.
    """
    checks.count("sink", "nK", nK, "key blocks")
    checks.count("sink", "n", n, "key blocks", least=0)
    return (torch.arange(nK, device=device) < n)[None, None, None]


def first_frame(nQ: int, nK: int, blocks: int, *, device: Device = None) -> Tensor:
    """Force the first frame to see itself: the first `blocks` query blocks see the first `blocks` key blocks.

    Args:
        nQ, nK: query blocks and key blocks.
        blocks: blocks of the first frame. It must come first in the sequence: after a permutation that mixes frames,
            use `blocks_holding` on the tokens of that frame instead.
        device: where to make the mask.

    Returns: (1, 1, nQ, nK) bool.
    Raises: ValueError or TypeError for sizes that are negative or not integers.
    Source: Rectified SpaAttn (Liu et al., 2025, arXiv:2511.19835), for Wan.
    """
    _block_grid("first_frame", nQ, nK)
    checks.count("first_frame", "blocks", blocks, "blocks", least=0)
    rows, keys = (torch.arange(n, device=device) < blocks for n in (nQ, nK))
    return (rows[:, None] & keys)[None, None]


def text(length: int, text_len: int, *, q_block: int, kv_block: int, device: Device = None) -> Tensor:
    """Force the text behind the video: every query sees it, and it sees everything.

    Args:
        length: tokens in the sequence, text included.
        text_len: tokens of text, the last ones. 0 forces nothing.
        q_block, kv_block: tokens in a block. A block that holds video and text counts as text.
        device: where to make the mask.

    Returns: (1, 1, nQ, nK) bool.
    Raises: ValueError or TypeError for sizes that do not fit.
    """
    who = "text"
    checks.count(who, "length", length, "tokens")
    checks.count(who, "text_len", text_len, "tokens", least=0)
    if text_len > length:
        raise ValueError(f"{who}: text_len must be <= length = {length} tokens, got {text_len}; length includes it.")
    token = torch.arange(length, device=device) >= length - text_len
    return (blocks_holding(token, q_block)[:, None] | blocks_holding(token, kv_block))[None, None]


def blocks_holding(tokens: Tensor, block: int) -> Tensor:
    """Tell which blocks hold at least one of the marked tokens.

    Args:
        tokens: (..., N) bool, in the order of the sequence.
        block: tokens in a block; the last block may be shorter.

    Returns: (..., ceil(N / block)) bool.
    Raises: ValueError or TypeError for arguments that do not fit.
    """
    checks.count("blocks_holding", "block", block, "tokens")
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.bool or tokens.ndim == 0:
        got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"blocks_holding: tokens must be a bool tensor of shape (..., N), got {got}.")
    return F.pad(tokens, (0, -tokens.shape[-1] % block)).unflatten(-1, (-1, block)).any(-1)


def neighbours(
    grid: tuple[int, ...], block: int, *, position: Tensor | None = None, length: int | None = None
) -> Tensor:
    """Force the blocks that touch: those with tokens next to each other in the grid, diagonally included.

    Args:
        grid: extents of the token grid, 1 to 3 of them, the last one running fastest.
        block: tokens in a query block and in a key block.
        position: (N,) int64, where each token of the grid, in raster order, sits in the sequence: the `inverse` of a
            Permutation. None is raster order.
        length: tokens in the sequence if more follow the grid (text); their blocks touch only what shares a block.

    Returns: (1, 1, n, n) bool on the device of position, n = ceil(length / block). A block touches itself.
    Raises: ValueError or TypeError for arguments that do not fit.
    Numerics: exact. Memory is a few index tensors of N tokens and the n x n result.
    Source: the adjacency of Rectified SpaAttn (Liu et al., 2025, arXiv:2511.19835): 26 neighbours in a video.
    """
    who = "neighbours"
    checks.count(who, "block", block, "tokens")
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"{who}: grid must have 1 to 3 extents, got {grid}; a video is (F, H, W).")
    N = math.prod(checks.count(who, "grid", extent, "tokens") for extent in grid)
    total = N if length is None else checks.count(who, "length", length, "tokens", least=N)
    if position is None:
        position = torch.arange(N)
    elif position.dtype != torch.int64 or position.shape != (N,):
        raise ValueError(
            f"{who}: position must be int64 of shape (N,) = ({N},) for grid {grid}, got {position.dtype} "
            f"{tuple(position.shape)}; pass the inverse of the permutation."
        )
    n = -(-total // block)
    block_of = (position // block).view(grid)
    touch = torch.zeros(n * n, dtype=torch.bool, device=position.device)
    touch[torch.arange(n, device=position.device) * (n + 1)] = True
    for shift in itertools.product((-1, 0, 1), repeat=len(grid)):
        here = tuple(slice(max(0, -s), extent - max(0, s)) for s, extent in zip(shift, grid, strict=True))
        there = tuple(slice(max(0, s), extent - max(0, -s)) for s, extent in zip(shift, grid, strict=True))
        touch[(block_of[here] * n + block_of[there]).reshape(-1)] = True
    return touch.view(1, 1, n, n)


def causal_blocks(
    nQ: int,
    nK: int,
    q_block: int,
    kv_block: int,
    offset: int = 0,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    device: Device = None,
) -> CausalBlocks:
    """Tell which key blocks a causal mask leaves visible, and which of them entirely.

    Args:
        nQ, nK: query blocks and key blocks.
        q_block, kv_block: tokens in a block.
        offset: query i sits at position offset + i among the keys and sees keys 0 .. offset + i. In chunked prefill it
            is the number of keys before this chunk.
        q_len, kv_len: tokens in each sequence, which decide how short the last blocks are; None takes whole blocks.
        device: where to make the masks.

    Returns: CausalBlocks(visible, full). Blocks that are visible and not full need a token mask.
    Raises: ValueError or TypeError for sizes that do not fit.
    """
    who = "causal_blocks"
    _block_grid(who, nQ, nK, q_block=q_block, kv_block=kv_block, offset=offset)
    lengths = []
    for name, length, n, block in (("q_len", q_len, nQ, q_block), ("kv_len", kv_len, nK, kv_block)):
        length = n * block if length is None else checks.count(who, name, length, "tokens")
        if -(-length // block) != n:
            raise ValueError(
                f"{who}: {name} must make {n} blocks of {block} tokens, got {length}, which makes {-(-length // block)}; "
                "count blocks with ceil(length / block)."
            )
        lengths.append(length)
    q_first = torch.arange(nQ, device=device)[:, None] * q_block
    k_first = torch.arange(nK, device=device) * kv_block
    q_last = (q_first + q_block).clamp(max=lengths[0]) - 1 + offset
    k_last = (k_first + kv_block).clamp(max=lengths[1]) - 1
    return CausalBlocks((k_first <= q_last)[None, None], (k_last <= q_first + offset)[None, None])


def _block_grid(who: str, nQ: int, nK: int, *, q_block: int = 1, kv_block: int = 1, offset: int = 0) -> None:
    checks.count(who, "nQ", nQ, "query blocks")
    checks.count(who, "nK", nK, "key blocks")
    checks.count(who, "q_block", q_block, "tokens")
    checks.count(who, "kv_block", kv_block, "tokens")
    checks.count(who, "offset", offset, "tokens before the first query", least=0)
