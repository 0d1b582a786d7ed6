/* Matrix products of few rows with a prepacked weight: c (n, N) = a (n, K) @ weight (K, N), n from 1 to a few hundred.
 *
 * BLAS libraries reorder ("pack") the weight in every product. For so few rows that takes longer than the product
 * itself, and the steps of an LSTM use the same weight many times. So the weight is packed once, by pack_*, and then
 * multiplied many times, by multiply_*. The fallback is torch.mm (TorchWeight in products.py).
 *
 * Prepacked layout. The N columns are cut into panels of PANEL = 2 * W columns, where W is the number of floats in a
 * vector register. Panels are stored one after another, the last one padded with zero columns. In a panel, all K rows
 * follow one another, so a product reads it sequentially:
 *
 *   float32    panel[k * PANEL + j]                   = weight[k][first + j]
 *   bfloat16   panel[(k - k % 2) * PANEL + 2 * j + k % 2] = weight[k][first + j]
 *
 * In bfloat16, rows 2i and 2i + 1 are interleaved column by column, because the dot product instructions multiply pairs
 * of consecutive k. AMX tile registers expect the same order.
 *
 * Tiling. The innermost kernel computes up to MAX_ROWS rows times one panel of c. It keeps these 2 * MAX_ROWS vectors
 * of sums in registers while it runs over k: it loads a row of the panel (two vectors) and, for each row of a,
 * broadcasts one element and does two multiply-adds. Around it, multiply_* loops over the blocks of rows, the panels
 * (which OpenMP distributes over threads) and, in float32, blocks of BLOCK_K terms, so that a panel's part stays in
 * the cache for all rows. multiply_t does the same with AMX: 16 x 16 tiles of sums, two by two.
 *
 * Each element of c is summed in the same order whatever n and the number of threads, so a row's result is bitwise
 * independent of the other rows.
 *
 * This file includes itself once per storage type, and appends a suffix to all names: _f for float, _b for bfloat16.
 * S is the type of stored elements, K_STEP the number of consecutive k per multiply-add. Sums are float.
 */
#ifndef S
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define W 16 /* floats in a vector */
#define MAX_ROWS 12 /* rows of a per innermost kernel: 2 * MAX_ROWS of the 32 vector registers hold sums */
#else
#define W 8
#define MAX_ROWS 6 /* of 16 vector registers */
#endif
#define PANEL (2 * W)
#define INLINE static inline __attribute__((always_inline))
typedef float vector __attribute__((vector_size(4 * W), aligned(4)));

/* Packing a weight with contiguous columns transposes 32-bit words (in bfloat16: pairs of elements). It is done W x W
 * words at a time in registers, from vectors along the columns. Reading single words along the rows would be slow: the
 * stride is often a power of two, so that the cache lines which it touches evict one another. */
typedef uint32_t words __attribute__((vector_size(4 * W), aligned(4)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
#if W == 16
#define INTERLEAVE_LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define INTERLEAVE_LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define INTERLEAVE_HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#endif
INLINE void interleave(const words *from, words *to) {
#pragma GCC unroll 8
  for (int i = 0; i < W / 2; i++) {
    to[2 * i] = INTERLEAVE_LOW(from[i], from[i + W / 2]);
    to[2 * i + 1] = INTERLEAVE_HIGH(from[i], from[i + W / 2]);
  }
}

/* columns: PANEL columns of num_words words, `stride` words apart. */
INLINE void transpose(long num_words, const uint32_t *columns, long stride, uint32_t *panel) {
  long k = 0;
  for (; k + W <= num_words; k += W)
    for (int half = 0; half < 2; half++) { /* a panel has two vectors of columns */
      words lines[W], other[W];
#pragma GCC unroll 16
      for (long j = 0; j < W; j++) lines[j] = *(const words *)(columns + (half * W + j) * stride + k);
      interleave(lines, other);
      interleave(other, lines);
      interleave(lines, other);
#if W == 16
      interleave(other, lines);
#else
      memcpy(lines, other, sizeof lines);
#endif
#pragma GCC unroll 16
      for (long i = 0; i < W; i++) *(words *)(panel + (k + i) * PANEL + half * W) = lines[i];
    }
  for (; k < num_words; k++)
    for (long j = 0; j < PANEL; j++) panel[k * PANEL + j] = columns[j * stride + k];
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, KIND)

#define KIND f
#define S float
#define K_STEP 1
#define BLOCK_K 512 /* of a panel, 64 KiB (32 KiB without AVX-512), which stay in the cache; c holds the partial sums */
INLINE vector get_f(const float *p) { return *(const vector *)p; }
INLINE void put_f(float *p, vector v) { *(vector *)p = v; }
INLINE vector add_product_f(vector sum, const float *a, const float *b) { return sum + *a * get_f(b); }
#include "prepacked.c"
#undef KIND
#undef S
#undef K_STEP
#undef BLOCK_K

#ifdef __AVX512BF16__
#include <immintrin.h>
#define KIND b
#define S uint16_t
#define K_STEP 2
#define BLOCK_K K /* no blocks: a partial sum in c, which is bfloat16, would be rounded */
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
#include "prepacked.c"
#undef KIND
#undef S
#undef K_STEP
#undef BLOCK_K

/* Products by AMX. One instruction adds to a tile of 16 x 16 sums the product of 16 rows times 32 terms of a and 32
 * terms times 16 columns of a panel. In the prepacked layout, the latter is a tile of 16 rows of 64 bytes, which lie 128
 * bytes apart. Linux lets a process use the tile registers only after a system call. */
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILE_ROWS 16
#define TILE_TERMS 32
#define BLOCK_TERMS 2048 /* terms k per block, such that the rows of a below stay in the cache */
#define PAIRS 4          /* pairs of row tiles per block */
#define PANELS 8         /* panels per block, whose sums are kept until the next block of terms */
#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18

/* Make the compiler store everything to memory at this point: GCC does not know that the tile intrinsics read it. */
#define IN_MEMORY(from) __asm__ volatile("" : : "r"(from) : "memory")
#define LOAD(tile, from, stride) \
  do { \
    IN_MEMORY(from); \
    _tile_loadd(tile, from, stride); \
    IN_MEMORY(from); \
  } while (0)

/* Request permission to use the tile registers; returns whether it was granted. Call before multiply_t. */
int permit_t(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

/* Set the tile shapes: tiles 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 a panel. All but the last two have `rows`
 * rows. */
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

/* Store the first `columns` of 32 sums to c, or add them to it if `add`; rounds to bfloat16 once. */
INLINE void round_row(const float *sums, uint16_t *c, long columns, int add) {
  for (int half = 0; half < 2; half++) {
    long rest = columns - half * W;
    __mmask16 mask = rest >= W ? 0xffff : rest > 0 ? (__mmask16)((1u << rest) - 1) : 0;
    __m512 sum = _mm512_loadu_ps(sums + half * TILE_ROWS * W);
    if (add) {
      __m256i before = _mm256_maskz_loadu_epi16(mask, c + half * W);
      sum = _mm512_add_ps(sum, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(before), 16));
    }
    _mm256_mask_storeu_epi16(c + half * W, mask, (__m256i)_mm512_cvtneps_pbh(sum));
  }
}

/* Multiply two row tiles (one if `two` is 0) by some terms of a panel. ahead: the same terms in the next panel; of the
 * 32 cache lines there per TILE_TERMS terms, those in [from, to) are prefetched. */
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

/* Multiply the last terms, fewer than TILE_TERMS, padded with zeros. */
INLINE void add_rest(const int two, long rows, long terms, const uint16_t *const *a, long K, const uint16_t *panel) {
  uint16_t padded[2][TILE_ROWS][TILE_TERMS] = {0}, b[TILE_TERMS * PANEL] = {0};
  const uint16_t *both[2] = {padded[0][0], padded[1][0]};
  memcpy(b, panel, terms * PANEL * sizeof *b);
  for (int t = 0; t <= two; t++)
    for (long r = 0; r < rows; r++) memcpy(padded[t][r], a[t] + r * K, terms * sizeof(uint16_t));
  add_tiles(two, TILE_TERMS, both, sizeof padded[0][0], b, b, 0, 0);
}

/* Multiply a pair of row tiles by some terms of a panel. sums: [tile][half of the panel][row][column], added to if
 * `accumulate`, otherwise overwritten. a: the first term of the first row of each tile. */
INLINE void pair_times_panel(const int two, int accumulate, long rows, long terms, const uint16_t *const *a, long K,
                             const uint16_t *panel, float *sums, long from, long to) {
  long rest = terms % TILE_TERMS, whole = terms - rest;
  if (accumulate) {
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

/* Multiply the row tiles from `tile` to `end`, at most 2 * PAIRS, by the panels of `columns` columns from `packed` on.
 * The n rows are cut into tiles with the same number of rows. If the last tile would be shorter, it starts earlier,
 * overlapping the tile before, and only its other rows are stored. So an element's sum has the same order for any n. */
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

/* The same as multiply_b, by AMX. */
void multiply_t(long n, long K, long N, const uint16_t *restrict a, const uint16_t *restrict packed,
                uint16_t *restrict c, int add) {
  if (!n) return;
  long num_tiles = (n + TILE_ROWS - 1) / TILE_ROWS, rows = (n + num_tiles - 1) / num_tiles;
  long group = (N / 4 + PANEL - 1) / PANEL * PANEL; /* columns per block: at least four blocks if possible */
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
  for (long k = 0; k < K; k += K_STEP)
    for (long j = 0; j < PANEL; j++)
      for (long row = k; row < k + K_STEP; row++)
        *panel++ = j < columns ? weight[row * row_stride + j * column_stride] : 0;
}

/* Pack a weight, whose element (k, j) is weight[k * row_stride + j * column_stride]. packed: output, of K times N
 * elements, N rounded up to whole panels. K must be a multiple of K_STEP. */
void NAME(pack)(long K, long N, const S *weight, long row_stride, long column_stride, S *restrict packed) {
#pragma omp parallel for schedule(static) if (K * N > (1 << 20))
  for (long first = 0; first < N; first += PANEL) {
    const S *columns = weight + first * column_stride;
    if (row_stride == 1 && first + PANEL <= N && column_stride % K_STEP == 0 && (uintptr_t)columns % 4 == 0)
      transpose(K / K_STEP, (const uint32_t *)columns, column_stride / K_STEP, (uint32_t *)(packed + first * K));
    else if (column_stride == 1 && first + PANEL <= N) /* with constant arguments it is vectorized, 5 times as fast */
      NAME(pack_panel)(K, PANEL, columns, row_stride, 1, packed + first * K);
    else
      NAME(pack_panel)(K, N - first, columns, row_stride, column_stride, packed + first * K);
  }
}

/* The innermost kernel: `rows` rows of a times some terms of a panel. c: rows `stride` elements apart. `rows` is a
 * compile-time constant in each caller, so that the sums stay in registers. */
INLINE void NAME(tile)(const int rows, long terms, long K, const S *a, const S *panel, S *c, long stride, int add) {
  vector sum[MAX_ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
    for (int half = 0; half < 2; half++) sum[r][half] = add ? NAME(get)(c + r * stride + half * W) : (vector){0};
  for (long k = 0; k < terms; k += K_STEP, panel += K_STEP * PANEL) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      sum[r][0] = NAME(add_product)(sum[r][0], a + r * K + k, panel);
      sum[r][1] = NAME(add_product)(sum[r][1], a + r * K + k, panel + K_STEP * W);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
    for (int half = 0; half < 2; half++) NAME(put)(c + r * stride + half * W, sum[r][half]);
}

#define TILE(rows) \
  case rows: NAME(tile)(rows, terms, K, a, panel, c, stride, add); break;
static void NAME(tile_of_rows)(long rows, long terms, long K, const S *a, const S *panel, S *c, long stride, int add) {
  switch (rows) {
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if MAX_ROWS == 12
    TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
  }
}
#undef TILE

/* A tile of the last panel if that has fewer columns: through a buffer, since the kernel writes whole vectors. */
static void NAME(partial_tile)(long rows, long columns, long terms, long K, const S *a, const S *panel, S *c, long N,
                               int add) {
  S buffer[MAX_ROWS * PANEL] = {0};
  for (long r = 0; r < rows; r++) memcpy(buffer + r * PANEL, c + r * N, columns * sizeof(S));
  NAME(tile_of_rows)(rows, terms, K, a, panel, buffer, PANEL, add);
  for (long r = 0; r < rows; r++) memcpy(c + r * N, buffer + r * PANEL, columns * sizeof(S));
}

/* c (n, N) = a (n, K) @ the prepacked weight, or c += it if `add`; rounded to S once. */
void NAME(multiply)(long n, long K, long N, const S *restrict a, const S *restrict packed, S *restrict c, int add) {
  long num_blocks = (n + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp parallel if (n * K * N > (1 << 20))
  for (long k = 0; k < K; k += BLOCK_K) {
    long terms = K - k < BLOCK_K ? K - k : BLOCK_K;
#pragma omp for schedule(static) nowait /* static: a thread gets the same columns for each k, so it needs no barrier */
    for (long first = 0; first < N; first += PANEL)
      for (long block = 0; block < num_blocks; block++) {
        long row = n * block / num_blocks, rows = n * (block + 1) / num_blocks - row; /* blocks of nearly equal size */
        const S *a_block = a + row * K + k, *panel = packed + first * K + k * PANEL;
        S *sums = c + row * N + first;
        if (first + PANEL <= N)
          NAME(tile_of_rows)(rows, terms, K, a_block, panel, sums, N, add || k);
        else
          NAME(partial_tile)(rows, N - first, terms, K, a_block, panel, sums, N, add || k);
      }
  }
}

#endif
