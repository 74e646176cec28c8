"""Attention operators shared by every method: sparse layouts, the kernels that read them, and scores without a matrix.

Importing this package loads torch and nothing else that is heavy. Start with `layout/`, then `block_sparse/`.
"""

from __future__ import annotations

from .block_sparse import Summary, block_sparse_attention, explain
from .dispatch import record
from .layout import BlockLayout, Bounds
from .merge import merge_attention
from .neighborhood import explain_neighborhood, na_scores, na_values, neighborhood_attention
from .partitioned import explain_partitioned, partitioned_attention
from .routed import explain_routed, routed_attention
from .token_scores import token_scores

__all__ = [
    "BlockLayout",
    "Bounds",
    "Summary",
    "block_sparse_attention",
    "explain",
    "explain_neighborhood",
    "explain_partitioned",
    "explain_routed",
    "merge_attention",
    "na_scores",
    "na_values",
    "neighborhood_attention",
    "partitioned_attention",
    "record",
    "routed_attention",
    "token_scores",
]
