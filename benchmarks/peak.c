// The most multiply-adds that the vector units do: independent fused multiply-adds on registers, no memory.
#include <omp.h>
#include <time.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
#define CHAINS 16  // more than latency times ports, and no more than there are registers for

// Runs `rounds` rounds on each of `threads` threads and returns the multiply-adds per second of all of them.
double peak(long rounds, int threads, float *sink) {
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
#pragma omp parallel num_threads(threads)
    {
        vec sums[CHAINS], a, b;
        for (int i = 0; i < LANES; i++) a[i] = 0.999f, b[i] = 1e-3f;
        for (int c = 0; c < CHAINS; c++) sums[c] = a * (float)c;
        for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 16
            for (int c = 0; c < CHAINS; c++) sums[c] = sums[c] * a + b;
        }
        float total = 0;
        for (int c = 0; c < CHAINS; c++)
            for (int i = 0; i < LANES; i++) total += sums[c][i];
#pragma omp critical
        *sink += total;  // so that the compiler keeps the work
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    double seconds = (end.tv_sec - begin.tv_sec) + 1e-9 * (end.tv_nsec - begin.tv_nsec);
    return (double)rounds * threads * CHAINS * LANES / seconds;
}
