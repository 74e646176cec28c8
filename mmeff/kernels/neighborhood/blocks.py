"""Neighborhood attention on the block-sparse kernels: tokens in tile order, windows as a BlockLayout.

Large grids run here: the kernels compute whole blocks at matrix-product speed and skip the rest, where the windows have no
bias. How many blocks are visited is a matter of the tile; `tiling.py` picks it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_sparse import op as block_sparse
from ..block_sparse.problem import BackwardProblem as BlockBackward
from ..block_sparse.problem import Problem as BlockProblem
from ..dispatch import Backend, choose, judge, note
from .layout import WindowLayout, window_layout
from .problem import BackwardProblem, Gradients, Problem
from .tiling import REORDER_PAIRS, pick_tile


def attend(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return the output in the shape of q, and the log-sum-exp (B, H, N) if it is wanted."""
    windows, asked = _asked(problem, problem.with_lse)
    chosen, reason = choose(block_sparse.OPERATOR, block_sparse.FORWARD, asked, "auto")
    note(block_sparse.OPERATOR, chosen.name, f"within neighborhood_attention, {reason}", lambda: asked.layout.density)
    out, lse = chosen.run(asked)
    out = windows.restore(out).view(problem.q.shape)
    if lse is None or not problem.with_lse:
        return out, None
    return out, windows.restore(lse.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)


def backward(problem: BackwardProblem) -> Gradients:
    """Return the gradients of q, k and v. The log-sum-exp is computed again where the forward pass did not keep it."""
    forward = problem.forward
    windows, asked = _asked(forward, True)
    if problem.lse is None:
        lse = choose(block_sparse.OPERATOR, block_sparse.FORWARD, asked, "auto")[0].run(asked)[1]
        assert lse is not None
    else:
        lse = windows.arrange(problem.lse.transpose(1, 2)[..., None])[..., 0].transpose(1, 2).contiguous()
    # delta holds the sum of dout * out less dlse already: with an output of zeros, -dlse is all of it
    dlse = -windows.arrange(problem.delta[..., None])[..., 0].transpose(1, 2).contiguous()
    dout = windows.arrange(problem.dout.flatten(1, -3))
    gradients = BlockBackward(asked, torch.zeros_like(asked.q), lse, dout, dlse, (True, True, True))
    found = choose(f"{block_sparse.OPERATOR} backward", block_sparse.BACKWARD, gradients, "auto")[0].run(gradients)
    dq, dk, dv = (
        windows.restore(x).view(like.shape) for x, like in zip(found, (forward.q, forward.k, forward.v), strict=True)
    )
    return Gradients(dq, dk, dv, None, None, None)


def _asked(problem: Problem, with_lse: bool) -> tuple[WindowLayout, BlockProblem]:
    windows = _windows(problem)
    q, k, v = (windows.arrange(x.flatten(1, -3)) for x in (problem.q, problem.k, problem.v))
    return windows, BlockProblem(q, k, v, windows.layout, problem.scale, with_lse)


def _windows(problem: Problem) -> WindowLayout:
    windows = window_layout(problem.rule, tile=pick_tile(problem.rule))
    device = problem.q.device
    return windows.layout.derived(("on", device), lambda _: windows.to(device))


def _why_not(problem: Problem) -> str | None:
    if problem.rel_bias is not None:
        return "block-sparse kernels add no relative bias"
    if problem.T:
        return "extra keys are not part of the grid that the tiles cover"
    return None


def _cost(problem: Problem) -> float:
    windows = _windows(problem)
    layout = windows.layout
    # shapes and dtypes are all that the kernels' estimates look at
    slots = layout.q_len
    q, k = (x.new_empty((1,)).expand(x.shape[0], slots, *x.shape[-2:]) for x in (problem.q, problem.k))
    asked = BlockProblem(q, k, k, layout, problem.scale, problem.with_lse)
    best = next(row for row in judge(block_sparse.FORWARD, asked) if row.chosen)
    backend = next(b for b in block_sparse.FORWARD if b.name == best.backend)
    return backend.cost(asked) * (slots / problem.N) ** 2 + REORDER_PAIRS / problem.N


SUMMARY = "tiles of the grid as blocks of the block-sparse kernels"
FORWARD = Backend(name="blocks", summary=SUMMARY, why_not=_why_not, cost=_cost, run=attend)
BACKWARD = Backend(
    name="blocks",
    summary=SUMMARY,
    why_not=lambda asked: _why_not(asked.forward),
    cost=lambda asked: _cost(asked.forward),
    run=backward,
)
