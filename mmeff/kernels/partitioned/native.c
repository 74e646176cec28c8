/* Attention within separate windows on CPUs, forward, for native.py.
 *
 * Windows are never gathered by anybody else: one thread takes one window of one head, packs its keys, values and
 * queries from wherever they lie in the feature map, and writes the result back there. What a window holds is small
 * enough for the first- and second-level cache, so all scores of a few rows exist at once and softmax needs no
 * running maximum. The relative bias is spread out once per work item, which is a run of windows of one head.
 *
 * Reading order: the problem, packing, the tile, a window.
 */
#include <math.h>
#include <omp.h>

#include "../block_sparse/native_simd.h"

#define LONGEST_SUM 128 /* products that are added one after the other */
#define HIDDEN -1e34f   /* the score of a pair that does not attend; 2^it is 0 */
#define ALL_HIDDEN -1e33f /* below this a row has no key at all; far below any score */
#define LOG2E 1.4426950408889634

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* ---------------------------------------------------------------- the problem, as native.py fills it in */

typedef struct {
    void *data;
    int64_t stride[5]; /* elements, of (B, rows, columns, H, D); q that all windows share has the rows of a window */
} Tensor;

typedef struct {
    int64_t B, H, D, window[2], windows[2];
    int64_t dtype; /* 0 float32, 1 bfloat16, 2 float16: of every Tensor */
    int64_t shared_q, run, threads; /* run: windows of a work item */
    double scale;
    Tensor q, k, v, out;
    const float *bias;               /* (H, 2 wh - 1, 2 ww - 1), or NULL */
    const int64_t *place[2];         /* by axis: (windows, window) -> row or column of the map */
    const uint8_t *side[2];          /* likewise: 1 behind the seam of a shift, which nothing sees across */
    const uint8_t *key_mask;         /* 1 where a key may be seen, or NULL */
    int64_t key_mask_stride[3];      /* of (B, rows, columns) */
    void *workspace;                 /* as many bytes as mmeff_partitioned_bytes says */
} Call;

/* For native.py to check that it speaks of the same structure. */
int mmeff_call_bytes(void) { return sizeof(Call); }

/* What one thread works in; Np and Dp are the keys and channels rounded up to LANES. */
typedef struct {
    int64_t N, Np, Dp;
    float *keys;    /* (D, Np): transposed */
    float *values;  /* (N, Dp) */
    float *queries; /* (N, Dp), times scale and log2 e */
    float *bias;    /* (N, Np) in units of log 2; one row where there is no bias. Lanes beyond N are HIDDEN */
    float *hidden;  /* (4, Np): what each side adds to a row, 0 or HIDDEN */
    float *scores;  /* (TILE_ROWS, Np) */
    float *out;     /* (TILE_ROWS, Dp) */
    int32_t *row, *column; /* (N): where a token of the window lies in the map */
    uint8_t *side;  /* (N) */
    uint8_t *seen;  /* (N): whether the key may be seen */
} Room;

static int64_t room_words(const Call *c) {
    const int64_t N = c->window[0] * c->window[1], Np = round_up(N, LANES), Dp = round_up(c->D, LANES);
    return round_up(c->D * Np + 2 * N * Dp + N * Np + 4 * Np + TILE_ROWS * (Np + Dp) + 3 * N, 1024);
}

static Room room_at(const Call *c, float *at) {
    Room r = {.N = c->window[0] * c->window[1]};
    r.Np = round_up(r.N, LANES), r.Dp = round_up(c->D, LANES);
    r.keys = at, at += c->D * r.Np;
    r.values = at, at += r.N * r.Dp;
    r.queries = at, at += r.N * r.Dp;
    r.bias = at, at += r.N * r.Np;
    r.hidden = at, at += 4 * r.Np;
    r.scores = at, at += TILE_ROWS * r.Np;
    r.out = at, at += TILE_ROWS * r.Dp;
    r.row = (int32_t *)at, r.column = r.row + r.N;
    r.side = (uint8_t *)(r.column + r.N), r.seen = r.side + r.N;
    /* lanes that nobody writes later: their scores are hidden, which a NaN in a key would undo */
    for (int64_t d = 0; d < c->D; d++)
        for (int64_t j = r.N; j < r.Np; j++) r.keys[d * r.Np + j] = 0;
    return r;
}

int64_t mmeff_partitioned_bytes(const Call *c) { return 4 * c->threads * room_words(c); }

/* ---------------------------------------------------------------- packing */

/* n elements at `from` as float32, times factor. */
INLINE void read_row(float *to, const Tensor *t, int64_t at, int64_t dtype, int64_t n, float factor) {
    const int64_t step = t->stride[4];
    if (dtype == 0) {
        const float *from = (const float *)t->data + at;
        int64_t d = 0;
        if (step == 1)
            for (; d + LANES <= n; d += LANES) store(to + d, load(from + d) * splat(factor));
        for (; d < n; d++) to[d] = from[d * step] * factor;
    } else if (dtype == 1) {
        const uint16_t *from = (const uint16_t *)t->data + at;
        for (int64_t d = 0; d < n; d++) to[d] = float_of_bfloat(from[d * step]) * factor;
    } else {
        const uint16_t *from = (const uint16_t *)t->data + at;
        for (int64_t d = 0; d < n; d++) to[d] = float_of_half(from[d * step]) * factor;
    }
}

static void write_row(const Tensor *t, int64_t at, int64_t dtype, int64_t n, const float *from, float factor) {
    if (dtype == 0) for (int64_t d = 0; d < n; d++) ((float *)t->data)[at + d] = from[d] * factor;
    else if (dtype == 1) for (int64_t d = 0; d < n; d++) ((uint16_t *)t->data)[at + d] = bfloat_of_float(from[d] * factor);
    else for (int64_t d = 0; d < n; d++) ((uint16_t *)t->data)[at + d] = half_of_float(from[d] * factor);
}

/* The bias of a head for every pair of a window, and HIDDEN in the lanes beyond the last key. */
static void spread_bias(const Call *c, const Room *r, int64_t h) {
    const int64_t wh = c->window[0], ww = c->window[1], rows = c->bias ? r->N : 1;
    const float *table = c->bias ? c->bias + h * (2 * wh - 1) * (2 * ww - 1) : NULL;
    for (int64_t i = 0; i < rows; i++) {
        float *to = r->bias + i * r->Np;
        for (int64_t x = 0; x < wh; x++) /* keys of one row of the window are neighbours in the table */
            for (int64_t y = 0; y < ww; y++)
                to[x * ww + y] = table ? table[(x - i / ww + wh - 1) * (2 * ww - 1) + y - i % ww + ww - 1] * (float)LOG2E : 0;
        for (int64_t j = r->N; j < r->Np; j++) to[j] = HIDDEN;
    }
}

/* Find where the tokens of a window lie and what hides them; return whether anything but lanes beyond the last key does. */
static int find_tokens(const Call *c, const Room *r, int64_t b, int64_t wr, int64_t wc) {
    const int64_t wh = c->window[0], ww = c->window[1], *mask = c->key_mask_stride;
    int mixed = 0;
    for (int64_t x = 0, n = 0; x < wh; x++) {
        const int64_t row = c->place[0][wr * wh + x];
        for (int64_t y = 0; y < ww; y++, n++) {
            const int64_t column = c->place[1][wc * ww + y];
            r->row[n] = row, r->column[n] = column;
            r->side[n] = 2 * c->side[0][wr * wh + x] + c->side[1][wc * ww + y];
            r->seen[n] = !c->key_mask || c->key_mask[b * mask[0] + row * mask[1] + column * mask[2]];
            mixed |= r->side[n] != r->side[0] || !r->seen[n];
        }
    }
    if (mixed)
        for (int64_t s = 0; s < 4; s++)
            for (int64_t j = 0; j < r->Np; j++)
                r->hidden[s * r->Np + j] = j < r->N && r->seen[j] && r->side[j] == s ? 0 : HIDDEN;
    return mixed;
}

/* Pack keys and values of a window, zeros for keys that nobody may see: a NaN there must not come through. */
static void pack_keys(const Call *c, const Room *r, int64_t b, int64_t h) {
    const int64_t k_at = b * c->k.stride[0] + h * c->k.stride[3], v_at = b * c->v.stride[0] + h * c->v.stride[3];
    float *row = r->out; /* free until the first tile */
    for (int64_t j = 0; j < r->N; j++) {
        float *value = r->values + j * r->Dp;
        if (r->seen[j]) {
            read_row(row, &c->k, k_at + r->row[j] * c->k.stride[1] + r->column[j] * c->k.stride[2], c->dtype, c->D, 1);
            read_row(value, &c->v, v_at + r->row[j] * c->v.stride[1] + r->column[j] * c->v.stride[2], c->dtype, c->D, 1);
        } else {
            memset(row, 0, 4 * c->D);
            memset(value, 0, 4 * c->D);
        }
        for (int64_t d = 0; d < c->D; d++) r->keys[d * r->Np + j] = row[d];
        for (int64_t d = c->D; d < r->Dp; d++) value[d] = 0;
    }
}

static void pack_queries(const Call *c, const Room *r, int64_t b, int64_t h) {
    const Tensor *q = &c->q;
    const int64_t q_at = b * q->stride[0] + h * q->stride[3];
    const float factor = (float)(c->scale * LOG2E);
    if (c->shared_q)
        for (int64_t x = 0, i = 0; x < c->window[0]; x++)
            for (int64_t y = 0; y < c->window[1]; y++, i++)
                read_row(r->queries + i * r->Dp, q, q_at + x * q->stride[1] + y * q->stride[2], c->dtype, c->D, factor);
    else
        for (int64_t i = 0; i < r->N; i++)
            read_row(r->queries + i * r->Dp, q, q_at + r->row[i] * q->stride[1] + r->column[i] * q->stride[2], c->dtype,
                     c->D, factor);
}

/* Ask for the queries, keys and values of the next window, while this one computes: they lie in short pieces far apart, which
 * no processor foresees. */
static void fetch_tokens(const Call *c, int64_t b, int64_t wr, int64_t wc, int64_t h) {
    const int64_t size = c->dtype ? 2 : 4, bytes = c->D * size;
    const Tensor *tensors[3] = {&c->k, &c->v, &c->q};
    for (int t = 0; t < (c->shared_q ? 2 : 3); t++) {
        const int64_t *step = tensors[t]->stride;
        const char *map = (const char *)tensors[t]->data + (b * step[0] + h * step[3]) * size;
        for (int64_t x = 0; x < c->window[0]; x++)
            for (int64_t y = 0; y < c->window[1]; y++) {
                const int64_t row = c->place[0][wr * c->window[0] + x], column = c->place[1][wc * c->window[1] + y];
                for (int64_t at = 0; at < bytes; at += 64)
                    __builtin_prefetch(map + (row * step[1] + column * step[2]) * size + at, 0, 2);
            }
    }
}

/* ---------------------------------------------------------------- the tile */

/* c[i][j] += sum over steps s of a[i * lda + s] * b[s * ldb + j] for i < rows and j < vecs * LANES; inlined with constant
 * rows and vecs, so that the sums live in registers. */
INLINE void tile(const int rows, const int vecs, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t steps,
                 float *c, int64_t ldc) {
    vec sum[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) sum[i][j] = splat(0);
    for (int64_t s = 0; s < steps; s++, b += ldb) {
        vec y[TILE_VECS];
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) y[j] = load(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const vec x = splat(a[i * lda + s]);
#pragma GCC unroll 8
            for (int j = 0; j < vecs; j++) sum[i][j] = fma_vec(x, y[j], sum[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) {
            float *to = c + i * ldc + j * LANES;
            store(to, load(to) + sum[i][j]);
        }
}

#define TILE_CASE(rows, vecs) case (rows) * 8 + (vecs): tile(rows, vecs, a, lda, b, ldb, steps, c, ldc); return;
#if TILE_VECS == 4
#define TILE_CASES(rows) TILE_CASE(rows, 1) TILE_CASE(rows, 2) TILE_CASE(rows, 3) TILE_CASE(rows, 4)
#else
#define TILE_CASES(rows) TILE_CASE(rows, 1) TILE_CASE(rows, 2)
#endif
static void run_tile(int64_t rows, int64_t vecs, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t steps,
                     float *c, int64_t ldc) {
    switch (rows * 8 + vecs) {
        TILE_CASES(1) TILE_CASES(2) TILE_CASES(3) TILE_CASES(4) TILE_CASES(5) TILE_CASES(6)
    }
}

/* c (rows x cols) += a b for up to TILE_ROWS rows, cols a multiple of LANES. */
static void multiply(int64_t rows, int64_t cols, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t steps,
                     float *c, int64_t ldc) {
    for (int64_t x = 0; x < cols; x += TILE_VECS * LANES)
        for (int64_t s = 0; s < steps; s += LONGEST_SUM)
            run_tile(rows, min64(TILE_VECS, (cols - x) / LANES), a + s, lda, b + s * ldb + x, ldb,
                     min64(LONGEST_SUM, steps - s), c + x, ldc);
}

/* ---------------------------------------------------------------- a window */

/* Turn a row of scores in units of log 2 into weights, and return 1 / their sum; 0 where there is no key. */
INLINE float softmax_row(float *scores, int64_t lanes) {
    vec highest = load(scores);
    for (int64_t j = LANES; j < lanes; j += LANES) highest = max_vec(load(scores + j), highest);
    const float top = max_of(highest);
    if (top < ALL_HIDDEN) return 0;
    vec sum = splat(0);
    for (int64_t j = 0; j < lanes; j += LANES) {
        const vec weight = exp2_vec(load(scores + j) - splat(top));
        sum += weight;
        store(scores + j, weight);
    }
    return 1 / sum_of(sum);
}

static void attend(const Call *c, const Room *r, int64_t b, int64_t wr, int64_t wc, int64_t h) {
    const int masked = find_tokens(c, r, b, wr, wc);
    const int64_t bias_step = c->bias ? r->Np : 0, *step = c->out.stride, out_at = b * step[0] + h * step[3];
    pack_keys(c, r, b, h);
    pack_queries(c, r, b, h);
    const int64_t tiles = (r->N + TILE_ROWS - 1) / TILE_ROWS; /* of about as many rows each: a tile of one row is slow */
    for (int64_t n = 0; n < tiles; n++) {
        const int64_t i = n * r->N / tiles, rows = (n + 1) * r->N / tiles - i;
        float factor[TILE_ROWS];
        for (int64_t t = 0; t < rows; t++) {
            const float *bias = r->bias + (i + t) * bias_step, *hidden = r->hidden + r->side[i + t] * r->Np;
            float *to = r->scores + t * r->Np;
            if (masked) for (int64_t j = 0; j < r->Np; j += LANES) store(to + j, load(bias + j) + load(hidden + j));
            else memcpy(to, bias, 4 * r->Np);
        }
        multiply(rows, r->Np, r->queries + i * r->Dp, r->Dp, r->keys, r->Np, c->D, r->scores, r->Np);
        for (int64_t t = 0; t < rows; t++) factor[t] = softmax_row(r->scores + t * r->Np, r->Np);
        memset(r->out, 0, 4 * rows * r->Dp);
        multiply(rows, r->Dp, r->scores, r->Np, r->values, r->Dp, r->N, r->out, r->Dp);
        for (int64_t t = 0; t < rows; t++) {
            float *from = r->out + t * r->Dp;
            if (factor[t] == 0) memset(from, 0, 4 * r->Dp); /* what stands there is a sum over hidden keys */
            write_row(&c->out, out_at + r->row[i + t] * step[1] + r->column[i + t] * step[2], c->dtype, c->D, from,
                      factor[t]);
        }
    }
}

void mmeff_partitioned(const Call *c) {
    const int64_t per_image = c->windows[0] * c->windows[1], all = c->B * per_image, runs = (all + c->run - 1) / c->run;
#pragma omp parallel num_threads((int)c->threads)
    {
        const Room r = room_at(c, (float *)c->workspace + room_words(c) * omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < runs * c->H; item++) { /* heads fastest: they lie side by side in memory */
            const int64_t h = item % c->H, first = item / c->H * c->run;
            spread_bias(c, &r, h);
            for (int64_t w = first, end = min64(first + c->run, all); w < end; w++) {
                /* the window after the last one is the first of the next item, if not of this thread, then of its neighbour */
                const int64_t follows = w + 1 < end ? item : item + 1, h_next = follows % c->H;
                const int64_t next = w + 1 < end ? w + 1 : follows / c->H * c->run;
                if (next < all)
                    fetch_tokens(c, next / per_image, next % per_image / c->windows[1], next % c->windows[1], h_next);
                attend(c, &r, w / per_image, w % per_image / c->windows[1], w % c->windows[1], h);
            }
        }
    }
}
