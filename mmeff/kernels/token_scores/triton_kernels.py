"""The Triton kernels of token_scores. Scores live in base 2: s2 = q.k * scale * log2(e), p = 2^(s2 - lse2).

`lse_kernel` and `rows_kernel` keep query rows and walk over the keys, the rows of a group stacked, so that a key tile
serves all query heads that read it. `columns_kernel` and `keys_kernel` keep a key tile and walk over the rows, so that
sums over rows stay in registers and nothing is added atomically. Rows are stacked head after head: row m of a group is
row m % R of its head m // R.

Imported only when this backend runs, because triton is optional and because its interpreter mode is fixed when these
functions are made.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(base, offs, stride, offs_d, stride_d, ok, D, UPCAST: tl.constexpr):
    """Load a (rows, BLOCK_D) tile; 0 where `ok` is False and beyond D."""
    tile = tl.load(base + offs[:, None] * stride + offs_d[None] * stride_d, ok[:, None] & (offs_d < D)[None], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _key_ok(mask, b, offs_n, end, stride_b, stride_n, HAS_MASK: tl.constexpr):
    """Which of these keys may be seen at all: before `end`, and not masked."""
    ok = offs_n < end
    if HAS_MASK:
        ok = ok & (tl.load(mask + b * stride_b + offs_n * stride_n, ok, other=0) != 0)
    return ok


@triton.jit
def _positions(positions, b, r, ok, stride_b, stride_r):
    """Positions of rows r, brought into int32; -1, which sees nothing, where `ok` is False."""
    x = tl.load(positions + b * stride_b + r * stride_r, ok, other=-1).to(tl.int64)
    return tl.minimum(tl.maximum(x, -1), 2147483646).to(tl.int32)


@triton.jit
def _lse2(lse, at, ok):
    """The LSE of rows in base 2; +inf, which makes p = 0, for rows that see nothing or do not exist."""
    x = tl.load(lse + at, ok, other=float("-inf"))
    return tl.where(x == float("-inf"), float("inf"), x * LOG2E)


@triton.jit
def lse_kernel(
    q, k, positions, key_mask, out,
    q_b, q_r, q_h, q_d, k_b, k_n, k_h, k_d, pos_b, pos_r, mask_b, mask_n,
    B, R, Nk, H, Hk, D, scale, keys_per_split,
    HAS_POS: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """LSE of stacked rows over one split of the keys. Grid (row blocks, splits, B * Hk); out (splits, B, H, R)."""
    split, b, kv_head = tl.program_id(1), (tl.program_id(2) // Hk).to(tl.int64), tl.program_id(2) % Hk
    group = H // Hk
    m = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    ok = m < group * R
    r, head = (m % R).to(tl.int64), kv_head * group + m // R
    queries = _tile(q + b * q_b, r * q_r + head * q_h, 1, offs_d, q_d, ok, D, UPCAST)
    end = tl.minimum((split + 1) * keys_per_split, Nk)
    pos = m
    if HAS_POS:
        pos = _positions(positions, b, r, ok, pos_b, pos_r)
        end = tl.minimum(end, tl.max(pos, 0) + 1)

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(split * keys_per_split, end, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        visible = _key_ok(key_mask, b, n, end, mask_b, mask_n, HAS_MASK)
        keys = _tile(k + b * k_b + kv_head * k_h, n, k_n, offs_d, k_d, visible, D, UPCAST)
        seen = visible[None]
        if HAS_POS:
            seen = seen & (n[None] <= pos[:, None])
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet: 2^(-inf - 0) is 0
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = new
    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(out + ((split * B + b) * H + head) * R + r, lse, ok)


@triton.jit
def columns_kernel(
    q, k, positions, key_mask, weights, lse, out,
    q_b, q_r, q_h, q_d, k_b, k_n, k_h, k_d, pos_b, pos_r, mask_b, mask_n, w_b, w_h, w_r,
    R, Nk, H, Hk, D, scale,
    HAS_POS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted sums over rows, a key tile at a time. Grid (key blocks, B * Hk); out (B, H, Nk)."""
    b, kv_head = (tl.program_id(1) // Hk).to(tl.int64), tl.program_id(1) % Hk
    group = H // Hk
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    visible = _key_ok(key_mask, b, n, Nk, mask_b, mask_n, HAS_MASK)
    keys = _tile(k + b * k_b + kv_head * k_h, n, k_n, offs_d, k_d, visible, D, UPCAST)
    first = 0
    if HAS_POS:
        first = _first_rows(positions, b, tl.program_id(0) * BLOCK_N, R, pos_b, pos_r, BLOCK_R)
    for g in range(group):
        head = kv_head * group + g
        columns = tl.zeros([BLOCK_N], tl.float32)
        for start in range(first, R, BLOCK_R):
            r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
            lse2 = _lse2(lse, (b * H + head) * R + r, r < R)
            queries = _tile(q + b * q_b + head * q_h, r, q_r, offs_d, q_d, lse2 != float("inf"), D, UPCAST)
            seen = visible[:, None] & (r < R)[None]
            if HAS_POS:
                seen = seen & (n[:, None] <= _positions(positions, b, r, r < R, pos_b, pos_r)[None])
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(tl.where(seen, s, float("-inf")) - lse2[None])
            if HAS_WEIGHTS:
                p *= tl.load(weights + b * w_b + head * w_h + r * w_r, r < R, other=0.0).to(tl.float32)[None]
            columns += tl.sum(p, 1)
        tl.store(out + (b * H + head) * Nk + n, columns, n < Nk)


@triton.jit
def _first_rows(positions, b, first_key, R, pos_b, pos_r, BLOCK_R: tl.constexpr):
    """Where the first block of rows starts that reaches `first_key`; rows before it need not be visited."""
    first = 0
    for start in range(0, R, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        reach = tl.max(_positions(positions, b, r, r < R, pos_b, pos_r), 0)
        first = tl.where((first == start) & (reach < first_key), start + BLOCK_R, first)
    return first


@triton.jit
def rows_kernel(
    q, k, positions, key_mask, weights, lse, grad, per_row, dq,
    q_b, q_r, q_h, q_d, k_b, k_n, k_h, k_d, pos_b, pos_r, mask_b, mask_n, w_b, w_h, w_r,
    R, Nk, H, Hk, D, scale,
    HAS_POS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    CENTRED: tl.constexpr, NEED_ROWS: tl.constexpr, NEED_Q: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of stacked rows. Grid (row blocks, B * Hk).

    First pass: per_row (B, H, R) = sum_j p_rj g_j. Second pass, if NEED_Q: dq (B, R, H, D), where CENTRED takes
    per_row off the gradient because the rows are a softmax.
    """
    b, kv_head = (tl.program_id(1) // Hk).to(tl.int64), tl.program_id(1) % Hk
    group = H // Hk
    m = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    ok = m < group * R
    r, head = (m % R).to(tl.int64), kv_head * group + m // R
    at = (b * H + head) * R + r
    lse2 = _lse2(lse, at, ok)
    queries = _tile(q + b * q_b, r * q_r + head * q_h, 1, offs_d, q_d, lse2 != float("inf"), D, UPCAST)
    grad_rows = grad + (b * H + head) * Nk
    end = Nk
    pos = m
    if HAS_POS:
        pos = _positions(positions, b, r, ok, pos_b, pos_r)
        end = tl.minimum(end, tl.max(pos, 0) + 1)

    expected = tl.zeros([BLOCK_R], tl.float32)
    if NEED_ROWS or CENTRED:
        for start in range(0, end, BLOCK_N):
            n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            visible = _key_ok(key_mask, b, n, end, mask_b, mask_n, HAS_MASK)
            keys = _tile(k + b * k_b + kv_head * k_h, n, k_n, offs_d, k_d, visible, D, UPCAST)
            seen = visible[None]
            if HAS_POS:
                seen = seen & (n[None] <= pos[:, None])
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(tl.where(seen, s, float("-inf")) - lse2[:, None])
            g = tl.load(grad_rows[:, None] + n[None], ok[:, None] & visible[None], other=0.0)
            expected += tl.sum(p * g, 1)
        tl.store(per_row + at, expected, ok)

    if NEED_Q:
        centre = expected if CENTRED else tl.zeros([BLOCK_R], tl.float32)
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in range(0, end, BLOCK_N):
            n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            visible = _key_ok(key_mask, b, n, end, mask_b, mask_n, HAS_MASK)
            keys = _tile(k + b * k_b + kv_head * k_h, n, k_n, offs_d, k_d, visible, D, UPCAST)
            seen = visible[None]
            if HAS_POS:
                seen = seen & (n[None] <= pos[:, None])
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(tl.where(seen, s, float("-inf")) - lse2[:, None])
            g = tl.load(grad_rows[:, None] + n[None], ok[:, None] & visible[None], other=0.0)
            # p of order 1 / Nk would drown in float16: the product keeps the range of float32 (as TF32 for half inputs)
            total += tl.dot(p * (g - centre[:, None]), keys.to(tl.float32), input_precision=PRECISION)
        factor = tl.full([BLOCK_R], scale, tl.float32)
        if HAS_WEIGHTS:
            factor *= tl.load(weights + b * w_b + head * w_h + r * w_r, ok, other=0.0).to(tl.float32)
        out = dq + (b * R + r) * H * D + head * D
        tl.store(out[:, None] + offs_d[None], total * factor[:, None], ok[:, None] & (offs_d < D)[None])


@triton.jit
def keys_kernel(
    q, k, positions, key_mask, weights, lse, grad, per_row, dk,
    q_b, q_r, q_h, q_d, k_b, k_n, k_h, k_d, pos_b, pos_r, mask_b, mask_n, w_b, w_h, w_r,
    R, Nk, H, Hk, D, scale,
    HAS_POS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a key tile, summed over the rows of all heads that read it. Grid (key blocks, B * Hk)."""
    b, kv_head = (tl.program_id(1) // Hk).to(tl.int64), tl.program_id(1) % Hk
    group = H // Hk
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    visible = _key_ok(key_mask, b, n, Nk, mask_b, mask_n, HAS_MASK)
    keys = _tile(k + b * k_b + kv_head * k_h, n, k_n, offs_d, k_d, visible, D, UPCAST)
    first = 0
    if HAS_POS:
        first = _first_rows(positions, b, tl.program_id(0) * BLOCK_N, R, pos_b, pos_r, BLOCK_R)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(group):
        head = kv_head * group + g
        g_keys = tl.load(grad + (b * H + head) * Nk + n, visible, other=0.0)
        for start in range(first, R, BLOCK_R):
            r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
            at = (b * H + head) * R + r
            lse2 = _lse2(lse, at, r < R)
            queries = _tile(q + b * q_b + head * q_h, r, q_r, offs_d, q_d, lse2 != float("inf"), D, UPCAST)
            seen = visible[:, None] & (r < R)[None]
            if HAS_POS:
                seen = seen & (n[:, None] <= _positions(positions, b, r, r < R, pos_b, pos_r)[None])
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(tl.where(seen, s, float("-inf")) - lse2[None])
            ds = p * g_keys[:, None]
            if CENTRED:
                ds = p * (g_keys[:, None] - tl.load(per_row + at, r < R, other=0.0)[None])
            if HAS_WEIGHTS:
                ds *= tl.load(weights + b * w_b + head * w_h + r * w_r, r < R, other=0.0).to(tl.float32)[None]
            total += tl.dot(ds, queries.to(tl.float32), input_precision=PRECISION)
    out = dk + (b * Nk + n) * Hk * D + kv_head * D
    tl.store(out[:, None] + offs_d[None], total * scale, (n < Nk)[:, None] & (offs_d < D)[None])
