/* Count the words of UTF-8 text, or turn them into ids, with a hash table of byte strings.
 *
 * Words are split as by Python's str.split(): they are runs of bytes between Unicode white space. The text is classified 64
 * bytes at a time into bit masks; an edge is a change from blank to word or from word to blank. Words are looked up in
 * batches: the slots of a whole batch are prefetched before the first one is read, because a table of a million words does
 * not fit into a core's cache. A word of up to 16 bytes is stored in its slot, a longer one in the table's heap of bytes.
 *
 * words.py has the same functions in Python, as a fallback and as the reference that the tests compare with. A negative
 * result is an error.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { NOT_UTF8 = -1, NO_MEMORY = -2 };
enum { BATCH = 32, CHUNK = 64, INLINE = 16, FIRST_SLOTS = 1 << 12, FIRST_HEAP = 1 << 12, HUGE_PAGE = 2 << 20 };
enum { UNKNOWN = 3, NEWLINE = '\n' }; /* the id of a word that is not in the table, as in vocabulary.py */

typedef struct {
    uint64_t low, high; /* the word, padded with zeros; for a long word its hash and its offset in the heap */
    int64_t value;      /* the word's count or id */
    uint32_t size;      /* bytes; 0 marks a free slot */
} slot;

typedef struct {
    slot *slots;
    uint8_t *heap;
    int64_t mask, num_words, heap_used, heap_room; /* mask: the number of slots, a power of two, less 1 */
} table;

typedef struct {
    uint64_t low, high, hash;
    const uint8_t *start;
    uint32_t size;
} word;

/* The state of one pass over a text. */
typedef struct {
    table *words;
    const uint8_t *data;
    int64_t size, num_words;
    int32_t *ids; /* output; NULL to count the words instead */
    int64_t edges[2 * BATCH + CHUNK];
    int num_edges;
} pass;

static uint64_t load(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, 8);
    return value;
}

static uint64_t mix(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)(a ^ 0x9e3779b97f4a7c15u) * (b ^ 0xd1342543de82ef95u);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Return the key of the bytes [start, start + size). Reads no byte at or after `limit`. */
static word key_of(const uint8_t *start, int64_t size, const uint8_t *limit) {
    static const uint8_t ones[2 * INLINE] = {255, 255, 255, 255, 255, 255, 255, 255,
                                             255, 255, 255, 255, 255, 255, 255, 255};
    word w = {.start = start, .size = (uint32_t)size};
    if (size > INLINE) {
        w.low = (uint64_t)size;
        for (int64_t i = 0; i < size - INLINE; i += INLINE) w.low = mix(w.low ^ load(start + i), load(start + i + 8));
        w.low = mix(w.low ^ load(start + size - INLINE), load(start + size - 8));
        w.hash = w.low;
        return w;
    }
    uint8_t copy[INLINE] = {0};
    if (limit - start < INLINE) {
        memcpy(copy, start, (size_t)size);
        start = copy;
    }
    w.low = load(start) & load(ones + INLINE - size);
    w.high = load(start + 8) & load(ones + INLINE - size + 8);
    w.hash = mix(w.low, w.high ^ (uint64_t)size << 56);
    return w;
}

/* Return the slot of a word, or the free slot where it belongs. */
static slot *find(const table *t, const word *w) {
    for (int64_t i = (int64_t)w->hash & t->mask;; i = (i + 1) & t->mask) {
        slot *s = t->slots + i;
        if (s->size == w->size && s->low == w->low &&
            (w->size <= INLINE ? s->high == w->high : !memcmp(t->heap + s->high, w->start, w->size)))
            return s;
        if (!s->size) return s;
    }
}

/* Allocate free slots, in huge pages if possible: lookups hit random slots and would miss the TLB. */
static slot *new_slots(int64_t count) {
    size_t size = (size_t)count * sizeof(slot), page = size < HUGE_PAGE ? 64 : HUGE_PAGE;
    slot *slots = aligned_alloc(page, size); /* both are powers of two */
    if (!slots) return NULL;
#ifdef MADV_HUGEPAGE
    if (page == HUGE_PAGE) madvise(slots, size, MADV_HUGEPAGE);
#endif
    return memset(slots, 0, size);
}

/* Insert a word into a free slot, with value 0. */
static int insert(table *t, slot *s, const word *w) {
    uint64_t high = w->high;
    if (w->size > INLINE) {
        if (t->heap_room - t->heap_used < w->size) {
            int64_t room = 2 * t->heap_room + w->size;
            uint8_t *heap = realloc(t->heap, (size_t)room);
            if (!heap) return NO_MEMORY;
            t->heap = heap;
            t->heap_room = room;
        }
        memcpy(t->heap + t->heap_used, w->start, w->size);
        high = (uint64_t)t->heap_used;
        t->heap_used += w->size;
    }
    *s = (slot){.low = w->low, .high = high, .size = w->size};
    t->num_words++;
    return 0;
}

/* Make room for `more` words, with at least half of the slots free. */
static int reserve(table *t, int64_t more) {
    int64_t num_slots = t->mask + 1;
    while (2 * (t->num_words + more) > num_slots) num_slots *= 2;
    if (num_slots == t->mask + 1) return 0;
    slot *old = t->slots, *slots = new_slots(num_slots);
    if (!slots) return NO_MEMORY;
    int64_t old_slots = t->mask + 1;
    t->slots = slots;
    t->mask = num_slots - 1;
    for (int64_t i = 0; i < old_slots; i++) {
        const slot *s = old + i;
        if (!s->size) continue;
        uint64_t hash = s->size > INLINE ? s->low : mix(s->low, s->high ^ (uint64_t)s->size << 56);
        int64_t at = (int64_t)hash & t->mask;
        while (slots[at].size) at = (at + 1) & t->mask;
        slots[at] = *s;
    }
    free(old);
    return 0;
}

table *words_new(void) {
    table *t = calloc(1, sizeof(table));
    if (!t) return NULL;
    t->slots = new_slots(FIRST_SLOTS);
    t->heap = malloc(FIRST_HEAP);
    t->mask = FIRST_SLOTS - 1;
    t->heap_room = FIRST_HEAP;
    if (t->slots && t->heap) return t;
    free(t->slots);
    free(t->heap);
    free(t);
    return NULL;
}

void words_free(table *t) {
    free(t->slots);
    free(t->heap);
    free(t);
}

/* Add values[i] to the value of word i in `data`. Each word is followed by one separator byte. */
int64_t words_add(table *t, const uint8_t *data, const int64_t *sizes, const int64_t *values, int64_t count) {
    const uint8_t *limit = data;
    for (int64_t i = 0; i < count; i++) limit += sizes[i] + 1;
    for (int64_t i = 0; i < count; data += sizes[i++] + 1) {
        if (reserve(t, 1)) return NO_MEMORY;
        word w = key_of(data, sizes[i], limit);
        slot *s = find(t, &w);
        if (!s->size && insert(t, s, &w)) return NO_MEMORY;
        s->value += values[i];
    }
    return 0;
}

/* Look up the words between the edges found so far. An odd edge at the end, the start of a word, is kept for later. */
static int look_up(pass *p) {
    word words[BATCH + CHUNK / 2];
    table *t = p->words;
    int count = p->num_edges / 2;
    if (!p->ids && reserve(t, count)) return NO_MEMORY;
    for (int i = 0; i < count; i++) {
        int64_t start = p->edges[2 * i];
        words[i] = key_of(p->data + start, p->edges[2 * i + 1] - start, p->data + p->size);
        __builtin_prefetch(t->slots + ((int64_t)words[i].hash & t->mask));
    }
    for (int i = 0; i < count; i++) {
        slot *s = find(t, words + i);
        if (p->ids) {
            p->ids[p->num_words + i] = s->size ? (int32_t)s->value : UNKNOWN;
        } else {
            if (!s->size && insert(t, s, words + i)) return NO_MEMORY;
            s->value++;
        }
    }
    p->num_words += count;
    p->edges[0] = p->edges[2 * count];
    p->num_edges -= 2 * count;
    return 0;
}

/* Return the number of bytes of the non-ASCII character at p, or 0 if it is not UTF-8 or ends after `limit`. */
static int character(const uint8_t *p, const uint8_t *limit) {
    int size = *p < 0xc2 ? 0 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : *p < 0xf5 ? 4 : 0;
    if (!size || limit - p < size) return 0;
    for (int i = 1; i < size; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    if ((*p == 0xe0 && p[1] < 0xa0) || (*p == 0xed && p[1] > 0x9f)) return 0; /* overlong; surrogates */
    if ((*p == 0xf0 && p[1] < 0x90) || (*p == 0xf4 && p[1] > 0x8f)) return 0; /* overlong; above U+10FFFF */
    return size;
}

/* Return whether the character at p is white space: U+0085, U+00A0, U+1680, U+2000 to 200A, U+2028, U+2029, U+202F, U+205F, U+3000 */
static int blank(const uint8_t *p) {
    if (*p == 0xc2) return p[1] == 0x85 || p[1] == 0xa0;
    if (*p == 0xe1) return p[1] == 0x9a && p[2] == 0x80;
    if (*p == 0xe3) return p[1] == 0x80 && p[2] == 0x80;
    if (*p != 0xe2) return 0;
    if (p[1] == 0x81) return p[2] == 0x9f;
    return p[1] == 0x80 && (p[2] <= 0x8a || p[2] == 0xa8 || p[2] == 0xa9 || p[2] == 0xaf);
}

/* Compute bit masks of 64 bytes: ASCII white space, newlines, and bytes that are not ASCII. */
static void classify(const uint8_t *p, uint64_t *blanks, uint64_t *lines, uint64_t *others) {
#ifdef __AVX2__ /* AVX-512 is not faster here */
    *blanks = *lines = *others = 0;
    for (int i = 0; i < CHUNK; i += 32) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(p + i)), four = _mm256_set1_epi8(4);
        __m256i first = _mm256_sub_epi8(bytes, _mm256_set1_epi8('\t'));
        __m256i second = _mm256_sub_epi8(bytes, _mm256_set1_epi8(0x1c));
        __m256i either = _mm256_or_si256(_mm256_cmpeq_epi8(_mm256_min_epu8(first, four), first),
                                         _mm256_cmpeq_epi8(_mm256_min_epu8(second, four), second));
        __m256i ends = _mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(NEWLINE));
        *blanks |= (uint64_t)(uint32_t)_mm256_movemask_epi8(either) << i;
        *lines |= (uint64_t)(uint32_t)_mm256_movemask_epi8(ends) << i;
        *others |= (uint64_t)(uint32_t)_mm256_movemask_epi8(bytes) << i;
    }
#else
    *blanks = *lines = *others = 0;
    for (int i = 0; i < CHUNK; i++) {
        uint64_t bit = (uint64_t)1 << i;
        *blanks |= (uint8_t)(p[i] - '\t') < 5 || (uint8_t)(p[i] - 0x1c) < 5 ? bit : 0;
        *lines |= p[i] == NEWLINE ? bit : 0;
        *others |= p[i] & 0x80 ? bit : 0;
    }
#endif
}

/* Process all words of the text and return their number, or an error. If p->ids is set, the number of words of each line
 * with words is written to `lengths`, and the number of these lines to `num_lines`. */
static int64_t run(pass *p, int32_t *lengths, int64_t *num_lines) {
    uint64_t before = 0;  /* 1 if the last byte of the previous chunk belongs to a word */
    uint64_t carried = 0; /* mask of the bytes of a white-space character that began in the previous chunk */
    int64_t checked = 0;  /* end of the last non-ASCII character */
    int64_t num_lengths = 0;
    int32_t length = 0;
    for (int64_t base = 0; base < p->size; base += CHUNK) {
        uint8_t last[CHUNK];
        const uint8_t *chunk = p->data + base;
        uint64_t blanks, lines, others;
        if (p->size - base < CHUNK) {
            memset(last, ' ', CHUNK);
            chunk = memcpy(last, chunk, (size_t)(p->size - base));
        }
        classify(chunk, &blanks, &lines, &others);
        blanks |= carried;
        carried = 0;
        if (checked > base) others &= ~(uint64_t)0 << (checked - base);
        while (others) {
            int at = __builtin_ctzll(others);
            const uint8_t *from = p->data + base + at;
            int bytes = character(from, p->data + p->size);
            if (!bytes) return NOT_UTF8;
            checked = base + at + bytes;
            uint64_t these = ((uint64_t)1 << bytes) - 1;
            if (blank(from)) {
                blanks |= these << at;
                carried = at ? these >> (CHUNK - at) : 0;
            }
            others &= ~(these << at);
        }
        uint64_t inside = ~blanks, shifted = inside << 1 | before, starts = inside & ~shifted, edges = inside ^ shifted;
        before = inside >> (CHUNK - 1);
        for (; edges; edges &= edges - 1) p->edges[p->num_edges++] = base + __builtin_ctzll(edges);
        if (p->num_edges >= 2 * BATCH && look_up(p)) return NO_MEMORY;
        if (!p->ids) continue;
        for (; lines; lines &= lines - 1) {
            uint64_t upto = lines ^ (lines - 1);
            length += __builtin_popcountll(starts & upto);
            starts &= ~upto;
            if (length) lengths[num_lengths++] = length;
            length = 0;
        }
        length += __builtin_popcountll(starts);
    }
    if (p->num_edges & 1) p->edges[p->num_edges++] = p->size;
    if (look_up(p)) return NO_MEMORY;
    if (p->ids) {
        if (length) lengths[num_lengths++] = length;
        *num_lines = num_lengths;
    }
    return p->num_words;
}

/* Count the words of `data` and return their number, or an error. Words before the error are counted. */
int64_t words_count(table *t, const uint8_t *data, int64_t size) {
    pass p;
    p.words = t, p.data = data, p.size = size, p.num_words = 0, p.ids = NULL, p.num_edges = 0;
    return run(&p, NULL, NULL);
}

/* Write the value of each word of `data` to `ids`, and the number of words of each line with words to `lengths`. Both have
 * room for (size + 1) / 2 elements. Return the number of words, or an error. */
int64_t words_encode(
    table *t, const uint8_t *data, int64_t size, int32_t *ids, int32_t *lengths, int64_t *num_lines) {
    pass p;
    p.words = t, p.data = data, p.size = size, p.num_words = 0, p.ids = ids, p.num_edges = 0;
    return run(&p, lengths, num_lines);
}

/* Compute, for the words whose value is at least `min_count`, their number and their bytes; for all words, their number
 * and the sum of their values. */
void words_totals(const table *t, int64_t min_count, int64_t totals[4]) {
    memset(totals, 0, 4 * sizeof(int64_t));
    for (int64_t i = 0; i <= t->mask; i++) {
        const slot *s = t->slots + i;
        if (!s->size) continue;
        totals[2]++;
        totals[3] += s->value;
        if (s->value < min_count) continue;
        totals[0]++;
        totals[1] += s->size;
    }
}

/* Write the words whose value is at least `min_count`, each followed by a newline, and their values, in no particular
 * order. */
void words_export(const table *t, int64_t min_count, uint8_t *bytes, int64_t *values) {
    for (int64_t i = 0; i <= t->mask; i++) {
        const slot *s = t->slots + i;
        if (!s->size || s->value < min_count) continue;
        memcpy(bytes, s->size > INLINE ? t->heap + s->high : (const uint8_t *)s, s->size);
        bytes[s->size] = NEWLINE;
        bytes += s->size + 1;
        *values++ = s->value;
    }
}

/* Sort sentences by group: sentence i goes to group (first + i) mod num_groups. Writes the ids and lengths in the order of
 * the groups, and the number of sentences, tokens and unknown tokens of each group to `counts`. `starts` (num_groups, 2)
 * is scratch space. */
void words_group(const int32_t *ids, const int32_t *lengths, int64_t num_lines, int64_t first, int64_t num_groups,
                 int32_t *grouped_ids, int32_t *grouped_lengths, int64_t *counts, int64_t *starts) {
    memset(counts, 0, (size_t)(3 * num_groups) * sizeof(int64_t));
    int64_t group = first % num_groups;
    const int32_t *from = ids;
    for (int64_t i = 0; i < num_lines; i++) {
        int32_t unknown = 0;
        for (int32_t k = 0; k < lengths[i]; k++) unknown += from[k] == UNKNOWN;
        counts[3 * group] += 1;
        counts[3 * group + 1] += lengths[i];
        counts[3 * group + 2] += unknown;
        from += lengths[i];
        if (++group == num_groups) group = 0;
    }
    int64_t line = 0, token = 0;
    for (int64_t g = 0; g < num_groups; g++) {
        starts[2 * g] = line;
        starts[2 * g + 1] = token;
        line += counts[3 * g];
        token += counts[3 * g + 1];
    }
    group = first % num_groups;
    for (int64_t i = 0; i < num_lines; i++) {
        grouped_lengths[starts[2 * group]++] = lengths[i];
        memcpy(grouped_ids + starts[2 * group + 1], ids, (size_t)lengths[i] * sizeof(int32_t));
        starts[2 * group + 1] += lengths[i];
        ids += lengths[i];
        if (++group == num_groups) group = 0;
    }
}
