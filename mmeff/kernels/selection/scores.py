"""Scores: how much each query, or block of queries, wants each key, or block of keys. All of them (B, H, rows, columns).

Pooled scores cost N^2 / (q_block * kv_block) products, query and key scores N^2 / block, antidiagonal ones
N^2 / stride. Everything is computed in float32 (float64 for float64 inputs), and autocast does not reach inside.
Scores carry gradients; the masks made from them do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import without_autocast
from . import checks

# Bytes of strided scores that antidiagonal_scores holds at a time.
CHUNK_BYTES = 256 * 2**20


def pool(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Average the tokens of each block.

    Args:
        x: (B, N, H, D) tokens, heads last.
        block: tokens in a block; the last block may be shorter.
        valid: (nBlocks,) or (B|1, nBlocks) integer counts: the first valid[b, i] tokens of block i are in use. The rest is
            padding and may hold anything, NaN included. Counts beyond the tokens of a block mean all of them. None
            uses every token.

    Returns: (B, nBlocks, H, D) float32 (float64 for float64 inputs), nBlocks = ceil(N / block): means over the tokens
        in use. A block without any gives 0.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: accumulates in float32 (float64). Differentiable; padding gets gradient 0.
    """
    counts = _counts("pool", "valid", checks.tokens("pool", "x", x), block, valid)
    return _block_sums(x, block, None if valid is None else counts) / counts.clamp(min=1)[..., None, None]


def pooled_scores(
    q: Tensor,
    k: Tensor,
    q_block: int,
    kv_block: int,
    *,
    scale: float | None = None,
    q_valid: Tensor | None = None,
    kv_valid: Tensor | None = None,
) -> Tensor:
    """Score every key block for every query block by the product of their means.

    Args:
        q: (B, Nq, H, D) queries, heads last.
        k: (B, Nk, Hk, D) keys; H must be a multiple of Hk, and query head h reads head h // (H / Hk).
        q_block, kv_block: tokens in a block; the last block of each may be shorter.
        scale: factor on the products; None is 1/sqrt(D).
        q_valid, kv_valid: tokens in use of each block, as in `pool`.

    Returns: (B, H, nQ, nK); -inf for key blocks without a token in use.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: float32 (float64 for float64 inputs).
    Source: the block scores of SpargeAttn (Zhang et al., ICML 2025, arXiv:2502.18137) and VSA (Zhang et al., 2025,
        arXiv:2505.13389).
    """
    who = "pooled_scores"
    checks.queries_and_keys(who, q, k)
    scale = checks.scale_factor(who, scale, q.shape[-1] ** -0.5)
    q_means, _ = _pooled(who, "q_valid", q, q_block, q_valid)
    k_means, k_counts = _pooled(who, "kv_valid", k, kv_block, kv_valid)
    return _without_empty(_products(q_means, k_means, scale), k_counts, kv_valid)


def query_scores(
    q: Tensor, k: Tensor, kv_block: int, *, scale: float | None = 1.0, kv_valid: Tensor | None = None
) -> Tensor:
    """Score every key block for every single query: the gate of query-to-block routing.

    Args:
        q, k, kv_block, kv_valid: as in `pooled_scores`; queries are not pooled.
        scale: factor on the products; 1 as in the gates of MoBA and VMoBA, None is 1/sqrt(D).

    Returns: (B, H, Nq, nK); -inf for key blocks without a token in use.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: float32 (float64 for float64 inputs).
    Source: the gate of VMoBA (Wu et al., 2025, arXiv:2506.23858).
    """
    who = "query_scores"
    checks.queries_and_keys(who, q, k)
    scale = checks.scale_factor(who, scale, q.shape[-1] ** -0.5)
    k_means, k_counts = _pooled(who, "kv_valid", k, kv_block, kv_valid)
    return _without_empty(_products(q.to(k_means.dtype), k_means, scale), k_counts, kv_valid)


def key_scores(
    q: Tensor, k: Tensor, q_block: int, *, scale: float | None = None, q_valid: Tensor | None = None
) -> Tensor:
    """Score every single key for every query block, for stripes: key columns selected one by one.

    Args: as for `pooled_scores`; keys are not pooled.
    Returns: (B, H, nQ, Nk); `stripe_layout` makes a layout of a selection among them.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: float32 (float64 for float64 inputs).
    Source: the stripes of AnchorAttention (Zhang et al., 2025, arXiv:2505.23520).
    Differs: the mean query alone; the paper's anchor is a threshold for the caller to set.
    """
    who = "key_scores"
    checks.queries_and_keys(who, q, k)
    scale = checks.scale_factor(who, scale, q.shape[-1] ** -0.5)
    q_means, _ = _pooled(who, "q_valid", q, q_block, q_valid)
    return _products(q_means, k.to(q_means.dtype), scale)


def pooled_probabilities(
    q: Tensor,
    k: Tensor,
    q_block: int,
    kv_block: int,
    *,
    scale: float | None = None,
    q_valid: Tensor | None = None,
    kv_valid: Tensor | None = None,
    isolated: Tensor | None = None,
    isolated_mask: Tensor | None = None,
    isolated_block: int | None = None,
) -> Tensor:
    """Estimate the share of attention that each key block receives from the mean query of each query block.

    A pooled key stands for all tokens of its block, so it counts as often as the block has tokens. Isolated keys, such
    as text, are not averaged with anything: each is scored by itself and counts once.

    Args:
        q, k, q_block, kv_block, scale, q_valid, kv_valid: as in `pooled_scores`.
        isolated: (B, T, Hk, D) keys to score one by one, or None.
        isolated_mask: (B|1, T) bool, True for the isolated keys in use. None uses all.
        isolated_block: isolated keys summed into one column; the last column may have fewer. None sums all of them
            into one.

    Returns: (B, H, nQ, nK + columns of isolated keys); rows sum to 1.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: softmax in float32 (float64 for float64 inputs). Blocks without a token in use and isolated keys that are
        masked get 0; a row that has no key at all is 0.
    Source: Rectified SpaAttn (Liu et al., 2025, arXiv:2511.19835), isolated-pooling attention reallocation.
    Differs: blocks weigh by their true token counts; the published code weighs all of them 128.
    """
    who = "pooled_probabilities"
    checks.queries_and_keys(who, q, k)
    scale = checks.scale_factor(who, scale, q.shape[-1] ** -0.5)
    if isolated is None and (isolated_mask is not None or isolated_block is not None):
        raise ValueError(
            f"{who}: isolated_mask and isolated_block describe isolated keys, but isolated is None; pass those keys "
            "or leave the two out."
        )
    q_means, _ = _pooled(who, "q_valid", q, q_block, q_valid)
    k_means, k_counts = _pooled(who, "kv_valid", k, kv_block, kv_valid)
    scores = _products(q_means, k_means, scale) + k_counts.to(q_means.dtype).log()[:, None, None]
    nK = scores.shape[-1]
    if isolated is not None:
        columns = _check_isolated(who, q, k, isolated, isolated_mask, isolated_block)
        alone = _products(q_means, isolated.to(q_means.dtype), scale)
        if isolated_mask is not None:
            alone = alone.masked_fill(~isolated_mask[:, None, None], -torch.inf)
        scores = torch.cat((scores, alone), -1)
    sees = (scores > -torch.inf).any(-1, keepdim=True)
    shares = torch.softmax(scores.masked_fill(~sees, 0.0), -1).masked_fill(~sees, 0.0)
    if isolated is None:
        return shares
    T = isolated.shape[1]
    padded = F.pad(shares[..., nK:], (0, columns * (isolated_block or T) - T))
    return torch.cat((shares[..., :nK], padded.unflatten(-1, (columns, -1)).sum(-1)), -1)


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    block: int,
    stride: int,
    *,
    scale: float | None = None,
    offset: int | None = None,
) -> Tensor:
    """Estimate the share of attention that each key block receives, from strided antidiagonals of the scores.

    Groups of `stride` queries and `stride` keys meet along one antidiagonal, which touches every query and every key
    of both; the mean of its products stands for all of them. A softmax over the key groups, summed by blocks, gives
    the shares.

    Args:
        q: (B, Nq, H, D) queries; k: (B, Nk, Hk, D) keys, grouped heads as in `pooled_scores`.
        block: tokens in a query block and in a key block.
        stride: tokens in a group; must divide block. The paper uses 8 and 16.
        scale: factor on the products; None is 1/sqrt(D).
        offset: for causal attention, the position of the first query among the keys: groups that lie entirely in the
            future of a group get 0. None is not causal.

    Returns: (B, H, nQ, nK); rows sum to 1.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: softmax in float32 (float64 for float64 inputs), in chunks of bounded memory.
    Source: XAttention (Xu et al., ICML 2025, arXiv:2503.16428), algorithm 1.
    Differs: a group cut short by the end of its sequence repeats its last token, and weighs by its true token count;
        rows are divided by the number of queries.
    """
    who = "antidiagonal_scores"
    checks.queries_and_keys(who, q, k)
    checks.count(who, "block", block, "tokens")
    checks.count(who, "stride", stride, "tokens")
    if block % stride:
        raise ValueError(f"{who}: stride must divide block = {block}, got {stride}; the paper uses 8 or 16 for 128.")
    if offset is not None:
        checks.count(who, "offset", offset, "tokens before the first query", least=0)
    scale = checks.scale_factor(who, scale, q.shape[-1] ** -0.5) / stride
    dtype = _wide(q)
    B, Nq, H, _ = q.shape
    q_groups = _grouped_tokens(q.to(dtype), stride)
    k_groups = _grouped_tokens(k.to(dtype), stride, backwards=True)
    q_counts, k_counts = (_true_counts(x.shape[1], stride, x.device).to(dtype) for x in (q, k))
    G = k_groups.shape[1]
    per_block = block // stride
    step = max(1, CHUNK_BYTES // (B * H * G * dtype.itemsize * per_block)) * per_block
    rows = []
    for start in range(0, q_groups.shape[1], step):
        scores = _products(q_groups[:, start : start + step], k_groups, scale) + k_counts.log()
        groups = torch.arange(start, start + scores.shape[2], device=q.device)
        if offset is not None:
            ends = offset + (groups + 1) * stride - 1
            future = torch.arange(G, device=q.device) * stride > ends[:, None]
            scores = scores.masked_fill(future, -torch.inf)
        shares = _sum_runs(torch.softmax(scores, -1), -1, per_block)
        rows.append(_sum_runs(shares * q_counts[groups, None], -2, per_block))
    return torch.cat(rows, -2) / _true_counts(Nq, block, q.device).to(dtype)[:, None]


def block_self_similarity(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Measure how alike the tokens of each block are: the mean cosine over all pairs of its tokens.

    A block whose tokens point every way is badly described by its mean; methods compute such blocks always.

    Args: as for `pool`.
    Returns: (B, H, nBlocks), in [0, 1]: 1 for parallel tokens, about 1 / tokens for unrelated ones. A block without
        tokens in use gives 0.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Numerics: float32 (float64 for float64 inputs); a zero token has cosine 0 with everything. The mean over pairs is
        the squared length of the mean direction, so no matrix of pairs is made.
    Source: SpargeAttn (Zhang et al., ICML 2025, arXiv:2502.18137), the self-similarity of a block, as in its code.
    """
    who = "block_self_similarity"
    counts = _counts(who, "valid", checks.tokens(who, "x", x), block, valid)
    directions = F.normalize(x.to(_wide(x)), dim=-1)
    mean = _block_sums(directions, block, None if valid is None else counts) / counts.clamp(min=1)[..., None, None]
    return mean.square().sum(-1).transpose(1, 2)


# ---------------------------------------------------------------- parts


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _true_counts(N: int, block: int, device: torch.device) -> Tensor:
    """(nBlocks,) int64: tokens in each block of a sequence of N."""
    return (N - torch.arange(0, N, block, device=device)).clamp(max=block)


def _counts(who: str, name: str, x: Tensor, block: int, valid: Tensor | None) -> Tensor:
    """(B|1, nBlocks) int64: tokens in use of each block."""
    checks.count(who, "block", block, "tokens")
    true = _true_counts(x.shape[1], block, x.device)[None]
    if valid is None:
        return true
    valid = checks.valid_counts(who, name, valid, x.shape[0], true.shape[1], x.device)
    return torch.minimum(valid.clamp(min=0), true)


def _block_sums(x: Tensor, block: int, counts: Tensor | None) -> Tensor:
    """(B, nBlocks, H, D) sums over the first counts[b, i] tokens of block i; None sums them all."""
    dtype, N = _wide(x), x.shape[1]
    if counts is None:
        whole = N // block
        sums = x[:, : whole * block].unflatten(1, (whole, block)).sum(2, dtype=dtype)
        if N % block:
            sums = torch.cat((sums, x[:, whole * block :].sum(1, keepdim=True, dtype=dtype)), 1)
        return sums
    blocks = F.pad(x, (0, 0, 0, 0, 0, -N % block)).unflatten(1, (-1, block))
    unused = torch.arange(block, device=x.device) >= counts[..., None]
    return blocks.masked_fill(unused[..., None, None], 0.0).sum(2, dtype=dtype)


def _pooled(who: str, name: str, x: Tensor, block: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means and token counts of the blocks."""
    counts = _counts(who, name, x, block, valid)
    return _block_sums(x, block, None if valid is None else counts) / counts.clamp(min=1)[..., None, None], counts


def _products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, R, H, D) and (B, C, Hk, D) -> (B, H, R, C); heads of a group lie side by side, so keys are not repeated."""
    R, H, Hk = q.shape[1], q.shape[2], k.shape[2]
    with without_autocast(q.device):
        rows = (q * scale).unflatten(2, (Hk, H // Hk)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return torch.matmul(rows, k.permute(0, 2, 3, 1)).unflatten(2, (H // Hk, R)).flatten(1, 2)


def _without_empty(scores: Tensor, counts: Tensor, valid: Tensor | None) -> Tensor:
    return scores if valid is None else scores.masked_fill((counts == 0)[:, None, None], -torch.inf)


def _grouped_tokens(x: Tensor, stride: int, *, backwards: bool = False) -> Tensor:
    """(B, N, H, D) -> (B, groups, H, stride * D): the tokens of a group next to each other, in reverse if asked."""
    N = x.shape[1]
    if N % stride:
        x = torch.cat((x, x[:, -1:].expand(-1, -N % stride, -1, -1)), 1)
    groups = x.unflatten(1, (-1, stride))
    if backwards:
        groups = groups.flip(2)
    return groups.transpose(2, 3).flatten(3)


def _sum_runs(x: Tensor, dim: int, run: int) -> Tensor:
    """Sum every `run` elements along dim; the last sum may be of fewer."""
    x = x.movedim(dim, -1)
    return F.pad(x, (0, -x.shape[-1] % run)).unflatten(-1, (-1, run)).sum(-1).movedim(-1, dim)


def _check_isolated(who: str, q: Tensor, k: Tensor, isolated: Tensor, mask: Tensor | None, block: int | None) -> int:
    """The number of columns that the isolated keys make."""
    checks.queries_and_keys(who, q, isolated, k_name="isolated")
    if isolated.shape[2] != k.shape[2]:
        raise ValueError(
            f"{who}: isolated must have the {k.shape[2]} heads of k, got {isolated.shape[2]}; take both from one "
            "key projection."
        )
    B, T = isolated.shape[:2]
    if mask is not None and (
        mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] not in (1, B) or mask.shape[1] != T
    ):
        raise ValueError(
            f"{who}: isolated_mask must be bool of shape (B|1, T) = ({B}|1, {T}), True for keys in use, got "
            f"{mask.dtype} {tuple(mask.shape)}; pass attention_mask.bool()."
        )
    if mask is not None and mask.device != q.device:
        raise ValueError(f"{who}: isolated_mask must be on {q.device} like q, got {mask.device}; move it there.")
    return 1 if block is None else -(-T // checks.count(who, "isolated_block", block, "tokens"))
