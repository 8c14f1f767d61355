"""Similarity, curves and the choice of filter layers, against slow and obvious ways."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.kv_eval.similarity import curves, mean_similarity, propose, served_by, similarity
from runtime.kv.roles import layer_roles


def scores_of(seed, n_layers, n_rows):
    return np.random.default_rng(seed).random((n_layers, n_rows), np.float32) ** 8


@given(seed=st.integers(0, 10**6), n_layers=st.integers(1, 6), n_rows=st.integers(1, 40), n_best=st.integers(1, 50))
def test_similarity_is_the_mass_on_the_best_rows(seed, n_layers, n_rows, n_best):
    scores = scores_of(seed, n_layers, n_rows)
    found = similarity(scores, n_best)
    for a in range(n_layers):
        best = sorted(range(n_rows), key=lambda row: -scores[a, row])[:n_best]
        for b in range(n_layers):
            assert found[a, b] == pytest.approx(scores[b, best].sum() / scores[b].sum(), rel=1e-4)
    assert np.all((found >= 0) & (found <= 1 + 1e-5))


@given(seed=st.integers(0, 10**6), n_layers=st.integers(1, 6))
def test_no_layer_is_served_better_than_by_itself(seed, n_layers):
    found = similarity(scores_of(seed, n_layers, 30), 7)
    assert np.all(found <= np.diag(found)[None, :] + 1e-5)


def test_a_layer_without_scores():
    assert similarity(np.zeros((2, 5), np.float32), 2).tolist() == [[0, 0], [0, 0]]


def test_curves():
    matrix = np.arange(25, dtype=np.float32).reshape(5, 5)
    found = curves(matrix)
    assert list(found) == [4]
    assert found[4].tolist() == [1.5, 7.5, 13.0, 18.5, 24.0]
    assert list(curves(matrix[:3, :3])) == [3]
    assert list(curves(np.zeros((20, 20), np.float32))) == [4, 8, 12, 16]


def every_choice(matrix, numbers, most_dense, most_filters, wait):
    """Dense layers -> the best mean similarity, by trying every subset."""
    n = len(numbers)
    best = {}
    for size in range(1, most_filters + 1):
        for filters in combinations(range(n), size):
            if any(numbers[b] - numbers[a] <= wait for a, b in pairwise(filters)):
                continue
            total, dense = 0.0, 0
            for layer in range(n):
                before = [f for f in filters if f <= layer]
                if not before or numbers[layer] <= numbers[before[-1]] + wait:
                    total, dense = total + 1, dense + 1
                else:
                    total += matrix[before[-1], layer]
            if dense <= min(most_dense, n - 1):
                best[dense] = max(best.get(dense, 0.0), total / n)
    return best


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 8),
    most_dense=st.integers(1, 8),
    most_filters=st.integers(1, 4),
    wait=st.integers(0, 2),
    spread=st.booleans(),
)
def test_proposals_are_the_best_of_all_subsets(seed, n, most_dense, most_filters, wait, spread):
    rng = np.random.default_rng(seed)
    matrix = rng.random((n, n), np.float32)
    numbers = sorted(rng.choice(3 * n, n, replace=False).tolist()) if spread else list(range(n))
    found = propose(matrix, numbers, most_dense=most_dense, most_filters=most_filters, waits=[wait])
    best = {}
    for proposal in found:
        assert proposal.similarity == pytest.approx(mean_similarity(matrix, numbers, proposal.layers, wait), rel=1e-5)
        best[proposal.n_dense] = max(best.get(proposal.n_dense, 0), proposal.similarity)
    assert best == pytest.approx(every_choice(matrix, numbers, most_dense, most_filters, wait), rel=1e-5)
    assert [p.similarity for p in found] == sorted((p.similarity for p in found), reverse=True)
    assert len({served_by(numbers, p.layers, p.wait) for p in found}) == len(found)


@pytest.mark.parametrize(("layers", "wait"), [((2, 8, 18), 1), ((0,), 0), ((3, 4), 2)])
def test_who_serves_whom_agrees_with_the_roles_of_a_run(layers, wait):
    by = served_by(range(32), layers, wait)
    for segment in layer_roles(32, layers, wait).segments:
        assert tuple(layer for layer in range(32) if by[layer] == segment.filter) == segment.sparse
    assert [layer for layer in range(32) if by[layer] >= 0] == list(layer_roles(32, layers, wait).sparse)


def test_many_layers_take_no_time():
    matrix = np.random.default_rng(1).random((80, 80), np.float32)
    found = propose(matrix, range(80), most_dense=20, most_filters=3, waits=(0, 1))
    assert max(len(p.layers) for p in found) == 3


def test_nothing_fits():
    assert propose(np.ones((3, 3), np.float32), range(3), most_dense=0, most_filters=2, waits=(0,)) == []
