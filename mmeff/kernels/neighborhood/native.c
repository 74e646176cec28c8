/* Neighborhood attention on CPUs, forward and backward, for native.py.
 *
 * Windows are small: a few dozen keys per query. A vector holds channels of one key, so that keys and values are read where
 * they lie, whatever the window looks like; LANES such products are summed across at a time. What tells the windows of two
 * queries apart is where they begin, and their place in a table of biases: `slot` lists the keys of any window from its
 * first key on.
 */
#include <math.h>
#include <omp.h>

#include "../block_sparse/native_simd.h"

#define MOST_KEYS 256   /* of a window, rounded up to LANES */
#define MOST_VECS 16    /* vectors of channels of a head: 64 channels at least, 256 at most */
#define PARTIAL_SUMS 4  /* of an output: additions that do not wait for each other */
#define LOG2E 1.4426950408889634

/* ---------------------------------------------------------------- the problem, as native.py fills it in */

typedef struct {
    float *data;
    int64_t b, axis[3], h; /* strides in elements; channels lie side by side */
} Tensor;

typedef struct {
    int64_t B, H, Hk, length[3];
    int64_t vecs;       /* channels of a head, in vectors */
    int64_t keys;       /* of a window, hidden ones included */
    int64_t table_head; /* elements from head to head of the table; 0: shared */
    int64_t threads, rows_at_a_time;
    double scale;
    Tensor q, k, v, out;
    float *lse;               /* (B, H, N), or NULL */
    Tensor dout, dq, dk, dv;  /* backward only; dk and dv, alike in strides, begin as zeros */
    const float *delta;       /* (B, N, H): what to take from the gradient of a weight */
    float *dtable;            /* (B, H, kinds, keys rounded up), of zeros; or NULL */
    int64_t dtable_head;      /* elements from head to head of it */
    const int64_t *first[3];  /* per coordinate of each axis: of the first key of its window, */
    const int64_t *kind[3];   /* and what it adds to the place in the table */
    const int64_t *order[3];  /* coordinates in the order of visits: one dilation class after the other */
    const int64_t *key_slot, *value_slot, *grad_slot; /* (keys rounded up to LANES): elements from the first key to each */
    const float *table; /* (heads or 1, kinds, keys rounded up): added to scaled scores, in units of log 2; hides with -1e30 */
} Call;

/* For native.py to check that it speaks of the same structure, and to pad what it hands over. */
int mmeff_na_call_bytes(void) { return sizeof(Call); }
int mmeff_na_lanes(void) { return LANES; }

/* ---------------------------------------------------------------- sums across lanes */

/* Lane i of the result is the sum over the lanes of part[i]. */
INLINE vec sums_of(const vec *part) {
#if LANES == 16
    __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512 a = part[2 * i], b = part[2 * i + 1];
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
#elif LANES == 8
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(part[0], part[1]), _mm256_hadd_ps(part[2], part[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(part[4], part[5]), _mm256_hadd_ps(part[6], part[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
    vec sums;
    for (int i = 0; i < LANES; i++) sums[i] = sum_of(part[i]);
    return sums;
#endif
}

/* ---------------------------------------------------------------- one query */

/* Products of the query with LANES keys. */
INLINE vec scores_of(const int vecs, const vec *q, const float *keys, const int64_t *slot) {
    vec part[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const float *key = keys + slot[i];
        part[i] = q[0] * load(key);
#pragma GCC unroll 16
        for (int j = 1; j < vecs; j++) part[i] = fma_vec(q[j], load(key + j * LANES), part[i]);
    }
    return sums_of(part);
}

/* `vecs` vectors of channels of the values, weighed, summed and scaled. */
INLINE void weigh(const int vecs, const float *weights, const float *values, const int64_t *slot, int64_t n, float factor,
                  float *out) {
    vec sum[2][PARTIAL_SUMS];
#pragma GCC unroll 2
    for (int j = 0; j < vecs; j++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTIAL_SUMS; p++) sum[j][p] = splat(0);
    int64_t i = 0;
    for (; i + PARTIAL_SUMS <= n; i += PARTIAL_SUMS)
#pragma GCC unroll 4
        for (int p = 0; p < PARTIAL_SUMS; p++) {
            const vec weight = splat(weights[i + p]);
            const float *value = values + slot[i + p];
#pragma GCC unroll 2
            for (int j = 0; j < vecs; j++) sum[j][p] = fma_vec(weight, load(value + j * LANES), sum[j][p]);
        }
    for (; i < n; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++)
            sum[j][0] = fma_vec(splat(weights[i]), load(values + slot[i] + j * LANES), sum[j][0]);
#pragma GCC unroll 2
    for (int j = 0; j < vecs; j++)
        store(out + j * LANES, ((sum[j][0] + sum[j][1]) + (sum[j][2] + sum[j][3])) * splat(factor));
}

/* All `vecs` vectors of channels. */
INLINE void weigh_all(const int vecs, const float *weights, const float *values, const int64_t *slot, int64_t n,
                      float factor, float *out) {
    int j = 0;
    for (; j + 2 <= vecs; j += 2) weigh(2, weights, values + j * LANES, slot, n, factor, out + j * LANES);
    if (j < vecs) weigh(1, weights, values + j * LANES, slot, n, factor, out + j * LANES);
}

/* Weights of the keys before they are divided by their sum, which is returned; the largest is 1, for the score *most in units
 * of log 2. q is scaled already. */
INLINE float weights_of(const Call *c, const int vecs, const vec *q, const float *keys, const float *table, float *weights,
                        float *most) {
    vec top = splat(-INFINITY), total = splat(0);
    for (int64_t i = 0; i < c->keys; i += LANES) {
        const vec scores = scores_of(vecs, q, keys, c->key_slot + i) + load(table + i);
        store(weights + i, scores);
        top = max_vec(scores, top);
    }
    *most = max_of(top);
    for (int64_t i = 0; i < c->keys; i += LANES) {
        const vec weight = exp2_vec(load(weights + i) - splat(*most));
        store(weights + i, weight);
        total += weight;
    }
    return sum_of(total);
}

/* Attend from one query; `vecs` is c->vecs, for the compiler to know. Returns the log-sum-exp. */
INLINE float attend(const Call *c, const int vecs, const float *query, const float *keys, const float *values,
                    const float *table, float *out) {
    vec q[MOST_VECS] = {splat(0)};
    float weights[MOST_KEYS], most;
    const vec factor = splat((float)(c->scale * LOG2E));
#pragma GCC unroll 16
    for (int j = 0; j < vecs; j++) q[j] = load(query + j * LANES) * factor;
    const float sum = weights_of(c, vecs, q, keys, table, weights, &most);
    weigh_all(vecs, weights, values, c->value_slot, c->keys, 1 / sum, out);
    return (float)(most / LOG2E + log(sum));
}

/* What one query gives to its own gradient and adds to those of its keys, values and biases:
 *
 *     dS = P * (dout v^T - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout,  dbias = dS. */
INLINE void push_back(const Call *c, const int vecs, const float *query, const float *keys, const float *values,
                      const float *table, const float *dout, float delta, float *dq, float *dk, float *dv, float *dtable) {
    vec q[MOST_VECS] = {splat(0)}, grad[MOST_VECS] = {splat(0)};
    float weights[MOST_KEYS], dscores[MOST_KEYS], most;
    const vec factor = splat((float)(c->scale * LOG2E));
#pragma GCC unroll 16
    for (int j = 0; j < vecs; j++) q[j] = load(query + j * LANES) * factor, grad[j] = load(dout + j * LANES);
    const vec share = splat(1 / weights_of(c, vecs, q, keys, table, weights, &most));
    for (int64_t i = 0; i < c->keys; i += LANES) {
        const vec weight = load(weights + i) * share;
        const vec dscore = weight * (scores_of(vecs, grad, values, c->value_slot + i) - splat(delta));
        store(weights + i, weight);
        store(dscores + i, dscore);
        if (dtable) store(dtable + i, load(dtable + i) + dscore);
    }
    weigh_all(vecs, dscores, keys, c->key_slot, c->keys, (float)c->scale, dq);
    for (int64_t i = 0; i < c->keys; i++) {
        const vec dscore = splat(dscores[i] / (float)LOG2E), weight = splat(weights[i]); /* q holds scale and log2 e */
        float *to_k = dk + c->grad_slot[i], *to_v = dv + c->grad_slot[i];
#pragma GCC unroll 16
        for (int j = 0; j < vecs; j++) {
            store(to_k + j * LANES, fma_vec(dscore, q[j], load(to_k + j * LANES)));
            store(to_v + j * LANES, fma_vec(weight, grad[j], load(to_v + j * LANES)));
        }
    }
}

/* ---------------------------------------------------------------- the grid */

#define AT(t, head, x, y) ((t).data + b * (t).b + (head) * (t).h + (x) * (t).axis[0] + (y) * (t).axis[1])

/* The queries of one head at coordinates i0, i1 of the first axes; `backward` pushes their gradients instead. */
INLINE void visit_row(const Call *c, const int vecs, const int backward, int64_t b, int64_t h, int64_t i0, int64_t i1) {
    const int64_t kv_head = h / (c->H / c->Hk), from0 = c->first[0][i0], from1 = c->first[1][i1];
    const int64_t kind = c->kind[0][i0] + c->kind[1][i1], token = (i0 * c->length[1] + i1) * c->length[2];
    const int64_t N = c->length[0] * c->length[1] * c->length[2];
    const float *query = AT(c->q, h, i0, i1), *keys = AT(c->k, kv_head, from0, from1);
    const float *values = AT(c->v, kv_head, from0, from1), *table = c->table + h * c->table_head + kind;
    for (int64_t n = 0; n < c->length[2]; n++) {
        const int64_t i = c->order[2][n], from = c->first[2][i];
        const float *qi = query + i * c->q.axis[2], *table_i = table + c->kind[2][i];
        const float *ki = keys + from * c->k.axis[2], *vi = values + from * c->v.axis[2];
        if (backward) {
            const int64_t to = from * c->dk.axis[2];
            float *dtable = c->dtable ? c->dtable + (b * c->H + h) * c->dtable_head + kind + c->kind[2][i] : NULL;
            push_back(c, vecs, qi, ki, vi, table_i, AT(c->dout, h, i0, i1) + i * c->dout.axis[2],
                      c->delta[(b * N + token + i) * c->H + h], AT(c->dq, h, i0, i1) + i * c->dq.axis[2],
                      AT(c->dk, kv_head, from0, from1) + to, AT(c->dv, kv_head, from0, from1) + to, dtable);
        } else {
            const float lse = attend(c, vecs, qi, ki, vi, table_i, AT(c->out, h, i0, i1) + i * c->out.axis[2]);
            if (c->lse) c->lse[(b * c->H + h) * N + token + i] = lse;
        }
    }
}

/* The usual widths of a head are compiled each on its own. */
#define VISIT(backward, b, h, i0, i1) \
    switch (c->vecs) { \
        case 1: visit_row(c, 1, backward, b, h, i0, i1); break; \
        case 2: visit_row(c, 2, backward, b, h, i0, i1); break; \
        case 4: visit_row(c, 4, backward, b, h, i0, i1); break; \
        default: visit_row(c, (int)c->vecs, backward, b, h, i0, i1); \
    }

/* Attend from every query of the grid. A row is computed by one thread, so that their number changes no result. */
void mmeff_na_forward(const Call *c) {
    const int64_t rows = c->length[0] * c->length[1], n = c->B * c->H * rows;
#pragma omp parallel for num_threads((int)c->threads) schedule(dynamic, c->rows_at_a_time)
    for (int64_t item = 0; item < n; item++) { /* rows fastest: neighbours share most of their keys */
        const int64_t b = item / rows / c->H, h = item / rows % c->H;
        const int64_t i0 = c->order[0][item % rows / c->length[1]], i1 = c->order[1][item % c->length[1]];
        VISIT(0, b, h, i0, i1)
    }
}

/* Push the gradients of every query back. A key head is one thread's, which adds in the order of the queries. */
void mmeff_na_backward(const Call *c) {
    const int64_t rows = c->length[0] * c->length[1], group = c->H / c->Hk;
#pragma omp parallel for num_threads((int)c->threads) schedule(dynamic, 1)
    for (int64_t pair = 0; pair < c->B * c->Hk; pair++)
        for (int64_t g = 0; g < group; g++)
            for (int64_t row = 0; row < rows; row++) {
                const int64_t b = pair / c->Hk, h = pair % c->Hk * group + g;
                const int64_t i0 = c->order[0][row / c->length[1]], i1 = c->order[1][row % c->length[1]];
                VISIT(1, b, h, i0, i1)
            }
}
