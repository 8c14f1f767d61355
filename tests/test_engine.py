"""What only the engine itself shows: ending a pass, and going on afterwards."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from engines import engine, greedy

from runtime.errors import Cancelled, H2OError
from runtime.kv.options import KvFilter
from runtime.plan import Plan


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
        note = opened.nodes._before
        opened.nodes._before = lambda address: calls.append(address) or note(address)
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


@pytest.mark.parametrize("file_type", ["f16", "q8_0"])
def test_scratch_begins_at_a_cache_line_and_is_large_enough(tiny_model, file_type):
    with engine(tiny_model("llama", file_type), n_ubatch=256) as opened:
        before = [(backend.work_data, backend.work_size) for backend in opened._context._backends()]
        opened.forward(list(range(201)))
        opened.forward([1])
        assert before == [(backend.work_data, backend.work_size) for backend in opened._context._backends()]
        assert all(address % 64 == 0 for address, _ in before)


def test_an_engine_that_cannot_be_opened_leaves_nothing_behind(tiny_model):
    before = set(threading.enumerate())
    with pytest.raises(H2OError), engine(tiny_model("llama"), Plan(0, 1), kv=KvFilter(layers=(99,))):
        pass
    assert set(threading.enumerate()) == before
