"""Block-sparse attention: each query block attends to the key blocks that a BlockLayout lists for it.

Reading order: `reference.py` says what is computed; `gather.py` computes only the visited blocks, in plain PyTorch on
any device; `native.py` does so in C on CPUs and `triton_impl.py` on GPUs; `sdpa.py` runs dense attention under a mask, for
small or full layouts; `op.py` ties them into one operator with a gradient.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Explanation, judge
from ..layout import BlockLayout
from ..merge import merge_attention
from . import op
from .problem import make_problem
from .summary import Summary, check
from .summary import attend as attend_summaries

__all__ = ["Summary", "block_sparse_attention", "explain"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    summary: Summary | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each query to the keys that the layout gives it, and to no others.

    Args:
        q: (B, Nq, H, D) queries, heads last.
        k, v: (B, Nk, Hk, D) keys and values; H must be a multiple of Hk, and query head h reads head h // (H / Hk).
        layout: for q_len Nq and kv_len Nk, with batch 1 or B and heads 1 or H; a 1 is shared.
        scale: factor on the scores; None is 1/sqrt(D).
        summary: pooled keys and values that take part in the same softmax, each for the tokens it stands for;
            Summary.of_blocks makes those of the blocks that a query does not visit.
        return_lse: also return the log-sum-exp of the scaled scores, to be merged by `merge_attention`.
        backend: "auto", "triton", "native", "gather", "sdpa" or "reference". auto takes the one expected to be fastest;
            all of them compute the same thing. A named backend runs or raises; it never falls back. The backward pass
            uses the same name, or chooses for itself under "auto".

    Returns: out (B, Nq, H, D) in the dtype of q; with return_lse also the natural-log LSE, (B, H, Nq) float32
        (float64 for float64 inputs). Both carry gradients.
    Raises: ValueError or TypeError for arguments that do not fit each other, BackendUnavailable for a named backend
        that cannot run this problem.
    Numerics: softmax in float32 (float64 for float64 inputs); autocast does not reach inside. An empty row gives
        output 0 and LSE -inf, with gradient 0. Keys outside the visited blocks are never read by "native" and "triton".
        Gradients accumulate in float32 and, but for "gather" on a GPU, in an order that does not change.
    Source: the layout follows FlexAttention's partial and full block lists (Dong et al., 2024, arXiv:2412.05496).
    Differs: lists are addressed by start and count, so that rows can share them; the LSE is differentiable.
    """
    problem = make_problem(q, k, v, layout, scale, return_lse or summary is not None)
    if summary is not None:
        check(problem, summary)
    out, lse = op.call(problem, backend)
    if summary is not None:
        of_summaries = attend_summaries(problem, summary)
        out, lse = merge_attention([out, of_summaries[0]], [lse, of_summaries[1]])
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Tabulate which backends can run this block_sparse_attention call, why not, and which one auto takes.

    Args: as for block_sparse_attention.
    Returns: an Explanation; print it, or read `.rows` and `.chosen`. Nothing is computed.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    """
    problem = make_problem(q, k, v, layout, scale, return_lse)
    return Explanation(op.OPERATOR, str(problem), judge(op.FORWARD, problem))
