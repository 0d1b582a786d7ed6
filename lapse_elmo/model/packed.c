/* Products of few rows with one matrix that many of them meet: (n, K) @ (K, N), n from 1 to some hundreds.
 *
 * The matrix is packed once, into panels of 2 * W columns in which a row's elements lie side by side (in bfloat16: those
 * of two rows, column by column, as the instruction takes them). A library that packs anew in every product spends more
 * on it than on such a product. The twin is torch's mm, by TorchFactor in products.py.
 *
 * This file includes itself once for each kind: S is what is stored, sums are float, PAIR rows are taken at a time.
 */
#ifndef S
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define W 16 /* floats in a vector */
#define MOST 12 /* rows at a time: 2 * MOST sums stay in registers */
#else
#define W 8
#define MOST 6
#endif
#define PANEL (2 * W)
#define INLINE static inline __attribute__((always_inline))
typedef float vector __attribute__((vector_size(4 * W), aligned(4)));

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, KIND)

#define KIND f
#define S float
#define PAIR 1
INLINE vector get_f(const float *p) { return *(const vector *)p; }
INLINE void put_f(float *p, vector v) { *(vector *)p = v; }
INLINE vector add_product_f(vector sum, const float *a, const float *b) { return sum + *a * get_f(b); }
#include "packed.c"
#undef KIND
#undef S
#undef PAIR

#ifdef __AVX512BF16__
#include <immintrin.h>
#define KIND b
#define S uint16_t
#define PAIR 2
INLINE vector get_b(const uint16_t *p) {
  return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
INLINE void put_b(uint16_t *p, vector v) {
  __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &narrow, sizeof narrow);
}
INLINE vector add_product_b(vector sum, const uint16_t *a, const uint16_t *b) {
  int32_t pair;
  memcpy(&pair, a, sizeof pair);
  return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b));
}
#include "packed.c"
#endif

#else

INLINE void NAME(pack_panel)(long K, long columns, const S *weight, long row_stride, long column_stride, S *panel) {
  for (long k = 0; k < K; k += PAIR)
    for (long j = 0; j < PANEL; j++)
      for (long row = k; row < k + PAIR; row++)
        *panel++ = j < columns ? weight[row * row_stride + j * column_stride] : 0;
}

/* weight: the element of row k and column j is weight[k * row_stride + j * column_stride]. packed: K times N rounded up
 * to whole panels, written. K is a multiple of PAIR. */
void NAME(pack)(long K, long N, const S *weight, long row_stride, long column_stride, S *restrict packed) {
#pragma omp parallel for schedule(static) if (K * N > (1 << 20))
  for (long first = 0; first < N; first += PANEL) {
    const S *columns = weight + first * column_stride;
    if (column_stride == 1 && first + PANEL <= N) /* compiled for this alone: five times as fast */
      NAME(pack_panel)(K, PANEL, columns, row_stride, 1, packed + first * K);
    else
      NAME(pack_panel)(K, N - first, columns, row_stride, column_stride, packed + first * K);
  }
}

/* One panel's columns of some rows. c: rows that lie stride apart. A constant number of rows, so that the sums are
 * registers. */
INLINE void NAME(tile)(const int rows, long K, const S *a, const S *panel, S *c, long stride, int add) {
  vector sum[MOST][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
    for (int half = 0; half < 2; half++) sum[r][half] = add ? NAME(get)(c + r * stride + half * W) : (vector){0};
  for (long k = 0; k < K; k += PAIR, panel += PAIR * PANEL) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      sum[r][0] = NAME(add_product)(sum[r][0], a + r * K + k, panel);
      sum[r][1] = NAME(add_product)(sum[r][1], a + r * K + k, panel + PAIR * W);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
    for (int half = 0; half < 2; half++) NAME(put)(c + r * stride + half * W, sum[r][half]);
}

#define TILE(rows) \
  case rows: NAME(tile)(rows, K, a, panel, c, stride, add); break;
static void NAME(tile_of)(long rows, long K, const S *a, const S *panel, S *c, long stride, int add) {
  switch (rows) {
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if MOST == 12
    TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
  }
}
#undef TILE

/* The last panel's columns where there are fewer than it has: by way of whole rows, for a tile writes whole vectors. */
static void NAME(tile_of_rest)(long rows, long columns, long K, const S *a, const S *panel, S *c, long N, int add) {
  S whole[MOST * PANEL] = {0};
  for (long r = 0; r < rows; r++) memcpy(whole + r * PANEL, c + r * N, columns * sizeof(S));
  NAME(tile_of)(rows, K, a, panel, whole, PANEL, add);
  for (long r = 0; r < rows; r++) memcpy(c + r * N, whole + r * PANEL, columns * sizeof(S));
}

/* c (n, N) = a (n, K) @ the packed matrix, or c += it; rounded once. An element's sum has the same order whatever n is
 * and whatever the number of threads. */
void NAME(multiply)(long n, long K, long N, const S *restrict a, const S *restrict packed, S *restrict c, int add) {
  long num_blocks = (n + MOST - 1) / MOST;
#pragma omp parallel for schedule(static) if (n * K * N > (1 << 20))
  for (long first = 0; first < N; first += PANEL)
    for (long block = 0; block < num_blocks; block++) {
      long row = n * block / num_blocks, rows = n * (block + 1) / num_blocks - row; /* blocks as equal as can be */
      const S *panel = packed + first * K;
      if (first + PANEL <= N)
        NAME(tile_of)(rows, K, a + row * K, panel, c + row * N + first, N, add);
      else
        NAME(tile_of_rest)(rows, N - first, K, a + row * K, panel, c + row * N + first, N, add);
    }
}

#endif
