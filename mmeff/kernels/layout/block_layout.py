"""BlockLayout: which key blocks each query block attends to. The only sparse layout of this library.

A pattern (radial, neighbourhood, top-k routing, ...) produces a BlockLayout; a backend consumes it. It is a list of
key blocks per row of query blocks, addressed by `row_start` and a count, so the same kernel reads compact lists
(CSR), padded lists and lists shared between rows. Within a row the *partial* blocks come first, where only some
query-key pairs attend and a bitmap or bounds say which; then the *full* blocks, where every pair of tokens in use does.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..calibration import sparse_ratio
from . import algebra, build, export, identity, plans, rules
from .bounds import Bounds

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

T = TypeVar("T")


class Entries(NamedTuple):
    """Every visited block of some rows, one element per block, in list order."""

    row: Tensor  # position of the row in the sequence of rows asked for
    col: Tensor  # key block
    full: Tensor  # bool: a full block, else a partial one
    slab: Tensor  # row of `bitmap`, meaningful where not full


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class BlockLayout:
    """Key blocks per query block, with a bitmap or bounds for the blocks that are only partly attended.

    Build one with `from_block_mask`, `from_bounds` or `from_dense_mask`; methods that already hold index lists call the
    constructor. It checks shapes and dtypes, which costs no device synchronisation; `check()` checks the values too.

    Args:
        q_len, kv_len: tokens in the query and key sequences (Nq, Nk).
        q_block, kv_block: tokens in a block. The last block of a sequence may be shorter.
        row_start: (M,) int64, where the list of each base row starts in `col_idx`. Rows may share a list.
        n_partial, n_full: (M,) int32, entries of each base row: partial ones first, then full ones.
        col_idx: (capacity,) int32 key blocks; strictly ascending within the partial and within the full entries.
        row_of: (B|1, H|1, nQ) int64, the base row of each query block. A leading 1 shares the rows over batch or
            heads, and equal values share them anywhere else; neither costs memory or time.
        bitmap: (P, q_block, kv_block) bool, or None. One slab per partial entry, in base-row order and list order within
            a row; True attends. What it says about tokens that are not in use is ignored.
        bounds: for the same tokens, in place of a bitmap, or None. One of the two is needed where an entry is partial.
        q_valid, kv_valid: (B|1, nQ) and (B|1, nK) int32, tokens in use at the start of each block. None is all that the
            sequence has. Fewer make padding inside the sequence: a key that is not in use is never attended, whatever
            it holds, and a query that is not in use gets output 0 and LSE -inf.
        known_pairs: attending pairs over `shape`, if the builder knows them; counting them is then spared.

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
    bounds: Bounds | None = None
    q_valid: Tensor = None  # type: ignore[assignment]  # the constructor fills them in
    kv_valid: Tensor = None  # type: ignore[assignment]
    known_pairs: int | None = None
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        rules.block_counts(
            "BlockLayout", q_len=self.q_len, kv_len=self.kv_len, q_block=self.q_block, kv_block=self.kv_block
        )
        for name, length, block in (("q_valid", self.q_len, self.q_block), ("kv_valid", self.kv_len, self.kv_block)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, rules.valid_counts(length, block, self.row_start.device))
        rules.check_fields(self)
        self._leave_inference_mode()
        identity.remember(self)

    def _leave_inference_mode(self) -> None:
        # a layout made during inference must serve training too, whose backward pass saves its lists
        with torch.inference_mode(False):
            for f in dataclasses.fields(self):
                x = getattr(self, f.name)
                if isinstance(x, Tensor) and x.is_inference():
                    object.__setattr__(self, f.name, x.clone())
                if isinstance(x, Bounds) and x.q_bounds.is_inference():
                    object.__setattr__(self, f.name, Bounds(x.q_bounds.clone(), x.k_bounds.clone()))

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
        q_valid: Tensor | None = None,
        kv_valid: Tensor | None = None,
        allow_empty_rows: bool = False,
    ) -> BlockLayout:
        """Make a layout in which every visited block is full.

        Args:
            mask: (B|1, H|1, nQ, nK) or (nQ, nK) bool; True visits the block. nQ = ceil(q_len / q_block), nK likewise.
                A leading 1 is stored once and shared over the batch or the heads.
            q_len, kv_len: tokens in the query and key sequences.
            q_block, kv_block: tokens in a block.
            q_valid, kv_valid: tokens in use of each block, (nQ,) or (B|1, nQ) integers, and (nK,) or (B|1, nK). None is
                all that the sequence has.
            allow_empty_rows: accept query blocks that visit nothing; their output is 0 and their LSE is -inf.

        Returns: a BlockLayout on the mask's device.
        Raises: ValueError for a wrong shape or an empty row, TypeError for a mask that is not bool.
        Numerics: exact. No tensor of Nq x Nk elements is made.
        """
        who = "BlockLayout.from_block_mask"
        sizes: dict[str, Any] = {"q_len": q_len, "kv_len": kv_len, "q_block": q_block, "kv_block": kv_block}
        nQ, nK = rules.block_counts(who, **sizes)
        mask = rules.mask_4d(who, mask)
        if mask.shape[2:] != (nQ, nK):
            raise ValueError(
                f"{who}: mask must be (B|1, H|1, nQ, nK) = (B|1, H|1, {nQ}, {nK}) for q_len={q_len}, kv_len={kv_len}, "
                f"q_block={q_block}, kv_block={kv_block}, got {tuple(mask.shape)}; nQ is ceil(q_len / q_block) and nK "
                "is ceil(kv_len / kv_block)."
            )
        valid = rules.valids(who, q_valid, kv_valid, device=mask.device, **sizes)
        if not allow_empty_rows:
            usable = mask & (valid[1] > 0)[:, None, None, :] if kv_valid is not None else mask
            unused = None if q_valid is None else (valid[0] == 0)[:, None]
            rules.refuse_empty_rows(who, usable, row="query block", key="key block", unused=unused)
        lists = build.lists(None, mask)
        return cls(**sizes, **lists, q_valid=valid[0], kv_valid=valid[1])

    @classmethod
    def from_bounds(
        cls,
        bounds: Bounds,
        *,
        q_block: int,
        kv_block: int,
        q_valid: Tensor | None = None,
        kv_valid: Tensor | None = None,
        known_pairs: int | None = None,
    ) -> BlockLayout:
        """Make the layout of causal, banded or windowed attention, from the intervals of its tokens.

        Args:
            bounds: which pairs attend; its lengths are those of the sequences, in the order in which tokens are stored.
            q_block, kv_block: tokens in a block.
            q_valid, kv_valid: as for `from_block_mask`.
            known_pairs: attending pairs, if the caller knows them; else they are counted when they are asked for.

        Returns: a BlockLayout with the bounds for its partial blocks, on their device.
        Raises: ValueError if a query block in use visits no key block, or for wrong sizes.
        Numerics: exact. Time and memory grow with the blocks squared and with the tokens, not with the pairs.
        """
        who = "BlockLayout.from_bounds"
        sizes: dict[str, Any] = {
            "q_len": bounds.q_len,
            "kv_len": bounds.kv_len,
            "q_block": q_block,
            "kv_block": kv_block,
        }
        rules.block_counts(who, **sizes)
        valid = rules.valids(who, q_valid, kv_valid, device=bounds.q_bounds.device, **sizes)
        some, every = bounds.block_kinds(q_block, kv_block, *valid)
        rules.refuse_empty_rows(who, some, row="query block", key="key block", unused=(valid[0] == 0)[:, None])
        return cls(
            **sizes, **build.lists(some & ~every, every), bounds=bounds, q_valid=valid[0], kv_valid=valid[1],
            known_pairs=known_pairs,
        )  # fmt: skip

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
        mask = rules.mask_4d(who, mask)
        q_len, kv_len = mask.shape[2:]
        rules.block_counts(who, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
        if not allow_empty_rows:
            rules.refuse_empty_rows(who, mask, row="query", key="key")
        blocks = build.in_blocks(mask, q_block, kv_block)
        q_valid = rules.valid_counts(q_len, q_block, mask.device)
        kv_valid = rules.valid_counts(kv_len, kv_block, mask.device)
        fields = build.lists_of_slabs(blocks, q_valid, kv_valid)
        return cls(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block, **fields)

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
    def batch(self) -> int:
        """Batch rows this layout is for: 1 where all share it."""
        return max(self.row_of.shape[0], self.q_valid.shape[0], self.kv_valid.shape[0])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B|1, H|1, Nq, Nk): the shape of the mask this layout stands for."""
        return (self.batch, self.row_of.shape[1], self.q_len, self.kv_len)

    @property
    def device(self) -> torch.device:
        """The device that holds the lists."""
        return self.row_start.device

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
    def has_padding(self) -> bool:
        """Whether some block holds fewer tokens in use than the sequence gives it."""
        whole = (
            rules.valid_counts(n, b, self.device) for n, b in ((self.q_len, self.q_block), (self.kv_len, self.kv_block))
        )
        return any(bool((x != y).any()) for x, y in zip((self.q_valid, self.kv_valid), whole, strict=True))

    @cached_property
    def _counted(self) -> tuple[int, int]:
        return plans.count_pairs(self)

    @property
    def attended_pairs(self) -> int:
        """Query-key pairs that attend, counted over `shape`, so once for shared batches and heads."""
        return self._counted[0] if self.known_pairs is None else self.known_pairs

    @cached_property
    def visited_blocks(self) -> int:
        """Visited blocks counted over `shape`, so once for shared batches and heads."""
        return int(self.n_visited[self.row_of].sum()) * self.batch // self.row_of.shape[0]

    @property
    def density(self) -> float:
        """Fraction of the query-key pairs inside both sequences that attend, 0 to 1."""
        return self.attended_pairs / max(math.prod(self.shape), 1)

    @property
    def block_density(self) -> float:
        """Fraction of the blocks that are visited, which is what a kernel pays for, 0 to 1."""
        B, H = self.shape[:2]
        return self.visited_blocks / max(B * H * self.nQ * self.nK, 1)

    @cached_property
    def partial_share(self) -> float:
        """Fraction of the visited blocks that are partial, which kernels pay a mask for, 0 to 1."""
        return int(self.n_partial[self.row_of].sum()) / max(int(self.n_visited[self.row_of].sum()), 1)

    @cached_property
    def is_full(self) -> bool:
        """Whether every query attends to every key, so that the layout is dense attention."""
        B, H = self.shape[:2]
        if self.visited_blocks < B * H * self.nQ * self.nK:  # spares the count of pairs
            return False
        return self.attended_pairs == math.prod(self.shape)

    @property
    def has_empty_rows(self) -> bool:
        """Whether some query attends to no key: its output is 0 and its LSE is -inf."""
        return self._counted[1] > 0

    def predicted_speedup(self, ratio: float | None = None) -> float:
        """Predict the speedup over dense attention: `ratio / block_density`.

        The model is that a kernel pays for each visited block, and does so at `ratio` times the throughput of dense
        attention. It knows nothing of launch overhead, uneven rows or bitmaps; `explain` knows more.

        Args:
            ratio: throughput per visited pair relative to dense attention. None takes what calibration measured on
                this machine for the best float32 backend of the layout's device, or the checked-in default.

        Returns: the factor; below 1 means that dense attention is predicted to be faster. inf if nothing is visited.
        Raises: ValueError unless ratio is positive.
        """
        ratio = sparse_ratio(self.device.type) if ratio is None else ratio
        if not ratio > 0:
            raise ValueError(
                f"BlockLayout.predicted_speedup: ratio must be > 0 (throughput relative to dense attention), got "
                f"{ratio}; measured ratios lie between 0.3 and 4."
            )
        return ratio / self.block_density if self.visited_blocks else math.inf

    def __repr__(self) -> str:
        B, H, Nq, Nk = self.shape
        return (
            f"BlockLayout(B={B}, H={H}, Nq={Nq}, Nk={Nk}, blocks {self.q_block}x{self.kv_block}, block density "
            f"{self.block_density:.4g}, {self.partial_share:.0%} of them partial, {self.device})"
        )

    # ---------------------------------------------------------------- views

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
            slab=self.partial_start[base] + slot,
        )

    def slabs(self, q_block: Tensor, kv_block: Tensor, slab: Tensor) -> Tensor:
        """Say which pairs of some partial entries attend, of tokens in use or not.

        Args: (E,) query block, key block and row of `bitmap` of each entry, as `entries` lists them.
        Returns: (E, q_block, kv_block) bool.
        """
        if self.bounds is None:
            assert self.bitmap is not None
            return self.bitmap[slab]
        q = q_block[:, None] * self.q_block + torch.arange(self.q_block, device=self.device)
        k = kv_block[:, None] * self.kv_block + torch.arange(self.kv_block, device=self.device)
        return self.bounds.attends(q.clamp(max=self.q_len - 1)[:, :, None], k.clamp(max=self.kv_len - 1)[:, None, :])

    def tokens_in_use(self) -> tuple[Tensor, Tensor]:
        """Return which queries and keys are in use, (B|1, Nq) and (B|1, Nk) bool."""
        q = torch.arange(self.q_block, device=self.device) < self.q_valid[..., None]
        k = torch.arange(self.kv_block, device=self.device) < self.kv_valid[..., None]
        return q.flatten(1)[:, : self.q_len], k.flatten(1)[:, : self.kv_len]

    def block_mask(self) -> Tensor:
        """Return the visited blocks, partial or full, as (B|1, H|1, nQ, nK) bool."""
        return plans.block_mask(self.row_start, self.n_partial, self.n_full, self.col_idx, self.row_of, self.nK)

    def visited_shares(self) -> Tensor:
        """Return the share of each block's pairs that attends, (B|1, H|1, nQ, nK) float64: 1 for full blocks, 0 for others.

        Pairs are those of tokens in use.
        """
        if self.bounds is None and self.bitmap is None:
            return self.block_mask().double()
        return plans.visited_shares(self)

    def to_dense_mask(self) -> Tensor:
        """Return the attention mask, (B|1, H|1, Nq, Nk) bool. For tests and small problems: it is Nq x Nk."""
        return export.dense_mask(self)

    def to_csr(self) -> export.Csr:
        """Return the visited blocks as compressed sparse rows, as FlashInfer and SciPy's BSR address them.

        Rows run over (B|1, H|1, nQ), flattened. `partial` marks the entries of which only some pairs attend.
        """
        return export.csr(self)

    def to_flex(self) -> BlockMask:
        """Return the layout as a BlockMask of torch.nn.attention.flex_attention, for the same lengths."""
        return export.flex(self)

    def transpose(self) -> BlockLayout:
        """Return the layout with queries and keys exchanged: for each key block, the query blocks that visit it.

        A backward pass over keys and a column sum read it. It is made once and kept with this layout. Key blocks that
        nothing visits are empty rows of it. Rows shared within a head are listed separately in the result.
        """
        return self.derived("transpose", plans.transpose)

    def row_order(self) -> Tensor:
        """(R,) int32: the rows of `row_of`, flattened, longest list first, so that the last to finish is short."""
        return self.derived("row_order", plans.row_order)

    def split_plan(self, max_entries: int | None = None) -> plans.SplitPlan:
        """Cut long rows into pieces, whose results are then merged by LSE, so that no row holds up the others.

        Args:
            max_entries: entries of a piece at most. None is four times the mean row, and at least 8.
        """
        return self.derived(("split_plan", max_entries), lambda layout: plans.split_plan(layout, max_entries))

    def with_lengths(self, q_lengths: Tensor, kv_lengths: Tensor) -> BlockLayout:
        """Return this layout for samples that use fewer tokens than the sequence has, at its start.

        Args: q_lengths, kv_lengths: (B,) integers, tokens in use of each sample.
        Returns: a layout with the same lists, whose blocks beyond a sample's tokens hold none in use. Queries whose blocks
            have none left are empty rows.
        """

        def valid(lengths: Tensor, counts: Tensor, block: int) -> Tensor:
            starts = torch.arange(counts.shape[1], device=self.device) * block
            left = (lengths.to(self.device)[:, None] - starts).clamp(min=0)
            return torch.minimum(left, counts).to(torch.int32)

        return dataclasses.replace(
            self,
            q_valid=valid(q_lengths, self.q_valid, self.q_block),
            kv_valid=valid(kv_lengths, self.kv_valid, self.kv_block),
            known_pairs=None,
        )

    def with_tail(self, tail: int, used: Tensor) -> BlockLayout:
        """Return this layout for samples that use only the first `used` of the last `tail` tokens: padded text.

        Args: tail: tokens, among queries and keys alike. used: (B,) integers.
        Returns: as `with_lengths`. The result for the latest `used` is kept with this layout, because the layers of a forward
            pass the same tensor, and what backends derive from it should be derived once.
        """
        # tensors of inference mode do not tell whether somebody has written to them since
        version = None if used.is_inference() else used._version
        kept = self._derived.get("tail")
        if kept is not None and version is not None:
            of, at, of_tail, layout = kept
            if of() is used and at == version and of_tail == tail:
                return cast(BlockLayout, layout)
        lengths = used.to(self.device)
        layout = self.with_lengths(self.q_len - tail + lengths, self.kv_len - tail + lengths)
        self._derived["tail"] = (weakref.ref(used), version, tail, layout)
        return layout

    # ---------------------------------------------------------------- algebra

    def __or__(self, other: BlockLayout) -> BlockLayout:
        """The union: a pair attends if it does in either layout. Lengths, blocks and tokens in use must be equal."""
        return algebra.union(self, other)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        """The intersection: a pair attends if it does in both layouts. The result may have empty rows."""
        return algebra.intersection(self, other)

    def __invert__(self) -> BlockLayout:
        """The complement within the tokens in use: a pair attends if it does not here. May have empty rows."""
        return algebra.complement(self)

    # ---------------------------------------------------------------- housekeeping

    def to(self, device: torch.device | str) -> BlockLayout:
        """Return this layout on `device`; itself when it is there already. Derived tables are rebuilt on demand."""
        moved = {
            f.name: value.to(device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), (Tensor, Bounds))
        }
        if moved["row_start"] is self.row_start:
            return self
        return dataclasses.replace(self, **cast(Any, moved))

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
        rules.check_lists(self)
