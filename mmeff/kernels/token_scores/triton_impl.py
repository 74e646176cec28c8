"""token_scores on a GPU: launches the Triton kernels. Triton is imported only when this backend runs."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from .. import tuned
from ..dispatch import Backend
from .problem import BackwardProblem, Gradients, Problem

# (BLOCK_R, BLOCK_N, num_warps, num_stages) by bytes of an element and padded head width. Chosen by compiling for sm90: no
# register spills to speak of, and less shared memory than any GPU from Ampere on has. Not timed on a GPU; what was timed
# comes before it, see `tuned`.
Table = dict[int, dict[int, tuple[int, int, int, int]]]
FORWARD_BLOCKS: Table = {
    2: {64: (64, 128, 4, 3), 128: (64, 64, 4, 3), 256: (32, 64, 8, 3)},
    4: {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
}
BACKWARD_BLOCKS: Table = {
    2: {64: (64, 64, 4, 3), 128: (32, 64, 8, 3), 256: (32, 32, 8, 3)},
    4: {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
}
WIDEST = 256  # channels of a head
# The pre-pass over few rows splits the keys until it has about this many programs, two for each multiprocessor of an
# H100, but leaves each split this many key tiles.
PROGRAMS = 264
TILES_PER_SPLIT = 4


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the column sums, and the log-sum-exp that normalised: one kernel for each."""
    from . import triton_kernels

    B, H, Nk, Hk = problem.B, problem.H, problem.Nk, problem.Hk
    lse = _normalise(problem) if problem.lse is None else problem.lse.float().contiguous()
    out = torch.empty(B, H, Nk, dtype=torch.float32, device=problem.k.device)
    tensors, strides, sizes, flags = _arguments(problem)
    tiles = blocks("forward", problem.q, problem.R)
    with torch.cuda.device_of(out):
        triton_kernels.columns_kernel[(-(-Nk // tiles["BLOCK_N"]), B * Hk)](
            *tensors, lse, out, *strides, *sizes, **flags, **tiles
        )
    return out, lse


def _normalise(problem: Problem) -> Tensor:
    """The pre-pass: LSE of every row, (B, H, R), from partial LSEs over splits of the keys."""
    from . import triton_kernels

    B, R, H, Nk, Hk = problem.B, problem.R, problem.H, problem.Nk, problem.Hk
    tiles = blocks("forward", problem.q, problem.group * R)
    row_blocks, block_n = -(-problem.group * R // tiles["BLOCK_R"]), tiles["BLOCK_N"]
    wanted = PROGRAMS // max(1, row_blocks * B * Hk)
    splits = max(1, min(wanted, Nk // (block_n * TILES_PER_SPLIT)))
    keys_per_split = -(-Nk // (splits * block_n)) * block_n
    splits = -(-Nk // keys_per_split)
    partial = torch.empty(splits, B, H, R, dtype=torch.float32, device=problem.k.device)
    (q, k, positions, key_mask, _), strides, sizes, flags = _arguments(problem)
    flags.pop("HAS_WEIGHTS")
    if R:
        with torch.cuda.device_of(partial):
            triton_kernels.lse_kernel[(row_blocks, splits, B * Hk)](
                q, k, positions, key_mask, partial, *strides[:12], B, *sizes, keys_per_split, **flags, **tiles
            )
    return partial[0] if splits == 1 else torch.logsumexp(partial, 0)


def backward(problem: BackwardProblem) -> Gradients:
    """Recompute the scores tile by tile: a kernel over rows for dq and per_row, one over keys for dk."""
    from . import triton_kernels

    forward, centred = problem.forward, problem.centred
    need_q, need_k, need_rows = problem.needs
    B, R, H, D, Nk, Hk = forward.B, forward.R, forward.H, forward.D, forward.Nk, forward.Hk
    lse, grad = problem.lse.float().contiguous(), problem.grad.contiguous()
    per_row, dq, dk = (
        torch.empty(shape if need else 0, dtype=torch.float32, device=grad.device)
        for shape, need in (((B, H, R), need_rows or centred), ((B, R, H, D), need_q), ((B, Nk, Hk, D), need_k))
    )
    tensors, strides, sizes, flags = _arguments(forward)
    with torch.cuda.device_of(grad):
        tiles = blocks("backward", forward.q, forward.group * R)
        if R and (need_q or need_rows or (need_k and centred)):
            triton_kernels.rows_kernel[(-(-forward.group * R // tiles["BLOCK_R"]), B * Hk)](
                *tensors, lse, grad, per_row, dq, *strides, *sizes, **flags, **tiles,
                CENTRED=centred, NEED_ROWS=need_rows, NEED_Q=need_q,
            )  # fmt: skip
        if need_k:
            tiles = blocks("backward", forward.q, R)
            triton_kernels.keys_kernel[(-(-Nk // tiles["BLOCK_N"]), B * Hk)](
                *tensors, lse, grad, per_row, dk, *strides, *sizes, **flags, **tiles, CENTRED=centred
            )
    return Gradients(dq if need_q else None, dk if need_k else None, per_row if need_rows else None)


def _arguments(problem: Problem) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """What all kernels take, in their order: tensors, strides, sizes with the scale, and compile-time flags."""
    q, k, positions, key_mask, weights = problem.q, problem.k, problem.positions, problem.key_mask, problem.weights
    if positions is not None:
        positions = positions.expand(problem.B, -1)
    if weights is not None:
        weights = weights.expand(problem.B, problem.H, -1)
    optional = ((positions, 2), (key_mask, 2), (weights, 3))
    strides = [*q.stride(), *k.stride()]
    for x, ndim in optional:
        strides += [0] * ndim if x is None else x.stride()
    sizes = (problem.R, problem.Nk, problem.H, problem.Hk, problem.D, problem.scale)
    flags = {
        "HAS_POS": positions is not None,
        "HAS_MASK": key_mask is not None,
        "HAS_WEIGHTS": weights is not None,
        # the interpreter multiplies bfloat16 wrongly
        "UPCAST": _interpreted() and q.dtype == torch.bfloat16,
        # TF32 holds float16 and bfloat16 values exactly, and float32 ones not
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    return (q, k, positions, key_mask, weights), tuple(strides), sizes, flags


def blocks(direction: str, q: Tensor, rows: int) -> dict[str, int]:
    """Tile sizes and launch options, "forward" or "backward"; no more rows in a tile than there are, but the 16 that a
    product needs."""
    block_d = max(16, _power_of_2(q.shape[-1]))
    table = FORWARD_BLOCKS if direction == "forward" else BACKWARD_BLOCKS
    measured = tuned.find(f"token_scores {direction}", q)
    block_r, block_n, warps, stages = measured or table[q.element_size()][max(64, block_d)]
    return {
        "BLOCK_R": min(block_r, max(16, _power_of_2(rows))),
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": stages,
    }


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(problem: Problem) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if problem.k.device.type != "cuda" and not _interpreted():
        return f"Triton kernels run on a CUDA device, and the tensors are on {problem.k.device}"
    if problem.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, got {problem.q.dtype}"
    if problem.D > WIDEST:
        return f"the kernels take heads of up to {WIDEST} channels, got {problem.D}"
    return None


def _cost(problem: Problem) -> float:
    if _interpreted():
        return math.inf
    # of the two matrix products of attention it computes the first, and computes it twice to normalise by itself
    return 1.0 if problem.lse is None else 0.5


FORWARD: Backend[Problem] = Backend(
    name="triton",
    summary="one kernel to normalise and one that sums the columns in registers",
    why_not=_why_not,
    cost=_cost,
    run=run,
)
BACKWARD: Backend[BackwardProblem] = Backend(
    name="triton",
    summary="one kernel over the rows and one over the keys",
    why_not=lambda problem: _why_not(problem.forward),
    cost=lambda problem: _cost(problem.forward),
    run=backward,
)
