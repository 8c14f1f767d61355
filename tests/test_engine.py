"""What only the engine itself shows: ending a pass, and going on afterwards."""

from __future__ import annotations

import threading
import time

import pytest
from engines import engine, greedy

from runtime.errors import Cancelled
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
