/* Block-sparse attention on CPUs, forward and backward, for native.py.
 *
 * Everything is made of one register tile: TILE_ROWS x (TILE_VECS * LANES) sums of products, kept in registers while
 * they run over the contracted dimension. Keys and values are first packed so that the tile reads them contiguously;
 * a work item is then some rows of one query block. Six of them at a time visit a few hundred keys, so that their
 * scores stay in the first-level cache and their keys and values in the second.
 *
 * Reading order: the problem, packing, the tile, masks, forward, backward.
 */
#include <math.h>
#include <omp.h>

#include "native_simd.h"

#define PANEL 64        /* keys of a block that are packed together */
#define ITEM_ROWS 192   /* query rows of a forward work item, at most */
#define STEP_ROWS 64    /* query rows of a backward step, at most */
#define LONGEST_SUM 128 /* products that are added one after the other */
#define CHUNK_KEYS 256  /* keys that a forward step looks at, at most ... */
#define CHUNK_WORDS 16384 /* ... or fewer, so that their keys, and their values, are this many floats */
#define SCORE_LD (CHUNK_KEYS + LANES) /* not a power of two: rows of scores must not share their cache sets */
#define HIDDEN -1e34f   /* the score of a masked pair: scaled and shifted it is still finite, and 2^it is 0 */
#define NO_TOP -1e30f   /* the running maximum before the first key; far above HIDDEN, far below any score */
#define SLACK 8.0f      /* the maximum may lag behind by this factor of 2^SLACK before results are rescaled */
#define LOG2E 1.4426950408889634

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* ---------------------------------------------------------------- the problem, as native.py fills it in */

typedef struct {
    void *data;        /* NULL: absent, or not wanted */
    int64_t stride[4]; /* elements, of (B, N, H, D) */
} Tensor;

typedef struct {
    int64_t B, H, Hk, D, q_len, kv_len, q_block, kv_block;
    int64_t dtype; /* 0 float32, 1 bfloat16, 2 float16: of every Tensor */
    int64_t threads;
    double scale;
    Tensor q, k, v, out, dout, dq, dk, dv;
    float *lse;        /* (B, H, q_len), or NULL */
    const float *dlse; /* likewise */
    /* the layout; strides of 0 share over batch or heads */
    const int64_t *row_start, *row_of, *partial_start;
    const int32_t *n_partial, *n_full, *col_idx, *q_valid, *kv_valid;
    int64_t row_stride_B, row_stride_H, q_valid_stride, kv_valid_stride;
    const uint8_t *bitmap;                     /* (P, q_block, kv_block), or NULL */
    const int32_t *q_bounds, *k_bounds;        /* (axes, 2, q_len), (axes, 2, kv_len), or NULL */
    int64_t axes;
    /* the same entries by key block, for the backward pass: row and bitmap slab (-1: full), ascending rows */
    const int64_t *col_start; /* one more than key blocks in all (batch, head)s of the layout */
    const int32_t *col_row;
    const int64_t *col_slab;
    int64_t col_stride_B, col_stride_H;
    /* what to do: (batch, key head) pairs first_pair ...; items are numbered from them */
    int64_t first_pair, pairs, n_items, n_col_items, fused;
    const int64_t *items, *col_items;
    void *workspace; /* as many bytes as the function says that it needs */
} Call;

/* For native.py to check that it speaks of the same structure. */
int mmeff_call_bytes(void) { return sizeof(Call); }

/* Sizes that follow from a call. */
typedef struct {
    int64_t group, nQ, nK, Dp, kv_pad, splits, split_rows;
    int packed_pairs; /* bfloat16 products: operands are pairs along the contracted dimension */
    float factor;     /* on the scores in units of log 2, applied to q where it is float32 */
} Sizes;

static Sizes sizes_of(const Call *c, int allow_pairs) {
    Sizes s;
    s.group = c->H / c->Hk;
    s.nQ = (c->q_len + c->q_block - 1) / c->q_block;
    s.nK = (c->kv_len + c->kv_block - 1) / c->kv_block;
    s.Dp = round_up(c->D, LANES);
    s.kv_pad = round_up(c->kv_block, LANES);
    s.splits = (c->q_block + ITEM_ROWS - 1) / ITEM_ROWS;
    s.split_rows = round_up((c->q_block + s.splits - 1) / s.splits, TILE_ROWS);
    s.factor = (float)(c->scale * LOG2E);
    /* q that is not scaled beforehand needs a factor for which HIDDEN keeps its meaning */
    s.packed_pairs = HAS_PAIRS && allow_pairs && c->dtype == 1 && fabsf(s.factor) > 1e-3f && fabsf(s.factor) < 1e3f;
    return s;
}

/* One visited block of a row: ascending key blocks, whether partial or full. */
typedef struct {
    const int32_t *partial, *full;
    int64_t n_partial, n_full, slab;
} Row;

static Row row_at(const Call *c, int64_t b, int64_t h, int64_t qb) {
    const int64_t base = c->row_of[b * c->row_stride_B + h * c->row_stride_H + qb];
    const int32_t *list = c->col_idx + c->row_start[base];
    return (Row){list, list + c->n_partial[base], c->n_partial[base], c->n_full[base], c->partial_start[base]};
}

/* Take the next block off the row: its key block, or -1 at the end; *slab is its bitmap, -1 for a full one. */
static int64_t next_block(Row *r, int64_t *slab) {
    if (r->n_partial && (!r->n_full || *r->partial < *r->full)) {
        *slab = r->slab++;
        r->n_partial--;
        return *r->partial++;
    }
    *slab = -1;
    if (!r->n_full) return -1;
    r->n_full--;
    return *r->full++;
}

static int64_t q_used(const Call *c, int64_t b, int64_t qb) { return c->q_valid[b * c->q_valid_stride + qb]; }
static int64_t kv_used(const Call *c, int64_t b, int64_t kb) { return c->kv_valid[b * c->kv_valid_stride + kb]; }

/* ---------------------------------------------------------------- packing */

/* Read `n` elements of row (b, token, h) as float32, times factor. */
static void read_row(float *to, const Tensor *t, int64_t dtype, int64_t b, int64_t token, int64_t h, int64_t n,
                     float factor) {
    const int64_t at = b * t->stride[0] + token * t->stride[1] + h * t->stride[2], step = t->stride[3];
    if (dtype == 0) {
        const float *from = (const float *)t->data + at;
        if (step == 1) for (int64_t d = 0; d < n; d++) to[d] = from[d] * factor;
        else for (int64_t d = 0; d < n; d++) to[d] = from[d * step] * factor;
    } else if (dtype == 1) {
        const uint16_t *from = (const uint16_t *)t->data + at;
        if (step == 1) for (int64_t d = 0; d < n; d++) to[d] = float_of_bfloat(from[d]) * factor;
        else for (int64_t d = 0; d < n; d++) to[d] = float_of_bfloat(from[d * step]) * factor;
    } else {
        const uint16_t *from = (const uint16_t *)t->data + at;
        for (int64_t d = 0; d < n; d++) to[d] = float_of_half(from[d * step]) * factor;
    }
}

/* Read n bfloat16 elements of row (b, token, h) as they are, in pairs; an odd last one is paired with zero. */
static void read_pairs(uint32_t *to, const Tensor *t, int64_t b, int64_t token, int64_t h, int64_t n) {
    const uint16_t *from = (const uint16_t *)t->data + b * t->stride[0] + token * t->stride[1] + h * t->stride[2];
    const int64_t step = t->stride[3];
    for (int64_t d = 0; d < n / 2; d++) to[d] = from[2 * d * step] | (uint32_t)from[(2 * d + 1) * step] << 16;
    if (n % 2) to[n / 2] = from[(n - 1) * step];
}

/* Write row (b, token, h) of a contiguous tensor: from * factor, or zeros where `from` is NULL. */
static void write_row(const Tensor *t, int64_t dtype, int64_t b, int64_t token, int64_t h, int64_t n, const float *from,
                      float factor) {
    const int64_t at = b * t->stride[0] + token * t->stride[1] + h * t->stride[2];
    if (!from) memset((char *)t->data + at * (dtype ? 2 : 4), 0, n * (dtype ? 2 : 4));
    else if (dtype == 0) for (int64_t d = 0; d < n; d++) ((float *)t->data)[at + d] = from[d] * factor;
    else if (dtype == 1) for (int64_t d = 0; d < n; d++) ((uint16_t *)t->data)[at + d] = bfloat_of_float(from[d] * factor);
    else for (int64_t d = 0; d < n; d++) ((uint16_t *)t->data)[at + d] = half_of_float(from[d] * factor);
}

/* Transposed panels of a key block: panel x holds [D][width] floats, or [D / 2][width] pairs, width <= PANEL.
 * Lanes of keys that are not in use are left as they were: their scores are hidden, or not looked at. `row` is room. */
static void pack_transposed(float *to, const Call *c, const Sizes *s, const Tensor *t, int64_t b, int64_t h, int64_t kb,
                            float *row) {
    const int64_t used = kv_used(c, b, kb), words = s->packed_pairs ? (c->D + 1) / 2 : c->D;
    for (int64_t x = 0; x < used; x += PANEL, to += PANEL * s->Dp) {
        const int64_t width = min64(PANEL, s->kv_pad - x), keys = min64(PANEL, used - x);
        for (int64_t j = 0; j < keys; j++) {
            const int64_t token = kb * c->kv_block + x + j;
            if (s->packed_pairs) read_pairs((uint32_t *)row, t, b, token, h, c->D);
            else read_row(row, t, c->dtype, b, token, h, c->D, 1);
            for (int64_t d = 0; d < words; d++) to[d * width + j] = row[d];
        }
    }
}

/* Rows of a key block: [key][Dp] floats, or [key / 2][Dp] pairs. Only keys in use are ever read. */
static void pack_rows(float *to, const Call *c, const Sizes *s, const Tensor *t, int64_t b, int64_t h, int64_t kb) {
    const int64_t used = kv_used(c, b, kb), start = kb * c->kv_block, step = s->packed_pairs ? 2 : 1;
    for (int64_t j = 0; j < used; j += step, to += s->Dp) {
        if (s->packed_pairs) {
            const uint16_t *low = (const uint16_t *)t->data + b * t->stride[0] + (start + j) * t->stride[1] + h * t->stride[2];
            const uint16_t *high = j + 1 < used ? low + t->stride[1] : NULL;
            for (int64_t d = 0; d < c->D; d++) {
                const int64_t at = d * t->stride[3];
                const uint16_t pair[2] = {low[at], high ? high[at] : 0};
                memcpy(to + d, pair, 4);
            }
        } else read_row(to, t, c->dtype, b, start + j, h, c->D, 1);
        if (c->D < s->Dp) memset(to + c->D, 0, (s->Dp - c->D) * 4);
    }
}

/* ---------------------------------------------------------------- the tile */

/* One stretch of a contraction: `steps` rows of b, and the elements of a that multiply them. */
typedef struct {
    const float *a, *b;
    int64_t steps;
} Stretch;

/* c[i][j] = (add ? c[i][j] : 0) + sum over stretches and steps s of a[i * a_row + s * a_step] * b[s * ldb + j]
 *
 * for i < rows and j < vecs * LANES. Inlined with constant rows and vecs, so that `sum` lives in registers. What was in
 * c is added last: sums of sums lose less than one long sum. How c[i][j] is rounded depends on neither rows nor vecs. */
INLINE void tile(const int rows, const int vecs, vec (*const multiply_add)(vec, vec, vec), const int64_t a_row,
                 const int64_t a_step, const Stretch *stretch, int64_t n, int64_t ldb, float *c, int64_t ldc, int add) {
    vec sum[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) sum[i][j] = splat(0);
    for (int64_t p = 0; p < n; p++) {
        const float *a = stretch[p].a, *b = stretch[p].b;
        for (int64_t s = stretch[p].steps; s > 0; s--, a += a_step, b += ldb) {
            vec y[TILE_VECS];
#pragma GCC unroll 8
            for (int j = 0; j < vecs; j++) y[j] = load(b + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                const vec x = splat(a[i * a_row]);
#pragma GCC unroll 8
                for (int j = 0; j < vecs; j++) sum[i][j] = multiply_add(x, y[j], sum[i][j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) {
            float *to = c + i * ldc + j * LANES;
            if (add) sum[i][j] += load(to);
            store(to, sum[i][j]);
        }
}

typedef void Tile(int rows, int vecs, int64_t lda, const Stretch *, int64_t n, int64_t ldb, float *c, int64_t ldc,
                  int add);

#define TILE_CASE(rows, vecs, ...) \
    case (rows) * 8 + (vecs): tile(rows, vecs, __VA_ARGS__, stretch, n, ldb, c, ldc, add); return;
#if TILE_VECS == 4
#define TILE_CASES(rows, ...) TILE_CASE(rows, 1, __VA_ARGS__) TILE_CASE(rows, 2, __VA_ARGS__) \
    TILE_CASE(rows, 3, __VA_ARGS__) TILE_CASE(rows, 4, __VA_ARGS__)
#else
#define TILE_CASES(rows, ...) TILE_CASE(rows, 1, __VA_ARGS__) TILE_CASE(rows, 2, __VA_ARGS__)
#endif
#define DEFINE_TILE(name, ...) \
    static void name(int rows, int vecs, int64_t lda, const Stretch *stretch, int64_t n, int64_t ldb, float *c, \
                     int64_t ldc, int add) { \
        switch (rows * 8 + vecs) { \
            TILE_CASES(1, __VA_ARGS__) TILE_CASES(2, __VA_ARGS__) TILE_CASES(3, __VA_ARGS__) \
            TILE_CASES(4, __VA_ARGS__) TILE_CASES(5, __VA_ARGS__) TILE_CASES(6, __VA_ARGS__) \
        } \
    }
DEFINE_TILE(tile_rows, fma_vec, lda, 1)         /* a is [row][step] */
DEFINE_TILE(tile_columns, fma_vec, 1, lda)      /* a is [step][row] */
#if HAS_PAIRS
DEFINE_TILE(tile_pairs, pairs_dot, lda, 1)      /* a is [row][step], a and b of bfloat16 pairs */
#else
#define tile_pairs tile_rows
#endif

/* c (rows x cols) = or += a b, with cols a multiple of LANES; a and b as `run` reads them. */
static void multiply(Tile *run, int64_t rows, int64_t cols, const float *a, int64_t lda, const float *b, int64_t ldb,
                     int64_t steps, float *c, int64_t ldc, int add) {
    const int64_t next_row = run == tile_columns ? 1 : lda, next_step = run == tile_columns ? lda : 1;
    for (int64_t x = 0; x < cols; x += TILE_VECS * LANES)
        for (int64_t i = 0; i < rows; i += TILE_ROWS)
            for (int64_t d = 0; d < steps; d += LONGEST_SUM) {
                const Stretch one = {a + i * next_row + d * next_step, b + d * ldb + x, min64(LONGEST_SUM, steps - d)};
                run((int)min64(TILE_ROWS, rows - i), (int)min64(TILE_VECS, (cols - x) / LANES), lda, &one, 1, ldb,
                    c + i * ldc + x, ldc, add || d);
            }
}

/* ---------------------------------------------------------------- masks */

/* Some keys of one visited block, packed: where they lie and which queries may see them. */
typedef struct {
    const float *keys_transposed, *values_transposed; /* [D][width]; values in the backward pass only */
    const float *rows;       /* [key][Dp] of the values; of the keys in the backward pass */
    int64_t width, keys;     /* keys in use, the first of `width` */
    int64_t lanes;           /* keys rounded up to LANES */
    int64_t at;              /* forward: column of their scores */
    int64_t token, slot;     /* of the first key, in the sequence and in its block */
    int64_t slab;            /* of the bitmap; -1 where every pair attends */
} Segment;

/* Hide the scores (rows x lanes, ld) of pairs that do not attend. `slot` is the first row's place in query block qb. */
static void mask_scores(const Call *c, const Segment *g, int64_t qb, int64_t slot, int64_t rows, float *scores,
                        int64_t ld) {
    for (int64_t i = 0; i < rows; i++) {
        const int64_t token = qb * c->q_block + slot + i;
        for (int64_t j = 0; j < g->lanes; j += LANES) {
            ivec seen = first_lanes((int)min64(LANES, g->keys - j));
            if (g->slab >= 0 && c->bitmap) {
                const uint8_t *line = c->bitmap + (g->slab * c->q_block + slot + i) * c->kv_block + g->slot + j;
                seen &= load_bools(line, g->keys - j);
            } else if (g->slab >= 0)
                for (int64_t a = 0; a < c->axes; a++) {
                    const int32_t *q = c->q_bounds + 2 * a * c->q_len + token;
                    const int32_t *k = c->k_bounds + 2 * a * c->kv_len + g->token + j;
                    seen &= isplat(q[0]) <= load_ints(k + c->kv_len, g->keys - j);
                    seen &= load_ints(k, g->keys - j) <= isplat(q[c->q_len]);
                }
            store(scores + i * ld + j, select_lanes(seen, load(scores + i * ld + j), splat(HIDDEN)));
        }
    }
}

/* ---------------------------------------------------------------- forward */

/* What one thread works in. */
typedef struct {
    float *q, *out;  /* (ITEM_ROWS, Dp): queries, and sums of weighted values */
    float *top;      /* (ITEM_ROWS): the maximum that weights are relative to, in units of log 2 */
    float *total;    /* (ITEM_ROWS, LANES): sums of weights, lane by lane */
    float *scores;   /* (TILE_ROWS, SCORE_LD) */
    float *row;      /* (Dp) */
} ForwardRoom;

/* Turn a row of scores into weights relative to *top, add them to `total`, and return what earlier results must be
 * multiplied by. That is 1 unless the maximum has grown by more than SLACK: float32 has the room. */
INLINE float softmax_row(float *scores, int64_t lanes, float factor, float *top, float *total, int pairs) {
    vec highest = load(scores);
    for (int64_t j = LANES; j < lanes; j += LANES) highest = max_vec(highest, load(scores + j));
    const float row_top = max_of(highest) * factor;
    float rescale = 1;
    if (row_top > *top + SLACK) {
        rescale = exp2_vec(splat(*top - row_top))[0];
        *top = row_top;
    }
    vec sum = load(total) * splat(rescale);
    const vec by = splat(factor), shift = splat(-*top);
    if (!pairs)
        for (int64_t j = 0; j < lanes; j += LANES) {
            const vec weight = exp2_vec(fma_vec(load(scores + j), by, shift));
            sum += weight;
            store(scores + j, weight);
        }
#if HAS_PAIRS
    else /* two weights to a lane, over the same memory from its start; an odd last vector is completed with zeros */
        for (int64_t j = 0; j < lanes; j += 2 * LANES) {
            const vec low = exp2_vec(fma_vec(load(scores + j), by, shift));
            vec high = splat(0);
            if (j + LANES < lanes) high = exp2_vec(fma_vec(load(scores + j + LANES), by, shift));
            sum += low + high;
            store(scores + j / 2, pairs_of(low, high));
        }
#endif
    store(total, sum);
    return rescale;
}

/* Rows i .. i + rows of an item visit a chunk of keys. */
static void visit(const Call *c, const Sizes *s, const ForwardRoom *room, const Segment *segments, int64_t n,
                  int64_t lanes, int64_t qb, int64_t slot, int64_t i, int rows) {
    Tile *run = s->packed_pairs ? tile_pairs : tile_rows;
    const int64_t steps = s->packed_pairs ? (c->D + 1) / 2 : c->D;
    Stretch stretch[CHUNK_KEYS / LANES];
    for (int64_t p = 0; p < n; p++) {
        const Segment *g = segments + p;
        multiply(run, rows, g->lanes, room->q + i * s->Dp, s->Dp, g->keys_transposed, g->width, steps,
                 room->scores + g->at, SCORE_LD, 0);
        if (g->slab >= 0 || g->keys < g->lanes)
            mask_scores(c, g, qb, slot + i, rows, room->scores + g->at, SCORE_LD);
        stretch[p].a = room->scores + (s->packed_pairs ? g->at / 2 : g->at);
        stretch[p].steps = s->packed_pairs ? (g->keys + 1) / 2 : g->keys;
    }
    const float factor = s->packed_pairs ? fabsf(s->factor) : 1;
    for (int64_t r = i; r < i + rows; r++) {
        float *scores = room->scores + (r - i) * SCORE_LD, *total = room->total + r * LANES;
        const float rescale = softmax_row(scores, lanes, factor, room->top + r, total, s->packed_pairs);
        if (rescale != 1)
            for (int64_t d = 0; d < s->Dp; d += LANES)
                store(room->out + r * s->Dp + d, load(room->out + r * s->Dp + d) * splat(rescale));
    }
    for (int64_t x = 0; x < s->Dp; x += TILE_VECS * LANES) {
        for (int64_t p = 0; p < n; p++) stretch[p].b = segments[p].rows + x;
        run(rows, (int)min64(TILE_VECS, (s->Dp - x) / LANES), SCORE_LD, stretch, n, s->Dp, room->out + i * s->Dp + x,
            s->Dp, 1);
    }
}

/* Load the queries of an item: scaled float32, or as pairs with only the sign of the scale. */
static void load_queries(const Call *c, const Sizes *s, const ForwardRoom *room, int64_t b, int64_t h, int64_t token,
                         int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
        float *to = room->q + i * s->Dp;
        if (s->packed_pairs) {
            read_pairs((uint32_t *)to, &c->q, b, token + i, h, c->D);
            if (s->factor < 0)
                for (int64_t d = 0; d < (c->D + 1) / 2; d++) ((uint32_t *)to)[d] ^= 0x80008000;
        } else read_row(to, &c->q, c->dtype, b, token + i, h, c->D, s->factor);
    }
}

/* One work item: rows slot .. of query block qb, for one head. */
static void forward_item(const Call *c, const Sizes *s, const ForwardRoom *room, const float *transposed,
                         const float *values, int64_t b, int64_t h, int64_t qb, int64_t slot) {
    const int64_t token = qb * c->q_block + slot;
    const int64_t present = min64(min64(s->split_rows, c->q_block - slot), c->q_len - token);
    int64_t rows = min64(present, q_used(c, b, qb) - slot);
    if (rows < 0) rows = 0;
    load_queries(c, s, room, b, h, token, rows);
    memset(room->out, 0, rows * s->Dp * 4);
    memset(room->total, 0, rows * LANES * 4);
    for (int64_t i = 0; i < rows; i++) room->top[i] = NO_TOP;

    Segment segments[CHUNK_KEYS / LANES];
    int64_t chunk_keys = round_up(CHUNK_WORDS / s->Dp, PANEL), n = 0, lanes = 0, slab, kb, x = 0;
    if (chunk_keys > CHUNK_KEYS) chunk_keys = CHUNK_KEYS;
    Row row = row_at(c, b, h, qb);
    kb = rows ? next_block(&row, &slab) : -1;
    while (kb >= 0 || n) {
        const int64_t left = kb < 0 ? 0 : min64(PANEL, kv_used(c, b, kb) - x);
        if (kb >= 0 && left <= 0) { /* this block is done */
            kb = next_block(&row, &slab), x = 0;
        } else if (kb < 0 || lanes + round_up(left, LANES) > chunk_keys) { /* the chunk is done */
            for (int64_t i = 0; i < rows; i += TILE_ROWS)
                visit(c, s, room, segments, n, lanes, qb, slot, i, (int)min64(TILE_ROWS, rows - i));
            n = lanes = 0;
        } else {
            const int64_t block = kb * s->kv_pad * s->Dp, half = s->packed_pairs ? 2 : 1;
            segments[n++] = (Segment){.keys_transposed = transposed + block + x * s->Dp,
                                      .rows = values + block + x / half * s->Dp, .width = min64(PANEL, s->kv_pad - x),
                                      .keys = left, .lanes = round_up(left, LANES), .at = lanes,
                                      .token = kb * c->kv_block + x, .slot = x, .slab = slab};
            lanes += round_up(left, LANES);
            x += PANEL;
        }
    }
    float *lse = c->lse ? c->lse + (b * c->H + h) * c->q_len + token : NULL;
    for (int64_t i = 0; i < present; i++) {
        const float total = i < rows ? sum_of(load(room->total + i * LANES)) : 0;
        const float *sums = total == 0 ? NULL : room->out + i * s->Dp;
        write_row(&c->out, c->dtype, b, token + i, h, c->D, sums, 1 / total);
        if (lse) lse[i] = sums ? (float)(room->top[i] / LOG2E + log(total)) : -INFINITY;
    }
}

/* Bytes that mmeff_forward works in: packed keys and values, and room for each thread. */
static int64_t forward_room(const Sizes *s) {
    return round_up(ITEM_ROWS * (2 * s->Dp + LANES + 1) + TILE_ROWS * SCORE_LD + s->Dp, 1024);
}
int64_t mmeff_forward_bytes(const Call *c) {
    const Sizes s = sizes_of(c, 1);
    return 4 * (2 * c->pairs * s.nK * s.kv_pad * s.Dp + c->threads * forward_room(&s));
}

/* Attend for `pairs` (batch, key head) pairs from first_pair on; `items` lists their query blocks in the order in which
 * to start them, numbered ((pair - first_pair) * group + head in group) * nQ + query block. */
void mmeff_forward(const Call *c) {
    const Sizes s = sizes_of(c, 1);
    const int64_t per_pair = s.nK * s.kv_pad * s.Dp;
    float *rooms = c->workspace, *transposed = rooms + c->threads * forward_room(&s);
    float *values = transposed + c->pairs * per_pair;
#pragma omp parallel num_threads((int)c->threads)
    {
        float *at = rooms + forward_room(&s) * omp_get_thread_num();
        ForwardRoom room;
        room.q = at, at += ITEM_ROWS * s.Dp;
        room.out = at, at += ITEM_ROWS * s.Dp;
        room.total = at, at += ITEM_ROWS * LANES;
        room.scores = at, at += TILE_ROWS * SCORE_LD;
        room.row = at, at += s.Dp;
        room.top = at;
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < c->pairs * s.nK; i++) { /* heads fastest: they lie side by side in memory */
            const int64_t local = i % c->pairs, kb = i / c->pairs, at = (local * s.nK + kb) * s.kv_pad * s.Dp;
            const int64_t pair = c->first_pair + local, b = pair / c->Hk, h = pair % c->Hk;
            pack_transposed(transposed + at, c, &s, &c->k, b, h, kb, room.row);
            pack_rows(values + at, c, &s, &c->v, b, h, kb);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < c->n_items * s.splits; i++) {
            const int64_t item = c->items[i / s.splits], at_head = item / s.nQ, local = at_head / s.group;
            const int64_t pair = c->first_pair + local, b = pair / c->Hk;
            const int64_t h = pair % c->Hk * s.group + at_head % s.group;
            forward_item(c, &s, &room, transposed + local * per_pair, values + local * per_pair, b, h, item % s.nQ,
                         i % s.splits * s.split_rows);
        }
    }
}

/* ---------------------------------------------------------------- backward */

/* The backward pass recomputes the weights P from the log-sum-exp, tile by tile of at most STEP_ROWS x PANEL pairs, and
 *
 *     dS = P * (dout v^T - delta),  delta = rowsum(dout * out) - dlse,  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout.
 *
 * A column (key block) sums its dk and dv over the rows that visit it. dq is summed on the way where one thread walks all
 * columns of a head ("fused"), else by rows, for which P and dS are computed again: five products per tile against seven,
 * but rows and columns are many, and heads may be too few for the threads. Both ways add in the same order. */

/* One query head, packed: rows by token. */
typedef struct {
    float *q, *dout, *dq; /* (q_len, Dp): q times scale and log2 e */
    float *lse, *delta;   /* (q_len): lse in units of log 2, and so high that P is 0 where no key is attended to */
} Head;

/* One (batch, key head) pair, packed as pack_transposed and pack_rows say. */
typedef struct {
    float *keys_transposed, *values_transposed, *keys;
    float *heads; /* q, dout, dq, lse and delta of each head of the group */
} Pair;

typedef struct {
    float *weights, *dscores; /* (STEP_ROWS, PANEL) */
    float *dk, *dv;           /* (PANEL, Dp) */
    float *row;               /* (Dp) */
} BackwardRoom;

static Pair pair_at(const Sizes *s, float *at) {
    const int64_t block_words = s->nK * s->kv_pad * s->Dp;
    return (Pair){at, at + block_words, at + 2 * block_words, at + 3 * block_words};
}
static int64_t head_words(const Call *c, const Sizes *s) { return round_up(c->q_len * (3 * s->Dp + 2), LANES); }
static int64_t pair_words(const Call *c, const Sizes *s) {
    return 3 * s->nK * s->kv_pad * s->Dp + s->group * head_words(c, s);
}
static int64_t backward_room(const Sizes *s) {
    return round_up(2 * (STEP_ROWS * PANEL + PANEL * s->Dp + s->Dp), 1024);
}
static Head head_at(const Call *c, const Sizes *s, const Pair *p, int64_t g) {
    float *at = p->heads + g * head_words(c, s);
    const int64_t n = c->q_len * s->Dp;
    return (Head){at, at + n, at + 2 * n, at + 3 * n, at + 3 * n + c->q_len};
}

/* Pack the queries of a block and their gradients; start dq from zero. */
static void pack_queries(const Call *c, const Sizes *s, const Head *to, int64_t b, int64_t h, int64_t qb, float *row) {
    const int64_t start = qb * c->q_block, end = min64(start + c->q_block, c->q_len), used = start + q_used(c, b, qb);
    memset(row, 0, s->Dp * 4);
    for (int64_t i = start; i < end; i++) {
        float *q = to->q + i * s->Dp, *dout = to->dout + i * s->Dp;
        const int64_t at = (b * c->H + h) * c->q_len + i;
        memset(q, 0, s->Dp * 4), memset(dout, 0, s->Dp * 4), memset(to->dq + i * s->Dp, 0, s->Dp * 4);
        to->lse[i] = -NO_TOP, to->delta[i] = 0;
        if (i >= used || c->lse[at] == -INFINITY) continue;
        read_row(q, &c->q, c->dtype, b, i, h, c->D, s->factor);
        vec sum = splat(0);
        if (c->dout.data) {
            read_row(dout, &c->dout, c->dtype, b, i, h, c->D, 1);
            read_row(row, &c->out, c->dtype, b, i, h, c->D, 1);
            for (int64_t d = 0; d < s->Dp; d += LANES) sum = fma_vec(load(dout + d), load(row + d), sum);
        }
        to->lse[i] = (float)(c->lse[at] * LOG2E);
        to->delta[i] = sum_of(sum) - (c->dlse ? c->dlse[at] : 0);
    }
}

/* What `rows` queries from `slot` of block qb and the keys of a segment add to dk and dv (in the room), and to dq. */
static void backward_step(const Call *c, const Sizes *s, const BackwardRoom *room, const Head *head, const Segment *g,
                          int64_t qb, int64_t slot, int64_t rows, int columns, int want_dq) {
    const int64_t token = qb * c->q_block + slot;
    const float *q = head->q + token * s->Dp, *dout = head->dout + token * s->Dp;
    const int want_dk = columns && c->dk.data, want_dv = columns && c->dv.data;
    float *weights = room->weights, *dscores = room->dscores;
    multiply(tile_rows, rows, g->lanes, q, s->Dp, g->keys_transposed, g->width, c->D, weights, PANEL, 0);
    if (want_dk || want_dq)
        multiply(tile_rows, rows, g->lanes, dout, s->Dp, g->values_transposed, g->width, c->D, dscores, PANEL, 0);
    if (g->slab >= 0) mask_scores(c, g, qb, slot, rows, weights, PANEL);
    for (int64_t i = 0; i < rows; i++) {
        const vec lse = splat(head->lse[token + i]), delta = splat(head->delta[token + i]);
        for (int64_t j = i * PANEL; j < i * PANEL + g->lanes; j += LANES) {
            const vec weight = exp2_vec(load(weights + j) - lse);
            store(weights + j, weight);
            if (want_dk || want_dq) store(dscores + j, weight * (load(dscores + j) - delta));
        }
    }
    if (want_dv)
        multiply(tile_columns, g->keys, s->Dp, weights, PANEL, dout, s->Dp, rows, room->dv, s->Dp, 1);
    if (want_dk)
        multiply(tile_columns, g->keys, s->Dp, dscores, PANEL, q, s->Dp, rows, room->dk, s->Dp, 1);
    if (want_dq)
        multiply(tile_rows, rows, s->Dp, dscores, PANEL, g->rows, s->Dp, g->keys, head->dq + token * s->Dp,
                 s->Dp, 1);
}

static Segment segment_at(const Call *c, const Sizes *s, const Pair *p, int64_t b, int64_t kb, int64_t x) {
    const int64_t block = (kb * s->kv_pad + x) * s->Dp, keys = min64(PANEL, kv_used(c, b, kb) - x);
    return (Segment){.keys_transposed = p->keys_transposed + block, .values_transposed = p->values_transposed + block,
                     .rows = p->keys + block, .width = min64(PANEL, s->kv_pad - x), .keys = keys,
                     .lanes = round_up(keys, LANES), .token = kb * c->kv_block + x, .slot = x};
}

/* dk and dv of a key block, from all rows of the group that visit it; their dq, too, if it is fused. */
static void backward_column(const Call *c, const Sizes *s, const BackwardRoom *room, const Pair *p, int64_t b, int64_t hk,
                            int64_t kb, int want_dq) {
    const int64_t used = kv_used(c, b, kb), start = kb * c->kv_block;
    for (int64_t x = 0; x < used; x += PANEL) {
        Segment g = segment_at(c, s, p, b, kb, x);
        memset(room->dk, 0, g.keys * s->Dp * 4), memset(room->dv, 0, g.keys * s->Dp * 4);
        for (int64_t i = 0; i < s->group; i++) {
            const Head head = head_at(c, s, p, i);
            const int64_t *list = c->col_start + b * c->col_stride_B + (hk * s->group + i) * c->col_stride_H + kb;
            for (int64_t e = list[0]; e < list[1]; e++) {
                const int64_t qb = c->col_row[e], rows = q_used(c, b, qb);
                g.slab = c->col_slab[e];
                for (int64_t slot = 0; slot < rows; slot += STEP_ROWS)
                    backward_step(c, s, room, &head, &g, qb, slot, min64(STEP_ROWS, rows - slot), 1, want_dq);
            }
        }
        for (int64_t j = 0; j < g.keys; j++) { /* q was packed times scale and log2 e */
            if (c->dk.data) write_row(&c->dk, c->dtype, b, start + x + j, hk, c->D, room->dk + j * s->Dp, 1 / LOG2E);
            if (c->dv.data) write_row(&c->dv, c->dtype, b, start + x + j, hk, c->D, room->dv + j * s->Dp, 1);
        }
    }
    for (int64_t j = used; j < min64(c->kv_block, c->kv_len - start); j++) {
        if (c->dk.data) write_row(&c->dk, c->dtype, b, start + j, hk, c->D, NULL, 0);
        if (c->dv.data) write_row(&c->dv, c->dtype, b, start + j, hk, c->D, NULL, 0);
    }
}

/* dq of a query block, from the keys that it visits. */
static void backward_row(const Call *c, const Sizes *s, const BackwardRoom *room, const Pair *p, const Head *head,
                         int64_t b, int64_t h, int64_t qb) {
    const int64_t rows = q_used(c, b, qb);
    int64_t kb, slab;
    Row row = row_at(c, b, h, qb);
    while ((kb = next_block(&row, &slab)) >= 0)
        for (int64_t x = 0; x < kv_used(c, b, kb); x += PANEL) {
            Segment g = segment_at(c, s, p, b, kb, x);
            g.slab = slab;
            for (int64_t slot = 0; slot < rows; slot += STEP_ROWS)
                backward_step(c, s, room, head, &g, qb, slot, min64(STEP_ROWS, rows - slot), 0, 1);
        }
}

int64_t mmeff_backward_bytes(const Call *c) {
    const Sizes s = sizes_of(c, 0);
    return 4 * (c->pairs * pair_words(c, &s) + c->threads * backward_room(&s));
}

/* Gradients for `pairs` pairs from first_pair on: those of dq, dk and dv that have data. `items` are as for
 * mmeff_forward, `col_items` numbered (pair - first_pair) * nK + key block. */
void mmeff_backward(const Call *c) {
    const Sizes s = sizes_of(c, 0);
    float *rooms = c->workspace, *packed = rooms + c->threads * backward_room(&s);
    const int want_dq = c->dq.data != NULL, columns = c->dk.data || c->dv.data;
#define PAIR(local) \
    const int64_t pair = c->first_pair + (local), b = pair / c->Hk, hk = pair % c->Hk; \
    const Pair p = pair_at(&s, packed + (local) * pair_words(c, &s))
#define HEAD(item) \
    PAIR((item) / s.nQ / s.group); \
    const int64_t g = (item) / s.nQ % s.group, h = hk * s.group + g, qb = (item) % s.nQ; \
    const Head head = head_at(c, &s, &p, g)
#pragma omp parallel num_threads((int)c->threads)
    {
        float *at = rooms + backward_room(&s) * omp_get_thread_num();
        BackwardRoom room;
        room.weights = at, at += STEP_ROWS * PANEL;
        room.dscores = at, at += STEP_ROWS * PANEL;
        room.dk = at, at += PANEL * s.Dp;
        room.dv = at, at += PANEL * s.Dp;
        room.row = at;
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t i = 0; i < c->pairs * s.nK; i++) {
            PAIR(i / s.nK);
            const int64_t kb = i % s.nK, block = kb * s.kv_pad * s.Dp;
            pack_transposed(p.keys_transposed + block, c, &s, &c->k, b, hk, kb, room.row);
            pack_transposed(p.values_transposed + block, c, &s, &c->v, b, hk, kb, room.row);
            pack_rows(p.keys + block, c, &s, &c->k, b, hk, kb);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < c->n_items; i++) {
            HEAD(i);
            pack_queries(c, &s, &head, b, h, qb, room.row);
        }
        if (columns && c->fused) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < c->pairs; i++) {
                PAIR(i);
                for (int64_t kb = 0; kb < s.nK; kb++) backward_column(c, &s, &room, &p, b, hk, kb, want_dq);
            }
        } else if (columns) {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t i = 0; i < c->n_col_items; i++) {
                PAIR(c->col_items[i] / s.nK);
                backward_column(c, &s, &room, &p, b, hk, c->col_items[i] % s.nK, 0);
            }
        }
        if (want_dq) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < c->n_items; i++) {
                HEAD(c->items[i]);
                if (!(columns && c->fused)) backward_row(c, &s, &room, &p, &head, b, h, qb);
                const int64_t end = min64((qb + 1) * c->q_block, c->q_len);
                for (int64_t t = qb * c->q_block; t < end; t++)
                    write_row(&c->dq, c->dtype, b, t, h, c->D, head.dq + t * s.Dp, (float)c->scale);
            }
        }
    }
}
