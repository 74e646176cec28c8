"""The Triton kernels of block_sparse_attention: forward, backward, and the merge of long rows that ran in pieces.

Imported only when a Triton backend runs, because triton is optional and because its interpreter mode is fixed when these
functions are made. triton_impl.py prepares the arguments.

Every kernel walks lists, never the grid of all blocks. A program takes one *item*: a row of the layout, or one piece of a
long row. It keeps a tile of that row's tokens, loads the tokens of the listed blocks tile by tile, the partial entries in
a first loop and the full ones in a second, so that only the first pays for the predicate. dK/dV run the same way over the
transposed layout, where rows are key blocks; "row" and "col" below are therefore queries and keys in `forward` and `dq`,
and keys and queries in `dkdv`. No program writes what another one writes: results are deterministic.

Names: ROW_BLOCK, COL_BLOCK are the layout's blocks, ROW_TILE, COL_TILE what a program handles at a time (powers of two),
ROW_SUBS, COL_SUBS tiles per block. ROW_MASK, COL_MASK: 0 if every slot of every tile holds a token in use, 1 if that fails
only where tiles stick out of blocks or of the sequence, 2 if the layout has padding elsewhere. D channels are padded to BD. AXES says what partial entries attend to: -1 there are none, 0 a bitmap, else bounds on as many
axes. Scores are kept in units of log2, with scale * log2(e) folded into them, because exp2 is what the hardware has.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Counts that differ from layout to layout; no layout of a running model should compile a kernel again.
VARYING = ["n_items", "shared", "blocks"]


# -------------------------------------------------------------------- what all kernels share


@triton.jit
def _item(items, n_items, blocks, lists_h, HX, GX, ROW_SUBS: tl.constexpr):
    """Decode the program id. Tiles of a block and heads of a group run next to each other: they read the same keys.

    Returns batch, head, block of the row, tile of the block, index of the (batch, head) that shares this item, and the
    item's piece, pieces and slot.
    """
    pid = tl.program_id(0)
    sub = pid % ROW_SUBS
    rest = pid // ROW_SUBS
    g = rest % GX
    rest = rest // GX
    item = items + (rest % n_items) * 4
    rest = rest // n_items  # batch * HX + kv head, where the items are shared by them
    row, piece, pieces, slot = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    b = rest // HX + row // (blocks * lists_h)
    h = (rest % HX) * GX + g + row // blocks % lists_h
    return b, h, row % blocks, sub, rest * GX + g, piece, pieces, slot


@triton.jit
def _share(base, row_start, n_partial, n_full, partial_start, col_idx, piece, pieces):
    """Return this piece of the list of a base row: its entries, first slab, and the ends of its two loops."""
    partial = tl.load(n_partial + base)
    n = (partial + tl.load(n_full + base)).to(tl.int64)
    lo = (n * piece // pieces).to(tl.int32)
    hi = (n * (piece + 1) // pieces).to(tl.int32)
    cols = col_idx + tl.load(row_start + base)
    return cols, tl.load(partial_start + base), lo, tl.minimum(hi, partial), tl.maximum(lo, partial), hi


@triton.jit
def _ahead(cols, entry, hi, col_valid, COL_MASK: tl.constexpr):
    """Return the block of a list's entry and, if there is padding, how many of its tokens are in use.

    The loops call it an iteration ahead. Were the addresses of keys and values to wait for a load of the same iteration,
    the compiler would spend pipeline stages on that load, and no key would be on its way while the last one is used.
    """
    col = tl.load(cols + entry, mask=entry < hi, other=0)
    return col, tl.load(col_valid + col) if COL_MASK == 2 else col


@triton.jit
def _used(col, valid, n_cols, COL_BLOCK: tl.constexpr, COL_MASK: tl.constexpr):
    """Return how many tokens of a block are in use, given what `_ahead` returned for it."""
    return valid if COL_MASK == 2 else tl.minimum(n_cols - col * COL_BLOCK, COL_BLOCK)


@triton.jit
def _tile(base, slots, used, stride_n, stride_d, D: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr):
    """Load (slots, BD) of a sequence from `base`, zero beyond `used` slots and beyond D channels."""
    d = tl.arange(0, BD)
    at = base + slots[:, None] * stride_n + d[None, :] * stride_d
    if MASK:
        if D == BD:
            return tl.load(at, mask=slots[:, None] < used, other=0.0)
        return tl.load(at, mask=(slots[:, None] < used) & (d[None, :] < D), other=0.0)
    if D == BD:
        return tl.load(at)
    return tl.load(at, mask=d[None, :] < D, other=0.0)


@triton.jit
def _attends(
    rows, cols, row_block, col_block, slab, bitmap, row_bounds, col_bounds, n_rows, n_cols,
    ROW_BLOCK: tl.constexpr, COL_BLOCK: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Return which pairs of a partial entry attend, for slots `rows` and `cols` of its two blocks."""
    if AXES == 0:
        inside = (rows[:, None] < ROW_BLOCK) & (cols[None, :] < COL_BLOCK)
        at = bitmap + slab * (ROW_BLOCK * COL_BLOCK) + rows[:, None] * COL_BLOCK + cols[None, :]
        return tl.load(at, mask=inside, other=0) != 0
    i, j = row_block * ROW_BLOCK + rows, col_block * COL_BLOCK + cols
    keep = (i < n_rows)[:, None] & (j < n_cols)[None, :]
    for axis in tl.static_range(AXES):
        row_lo = tl.load(row_bounds + 2 * axis * n_rows + i, mask=i < n_rows, other=0)
        row_hi = tl.load(row_bounds + (2 * axis + 1) * n_rows + i, mask=i < n_rows, other=0)
        col_lo = tl.load(col_bounds + 2 * axis * n_cols + j, mask=j < n_cols, other=0)
        col_hi = tl.load(col_bounds + (2 * axis + 1) * n_cols + j, mask=j < n_cols, other=0)
        keep = keep & (row_lo[:, None] <= col_hi[None, :]) & (col_lo[None, :] <= row_hi[:, None])
    return keep


@triton.jit
def _store(base, x, rows, n, stride, D: tl.constexpr, BD: tl.constexpr):
    """Store (rows, D) of x at `base`, for the first n rows."""
    d = tl.arange(0, BD)
    inside = (rows[:, None] < n) & (d[None, :] < D)
    tl.store(base + rows[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------- forward


@triton.jit
def _forward_loop(
    acc, total, top, q, k, v, cols, lo, hi, slab, rows, row_block, col_valid, bitmap, row_bounds, col_bounds,
    n_rows, n_cols, k_n, k_d, v_n, v_d, scale, D: tl.constexpr, BD: tl.constexpr, ROW_BLOCK: tl.constexpr,
    COL_BLOCK: tl.constexpr, COL_TILE: tl.constexpr, COL_SUBS: tl.constexpr, COL_MASK: tl.constexpr,
    AXES: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the entries lo..hi into the running sum `acc`, its normaliser `total` and the largest score `top`."""
    slots = tl.arange(0, COL_TILE)
    next_col, next_valid = _ahead(cols, lo, hi, col_valid, COL_MASK)
    for j in range(lo * COL_SUBS, hi * COL_SUBS):
        col, first = next_col, j % COL_SUBS * COL_TILE
        used = _used(col, next_valid, n_cols, COL_BLOCK, COL_MASK) - first
        next_col, next_valid = _ahead(cols, (j + 1) // COL_SUBS, hi, col_valid, COL_MASK)
        at = col.to(tl.int64) * COL_BLOCK + first
        keys = _tile(k + at * k_n, slots, used, k_n, k_d, D, BD, COL_MASK)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if PARTIAL:
            keep = _attends(
                rows, first + slots, row_block, col, slab + j // COL_SUBS, bitmap, row_bounds, col_bounds, n_rows, n_cols,
                ROW_BLOCK, COL_BLOCK, AXES,
            )  # fmt: skip
            scores = tl.where(keep, scores, float("-inf"))
        if COL_MASK:
            scores = tl.where(slots[None, :] < used, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        # a row that has attended to nothing yet: -inf - -inf would be NaN
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale - finite_top[:, None])
        fade = tl.exp2(top - finite_top)
        total = total * fade + tl.sum(weights, 1)
        values = _tile(v + at * v_n, slots, used, v_n, v_d, D, BD, COL_MASK)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=VARYING)
def forward(
    q, k, v, out, lse, piece_out, piece_lse, items, n_items, HX, GX, H, group, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d,
    row_of, row_start, n_partial, n_full, partial_start, col_idx, bitmap, row_bounds, col_bounds, row_valid, col_valid,
    row_valid_b, col_valid_b, n_rows, n_cols, blocks, lists_b, lists_h, shared,
    D: tl.constexpr, BD: tl.constexpr, ROW_BLOCK: tl.constexpr, COL_BLOCK: tl.constexpr, ROW_TILE: tl.constexpr,
    COL_TILE: tl.constexpr, ROW_SUBS: tl.constexpr, COL_SUBS: tl.constexpr, ROW_MASK: tl.constexpr,
    COL_MASK: tl.constexpr, AXES: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, WANT_LSE: tl.constexpr,
    NEGATE: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v over the listed pairs. `scale` is positive and in log2; NEGATE turns its sign."""
    b, h, block, sub, sharer, piece, pieces, slot = _item(items, n_items, blocks, lists_h, HX, GX, ROW_SUBS)
    base = tl.load(row_of + ((b % lists_b) * lists_h + h % lists_h) * blocks + block)
    cols, slab, lo, partial_hi, full_lo, hi = _share(
        base, row_start, n_partial, n_full, partial_start, col_idx, piece, pieces
    )
    slots, first = tl.arange(0, ROW_TILE), sub * ROW_TILE
    row = block * ROW_BLOCK + first  # position of the tile in the sequence
    used = ROW_TILE
    if ROW_MASK:
        used = tl.load(row_valid + b * row_valid_b + block) - first
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    q_tile = _tile(q + b64 * q_b + h64 * q_h + row.to(tl.int64) * q_n, slots, used, q_n, q_d, D, BD, ROW_MASK)
    if NEGATE:  # so that the largest score can be found before it is scaled
        q_tile = -q_tile
    k += b64 * k_b + h64 // group * k_h
    v += b64 * v_b + h64 // group * v_h
    col_valid += b * col_valid_b

    acc = tl.zeros([ROW_TILE, BD], tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)
    top = tl.full([ROW_TILE], float("-inf"), tl.float32)
    if AXES >= 0:
        acc, total, top = _forward_loop(
            acc, total, top, q_tile, k, v, cols, lo, partial_hi, slab, first + slots, block, col_valid, bitmap,
            row_bounds, col_bounds, n_rows, n_cols, k_n, k_d, v_n, v_d, scale, D, BD, ROW_BLOCK, COL_BLOCK, COL_TILE,
            COL_SUBS, COL_MASK, AXES, True, PRECISION,
        )  # fmt: skip
    acc, total, top = _forward_loop(
        acc, total, top, q_tile, k, v, cols, full_lo, hi, slab, first + slots, block, col_valid, bitmap,
        row_bounds, col_bounds, n_rows, n_cols, k_n, k_d, v_n, v_d, scale, D, BD, ROW_BLOCK, COL_BLOCK, COL_TILE,
        COL_SUBS, COL_MASK, AXES, False, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    if ROW_MASK:
        empty = empty | (slots >= used)
    # selected, not multiplied: the memory of a query that is not in use may hold NaN
    acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    log2_total = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    inside = tl.minimum(ROW_BLOCK - first, n_rows - row)
    if slot < 0:
        at = (b64 * n_rows + row) * H + h
        _store(out + at * D, acc, slots, inside, H * D, D, BD)
        if WANT_LSE:
            tl.store(lse + (b64 * H + h) * n_rows + row + slots, log2_total * LN2, mask=slots < inside)
    else:
        if SPLIT:
            at = ((slot + piece).to(tl.int64) * shared + sharer) * ROW_BLOCK + first
            _store(piece_out + at * D, acc, slots, inside, D, D, BD)
            tl.store(piece_lse + at + slots, log2_total, mask=slots < inside)


@triton.jit(do_not_specialize=VARYING)
def merge(
    piece_out, piece_lse, out, lse, items, n_items, HX, GX, H, n_rows, blocks, lists_h, shared,
    D: tl.constexpr, BD: tl.constexpr, ROW_BLOCK: tl.constexpr, ROW_TILE: tl.constexpr, ROW_SUBS: tl.constexpr,
    WANT_LSE: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of each long row by their log-sum-exp."""
    b, h, block, sub, sharer, piece, pieces, slot = _item(items, n_items, blocks, lists_h, HX, GX, ROW_SUBS)
    slots, first = tl.arange(0, ROW_TILE), sub * ROW_TILE
    row = block * ROW_BLOCK + first
    inside = tl.minimum(ROW_BLOCK - first, n_rows - row)
    acc = tl.zeros([ROW_TILE, BD], tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)
    top = tl.full([ROW_TILE], float("-inf"), tl.float32)
    for p in range(0, pieces):
        at = ((slot + p).to(tl.int64) * shared + sharer) * ROW_BLOCK + first
        x = _tile(piece_out + at * D, slots, inside, D, 1, D, BD, True)
        log2_total = tl.load(piece_lse + at + slots, mask=slots < inside, other=float("-inf"))
        new_top = tl.maximum(top, log2_total)
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - finite_top), tl.exp2(log2_total - finite_top)
        acc = acc * fade[:, None] + x * weight[:, None]
        total = total * fade + weight
        top = new_top
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    at = (b.to(tl.int64) * n_rows + row) * H + h
    _store(out + at * D, acc, slots, inside, H * D, D, BD)
    if WANT_LSE:
        log2_total = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(lse + (b.to(tl.int64) * H + h) * n_rows + row + slots, log2_total * LN2, mask=slots < inside)


# -------------------------------------------------------------------- backward


@triton.jit
def delta(
    out, dout, dlse, result, n_rows, H, o_b, o_n, o_h, o_d, do_b, do_n, do_h, do_d, dl_b, dl_h, dl_n,
    D: tl.constexpr, BD: tl.constexpr, ROW_TILE: tl.constexpr, HAS_DOUT: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """result[b, h, i] = sum_d dout * out - dlse: what the softmax subtracts from the gradient of each weight."""
    tiles = tl.cdiv(n_rows, ROW_TILE)
    bh, row = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * ROW_TILE
    b, h = bh // H, bh % H
    slots, inside = tl.arange(0, ROW_TILE), n_rows - row
    x = tl.zeros([ROW_TILE], tl.float32)
    if HAS_DOUT:
        o = _tile(out + b * o_b + h * o_h + row.to(tl.int64) * o_n, slots, inside, o_n, o_d, D, BD, True)
        do = _tile(dout + b * do_b + h * do_h + row.to(tl.int64) * do_n, slots, inside, do_n, do_d, D, BD, True)
        x = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        at = dlse + b * dl_b + h * dl_h + (row + slots).to(tl.int64) * dl_n
        x -= tl.load(at, mask=slots < inside, other=0.0)
    tl.store(result + bh * n_rows + row + slots, x, mask=slots < inside)


@triton.jit
def _statistics(lse, delta, slots, used, MASK: tl.constexpr):
    """Load log-sum-exp, in log2, and delta. Queries that attend to nothing get +inf, which makes their weights 0."""
    if MASK:
        total = tl.load(lse + slots, mask=slots < used, other=float("-inf"))
        correction = tl.load(delta + slots, mask=slots < used, other=0.0)
    else:
        total, correction = tl.load(lse + slots), tl.load(delta + slots)
    return tl.where(total == float("-inf"), float("inf"), total * LOG2E), correction


@triton.jit
def _dq_loop(
    acc, q, do, total, correction, k, v, cols, lo, hi, slab, rows, row_block, col_valid, bitmap, row_bounds, col_bounds,
    n_rows, n_cols, k_n, k_d, v_n, v_d, scale, D: tl.constexpr, BD: tl.constexpr, ROW_BLOCK: tl.constexpr,
    COL_BLOCK: tl.constexpr, COL_TILE: tl.constexpr, COL_SUBS: tl.constexpr, COL_MASK: tl.constexpr,
    AXES: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slots = tl.arange(0, COL_TILE)
    next_col, next_valid = _ahead(cols, lo, hi, col_valid, COL_MASK)
    for j in range(lo * COL_SUBS, hi * COL_SUBS):
        col, first = next_col, j % COL_SUBS * COL_TILE
        used = _used(col, next_valid, n_cols, COL_BLOCK, COL_MASK) - first
        next_col, next_valid = _ahead(cols, (j + 1) // COL_SUBS, hi, col_valid, COL_MASK)
        at = col.to(tl.int64) * COL_BLOCK + first
        keys = _tile(k + at * k_n, slots, used, k_n, k_d, D, BD, COL_MASK)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - total[:, None])
        if PARTIAL:
            keep = _attends(
                rows, first + slots, row_block, col, slab + j // COL_SUBS, bitmap, row_bounds, col_bounds, n_rows, n_cols,
                ROW_BLOCK, COL_BLOCK, AXES,
            )  # fmt: skip
            weights = tl.where(keep, weights, 0.0)
        if COL_MASK:
            weights = tl.where(slots[None, :] < used, weights, 0.0)
        values = _tile(v + at * v_n, slots, used, v_n, v_d, D, BD, COL_MASK)
        dweights = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        dscores = weights * (dweights - correction[:, None])
        acc = tl.dot(dscores.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=VARYING)
def dq(
    q, k, v, dout, lse, delta, grad, piece_grad, items, n_items, HX, GX, H, group, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, do_b, do_n, do_h, do_d,
    row_of, row_start, n_partial, n_full, partial_start, col_idx, bitmap, row_bounds, col_bounds, row_valid, col_valid,
    row_valid_b, col_valid_b, n_rows, n_cols, blocks, lists_b, lists_h, shared,
    D: tl.constexpr, BD: tl.constexpr, ROW_BLOCK: tl.constexpr, COL_BLOCK: tl.constexpr, ROW_TILE: tl.constexpr,
    COL_TILE: tl.constexpr, ROW_SUBS: tl.constexpr, COL_SUBS: tl.constexpr, ROW_MASK: tl.constexpr,
    COL_MASK: tl.constexpr, AXES: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq = scale dS k, over the lists of the query blocks."""
    b, h, block, sub, sharer, piece, pieces, slot = _item(items, n_items, blocks, lists_h, HX, GX, ROW_SUBS)
    base = tl.load(row_of + ((b % lists_b) * lists_h + h % lists_h) * blocks + block)
    cols, slab, lo, partial_hi, full_lo, hi = _share(
        base, row_start, n_partial, n_full, partial_start, col_idx, piece, pieces
    )
    slots, first = tl.arange(0, ROW_TILE), sub * ROW_TILE
    row = block * ROW_BLOCK + first
    used = ROW_TILE
    if ROW_MASK:
        used = tl.load(row_valid + b * row_valid_b + block) - first
    b64, h64, row64 = b.to(tl.int64), h.to(tl.int64), row.to(tl.int64)
    q_tile = _tile(q + b64 * q_b + h64 * q_h + row64 * q_n, slots, used, q_n, q_d, D, BD, ROW_MASK)
    do_tile = _tile(dout + b64 * do_b + h64 * do_h + row64 * do_n, slots, used, do_n, do_d, D, BD, ROW_MASK)
    statistics = (b64 * H + h) * n_rows + row
    total, correction = _statistics(lse + statistics, delta + statistics, slots, used, ROW_MASK)
    k += b64 * k_b + h64 // group * k_h
    v += b64 * v_b + h64 // group * v_h
    col_valid += b * col_valid_b

    acc = tl.zeros([ROW_TILE, BD], tl.float32)
    if AXES >= 0:
        acc = _dq_loop(
            acc, q_tile, do_tile, total, correction, k, v, cols, lo, partial_hi, slab, first + slots, block, col_valid,
            bitmap, row_bounds, col_bounds, n_rows, n_cols, k_n, k_d, v_n, v_d, scale, D, BD, ROW_BLOCK, COL_BLOCK,
            COL_TILE, COL_SUBS, COL_MASK, AXES, True, PRECISION,
        )  # fmt: skip
    acc = _dq_loop(
        acc, q_tile, do_tile, total, correction, k, v, cols, full_lo, hi, slab, first + slots, block, col_valid,
        bitmap, row_bounds, col_bounds, n_rows, n_cols, k_n, k_d, v_n, v_d, scale, D, BD, ROW_BLOCK, COL_BLOCK,
        COL_TILE, COL_SUBS, COL_MASK, AXES, False, PRECISION,
    )  # fmt: skip

    acc *= scale
    inside = tl.minimum(ROW_BLOCK - first, n_rows - row)
    if slot < 0:
        _store(grad + ((b64 * n_rows + row) * H + h) * D, acc, slots, inside, H * D, D, BD)
    else:
        if SPLIT:
            at = ((slot + piece).to(tl.int64) * shared + sharer) * ROW_BLOCK + first
            _store(piece_grad + at * D, acc, slots, inside, D, D, BD)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, q, do, lse, delta, cols, lo, hi, slab, rows, row_block, col_valid, bitmap, row_bounds, col_bounds,
    n_rows, n_cols, q_n, q_d, do_n, do_d, scale, D: tl.constexpr, BD: tl.constexpr, ROW_BLOCK: tl.constexpr,
    COL_BLOCK: tl.constexpr, COL_TILE: tl.constexpr, COL_SUBS: tl.constexpr, COL_MASK: tl.constexpr,
    AXES: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
):  # fmt: skip
    slots = tl.arange(0, COL_TILE)
    next_col, next_valid = _ahead(cols, lo, hi, col_valid, COL_MASK)
    for j in range(lo * COL_SUBS, hi * COL_SUBS):
        col, first = next_col, j % COL_SUBS * COL_TILE
        used = _used(col, next_valid, n_cols, COL_BLOCK, COL_MASK) - first
        next_col, next_valid = _ahead(cols, (j + 1) // COL_SUBS, hi, col_valid, COL_MASK)
        at = col.to(tl.int64) * COL_BLOCK + first
        queries = _tile(q + at * q_n, slots, used, q_n, q_d, D, BD, COL_MASK)
        total, correction = _statistics(lse + at, delta + at, slots, used, COL_MASK)
        # transposed scores, (keys, queries): both products below then take their left operand as it is
        scores = tl.dot(k, tl.trans(queries), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - total[None, :])
        if PARTIAL:
            keep = _attends(
                rows, first + slots, row_block, col, slab + j // COL_SUBS, bitmap, row_bounds, col_bounds, n_rows, n_cols,
                ROW_BLOCK, COL_BLOCK, AXES,
            )  # fmt: skip
            weights = tl.where(keep, weights, 0.0)
        do_tile = _tile(do + at * do_n, slots, used, do_n, do_d, D, BD, COL_MASK)
        if NEED_DV:
            dv = tl.dot(weights.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        if NEED_DK:
            dweights = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)
            dscores = weights * (dweights - correction[None, :])
            dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def dkdv(
    q, k, v, dout, lse, delta, grad_k, grad_v, piece_dk, piece_dv, items, n_items, HX, GX, H, Hk, scale,
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, do_b, do_n, do_h, do_d,
    row_of, row_start, n_partial, n_full, partial_start, col_idx, bitmap, row_bounds, col_bounds, row_valid, col_valid,
    row_valid_b, col_valid_b, n_rows, n_cols, blocks, lists_b, lists_h, shared,
    D: tl.constexpr, BD: tl.constexpr, ROW_BLOCK: tl.constexpr, COL_BLOCK: tl.constexpr, ROW_TILE: tl.constexpr,
    COL_TILE: tl.constexpr, ROW_SUBS: tl.constexpr, COL_SUBS: tl.constexpr, ROW_MASK: tl.constexpr,
    COL_MASK: tl.constexpr, AXES: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = P^T dout, over the transposed lists of every query head of the group."""
    # items list (batch, kv head, key block); the lists themselves are per query head or shared by all
    items_h = (lists_h + GROUP - 1) // GROUP
    b, hk, block, sub, sharer, piece, pieces, slot = _item(items, n_items, blocks, items_h, HX, GX, ROW_SUBS)
    slots, first = tl.arange(0, ROW_TILE), sub * ROW_TILE
    row = block * ROW_BLOCK + first
    used = ROW_TILE
    if ROW_MASK:
        used = tl.load(row_valid + b * row_valid_b + block) - first
    b64, hk64, row64 = b.to(tl.int64), hk.to(tl.int64), row.to(tl.int64)
    k_tile = _tile(k + b64 * k_b + hk64 * k_h + row64 * k_n, slots, used, k_n, k_d, D, BD, ROW_MASK)
    v_tile = _tile(v + b64 * v_b + hk64 * v_h + row64 * v_n, slots, used, v_n, v_d, D, BD, ROW_MASK)
    col_valid += b * col_valid_b

    dk_acc = tl.zeros([ROW_TILE, BD], tl.float32)
    dv_acc = tl.zeros([ROW_TILE, BD], tl.float32)
    for g in range(GROUP):
        h64 = hk64 * GROUP + g
        base = tl.load(row_of + ((b % lists_b) * lists_h + h64 % lists_h) * blocks + block)
        cols, slab, lo, partial_hi, full_lo, hi = _share(
            base, row_start, n_partial, n_full, partial_start, col_idx, piece, pieces
        )
        q_h0 = q + b64 * q_b + h64 * q_h
        do_h0 = dout + b64 * do_b + h64 * do_h
        statistics = (b64 * H + h64) * n_cols
        if AXES >= 0:
            dk_acc, dv_acc = _dkdv_loop(
                dk_acc, dv_acc, k_tile, v_tile, q_h0, do_h0, lse + statistics, delta + statistics, cols, lo, partial_hi,
                slab, first + slots, block, col_valid, bitmap, row_bounds, col_bounds, n_rows, n_cols, q_n, q_d, do_n,
                do_d, scale, D, BD, ROW_BLOCK, COL_BLOCK, COL_TILE, COL_SUBS, COL_MASK, AXES, True, PRECISION,
                NEED_DK, NEED_DV,
            )  # fmt: skip
        dk_acc, dv_acc = _dkdv_loop(
            dk_acc, dv_acc, k_tile, v_tile, q_h0, do_h0, lse + statistics, delta + statistics, cols, full_lo, hi,
            slab, first + slots, block, col_valid, bitmap, row_bounds, col_bounds, n_rows, n_cols, q_n, q_d, do_n,
            do_d, scale, D, BD, ROW_BLOCK, COL_BLOCK, COL_TILE, COL_SUBS, COL_MASK, AXES, False, PRECISION,
            NEED_DK, NEED_DV,
        )  # fmt: skip

    dk_acc *= scale
    if ROW_MASK:  # selected, not multiplied: the padded keys' scores may have overflowed
        in_use = (slots < used)[:, None]
        dk_acc, dv_acc = tl.where(in_use, dk_acc, 0.0), tl.where(in_use, dv_acc, 0.0)
    inside = tl.minimum(ROW_BLOCK - first, n_rows - row)
    if slot < 0:
        at = (b64 * n_rows + row) * Hk + hk
        if NEED_DK:
            _store(grad_k + at * D, dk_acc, slots, inside, Hk * D, D, BD)
        if NEED_DV:
            _store(grad_v + at * D, dv_acc, slots, inside, Hk * D, D, BD)
    else:
        if SPLIT:
            at = ((slot + piece).to(tl.int64) * shared + sharer) * ROW_BLOCK + first
            if NEED_DK:
                _store(piece_dk + at * D, dk_acc, slots, inside, D, D, BD)
            if NEED_DV:
                _store(piece_dv + at * D, dv_acc, slots, inside, D, D, BD)


@triton.jit(do_not_specialize=VARYING)
def add_pieces(
    piece_grad, grad, items, n_items, HX, GX, H, n_rows, blocks, lists_h, shared,
    D: tl.constexpr, BD: tl.constexpr, ROW_BLOCK: tl.constexpr, ROW_TILE: tl.constexpr, ROW_SUBS: tl.constexpr,
):  # fmt: skip
    """Add the gradients that the pieces of each long row made, always in the same order."""
    b, h, block, sub, sharer, piece, pieces, slot = _item(items, n_items, blocks, lists_h, HX, GX, ROW_SUBS)
    slots, first = tl.arange(0, ROW_TILE), sub * ROW_TILE
    row = block * ROW_BLOCK + first
    inside = tl.minimum(ROW_BLOCK - first, n_rows - row)
    acc = tl.zeros([ROW_TILE, BD], tl.float32)
    for p in range(0, pieces):
        at = ((slot + p).to(tl.int64) * shared + sharer) * ROW_BLOCK + first
        acc += _tile(piece_grad + at * D, slots, inside, D, 1, D, BD, True)
    _store(grad + ((b.to(tl.int64) * n_rows + row) * H + h) * D, acc, slots, inside, H * D, D, BD)
