"""Time every block-sparse backend against plain dense attention: what calibration and the benchmarks go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration import seconds
from ..dispatch import without_autocast
from ..layout import BlockLayout
from . import op, sdpa
from .problem import BackwardProblem, Problem

BLOCK = 64
BUDGET = 2.0  # seconds after which no further round is begun, on a machine that is slow or busy


def random_layout(
    N: int, sparsity: float, *, H: int = 1, block: int = BLOCK, device: torch.device | str = "cpu", seed: int = 0
) -> BlockLayout:
    """Return the layout in which every query block visits the same number of random key blocks, and its own.

    Args:
        N: tokens. sparsity: fraction of the key blocks that a row leaves out, 0 to 1. H: heads, each with its own rows.
    """
    g = torch.Generator().manual_seed(seed)
    n = -(-N // block)
    keep = max(1, round(n * (1 - sparsity)))
    scores = torch.rand(1, H, n, n, generator=g) + torch.eye(n)
    mask = torch.zeros(1, H, n, n, dtype=torch.bool).scatter_(-1, scores.topk(keep, -1).indices, True)
    return BlockLayout.from_block_mask(mask.to(device), q_len=N, kv_len=N, q_block=block, kv_block=block)


@dataclass(frozen=True)
class Measured:
    """What one measurement found: see `calibration.Rates`. spread: of the paired ratios, their p80 over their p20."""

    dense: float
    ratios: dict[str, float]
    spread: float


def measure(device: torch.device, dtype: torch.dtype, direction: str, *, tokens: int, rounds: int) -> Measured:
    """Time plain dense attention and every usable backend in turn, round after round, and compare within the rounds.

    Args: as `calibration.calibrate`.
    """
    g = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads() if device.type == "cpu" else 16
    q, k, v, dout = (
        torch.randn(1, tokens, 2 * threads, 64, generator=g).to(device=device, dtype=dtype) for _ in range(4)
    )
    half = random_layout(tokens, 0.5, device=device)
    problem = Problem(q, k, v, half, 64**-0.5, False, direction == "backward")
    runs: dict[str, Callable[[], object]] = {}
    with torch.no_grad(), without_autocast(device):
        if direction == "forward":
            plain: Callable[[], object] = partial(_dense, q, k, v)
            for backend in op.FORWARD:
                if backend.name != "reference" and backend.why_not(problem) is None:
                    runs[backend.name] = partial(backend.run, problem)
            macs = problem.multiply_adds
        else:
            # a backward pass may be given what any backend computed
            out, lse = next(b for b in op.FORWARD if b.why_not(problem) is None).run(problem)
            gradients = BackwardProblem(problem, out, lse, dout, None, (True, True, True))
            plain = _dense_backward(q, k, v, dout)
            for back in op.BACKWARD:
                if back.name != "reference" and back.why_not(gradients) is None:
                    runs[back.name] = partial(back.run, gradients)
            macs = gradients.multiply_adds
        for run in (plain, *runs.values()):  # compile, plan, touch the memory
            run()
        times: list[list[float]] = []
        while len(times) < rounds and (len(times) < 3 or sum(map(sum, times)) < BUDGET):
            times.append([seconds(run, device) for run in (plain, *runs.values())])
    found = torch.tensor(times, dtype=torch.float64)
    paired = found[:, :1] / found[:, 1:]
    spread = paired.quantile(0.8, 0) / paired.quantile(0.2, 0)
    # the dense backend computes all pairs under the mask; the others only what they visit
    ratios = {
        "masked" if name == "sdpa" else name: ratio * (1.0 if name == "sdpa" else half.block_density)
        for name, ratio in zip(runs, paired.median(0).values.tolist(), strict=True)
    }
    return Measured(macs / found[:, 0].min().item(), ratios, spread.max().item())


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def _dense_backward(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], object]:
    if q.device.type == "cpu":  # without autograd, which is switched off inside an operator
        full = Problem(q, k, v, random_layout(q.shape[1], 0.0), q.shape[-1] ** -0.5, False, True)
        out, lse = sdpa.FORWARD.run(full)
        return partial(sdpa.BACKWARD.run, BackwardProblem(full, out, lse, dout, None, (True, True, True)))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = _dense(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout.transpose(1, 2), retain_graph=True)
