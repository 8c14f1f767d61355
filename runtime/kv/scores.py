"""How much a query wants each position, and which positions that makes the chosen ones.

Products of queries and keys are ggml's, on the tensors of a flash-attention node: whatever llama.cpp did to queries
and keys before (rotary positions, norms, the rotation of a quantised cache) is in them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from runtime.errors import EngineError
from runtime.kv.jobs import Jobs
from runtime.kv.needs import padded_scores
from runtime.kv.slots import Rows
from runtime.llama import abi
from runtime.llama.own_graph import OwnGraph, cut_off, describe, operate
from runtime.memory import Region, view

Floats = npt.NDArray[np.float32]
_F32 = 0
_WORTH_A_SECOND_CORE = 1 << 16  # products


class Scorer:
    """Multiplies one query per head with the first keys of a layer: with the threads that compute, and with a core
    that they leave free, where there is one."""

    def __init__(self, n_threads: int, n_heads: int) -> None:
        """n_threads: that compute; n_heads: the most query heads of a layer."""
        self.n_threads, self.n_heads = n_threads, n_heads
        self._product = _Product(n_threads)
        self._aside = _Product(1) if n_threads < len(os.sched_getaffinity(0)) else None
        self._jobs = Jobs(1 if self._aside else 0)
        self._result = Region(0)

    def logits(self, query: Floats, keys: abi.Tensor, n_rows: int) -> Floats:
        """q.k without scale [n_heads, n_rows], valid until the next call; there is room for padded_scores(n_rows).

        query [n_heads, head_dim], contiguous; keys: the flash-attention node's src[1] [head_dim, n_kv, n_kv_heads],
        query head h uses key head h // (n_heads / n_kv_heads).
        """
        n_heads, n_padded = len(query), padded_scores(n_rows)
        self._result = self._result.grown(n_heads * n_padded * 4)
        every = np.frombuffer(view(self._result.address, n_heads * n_padded * 4), np.float32)
        result = every.reshape(n_heads, n_padded)[:, :n_rows]
        if self._aside is None or result.size < _WORTH_A_SECOND_CORE:
            self._product.compute(query, keys, result, 0, n_rows)
            return result
        middle = n_rows * self.n_threads // (self.n_threads + 1)
        # two backends share nothing: each has its own graph and scratch, and writes its own columns
        job = self._jobs.start(partial(self._aside.compute, query, keys, result, middle, n_rows))
        try:
            self._product.compute(query, keys, result, 0, middle)
        finally:
            job.wait(lambda: None)
        return result

    def close(self) -> None:
        """Free the backends."""
        self._jobs.close()
        for product in (self._product, self._aside):
            if product:
                product.close()
        self._result.free()


class _Product:
    """A graph of one node: queries times some of the keys."""

    def __init__(self, n_threads: int) -> None:
        self._keys, self._query, self._output = abi.Tensor(), abi.Tensor(), abi.Tensor()
        operate(self._output, abi.OP_MUL_MAT, self._keys, self._query)
        self._graph = OwnGraph(n_threads, [self._output])

    def compute(self, query: Floats, keys: abi.Tensor, result: Floats, start: int, end: int) -> None:
        """Products of query [n_heads, head_dim] with the keys of rows [start, end) into result [n_heads, n_rows]."""
        n_heads, head_dim = query.shape
        ctypes.memmove(ctypes.addressof(self._keys), ctypes.addressof(keys), abi.TENSOR_BYTES)
        cut_off(self._keys)
        self._keys.data += start * self._keys.nb[1]
        self._keys.ne[1] = end - start
        describe(self._query, query.ctypes.data, (head_dim, 1, n_heads))
        describe(self._output, result.ctypes.data + start * result.itemsize, (end - start, 1, n_heads))
        for i in (1, 2, 3):
            self._output.nb[i] = result.strides[0] * (n_heads if i == 3 else 1)
        self._graph.compute("scores", "run without --kv-filter")

    def close(self) -> None:
        """Free the backend."""
        self._graph.close()


def queries(tensor: abi.Tensor, n_last: int = 1) -> Floats:
    """The last queries [n, n_heads, head_dim] of a node's src[0] [head_dim, n_tokens, n_heads], copied."""
    head_dim, n_tokens, n_heads = tensor.ne[0], tensor.ne[1], tensor.ne[2]
    if tensor.type != _F32 or tensor.nb[0] != 4:
        raise EngineError("the queries of this model are not 32-bit numbers", "run without --kv-filter")
    n = min(n_last, n_tokens)
    strides = (tensor.nb[1], tensor.nb[2], 4)
    n_bytes = (n_tokens - 1) * tensor.nb[1] + (n_heads - 1) * tensor.nb[2] + head_dim * 4
    raw = np.frombuffer(view(tensor.data, n_bytes), np.float32)
    every = np.lib.stride_tricks.as_strided(raw, (n_tokens, n_heads, head_dim), strides)
    return every[n_tokens - n :].copy()


def raw_scores(logits: Floats, scale: float) -> Floats:
    """Scores [n_rows] of "last": the largest scaled product of any head [n_heads, n_rows]."""
    found: Floats = logits.max(axis=0)
    found *= scale
    return found


def softmax_scores(logits: Floats, scale: float, softcap: float = 0.0) -> Floats:
    """Scores [n_rows] of "softmax": the largest attention weight of any head. Overwrites logits [n_heads, n_rows].

    softcap c > 0: weights are those of c * tanh(x / c), as in models with capped attention.
    """
    weights(logits, scale, softcap)
    found: Floats = logits.max(axis=0)
    return found


def weights(logits: Floats, scale: float, softcap: float = 0.0) -> None:
    """Turn products [n_heads, n_rows] into attention weights of every head, in place."""
    if softcap:
        logits *= scale / softcap
        np.tanh(logits, out=logits)
        logits *= softcap
    else:
        logits *= scale
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)


def top_rows(scores: Floats, n: int, kept: Sequence[tuple[int, int]] = (), block: int = 1) -> Rows:
    """The n rows with the highest scores [n_rows], rising. kept: ranges [start, end) that are taken in any case.

    Of equal scores the first ones count. With blocks, the score of a block is the highest of its rows; blocks are taken
    by score, the last of them in part where the budget ends inside it.
    """
    n = min(n, len(scores))
    if kept:
        scores = scores.copy()
        for start, end in kept:
            scores[start:end] = np.inf
    if block == 1:
        return _best(scores, n)
    n_blocks = -(-len(scores) // block)
    padded = np.full(n_blocks * block, -np.inf, np.float32)
    padded[: len(scores)] = scores
    best = np.argsort(-padded.reshape(n_blocks, block).max(axis=1), kind="stable")
    rows = (best[: -(-n // block) + 1, None] * block + np.arange(block)).ravel()
    rows = rows[rows < len(scores)][:n]
    rows.sort()
    return rows.astype(np.int64, copy=False)


def _best(scores: Floats, n: int) -> Rows:
    """The n rows with the highest scores, rising."""
    least = np.partition(scores, len(scores) - n)[len(scores) - n]
    found: Rows = np.flatnonzero(scores >= least)
    if len(found) > n:  # several rows have the lowest score that still counts
        equal = np.flatnonzero(scores[found] == least)
        found = np.delete(found, equal[n - len(found) :])
    return found
