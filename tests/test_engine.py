"""What only the engine itself shows: ending a pass, and going on afterwards."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from engines import engine, greedy

from runtime.errors import BudgetError, Cancelled, DiskError, EngineError
from runtime.kv.options import KvFilter
from runtime.llama import abi, model_file
from runtime.llama.model_file import ModelFile
from runtime.memory import Region
from runtime.plans.ledger import budget_for, floor_for
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import overlapping_window, smallest_window, streamable_bytes
from runtime.settings import MARGIN_BYTES, Settings
from runtime.sizes import MB, PAGE
from runtime.weights.head_start import head_start


@pytest.mark.parametrize("n_reads", [0, 3])
def test_a_pass_that_waits_for_a_hung_disk_can_be_cancelled(tiny_model, n_reads):
    """With no read done it waits for embedding rows, later for a layer; afterwards the same engine goes on."""
    path = tiny_model("llama")
    with engine(path, Plan(0, 1)) as opened:
        expected = greedy(opened, [5, 6, 7], 4)[1]
    with engine(path, Plan(0, 1)) as opened:
        files, hung, left = opened._store.files, threading.Event(), [n_reads]
        read = files.read

        def slow(*arguments):
            left[0] -= 1
            if left[0] < 0:
                hung.wait(20)
            read(*arguments)

        opened._store.settle()
        opened.forward([9])
        opened.truncate(0)
        files.read = slow
        threading.Timer(0.3, opened.cancel).start()
        start = time.monotonic()
        with pytest.raises(Cancelled):
            opened.forward(list(range(100, 160)))
        assert time.monotonic() - start < 10
        assert opened.n_past == 0
        hung.set()
        files.read = read
        assert greedy(opened, [5, 6, 7], 4)[1] == expected


def test_a_token_computes_without_a_callback_once_every_weight_is_in_memory(tiny_model):
    """And with callbacks again as soon as a plan takes weights out."""
    path = tiny_model("llama")
    with engine(path, Plan(0, 1, budget_bytes=10**9)) as opened:
        calls = []
        before = opened.weights.before
        opened.weights.before = lambda node: calls.append(node) or before(node)
        opened.forward([5, 6, 7])
        opened.forward([8])
        asked = len(calls)
        expected = [opened.forward([token]) or opened.logits().copy() for token in (9, 10)]
        assert len(calls) == asked
        opened.truncate(4)
        opened.apply(Plan(0, 1))
        logits = [opened.forward([token]) or opened.logits().copy() for token in (9, 10)]
        assert len(calls) > asked
        for mine, other in zip(logits, expected, strict=True):
            assert np.array_equal(mine, other)


@pytest.mark.parametrize(("layers", "head", "embedding"), [((0, 1), False, True), ((2, 3), True, False)])
def test_the_floor_of_a_part_counts_what_is_owned(tiny_model, layers, head, embedding):
    path = tiny_model("llama:layers=4,dim=256,ffn=512,heads=4,kv_heads=2,vocab=5000,ctx=512", "q8_0")
    with engine(path) as opened:
        whole = opened.ledger
    with engine(path, part=lambda file: file.owned(layers, head=head, embedding=embedding)) as opened:
        table = whole.embedding_bytes if embedding else 0
        own = {name: getattr(opened.ledger, name) for name in ("process_bytes", "window_bytes", "kv_bytes")}
        assert own["kv_bytes"] == pytest.approx(whole.kv_bytes / 2, rel=0.05)  # of two layers of four
        assert opened.ledger == replace(whole, embedding_bytes=table, **own)
        assert whole.embedding_bytes > 0
        assert opened.streamed_bytes == streamable_bytes(opened.file)
        floor = budget_for(opened.layout.fixed_bytes + smallest_window(opened.file))
        opened.apply(Plan(0, 1, budget_bytes=floor))
        with pytest.raises(BudgetError):
            opened.apply(Plan(0, 1, budget_bytes=floor - PAGE))
        assert opened.layout.floor_bytes == floor_for(opened.layout.fixed_bytes + smallest_window(opened.file))
        opened.layout._least_window += 5 * MB
        assert opened.layout.floor_bytes == floor_for(opened.layout.fixed_bytes + smallest_window(opened.file) + 5 * MB)


@pytest.mark.parametrize("file_type", ["f16", "q8_0"])
def test_scratch_begins_at_a_cache_line_and_is_large_enough(tiny_model, file_type):
    with engine(tiny_model("llama", file_type), n_ubatch=256) as opened:
        before = [(backend.work_data, backend.work_size) for backend in opened._context._backends()]
        opened.forward(list(range(201)))
        opened.forward([1])
        assert before == [(backend.work_data, backend.work_size) for backend in opened._context._backends()]
        assert all(address % 64 == 0 for address, _ in before)


@pytest.mark.parametrize(
    "broken",
    [
        "runtime.engine.engine.RowTable",
        "runtime.engine.engine.WeightsGuest",
        "runtime.engine.engine.Context",
        "runtime.engine.engine.PassMemory",
        "runtime.engine.engine.Layout",
        "runtime.engine.engine.resident_bytes_outside",
        "runtime.kv.filter.Filter",
        "runtime.engine.engine.smallest_window",
        "runtime.engine.engine.Engine.apply",
    ],
)
def test_an_engine_that_cannot_be_opened_leaves_nothing_behind(broken, tiny_model, monkeypatch):
    """Whatever fails: no threads, no open files, no memory."""
    path = tiny_model("llama")
    kv = KvFilter(layers=(1,), wait=1)
    with engine(path, Plan(0, 1), kv=kv):
        pass  # what llama.cpp keeps from its first model

    def fail(*_, **__):
        raise OSError("no more of that")

    for error in (OSError, None):
        monkeypatch.setattr(broken, fail)
        before = what_is_open()
        with pytest.raises(error or OSError), engine(path, Plan(0, 1), kv=kv):
            pass
    assert what_is_open() == before


def what_is_open():
    """Threads, descriptors, and regions that are not unmapped."""
    regions = sum(isinstance(thing, Region) and thing.n_bytes > 0 for thing in gc.get_objects())
    return sorted(t.name for t in threading.enumerate()), sorted(os.listdir("/proc/self/fd")), regions


@pytest.mark.parametrize("part", ["small", "store", "head start"])
def test_weights_that_cannot_be_opened_leave_nothing_behind(part, tiny_model, monkeypatch):
    file = ModelFile.open(tiny_model("llama"))

    def fail(*_, **__):
        raise DiskError("no more of that")

    name = {"small": "runtime.weights.files.WeightFiles.read", "store": "runtime.weights.store.LayerStore.__init__"}
    monkeypatch.setattr(name.get(part, "runtime.weights.store.LayerStore.apply"), fail)
    monkeypatch.setattr("runtime.weights.head_start._GUESSED_PROCESS_BYTES", 0)
    before = what_is_open()
    with pytest.raises(DiskError):
        head_start(file, Plan(0, 1, budget_bytes=MARGIN_BYTES + 4 * MB), Settings())
    assert what_is_open() == before


# --- what is left of a pass that ended early ------------------------------------------------------------------------


def test_a_node_that_is_switched_off_twice_keeps_its_operation(tiny_model):
    with engine(tiny_model("llama"), Plan(0, 1)) as opened:
        node = abi.Tensor(op=29)
        address = ctypes.addressof(node)
        assert opened.guests.skip(address)
        assert opened.guests.skip(address)
        assert node.op == 0
        opened.guests._unskip(address)
        assert node.op == 29


def test_a_pass_that_ends_leaves_no_node_switched_off(tiny_model):
    """llama.cpp can end a pass without a report of the last node; the graph may be used again."""
    with engine(tiny_model("llama"), Plan(0, 1)) as opened:
        node = abi.Tensor(op=29)
        opened.guests.skip(ctypes.addressof(node))
        opened.guests.end(complete=False)
        assert node.op == 29
        node.op = 0
        opened.guests.end(complete=False)
        assert node.op == 0


def test_a_disk_that_is_well_again_goes_on(tiny_model):
    path = tiny_model("llama")
    with engine(path, Plan(1, 1)) as opened:
        expected = greedy(opened, [5, 6, 7], 4)[1]
    with engine(path, Plan(1, 1)) as opened:
        read = opened._store.files.read
        for n_reads in (0, 1, 7):
            break_after(opened._store.files, n_reads)
            with pytest.raises(DiskError):
                opened.forward([5, 6, 7])
            assert opened.n_past == 0
        opened._store.files.read = read
        assert greedy(opened, [5, 6, 7], 4)[1] == expected


def break_after(files, n_reads):
    """Reads fail, but for the next n_reads."""
    read, count = type(files).read, itertools.count()

    def broken(*arguments):
        if next(count) >= n_reads:
            raise DiskError("the disk is gone")
        read(files, *arguments)

    files.read = broken


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [EngineError("no address space"), Cancelled(2)])
def test_a_plan_that_is_refused_changes_nothing(error, tiny_model, monkeypatch):
    """Weights stay rearranged where their bytes do."""
    path = tiny_model("llama", "q4_0")
    everything = Plan(0, 1, budget_bytes=10**9)
    with engine(path, everything) as opened:
        expected = greedy(opened, [5, 6, 7], 6)[1]
    with engine(path, everything) as opened:

        def refuse(_):
            with monkeypatch.context() as patch, pytest.raises(type(error)):
                patch.setattr(opened._store, "apply", lambda *_, **__: (_ for _ in ()).throw(error))
                opened.apply(Plan(0, 1))
            assert opened.streamed_bytes == 0

        assert greedy(opened, [5, 6, 7], 6, refuse)[1] == expected


def test_tiles_of_a_rearranged_matrix_are_read_anew_when_some_are_streamed(tiny_model, monkeypatch):
    """Bytes that were rearranged with the whole matrix are not those of the file."""
    monkeypatch.setattr(model_file, "TILED_BYTES", 50_000)
    monkeypatch.setattr(model_file, "TILE_BYTES", 20_000)
    path = tiny_model("llama", "q4_0")
    with engine(path, Plan(0, 1)) as opened:
        pieces = opened.file.layers[0].pieces
        tiles = [piece for piece in pieces if piece.tensor.name == "blk.0.ffn_down.weight"]
        assert len(tiles) > 3
        expected = greedy(opened, [5, 6, 7], 4)
        everything = frozenset(piece.number for piece in opened.file.pieces)
    with engine(path, Plan(0, 1, budget_bytes=10**9)) as opened:
        greedy(opened, [5, 6, 7], 4)
        tiled = [weight for weight in opened.weights._weights if len(weight.pieces) > 1]
        if not any(weight.address in opened.weights._repacker._plain for weight in tiled):
            pytest.skip("llama.cpp rearranges nothing on this processor")
        opened.truncate(0)
        monkeypatch.setattr("runtime.engine.layout.resident_pieces", lambda *_, **__: everything - {tiles[1].number})
        opened.apply(Plan(0, 1))
        logits, tokens = greedy(opened, [5, 6, 7], 4)
        assert opened._store.is_resident(tiles[0])
    assert tokens == expected[1]
    for mine, other in zip(logits, expected[0], strict=True):  # whole matrices are still rearranged
        assert np.allclose(mine, other, atol=1e-3)


def test_what_the_process_takes_is_looked_up_once(tiny_model, monkeypatch):
    calls = []
    monkeypatch.setattr("runtime.engine.engine.resident_bytes_outside", lambda ranges: calls.append(ranges) or 50 * MB)
    with engine(tiny_model("llama"), Plan(0, 1, budget_bytes=10**9)) as opened:
        assert opened.ledger.process_bytes == 50 * MB
    assert len(calls) == 1


@pytest.mark.parametrize(("more_mb", "everything"), [(70, True), (30, False)])
def test_a_head_start_has_huge_pages_where_all_weights_may_fit(bundled_model, monkeypatch, more_mb, everything):
    asked = []
    monkeypatch.setattr(
        "runtime.weights.head_start.LayerStore.apply", lambda *_, **more: asked.append(more["everything"])
    )
    monkeypatch.setattr("runtime.weights.head_start.guessed_room", lambda file, _: streamable_bytes(file) // 2)
    file = ModelFile.open(bundled_model)
    plan = Plan(0, 1, Layout.BALANCED, window_bytes=MB, budget_bytes=streamable_bytes(file) + more_mb * MB)
    head_start(file, plan, Settings()).close()
    assert asked == [everything]


def test_a_model_that_fits_is_read_while_llama_cpp_loads(bundled_model):
    """All but the last part, for which loading would raise the peak; nothing goes through a window."""
    file = ModelFile.open(bundled_model)
    total = streamable_bytes(file)
    weights = head_start(file, Plan(0, 1, Layout.BALANCED, window_bytes=MB, budget_bytes=10**9), Settings())
    try:
        weights.store.settle()
        assert 0.8 * total < weights.store.bytes_read < total - total // 16
        assert weights.store.window_bytes == 0
    finally:
        weights.close()


def test_a_guessed_window_grows_to_what_the_disk_needs(bundled_model):
    largest = smallest_window(ModelFile.open(bundled_model))
    guess = Plan(0, 1, Layout.BALANCED, window_bytes=largest, budget_bytes=10**9)
    with engine(bundled_model, Plan(1, 1)) as opened:
        for rate, pieces in [(0, 2), (800 * largest, 2), (1000 * largest, 3)]:
            opened._store._readers.bytes_read, opened._store._readers.busy_s = 2 * rate, 2.0
            assert opened.layout.with_fitting_window(guess).window_bytes == pieces * largest
        wide = replace(guess, window_bytes=20 * largest)
        assert opened.layout.with_fitting_window(wide) == wide
        opened._store._readers.bytes_read, opened._store._readers.busy_s = 0, 0.0
        assert opened.layout.with_fitting_window(guess).window_bytes == 2 * largest  # nothing has come yet
        opened._store._wanted = frozenset()
        fast = overlapping_window(largest, 2e9)
        assert opened.layout.with_fitting_window(guess).window_bytes == fast > 4 * largest  # nothing was asked for
        opened._store._wanted = frozenset({0})
        opened._store._readers.bytes_read, opened._store._readers.busy_s = 6 * 10**8, 1.0
        assert opened.layout.with_fitting_window(guess).window_bytes == fast  # into the small pages of homes
