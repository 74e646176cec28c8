"""What dynamic methods are composed of: a score, a budget, a forced set, at some granularity.

    scores  how much a query block (or query) wants a key block (or key)      pooled_scores, query_scores, ...
    budget  how many of them it gets                                          top_k, top_p, minmax_cumulative, ...
    forced  what it gets whatever the scores say                              diagonal() | sink() | text()
    layout  the selection as a BlockLayout, shared over a GQA group or not    stripe_layout, share_group

A method reads as that sentence:

    selected = top_p(pooled_probabilities(q, k, 128, 128), 0.3, at_least=12) | diagonal(nQ, nK, device=q.device)
    layout = BlockLayout.from_block_mask(selected, q_len=N, kv_len=N, q_block=128, kv_block=128)

Scores and masks are (B, H, rows, columns). Everything is batched over batch and heads, runs wherever its tensors are,
and never waits for the device: shapes do not depend on values, so values are not checked. Making the BlockLayout is
what synchronises, once. One rule holds everywhere: a score of -inf (or NaN) is not a candidate and is never selected.
"""

from __future__ import annotations

from .budgets import SCOPES, minmax_cumulative, random_k, threshold, top_k, top_k_with_self, top_p
from .forced import (
    CausalBlocks,
    blocks_holding,
    causal_blocks,
    columns,
    diagonal,
    first_frame,
    local,
    neighbours,
    sink,
    text,
)
from .granularity import share_group, share_rows, stripe_layout
from .scores import (
    antidiagonal_scores,
    block_self_similarity,
    key_scores,
    pool,
    pooled_probabilities,
    pooled_scores,
    query_scores,
)

__all__ = [
    "CausalBlocks",
    "SCOPES",
    "antidiagonal_scores",
    "block_self_similarity",
    "blocks_holding",
    "causal_blocks",
    "columns",
    "diagonal",
    "first_frame",
    "key_scores",
    "local",
    "minmax_cumulative",
    "neighbours",
    "pool",
    "pooled_probabilities",
    "pooled_scores",
    "query_scores",
    "random_k",
    "share_group",
    "share_rows",
    "sink",
    "stripe_layout",
    "text",
    "threshold",
    "top_k",
    "top_k_with_self",
    "top_p",
]
