/* Nodes of llama.cpp's graph that are turned into ones that call a function of ours (GGML_OP_CUSTOM). */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define AT(type, node, offset) ((type *)((char *)(node) + (offset)))

/* Parameters of a node that calls a function. */
struct call {
    void (*function)(void *node, int thread, int n_threads, void *data);
    int32_t n_tasks; /* -1: all threads */
    void *data;
};

/* A node that was turned: what it was, and for whom. */
struct turned {
    void *node;
    struct call parameters; /* its own */
    void *owner;
    int32_t operation; /* its own */
    int32_t next;      /* of its tasks, to be taken by a thread */
};

/* Where things are in a node, in bytes from its beginning; the operation CUSTOM; the nodes that are turned. */
struct turning {
    size_t op, parameters;
    int32_t custom, n_turned, most_turned;
    struct turned *turned;
};

/* Turn a node that is going to be computed. There is room for it. */
static void turn(struct turning *t, void *node, void (*function)(void *, int, int, void *), void *owner) {
    struct turned *turned = &t->turned[t->n_turned++];
    const struct call call = {.function = function, .n_tasks = -1, .data = turned};
    *turned = (struct turned){.node = node, .owner = owner, .operation = *AT(int32_t, node, t->op)};
    memcpy(&turned->parameters, AT(char, node, t->parameters), sizeof call); /* they lie at no multiple of 8 */
    memcpy(AT(char, node, t->parameters), &call, sizeof call);
    *AT(int32_t, node, t->op) = t->custom;
}

/* Make the nodes what they were. Where another graph lies there by now, what is no node of ours is left alone. */
static void put_back(struct turning *t) {
    while (t->n_turned) {
        struct turned *turned = &t->turned[--t->n_turned];
        struct call call;
        memcpy(&call, AT(char, turned->node, t->parameters), sizeof call);
        if (*AT(int32_t, turned->node, t->op) == t->custom && call.data == turned) {
            *AT(int32_t, turned->node, t->op) = turned->operation;
            memcpy(AT(char, turned->node, t->parameters), &turned->parameters, sizeof call);
        }
    }
}
