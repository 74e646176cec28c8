"""The ledger of a pruned cache: which original column every cached key belongs to.

After pruning, layers hold different numbers of keys, while the model still makes one attention mask for the full
length. Each shortened cache layer therefore carries, per row, the original column of every key. Columns behind `seen` were
never pruned and follow in order, so decoding needs no bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer


class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` whose keys are a subset of the columns.

    cols: (B, n) original column of each of the first n keys; valid: (B, n) False for filler that equalises rows; seen: how
    many columns those n keys stand for. Key n + i is column seen + i. Beam reordering, batch selection, reset and
    cropping move the ledger with the keys.

    speaks_for_all: this is layer 0, which models ask how long the cache is: it answers in columns, not in keys, so that
    positions and masks go on where the prompt ended.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, attached: Callable[[], bool], *, speaks_for_all: bool = False) -> None:
        super().__init__()
        self.cols: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.seen = 0
        self.complete = True  # no filler among the keys
        self._attached = attached
        self._speaks_for_all = speaks_for_all

    @classmethod
    def adopt(
        cls,
        layer: DynamicLayer,
        batch: int,
        device: torch.device,
        attached: Callable[[], bool],
        *,
        speaks_for_all: bool = False,
    ) -> PrunedLayer:
        """Take over a plain layer, filled or empty; its keys so far are columns 0, 1, 2, ..."""
        new = cls(attached, speaks_for_all=speaks_for_all)
        length = layer.get_seq_length()
        if layer.is_initialized:
            new.keys, new.values = layer.keys, layer.values
            new.dtype, new.device, new.is_initialized = layer.dtype, layer.device, True
        new.cols = torch.arange(length, device=device).expand(batch, -1)
        new.valid = torch.ones(batch, length, dtype=torch.bool, device=device)
        new.seen = length
        return new

    def keys_held(self) -> int:
        """How many keys there are."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        held = self.keys_held()
        if not self._speaks_for_all or self.cols is None or not held:
            return held
        return self.seen + held - self.cols.shape[1]

    def columns(self, base: int, chunk: torch.Tensor, chunk_valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns and validity (B, keys) of all keys once a chunk (B, q) that starts at column `base` is appended."""
        assert self.cols is not None and self.valid is not None
        between = torch.arange(self.seen, base, device=chunk.device).expand(len(chunk), -1)
        cols = torch.cat([self.cols, between, chunk], dim=1)
        valid = torch.cat([self.valid, torch.ones_like(between, dtype=torch.bool), chunk_valid], dim=1)
        return cols, valid

    def append(
        self, base: int, chunk: torch.Tensor, chunk_valid: torch.Tensor, logical: int, *, complete: bool
    ) -> None:
        """Enter a pruned chunk into the ledger; `logical` is the number of columns seen after it, `complete` says that the
        chunk holds no filler."""
        self.cols, self.valid = self.columns(base, chunk, chunk_valid)
        self.seen = logical
        self.complete = self.complete and complete

    def thin(self, start: int, total: int, chunk: torch.Tensor, chunk_valid: torch.Tensor, *, complete: bool) -> None:
        """Of the last columns, `start` to `total`, keep those at `chunk` (B, n), counted from `start`; take out other keys."""
        before = self.keys_held() - (total - start)

        def pick(x: torch.Tensor) -> torch.Tensor:
            at = chunk[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            return torch.cat([x[:, :, :before], x[:, :, before:].gather(2, at)], dim=2)

        if self.seen > start:  # taken over with these columns in it
            self._map(lambda x: x[:, : x.shape[1] - (self.seen - start)])
            self.seen = start
        self.keys, self.values = pick(self.keys), pick(self.values)
        self.append(start, chunk + start, chunk_valid, total, complete=complete)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
        if not self._attached():
            raise RuntimeError(
                "this cache was pruned by a handle that has been removed, so its keys no longer line up with the model's "
                "positions; start again with a new cache, or keep the handle until the conversation ends"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices])

    def reset(self) -> None:
        super().reset()
        self._map(lambda x: x[:, :0])
        self.seen, self.complete = 0, True

    def crop(self, tokens_to_remove: int) -> None:
        assert self.cols is not None
        behind = self.keys_held() - self.cols.shape[1]  # keys behind the ledger, which follow in order
        into_ledger = -tokens_to_remove - behind  # a positive number of tokens is refused by the base class
        if into_ledger > 0:
            gone = self.cols[:, -into_ledger:]
            last = torch.arange(self.seen - into_ledger, self.seen, device=gone.device)
            if not bool((gone == last).all()):
                raise ValueError(
                    f"cannot crop {abs(tokens_to_remove)} tokens from a pruned cache: pruned columns lie among them; "
                    "start again with a new cache"
                )
            self._map(lambda x: x[:, :-into_ledger])
            self.seen -= into_ledger
        super().crop(tokens_to_remove)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.cols is not None and self.valid is not None:
            self.cols, self.valid = change(self.cols), change(self.valid)
