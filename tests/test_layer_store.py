"""The layer store: what need() returns, what is read, what is in memory, and that nothing waits for ever."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
import threading
import time
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_residency import make_index, or_a_part

from runtime.errors import DiskError, EngineError
from runtime.llama.model_file import ModelFile
from runtime.memory import Region, view
from runtime.passes import Part, Pass
from runtime.settings import Settings
from runtime.sizes import PAGE, page_down, page_up
from runtime.weights import head_start, homes
from runtime.weights import readers as weight_readers
from runtime.weights import store as layer_store
from runtime.weights.files import BUFFERED, DIRECT, WeightFiles
from runtime.weights.store import LayerStore

SLOW = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEWER = settings(SLOW, max_examples=60)
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


# --- any model, any order, any plan -------------------------------------------------------------------------------

rows = st.integers(64, 700)
models = or_a_part(
    st.builds(
        make_index,
        st.lists(st.lists(rows, min_size=1, max_size=4), min_size=1, max_size=4),
        st.lists(st.integers(16, 400), max_size=4),
        n_files=st.integers(1, 2),
    )
)


@st.composite
def orders(draw, model):
    """The true order of use: all pieces, or some of them, or some twice; in any order."""
    pieces = list(model.pieces)
    kind = draw(st.sampled_from(["guessed", "layers", "any"]))
    if kind == "any":
        pieces = draw(st.permutations(pieces))
    elif kind == "layers":
        pieces = [p for group in model.groups if group.pieces for p in draw(st.permutations(list(group.pieces)))]
    unused = draw(st.sets(st.sampled_from(pieces), max_size=2))
    pieces = [piece for piece in pieces if piece not in unused]
    for piece in draw(st.lists(st.sampled_from(pieces), max_size=2)) if pieces else ():
        pieces.insert(draw(st.integers(0, len(pieces))), piece)
    return pieces


@SLOW
@given(st.data())
def test_need_always_returns_the_pieces_bytes_and_memory_is_kept(data):
    model = data.draw(models)
    files = PatternFiles(data.draw(st.sampled_from([0, 0, 0.0003])))
    order = data.draw(orders(model))
    numbers = [piece.number for piece in model.pieces]
    with computing(model, files, data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 8, 99])) * PAGE) as (
        c,
        s,
        _,
    ):
        for _ in range(data.draw(st.integers(1, 3))):
            share = data.draw(st.sampled_from([0, 0, 0.3, 0.6, 1]))
            c.plan(data.draw(st.sets(st.sampled_from(numbers))), int(share * n_bytes(c.pieces)))
            for heads in data.draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=3), max_size=2)):
                s.expect_passes(passes(*heads))
                for head in heads:
                    used = [piece for piece in order if head or piece.layer < model.head.index]
                    stop = data.draw(st.integers(0, 3 * len(used)))
                    c.one_pass(used[:stop], complete=stop >= len(used))
                    if stop < len(used):
                        break
                if data.draw(st.booleans()):
                    s.settle()


@FEWER
@given(st.data())
def test_each_byte_is_read_once_per_pass_once_the_order_is_known(data):
    model = data.draw(models)
    order = data.draw(st.permutations(list(model.pieces)))
    wanted = data.draw(st.sets(st.sampled_from([piece.number for piece in order])))
    with computing(model, PatternFiles(), data.draw(st.integers(1, 4))) as (c, s, _):
        c.plan(wanted, int(data.draw(st.floats(0, 1)) * n_bytes(c.pieces)))
        for _ in range(2):
            c.one_pass(order)
        s.settle()
        assert resident_bytes(s) == n_bytes(p for p in c.pieces if p.number in wanted)
        before = s.bytes_read
        for _ in range(4):
            c.one_pass(order)
        s.settle()
        streamed = n_bytes(p for p in c.pieces if p.number not in wanted)
        assert abs(s.bytes_read - before - 4 * streamed) <= s.window_bytes


@FEWER
@given(st.data())
def test_a_right_guess_reads_nothing_twice_from_the_first_pass_on(data):
    model = data.draw(models)
    wanted = data.draw(st.sets(st.sampled_from([piece.number for piece in model.pieces])))
    with computing(model, PatternFiles(), data.draw(st.integers(1, 4))) as (c, s, files):
        c.plan(wanted, int(data.draw(st.floats(0, 1)) * n_bytes(c.pieces)))
        for n in range(1, 5):
            c.one_pass()
            s.settle()
            streamed = n_bytes(p for p in c.pieces if p.number not in wanted)
            read_ahead = s.bytes_read - resident_bytes(s) - n * streamed
            assert 0 <= read_ahead <= s.window_bytes
        read = sum(n for _, _, n in files.reads)
        assert read == s.bytes_read


# --- model files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [DIRECT, BUFFERED])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_bytes_are_those_of_the_file(tiny_model, arch, mode):
    model = ModelFile.open(tiny_model(arch, "q8_0"))
    data = np.memmap(model.path, mode="r")

    def content(piece):
        return data[piece.offset : piece.offset + piece.n_bytes].view(np.uint64)

    store = LayerStore(model, WeightFiles(model.paths, mode), request_bytes=64 * 1024, depth=3)
    c = Computation(model, store, content)
    try:
        largest = max(piece.span_bytes for piece in c.pieces)
        c.plan(set(), largest)
        c.one_pass()
        c.one_pass(c.pieces[::-1])
        c.plan({piece.number for piece in c.pieces[::2]}, 3 * largest)
        c.one_pass(c.pieces[1::2] + c.pieces[::2])
        c.plan({piece.number for piece in c.pieces}, 0)
        for _ in range(2):
            c.one_pass()
        assert resident_bytes(store) == n_bytes(c.pieces)
        before = store.bytes_read
        c.one_pass()
        assert store.bytes_read == before
    finally:
        store.close()
    assert not readers()


def pages_of(tensors):
    """(file, page) of all their bytes."""
    return {(t.file, page) for t in tensors for page in range(page_down(t.offset), page_up(t.offset + t.n_bytes), PAGE)}


@pytest.mark.parametrize(("layers", "head"), [((0, 1), False), ((2, 3), True), ((1, 3), False)])
def test_of_a_part_nothing_else_is_read(tiny_model, monkeypatch, layers, head):
    """Weights through the stream or into memory, and small tensors."""
    model = ModelFile.open(tiny_model("qwen2", "q8_0"))
    part = model.owned(layers, head=head, embedding=False)
    streamed, read = [], set()
    monkeypatch.setattr(LayerStore, "read_observer", lambda chunk, *_: streamed.append((chunk.offset, chunk.n_bytes)))

    class Files(WeightFiles):
        def read(self, file, offset, address, n_bytes):
            read.update((file, page) for page in range(offset, offset + n_bytes, PAGE))
            super().read(file, offset, address, n_bytes)

    monkeypatch.setattr(head_start, "WeightFiles", Files)
    weights = head_start.open_weights(part, Settings(depth=2))
    try:
        c = Computation(
            part,
            weights.store,
            lambda piece: np.fromfile(model.path, np.uint64, piece.n_bytes // 8, offset=piece.offset),
        )
        for wanted in (set(), numbers_of(c.pieces[::2]), numbers_of(c.pieces)):
            c.plan(wanted, n_bytes(c.pieces) // 3)
            for n in (1, 2):
                assert weights.store.share_used == 0
                c.one_pass(c.pieces[:-1], complete=False) if n == 1 else c.one_pass()
        assert [p.layer for p in c.pieces] == sorted(p.layer for p in c.pieces)
        assert {p.layer for p in c.pieces} == {*layers, *([model.n_layers] if head else [])}
        assert {offset for offset, _ in streamed} == {piece.span[0] for piece in c.pieces}
        small = list(part.small_tensors)
        assert {t.name.split(".")[1] for t in small if t.name.startswith("blk.")} == set(map(str, layers))
        assert ("output_norm.weight" in {t.name for t in small}) == head
        assert read == pages_of([*small, *(piece.tensor for piece in c.pieces)])
    finally:
        weights.close()
    assert pages_of(model.tensors) - read


def test_how_far_the_computation_is_counts_by_the_layers_of_the_part():
    model = make_index([[64, 64]] * 4, [64])
    for part, shares in (
        (model, [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]),
        (model.owned([1, 3], head=True, embedding=False), [0, 0, 0.5, 0.5, 1]),
        (model.owned([], head=True, embedding=False), [0]),
    ):
        with computing(part) as (c, s, _):
            c.plan(set(), EVERYTHING)
            assert s.share_used == 0
            assert [c.use(piece) or s.share_used for piece in c.pieces] == shares
            c.report()


# --- the stream -----------------------------------------------------------------------------------------------------

SMALL = make_index([[64, 64]] * 3, [64, 64])  # eight pieces of two pages, unaligned
EVERYTHING = n_bytes(SMALL.pieces)
ONE = next(iter(SMALL.pieces)).span_bytes


def passes(*heads):
    """Passes that need the output head or not."""
    return [Pass((Part(0, i, (5,), int(head)),)) for i, head in enumerate(heads)]


def numbers_of(pieces):
    return {piece.number for piece in pieces}


def test_the_stream_runs_ahead_across_the_end_of_a_pass_but_one_pass_only():
    with computing(SMALL) as (c, s, files):
        c.plan(set(), EVERYTHING)
        s.settle()
        assert s.bytes_read == EVERYTHING
        c.use(c.pieces[0])
        c.report()
        s.settle()  # what was computed with is on its way for the next pass, in the middle of this one
        assert [files.times_read(piece) for piece in c.pieces] == [2] + [1] * 7
        for piece in c.pieces[1:]:
            c.use(piece)
        c.report()
        s.settle()
        assert s.bytes_read == 2 * EVERYTHING
        s.end_pass(complete=True)
        s.settle()
        assert s.bytes_read == 2 * EVERYTHING
        for piece in c.pieces:
            assert s.next_is_there()
            c.use(piece)


def test_a_window_of_one_piece_goes_round():
    with computing(SMALL) as (c, s, _):
        c.plan(set(), ONE)
        for _ in range(5):
            c.one_pass()
        s.settle()
        assert s.bytes_read == 5 * EVERYTHING + ONE


def test_the_readers_go_on_by_themselves():
    """Nobody waits in need() here: what was given back, or a new pass, is enough to wake them."""
    with computing(SMALL) as (c, s, _):
        c.plan(set(), 2 * ONE)
        wait_until(lambda: s.bytes_read == 2 * ONE)
        s.need(c.pieces[0])
        s.computed()
        wait_until(lambda: s.bytes_read == 3 * ONE)
        s.end_pass(complete=False)  # two pieces read for nothing make room
        wait_until(lambda: s.bytes_read == 5 * ONE)


def test_a_piece_is_not_read_again_before_a_reader_has_looked_at_the_next_one():
    """The readers' steps made by hand: the computation is done with a piece before a reader comes back for more."""
    files = PatternFiles()
    store = LayerStore(SMALL, files, depth=0)
    store.apply(frozenset(), 2 * ONE)
    for piece in SMALL.pieces:
        with store._lock:
            chunk = store._readers.next_chunk()
            assert chunk.load.piece is piece
            files.read(chunk.file, chunk.offset, chunk.address, chunk.n_bytes)
            store._readers.finish(chunk, None)
        assert np.array_equal(np.frombuffer(view(store.need(piece), piece.n_bytes), np.uint64), expected(piece))
        store.computed()
    store.close()


def test_residents_are_read_once_and_then_nothing_is():
    with computing(SMALL) as (c, s, files):
        c.plan(numbers_of(c.pieces), 0)
        for _ in range(3):
            c.one_pass()
        s.settle()
        assert s.bytes_read == EVERYTHING
        assert [files.times_read(piece) for piece in c.pieces] == [1] * 8
        assert s.window_bytes == 0
        assert all(s.is_resident(piece) for piece in c.pieces)
        matrix = s.home("output.weight").data
        assert [s.need(piece) - matrix for piece in SMALL.head.pieces] == [0, SMALL.head.pieces[0].n_bytes]


def test_residents_arrive_while_the_window_is_full():
    with computing(SMALL) as (c, s, _):
        c.plan(numbers_of(c.pieces[4:]), ONE)
        s.settle()
        assert resident_bytes(s) == n_bytes(c.pieces[4:])


def test_the_stream_goes_first_once_there_is_room_for_it_again():
    files = PatternFiles()
    last = list(SMALL.pieces)[-1]
    files.held.add(last.span[0])
    with computing(SMALL, files, depth=1, request_bytes=PAGE) as (c, s, _):
        c.plan({last.number}, ONE)
        assert files.holding.wait(PATIENCE_S)  # the window is full: the resident piece is read meanwhile
        c.use(c.pieces[0])
        c.report()
        files.go.set()
        s.settle()
        offsets = [offset for _, offset, _ in files.reads]
        assert last.span[0] + PAGE not in offsets[: offsets.index(c.pieces[1].span[1] - PAGE)]
        assert resident_bytes(s) == last.span_bytes
        assert files.reads.count((last.tensor.file, last.span[0], PAGE)) == 1


def test_a_resident_piece_that_the_stream_has_come_to_is_not_overtaken():
    files = PatternFiles()
    _, fifth, sixth = list(SMALL.pieces)[3:6]
    files.held.add(fifth.span[0])
    with computing(SMALL, files, depth=1, request_bytes=PAGE) as (c, s, _):
        c.plan({fifth.number}, 3 * ONE)
        assert files.holding.wait(PATIENCE_S)  # the fourth piece has no room yet, the fifth is read
        for piece in c.pieces[:3]:
            c.use(piece)
        c.report()
        files.go.set()
        s.settle()
        offsets = [offset for _, offset, _ in files.reads]
        ends = [[i for i, at in enumerate(offsets) if at == piece.span[1] - PAGE] for piece in (fifth, sixth)]
        assert ends[0][-1] < ends[1][0]


@pytest.mark.parametrize("everything", [False, True])
def test_a_part_of_what_is_going_to_be_resident_as_a_whole_has_huge_pages(everything, monkeypatch):
    asked = []
    monkeypatch.setattr(homes, "huge_pages", lambda _start, _end, wanted: asked.append(wanted))
    with computing(SMALL) as (c, s, _):
        s.apply(frozenset({0}), ONE, everything=everything)
        assert asked == [everything]
        c.plan(numbers_of(c.pieces), 0)
        assert set(asked[1:]) == {True}


def test_passes_without_head_do_not_read_it():
    with computing(SMALL) as (c, s, files):
        c.plan(set(), EVERYTHING)
        s.expect_passes(passes(*[False] * 4))
        body = [piece for piece in c.pieces if piece.layer < SMALL.n_layers]
        # the stream may have been quicker than the announcement, for the first pass only
        first = [files.times_read(piece) for piece in SMALL.head.pieces]
        for _ in range(3):
            c.one_pass(body)
        s.settle()
        assert sum(files.times_read(piece) for piece in SMALL.head.pieces) <= max(2, sum(first))
        c.one_pass(body)
        s.settle()
        before = [files.times_read(piece) for piece in SMALL.head.pieces]
        c.one_pass()
        c.one_pass()
        s.settle()
        assert [files.times_read(piece) for piece in SMALL.head.pieces] == [n + 2 for n in before]


def test_only_the_last_announcement_of_passes_counts():
    with computing(SMALL) as (c, s, files):
        s.expect_passes(passes(*[False] * 3))
        s.expect_passes(passes(True))
        c.plan(set(), EVERYTHING)
        s.settle()
        assert [files.times_read(piece) for piece in SMALL.head.pieces] == [1, 1]
        c.one_pass()
        s.settle()
        assert [files.times_read(piece) for piece in SMALL.head.pieces] == [2, 2]


def test_an_announced_pass_that_needs_the_head_after_all_gets_it():
    with computing(SMALL) as (c, s, _):
        c.plan(set(), 2 * ONE)
        s.expect_passes(passes(False, False))
        c.one_pass()
        c.one_pass(c.pieces[:3], complete=False)
        c.one_pass()


def test_pieces_no_node_uses_leave_the_stream_and_can_come_back():
    with computing(SMALL) as (c, s, files):
        c.plan(set(), 3 * ONE)
        unused = c.pieces[1]
        used = [piece for piece in c.pieces if piece is not unused]
        for _ in range(2):
            c.one_pass(used)
        s.settle()
        before = files.times_read(unused)
        for _ in range(3):
            c.one_pass(used)
        assert files.times_read(unused) == before
        for _ in range(2):
            c.one_pass()


def test_an_early_end_leaves_the_order_as_it_is():
    with computing(SMALL) as (c, s, _):
        c.plan(set(), 2 * ONE)
        c.one_pass(c.pieces[:2], complete=False)
        c.one_pass([], complete=False)
        s.settle()
        before = s.bytes_read
        for _ in range(3):
            c.one_pass()
        s.settle()
        assert abs(s.bytes_read - before - 3 * EVERYTHING) <= s.window_bytes


def test_a_piece_used_twice_far_apart_is_read_twice_and_little_else():
    with computing(SMALL) as (c, s, _):
        for window in (ONE, 2 * ONE, 5 * ONE, EVERYTHING):
            c.plan(set(), window)
            before = s.bytes_read
            for _ in range(6):
                c.one_pass([*c.pieces, c.pieces[0]])
            s.settle()
            assert s.bytes_read - before <= 7 * (EVERYTHING + ONE) + 2 * 6 * window


def test_a_wrong_guess_does_not_wait_for_the_residents_to_be_read():
    """Everything queued is held; the piece that is asked for has its slot, and its read, before them."""
    with computing(SMALL, depth=1) as (c, s, files):
        files.held = {page_down(c.pieces[0].offset)}
        c.plan(set(), 2 * ONE)
        assert files.holding.wait(PATIENCE_S)
        thread, results = in_background(lambda: s.need(c.pieces[7]))
        wait_until(lambda: s._loads.get(7))
        files.go.set()
        thread.join(PATIENCE_S)
        c.check(results[0], c.pieces[7])
        assert [offset for _, offset, _ in files.reads[:3]].index(page_down(c.pieces[7].offset)) <= 2


def test_next_is_there():
    with computing(SMALL) as (c, s, files):
        files.held = {page_down(c.pieces[1].offset)}
        c.plan({3}, 4 * ONE)
        assert files.holding.wait(PATIENCE_S)
        s.need(c.pieces[0])
        assert not s.next_is_there()
        files.go.set()
        s.settle()
        assert s.next_is_there()
        s.need(c.pieces[1])
        s.need(c.pieces[2])
        assert s.next_is_there()  # 3 is resident, 4 has arrived
        s.computed()
        s.settle()
        s.need(c.pieces[5])  # 4 was next: nobody knows the order any more
        assert not s.next_is_there()
        s.computed()
        s.end_pass(complete=False)
        s.settle()
        assert s.next_is_there()


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
