"""Attention operators shared by every method: sparse layouts, the kernels that read them, and scores without a matrix.

Importing this package loads torch and nothing else that is heavy. Start with `layout.py`, then `block_sparse/`.
"""

from __future__ import annotations

from .block_sparse import block_sparse_attention, explain
from .dispatch import record
from .layout import BlockLayout
from .merge import merge_attention
from .token_scores import token_scores

__all__ = ["BlockLayout", "block_sparse_attention", "explain", "merge_attention", "record", "token_scores"]
