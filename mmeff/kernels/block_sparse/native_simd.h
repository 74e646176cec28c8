/* Vectors of floats for native.c: as wide as the instruction set that this file is compiled for.
 *
 * GCC and Clang do arithmetic, comparisons and conversions on vector types by themselves; intrinsics appear only where
 * the compilers need telling. A mask is an int32 vector whose lanes are 0 or -1.
 */
#ifndef MMEFF_NATIVE_SIMD_H
#define MMEFF_NATIVE_SIMD_H

#include <stdint.h>
#include <string.h>

/* TILE_ROWS x TILE_VECS accumulators must fit the registers beside TILE_VECS operands and a broadcast: there are 32
 * registers with AVX-512 and on most other machines, 16 with AVX2, where the larger tile would spill. */
#define TILE_ROWS 6
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define LANES 16
#define TILE_VECS 4
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
#define TILE_VECS 2
#else
#define LANES 4
#define TILE_VECS 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), may_alias));
/* the same in memory, at any address */
typedef float vec_in_memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec_in_memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t bytes_in_memory __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE vec load(const float *p) { return *(const vec_in_memory *)p; }
INLINE void store(float *p, vec x) { *(vec_in_memory *)p = x; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE ivec isplat(int32_t x) { return x - (ivec){0}; }
INLINE vec select_lanes(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

/* Lanes below n. */
INLINE ivec first_lanes(int n) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < isplat(n);
}

/* The first `n` elements at p, zero beyond: what lies there may not be ours to read. */
INLINE ivec load_ints(const int32_t *p, int64_t n) {
    if (n >= LANES) return *(const ivec_in_memory *)p;
    ivec x = {0};
    memcpy(&x, p, 4 * n);
    return x;
}
INLINE ivec load_bools(const uint8_t *p, int64_t n) {
    bytes x = {0};
    if (n >= LANES) x = *(const bytes_in_memory *)p;
    else memcpy(&x, p, n);
    return __builtin_convertvector(x, ivec) != isplat(0);
}

/* x * y + z in one rounding; the larger of x and y, and y where either is NaN; the nearest integer;
 * y * 2^n for integral n, and 0 for n below the range of floats. */
#if LANES == 16
INLINE vec fma_vec(vec x, vec y, vec z) { return _mm512_fmadd_ps(x, y, z); }
INLINE vec max_vec(vec x, vec y) { return _mm512_max_ps(x, y); }
INLINE vec round_vec(vec x) { return _mm512_roundscale_ps(x, 8); }
INLINE vec ldexp_vec(vec y, vec n) { return _mm512_scalef_ps(y, n); }
INLINE float max_of(vec x) { return _mm512_reduce_max_ps(x); }
#elif LANES == 8
INLINE vec fma_vec(vec x, vec y, vec z) { return _mm256_fmadd_ps(x, y, z); }
INLINE vec max_vec(vec x, vec y) { return _mm256_max_ps(x, y); }
INLINE vec round_vec(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
INLINE vec fma_vec(vec x, vec y, vec z) { return x * y + z; }
INLINE vec max_vec(vec x, vec y) { return select_lanes(x > y, x, y); }
/* Adding 1.5 * 2^23 pushes the fraction out of the mantissa; larger numbers come out wrong, so they are held back. */
INLINE vec round_vec(vec x) {
    const vec big = splat(12582912.0f);
    return max_vec(splat(-2097152.0f), x) + big - big;
}
#endif
#if LANES != 16
INLINE vec ldexp_vec(vec y, vec n) {
    const vec held = max_vec(splat(-126.0f), n); /* NaN stays NaN in y; what it converts to here is of no account */
    const vec product = (vec)((ivec)y + (__builtin_convertvector(held, ivec) << 23));
    return select_lanes(n < splat(-126.0f), splat(0), product);
}
INLINE float max_of(vec x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}
#endif
INLINE float sum_of(vec x) { /* pairwise, in an order that does not depend on the compiler */
    float half[LANES];
    store(half, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) half[i] += half[i + n];
    return half[0];
}

/* 2^x to two thirds of a unit in the last place, and exactly 1 for 0: x = n + f with |f| <= 1/2, and the polynomial of
 * degree 6 for 2^f with the smallest relative error (2e-9) among those that begin with 1. */
INLINE vec exp2_vec(vec x) {
    const vec n = round_vec(x), f = x - n;
    vec y = splat(0x1.41fbbc1cd6432p-13f);
    y = fma_vec(y, f, splat(0x1.5f3e531c62b9dp-10f));
    y = fma_vec(y, f, splat(0x1.3b2d4cf1fe84bp-7f));
    y = fma_vec(y, f, splat(0x1.c6aee88e42c4fp-5f));
    y = fma_vec(y, f, splat(0x1.ebfbdc3c2fc7dp-3f));
    y = fma_vec(y, f, splat(0x1.62e430af27488p-1f));
    y = fma_vec(y, f, splat(1));
    return ldexp_vec(y, n);
}

/* ---- half precision ---- */

/* Pairs: each 32-bit lane holds two bfloat16 numbers; pairs_dot adds both products of a lane to a float32 lane. */
#if LANES == 16 && defined(__AVX512BF16__)
#define HAS_PAIRS 1
INLINE vec pairs_dot(vec x, vec y, vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
/* 32 bfloat16 numbers: the lanes of low, then those of high */
INLINE vec pairs_of(vec low, vec high) { return (vec)_mm512_cvtne2ps_pbh(high, low); }
#else
#define HAS_PAIRS 0
#endif

INLINE float float_of_bfloat(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE uint16_t bfloat_of_float(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}
#ifdef __F16C__
INLINE float float_of_half(uint16_t x) { return _cvtsh_ss(x); }
INLINE uint16_t half_of_float(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE float float_of_half(uint16_t x) {
    _Float16 y;
    memcpy(&y, &x, 2);
    return (float)y;
}
INLINE uint16_t half_of_float(float x) {
    const _Float16 y = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &y, 2);
    return bits;
}
#endif

#endif
