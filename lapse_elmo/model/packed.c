/* Matmul of few rows with one matrix that many of them meet: (n, K) @ (K, N), n from 1 to some hundreds.
 *
 * The matrix is packed once, into panels of 2 * W columns in which a row's elements lie side by side (in bfloat16: those
 * of two rows, column by column, as the instruction takes them). A library that packs anew in every product spends more
 * on it than on such a product. The fallback is torch's mm, by TorchWeight in products.py.
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

/* Columns that lie stride units of 32 bits apart, of as many units, side by side. W x W of them are transposed in
 * registers: whole lines are read at once, for a stride is often a power of two, of which few lines stay in the cache. */
typedef uint32_t units __attribute__((vector_size(4 * W), aligned(4)));
#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (units){__VA_ARGS__})
#endif
#if W == 16
#define ZIP_LOW(a, b) MIX(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) MIX(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define ZIP_LOW(a, b) MIX(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) MIX(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#endif
INLINE void zip(const units *from, units *to) {
#pragma GCC unroll 8
  for (int i = 0; i < W / 2; i++) {
    to[2 * i] = ZIP_LOW(from[i], from[i + W / 2]);
    to[2 * i + 1] = ZIP_HIGH(from[i], from[i + W / 2]);
  }
}

INLINE void transpose(long number, const uint32_t *columns, long stride, uint32_t *panel) {
  long k = 0;
  for (; k + W <= number; k += W)
    for (int half = 0; half < 2; half++) {
      units lines[W], other[W];
#pragma GCC unroll 16
      for (long j = 0; j < W; j++) lines[j] = *(const units *)(columns + (half * W + j) * stride + k);
      zip(lines, other);
      zip(other, lines);
      zip(lines, other);
#if W == 16
      zip(other, lines);
#else
      memcpy(lines, other, sizeof lines);
#endif
#pragma GCC unroll 16
      for (long i = 0; i < W; i++) *(units *)(panel + (k + i) * PANEL + half * W) = lines[i];
    }
  for (; k < number; k++)
    for (long j = 0; j < PANEL; j++) panel[k * PANEL + j] = columns[j * stride + k];
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, KIND)

#define KIND f
#define S float
#define PAIR 1
#define AT_ONCE 512 /* terms, of which a panel's part stays in the first cache; partial sums are in c, as they are */
INLINE vector get_f(const float *p) { return *(const vector *)p; }
INLINE void put_f(float *p, vector v) { *(vector *)p = v; }
INLINE vector add_product_f(vector sum, const float *a, const float *b) { return sum + *a * get_f(b); }
#include "packed.c"
#undef KIND
#undef S
#undef PAIR
#undef AT_ONCE

#ifdef __AVX512BF16__
#include <immintrin.h>
#define KIND b
#define S uint16_t
#define PAIR 2
#define AT_ONCE K /* all terms: c cannot hold a partial sum */
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
#undef KIND
#undef S
#undef PAIR
#undef AT_ONCE

/* Tiles of 16 x 16 sums, by AMX: 16 rows times 32 terms of a, and 32 terms times 16 columns of a panel, which are 16 rows
 * of 64 bytes that lie 128 bytes apart, as packed above. Linux gives a process the registers when it asks. */
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILE_ROWS 16
#define TILE_TERMS 32
#define BLOCK_TERMS 2048 /* of so many terms the rows of a stay in the cache */
#define PAIRS 4          /* of tiles whose rows stay there */
#define PANELS 8         /* whose sums wait for the next block of terms */
#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18

/* What is at "from" is in memory, and stays there: GCC's intrinsics do not tell the compiler that they read it. */
#define IN_MEMORY(from) __asm__ volatile("" : : "r"(from) : "memory")
#define LOAD(tile, from, stride) \
  do { \
    IN_MEMORY(from); \
    _tile_loadd(tile, from, stride); \
    IN_MEMORY(from); \
  } while (0)

/* Whether this process may use the tiles; to be called before multiply_t. */
int permit_t(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

/* All tiles have the same number of rows of a: sums 0 to 3, a 4 and 5, the panel 6 and 7. */
static void configure(long rows) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int t = 0; t < 8; t++) {
    config.row_bytes[t] = 64;
    config.rows[t] = t < 6 ? rows : TILE_ROWS;
  }
  IN_MEMORY(&config);
  _tile_loadconfig(&config);
  IN_MEMORY(&config);
}

/* 32 columns of sums, of which some are wanted, to c, or added to what is there; rounded once. */
INLINE void round_row(const float *sums, uint16_t *c, long columns, int add) {
  for (int half = 0; half < 2; half++) {
    long wanted = columns - half * W;
    __mmask16 mask = wanted >= W ? 0xffff : wanted > 0 ? (__mmask16)((1u << wanted) - 1) : 0;
    __m512 sum = _mm512_loadu_ps(sums + half * TILE_ROWS * W);
    if (add) {
      __m256i before = _mm256_maskz_loadu_epi16(mask, c + half * W);
      sum = _mm512_add_ps(sum, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(before), 16));
    }
    _mm256_mask_storeu_epi16(c + half * W, mask, (__m256i)_mm512_cvtneps_pbh(sum));
  }
}

/* Two tiles of rows, or one where "two" is 0, times some terms of a panel. "ahead": where the next panel has these terms;
 * [from, to): the lines of 64 bytes, of a tile's 32, that are fetched from there. */
INLINE void add_tiles(const int two, long terms, const uint16_t *const *a, long stride, const uint16_t *panel,
                      const uint16_t *ahead, long from, long to) {
  const uint16_t *first = a[0], *second = a[1];
  for (long k = 0; k < terms; k += TILE_TERMS) {
    LOAD(6, panel + k * PANEL, 4 * PANEL);
    LOAD(4, first + k, stride);
    LOAD(7, panel + k * PANEL + PANEL, 4 * PANEL);
    _tile_dpbf16ps(0, 4, 6);
    for (long line = from; line < to; line++) __builtin_prefetch(ahead + (k + line) * PANEL, 0, 2);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      LOAD(5, second + k, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

/* The last terms, fewer than a tile has, with zeros behind them. */
INLINE void add_rest(const int two, long rows, long terms, const uint16_t *const *a, long K, const uint16_t *panel) {
  uint16_t some[2][TILE_ROWS][TILE_TERMS] = {0}, b[TILE_TERMS * PANEL] = {0};
  const uint16_t *both[2] = {some[0][0], some[1][0]};
  memcpy(b, panel, terms * PANEL * sizeof *b);
  for (int t = 0; t <= two; t++)
    for (long r = 0; r < rows; r++) memcpy(some[t][r], a[t] + r * K, terms * sizeof(uint16_t));
  add_tiles(two, TILE_TERMS, both, sizeof some[0][0], b, b, 0, 0);
}

/* sums: [tile][half][row][column], written, or added to. a: where the terms begin of the first row of each tile. */
INLINE void pair_times_panel(const int two, int more, long rows, long terms, const uint16_t *const *a, long K,
                             const uint16_t *panel, float *sums, long from, long to) {
  long rest = terms % TILE_TERMS, whole = terms - rest;
  if (more) {
    LOAD(0, sums, 64);
    LOAD(1, sums + 256, 64);
    if (two) {
      LOAD(2, sums + 512, 64);
      LOAD(3, sums + 768, 64);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  add_tiles(two, whole, a, 2 * K, panel, panel + K * PANEL, from, to);
  if (rest) {
    const uint16_t *last[2] = {a[0] + whole, a[1] + whole};
    add_rest(two, rows, rest, last, K, panel + whole * PANEL);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (two) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

/* Some panels, from "packed" on, times the tiles from "tile" to "end", at most 2 * PAIRS. The n rows are cut into tiles of
 * equally many rows; the last tile begins earlier where it would be shorter, and gives only the rows that the one before
 * it lacks. So an element's sum has the same order whatever n is. */
static void panels_times_tiles(long n, long rows, long tile, long end, long K, long columns, long N, const uint16_t *a,
                               const uint16_t *packed, uint16_t *c, int add) {
  float sums[PANELS][PAIRS][4 * TILE_ROWS * W] __attribute__((aligned(64)));
  long pairs = (end - tile + 1) / 2;
  for (long k = 0; k < K; k += BLOCK_TERMS) {
    long terms = K - k < BLOCK_TERMS ? K - k : BLOCK_TERMS;
    for (long p = 0; p * PANEL < columns; p++)
      for (long q = 0; q < pairs; q++) {
        const uint16_t *panel = packed + (p * K + k) * PANEL, *starts[2];
        int two = tile + 2 * q + 1 < end;
        if (k + terms == K)
          for (long row = (tile + 2 * q) * rows; row < (tile + 2 * q + 1 + two) * rows && row < n; row++)
            __builtin_prefetch(c + row * N + p * PANEL, 1);
        long from = TILE_TERMS * q / pairs, to = TILE_TERMS * (q + 1) / pairs;
        for (int t = 0; t < 2; t++) {
          long first = (tile + 2 * q + t * two) * rows;
          starts[t] = a + (first + rows > n ? n - rows : first) * K + k;
        }
        if (two)
          pair_times_panel(1, k > 0, rows, terms, starts, K, panel, sums[p][q], from, to);
        else
          pair_times_panel(0, k > 0, rows, terms, starts, K, panel, sums[p][q], from, to);
        if (k + terms < K) continue;
        for (long row = (tile + 2 * q) * rows; row < (tile + 2 * q + 1 + two) * rows && row < n; row++) {
          long t = row / rows - tile - 2 * q, start = (starts[t] - k - a) / K;
          const float *found = sums[p][q] + (2 * t * TILE_ROWS + row - start) * W;
          round_row(found, c + row * N + p * PANEL, columns - p * PANEL, add);
        }
      }
  }
}

/* As multiply_b. */
void multiply_t(long n, long K, long N, const uint16_t *restrict a, const uint16_t *restrict packed,
                uint16_t *restrict c, int add) {
  if (!n) return;
  long num_tiles = (n + TILE_ROWS - 1) / TILE_ROWS, rows = (n + num_tiles - 1) / num_tiles;
  long group = (N / 4 + PANEL - 1) / PANEL * PANEL; /* columns at a time, at least four times if they can be */
  group = group < PANEL ? PANEL : group > PANELS * PANEL ? PANELS * PANEL : group;
#pragma omp parallel if (n * K * N > (1 << 21))
  {
    configure(rows);
#pragma omp for schedule(static)
    for (long column = 0; column < N; column += group)
      for (long tile = 0; tile < num_tiles; tile += 2 * PAIRS) {
        long end = tile + 2 * PAIRS < num_tiles ? tile + 2 * PAIRS : num_tiles;
        long columns = N - column < group ? N - column : group;
        panels_times_tiles(n, rows, tile, end, K, columns, N, a, packed + column * K, c + column, add);
      }
    _tile_release();
  }
}
#endif
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
    if (row_stride == 1 && first + PANEL <= N && column_stride % PAIR == 0 && (uintptr_t)columns % 4 == 0)
      transpose(K / PAIR, (const uint32_t *)columns, column_stride / PAIR, (uint32_t *)(packed + first * K));
    else if (column_stride == 1 && first + PANEL <= N) /* compiled for this alone: five times as fast */
      NAME(pack_panel)(K, PANEL, columns, row_stride, 1, packed + first * K);
    else
      NAME(pack_panel)(K, N - first, columns, row_stride, column_stride, packed + first * K);
  }
}

/* One panel's columns of some rows. c: rows that lie stride apart. A constant number of rows, so that the sums are
 * registers. */
INLINE void NAME(tile)(const int rows, long terms, long K, const S *a, const S *panel, S *c, long stride, int add) {
  vector sum[MOST][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
    for (int half = 0; half < 2; half++) sum[r][half] = add ? NAME(get)(c + r * stride + half * W) : (vector){0};
  for (long k = 0; k < terms; k += PAIR, panel += PAIR * PANEL) {
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
  case rows: NAME(tile)(rows, terms, K, a, panel, c, stride, add); break;
static void NAME(tile_of)(long rows, long terms, long K, const S *a, const S *panel, S *c, long stride, int add) {
  switch (rows) {
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if MOST == 12
    TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
  }
}
#undef TILE

/* The last panel's columns where there are fewer than it has: by way of whole rows, for a tile writes whole vectors. */
static void NAME(tile_of_rest)(long rows, long columns, long terms, long K, const S *a, const S *panel, S *c, long N, int add) {
  S whole[MOST * PANEL] = {0};
  for (long r = 0; r < rows; r++) memcpy(whole + r * PANEL, c + r * N, columns * sizeof(S));
  NAME(tile_of)(rows, terms, K, a, panel, whole, PANEL, add);
  for (long r = 0; r < rows; r++) memcpy(c + r * N, whole + r * PANEL, columns * sizeof(S));
}

/* c (n, N) = a (n, K) @ the packed matrix, or c += it; rounded once. An element's sum has the same order whatever n is
 * and whatever the number of threads. */
void NAME(multiply)(long n, long K, long N, const S *restrict a, const S *restrict packed, S *restrict c, int add) {
  long num_blocks = (n + MOST - 1) / MOST;
#pragma omp parallel if (n * K * N > (1 << 20))
  for (long k = 0; k < K; k += AT_ONCE) {
    long terms = K - k < AT_ONCE ? K - k : AT_ONCE;
#pragma omp for schedule(static) nowait /* a thread has the same columns each time */
    for (long first = 0; first < N; first += PANEL)
      for (long block = 0; block < num_blocks; block++) {
        long row = n * block / num_blocks, rows = n * (block + 1) / num_blocks - row; /* blocks as equal as can be */
        const S *some = a + row * K + k, *panel = packed + first * K + k * PANEL;
        S *sums = c + row * N + first;
        if (first + PANEL <= N)
          NAME(tile_of)(rows, terms, K, some, panel, sums, N, add || k);
        else
          NAME(tile_of_rest)(rows, N - first, terms, K, some, panel, sums, N, add || k);
      }
  }
}

#endif
