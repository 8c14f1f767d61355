"""The layer store on slow and broken disks, under plans that change, and at its end."""

from __future__ import annotations

import mmap
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from stores import (
    BIG,
    EVERYTHING,
    ONE,
    PATIENCE_S,
    SMALL,
    PatternFiles,
    bytes_in_memory,
    computing,
    end_when_hanging,  # noqa: F401 - a fixture of the tests here, too
    in_background,
    numbers_of,
    pattern,
    readers,
    resident_bytes,
    wait_until,
)
from test_residency import make_index

from runtime.errors import EngineError
from runtime.memory import Region, view
from runtime.sizes import PAGE, page_down, page_up
from runtime.weights import homes
from runtime.weights import store as layer_store
from runtime.weights.store import LayerStore

# --- slow and broken disks ------------------------------------------------------------------------------------------


def test_a_piece_that_could_not_be_read_is_not_there():
    """Else what was asked for before it would keep the ring full, and there would be no room to read it again."""
    with computing(SMALL) as (c, s, files):
        files.broken = {page_down(c.pieces[1].offset)}
        c.plan(set(), 2 * ONE)
        wait_until(lambda: (load := s._loads.get(c.pieces[1].number)) and load.error)
        s.need(c.pieces[0])
        assert not s.next_is_there()


def test_need_waits_for_the_disk_and_sleeps_meanwhile():
    with computing(SMALL) as (c, s, files):
        files.held = {page_down(c.pieces[0].offset)}
        c.plan(set(), ONE)
        assert files.holding.wait(PATIENCE_S)
        thread, results = in_background(lambda: s.need(c.pieces[0]))
        before = time.process_time()
        thread.join(0.5)
        assert time.process_time() - before < 0.15
        assert not results
        files.go.set()
        thread.join(PATIENCE_S)
        c.check(results[0], c.pieces[0])
        assert s.wait_s >= 0.2


def test_nobody_computes_when_there_is_nothing_to_do():
    with computing(SMALL, depth=4) as (c, s, _):
        c.plan({1, 2}, 2 * ONE)
        s.settle()
        before = time.process_time()
        time.sleep(0.4)
        assert time.process_time() - before < 0.1


def test_few_readers_look_for_work_in_vain(monkeypatch):
    """One piece is streamed: one reader has work in each pass, and the other three sleep."""
    in_vain = []
    start_load = LayerStore.start_load

    def look(self):
        found = start_load(self)
        if not found and threading.current_thread().name.startswith("reader-"):
            in_vain.append(1)
        return found

    with computing(SMALL, depth=4) as (c, s, _):
        c.plan(numbers_of(c.pieces[1:]), ONE)
        c.one_pass()
        s.settle()
        wait_until(lambda: s._readers.resting == 4)
        monkeypatch.setattr(LayerStore, "start_load", look)
        for _ in range(20):
            c.one_pass()
            wait_until(lambda: s._readers.resting == 4)
        assert len(in_vain) <= 2 * 20


def test_a_read_left_behind_by_a_pass_that_was_ended_spoils_nothing():
    with computing(SMALL) as (c, s, files):
        files.held = {page_down(c.pieces[1].offset)}
        c.plan(set(), 4 * ONE)
        assert files.holding.wait(PATIENCE_S)
        c.one_pass(c.pieces[:1], complete=False)
        addresses = [s.need(piece) for piece in (c.pieces[0], c.pieces[2])]
        files.go.set()
        s.settle()
        for address, piece in zip(addresses, (c.pieces[0], c.pieces[2]), strict=True):
            c.check(address, piece)
        c.report()
        s.end_pass(complete=False)
        for _ in range(2):
            c.one_pass()


def test_other_exceptions_of_a_reader_arrive_too(monkeypatch):
    with computing(SMALL) as (c, s, files):
        monkeypatch.setattr(files, "read", lambda *_: 1 // 0)
        c.plan(set(), ONE)
        with pytest.raises(ZeroDivisionError):
            s.need(c.pieces[0])


def test_a_window_below_one_piece_is_an_error_not_a_wait():
    with computing(SMALL) as (c, s, _):
        s.apply(frozenset(), ONE - PAGE)
        with pytest.raises(EngineError, match="smaller than one tensor"):
            s.need(c.pieces[0])
        s.apply(frozenset(), 0)
        with pytest.raises(EngineError, match="smaller than one tensor"):
            s.need(c.pieces[0])


@pytest.mark.parametrize(("module", "name"), [(layer_store, "Ring"), (homes, "Region")])
def test_without_address_space_for_a_new_plan_the_old_one_stays(monkeypatch, module, name):
    def refuse(_):
        raise EngineError("the system gave no address space")

    with computing(SMALL) as (c, s, files):
        c.plan({1}, ONE)
        c.one_pass()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            with pytest.raises(EngineError, match="address space"):
                s.apply(frozenset({3}), 2 * ONE)
        c.one_pass()
        assert (s.wanted, s.window_bytes, resident_bytes(s)) == ({1}, ONE, ONE)
        assert files.times_read(c.pieces[1]) == 1
        c.plan({3}, 2 * ONE)
        c.one_pass()
        assert (s.wanted, s.window_bytes, resident_bytes(s)) == ({3}, 2 * ONE, ONE)


def test_rows_are_read_before_the_stream():
    region = Region(4 * PAGE)
    with computing(SMALL, depth=1, request_bytes=PAGE) as (c, s, files):
        files.held = {page_down(c.pieces[0].offset)}
        c.plan(set(), EVERYTHING)
        assert files.holding.wait(PATIENCE_S)
        chunks = [(0, n * PAGE, region.address + n * PAGE, PAGE) for n in (0, 2)]
        thread, results = in_background(lambda: s.read_now(chunks))
        wait_until(lambda: len(s._readers.queue) > 1)
        files.go.set()
        thread.join(PATIENCE_S)
        assert results == [None]
        assert sorted(files.reads[1:3]) == [(0, 0, PAGE), (0, 2 * PAGE, PAGE)]
        got = np.frombuffer(view(region.address, 4 * PAGE), np.uint64).reshape(4, -1)
        assert np.array_equal(got[0], pattern(0, 0, PAGE))
        assert np.array_equal(got[2], pattern(0, 2 * PAGE, PAGE))
        assert not got[1].any()
        c.one_pass()
    region.free()


# --- plans ----------------------------------------------------------------------------------------------------------


def homes_in_memory(store):
    ranges = store.ranges
    return bytes_in_memory(ranges[:-1] if store.window_bytes else ranges)


@pytest.mark.parametrize("tile_rows", [100, 20])
def test_pieces_that_are_no_longer_wanted_give_all_their_memory_back(tile_rows):
    model = make_index([[64, 300]], [tile_rows] * 6)  # two tiles, or even four, share a page
    with computing(model) as (c, s, _):
        everything = numbers_of(c.pieces)
        tiles = [piece.number for piece in model.head.pieces]
        for kept in ([], tiles[:1], tiles[:4], tiles, [0], [tiles[1], tiles[3]]):
            c.plan(everything, 0)
            c.one_pass()
            c.plan(set(kept), EVERYTHING)
            pages = {page for n in kept for page in range(*c.pieces[n].span, PAGE)}
            assert homes_in_memory(s) == len(pages) * PAGE
            for number in kept:
                c.check(s.need(c.pieces[number]), c.pieces[number])
            s.end_pass(complete=False)


def test_a_resident_piece_that_was_read_in_part_gives_its_memory_back():
    model = make_index([[640, 64]])
    with computing(model, depth=1, request_bytes=PAGE) as (c, s, files):
        files.held = {page_down(c.pieces[0].offset) + 4 * PAGE}
        c.plan({0}, PAGE * 3)
        assert files.holding.wait(PATIENCE_S)
        thread, results = in_background(lambda: c.plan(set(), BIG))
        thread.join(0.05)
        assert not results  # waits for the read under way
        files.go.set()
        thread.join(PATIENCE_S)
        assert results == [None]
        s.settle()
        assert homes_in_memory(s) == 0
        c.one_pass()


def test_what_is_there_is_not_read_again_after_a_change_of_plan():
    with computing(SMALL) as (c, s, files):
        c.plan({0, 1}, 3 * ONE)
        c.one_pass()
        c.plan({0, 1, 4}, 3 * ONE)
        c.one_pass()
        s.settle()
        assert [files.times_read(c.pieces[n]) for n in (0, 1)] == [1, 1]
        c.plan({1}, ONE)
        c.one_pass()
        assert files.times_read(c.pieces[1]) == 1


def test_plans_may_follow_each_other_without_a_pass():
    with computing(SMALL, PatternFiles(0.001), depth=3, request_bytes=PAGE) as (c, s, _):
        everything = numbers_of(c.pieces)
        for wanted in (everything, {0}, set(), everything, {7}, {0, 7}):
            c.plan(wanted, 2 * ONE)
        c.one_pass()
        s.settle()
        assert resident_bytes(s) == 2 * ONE
        assert s.wanted == {0, 7}


# --- the end --------------------------------------------------------------------------------------------------------


def test_close_before_anything_was_planned():
    with computing(SMALL, depth=4) as (_, s, files):
        assert len(readers()) == 4
        assert s.window_bytes == resident_bytes(s) == s.bytes_read == 0
    assert files.reads == []


@pytest.mark.parametrize("n_used", [0, 1, 5, 8])
def test_close_in_the_middle_of_a_pass(n_used):
    with computing(SMALL, PatternFiles(0.001), depth=3, request_bytes=PAGE) as (c, _, _):
        c.plan({2}, 3 * ONE)
        for piece in c.pieces[:n_used]:
            c.use(piece)


def test_close_waits_for_the_read_under_way_and_drops_the_rest():
    files = PatternFiles()
    store = LayerStore(SMALL, files, depth=1)
    files.held = {page_down(next(iter(SMALL.pieces)).offset)}
    store.apply(frozenset(), EVERYTHING)
    assert files.holding.wait(PATIENCE_S)
    thread, results = in_background(store.close)
    thread.join(0.05)
    assert not results
    files.go.set()
    thread.join(PATIENCE_S)
    assert results == [True]
    assert not readers()
    assert len(files.reads) == 1


def test_sizes_of_the_test_model():
    spans = [piece.span for piece in SMALL.pieces]
    assert all(end - start == ONE == 2 * PAGE for start, end in spans)
    assert all(b[0] - a[0] == PAGE for a, b in pairwise(spans))
    assert mmap.PAGESIZE == PAGE
    assert page_up(1) == PAGE
