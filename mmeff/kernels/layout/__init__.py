"""The one sparse layout: which key blocks each query block attends to, and everything that is derived from that.

Start with `block_layout.py`; `bounds.py` says which pairs of a partly attended block attend; `plans.py` orders, splits and
transposes the lists for kernels; `algebra.py` combines layouts; `export.py` writes them in other libraries' forms.
"""

from __future__ import annotations

from .block_layout import BlockLayout
from .bounds import Bounds

__all__ = ["BlockLayout", "Bounds"]
