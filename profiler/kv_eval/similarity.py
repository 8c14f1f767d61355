"""How well one layer's choice of rows serves another layer, and which filter layers that suggests: pure functions.

Similarity and curves are OmniKV's (Hao et al., "OmniKV: Dynamic Context Selection for Efficient Long-Context LLMs",
ICLR 2025, section 3), where the filter layers are then read off a plot by eye. Choosing them by a dynamic programme
under a limit on the dense layers is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
CURVE_LENGTHS = (4, 8, 12, 16)
PROPOSED = 4


def similarity(scores: Floats, n_best: int) -> Floats:
    """[a, b]: the part of layer b's scores that lies on the n_best rows of layer a. scores [n_layers, n_rows] >= 0.

    A row's score is its largest attention weight of any head; a layer whose scores are all 0 has a part of 0.
    """
    _n_layers, n_rows = scores.shape
    n = min(n_best, n_rows)
    best = np.argpartition(scores, n_rows - n, axis=1)[:, n_rows - n :]
    chosen = np.zeros(scores.shape, np.float32)
    np.put_along_axis(chosen, best, 1.0, axis=1)
    total = scores.sum(axis=1)
    found = chosen @ scores.T / np.where(total > 0, total, np.float32(1))
    return found.astype(np.float32)


def curves(matrix: Floats) -> dict[int, Floats]:
    """n -> [n_layers]: mean similarity of layer a with the n layers from a on, those that there are.

    Lengths beyond the number of layers are left out, or cut to it when all are.
    """
    n_layers = len(matrix)
    known = [n for n in CURVE_LENGTHS if n <= n_layers] or [n_layers]
    return {n: np.array([matrix[a, a : a + n].mean() for a in range(n_layers)], np.float32) for n in known}


@dataclass(frozen=True)
class Proposal:
    """Filter layers (numbers of the model), wait layers, dense layers among the known ones, and the mean similarity."""

    layers: tuple[int, ...]
    wait: int
    n_dense: int
    similarity: float


def propose(
    matrix: Floats, numbers: Sequence[int], *, most_dense: int, most_filters: int, waits: Sequence[int]
) -> list[Proposal]:
    """The best filter layers, best first: PROPOSED for every number of filters, wait and number of dense layers.

    numbers [n_layers]: the layers of the matrix as numbers of the model, rising. Best is the largest sum over all
    layers of the similarity with the filter layer before them, where dense layers count as 1; at most most_dense are.
    At least one layer is sparse in every proposal. A filter layer never lies within the wait of another one. Of
    proposals that make the same layers dense and serve the others alike, the one with the fewest filters is given.
    """
    found: dict[tuple[int, ...], Proposal] = {}
    for wait in waits:
        table = _table(matrix, numbers, wait, most_dense, most_filters)
        for n_filters in range(1, most_filters + 1):
            ways: Ways = {}
            for first in range(len(numbers)):
                for n_dense, best in table.get((n_filters, first), {}).items():
                    for score, filters in best:
                        _keep(ways, n_dense + first, (score + first, filters))
            for n_dense, best in ways.items():
                if n_dense <= min(most_dense, len(numbers) - 1):
                    for score, filters in best:
                        layers = tuple(numbers[i] for i in filters)
                        proposal = Proposal(layers, wait, n_dense, score / len(numbers))
                        found.setdefault(served_by(numbers, layers, wait), proposal)
    return sorted(found.values(), key=lambda p: (-p.similarity, p.n_dense, p.layers, p.wait))


def served_by(numbers: Sequence[int], layers: Sequence[int], wait: int) -> tuple[int, ...]:
    """For every layer the filter layer that chooses its rows, -1 for a dense one: what filter layers come to."""
    found, last = [], -1
    for number in numbers:
        if number in layers:
            last = number
        found.append(-1 if last < 0 or number <= last + wait else last)
    return tuple(found)


def mean_similarity(matrix: Floats, numbers: Sequence[int], layers: Sequence[int], wait: int) -> float:
    """What propose maximises, for any filter layers."""
    index = {number: i for i, number in enumerate(numbers)}
    by = served_by(numbers, layers, wait)
    return float(np.mean([1.0 if who < 0 else matrix[index[who], i] for i, who in enumerate(by)]))


Way = tuple[float, tuple[int, ...]]
"""Summed similarity, and the filter layers as indices."""
Ways = dict[int, list[Way]]
"""Dense layers -> the best ways, best first."""


def _table(
    matrix: Floats, numbers: Sequence[int], wait: int, most_dense: int, most_filters: int
) -> dict[tuple[int, int], Ways]:
    """(filters left, index of the first of them) -> the best ways from there on."""
    n = len(numbers)
    table: dict[tuple[int, int], Ways] = {}
    for start in range(n - 1, -1, -1):
        behind = next((i for i in range(start + 1, n) if numbers[i] > numbers[start] + wait), n)
        summed = np.concatenate([[0.0], np.cumsum(matrix[start, behind:], dtype=np.float64)])
        n_own = behind - start
        if n_own > most_dense:
            continue
        table[1, start] = {n_own: [(n_own + float(summed[-1]), (start,))]}
        for n_filters in range(2, most_filters + 1):
            ways: Ways = {}
            for following in range(behind, n):
                gained = n_own + float(summed[following - behind])
                for n_dense, best in table.get((n_filters - 1, following), {}).items():
                    if n_own + n_dense <= most_dense:
                        for score, filters in best:
                            _keep(ways, n_own + n_dense, (gained + score, (start, *filters)))
            table[n_filters, start] = ways
    return table


def _keep(ways: Ways, n_dense: int, way: Way) -> None:
    """Add a way where it is among the PROPOSED best."""
    best = ways.setdefault(n_dense, [])
    if len(best) < PROPOSED or way[0] > best[-1][0]:
        best.append(way)
        best.sort(key=lambda other: -other[0])
        del best[PROPOSED:]
