"""Sparse attention for diffusion transformers: one file per method; `hosts/` knows the models."""

from __future__ import annotations

from mmeff.registry import import_methods

_methods = import_methods(__name__)
globals().update(_methods)
__all__ = sorted(_methods)
