"""A case made real: its tensors, our call, the peers' calls, and exact results to judge them by.

Exact results of a whole N x N attention would cost more than all timings. So a sample of queries is computed exactly, at
the case's own size and on its own tensors; and gradients are checked with a gradient that is zero but at these queries, for
which those of all keys and values follow from the sample alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mmeff import kernels
from mmeff.kernels import BlockLayout
from mmeff.kernels.block_sparse import op as block_sparse_op
from mmeff.kernels.neighborhood import neighborhood_attention
from mmeff.kernels.neighborhood import op as neighborhood_op
from mmeff.kernels.neighborhood.checks import check_rule
from mmeff.kernels.routed import op as routed_op
from mmeff.kernels.token_scores import op as token_scores_op

from . import peers
from .cases import BlockSparse, Case, Merge, Neighborhood, Routed, TokenScores, Unavailable

SAMPLED = 128  # queries that are computed exactly


@dataclass(frozen=True)
class Contender:
    """One side of a comparison: a call, and what its gradients are taken of."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()


class Workload(ABC):
    """A case on a device."""

    backends: tuple[str, ...] = ()  # what the operator has; none where it has one way to compute
    density: float | None = None  # attended fraction of the query-key pairs
    block_density: float | None = None  # visited fraction of the blocks
    block: int | None = None  # tokens in a query block

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.gradients = case.direction != "forward"
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype | None = None, leaf: bool = False) -> Tensor:
        """Standard normal values; a leaf carries a gradient if the case wants one."""
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)
        return x.requires_grad_(leaf and self.gradients)

    def ours(self, backend: str) -> Contender:
        """Return our call. Raises Unavailable for a backend that this version does not have."""
        if backend != "auto" and backend not in self.backends:
            has = ", ".join(self.backends) or "no backends to choose from"
            raise Unavailable(f"{self.case.operator} has no backend {backend!r} in this version; it has {has}")
        return self._ours(backend)

    @abstractmethod
    def _ours(self, backend: str) -> Contender: ...

    @abstractmethod
    def peer(self, name: str) -> Contender:
        """Return a peer's call. Raises Unavailable."""

    def peer_is_equal(self, name: str) -> bool:
        """Whether the peer computes the same thing as ours, so that it can be checked as well."""
        return False

    @abstractmethod
    def sample(self, out: Tensor) -> Tensor:
        """Return the part of our output that `exact` has."""

    @abstractmethod
    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the sampled output, as "out", and the gradients it sends back: computed plainly in this dtype."""

    def sampled_gradients(self, contender: Contender) -> dict[str, Tensor]:
        """Return the gradients that `exact` has, from a call whose output gets no gradient but at the sample."""
        raise NotImplementedError


class _Attention(Workload):
    """What the three sparse attentions share: q, k and v, a sample of queries, and dense peers."""

    def __init__(self, case: Case, device: torch.device, grid: tuple[int, ...] | None = None) -> None:
        super().__init__(case, device)
        tokens = grid or (case.N,)
        self.q = self.random(case.B, *tokens, case.H, case.D, leaf=True)
        self.k, self.v = (self.random(case.B, *tokens, case.kv_heads, case.D, leaf=True) for _ in range(2))
        # one query of every stretch of the sequence, and both ends
        edges = torch.linspace(0, case.N - 1, min(SAMPLED, case.N), dtype=torch.float64)
        shift = torch.rand(edges.shape, generator=torch.Generator().manual_seed(0)) * case.N / len(edges)
        rows = (edges + shift).long().clamp(max=case.N - 1)
        rows[0], rows[-1] = 0, case.N - 1
        self.rows = rows.unique().to(device)
        self.sample_gradient = self.random(case.B, len(self.rows), case.H, case.D)

    @abstractmethod
    def visible(self) -> Tensor:
        """Return which keys the sampled queries see, (B|1, H|1, R, N) bool."""

    def bias(self, table: Tensor) -> Tensor:
        """Return what is added to the sampled queries' scores, (H, R, N)."""
        raise NotImplementedError

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v)

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as (B, N, H, D)."""
        q, k, v = (x.flatten(1, -3) for x in (self.q, self.k, self.v))
        return q, k, v

    def peer(self, name: str) -> Contender:
        if name not in peers.DENSE:
            raise Unavailable(f"{self.case.operator} has no peer {name!r}")
        return Contender(peers.dense(name, *self.flat), (self.q, self.k, self.v))

    def sample(self, out: Tensor) -> Tensor:
        return out.flatten(1, -3)[:, self.rows]

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v = (x.detach() for x in self.flat)
        leaves = [x.to(dtype).requires_grad_(self.gradients) for x in (q[:, self.rows], k, v, *self.leaves[3:])]
        with torch.set_grad_enabled(self.gradients):
            mask = self.visible()
            added = self.bias(leaves[3].to(dtype)).masked_fill(~mask, -torch.inf) if leaves[3:] else None
            out = _plain(leaves[0], leaves[1], leaves[2], mask if added is None else added)
        found = {"out": out.detach()}
        if self.gradients:
            grads = torch.autograd.grad(out, leaves, self.sample_gradient.to(dtype))
            found |= dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False))
        return found

    def sampled_gradients(self, contender: Contender) -> dict[str, Tensor]:
        out = contender.forward()
        gradient = torch.zeros_like(out)
        gradient.flatten(1, -3)[:, self.rows] = self.sample_gradient.to(out.dtype)
        dq, dk, dv, *more = torch.autograd.grad(out, contender.leaves, gradient)
        found = {"dq": dq.flatten(1, -3)[:, self.rows], "dk": dk.flatten(1, -3), "dv": dv.flatten(1, -3)}
        return found | dict(zip(("dbias",), more, strict=False))


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention under a mask (bool, or added), (B, R, H, D): by PyTorch's own kernel, or by the formula in float64."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    if q.dtype != torch.float64:
        if gqa and q.device.type == "cuda":
            # grouped heads under a mask have no kernel there but the formula in float32, by which none in half precision could
            # be judged
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            gqa = False
        if mask.dtype == torch.bool:
            mask = mask.expand(-1, q.shape[1], -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa).transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2)


class BlockSparseWork(_Attention):
    """block_sparse_attention over the case's layout."""

    def __init__(self, case: BlockSparse, device: torch.device) -> None:
        super().__init__(case, device)
        self.backends = tuple(b.name for b in block_sparse_op.FORWARD)
        self.layout: BlockLayout = case.layout.build(N=case.N, H=case.H, device=device)
        self.density, self.block_density = self.layout.density, self.layout.block_density
        self.block = self.layout.q_block

    def _ours(self, backend: str) -> Contender:
        return Contender(lambda: self._attend(self.q, self.k, self.v, backend), self.leaves)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        out = kernels.block_sparse_attention(q, k, v, self.layout, backend=backend)
        assert isinstance(out, Tensor)
        return out

    def peer(self, name: str) -> Contender:
        if name == "flex":
            return Contender(peers.flex(self.q, self.k, self.v, self.layout, self.case.direction), self.leaves)
        backend, _, dtype = name.partition(" ")
        if dtype != "float32":
            return super().peer(name)
        self.ours(backend)  # for its refusal
        q, k, v = (x.detach().float().requires_grad_(self.gradients) for x in self.leaves)
        return Contender(lambda: self._attend(q, k, v, backend), (q, k, v))

    def peer_is_equal(self, name: str) -> bool:
        return name not in peers.DENSE

    def visible(self) -> Tensor:
        layout, rows = self.layout, self.rows
        B, H = layout.shape[:2]
        base = layout.row_of.expand(B, H, layout.nQ)[:, :, rows // layout.q_block].reshape(-1)
        slot = (rows % layout.q_block).expand(B, H, -1).reshape(-1)
        query_block = (rows // layout.q_block).expand(B, H, -1).reshape(-1)
        mask = torch.zeros(len(base), layout.nK, layout.kv_block, dtype=torch.bool, device=self.device)
        entries = layout.entries(base)
        mask[entries.row[entries.full], entries.col[entries.full]] = True
        for row in entries.row[~entries.full].unique().tolist():  # one row's slabs at a time: they are whole blocks
            of_row = (entries.row == row) & ~entries.full
            col, slab = entries.col[of_row], entries.slab[of_row]
            mask[row, col] = layout.slabs(query_block[row].expand_as(col), col, slab)[:, slot[row]]
        keys = layout.tokens_in_use()[1][:, None, None]
        return mask.flatten(1)[:, : layout.kv_len].view(B, H, len(rows), layout.kv_len) & keys


class NeighborhoodWork(_Attention):
    """neighborhood_attention over a grid."""

    def __init__(self, case: Neighborhood, device: torch.device) -> None:
        super().__init__(case, device, case.grid)
        self.neighborhood = case
        self.backends = tuple(b.name for b in neighborhood_op.FORWARD)
        self.rule = check_rule(case.operator, case.grid, case.window, case.stride, case.dilation, case.causal)
        self.density = neighborhood_op.density(self.rule, 0)
        self.table = self.random(case.H, *self.rule.bias_shape, leaf=True) if case.bias else None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v) if self.table is None else (self.q, self.k, self.v, self.table)

    def _ours(self, backend: str) -> Contender:
        case = self.neighborhood

        def attend() -> Tensor:
            out = neighborhood_attention(
                self.q, self.k, self.v, case.window, stride=case.stride, dilation=case.dilation, causal=case.causal,
                rel_bias=self.table, backend=backend,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out

        return Contender(attend, self.leaves)

    @cached_property
    def _coordinates(self) -> tuple[list[Tensor], list[Tensor]]:
        """Coordinates of the sampled queries, (R, 1), and of all keys, (N,), per axis."""
        grid = self.rule.grid
        keys = torch.unravel_index(torch.arange(self.rule.N, device=self.device), grid)
        return [x[:, None] for x in torch.unravel_index(self.rows, grid)], list(keys)

    def visible(self) -> Tensor:
        mask = torch.ones(len(self.rows), self.rule.N, dtype=torch.bool, device=self.device)
        for axis, i, j in zip(self.rule.axes, *self._coordinates, strict=True):
            lo, hi = (x.to(self.device)[i] for x in axis.windows())
            position = j // axis.dilation
            mask &= (i % axis.dilation == j % axis.dilation) & (lo <= position) & (position < hi)
        return mask[None, None]

    def bias(self, table: Tensor) -> Tensor:
        index: list[slice | Tensor] = [slice(None)]
        for axis, i, j in zip(self.rule.axes, *self._coordinates, strict=True):
            index.append((j // axis.dilation - i // axis.dilation + axis.window - 1).clamp(0, 2 * axis.window - 2))
        return table[tuple(index)]


class RoutedWork(_Attention):
    """routed_attention whose queries pick random key blocks."""

    def __init__(self, case: Routed, device: torch.device) -> None:
        super().__init__(case, device)
        # the routes that are grouped become block-sparse attention, whose backend may be named as well
        self.backends = tuple(b.name for b in (*routed_op.BACKENDS, *block_sparse_op.FORWARD))
        self.kv_block = case.kv_block
        n = -(-case.N // case.kv_block)
        scores = torch.rand(1, case.H, case.N, n, generator=self.generator, device=device)
        self.routes = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(case.picks, -1).indices, True)
        self.density = self.routes.float().mean().item()

    def _ours(self, backend: str) -> Contender:
        def attend() -> Tensor:
            out = kernels.routed_attention(self.q, self.k, self.v, self.routes, kv_block=self.kv_block, backend=backend)
            assert isinstance(out, Tensor)
            return out

        return Contender(attend, self.leaves)

    def visible(self) -> Tensor:
        return self.routes[:, :, self.rows].repeat_interleave(self.kv_block, -1)[..., : self.case.N]


class TokenScoresWork(Workload):
    """token_scores of the last rows, beside the causal layer that they come from."""

    def __init__(self, case: TokenScores, device: torch.device) -> None:
        super().__init__(case, device)
        self.backends = tuple(b.name for b in token_scores_op.FORWARD)
        self.q = self.random(case.B, case.N, case.H, case.D)
        self.k, self.v = (self.random(case.B, case.N, case.kv_heads, case.D) for _ in range(2))
        self.positions = torch.arange(case.N - case.rows, case.N, device=device)

    def _ours(self, backend: str) -> Contender:
        q_rows = self.q[:, self.positions]
        return Contender(lambda: kernels.token_scores(q_rows, self.k, row_positions=self.positions, backend=backend))

    def peer(self, name: str) -> Contender:
        if name not in peers.DENSE:
            raise Unavailable(f"{self.case.operator} has no peer {name!r}")
        return Contender(peers.dense(name, self.q, self.k, self.v, causal=True))

    def sample(self, out: Tensor) -> Tensor:
        return out

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        q, k = self.q[:, self.positions].to(dtype).transpose(1, 2), self.k.to(dtype).transpose(1, 2)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * q.shape[-1] ** -0.5
        behind = torch.arange(self.case.N, device=self.device) > self.positions[:, None]
        wide = torch.promote_types(dtype, torch.float32)
        return {"out": scores.masked_fill(behind, -torch.inf).softmax(-1, dtype=wide).sum(2)}


class MergeWork(Workload):
    """merge_attention, beside one dense layer over as many tokens."""

    def __init__(self, case: Merge, device: torch.device) -> None:
        super().__init__(case, device)
        self.outputs = [self.random(case.B, case.N, case.H, case.D) for _ in range(case.parts)]
        self.lses = [self.random(case.B, case.H, case.N, dtype=torch.float32) for _ in range(case.parts)]

    def _ours(self, backend: str) -> Contender:
        return Contender(lambda: kernels.merge_attention(self.outputs, self.lses)[0])

    def peer(self, name: str) -> Contender:
        if name not in peers.DENSE:
            raise Unavailable(f"{self.case.operator} has no peer {name!r}")
        q, k, v = (self.random(self.case.B, self.case.N, self.case.H, self.case.D) for _ in range(3))
        return Contender(peers.dense(name, q, k, v))

    def sample(self, out: Tensor) -> Tensor:
        return out

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        weights = torch.stack(self.lses).to(torch.promote_types(dtype, torch.float32)).softmax(0).to(dtype)
        parts = (w.transpose(1, 2)[..., None] * x.to(dtype) for w, x in zip(weights, self.outputs, strict=True))
        return {"out": torch.stack(list(parts)).sum(0)}


_WORKLOADS: dict[type[Case], Callable[..., Workload]] = {
    BlockSparse: BlockSparseWork,
    Neighborhood: NeighborhoodWork,
    Routed: RoutedWork,
    TokenScores: TokenScoresWork,
    Merge: MergeWork,
}


def build(case: Case, device: torch.device) -> Workload:
    """Make the case's tensors on the device. Raises Unavailable where it cannot be made."""
    return _WORKLOADS[type(case)](case, device)
