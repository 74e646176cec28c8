"""The Triton kernels of neighborhood_attention. Scores live in base 2: s2 = (q.k * scale + bias) * log2(e), p = 2^(s2 - lse2).

Every grid is three-dimensional here; missing axes lead, with length 1. A program owns a box of positions of one dilation
class, queries or keys, and walks over the boxes of the other kind that its windows reach: the first and the last position
of the box give the range on each axis, since windows never move backwards. Within the range every pair is masked by the
rule, which each axis reads from its table: row 0 and 1 hold the first key of a query's window and the one behind its
last, rows 2 and 3 the same of the queries that see a key; (4, dilation, n) int32, by class and class position.

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
def _axis(table, r, L, d, n, first, T: tl.constexpr, a, ROW: tl.constexpr):
    """One axis of a box: its positions, which exist, the bounds of each, and the range of them all."""
    length = (L - r + d - 1) // d  # of the class
    pos = first + a
    ok = pos < length
    lower, upper = table + (ROW * d + r) * n, table + ((ROW + 1) * d + r) * n
    lo = tl.load(lower + pos, ok, other=0)
    hi = tl.load(upper + pos, ok, other=0)
    some = first < length
    start = tl.load(lower + first, some, other=0)
    end = tl.load(upper + tl.minimum(first + T, length) - 1, some, other=0)
    return pos, ok, lo, hi, start, end


@triton.jit
def _tile(base, token, stride, offs_d, ok, D, UPCAST: tl.constexpr):
    """Load a (tokens, BLOCK_D) tile; 0 where `ok` is False and beyond D."""
    tile = tl.load(base + token[:, None] * stride + offs_d[None], ok[:, None] & (offs_d < D)[None], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _token(p0, p1, p2, r0, r1, r2, d0, d1, d2, L1, L2):
    return ((p0 * d0 + r0).to(tl.int64) * L1 + p1 * d1 + r1) * L2 + p2 * d2 + r2


@triton.jit
def _bias_at(head, j0, j1, j2, p0, p1, p2, w0, w1, w2):
    """Index of the relative bias of keys j to queries p; shapes broadcast."""
    o0, o1, o2 = j0 - p0 + w0 - 1, j1 - p1 + w1 - 1, j2 - p2 + w2 - 1
    return ((head * (2 * w0 - 1) + o0) * (2 * w1 - 1) + o1) * (2 * w2 - 1) + o2


@triton.jit
def forward_kernel(
    q, k, v, bias, ek, ev, out, lse, t0, t1, t2,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, ek_b, ek_n, ek_h, ev_b, ev_n, ev_h,
    L0, L1, L2, d0, d1, d2, n0, n1, n2, w0, w1, w2, X, H, Hk, D, scale,
    HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (query boxes, B * H, classes): out (B, N, H, D) and lse (B, H, N)."""
    box, b, head, cls = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(2)
    kv_head = head // (H // Hk)
    r0, r1, r2 = cls // (d1 * d2), cls // d2 % d1, cls % d2
    M1, M2 = tl.cdiv(n1, Q1), tl.cdiv(n2, Q2)
    m = tl.arange(0, Q0 * Q1 * Q2)
    p0, ok0, lo0, hi0, s0, e0 = _axis(t0, r0, L0, d0, n0, box // (M1 * M2) * Q0, Q0, m // (Q1 * Q2), 0)
    p1, ok1, lo1, hi1, s1, e1 = _axis(t1, r1, L1, d1, n1, box // M2 % M1 * Q1, Q1, m // Q2 % Q1, 0)
    p2, ok2, lo2, hi2, s2, e2 = _axis(t2, r2, L2, d2, n2, box % M2 * Q2, Q2, m % Q2, 0)
    ok = ok0 & ok1 & ok2
    token = _token(p0, p1, p2, r0, r1, r2, d0, d1, d2, L1, L2)
    offs_d = tl.arange(0, BLOCK_D)
    queries = _tile(q + b * q_b + head * q_h, token, q_n, offs_d, ok, D, UPCAST)

    top = tl.full([Q0 * Q1 * Q2], float("-inf"), tl.float32)
    total = tl.zeros([Q0 * Q1 * Q2], tl.float32)
    acc = tl.zeros([Q0 * Q1 * Q2, BLOCK_D], tl.float32)
    c = tl.arange(0, K0 * K1 * K2)
    C1, C2 = tl.cdiv(e1 - s1, K1), tl.cdiv(e2 - s2, K2)
    for t in range(tl.cdiv(e0 - s0, K0) * C1 * C2):
        j0 = s0 + t // (C1 * C2) * K0 + c // (K1 * K2)
        j1 = s1 + t // C2 % C1 * K1 + c // K2 % K1
        j2 = s2 + t % C2 * K2 + c % K2
        inside = (j0 < e0) & (j1 < e1) & (j2 < e2)
        at = _token(j0, j1, j2, r0, r1, r2, d0, d1, d2, L1, L2)
        keys = _tile(k + b * k_b + kv_head * k_h, at, k_n, offs_d, inside, D, UPCAST)
        values = _tile(v + b * v_b + kv_head * v_h, at, v_n, offs_d, inside, D, UPCAST)
        seen = (j0[None] >= lo0[:, None]) & (j0[None] < hi0[:, None])
        seen = seen & (j1[None] >= lo1[:, None]) & (j1[None] < hi1[:, None])
        seen = seen & (j2[None] >= lo2[:, None]) & (j2[None] < hi2[:, None])
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        if HAS_BIAS:
            where = _bias_at(
                head, j0[None], j1[None], j2[None], p0[:, None], p1[:, None], p2[:, None], w0, w1, w2
            )  # fmt: skip
            s += tl.load(bias + where, seen, other=0.0).to(tl.float32) * LOG2E
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen nothing yet: 2^(-inf - 0) is 0
        p, decay = tl.exp2(s - safe[:, None]), tl.exp2(top - safe)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        top = new
    if HAS_EXTRA:
        for start in range(0, X, K0 * K1 * K2):
            x = (start + c).to(tl.int64)
            keys = _tile(ek + b * ek_b + kv_head * ek_h, x, ek_n, offs_d, x < X, D, UPCAST)
            values = _tile(ev + b * ev_b + kv_head * ev_h, x, ev_n, offs_d, x < X, D, UPCAST)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where((x < X)[None], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            p, decay = tl.exp2(s - new[:, None]), tl.exp2(top - new)
            total = total * decay + tl.sum(p, 1)
            acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
            top = new

    N = L0 * L1 * L2
    total = tl.where(total > 0, total, 1.0)  # only queries that do not exist have none
    acc = acc / total[:, None]
    to = out + ((b * N + token) * H + head)[:, None] * D + offs_d[None]
    tl.store(to, acc.to(out.dtype.element_ty), ok[:, None] & (offs_d < D)[None])
    tl.store(lse + (b * H + head) * N + token, (top + tl.log2(total)) * LN2, ok)


@triton.jit
def dq_kernel(
    q, k, v, bias, ek, ev, dout, lse, delta, dq, dbias, t0, t1, t2,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, ek_b, ek_n, ek_h, ev_b, ev_n, ev_h,
    L0, L1, L2, d0, d1, d2, n0, n1, n2, w0, w1, w2, X, H, Hk, D, scale,
    HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (query boxes, B * H, classes): dq (B, N, H, D) float32, and dbias by atomic additions in float32.

    dout is (B, N, H, D), lse and delta (B, H, N); all contiguous.
    """
    box, b, head, cls = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(2)
    kv_head = head // (H // Hk)
    r0, r1, r2 = cls // (d1 * d2), cls // d2 % d1, cls % d2
    M1, M2 = tl.cdiv(n1, Q1), tl.cdiv(n2, Q2)
    m = tl.arange(0, Q0 * Q1 * Q2)
    p0, ok0, lo0, hi0, s0, e0 = _axis(t0, r0, L0, d0, n0, box // (M1 * M2) * Q0, Q0, m // (Q1 * Q2), 0)
    p1, ok1, lo1, hi1, s1, e1 = _axis(t1, r1, L1, d1, n1, box // M2 % M1 * Q1, Q1, m // Q2 % Q1, 0)
    p2, ok2, lo2, hi2, s2, e2 = _axis(t2, r2, L2, d2, n2, box % M2 * Q2, Q2, m % Q2, 0)
    ok = ok0 & ok1 & ok2
    token = _token(p0, p1, p2, r0, r1, r2, d0, d1, d2, L1, L2)
    offs_d = tl.arange(0, BLOCK_D)
    N = L0 * L1 * L2
    queries = _tile(q + b * q_b + head * q_h, token, q_n, offs_d, ok, D, UPCAST)
    do = _tile(dout + b * N * H * D + head * D, token, H * D, offs_d, ok, D, UPCAST)
    # +inf makes the weights of queries that do not exist 0
    lse2 = tl.load(lse + (b * H + head) * N + token, ok, other=float("inf")) * LOG2E
    dl = tl.load(delta + (b * H + head) * N + token, ok, other=0.0)

    acc = tl.zeros([Q0 * Q1 * Q2, BLOCK_D], tl.float32)
    c = tl.arange(0, K0 * K1 * K2)
    C1, C2 = tl.cdiv(e1 - s1, K1), tl.cdiv(e2 - s2, K2)
    for t in range(tl.cdiv(e0 - s0, K0) * C1 * C2):
        j0 = s0 + t // (C1 * C2) * K0 + c // (K1 * K2)
        j1 = s1 + t // C2 % C1 * K1 + c // K2 % K1
        j2 = s2 + t % C2 * K2 + c % K2
        inside = (j0 < e0) & (j1 < e1) & (j2 < e2)
        at = _token(j0, j1, j2, r0, r1, r2, d0, d1, d2, L1, L2)
        keys = _tile(k + b * k_b + kv_head * k_h, at, k_n, offs_d, inside, D, UPCAST)
        values = _tile(v + b * v_b + kv_head * v_h, at, v_n, offs_d, inside, D, UPCAST)
        seen = (j0[None] >= lo0[:, None]) & (j0[None] < hi0[:, None])
        seen = seen & (j1[None] >= lo1[:, None]) & (j1[None] < hi1[:, None])
        seen = seen & (j2[None] >= lo2[:, None]) & (j2[None] < hi2[:, None])
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        if HAS_BIAS:
            where = _bias_at(
                head, j0[None], j1[None], j2[None], p0[:, None], p1[:, None], p2[:, None], w0, w1, w2
            )  # fmt: skip
            s += tl.load(bias + where, seen, other=0.0).to(tl.float32) * LOG2E
        p = tl.exp2(tl.where(seen, s, float("-inf")) - lse2[:, None])
        ds = p * (tl.dot(do, tl.trans(values), input_precision=PRECISION) - dl[:, None])
        if NEED_BIAS:
            tl.atomic_add(dbias + where, ds, seen)
        acc += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
    if HAS_EXTRA:
        for start in range(0, X, K0 * K1 * K2):
            x = (start + c).to(tl.int64)
            keys = _tile(ek + b * ek_b + kv_head * ek_h, x, ek_n, offs_d, x < X, D, UPCAST)
            values = _tile(ev + b * ev_b + kv_head * ev_h, x, ev_n, offs_d, x < X, D, UPCAST)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(tl.where((x < X)[None], s, float("-inf")) - lse2[:, None])
            ds = p * (tl.dot(do, tl.trans(values), input_precision=PRECISION) - dl[:, None])
            acc += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
    to = dq + ((b * N + token) * H + head)[:, None] * D + offs_d[None]
    tl.store(to, acc * scale, ok[:, None] & (offs_d < D)[None])


@triton.jit
def dkdv_kernel(
    q, k, v, bias, dout, lse, delta, dk, dv, t0, t1, t2,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    L0, L1, L2, d0, d1, d2, n0, n1, n2, w0, w1, w2, H, Hk, D, scale,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (key boxes, B * Hk, classes): dk and dv (B, N, Hk, D) float32, summed over the heads of the group."""
    box, b, kv_head = tl.program_id(0), (tl.program_id(1) // Hk).to(tl.int64), tl.program_id(1) % Hk
    cls, group = tl.program_id(2), H // Hk
    r0, r1, r2 = cls // (d1 * d2), cls // d2 % d1, cls % d2
    M1, M2 = tl.cdiv(n1, K1), tl.cdiv(n2, K2)
    m = tl.arange(0, K0 * K1 * K2)
    j0, ok0, lo0, hi0, s0, e0 = _axis(t0, r0, L0, d0, n0, box // (M1 * M2) * K0, K0, m // (K1 * K2), 2)
    j1, ok1, lo1, hi1, s1, e1 = _axis(t1, r1, L1, d1, n1, box // M2 % M1 * K1, K1, m // K2 % K1, 2)
    j2, ok2, lo2, hi2, s2, e2 = _axis(t2, r2, L2, d2, n2, box % M2 * K2, K2, m % K2, 2)
    ok = ok0 & ok1 & ok2
    token = _token(j0, j1, j2, r0, r1, r2, d0, d1, d2, L1, L2)
    offs_d = tl.arange(0, BLOCK_D)
    N = L0 * L1 * L2
    keys = _tile(k + b * k_b + kv_head * k_h, token, k_n, offs_d, ok, D, UPCAST)
    values = _tile(v + b * v_b + kv_head * v_h, token, v_n, offs_d, ok, D, UPCAST)

    acc_k = tl.zeros([K0 * K1 * K2, BLOCK_D], tl.float32)
    acc_v = tl.zeros([K0 * K1 * K2, BLOCK_D], tl.float32)
    c = tl.arange(0, Q0 * Q1 * Q2)
    C1, C2 = tl.cdiv(e1 - s1, Q1), tl.cdiv(e2 - s2, Q2)
    boxes = tl.cdiv(e0 - s0, Q0) * C1 * C2
    for each in range(group * boxes):
        head, t = kv_head * group + each // boxes, each % boxes
        p0 = s0 + t // (C1 * C2) * Q0 + c // (Q1 * Q2)
        p1 = s1 + t // C2 % C1 * Q1 + c // Q2 % Q1
        p2 = s2 + t % C2 * Q2 + c % Q2
        inside = (p0 < e0) & (p1 < e1) & (p2 < e2)
        at = _token(p0, p1, p2, r0, r1, r2, d0, d1, d2, L1, L2)
        queries = _tile(q + b * q_b + head * q_h, at, q_n, offs_d, inside, D, UPCAST)
        do = _tile(dout + b * N * H * D + head * D, at, H * D, offs_d, inside, D, UPCAST)
        lse2 = tl.load(lse + (b * H + head) * N + at, inside, other=float("inf")) * LOG2E
        dl = tl.load(delta + (b * H + head) * N + at, inside, other=0.0)
        seen = (p0[None] >= lo0[:, None]) & (p0[None] < hi0[:, None])
        seen = seen & (p1[None] >= lo1[:, None]) & (p1[None] < hi1[:, None])
        seen = seen & (p2[None] >= lo2[:, None]) & (p2[None] < hi2[:, None])
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)  # keys x queries
        if HAS_BIAS:
            where = _bias_at(
                head, j0[:, None], j1[:, None], j2[:, None], p0[None], p1[None], p2[None], w0, w1, w2
            )  # fmt: skip
            s += tl.load(bias + where, seen, other=0.0).to(tl.float32) * LOG2E
        p = tl.exp2(tl.where(seen, s, float("-inf")) - lse2[None])
        acc_v += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (tl.dot(values, tl.trans(do), input_precision=PRECISION) - dl[None])
        acc_k += tl.dot(ds.to(queries.dtype), queries, input_precision=PRECISION)
    to = ((b * N + token) * Hk + kv_head)[:, None] * D + offs_d[None]
    exists = ok[:, None] & (offs_d < D)[None]
    tl.store(dk + to, acc_k * scale, exists)
    tl.store(dv + to, acc_v, exists)
