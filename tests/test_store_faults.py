"""The layer store when reads fail, hang or are interrupted: what is reported, and that it goes on afterwards."""

from __future__ import annotations

import threading

import pytest
from stores import (
    EVERYTHING,
    ONE,
    PATIENCE_S,
    SMALL,
    PatternFiles,
    computing,
    end_when_hanging,  # noqa: F401 - a fixture of the tests here, too
    in_background,
    numbers_of,
    readers,
    wait_until,
)

from runtime.errors import Cancelled, DiskError, EngineError
from runtime.memory import Region
from runtime.sizes import PAGE, page_down
from runtime.weights import readers as weight_readers
from runtime.weights.store import LayerStore


@pytest.fixture
def short_waits(monkeypatch):
    """Waits look at an interrupt as often as they do outside of tests."""
    monkeypatch.setattr(weight_readers, "_POLL_S", 0.05)


def place(piece):
    return page_down(piece.offset)


@pytest.mark.parametrize("wanted", [set(), {5}])
@pytest.mark.parametrize("request_bytes", [PAGE, 2**30])
def test_a_read_error_reaches_need_until_the_disk_is_well_again(wanted, request_bytes):
    """Also where the piece is read in parts; no slot of the window is lost by it."""
    with computing(SMALL, request_bytes=request_bytes) as (c, s, files):
        files.broken = {place(c.pieces[5])}
        c.plan(wanted, ONE)
        for _ in range(3):
            with pytest.raises(DiskError, match="the disk is gone"):
                c.one_pass()
            s.end_pass(complete=False)
            c.held.clear()
        files.broken = set()
        for _ in range(3):
            c.one_pass()
        s.settle()


def test_reads_that_failed_ahead_of_the_computation_are_tried_again():
    with computing(SMALL) as (c, s, files):
        files.broken = {place(c.pieces[i]) for i in (0, 6, 7)}
        c.plan({6}, EVERYTHING)
        s.settle()
        files.broken = set()
        for _ in range(3):
            c.one_pass()


def test_an_error_that_nobody_met_is_none():
    """A piece read ahead for a pass that does not use it."""
    with computing(SMALL) as (c, s, files):
        files.broken = {place(c.pieces[7])}
        c.plan(set(), EVERYTHING)
        s.settle()
        for _ in range(3):
            c.one_pass(c.pieces[:7])


def test_an_error_in_rows_read_now():
    region = Region(2 * PAGE)
    rows = [(0, n * PAGE, region.address + n * PAGE, PAGE) for n in (0, 1)]
    with computing(SMALL) as (c, s, files):
        c.plan(set(), ONE)
        s.settle()
        files.broken = {0, PAGE}
        for _ in range(2):
            with pytest.raises(DiskError):
                s.read_now(rows)
        files.broken = set()
        s.read_now(rows)
        for _ in range(2):
            c.one_pass()
    region.free()


# --- interrupts -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_waits")
def test_a_new_plan_does_not_wait_for_a_read_that_hangs_when_interrupted():
    with computing(SMALL) as (c, s, files):
        files.held = {place(c.pieces[3])}
        c.plan({3}, ONE)
        assert files.holding.wait(PATIENCE_S)
        thread, results = in_background(lambda: s.apply(frozenset({4}), 2 * ONE))
        thread.join(0.2)
        assert not results
        s.interrupt = Cancelled(2)
        thread.join(PATIENCE_S)
        assert isinstance(results[0], Cancelled)
        assert (s.wanted, s.window_bytes) == ({3}, ONE)
        s.interrupt = None
        files.go.set()
        for _ in range(2):
            c.one_pass()


@pytest.mark.usefixtures("short_waits")
def test_a_measurement_does_not_wait_for_a_read_that_hangs_when_interrupted():
    with computing(SMALL) as (c, s, files):
        files.held = {place(c.pieces[3])}
        c.plan(set(), EVERYTHING)
        assert files.holding.wait(PATIENCE_S)
        thread, results = in_background(s.settle)
        s.interrupt = Cancelled(2)
        thread.join(PATIENCE_S)
        assert isinstance(results[0], Cancelled)
        s.interrupt = None


@pytest.mark.usefixtures("short_waits")
def test_closing_does_not_wait_for_a_read_that_hangs_when_interrupted():
    """What that read may write to is left alone."""
    files = PatternFiles()
    store = LayerStore(SMALL, files, depth=2)
    files.held = {place(next(iter(SMALL.pieces)))}
    store.apply(frozenset(), EVERYTHING)
    assert files.holding.wait(PATIENCE_S)
    store.interrupt = Cancelled(2)
    thread, results = in_background(store.close)
    thread.join(PATIENCE_S)
    assert results == [False]
    assert store.window_bytes
    assert not files.closed
    files.go.set()
    wait_until(lambda: not readers())
    assert store.close()
    assert files.closed


def test_an_interrupt_that_is_late_does_not_keep_anything_from_closing():
    """Readers that only have to wake up are waited for."""
    with computing(SMALL, PatternFiles(0.02)) as (c, s, _):
        c.plan(set(), EVERYTHING)
        s.interrupt = Cancelled(2)


@pytest.mark.usefixtures("short_waits")
def test_rows_of_an_interrupted_pass_are_not_read_later():
    region = Region(4 * PAGE)
    with computing(SMALL, depth=1) as (c, s, files):
        c.plan(numbers_of(c.pieces), 0)
        c.one_pass()
        files.held = {0}
        rows = [(0, n * PAGE, region.address + n * PAGE, PAGE) for n in (0, 2)]
        thread, results = in_background(lambda: s.read_now(rows))
        assert files.holding.wait(PATIENCE_S)
        s.interrupt = Cancelled(2)
        thread.join(PATIENCE_S)
        assert isinstance(results[0], Cancelled)
        s.interrupt = None
        files.go.set()
        s.settle()
        assert (0, 2 * PAGE, PAGE) not in files.reads
    region.free()


# --- threads --------------------------------------------------------------------------------------------------------


def test_a_system_without_threads_leaves_none_behind(monkeypatch):
    start, left = threading.Thread.start, [2]

    def refuse(thread):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(EngineError, match="ulimit -u"):
        LayerStore(SMALL, PatternFiles(), depth=4)
    assert not readers()
