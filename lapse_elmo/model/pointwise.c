/* The pointwise kernels of the LSTM and the softmax. Each makes one pass over its rows while they are in the cache.
 *
 * pointwise_torch.py has fallbacks with the same results. This file includes itself once per storage type, and appends
 * a suffix to all names: _f for float, _d for double, _b for bfloat16. S is the type of stored elements (uint16_t, the
 * upper half of a float, for bfloat16), R the type of arithmetic. Comparisons are written such that NaN is preserved.
 */
#ifndef S
#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x = 2^n * e^r with |r| <= ln(2)/2 and a polynomial for e^r, accurate to 1 ulp. Results below the smallest normal
 * number are 0. Free of branches, so that compilers can vectorize it. Adding `shift`, 1.5 * 2^23, rounds to an integer,
 * which is then found in the low bits. */
static inline float exp_f(float x) {
  const float shift = 12582912.0f;
  float bounded = x > 89.0f ? 89.0f : x, shifted = bounded * 1.44269504f + shift, n = shifted - shift;
  float r = bounded - n * 0.693145752f;
  r -= n * 1.42860677e-6f;
  float p = 0.0013926927f;
  p = p * r + 0.008363774f;
  p = p * r + 0.04166655f;
  p = p * r + 0.16666573f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  memcpy(&scale, &bits, 4);
  return x < -87.3f ? 0.0f : p * scale;
}
/* A polynomial for small |x|, where 2 / (1 + e^-2x) - 1 would lose digits by cancellation. */
static inline float tanh_f(float x) {
  float z = x * x, p = -0.0060751666f;
  p = p * z + 0.020982297f;
  p = p * z - 0.053847756f;
  p = p * z + 0.13332748f;
  p = p * z - 0.33333328f;
  float large = 2.0f / (1.0f + exp_f(-2.0f * x)) - 1.0f;
  return z < 0.390625f ? x + x * z * p : large;
}
static inline float widen(uint16_t x) { /* bfloat16 to float */
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline uint16_t narrow(float x) { /* float to bfloat16, rounding to nearest, ties to even; NaN stays NaN */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)(x != x ? 0x7fc0u : rounded);
}
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, KIND)
#define PLAIN(x) (x)

#define KIND f
#define S float
#define R float
#define EXP exp_f
#define TANH tanh_f
#define LOG logf
#define GET PLAIN
#define PUT PLAIN
#include "pointwise.c"
#undef KIND
#undef S
#undef GET
#undef PUT
#define KIND b
#define S uint16_t
#define GET widen
#define PUT narrow
#include "pointwise.c"
#undef KIND
#undef S
#undef R
#undef EXP
#undef TANH
#undef LOG
#undef GET
#undef PUT
#define KIND d
#define S double
#define R double
#define EXP exp
#define TANH tanh
#define LOG log
#define GET PLAIN
#define PUT PLAIN
#include "pointwise.c"

#else

/* The LSTM with projection of ELMo (Peters et al. 2018; the cell of Sak et al. 2014 without peepholes). For one step,
 * with a = W x + U h' the gates' pre-activations without bias, the result of matrix products:
 *
 *   i, f, o = sigmoid(a + bias),  g = tanh(a + bias)
 *   c = clip(i * g + f * c')         c': the cells of the previous step
 *   m = o * tanh(c)                  the cell output, input of the projection
 *   h = mask * clip(P m)             the hidden state; P m is a matrix product
 *
 * Backward, with d_x the gradient of the loss with respect to x, and t = tanh(c):
 *
 *   d_c = d_m * o * (1 - t^2) + d_c(next step), 0 where |c| >= clip
 *   before activation: i: d_c * g * i * (1 - i)     f: d_c * c' * f * (1 - f)
 *                      g: d_c * i * (1 - g^2)       o: d_m * t * o * (1 - o)
 *   d_c' = d_c * f
 */

/* Forward pass of one step for n sentences. gates (n, 4C): pre-activations without bias, replaced by i, f, g, o.
 * previous_cells (n, C): c', NULL for zero. cells, cell_output (n, C): outputs c and m. clip: INFINITY for no clip. */
void NAME(lstm_cell_forward)(long n, long C, S *restrict gates, const R *restrict bias,
                             const R *restrict previous_cells, R *restrict cells, S *restrict cell_output,
                             double clip_) {
  R clip = (R)clip_;
#pragma omp parallel for schedule(static) if (n * C > 16384)
  for (long row = 0; row < n; row++) {
    S *gi = gates + row * 4 * C, *gf = gi + C, *gg = gf + C, *go = gg + C, *out = cell_output + row * C;
    const R *c_prev = previous_cells ? previous_cells + row * C : 0;
    R *c_row = cells + row * C;
#pragma omp simd
    for (long k = 0; k < C; k++) {
      R i = 1 / (1 + EXP(-(GET(gi[k]) + bias[k]))), f = 1 / (1 + EXP(-(GET(gf[k]) + bias[C + k])));
      R g = TANH(GET(gg[k]) + bias[2 * C + k]), o = 1 / (1 + EXP(-(GET(go[k]) + bias[3 * C + k])));
      R c = i * g + (c_prev ? f * c_prev[k] : 0);
      c = c < -clip ? -clip : c;
      c = c > clip ? clip : c;
      c_row[k] = c;
      gi[k] = PUT(i);
      gf[k] = PUT(f);
      gg[k] = PUT(g);
      go[k] = PUT(o);
      out[k] = PUT(o * TANH(c));
    }
  }
}

/* Backward pass of lstm_cell_forward. gates: i, f, g, o, replaced by the gradients of the pre-activations. cell_output:
 * output m, recomputed so that the forward pass need not store it; may be the same memory as cells. d_cells: d_c from
 * the next step, replaced by d_c' for the previous step. */
void NAME(lstm_cell_backward)(long n, long C, S *restrict gates, const R *restrict previous_cells, const R *cells,
                              S *cell_output, const S *restrict d_cell_output, R *restrict d_cells, double clip_) {
  R clip = (R)clip_;
#pragma omp parallel for schedule(static) if (n * C > 16384)
  for (long row = 0; row < n; row++) {
    S *gi = gates + row * 4 * C, *gf = gi + C, *gg = gf + C, *go = gg + C, *out = cell_output + row * C;
    const R *c_prev = previous_cells ? previous_cells + row * C : 0, *c_row = cells + row * C;
    const S *d_out = d_cell_output + row * C;
    R *d_now = d_cells + row * C;
#pragma omp simd
    for (long k = 0; k < C; k++) {
      R i = GET(gi[k]), f = GET(gf[k]), g = GET(gg[k]), o = GET(go[k]), c = c_row[k], t = TANH(c), d_m = GET(d_out[k]);
      R d_c = d_m * o * (1 - t * t) + d_now[k];
      d_c = (c < 0 ? -c : c) >= clip ? 0 : d_c;
      gi[k] = PUT(d_c * g * i * (1 - i));
      gf[k] = PUT(d_c * (c_prev ? c_prev[k] : 0) * f * (1 - f));
      gg[k] = PUT(d_c * i * (1 - g * g));
      go[k] = PUT(d_m * t * o * (1 - o));
      d_now[k] = d_c * f;
      out[k] = PUT(o * t);
    }
  }
}

/* Clip hidden (n, D) in place, then multiply it by the dropout mask (n, D) unless that is NULL. */
void NAME(lstm_clip_forward)(long n, long D, S *restrict hidden, const R *restrict mask, double clip_) {
  R clip = (R)clip_;
#pragma omp simd
  for (long k = 0; k < n * D; k++) {
    R h = GET(hidden[k]);
    h = h < -clip ? -clip : h;
    h = h > clip ? clip : h;
    hidden[k] = PUT(mask ? h * mask[k] : h);
  }
}

/* Backward pass of lstm_clip_forward. d_hidden (n, D): gradient from the layer above, replaced by the gradient of P m.
 * d_recurrent (n, D): gradient from the next step. hidden: the output of lstm_clip_forward; elements that reached the
 * bound, which is clip * mask rounded to S like hidden, were clipped and get gradient 0. */
void NAME(lstm_clip_backward)(long n, long D, S *restrict d_hidden, const S *restrict d_recurrent,
                              const S *restrict hidden, const R *restrict mask, double clip_) {
  R clip = (R)clip_;
#pragma omp simd
  for (long k = 0; k < n * D; k++) {
    R factor = mask ? mask[k] : 1, h = GET(hidden[k]), bound = GET(PUT(clip * factor));
    R d = factor * (GET(d_hidden[k]) + GET(d_recurrent[k]));
    d_hidden[k] = PUT((h < 0 ? -h : h) >= bound ? 0 : d);
  }
}

/* Sampled softmax of n targets, each over itself and m samples. logits (n, m): logits of the samples without
 * bias_minus_log_q (m,), replaced by exp_logits = exp(logit - row_max). target (n,): logits of the targets.
 * Outputs: nll (n,); inv_sum (n,), such that inv_sum * exp_logits are the samples' probabilities; d_target (n,), the
 * gradient of target. The gradient of bias_minus_log_q is added to d_bias (m,). */
void NAME(softmax_rows)(long n, long m, S *restrict logits, const R *restrict bias_minus_log_q,
                        const R *restrict target,
                        R *restrict nll, R *restrict inv_sum, R *restrict d_target, R *restrict d_bias) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < n; row++) {
    S *x = logits + row * m;
    R row_max = target[row], row_sum = 0;
#pragma omp simd reduction(max : row_max)
    for (long k = 0; k < m; k++) {
      R v = GET(x[k]) + bias_minus_log_q[k];
      row_max = v > row_max ? v : row_max;
    }
#pragma omp simd reduction(+ : row_sum)
    for (long k = 0; k < m; k++) {
      R v = EXP(GET(x[k]) + bias_minus_log_q[k] - row_max);
      row_sum += v;
      x[k] = PUT(v);
    }
    R exp_target = EXP(target[row] - row_max);
    row_sum += exp_target;
    nll[row] = LOG(row_sum) + row_max - target[row];
    inv_sum[row] = 1 / row_sum;
    d_target[row] = exp_target / row_sum - 1;
  }
#pragma omp parallel for schedule(static)
  for (long first = 0; first < m; first += 1024) {
    long end = first + 1024 < m ? first + 1024 : m;
    for (long row = 0; row < n; row++) {
      const S *x = logits + row * m;
      R scale = inv_sum[row];
#pragma omp simd
      for (long k = first; k < end; k++) d_bias[k] += scale * GET(x[k]);
    }
  }
}

/* Output: sums (m,), the column sums of rows (n, m). */
void NAME(column_sums)(long n, long m, const S *restrict rows, R *restrict sums) {
#pragma omp parallel for schedule(static) if (n * m > 65536)
  for (long first = 0; first < m; first += 256) {
    long end = first + 256 < m ? first + 256 : m;
    R part[256] = {0};
    for (long row = 0; row < n; row++) {
      const S *x = rows + row * m + first;
#pragma omp simd
      for (long k = 0; k < end - first; k++) part[k] += GET(x[k]);
    }
    memcpy(sums + first, part, (end - first) * sizeof(R));
  }
}

/* Full softmax, a block of m classes at a time. logits (n, m): without bias (m,). running_max, running_sum (n,): the
 * largest logit and the sum of exp(logit - running_max) over all blocks so far, updated; initially -INFINITY and 0. */
void NAME(softmax_totals)(long n, long m, const S *restrict logits, const R *restrict bias, R *restrict running_max,
                          double *restrict running_sum) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < n; row++) {
    const S *x = logits + row * m;
    R new_max = running_max[row], sum = 0;
#pragma omp simd reduction(max : new_max)
    for (long k = 0; k < m; k++) {
      R v = GET(x[k]) + bias[k];
      new_max = v > new_max ? v : new_max;
    }
#pragma omp simd reduction(+ : sum)
    for (long k = 0; k < m; k++) sum += EXP(GET(x[k]) + bias[k] - new_max);
    running_sum[row] = running_sum[row] * exp((double)(running_max[row] - new_max)) + sum;
    running_max[row] = new_max;
  }
}

#endif
