/* The likeliest token of a row of logits, as llama.cpp's greedy sampler chooses it: the first of the largest ones.
 *
 * That sampler copies the row into a list of 12 bytes for each token first, which takes longer than all the rest.
 */
#include <math.h>
#include <stdint.h>

enum { LANES = 16, BLOCK = 1024 };

/* n > 0. What is no number is never larger than another, and nothing is larger than it. */
int32_t h2o_argmax(const float *logits, int32_t n) {
    float best = logits[0];
    int32_t first = 0; /* of the block that has it */
    for (int32_t start = 0; start < n; start += BLOCK) {
        const int32_t end = n - start < BLOCK ? n : start + BLOCK;
        float most[LANES];
        for (int j = 0; j < LANES; j++) {
            most[j] = best;
        }
        int32_t i = start;
        for (; i + LANES <= end; i += LANES) {
            for (int j = 0; j < LANES; j++) {
                most[j] = logits[i + j] > most[j] ? logits[i + j] : most[j];
            }
        }
        for (; i < end; i++) {
            most[0] = logits[i] > most[0] ? logits[i] : most[0];
        }
        for (int j = 0; j < LANES; j++) {
            if (most[j] > best) {
                best = most[j];
                first = start;
            }
        }
    }
    for (int32_t i = first; i < n; i++) {
        if (logits[i] == best) {
            return i;
        }
    }
    return 0; /* the first one is no number */
}

/* The same of n_rows rows, one behind the other; -1 where that logit is no number. */
void h2o_argmax_of_rows(const float *logits, int32_t n, int32_t n_rows, int32_t *tokens) {
    for (int32_t i = 0; i < n_rows; i++, logits += n) {
        tokens[i] = h2o_argmax(logits, n);
        tokens[i] = isnan(logits[tokens[i]]) ? -1 : tokens[i];
    }
}
