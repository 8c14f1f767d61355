"""Stores over a disk of tests: what they read, what is in memory, and how they are used."""

from __future__ import annotations

import ctypes
import faulthandler
import sys
import threading
import time
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest
from test_residency import make_index

from runtime.errors import DiskError
from runtime.memory import view
from runtime.passes import Part, Pass
from runtime.sizes import PAGE, page_down
from runtime.weights import readers as weight_readers
from runtime.weights.store import LayerStore

PATIENCE_S = 120
BIG = 2**30

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


@pytest.fixture(autouse=True)
def end_when_hanging(monkeypatch):
    """The store's waits are ended by what they wait for; their time limit, a net below that, is out of reach here."""
    monkeypatch.setattr(weight_readers, "_POLL_S", 10 * PATIENCE_S)
    faulthandler.dump_traceback_later(4 * PATIENCE_S, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


def pattern(file, offset, n_bytes):
    """What the fake disk holds: every eight bytes tell where they are from."""
    places = np.arange(offset // 8, (offset + n_bytes) // 8, dtype=np.uint64) + np.uint64(file << 40)
    return places * np.uint64(0x9E3779B97F4A7C15)


class PatternFiles:
    """A disk that can be slow, held (the next read at an offset waits until `go` is set), or broken."""

    def __init__(self, slow_s=0.0):
        self.slow_s = slow_s
        self.held, self.broken = set(), set()  # offsets of reads
        self.go, self.holding = threading.Event(), threading.Event()
        self.reads = []
        self.closed = False

    def read(self, file, offset, address, n_bytes):
        assert offset % PAGE == address % PAGE == n_bytes % PAGE == 0
        self.reads.append((file, offset, n_bytes))
        if self.slow_s:
            time.sleep(self.slow_s)
        if offset in self.held:
            self.held.discard(offset)
            self.holding.set()
            assert self.go.wait(PATIENCE_S)
        if offset in self.broken:
            raise DiskError("the disk is gone")
        view(address, n_bytes)[:] = pattern(file, offset, n_bytes).tobytes()

    def times_read(self, piece):
        """How often the piece was read, as a whole."""
        return self.reads.count((piece.tensor.file, piece.span[0], piece.span_bytes))

    def close(self):
        self.closed = True


@lru_cache(maxsize=256)
def expected(piece):
    return pattern(piece.tensor.file, piece.offset, piece.n_bytes)


def bytes_in_memory(ranges):
    total = 0
    for start, end in ranges:
        pages = ctypes.create_string_buffer((end - start) // PAGE)
        assert _mincore(start, end - start, pages) == 0
        total += sum(page & 1 for page in pages.raw) * PAGE
    return total


def resident_bytes(store):
    return n_bytes(piece for piece in store._pieces.values() if store.is_resident(piece))


def check_state(store, between_passes=False):
    """What the class says is always true of it."""
    with store._lock:
        loads, flying = store._loads.values(), store._readers.flying
        assert not store._loads.keys() & store._resident
        assert store._resident <= store._wanted
        assert store._pass <= store._load_pass <= store._pass + 2
        taken = {slot for slot in store._ring._slots if not slot.free} if store._ring else set()
        assert taken == {load.slot for load in (*loads, *(c.load for c in flying if c.load)) if load.slot}
        if between_passes:
            assert not store._pending
            assert not any(load.asked or load.pass_number < store._pass for load in loads)
            assert store._place == 0


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]


def n_bytes(pieces):
    return sum(piece.span_bytes for piece in pieces)


class Computation:
    """Uses pieces as the engine does: reports when a part of the window is used up or the next piece is not there."""

    def __init__(self, model, store, content=expected):
        self.model, self.store, self.content = model, store, content
        self.pieces = list(model.pieces)
        self.held = []
        self.asked = 0

    def plan(self, wanted, window):
        """Keep pieces (numbers) resident; the window is cut to what the engine would make of it."""
        left = [piece for piece in self.pieces if piece.number not in wanted]
        largest = max((piece.span_bytes for piece in left), default=0)
        window = min(max(page_down(window), largest), n_bytes(left))
        self.limit = window + n_bytes(piece for piece in self.pieces if piece.number in wanted)
        self.boundary = max(0, min(window // 4, (window - 2 * largest) // 2))
        self.store.apply(frozenset(wanted), window)
        self.check_memory()
        check_state(self.store)

    def use(self, piece):
        address = self.store.need(piece)
        self.check(address, piece)
        self.held.append((address, piece))
        self.asked += piece.span_bytes
        if self.asked > self.boundary or not self.store.next_is_there():
            self.report()

    def report(self):
        for address, piece in self.held:
            self.check(address, piece)
        self.held.clear()
        self.asked = 0
        self.store.computed()
        check_state(self.store)

    def check(self, address, piece):
        assert np.array_equal(np.frombuffer(view(address, piece.n_bytes), np.uint64), self.content(piece))

    def check_memory(self):
        assert bytes_in_memory(self.store.ranges) <= self.limit

    def one_pass(self, pieces=None, complete=True):
        for piece in self.pieces if pieces is None else pieces:
            self.use(piece)
        self.report()
        self.check_memory()
        self.store.end_pass(complete=complete)
        check_state(self.store, between_passes=True)


@contextmanager
def computing(model, files=None, depth=2, request_bytes=BIG):
    """(computation, store, files); closed at the end, whatever happened."""
    files = files or PatternFiles()
    store = LayerStore(model, files, request_bytes=request_bytes, depth=depth)
    try:
        yield Computation(model, store), store, files
    finally:
        files.go.set()
        store.close()
        assert files.closed
        assert not readers()


def in_background(call):
    """(thread, list that gets what the call returned or raised)."""
    results = []

    def run():
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def wait_until(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


SMALL = make_index([[64, 64]] * 3, [64, 64])  # eight pieces of two pages, unaligned
EVERYTHING = n_bytes(SMALL.pieces)
ONE = next(iter(SMALL.pieces)).span_bytes


def passes(*heads):
    """Passes that need the output head or not."""
    return [Pass((Part(0, i, (5,), int(head)),)) for i, head in enumerate(heads)]


def numbers_of(pieces):
    return {piece.number for piece in pieces}
