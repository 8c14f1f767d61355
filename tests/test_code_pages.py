"""Pages of libraries that a token does not use are given back, weights take their place, and the ledger counts them."""

from __future__ import annotations

import ctypes
import mmap
import time

import numpy as np
import pytest
from engines import engine

from runtime import memory
from runtime.engine import code_pages
from runtime.engine.code_pages import CodePages
from runtime.engine.pass_memory import TOKEN
from runtime.llama import abi
from runtime.memory import drop_file_pages, file_bytes
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import streamable_bytes
from runtime.sizes import MB, PAGE

pytestmark = pytest.mark.usefixtures("usual_pages")
PROMPT = [3 + i * 7 % 250 for i in range(100)]


def test_pages_of_files_are_given_back_and_come_again():
    before = file_bytes()
    drop_file_pages()
    assert file_bytes() < before - 2 * MB
    assert sorted(map(str, range(11)))[2] == "10"


def mapped(path, *rights):
    """Mappings of a file of two pages, one for each of the rights, and the address of the first one."""
    path.write_bytes(b"a" * 2 * PAGE)
    with path.open("rb") as file:
        found = [mmap.mmap(file.fileno(), 2 * PAGE, mmap.MAP_PRIVATE, right) for right in rights]
    return found, ctypes.addressof(ctypes.c_char.from_buffer(found[0]))


def forbid_writing(address):
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(address, 2 * PAGE, mmap.PROT_READ) == 0


READ, WRITE, EXECUTE = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC


def test_pages_that_were_written_stay(tmp_path):
    (pages, _), address = mapped(tmp_path / "library", READ | WRITE, READ | EXECUTE)
    pages[0] = ord("b")
    forbid_writing(address)
    assert (address, address + 2 * PAGE) in memory._library_mappings()
    drop_file_pages()
    assert pages[:2] == b"ba"
    assert pages[PAGE : PAGE + 1] == b"a"


def test_files_that_are_no_libraries_are_left_alone(tmp_path):
    """They are mapped for a moment by any thread, and its memory may be there in the next."""
    _, address = mapped(tmp_path / "file", READ | WRITE)
    forbid_writing(address)
    assert (address, address + 2 * PAGE) not in memory._library_mappings()


def test_memory_that_came_where_a_library_was_is_left_alone(tmp_path, monkeypatch):
    (pages, _), address = mapped(tmp_path / "library", READ | WRITE, READ | EXECUTE)
    forbid_writing(address)
    look = memory._unwritten

    def slow_look(mappings):
        found = look(mappings)
        assert (address, address + 2 * PAGE) in found
        libc = ctypes.CDLL(None)
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        fixed = 0x10
        libc.mmap(address, 2 * PAGE, READ | WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, 0)
        pages[:3] = b"new"
        return found

    monkeypatch.setattr(memory, "_unwritten", slow_look)
    drop_file_pages()
    assert pages[:3] == b"new"


def test_what_comes_again_is_counted(monkeypatch):
    sizes = iter([14 * MB, 4 * MB, 7 * MB, 7 * MB, 7 * MB + MB // 8, 10 * MB, 9 * MB, 9 * MB, 6 * MB])
    dropped = []
    monkeypatch.setattr(code_pages, "file_bytes", lambda: next(sizes))
    monkeypatch.setattr(code_pages, "drop_file_pages", lambda: dropped.append(1))
    pages, slack = CodePages(), code_pages._SLACK_BYTES
    pages.begin()
    pages.begin()
    assert dropped == [1]  # those of opening
    assert pages.spared_bytes == 4.5 * MB  # what stays away at the least
    dropped.clear()
    assert pages.spared(long=True) == 4.5 * MB
    assert [pages.begin_pass(long=True, streams=True) for _ in range(2)] == [True, False]
    assert [pages.begin_pass(long=False, streams=True) for _ in range(5)] == [False, True, False, False, False]
    assert (pages.spared_bytes, dropped) == (7 * MB - slack, [1])
    assert sum(pages.begin_pass(long=False, streams=True) for _ in range(32)) == 1  # a little more: weights make room
    assert pages.spared_bytes == 7 * MB - MB // 8 - slack
    assert not any(pages.begin_pass(long=False, streams=True) for _ in range(28))  # much more: it is given back first
    assert (pages.spared_bytes, dropped) == (7 * MB - MB // 8 - slack, [1, 1])
    assert pages.begin_pass(long=False, streams=True)  # some of it has come again: a token uses it
    assert pages.spared_bytes == 5 * MB - slack
    assert not any(pages.begin_pass(long=False, streams=True) for _ in range(3))
    assert pages.spared(long=True) == 4.5 * MB  # a prompt's guess stays, while tokens do not show that it is too much
    assert not pages.begin_pass(long=True, streams=True)
    assert not pages.begin_pass(long=False, streams=True)
    assert (pages.spared_bytes, dropped) == (5 * MB - slack, [1, 1, 1])
    assert pages.begin_pass(long=False, streams=True)
    assert pages.spared_bytes == 8 * MB - slack


def test_kernels_of_tokens_are_kept_in_the_page_cache(monkeypatch):
    """Of all that is given back: the kernel takes what was used least out of a full memory group's page cache."""
    used = []
    monkeypatch.setattr(code_pages, "use_file", used.append)
    pages = CodePages()
    pages.begin()
    pages.begin()
    deadline = time.monotonic() + 5
    while not used and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [path.name for path in used] == ["libggml-cpu.so.0"]
    assert used[0].samefile(abi.ggml_cpu._name)


def test_a_file_is_used_to_its_end(tmp_path):
    (tmp_path / "file").write_bytes(bytes(200_001))
    before = read_characters()
    memory.use_file(tmp_path / "file")
    assert 400_002 <= read_characters() - before < 420_000
    memory.use_file(tmp_path / "no file")


def read_characters():
    """Bytes that this process has read, from wherever."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_nothing_is_given_back_again_where_all_weights_are_there(monkeypatch):
    sizes = iter([14 * MB, 4 * MB, 8 * MB, 8 * MB, 10 * MB, 7 * MB])
    dropped = []
    monkeypatch.setattr(code_pages, "file_bytes", lambda: next(sizes))
    monkeypatch.setattr(code_pages, "drop_file_pages", lambda: dropped.append(1))
    pages = CodePages()
    pages.begin()
    assert pages.begin_pass(long=True, streams=False)
    assert not any(pages.begin_pass(long=False, streams=False) for _ in range(6))
    assert (pages.spared_bytes, dropped) == (
        6 * MB - code_pages._SLACK_BYTES,
        [1],
    )
    assert sum(pages.begin_pass(long=False, streams=False) for _ in range(32)) == 1  # more pages: weights make room
    assert [pages.begin_pass(long=False, streams=True) for _ in range(2)] == [False, True]  # now they are
    assert (pages.spared_bytes, dropped) == (7 * MB - code_pages._SLACK_BYTES, [1, 1])


def test_weights_that_fit_beside_a_token_come_before_the_first_one(bundled_model, monkeypatch):
    sizes = iter([20 * MB, 10 * MB, 15 * MB])
    with engine(bundled_model, repack=False) as opened:
        monkeypatch.setattr(code_pages, "file_bytes", lambda: next(sizes))
        opened.layout.measure_process()
        needed = opened.layout.needs.ledger(TOKEN).fixed_bytes + streamable_bytes(opened.file)
        opened.apply(Plan(0, 1, Layout.BALANCED, window_bytes=MB, budget_bytes=needed - 3 * MB))
        opened.forward([3])
        assert opened.streamed_bytes == 0
        before = opened.counters.bytes_read
        opened.forward([4])
        assert (opened.streamed_bytes, opened.counters.bytes_read) == (0, before)


def test_weights_take_their_place_until_the_next_prompt(bundled_model, monkeypatch):
    monkeypatch.setattr(code_pages, "_STAY_AWAY", 0.01)
    with engine(bundled_model, repack=False) as plain:
        plain.forward(PROMPT)
        for token in range(6):
            plain.forward([token])
        wanted = plain.logits().copy()
    with engine(bundled_model, repack=False) as opened:
        budget = opened.layout.fixed_bytes + streamable_bytes(opened.file) // 2
        opened.apply(Plan(0, 1, Layout.BALANCED, window_bytes=MB, budget_bytes=budget))
        opened.forward(PROMPT)
        code = opened.layout._code
        counted, streamed = opened.ledger.process_bytes + code.spared(long=True), opened.streamed_bytes
        assert streamed > 0
        for token in range(6):
            opened.forward([token])
            assert opened.ledger.total_bytes <= budget
        assert np.array_equal(opened.logits(), wanted)
        assert opened.ledger.process_bytes == counted - opened.layout.spared_bytes < counted
        assert opened.streamed_bytes < streamed
        opened.forward(PROMPT)
        assert opened.ledger.process_bytes == counted - code.spared(long=True) < counted
        assert opened.ledger.total_bytes <= budget
