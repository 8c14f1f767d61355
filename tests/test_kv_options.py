"""What the flags of a KV filter mean: options, layer roles, slots, and the choice of rows, against slow references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UsageError
from runtime.kv.options import KvFilter, parse_keep, parse_layers, parse_strategy
from runtime.kv.roles import default_filters, layer_roles
from runtime.kv.scores import raw_scores, softmax_scores, top_rows
from runtime.kv.slots import Slots


def test_roles_of_the_published_example():
    """ "2,8,18" with one wait layer in 32 layers: a quarter is dense."""
    roles = layer_roles(32, (2, 8, 18), 1)
    assert set(range(32)) - set(roles.sparse) == {0, 1, 2, 3, 8, 9, 18, 19}
    assert [segment.sparse for segment in roles.segments] == [(4, 5, 6, 7), tuple(range(10, 18)), tuple(range(20, 32))]


@pytest.mark.parametrize(
    "n_layers, wait, expected",
    [(2, 0, (0,)), (3, 0, (0,)), (4, 0, (2,)), (4, 1, (0,)), (8, 0, (2, 4, 6)), (9, 0, (2, 4, 6)), (12, 1, (2, 5, 8))],
)
def test_default_filters(n_layers, wait, expected):
    assert default_filters(range(n_layers), wait) == expected


@given(st.integers(2, 100), st.integers(0, 3))
def test_the_guess_leaves_no_sparse_layer_far_behind_its_filter(n_layers, wait):
    if n_layers <= wait + 1:
        return
    roles = layer_roles(n_layers, default_filters(range(n_layers), wait), wait)
    assert roles.sparse
    assert len(roles.filters) == 1 or all(layer - s.filter <= wait + 2 for s in roles.segments for layer in s.sparse)


def test_who_chose_the_layers():
    assert KvFilter().layers_from == "guess"
    assert KvFilter(layers=(1,)).layers_from == "given"
    assert KvFilter(layers=(1,), analyzed=True).layers_from == "analysis"
    assert KvFilter().is_guess_in(257) and not KvFilter().is_guess_in(256)
    assert not KvFilter(keep=1.0).is_guess_in(1000) and not KvFilter(layers=(1,)).is_guess_in(1000)
    assert not KvFilter(method="full").is_guess_in(1000)


@given(st.data())
def test_every_layer_has_one_role(data):
    n_layers = data.draw(st.integers(2, 60))
    usable = data.draw(st.sets(st.integers(0, n_layers - 1), min_size=1))
    filters = sorted(data.draw(st.sets(st.sampled_from(sorted(usable)), min_size=1)))
    wait = data.draw(st.integers(0, 4))
    try:
        roles = layer_roles(n_layers, filters, wait, usable)
    except UsageError as error:
        assert "leave no layer" in str(error)
        return
    assert roles.filters == tuple(filters)
    for layer in range(n_layers):
        before = [f for f in filters if f <= layer]
        sparse = bool(before) and layer in usable and layer > before[-1] + wait
        assert (layer in roles.sparse) == sparse
        if sparse:
            assert layer in next(s for s in roles.segments if s.filter == before[-1]).sparse


@pytest.mark.parametrize(
    "filters, wait, usable, words",
    [
        ((9,), 1, None, "there is no layer 9"),
        ((7,), 0, None, "leave no layer"),
        ((0,), 7, None, "leave no layer"),
        ((2,), 1, (3, 7), "sliding window"),
    ],
)
def test_roles_that_a_model_cannot_have(filters, wait, usable, words):
    with pytest.raises(UsageError, match=words):
        layer_roles(8, filters, wait, usable)


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": 0},
        {"keep": 0.0},
        {"keep": 1.5},
        {"wait": -1},
        {"select": "best"},
        {"store": "tape"},
        {"strategy": "eager"},
        {"method": "h2o"},
        {"sinks": -1},
        {"recent": -1},
        {"block": 0},
        {"layers": (8, 2)},
        {"layers": (2, 2)},
        {"layers": (-1,)},
        {"window": 0},
        {"lazy_threshold": 2.0},
    ],
)
def test_options_that_are_not_possible(wrong):
    with pytest.raises(UsageError):
        KvFilter(**wrong)


def test_words_of_the_flags():
    assert parse_layers("2,8,18") == (2, 8, 18) and parse_layers("auto") == ()
    assert parse_keep("0.067") == 0.067 and parse_keep("4096") == 4096 and isinstance(parse_keep("1.0"), float)
    assert parse_strategy("lazy(0.6)") == ("lazy", 0.6) and parse_strategy("multi") == ("multi", 0.4)
    for parse, text in ((parse_layers, "a"), (parse_keep, "x"), (parse_strategy, "multi(1)"), (parse_strategy, "")):
        with pytest.raises(UsageError):
            parse(text)


def test_rows_of_a_budget():
    assert KvFilter(keep=0.067).n_rows(10000) == 670
    assert KvFilter(keep=0.067).n_rows(1000) == 256  # a share is never less
    assert KvFilter(keep=0.1).n_rows(5) == 5
    assert KvFilter(keep=0.067, least=1).n_rows(1000) == 67
    assert KvFilter(keep=0.1, least=1).n_rows(5) == 1  # never nothing
    assert KvFilter(keep=3).n_rows(1000) == 3
    assert KvFilter(keep=4096).n_rows(100) == 100
    assert KvFilter(keep=1.0).n_rows(777) == 777
    assert KvFilter(keep=2, sinks=4, recent=4).n_rows(100) == 8
    assert KvFilter(keep=2, strategy="brutal").n_rows(100) == 100


@given(st.data())
def test_a_row_keeps_its_slot_as_long_as_it_is_chosen(data):
    n_rows = data.draw(st.integers(1, 40))
    n = data.draw(st.integers(1, n_rows))
    slots, where = Slots(n, n_rows), {}
    for step in range(data.draw(st.integers(1, 6))):
        rows = np.array(sorted(data.draw(st.permutations(range(n_rows)))[:n]), np.int64)
        assert slots.overlap(rows) == pytest.approx(sum(int(row) in where for row in rows) / n)
        move = slots.choose(rows)
        missing = [int(row) for row in rows if int(row) not in where]
        assert (move is None) == (not missing)
        if move is None:
            continue
        assert list(move.rows) == missing
        if step == 0:
            assert list(move.slots) == list(range(n))  # rising, as in the cache
        kept = {row: slot for row, slot in where.items() if row in rows}
        where = kept | {int(row): int(slot) for row, slot in zip(move.rows, move.slots, strict=True)}
        assert sorted(where) == list(rows)
        assert sorted(where.values()) == list(range(n))
        assert all(move.every[slot] == row for row, slot in where.items())
    slots.forget()
    assert slots.overlap(rows) == 0


@given(st.data())
def test_top_rows_against_a_sort(data):
    n_rows = data.draw(st.integers(1, 50))
    n, block = data.draw(st.integers(1, n_rows)), data.draw(st.integers(1, 9))
    scores = np.array(data.draw(st.permutations(range(n_rows))), np.float32)
    found = list(top_rows(scores, n, block=block))
    best = sorted(range(0, n_rows, block), key=lambda start: -max(scores[start : start + block]))
    rows = [row for start in best for row in range(start, min(start + block, n_rows))]
    assert found == sorted(rows[:n])


def test_rows_that_are_always_kept():
    scores = np.arange(10, dtype=np.float32)
    assert list(top_rows(scores, 5, [(0, 2), (4, 5)])) == [0, 1, 4, 8, 9]
    assert list(scores) == list(range(10))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_scores_against_a_slow_reference(softcap):
    logits = np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32) * 9
    scale = 0.25
    assert np.allclose(raw_scores(logits, scale), [max(float(x) * scale for x in column) for column in logits.T])
    weights = []
    for head in logits.astype(np.float64) * scale:
        capped = softcap * np.tanh(head / softcap) if softcap else head
        weights.append(np.exp(capped) / np.exp(capped).sum())
    assert np.allclose(softmax_scores(logits.copy(), scale, softcap), np.max(weights, axis=0), atol=1e-6)
