"""Tile sizes that were measured on a GPU: what the Triton backends take in place of the tables they come with.

One plain table for all of them, by compute capability, so that a row is checked in where everybody finds it and each backend's
own table stays the fallback: for GPUs, dtypes, head widths and blocks that nobody has measured nothing changes.
`python -m benchmarks gpu --part sweep` prints the entries, and writes the rows that justify them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WIDEST_BLOCK = 128  # tokens; a kernel cuts a longer block into tiles, so that all longer ones are alike to it


class Tiles(NamedTuple):
    """How one kernel runs: tokens of the tile that a program keeps, tokens that it loads at a time, warps, pipeline stages."""

    rows: int
    cols: int
    warps: int
    stages: int


# By architecture ("sm90") and `key`. Empty until somebody has measured: see the sweep.
TUNED: dict[str, dict[str, Tiles]] = {}


def key(kernel: str, dtype: torch.dtype, D: int, blocks: tuple[int, int] | None = None) -> str:
    """The name of an entry.

    Args:
        kernel: operator and direction, such as "block_sparse forward". D: channels of a head, which kernels pad to a power of
            two. blocks: tokens of a layout's blocks of rows and of columns, for kernels that walk a layout.
    """
    padded = max(16, 1 << (D - 1).bit_length())
    name = f"{kernel} {str(dtype).removeprefix('torch.')} D{padded}"
    if blocks is None:
        return name
    return f"{name} blocks {'x'.join(str(min(block, WIDEST_BLOCK)) for block in blocks)}"


def arch_of(device: torch.device) -> str | None:
    """The architecture of a device as the table names it; None outside CUDA, where nothing is tuned."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def find(kernel: str, q: Tensor, blocks: tuple[int, int] | None = None) -> Tiles | None:
    """Return the measured tiles of a kernel for the device, dtype and head width of q, or None where there are none.

    Args: as `key`.
    """
    measured = TUNED.get(arch_of(q.device) or "")
    return measured.get(key(kernel, q.dtype, q.shape[-1], blocks)) if measured else None
