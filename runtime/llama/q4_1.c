/* Products of Q4_1 weights with four columns or more, with the bits of llama.cpp's own.
 *
 * llama.cpp has one kernel for this type: a row by a column, which unpacks the row again for each column. Here a block of
 * a row is unpacked once for eight columns (or four). Every element is summed in the order of that kernel, and its
 * products of integers are exact: so the bits are the same (q4_1.py compares them before any of this is used).
 *
 * A node of the graph is turned into one that calls a function before it is computed, and is put back when the pass is
 * over. This file knows no struct of llama.cpp: where things are in a node is handed in.
 */
#include <stdbool.h>

#include "turned.h"

struct h2o_product {
    struct turning turning;
    size_t ne, nb, sources, data; /* bytes from the beginning of a node; its type is at 0 */
    int32_t product;              /* an operation */
    int32_t weights, inputs;      /* types: Q4_1, f32 */
    void (*quantise)(const float *values, void *blocks, int64_t n);
    void (*dot)(int n, float *out, size_t, const void *row, size_t, const void *column, size_t, int);
    char *const *scratch; /* the backend's: columns are quantised into it, as llama.cpp does */
    const size_t *scratch_bytes;
    int32_t arrived, next, left; /* threads and rows of the node that is computed; 0 between two nodes */
};

enum { FEWEST = 4, BLOCK = 32, WEIGHTS_BYTES = 20, INPUTS_BYTES = 36, ROWS = 16 };

static void compute(void *node, int thread, int n_threads, void *data);

/* Turn a node that is going to be computed, if it is such a product. */
void h2o_product_turn(void *node, struct h2o_product *p) {
    struct turning *t = &p->turning;
    void **sources = AT(void *, node, p->sources);
    if (*AT(int32_t, node, t->op) != p->product || *AT(int32_t, sources[0], 0) != p->weights ||
        *AT(int32_t, sources[1], 0) != p->inputs || t->n_turned == t->most_turned) {
        return;
    }
    const int64_t *out = AT(int64_t, node, p->ne), n = *AT(int64_t, sources[0], p->ne);
    static const struct call nothing;
    const size_t needed = (size_t)(out[1] * (n / BLOCK) * INPUTS_BYTES);
    if (out[1] < FEWEST || out[2] != 1 || out[3] != 1 || *AT(size_t, sources[1], p->nb) != sizeof(float) ||
        !*p->scratch || needed > *p->scratch_bytes || memcmp(AT(char, node, t->parameters), &nothing, sizeof nothing)) {
        return;
    }
    turn(t, node, compute, p);
}

void h2o_product_put_back(struct h2o_product *p) { put_back(&p->turning); }

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <sched.h>

/* Rows of weights by C columns. A block of C columns is their scales, their sums, and their numbers, each column's
 * behind those of the one before. out: the first row's element of the first column; columns are out_stride apart. */
typedef void (*kernel)(int n_blocks, int n_rows, const char *rows, size_t row_stride, const char *columns, char *out,
                       size_t out_stride);

enum { STRIP = 32, MOST_SPINS = 2000 };

#define HALVES(at) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at)))
#define HALF(at) _mm256_cvtph_ps(_mm_set1_epi16(*(const int16_t *)(at)))
#define UNROLL _Pragma("GCC unroll 8")

/* acc[c]: eight sums of products of a column, scales: its scale times that of the weights, block by block; sums: of what
 * the smallest weight of a block adds. */
#define KERNEL(NAME, C, DOT, TARGET) \
    __attribute__((target(TARGET))) static void NAME(int n_blocks, int n_rows, const char *rows, size_t row_stride, \
                                                     const char *columns, char *out, size_t out_stride) { \
        const __m256i low = _mm256_set1_epi8(15); \
        float scales[STRIP][8] __attribute__((aligned(32))); \
        for (int row = 0; row < n_rows; row++, rows += row_stride, out += sizeof(float)) { \
            const char *w = rows, *y = columns; \
            __m256 acc[C], sums = _mm256_setzero_ps(); \
            UNROLL for (int c = 0; c < C; c++) { \
                acc[c] = _mm256_setzero_ps(); \
            } \
            for (int left = n_blocks; left > 0; left -= STRIP) { \
                const int n = left < STRIP ? left : STRIP; \
                for (int b = 0; b < n; b++) { \
                    const char *wb = w + b * WEIGHTS_BYTES, *yb = y + b * INPUTS_BYTES * C; \
                    _mm256_store_ps(scales[b], _mm256_mul_ps(HALF(wb), HALVES(yb))); \
                    sums = _mm256_fmadd_ps(HALF(wb + 2), HALVES(yb + 2 * C), sums); \
                } \
                __asm__("" : "+m"(scales)); /* not kept in registers: they are loaded as eight equal numbers */ \
                for (int b = 0; b < n; b++, w += WEIGHTS_BYTES, y += INPUTS_BYTES * C) { \
                    const __m128i packed = _mm_loadu_si128((const __m128i *)(w + 4)); \
                    const __m256i both = _mm256_insertf128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1); \
                    const __m256i u = _mm256_and_si256(low, both); \
                    UNROLL for (int c = 0; c < C; c++) { \
                        const __m256i v = _mm256_loadu_si256((const __m256i *)(y + 4 * C + BLOCK * c)); \
                        acc[c] = _mm256_fmadd_ps(_mm256_set1_ps(scales[b][c]), _mm256_cvtepi32_ps(DOT(u, v)), acc[c]); \
                    } \
                } \
            } \
            float totals[8]; \
            UNROLL for (int c = 0; c < C; c++) { \
                __m128 h = _mm_add_ps(_mm256_extractf128_ps(acc[c], 1), _mm256_castps256_ps128(acc[c])); \
                h = _mm_add_ps(h, _mm_movehl_ps(h, h)); \
                totals[c] = _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h))); \
            } \
            float more[8]; \
            _mm256_storeu_ps(more, sums); \
            UNROLL for (int c = 0; c < C; c++) { \
                *(float *)(out + c * out_stride) = totals[c] + more[c]; \
            } \
        } \
    }

#define AVX2 "avx2,fma,f16c"
#define VNNI AVX2 ",avx512f,avx512vl,avx512vnni"
#define DOT_AVX2(u, v) _mm256_madd_epi16(_mm256_set1_epi16(1), _mm256_maddubs_epi16(u, v))
#define DOT_VNNI(u, v) _mm256_dpbusd_epi32(_mm256_setzero_si256(), u, v)
KERNEL(eight_avx2, 8, DOT_AVX2, AVX2)
KERNEL(four_avx2, 4, DOT_AVX2, AVX2)
KERNEL(eight_vnni, 8, DOT_VNNI, VNNI)
KERNEL(four_vnni, 4, DOT_VNNI, VNNI)

static bool has_vnni(void) { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"); }

bool h2o_product_is_there(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

/* Columns that are computed together, of so many that are left. */
static int64_t together(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : 1; }

/* Quantise a thread's share of every column. */
static void quantise(const struct h2o_product *p, void *const *sources, int64_t n_columns, int thread, int n_threads) {
    const char *values = *AT(char *, sources[1], p->data);
    const size_t stride = AT(size_t, sources[1], p->nb)[1];
    const int64_t n_blocks = *AT(int64_t, sources[0], p->ne) / BLOCK;
    char *to = *p->scratch, block[INPUTS_BYTES];
    for (int64_t c = 0, n; c < n_columns; c += n, to += n * n_blocks * INPUTS_BYTES) {
        n = together(n_columns - c);
        for (int64_t b = thread * n_blocks / n_threads; b < (thread + 1) * n_blocks / n_threads; b++) {
            char *blocks = to + b * n * INPUTS_BYTES;
            for (int64_t i = 0; i < n; i++) {
                p->quantise((const float *)(values + (c + i) * stride) + b * BLOCK, block, BLOCK);
                memcpy(blocks + 2 * i, block, 2);
                memcpy(blocks + 2 * (n + i), block + 2, 2);
                memcpy(blocks + 4 * n + BLOCK * i, block + 4, BLOCK);
            }
        }
    }
}

/* Rows of the result, n_rows from the first one on. */
static void compute_rows(const struct h2o_product *p, void *node, int64_t first, int64_t n_rows) {
    void *const *sources = AT(void *, node, p->sources);
    const size_t row_stride = AT(size_t, sources[0], p->nb)[1], out_stride = AT(size_t, node, p->nb)[1];
    const int64_t n_blocks = *AT(int64_t, sources[0], p->ne) / BLOCK, n_columns = AT(int64_t, node, p->ne)[1];
    const char *rows = *AT(char *, sources[0], p->data) + first * row_stride, *columns = *p->scratch;
    char *out = *AT(char *, node, p->data) + first * sizeof(float);
    const kernel eight = has_vnni() ? eight_vnni : eight_avx2, four = has_vnni() ? four_vnni : four_avx2;
    for (int64_t left = n_columns, n; left > 0; left -= n, out += n * out_stride, columns += n * n_blocks * INPUTS_BYTES) {
        n = together(left);
        if (n > 1) {
            (n == 8 ? eight : four)((int)n_blocks, (int)n_rows, rows, row_stride, columns, out, out_stride);
            continue;
        }
        for (int64_t i = 0; i < n_rows; i++) {
            p->dot((int)(n_blocks * BLOCK), (float *)out + i, 0, rows + i * row_stride, 0, columns, 0, 1);
        }
    }
}

/* All threads of the backend call it. */
static void compute(void *node, int thread, int n_threads, void *data) {
    struct h2o_product *p = ((struct turned *)data)->owner;
    const int64_t *out = AT(int64_t, node, p->ne);
    quantise(p, AT(void *, node, p->sources), out[1], thread, n_threads);
    __atomic_add_fetch(&p->arrived, 1, __ATOMIC_ACQ_REL);
    for (int spins = 0; __atomic_load_n(&p->arrived, __ATOMIC_ACQUIRE) < n_threads; spins++) {
        if (spins < MOST_SPINS) {
            _mm_pause();
        } else {
            sched_yield(); /* one of them has no core */
        }
    }
    for (int64_t first; (first = (int64_t)__atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED) * ROWS) < out[0];) {
        compute_rows(p, node, first, out[0] - first < ROWS ? out[0] - first : ROWS);
    }
    if (__atomic_add_fetch(&p->left, 1, __ATOMIC_ACQ_REL) == n_threads) { /* the others read nothing of it any more */
        p->arrived = p->next = p->left = 0;
    }
}
#else
bool h2o_product_is_there(void) { return false; }
static void compute(void *node, int thread, int n_threads, void *data) {
    (void)node, (void)thread, (void)n_threads, (void)data;
}
#endif
