/* Access to the rows of one segment in shared memory, with a lock per row.
 *
 * A row has `width` floats: weights and, if the segment has an update rule, the rule's state after them (rules.py).
 * entries[row] holds flags and a slot. A main copy is at main[slot * width]; a replica is at replica[slot * 2 * width],
 * its value followed by the sum of the deltas not sent to its owner yet.
 *
 * Locking is that of a seqlock. A writer holds the row's lock, a bit of its flags; unlocking increments the version in
 * the upper bits. A reader takes no lock: it copies the row, and copies it again if the entry has changed meanwhile.
 * (To lock, it would need an atomic operation per row, which waits until the copy of the row before is in the cache.)
 *
 * `rows` are row numbers, n of them, and may repeat in pull, add and step. Functions that list rows write their indices
 * in `rows` to the last argument (n), ascending, and return their number. LockedRows (locked_rows.py) is the fallback
 * in NumPy and torch, which the tests compare with each function.
 */
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

enum { LOCKED = 1, PRESENT = 2, REPLICA = 4, DIRTY = 8, VERSION = 16 }; /* the bits from VERSION up count */
enum { AHEAD_BYTES = 6144, FEWEST_AHEAD = 2, MOST_AHEAD = 12, FETCHED = 4096 }; /* rows prefetched; bytes of each */
enum { FAR_AHEAD = 24 };                                                       /* entries prefetched */
enum { SPINS = 64 };                                                           /* tries before yielding the core */
enum { ADAGRAD, ADAGRAD_PER_ROW, SGD };                                        /* rules, as in rules.py */

typedef struct {
    uint32_t flags;
    int32_t slot;
} __attribute__((aligned(8))) entry;

/* Lock a row, spinning; return its flags, without LOCKED. */
static uint32_t lock(entry *e) {
    for (int spins = 0;; spins++) {
        uint32_t before = __atomic_fetch_or(&e->flags, LOCKED, __ATOMIC_ACQUIRE);
        if (!(before & LOCKED)) {
            __atomic_thread_fence(__ATOMIC_RELEASE); /* readers see LOCKED before any write to the row */
            return before;
        }
        if (spins >= SPINS) { sched_yield(); spins = 0; }
    }
}

/* Unlock a row and set its flags, with the next version. */
static void unlock(entry *e, uint32_t flags) {
    __atomic_store_n(&e->flags, (flags & ~(uint32_t)LOCKED) + VERSION, __ATOMIC_RELEASE);
}

/* Return flags with the same version, and with `kind` in place of PRESENT, REPLICA and DIRTY. */
static uint32_t with_kind(uint32_t flags, uint32_t kind) { return (flags & ~(uint32_t)(VERSION - 1)) | kind; }

/* Return an entry's flags and slot as of one moment, by a single 8-byte load. */
static entry load_entry(const entry *e) {
    uint64_t both = __atomic_load_n((const uint64_t *)e, __ATOMIC_ACQUIRE);
    entry seen;
    memcpy(&seen, &both, sizeof seen);
    return seen;
}

/* Return whether a row is absent, without its lock: a locked row may just be coming, so it does not count. */
static int is_absent(const entry *e) {
    return !(__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) & (PRESENT | LOCKED));
}

static void add(float *restrict to, const float *restrict from, int64_t width) {
    for (int64_t j = 0; j < width; j++) to[j] += from[j];
}

/* Return the value of a row that is here; a replica's deltas follow it after `width` floats. */
static float *row_data(entry e, float *main, float *replica, int64_t width) {
    return e.flags & REPLICA ? replica + 2 * width * e.slot : main + width * e.slot;
}

/* Return how many rows to prefetch ahead: a number of bytes, since bytes per time is what memory delivers. */
static int64_t prefetch_distance(int64_t width) {
    int64_t rows = AHEAD_BYTES / (4 * width);
    return rows < FEWEST_AHEAD ? FEWEST_AHEAD : rows > MOST_AHEAD ? MOST_AHEAD : rows;
}

/* Prefetch the cache line at `at`, for reading or for writing. The built-in function takes literal numbers only: Clang
 * refuses even a constant that an inlined function is passed. */
static inline __attribute__((always_inline)) void prefetch_line(const void *at, const int change) {
    if (change) __builtin_prefetch(at, 1);
    else __builtin_prefetch(at, 0);
}

static inline __attribute__((always_inline)) void prefetch(const float *row, int64_t width, const int change) {
    for (int64_t j = 0; j < width * 4 && j < FETCHED; j += 64) prefetch_line((const char *)row + j, change);
}

/* Prefetch `used` floats of a row some way after rows[i], and the entry of a later one, for reading or for writing. */
static inline __attribute__((always_inline)) void prefetch_row(entry *entries, float *main, float *replica,
                                                               int64_t width, int64_t used, const int64_t *rows,
                                                               int64_t i, int64_t n, const int change) {
    if (i + FAR_AHEAD < n) prefetch_line(entries + rows[i + FAR_AHEAD], change);
    const int64_t ahead = prefetch_distance(used);
    if (i + ahead >= n) return;
    entry next = load_entry(entries + rows[i + ahead]);
    if (!(next.flags & PRESENT)) return;
    prefetch(row_data(next, main, replica, width), used, change);
}

/* As prefetch_row, for whole rows. */
static inline __attribute__((always_inline)) void prefetch_all(entry *entries, float *main, float *replica,
                                                               int64_t width, const int64_t *rows, int64_t i, int64_t n,
                                                               const int change) {
    prefetch_row(entries, main, replica, width, width, rows, i, n, change);
}

/* Copy the first `used` floats of a row to out; return whether it is here. */
static int copy_row(entry *e, float *main, float *replica, int64_t width, int64_t used, float *out) {
    for (int tries = 0; tries < SPINS; tries++) {
        entry seen = load_entry(e);
        if (seen.flags & LOCKED) continue;
        if (!(seen.flags & PRESENT)) return 0;
        memcpy(out, row_data(seen, main, replica, width), used * 4);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&e->flags, __ATOMIC_RELAXED) == seen.flags) return 1;
    }
    uint32_t flags = lock(e); /* others change the row too often to read it in between */
    if (flags & PRESENT) memcpy(out, row_data(*e, main, replica, width), used * 4);
    unlock(e, flags);
    return (flags & PRESENT) != 0;
}

/* Copy the first `used` floats of rows to out (n, used); list the rows that are not here. */
int64_t rows_pull(entry *entries, float *main, float *replica, int64_t width, int64_t used, const int64_t *rows,
                  int64_t n, float *out, int64_t *missing) {
    int64_t absent = 0;
    for (int64_t i = 0; i < n; i++) {
        prefetch_row(entries, main, replica, width, used, rows, i, n, 0);
        if (!copy_row(entries + rows[i], main, replica, width, used, out + i * used)) missing[absent++] = i;
    }
    return absent;
}

/* Return the number of rows whose main copy is here. */
int64_t rows_owned(const entry *entries, const int64_t *rows, int64_t n) {
    int64_t owned = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i + FAR_AHEAD < n) __builtin_prefetch(entries + rows[i + FAR_AHEAD]);
        owned += (__atomic_load_n(&entries[rows[i]].flags, __ATOMIC_RELAXED) & (PRESENT | REPLICA)) == PRESENT;
    }
    return owned;
}

/* Add deltas (n, width) to the rows; list those that are not here. mark: whether main copies become dirty. */
int64_t rows_add(entry *entries, float *main, float *replica, int64_t width, const int64_t *rows, int64_t n,
                  const float *deltas, int64_t mark, int64_t *missing) {
    int64_t absent = 0;
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        prefetch_all(entries, main, replica, width, rows, i, n, 1);
        if (is_absent(e)) { missing[absent++] = i; continue; }
        uint32_t flags = lock(e);
        if (flags & PRESENT) {
            float *row = row_data(*e, main, replica, width);
            add(row, deltas + i * width, width);
            if (flags & REPLICA) add(row + width, deltas + i * width, width); /* what the owner will be sent */
            if (mark || flags & REPLICA) flags |= DIRTY;
        } else missing[absent++] = i;
        unlock(e, flags);
    }
    return absent;
}

/* Take a step of Adagrad with an accumulator for each of `size` weights. With has_delta, add what the step adds to the
 * row to `delta` as well. */
static inline __attribute__((always_inline)) void adagrad(float *restrict weights, float *restrict delta, int64_t size,
                                                          const float *restrict gradient, float rate, float epsilon,
                                                          const int has_delta) {
    float *restrict state = weights + size, *restrict state_delta = delta + size;
    for (int64_t j = 0; j < size; j++) {
        float g = gradient[j], square = g * g, sum = state[j] + square;
        float change = -rate * g / (sqrtf(sum) + epsilon);
        state[j] = sum;
        weights[j] += change;
        if (has_delta) { state_delta[j] += square; delta[j] += change; }
    }
}

/* Take a step of Adagrad with one accumulator for the row, to which the mean square of the gradient is added. */
static inline __attribute__((always_inline)) void adagrad_per_row(float *restrict weights, float *restrict delta,
                                                                  int64_t size, const float *restrict gradient,
                                                                  float rate, float epsilon, const int has_delta) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < size; j++) square += gradient[j] * gradient[j];
    square /= (float)size;
    float sum = weights[size] + square, factor = -rate / (sqrtf(sum) + epsilon);
    weights[size] = sum;
    if (has_delta) delta[size] += square;
    for (int64_t j = 0; j < size; j++) {
        float change = factor * gradient[j];
        weights[j] += change;
        if (has_delta) delta[j] += change;
    }
}

static inline __attribute__((always_inline)) void sgd(float *restrict weights, float *restrict delta, int64_t size,
                                                          const float *restrict gradient, float rate,
                                                          const int has_delta) {
    for (int64_t j = 0; j < size; j++) {
        float change = -rate * gradient[j];
        weights[j] += change;
        if (has_delta) delta[j] += change;
    }
}

static inline __attribute__((always_inline)) void apply_rule(int64_t rule, float *weights, float *delta, int64_t size,
                                                       const float *gradient, float rate, float epsilon,
                                                       const int has_delta) {
    if (rule == ADAGRAD) adagrad(weights, delta, size, gradient, rate, epsilon, has_delta);
    else if (rule == ADAGRAD_PER_ROW) adagrad_per_row(weights, delta, size, gradient, rate, epsilon, has_delta);
    else sgd(weights, delta, size, gradient, rate, has_delta);
}

/* Take a step of a rule per row, with gradients (n, size); list the rows that are not here. A replica's step starts
 * from the replica's state, and what it adds to weights and state is added to the deltas for the owner. */
int64_t rows_step(entry *entries, float *main, float *replica, int64_t width, int64_t size, int64_t rule,
                  const int64_t *rows, int64_t n, const float *gradients, float rate, float epsilon, int64_t mark,
                  int64_t *missing) {
    int64_t absent = 0;
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        prefetch_all(entries, main, replica, width, rows, i, n, 1);
        if (is_absent(e)) { missing[absent++] = i; continue; }
        uint32_t flags = lock(e);
        if (flags & PRESENT) {
            float *row = row_data(*e, main, replica, width);
            const float *gradient = gradients + i * size;
            if (flags & REPLICA) apply_rule(rule, row, row + width, size, gradient, rate, epsilon, 1);
            else apply_rule(rule, row, row, size, gradient, rate, epsilon, 0);
            if (mark || flags & REPLICA) flags |= DIRTY;
        } else missing[absent++] = i;
        unlock(e, flags);
    }
    return absent;
}

/* Overwrite main copies with values (n, width); list the rows whose main copy is not here. */
int64_t rows_set(entry *entries, float *main, int64_t width, const int64_t *rows, int64_t n, const float *values,
                 int64_t *missing) {
    int64_t absent = 0;
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        prefetch_all(entries, main, main, width, rows, i, n, 1);
        uint32_t flags = lock(e);
        if ((flags & (PRESENT | REPLICA)) == PRESENT) {
            memcpy(main + width * e->slot, values + i * width, width * 4);
            flags |= DIRTY;
        } else missing[absent++] = i;
        unlock(e, flags);
    }
    return absent;
}

/* Store absent rows with values (n, width) in the given slots, as main copies or as replicas without deltas. */
void rows_put(entry *entries, float *main, float *replica, int64_t width, const int64_t *rows, int64_t n,
              const int64_t *slots, const float *values, int64_t as_replica) {
    float *to = as_replica ? replica : main;
    const int64_t stride = as_replica ? 2 * width : width, ahead = prefetch_distance(stride);
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        if (i + FAR_AHEAD < n) __builtin_prefetch(entries + rows[i + FAR_AHEAD], 1);
        if (i + ahead < n) prefetch(to + stride * slots[i + ahead], stride, 1);
        uint32_t flags = lock(e);
        e->slot = (int32_t)slots[i];
        float *row = to + stride * slots[i];
        memcpy(row, values + i * width, width * 4);
        if (as_replica) memset(row + width, 0, width * 4);
        unlock(e, with_kind(flags, PRESENT | (as_replica ? REPLICA : 0)));
    }
}

/* Copy main copies to out (n, width) and make them absent. */
void rows_take(entry *entries, float *main, int64_t width, const int64_t *rows, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        prefetch_all(entries, main, main, width, rows, i, n, 0);
        uint32_t flags = lock(e);
        memcpy(out + i * width, main + width * e->slot, width * 4);
        unlock(e, with_kind(flags, 0));
    }
}

/* Make replicas main copies in the given slots, with values (n, width) plus the deltas not sent yet. */
void rows_promote(entry *entries, float *main, float *replica, int64_t width, const int64_t *rows, int64_t n,
                  const int64_t *slots, const float *values) {
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        uint32_t flags = lock(e);
        float *row = main + width * slots[i];
        const float *value = values + i * width, *delta = replica + 2 * width * e->slot + width;
        if (flags & DIRTY) for (int64_t j = 0; j < width; j++) row[j] = value[j] + delta[j];
        else memcpy(row, value, width * 4);
        e->slot = (int32_t)slots[i];
        unlock(e, with_kind(flags, PRESENT | (flags & DIRTY)));
    }
}

/* Clear the dirty flag of rows; list those that had it. */
int64_t rows_clear_dirty(entry *entries, const int64_t *rows, int64_t n, int64_t *changed) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        if (!(__atomic_load_n(&e->flags, __ATOMIC_RELAXED) & DIRTY)) continue;
        uint32_t flags = lock(e);
        unlock(e, flags & ~(uint32_t)DIRTY);
        changed[found++] = i;
    }
    return found;
}

/* Move the deltas of dirty replicas to out (up to n, width) and clear their flags; list these rows. */
int64_t rows_collect(entry *entries, float *replica, int64_t width, const int64_t *rows, int64_t n, float *out,
                     int64_t *changed) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        prefetch_all(entries, replica, replica, width, rows, i, n, 1);
        if (!(__atomic_load_n(&e->flags, __ATOMIC_RELAXED) & DIRTY)) continue;
        uint32_t flags = lock(e);
        float *delta = replica + 2 * width * e->slot + width;
        memcpy(out + found * width, delta, width * 4);
        memset(delta, 0, width * 4);
        unlock(e, flags & ~(uint32_t)DIRTY);
        changed[found++] = i;
    }
    return found;
}

/* Set replicas to their owner's values (n, width) plus the deltas not sent yet. */
void rows_refresh(entry *entries, float *replica, int64_t width, const int64_t *rows, int64_t n, const float *values) {
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        prefetch_all(entries, replica, replica, width, rows, i, n, 1);
        uint32_t flags = lock(e);
        float *row = replica + 2 * width * e->slot;
        const float *value = values + i * width, *delta = row + width;
        if (flags & DIRTY) for (int64_t j = 0; j < width; j++) row[j] = value[j] + delta[j];
        else memcpy(row, value, width * 4); /* not adding 0, which would turn -0 into +0 */
        unlock(e, flags);
    }
}

/* Set replicas to values (n, width) and discard their deltas. */
void rows_overwrite(entry *entries, float *replica, int64_t width, const int64_t *rows, int64_t n,
                    const float *values) {
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        prefetch_all(entries, replica, replica, width, rows, i, n, 1);
        uint32_t flags = lock(e);
        float *row = replica + 2 * width * e->slot;
        memcpy(row, values + i * width, width * 4);
        memset(row + width, 0, width * 4);
        unlock(e, flags & ~(uint32_t)DIRTY);
    }
}

/* Make replicas without deltas absent; list them. */
int64_t rows_release(entry *entries, const int64_t *rows, int64_t n, int64_t *released) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        entry *e = entries + rows[i];
        uint32_t flags = lock(e);
        if (!(flags & DIRTY)) { flags = with_kind(flags, 0); released[found++] = i; }
        unlock(e, flags);
    }
    return found;
}
