/* Attention of each token of a pass to cells of its own, with the bits of llama.cpp's own attention.
 *
 * llama.cpp attends to all cells of a cache under a mask, in the order in which they lie there. Here every token has a
 * list of the cells that it sees, in the order of their positions: so its sums are those of a cache that is its own.
 * They are made as by llama.cpp's kernel for up to 63 tokens (ggml-cpu/ops.cpp, flash_attn_ext_f16_one_chunk), and for
 * one token with many positions in parts, one for each thread, which are put together as there.
 *
 * A node of the graph is turned into one that calls a function before it is computed, and is put back when the pass is
 * over. This file knows no struct of llama.cpp: where things are in a node is handed in.
 */
#include <math.h>
#include <stdbool.h>

#include "turned.h"

/* What a token sees. n_padded: cells that are cut into parts, those behind n_cells being masked; 0: it is not cut. */
struct h2o_line {
    const int32_t *cells;
    int64_t n_cells, n_padded;
};

struct h2o_attention {
    struct turning turning;
    size_t ne, nb, sources, view_source, data;                 /* bytes from the beginning of a node; its type is at 0 */
    int32_t attend, type;                                      /* an operation; the type of keys and values */
    void (*convert)(const float *values, void *to, int64_t n); /* a query to what keys are multiplied by */
    void (*dot)(int n, float *out, size_t, const void *key, size_t, const void *query, size_t, int);
    void (*to_float)(const void *values, float *to, int64_t n); /* none: they are f16 */
    void *const *roots;           /* tensors of keys, of which those of nodes are views */
    const struct h2o_line *lines; /* of the pass's tokens */
    int32_t n_roots, n_tokens;    /* no tokens: no node is turned */
};

enum { MOST = 512, LANES = 8, STRIP = 64, HALF_BYTES = 2 };

static void compute(void *node, int thread, int n_threads, void *data);

static bool is_of_cache(const struct h2o_attention *a, const void *keys) {
    const void *root = *AT(void *, keys, a->view_source);
    for (int32_t i = 0; i < a->n_roots; i++) {
        if (a->roots[i] == root) {
            return *AT(void *, keys, a->data) == *AT(void *, root, a->data);
        }
    }
    return false;
}

/* Turn a node that is going to be computed, if it is such an attention: one that adds nothing to products, and has no
 * sinks. */
void h2o_attention_turn(void *node, struct h2o_attention *a) {
    struct turning *t = &a->turning;
    if (*AT(int32_t, node, t->op) != a->attend || !a->n_tokens || t->n_turned == t->most_turned) {
        return;
    }
    void *const *sources = AT(void *, node, a->sources);
    const int64_t *query = AT(int64_t, sources[0], a->ne), *keys = AT(int64_t, sources[1], a->ne);
    const int64_t *values = AT(int64_t, sources[2], a->ne);
    const float *parameters = AT(float, node, t->parameters); /* scale, bias, the limit of products */
    if (query[1] != a->n_tokens || query[3] != 1 || keys[3] != 1 || keys[0] > MOST || values[0] > MOST ||
        values[0] % LANES || *AT(int32_t, sources[1], 0) != a->type || *AT(int32_t, sources[2], 0) != a->type ||
        parameters[1] != 0 || parameters[2] != 0 || sources[4] || !is_of_cache(a, sources[1])) {
        return;
    }
    turn(t, node, compute, a);
}

void h2o_attention_put_back(struct h2o_attention *a) { put_back(&a->turning); }

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* What has AVX2 has F16C, a name that some compilers do not know. */
bool h2o_attention_is_there(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define UNROLL _Pragma("GCC unroll 8")

TARGET static inline __m256 halves(const void *at) { return _mm256_cvtph_ps(_mm_loadu_si128(at)); }

/* To f16 and back. */
TARGET static inline __m256 rounded(__m256 values) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

/* A head's rows in the cache, and a query of it. */
struct head {
    const char *keys, *values, *query;
    size_t key_stride, value_stride;
    int64_t key_width, value_width;
    float scale;
};

/* The sum of values, each times e to the power of its product less the largest one, and the sum of those powers. */
struct sums {
    float largest, powers;
    float values[MOST] __attribute__((aligned(32)));
};

/* What the values of some cells count, and how much less all before them count from then on. */
struct weights {
    float powers[STRIP], less[STRIP];
};

TARGET static void weigh(const struct h2o_attention *a, const struct head *h, const int32_t *cells, int64_t n,
                         struct sums *s, struct weights *w) {
    for (int64_t i = 0; i < n; i++) {
        float product;
        a->dot((int)h->key_width, &product, 0, h->keys + cells[i] * h->key_stride, 0, h->query, 0, 1);
        product *= h->scale;
        const bool is_larger = product > s->largest;
        w->less[i] = is_larger ? expf(s->largest - product) : 1;
        s->largest = is_larger ? product : s->largest;
        w->powers[i] = is_larger ? 1 : expf(product - s->largest);
        s->powers = __builtin_fmaf(s->powers, w->less[i], w->powers[i]);
    }
}

/* Sum values that are f16, C times eight of each cell: every sum is rounded to f16 at once. */
#define SUM(C) \
    TARGET static void sum_##C(const char *values, size_t stride, const int32_t *cells, int64_t n, \
                               const struct weights *w, float *sums) { \
        __m256 sum[C]; \
        UNROLL for (int c = 0; c < C; c++) { \
            sum[c] = _mm256_load_ps(sums + LANES * c); \
        } \
        for (int64_t i = 0; i < n; i++) { \
            const char *row = values + cells[i] * stride; \
            const __m256 power = _mm256_set1_ps(w->powers[i]), less = _mm256_set1_ps(w->less[i]); \
            if (w->less[i] != 1) { \
                UNROLL for (int c = 0; c < C; c++) { \
                    sum[c] = rounded(_mm256_mul_ps(sum[c], less)); \
                } \
            } \
            UNROLL for (int c = 0; c < C; c++) { \
                sum[c] = rounded(_mm256_fmadd_ps(halves(row + LANES * HALF_BYTES * c), power, sum[c])); \
            } \
        } \
        UNROLL for (int c = 0; c < C; c++) { \
            _mm256_store_ps(sums + LANES * c, sum[c]); \
        } \
    }
SUM(8)
SUM(6)
SUM(4)
SUM(2)
SUM(1)

TARGET static void sum_halves(const struct head *h, const int32_t *cells, int64_t n, const struct weights *w,
                              float *sums) {
    for (int64_t d = 0, c; d < h->value_width; d += LANES * c) {
        const int64_t left = (h->value_width - d) / LANES;
        c = left >= 8 ? 8 : left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        (c == 8 ? sum_8 : c == 6 ? sum_6 : c == 4 ? sum_4 : c == 2 ? sum_2 : sum_1)(
            h->values + d * HALF_BYTES, h->value_stride, cells, n, w, sums + d);
    }
}

TARGET static void sum_converted(const struct h2o_attention *a, const struct head *h, const int32_t *cells, int64_t n,
                                 const struct weights *w, float *sums) {
    float row[MOST] __attribute__((aligned(32)));
    for (int64_t i = 0; i < n; i++) {
        a->to_float(h->values + cells[i] * h->value_stride, row, h->value_width);
        const __m256 power = _mm256_set1_ps(w->powers[i]), less = _mm256_set1_ps(w->less[i]);
        for (int64_t d = 0; d < h->value_width; d += LANES) { /* what is multiplied by 1 stays as it is */
            const __m256 sum = _mm256_mul_ps(_mm256_load_ps(sums + d), less);
            _mm256_store_ps(sums + d, _mm256_fmadd_ps(_mm256_load_ps(row + d), power, sum));
        }
    }
}

/* Sums over n cells. */
TARGET static void attend(const struct h2o_attention *a, const struct head *h, const int32_t *cells, int64_t n,
                          struct sums *s) {
    struct weights w;
    s->largest = -INFINITY, s->powers = 0;
    memset(s->values, 0, h->value_width * sizeof *s->values);
    for (int64_t m; n > 0; n -= m, cells += m) {
        m = n < STRIP ? n : STRIP;
        weigh(a, h, cells, m, s, &w);
        if (a->to_float) {
            sum_converted(a, h, cells, m, &w, s->values);
        } else {
            sum_halves(h, cells, m, &w, s->values);
        }
    }
}

/* The same, with the cells cut into parts. */
TARGET static void attend_in_parts(const struct h2o_attention *a, const struct head *h, const struct h2o_line *line,
                                   int n_threads, struct sums *s) {
    const int64_t n_part = (line->n_padded + n_threads - 1) / n_threads;
    s->largest = -INFINITY, s->powers = 0;
    memset(s->values, 0, h->value_width * sizeof *s->values);
    for (int64_t begin = 0; begin < line->n_cells; begin += n_part) {
        struct sums part;
        const int64_t left = line->n_cells - begin;
        attend(a, h, line->cells + begin, left < n_part ? left : n_part, &part);
        if (part.powers == 0) {
            continue;
        }
        const float largest = fmaxf(s->largest, part.largest);
        const float own = expf(s->largest - largest), other = expf(part.largest - largest);
        for (int64_t d = 0; d < h->value_width; d++) {
            s->values[d] = __builtin_fmaf(s->values[d], own, part.values[d] * other);
        }
        s->powers = __builtin_fmaf(s->powers, own, part.powers * other);
        s->largest = largest;
    }
}

/* Token t's head n. */
TARGET static void compute_one(const struct turned *turned, int64_t t, int64_t n, int n_threads) {
    const struct h2o_attention *a = turned->owner;
    const struct h2o_line *line = &a->lines[t];
    void *const *sources = AT(void *, turned->node, a->sources), *keys = sources[1], *values = sources[2];
    const int64_t n_heads = AT(int64_t, sources[0], a->ne)[2];
    const size_t *query_nb = AT(size_t, sources[0], a->nb), *key_nb = AT(size_t, keys, a->nb);
    const size_t *value_nb = AT(size_t, values, a->nb), *out_nb = AT(size_t, turned->node, a->nb);
    const int64_t key_head = n / (n_heads / AT(int64_t, keys, a->ne)[2]);
    const int64_t value_head = n / (n_heads / AT(int64_t, values, a->ne)[2]);
    char query[MOST * sizeof(float)] __attribute__((aligned(32)));
    float scale;
    memcpy(&scale, &turned->parameters, sizeof scale);
    const struct head h = {
        .keys = *AT(char *, keys, a->data) + key_head * key_nb[2],
        .values = *AT(char *, values, a->data) + value_head * value_nb[2],
        .query = query,
        .key_stride = key_nb[1],
        .value_stride = value_nb[1],
        .key_width = *AT(int64_t, keys, a->ne),
        .value_width = *AT(int64_t, values, a->ne),
        .scale = scale,
    };
    struct sums s;
    const char *values_of_query = *AT(char *, sources[0], a->data) + t * query_nb[1] + n * query_nb[2];
    a->convert((const float *)values_of_query, query, h.key_width);
    if (line->n_padded) {
        attend_in_parts(a, &h, line, n_threads, &s);
    } else {
        attend(a, &h, line->cells, line->n_cells, &s);
    }
    float *out = (float *)(*AT(char *, turned->node, a->data) + (t * n_heads + n) * out_nb[1]);
    const float inverse = s.powers == 0 ? 0 : 1 / s.powers;
    for (int64_t d = 0; d < h.value_width; d++) {
        out[d] = s.values[d] * inverse;
    }
}

/* All threads of the backend call it. A task: the queries of a token that go to the same keys. */
static void compute(void *node, int thread, int n_threads, void *data) {
    struct turned *turned = data;
    const struct h2o_attention *a = turned->owner;
    void *const *sources = AT(void *, node, a->sources);
    const int64_t n_heads = AT(int64_t, sources[0], a->ne)[2], n_groups = AT(int64_t, sources[1], a->ne)[2];
    const int64_t n = n_heads / n_groups;
    (void)thread;
    for (int64_t i; (i = __atomic_fetch_add(&turned->next, 1, __ATOMIC_RELAXED)) < n_groups * a->n_tokens;) {
        for (int64_t head = i % n_groups * n, end = head + n; head < end; head++) {
            compute_one(turned, i / n_groups, head, n_threads);
        }
    }
}
#else
bool h2o_attention_is_there(void) { return false; }
static void compute(void *node, int thread, int n_threads, void *data) {
    (void)node, (void)thread, (void)n_threads, (void)data;
}
#endif
