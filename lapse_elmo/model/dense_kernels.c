/* Updates of dense parameters, and what leads to them, each in one pass over memory (dense_kernels.py).
 *
 * At the sizes of `original` the tensors do not fit into a cache, so that a pass costs what its bytes cost. optimizers.py
 * has fallbacks in torch. Elementwise results do not depend on the number of threads; sums are taken over a fixed number of
 * parts, and then over the parts in their order, so that they do not depend on it either.
 */
#define PARTS 64
#define EACH_PART _Pragma("omp parallel for") for (long part = 0; part < PARTS; part++)
#define BEGIN (n * part / PARTS)
#define END (n * (part + 1) / PARTS)

double sum_of_squares(long n, const float *values) {
  double parts[PARTS], total = 0.0;
  EACH_PART {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (long i = BEGIN; i < END; i++) sum += (double)values[i] * values[i];
    parts[part] = sum;
  }
  for (long part = 0; part < PARTS; part++) total += parts[part];
  return total;
}

/* Bias corrections: first / bias_1 and second / root_bias_2^2 are the means of the gradients and of their squares. */
void adam(long n, float *weights, const float *gradients, float *first, float *second, float scale, float rate,
          float bias_1, float root_bias_2, float epsilon, float decay_1, float decay_2) {
  float step = rate / bias_1;
  EACH_PART {
#pragma omp simd
    for (long i = BEGIN; i < END; i++) {
      float gradient = scale * gradients[i];
      first[i] += (1.0f - decay_1) * (gradient - first[i]);
      second[i] = decay_2 * second[i] + (1.0f - decay_2) * gradient * gradient;
      weights[i] -= step * first[i] / (__builtin_sqrtf(second[i]) / root_bias_2 + epsilon);
    }
  }
}

void adagrad(long n, float *weights, const float *gradients, float *squares, float scale, float rate, float epsilon) {
  EACH_PART {
#pragma omp simd
    for (long i = BEGIN; i < END; i++) {
      float gradient = scale * gradients[i];
      squares[i] += gradient * gradient;
      weights[i] -= rate * gradient / (__builtin_sqrtf(squares[i]) + epsilon);
    }
  }
}
