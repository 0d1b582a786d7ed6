/* One step of the dense parameters, in as few passes over memory as it needs: it moves far more bytes than a cache has.
 *
 * Arrays have n floats. Work is divided into chunks of CHUNK floats, on all threads. Sums of squares are written as one
 * number per chunk to `squares` (chunks,), so that their order does not depend on the number of threads. dense.py has
 * the fallbacks in torch, of which every float has the same bits: products are fused with the sum after them (FUSED)
 * exactly where torch's operations fuse them, and nowhere else.
 */
#include <math.h>
#include <stdint.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FUSED(a, b, c) __builtin_fmaf(a, b, c)
#else /* torch, too, has no such instruction here */
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif

enum { CHUNK = 1 << 15, PIECE = 1 << 10 }; /* floats; a piece stays in the first-level cache */
enum { ADAM, ADAGRAD, SGD };               /* rules, as in dense.py */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static double sum_of_squares(const float *values, int64_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
        float square = values[j] * values[j];
        sum += (double)square;
    }
    return sum;
}

/* Write the sums of the squares of `values` (n). */
void dense_squares(int64_t n, const float *values, double *squares) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += CHUNK)
        squares[first / CHUNK] = sum_of_squares(values + first, least(CHUNK, n - first));
}

/* Divide by a number of ranks; by a power of two, the product with its reciprocal is the same. */
static void divide(float *values, int64_t n, int64_t divisor) {
    const float number = (float)divisor, reciprocal = 1.0f / number;
    if (divisor & (divisor - 1))
        for (int64_t j = 0; j < n; j++) values[j] /= number;
    else
        for (int64_t j = 0; j < n; j++) values[j] *= reciprocal;
}

/* Add the arrays at gradients + rank * stride, for each rank but the first, to the first one, and divide by `divisor`.
 * Write the sums of the squares of all arrays to `squares` if it is not NULL, and those of the result to `mean_squares`
 * likewise. */
void dense_add_up(int64_t n, int64_t ranks, int64_t stride, float *gradients, int64_t divisor, double *squares,
                  double *mean_squares) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += CHUNK) {
        const int64_t end = least(first + CHUNK, n);
        double before = 0.0, after = 0.0;
        for (int64_t begin = first; begin < end; begin += PIECE) {
            const int64_t size = least(PIECE, end - begin);
            float *total = gradients + begin;
            if (squares) before += sum_of_squares(total, size);
            for (int64_t rank = 1; rank < ranks; rank++) {
                const float *other = total + rank * stride;
                if (squares) before += sum_of_squares(other, size);
#pragma omp simd
                for (int64_t j = 0; j < size; j++) total[j] += other[j];
            }
            if (divisor != 1) divide(total, size, divisor);
            if (mean_squares) after += sum_of_squares(total, size);
        }
        if (squares) squares[first / CHUNK] = before;
        if (mean_squares) mean_squares[first / CHUNK] = after;
    }
}

static void adam(int64_t n, const float *restrict gradient, float *restrict weights, float *restrict first,
                 float *restrict second, const float *numbers) {
    const float scale = numbers[0], rate = numbers[1], epsilon = numbers[2], lerp = numbers[3], decay = numbers[4];
    const float share = numbers[5], root = numbers[6];
    for (int64_t j = 0; j < n; j++) {
        float g = gradient[j] * scale;
        float m = FUSED(lerp, g - first[j], first[j]);
        float v = FUSED(share * g, g, second[j] * decay);
        float size = sqrtf(v) / root + epsilon;
        first[j] = m;
        second[j] = v;
        weights[j] += rate * m / size;
    }
}

static void adagrad(int64_t n, const float *restrict gradient, float *restrict weights, float *restrict squares,
                    const float *numbers) {
    const float scale = numbers[0], rate = numbers[1], epsilon = numbers[2], share = numbers[5];
    for (int64_t j = 0; j < n; j++) {
        float g = gradient[j] * scale, s = FUSED(share * g, g, squares[j]);
        squares[j] = s;
        weights[j] += rate * g / (sqrtf(s) + epsilon);
    }
}

static void sgd(int64_t n, const float *restrict gradient, float *restrict weights, const float *numbers) {
    const float scale = numbers[0], rate = numbers[1];
    for (int64_t j = 0; j < n; j++) {
        float g = gradient[j] * scale;
        weights[j] = FUSED(rate, g, weights[j]);
    }
}

/* Update weights and the rule's state. numbers: the factor of the gradient, minus the rate, epsilon; for Adam 1 - beta1
 * and beta2; the factor of the gradient's square (for Adam with 1 - beta2); for Adam the square root of the bias of the
 * second moments. */
void dense_step(int64_t n, int64_t rule, const float *gradient, float *weights, float *state, float *state2,
                const float *numbers) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += CHUNK) {
        const int64_t size = least(CHUNK, n - i);
        if (rule == ADAM) adam(size, gradient + i, weights + i, state + i, state2 + i, numbers);
        else if (rule == ADAGRAD) adagrad(size, gradient + i, weights + i, state + i, numbers);
        else sgd(size, gradient + i, weights + i, numbers);
    }
}
