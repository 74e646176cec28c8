"""BlockLayout: which key blocks each query block attends to. The only sparse layout of this library.

A pattern (radial, neighbourhood, top-k routing, ...) produces a BlockLayout; a backend consumes it. It is a list of
key blocks per row of query blocks, addressed by `row_start` and a count, so the same kernel reads compact lists
(CSR), padded lists and lists shared between rows. Within a row the *partial* blocks come first, where only some
query-key pairs attend and a bitmap says which; then the *full* blocks, where every valid pair does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from . import layout_rules

T = TypeVar("T")

# Throughput per visited query-key pair, relative to dense attention. A placeholder: what the gather backend reaches
# on one CPU core with 64-token blocks. Calibration on the user's machine will replace it.
PLACEHOLDER_RATIO = 0.7


class Entries(NamedTuple):
    """Every visited block of some rows, one element per block, in list order."""

    row: Tensor  # position of the row in the sequence of rows asked for
    col: Tensor  # key block
    full: Tensor  # bool: a full block, else a partial one
    partial: Tensor  # row of `bitmap`, meaningful where not full


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class BlockLayout:
    """Key blocks per query block, with a token bitmap for the blocks that are only partly attended.

    Build one with `from_block_mask` or `from_dense_mask`; methods that already hold index lists call the constructor.
    The constructor checks shapes and dtypes, which costs no device synchronisation; `check()` checks the values too.

    Args:
        q_len, kv_len: tokens in the query and key sequences (Nq, Nk).
        q_block, kv_block: tokens in a block. The last block of a sequence may be shorter: see `q_valid`, `kv_valid`.
        row_start: (M,) int64, where the list of each base row starts in `col_idx`. Rows may share a list.
        n_partial, n_full: (M,) int32, entries of each base row: partial ones first, then full ones.
        col_idx: (capacity,) int32 key blocks; strictly ascending within the partial and within the full entries.
        row_of: (B|1, H|1, nQ) int64, the base row of each query block. A leading 1 shares the rows over batch or
            heads, and equal values share them anywhere else; neither costs memory or time.
        bitmap: (P, q_block, kv_block) bool, or None when no entry is partial. One slab per partial entry, in base-row
            order and list order within a row; True attends. What it says beyond the sequence ends is ignored.

    Numerics: `density`, `block_density` and `is_full` are counted in integers, so `is_full` is exact.
    """

    q_len: int
    kv_len: int
    q_block: int
    kv_block: int
    row_start: Tensor
    n_partial: Tensor
    n_full: Tensor
    col_idx: Tensor
    row_of: Tensor
    bitmap: Tensor | None = None
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("q_len", "kv_len", "q_block", "kv_block"):
            layout_rules.positive_int(name, getattr(self, name), "BlockLayout")
        M = self.row_start.shape[0] if self.row_start.ndim == 1 else -1
        wanted: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
            "row_start": (torch.int64, (None,)),
            "n_partial": (torch.int32, (M,)),
            "n_full": (torch.int32, (M,)),
            "col_idx": (torch.int32, (None,)),
            "row_of": (torch.int64, (None, None, self.nQ)),
            "bitmap": (torch.bool, (None, self.q_block, self.kv_block)),
        }
        for name, (dtype, shape) in wanted.items():
            x = getattr(self, name)
            if x is None and name == "bitmap":
                continue
            fits = x.ndim == len(shape) and all(w is None or w == s for w, s in zip(shape, x.shape, strict=True))
            if x.dtype != dtype or not fits or x.device != self.row_start.device:
                letters = ", ".join("*" if w is None else str(w) for w in shape)
                raise ValueError(
                    f"BlockLayout.{name} must be a {dtype} tensor of shape ({letters}) on {self.row_start.device}, "
                    f"got {x.dtype} {tuple(x.shape)} on {x.device}; from_block_mask and from_dense_mask build all "
                    "lists consistently."
                )

    # ---------------------------------------------------------------- construction

    @classmethod
    def from_block_mask(
        cls,
        mask: Tensor,
        *,
        q_len: int,
        kv_len: int,
        q_block: int,
        kv_block: int,
        allow_empty_rows: bool = False,
    ) -> BlockLayout:
        """Make a layout in which every visited block is full.

        Args:
            mask: (B|1, H|1, nQ, nK) or (nQ, nK) bool; True visits the block. nQ = ceil(q_len / q_block), nK likewise.
                A leading 1 is stored once and shared over the batch or the heads.
            q_len, kv_len: tokens in the query and key sequences.
            q_block, kv_block: tokens in a block.
            allow_empty_rows: accept query blocks that visit nothing; their output is 0 and their LSE is -inf.

        Returns: a BlockLayout on the mask's device.
        Raises: ValueError for a wrong shape or an empty row, TypeError for a mask that is not bool.
        Numerics: exact. No tensor of Nq x Nk elements is made.
        """
        who = "BlockLayout.from_block_mask"
        nQ, nK = layout_rules.block_counts(who, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
        mask = layout_rules.mask_4d(who, mask)
        if mask.shape[2:] != (nQ, nK):
            raise ValueError(
                f"{who}: mask must be (B|1, H|1, nQ, nK) = (B|1, H|1, {nQ}, {nK}) for q_len={q_len}, kv_len={kv_len}, "
                f"q_block={q_block}, kv_block={kv_block}, got {tuple(mask.shape)}; nQ is ceil(q_len / q_block) and nK "
                "is ceil(kv_len / kv_block)."
            )
        if not allow_empty_rows:
            layout_rules.refuse_empty_rows(who, mask, row="query block", key="key block")
        B, H = mask.shape[:2]
        flat = mask.reshape(B * H * nQ, nK)
        n_full = flat.sum(-1)
        return cls(
            q_len=q_len,
            kv_len=kv_len,
            q_block=q_block,
            kv_block=kv_block,
            row_start=n_full.cumsum(0) - n_full,
            n_partial=torch.zeros_like(n_full, dtype=torch.int32),
            n_full=n_full.to(torch.int32),
            col_idx=flat.nonzero()[:, 1].to(torch.int32),
            row_of=torch.arange(B * H * nQ, device=mask.device).view(B, H, nQ),
        )

    @classmethod
    def from_dense_mask(
        cls, mask: Tensor, *, q_block: int, kv_block: int, allow_empty_rows: bool = False
    ) -> BlockLayout:
        """Make the layout of any attention mask: blocks without a True pair are skipped.

        Args:
            mask: (B|1, H|1, Nq, Nk) or (Nq, Nk) bool; True attends.
            q_block, kv_block: tokens in a block; the lengths need not be multiples of them.
            allow_empty_rows: accept queries that attend to nothing; their output is 0 and their LSE is -inf.

        Returns: a BlockLayout on the mask's device, with a bitmap only for the blocks that are partly True.
        Raises: ValueError for a wrong shape or an empty row, TypeError for a mask that is not bool.
        Numerics: exact. Takes a copy of the mask in block order; patterns that know their blocks should not
            come this way.
        """
        who = "BlockLayout.from_dense_mask"
        mask = layout_rules.mask_4d(who, mask)
        B, H, q_len, kv_len = mask.shape
        nQ, nK = layout_rules.block_counts(who, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
        if not allow_empty_rows:
            layout_rules.refuse_empty_rows(who, mask, row="query", key="key")
        M = B * H * nQ
        padded = torch.nn.functional.pad(mask, (0, nK * kv_block - kv_len, 0, nQ * q_block - q_len))
        blocks = padded.view(M, q_block, nK, kv_block).transpose(1, 2)
        pairs = blocks.sum((-2, -1))
        q_valid = _valid_counts(q_len, q_block, mask.device).repeat(B * H)
        kv_valid = _valid_counts(kv_len, kv_block, mask.device)
        full = pairs == q_valid[:, None] * kv_valid
        partial = (pairs > 0) & ~full
        n = (partial | full).sum(-1)
        n_partial = partial.sum(-1)
        return cls(
            q_len=q_len,
            kv_len=kv_len,
            q_block=q_block,
            kv_block=kv_block,
            row_start=n.cumsum(0) - n,
            n_partial=n_partial.to(torch.int32),
            n_full=(n - n_partial).to(torch.int32),
            # (M, 2, nK): nonzero runs over rows, then partial before full, then ascending key blocks
            col_idx=torch.stack((partial, full), 1).nonzero()[:, 2].to(torch.int32),
            row_of=torch.arange(M, device=mask.device).view(B, H, nQ),
            bitmap=blocks[partial] if bool(partial.any()) else None,
        )

    # ---------------------------------------------------------------- shape and cost

    @property
    def nQ(self) -> int:
        """Number of query blocks."""
        return -(-self.q_len // self.q_block)

    @property
    def nK(self) -> int:
        """Number of key blocks."""
        return -(-self.kv_len // self.kv_block)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B|1, H|1, Nq, Nk): the shape of the mask this layout stands for."""
        return (self.row_of.shape[0], self.row_of.shape[1], self.q_len, self.kv_len)

    @property
    def device(self) -> torch.device:
        """The device that holds the lists."""
        return self.row_start.device

    @cached_property
    def q_valid(self) -> Tensor:
        """(nQ,) int64: tokens of each query block; fewer than q_block only in the last one."""
        return _valid_counts(self.q_len, self.q_block, self.device)

    @cached_property
    def kv_valid(self) -> Tensor:
        """(nK,) int64: tokens of each key block; fewer than kv_block only in the last one."""
        return _valid_counts(self.kv_len, self.kv_block, self.device)

    @cached_property
    def n_visited(self) -> Tensor:
        """(M,) int64: entries of each base row, partial and full."""
        return self.n_partial.long() + self.n_full.long()

    @cached_property
    def partial_start(self) -> Tensor:
        """(M,) int64: where the bitmaps of each base row start in `bitmap`."""
        n = self.n_partial.long()
        return n.cumsum(0) - n

    @cached_property
    def _counted(self) -> tuple[int, int]:
        """Attending pairs and queries that attend to nothing, both over `shape`."""
        M, device = self.row_start.shape[0], self.device
        entries = self.entries(torch.arange(M, device=device))
        full_keys = torch.zeros(M, dtype=torch.int64, device=device)
        full_keys.index_add_(0, entries.row[entries.full], self.kv_valid[entries.col[entries.full]])
        if self.bitmap is None:
            keys = full_keys[self.row_of]
            return int((keys * self.q_valid).sum()), int(((keys == 0) * self.q_valid).sum())
        partial = ~entries.full
        in_sequence = torch.arange(self.kv_block, device=device) < self.kv_valid[entries.col[partial], None]
        per_query = (self.bitmap[entries.partial[partial]] & in_sequence[:, None]).sum(-1)
        keys = full_keys[:, None].repeat(1, self.q_block).index_add_(0, entries.row[partial], per_query)
        # one base row may serve query blocks of different lengths: sum over every possible length, then pick
        served = (self.row_of, self.q_valid.expand_as(self.row_of) - 1)
        return int(keys.cumsum(1)[served].sum()), int((keys == 0).cumsum(1)[served].sum())

    @property
    def attended_pairs(self) -> int:
        """Query-key pairs that attend, counted over `shape`, so once for shared batches and heads."""
        return self._counted[0]

    @cached_property
    def visited_blocks(self) -> int:
        """Visited blocks counted over `shape`, so once for shared batches and heads."""
        return int(self.n_visited[self.row_of].sum())

    @property
    def density(self) -> float:
        """Fraction of the query-key pairs inside both sequences that attend, 0 to 1."""
        return self.attended_pairs / math.prod(self.shape)

    @property
    def block_density(self) -> float:
        """Fraction of the blocks that are visited, which is what a kernel pays for, 0 to 1."""
        return self.visited_blocks / (self.row_of.numel() * self.nK)

    @property
    def is_full(self) -> bool:
        """Whether every query attends to every key, so that the layout is dense attention."""
        return self.attended_pairs == math.prod(self.shape)

    @property
    def has_empty_rows(self) -> bool:
        """Whether some query attends to no key: its output is 0 and its LSE is -inf."""
        return self._counted[1] > 0

    def predicted_speedup(self, ratio: float | None = None) -> float:
        """Predict the speedup over dense attention: `ratio / block_density`.

        The model is that a kernel pays for each visited block, and does so at `ratio` times the throughput of dense
        attention. It knows nothing of launch overhead, uneven rows or bitmaps.

        Args:
            ratio: throughput per visited pair relative to dense attention. None takes PLACEHOLDER_RATIO, a placeholder
                until the library calibrates it per machine; a prediction made with it is a guide, not a measurement.

        Returns: the factor; below 1 means that dense attention is predicted to be faster. inf if nothing is visited.
        Raises: ValueError unless ratio is positive.
        """
        ratio = PLACEHOLDER_RATIO if ratio is None else ratio
        if not ratio > 0:
            raise ValueError(
                f"BlockLayout.predicted_speedup: ratio must be > 0 (throughput relative to dense attention), got "
                f"{ratio}; measured ratios lie between 0.3 and 4."
            )
        return ratio / self.block_density if self.visited_blocks else math.inf

    def __repr__(self) -> str:
        B, H, Nq, Nk = self.shape
        partial = 0 if self.bitmap is None else self.bitmap.shape[0]
        return (
            f"BlockLayout(B={B}, H={H}, Nq={Nq}, Nk={Nk}, blocks {self.q_block}x{self.kv_block}, density "
            f"{self.density:.4g}, block density {self.block_density:.4g}, {partial} partial blocks stored, "
            f"{self.device})"
        )

    # ---------------------------------------------------------------- views

    def block_mask(self) -> Tensor:
        """Return the visited blocks, partial or full, as (B|1, H|1, nQ, nK) bool."""
        M = self.row_start.shape[0]
        entries = self.entries(torch.arange(M, device=self.device))
        visited = torch.zeros(M, self.nK, dtype=torch.bool, device=self.device)
        visited[entries.row, entries.col] = True
        return visited[self.row_of]

    def to_dense_mask(self) -> Tensor:
        """Return the attention mask, (B|1, H|1, Nq, Nk) bool. For tests and small problems: it is Nq x Nk."""
        M = self.row_start.shape[0]
        entries = self.entries(torch.arange(M, device=self.device))
        blocks = torch.zeros(M, self.nK, self.q_block, self.kv_block, dtype=torch.bool, device=self.device)
        blocks[entries.row[entries.full], entries.col[entries.full]] = True
        if self.bitmap is not None:
            partial = ~entries.full
            blocks[entries.row[partial], entries.col[partial]] = self.bitmap[entries.partial[partial]]
        B, H = self.row_of.shape[:2]
        padded = blocks[self.row_of].transpose(3, 4).reshape(B, H, self.nQ * self.q_block, self.nK * self.kv_block)
        return padded[:, :, : self.q_len, : self.kv_len].contiguous()

    def entries(self, base_rows: Tensor) -> Entries:
        """List the visited blocks of the given base rows, (R,) int64, row after row."""
        n = self.n_visited[base_rows]
        row = torch.repeat_interleave(torch.arange(n.shape[0], device=self.device), n)
        base = base_rows[row]
        slot = torch.arange(row.shape[0], device=self.device) - (n.cumsum(0) - n)[row]
        return Entries(
            row=row,
            col=self.col_idx[self.row_start[base] + slot].long(),
            full=slot >= self.n_partial[base],
            partial=self.partial_start[base] + slot,
        )

    def transpose(self) -> BlockLayout:
        """Return the layout with queries and keys exchanged: for each key block, the query blocks that visit it.

        A backward pass over keys and a column sum read it. It is made once and kept with this layout. Key blocks that
        nothing visits are empty rows of it. Rows shared within a head are listed separately in the result.
        """
        return self.derived("transpose", BlockLayout._transposed)

    def _transposed(self) -> BlockLayout:
        B, H, nQ = self.row_of.shape
        M = B * H * self.nK
        entries = self.entries(self.row_of.reshape(-1))
        new_row = entries.row // nQ * self.nK + entries.col
        # the entries run over ascending query blocks, so a stable sort keeps those ascending within each list
        order = torch.argsort(new_row * 2 + entries.full, stable=True)
        full = entries.full[order]
        n_full = torch.bincount(new_row[entries.full], minlength=M)
        n_partial = torch.bincount(new_row[~entries.full], minlength=M)
        n = n_full + n_partial
        bitmap = (
            None if self.bitmap is None else self.bitmap[entries.partial[order][~full]].transpose(1, 2).contiguous()
        )
        return BlockLayout(
            q_len=self.kv_len,
            kv_len=self.q_len,
            q_block=self.kv_block,
            kv_block=self.q_block,
            row_start=n.cumsum(0) - n,
            n_partial=n_partial.to(torch.int32),
            n_full=n_full.to(torch.int32),
            col_idx=(entries.row[order] % nQ).to(torch.int32),
            row_of=torch.arange(M, device=self.device).view(B, H, self.nK),
            bitmap=bitmap,
        )

    def to(self, device: torch.device | str) -> BlockLayout:
        """Return this layout on `device`; itself when it is there already. Derived tables are rebuilt on demand."""
        tensors = {
            f.name: value.to(device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        if all(moved is getattr(self, name) for name, moved in tensors.items()):
            return self
        return dataclasses.replace(self, **cast(Any, tensors))

    def derived(self, key: Hashable, build: Callable[[BlockLayout], T]) -> T:
        """Return `build(self)`, computed once per key and kept as long as the layout.

        Backends keep here what they derive from the lists (row order, buckets, a dense mask), because one layout
        usually serves many layers and steps.
        """
        if key not in self._derived:
            # a table first needed during inference must stay usable in training
            with torch.inference_mode(False), torch.no_grad():
                self._derived[key] = build(self)
        return cast(T, self._derived[key])

    def check(self) -> None:
        """Check the values of the lists, which costs a device synchronisation; for tests of hand-built layouts.

        Raises: ValueError naming the first rule that is broken.
        """
        layout_rules.check_lists(self)


def _valid_counts(length: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp(max=block)
