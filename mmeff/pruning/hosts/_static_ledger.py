"""The ledger of a pruned cache of fixed size: one constant map from the places of a layer to original columns.

A `StaticLayer` writes at its own length. While decoding, place i of a pruned layer therefore always stands for the same
column: the kept ones first, then those behind the prompt in order. The map is made when a prompt is pruned and does not
change afterwards, so a decoding step only gathers the columns of the model's own mask; that can be compiled, and a graph
serves every prompt whose layers have the same lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer


class PrunedStaticLayer(StaticLayer):
    """A `StaticLayer` whose keys are a subset of the columns.

    cols: (B, L) original column of each of the layer's L places. valid: (B, L), False for filler: of rows that keep fewer
    tokens than others, and at the end of a layer that was allocated before its first prompt was pruned. capacity: how many
    columns the cache was made for. A layer that is not allocated yet gets as many places fewer as columns are dropped.

    speaks_for_all: as in `PrunedLayer`.
    """

    cumulative_length: Tensor

    def __init__(self, capacity: int, attached: Callable[[], bool], *, speaks_for_all: bool = False) -> None:
        super().__init__(max_cache_len=capacity)
        self.capacity = capacity
        self.cols: Tensor | None = None  # None until a prompt is pruned: place i is column i
        self.valid: Tensor | None = None
        self.seen = 0  # columns up to the end of the last pruned chunk
        self.complete = True  # no filler in the map
        self._absent = torch.tensor(0)  # columns seen so far that have no key; a tensor, which graphs do not guard
        self._attached = attached
        self._speaks_for_all = speaks_for_all

    @classmethod
    def adopt(
        cls, layer: StaticLayer, attached: Callable[[], bool], *, speaks_for_all: bool = False
    ) -> PrunedStaticLayer:
        """Take over a plain layer, allocated or not; its keys so far are columns 0, 1, 2, ..."""
        new = cls(layer.max_cache_len, attached, speaks_for_all=speaks_for_all)
        new.__dict__.update(layer.__dict__)
        return new

    def keys_held(self) -> int:
        """How many keys there are. Reads the device."""
        return int(self.cumulative_length) if self.is_initialized else 0

    def get_seq_length(self) -> Any:
        held = super().get_seq_length()
        return held + self._absent if self._speaks_for_all and self.is_initialized else held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_max_length(self) -> int:
        return self.capacity

    def append(self, base: int, chunk: Tensor, chunk_valid: Tensor, logical: int, *, complete: bool) -> None:
        """Make the map, or its part behind the keys held, for a pruned chunk of columns (B, q).

        Args: as in `PrunedLayer.append`; `complete` follows from `chunk_valid`.
        """
        held, n = self.keys_held(), chunk.shape[1]
        if not self.is_initialized:
            self.max_cache_len = self.capacity - (logical - n)
        if self.cols is None or self.valid is None:
            past = torch.arange(held, device=chunk.device).expand(len(chunk), -1)
            past_valid = torch.ones_like(past, dtype=torch.bool)
        else:
            past, past_valid = self.cols[:, :held], self.valid[:, :held]
        ahead = torch.arange(logical, logical + self.max_cache_len - held - n, device=chunk.device)
        ahead = ahead.expand(len(chunk), -1)
        self.cols = torch.cat([past, chunk, ahead.clamp(max=self.capacity - 1)], dim=1)
        self.valid = torch.cat([past_valid, chunk_valid, ahead < self.capacity], dim=1)
        self.seen, self.complete = logical, bool(self.valid.all())
        self._absent = torch.tensor(logical - held - n, device=chunk.device)

    def columns(self, base: int, chunk: Tensor, chunk_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and validity (B, L) of all places: a chunk that is not pruned is in the map already."""
        assert self.cols is not None and self.valid is not None
        return self.cols, self.valid

    def restrict(self, mask: Tensor | None) -> Tensor:
        """The model's mask (B or 1, 1, q, columns) of a compiled step, brought to the places of this layer."""
        assert self.cols is not None and self.valid is not None
        if mask is None:
            raise ValueError("a compiled step over a pruned cache needs an attention mask; generate() makes one")
        at = self.cols[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        mask = mask.expand(len(at), -1, -1, -1).gather(3, at)
        hidden = ~self.valid[:, None, None]
        return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._attached():
            raise RuntimeError(
                "this cache was pruned by a handle that has been removed, so its keys no longer line up with the model's "
                "positions; start again with a new cache, or keep the handle until the conversation ends"
            )
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return found

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        if self.cols is not None and self.valid is not None:
            self.cols = self.cols.index_select(0, beam_idx.to(self.cols.device))
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def reset(self) -> None:
        """As new: the next prompt decides again how many places there are."""
        self.keys = self.values = self.cols = self.valid = None
        self.is_initialized, self.seen, self.complete, self.max_cache_len = False, 0, True, self.capacity
        self.cumulative_length = torch.zeros_like(self.cumulative_length)
        self._absent = torch.zeros_like(self._absent)


def is_fixed(cache: Any) -> bool:
    """Whether a cache is one of full attention layers of fixed size, all of which can be followed."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in (StaticLayer, PrunedStaticLayer) for layer in layers)


def compiled_step(index: int, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a hook of decoder layer `index` does inside a compiled decoding step: the map of its cache layer says it all."""
    cache = kwargs.get("past_key_values")
    layer = cache.layers[index] if cache is not None else None
    if not isinstance(layer, PrunedStaticLayer) or layer.cols is None:
        return None
    return args, {**kwargs, "attention_mask": layer.restrict(kwargs.get("attention_mask"))}
