/* Which nodes of llama.cpp's graph Python hears of: those with a marked source, those of some operations, or all.
 *
 * llama.cpp asks about every node before it computes it, some thousand times for a token, and most nodes use no weight
 * that anybody waits for. This function answers for those. It knows no struct of llama.cpp: where the sources of a node
 * are is handed in, and so is the table of marks. node_filter.py is its other half.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Counted up when a function of this library, or a struct that it shares with Python, changes (compiled.py). */
int h2o_version(void) { return 1; }

struct h2o_filter {
    bool (*python)(void *node, bool ask, void *data);
    const uint16_t *marks; /* per slot: how many marked addresses have it */
    size_t n_marks;        /* a power of two */
    size_t source_offset;  /* bytes from the beginning of a node to its first source */
    size_t n_sources;
    int32_t everything;    /* not 0: Python hears of every node; any thread may set it, the next node sees it */
    size_t op_offset;      /* bytes from the beginning of a node to its operation */
    int32_t n_ops;
    int32_t ops[4];        /* Python hears of nodes of these operations */
    void (*turn)(void *node, void *data); /* called behind Python with every node that is asked for, or none (q4_1.c) */
    void *turn_data;
    void (*attend)(void *node, void *data); /* the same in front of Python (cell_attention.c) */
    void *attend_data;
};

bool h2o_filter_nodes(void *node, bool ask, void *data) {
    const struct h2o_filter *filter = data;
    if (ask && filter->attend) {
        filter->attend(node, filter->attend_data); /* what it takes has another operation from then on */
    }
    bool wanted = !ask || filter->everything;
    const int32_t op = *(const int32_t *)((const char *)node + filter->op_offset);
    for (int32_t i = 0; !wanted && i < filter->n_ops; i++) {
        wanted = filter->ops[i] == op;
    }
    void *const *sources = (void *const *)((const char *)node + filter->source_offset);
    for (size_t i = 0; !wanted && i < filter->n_sources; i++) {
        wanted = sources[i] && filter->marks[((uintptr_t)sources[i] >> 4) & (filter->n_marks - 1)];
    }
    const bool answer = wanted && filter->python(node, ask, data);
    if (ask && filter->turn) {
        filter->turn(node, filter->turn_data);
    }
    return answer;
}
