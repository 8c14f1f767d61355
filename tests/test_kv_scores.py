"""Products of queries and keys: numpy's, and the same bits whoever computes them."""

import os

import numpy as np
import pytest

from runtime.kv.scores import Scorer
from runtime.llama import abi
from runtime.llama.own_graph import describe

F16 = 1
N_HEADS, N_KV_HEADS, HEAD_DIM = 16, 8, 64
N_CELLS = 6000


@pytest.fixture(scope="module")
def keys():
    return np.random.default_rng(1).standard_normal((N_CELLS, N_KV_HEADS, HEAD_DIM)).astype(np.float16)


@pytest.fixture(scope="module")
def query():
    """Numbers that f16 holds, since ggml rounds queries to it."""
    exact = np.random.default_rng(2).standard_normal((N_HEADS, HEAD_DIM)).astype(np.float16)
    return exact.astype(np.float32)


def products(keys, query, n_rows, monkeypatch, n_cores):
    """[n_heads, n_rows] with one thread that computes, on a machine with n_cores cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(n_cores)))
    tensor = abi.Tensor()
    describe(tensor, keys.ctypes.data, (HEAD_DIM, N_CELLS, N_KV_HEADS))
    tensor.type = F16
    tensor.nb[0], tensor.nb[2], tensor.nb[1] = keys.strides[::-1]
    tensor.nb[3] = keys.nbytes
    scorer = Scorer(1, N_HEADS)
    try:
        return scorer.logits(query, tensor, n_rows).copy()
    finally:
        scorer.close()


@pytest.mark.parametrize("n_rows", [1, 777, 4096, 4097, N_CELLS])
def test_products_are_the_same_with_and_without_a_second_core(keys, query, n_rows, monkeypatch):
    alone = products(keys, query, n_rows, monkeypatch, 1)
    beside = products(keys, query, n_rows, monkeypatch, 2)
    wide = np.repeat(keys[:n_rows].astype(np.float32), N_HEADS // N_KV_HEADS, axis=1)
    np.testing.assert_allclose(alone, np.einsum("nhd,hd->hn", wide, query), atol=1e-3)
    np.testing.assert_array_equal(alone, beside)
