"""The layer store: what need() returns, what is read, what is in memory, and that nothing waits for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import (
    EVERYTHING,
    ONE,
    PATIENCE_S,
    SMALL,
    PatternFiles,
    computing,
    end_when_hanging,  # noqa: F401 - a fixture of the tests here, too
    expected,
    in_background,
    n_bytes,
    numbers_of,
    passes,
    resident_bytes,
    wait_until,
)
from test_residency import make_index, or_a_part

from runtime.memory import view
from runtime.sizes import PAGE, page_down
from runtime.weights import homes
from runtime.weights import readers as weight_readers
from runtime.weights.store import LayerStore

SLOW = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEWER = settings(SLOW, max_examples=60)
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


# --- the stream -----------------------------------------------------------------------------------------------------


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


def test_huge_pages_are_made_by_the_reader_before_it_reads_into_them(monkeypatch):
    """Those that a read finds missing are made under a lock that all of the process waits for."""
    made, late = set(), []
    monkeypatch.setattr(weight_readers, "touch", lambda address, n_bytes: made.add((address, n_bytes)))
    with computing(SMALL) as (c, _, files):
        plain = files.read

        def read(file, offset, *place):
            late.append(place not in made)
            plain(file, offset, *place)

        monkeypatch.setattr(files, "read", read)
        c.plan({0}, ONE)
        c.one_pass()
    assert set(late) == {False}


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
