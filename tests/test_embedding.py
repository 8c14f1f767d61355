"""Rows of the input embedding: read when asked for, kept up to a limit, the right bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import PatternFiles, bytes_in_memory, pattern
from test_residency import make_index

from runtime.errors import DiskError
from runtime.llama.model_file import ModelFile, TensorInfo
from runtime.memory import view
from runtime.plans.ledger import embedding_rows_bytes
from runtime.sizes import PAGE, page_down, page_up
from runtime.weights.files import WeightFiles
from runtime.weights.rows import RowTable
from runtime.weights.store import LayerStore

MODEL = make_index([[64, 64]], [64])


def info(row_bytes, n_rows, offset=160, file=0):
    n_bytes = row_bytes * n_rows
    return TensorInfo("token_embd.weight", file, offset, n_bytes, "f16", (row_bytes // 2, n_rows, 1, 1), row_bytes)


def row_of(table, row):
    size = table.tensor.row_bytes
    return np.frombuffer(view(table.data + row * size, size), np.uint64)


def expected(table, row):
    size = table.tensor.row_bytes
    return pattern(table.tensor.file, table.tensor.offset + row * size, size)


def memory_of(table):
    start = page_down(table.data)
    return bytes_in_memory([(start, start + page_up(table.tensor.offset % PAGE + table.tensor.n_bytes))])


@pytest.fixture
def store():
    files = PatternFiles()
    store = LayerStore(MODEL, files, depth=2)
    store.apply(frozenset({0}), MODEL.layers[0].pieces[0].span_bytes)
    store.settle()
    files.reads.clear()
    yield store
    store.close()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    row_bytes=st.sampled_from([32, 512, 1000, 4096, 9000]),
    n_rows=st.integers(1, 60),
    n_kept=st.integers(1, 12),
    offset=st.sampled_from([0, 160, 4064, 70_000]),
    data=st.data(),
)
def test_rows_are_there_with_all_rows_of_the_same_fetch_and_memory_is_kept(
    store, row_bytes, n_rows, n_kept, offset, data
):
    table = RowTable(info(row_bytes, n_rows, offset), embedding_rows_bytes(row_bytes, n_kept))
    row = st.integers(0, n_rows - 1)
    for rows in data.draw(st.lists(st.lists(row, min_size=1, max_size=n_kept), max_size=8)):
        table.fetch(rows, store)
        for number in rows:
            assert np.array_equal(row_of(table, number), expected(table, number))
        assert memory_of(table) <= min(table.max_bytes, page_up(n_rows * row_bytes + PAGE))
    table.free()


def test_rows_that_are_there_are_not_read_again(store):
    table = RowTable(info(1024, 100), embedding_rows_bytes(1024, 20))
    table.fetch([5, 6, 5], store)
    n_reads = len(store.files.reads)
    table.fetch([6, 5], store)
    table.fetch([], store)
    assert len(store.files.reads) == n_reads
    table.free()


def test_neighbouring_pages_are_one_read_of_at_most_a_mebibyte(store):
    table = RowTable(info(PAGE, 1000, offset=0), 2**30)
    table.fetch([3, 4, 5, 9, 4], store)
    assert sorted(store.files.reads) == [(0, 3 * PAGE, 3 * PAGE), (0, 9 * PAGE, PAGE)]
    store.files.reads.clear()
    table.fetch(range(1000), store)
    assert sum(n for _, _, n in store.files.reads) == 996 * PAGE
    assert max(n for _, _, n in store.files.reads) <= 2**20
    table.free()


def test_when_the_limit_is_reached_old_rows_make_room(store):
    table = RowTable(info(PAGE, 100, offset=0), 4 * PAGE)
    for row in range(40):
        table.fetch([row, row + 1], store)
        assert memory_of(table) <= table.max_bytes
        assert np.array_equal(row_of(table, row), expected(table, row))
    table.free()


def test_after_a_failed_read_the_rows_are_not_taken_for_present(store):
    table = RowTable(info(PAGE, 100, offset=0), 8 * PAGE)
    store.files.broken = {2 * PAGE}
    for _ in range(2):
        with pytest.raises(DiskError):
            table.fetch([2], store)
    table.free()


def test_rows_of_a_model_file(tiny_model):
    model = ModelFile.open(tiny_model("gemma2"))
    (tensor,) = model.row_tables
    data = np.memmap(model.path, mode="r")
    rows = data[tensor.offset : tensor.offset + tensor.n_bytes].reshape(tensor.n_rows, tensor.row_bytes)
    store = LayerStore(model, WeightFiles(model.paths))
    table = RowTable(tensor, embedding_rows_bytes(tensor.row_bytes, 8))
    store.apply(frozenset(), max(piece.span_bytes for piece in model.pieces))
    for wanted in ([0], [tensor.n_rows - 1, 7, 8], range(8)):
        table.fetch(wanted, store)
        for row in wanted:
            place = table.data + row * tensor.row_bytes
            assert np.array_equal(np.frombuffer(view(place, tensor.row_bytes), np.uint8), rows[row])
    store.close()
    table.free()
