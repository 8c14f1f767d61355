"""Whoever keeps to the protocol takes part in a pass, and the engine knows nothing of it."""

from __future__ import annotations

import ctypes

import pytest
from engines import assert_same, engine, greedy

from runtime.engine.guests import Guests
from runtime.errors import EngineError
from runtime.kv.options import KvFilter
from runtime.llama import abi
from runtime.passes import Part, Pass
from runtime.plans.plan import Plan

PROMPT = [7 + (i * 37) % 200 for i in range(7)]
PASS = Pass((Part(0, 0, (5,), 1),))


class Counter:
    """Counts passes, nodes and reports; wants a report of every n-th node."""

    def __init__(self, nth=0, fails_at=""):
        self.nth, self.fails_at = nth, fails_at
        self.passes, self.ends = [], []
        self.nodes = self.reports = 0

    def _fail(self, place):
        if self.fails_at == place:
            raise EngineError(f"no {place}")

    def begin(self, pass_):
        self.passes.append(pass_)
        self._fail("begin")

    def before(self, node):
        self.nodes += 1
        self._fail("before")
        return bool(self.nth) and self.nodes % self.nth == 0

    def after(self, node):
        self.reports += 1
        self._fail("after")

    def end(self, *, complete):
        self.ends.append(complete)
        self._fail("end")


@pytest.mark.parametrize("kv", [None, KvFilter(layers=(1,), wait=0)], ids=["plain", "filtered"])
def test_a_guest_sees_every_node_beside_all_others(tiny_model, kv):
    path = tiny_model("llama")
    with engine(path, Plan(1, 1), kv=kv) as opened:
        expected = greedy(opened, PROMPT, 4)
    counter = Counter(nth=5)
    with engine(path, Plan(1, 1), kv=kv) as opened, opened.guests.joined_by(counter):
        opened.forward(PROMPT)
        n_nodes = counter.nodes
        assert n_nodes > 10 * opened.file.n_layers
        opened.truncate(0)
        assert_same(greedy(opened, PROMPT, 4), expected)
    assert counter.passes[0] == Pass((Part(0, 0, tuple(PROMPT), 1),))
    assert [(p.only.first, p.n_tokens, p.decode) for p in counter.passes[-2:]] == [(8, 1, True), (9, 1, True)]
    assert counter.nodes >= 5 * (n_nodes - 10)
    assert counter.reports >= counter.nodes // 5
    assert counter.ends == [True] * 5


def test_without_guests_a_token_has_no_callback(tiny_model, monkeypatch):
    """Also after a guest came and went."""
    with engine(tiny_model("llama"), Plan(0, 1, budget_bytes=10**9)) as opened:
        assert opened.guests.are_needed
        opened.forward(PROMPT)
        assert not opened.guests.are_needed
        counter, wanted = Counter(), []
        set_callback = abi.ggml_backend_sched_set_eval_callback

        def noticed(scheduler, callback, data):
            wanted.append(bool(callback))
            set_callback(scheduler, callback, data)

        monkeypatch.setattr(abi, "ggml_backend_sched_set_eval_callback", noticed)
        opened.forward([5])
        with opened.guests.joined_by(counter):
            opened.forward([5])
        seen = counter.nodes
        opened.forward([5])
        assert wanted == [False, True, False]
        assert counter.nodes == seen > 0


@pytest.mark.parametrize("place", ["begin", "before", "after", "end"])
def test_a_guest_that_fails_ends_the_pass_for_all(tiny_model, place):
    path = tiny_model("llama")
    with engine(path, Plan(1, 1)) as opened:
        expected = greedy(opened, PROMPT, 3)
    first, failing, last = Counter(), Counter(nth=3, fails_at=place), Counter()
    with engine(path, Plan(1, 1)) as opened:
        with opened.guests.joined_by(first), opened.guests.joined_by(failing), opened.guests.joined_by(last):
            with pytest.raises(EngineError, match=f"no {place}"):
                opened.forward(PROMPT)
            assert opened.n_past == 0
        complete = place == "end"  # it learns of its own failure last
        assert first.ends == failing.ends == [complete]
        assert last.ends == ([] if place == "begin" else [complete])
        assert_same(greedy(opened, PROMPT, 3), expected)


@pytest.mark.parametrize("ended_by", ["report", "end"])
def test_a_node_that_was_switched_off_gets_its_operation_back(ended_by):
    """However often guests switched it off, and also where the pass ended before it was reported."""
    node = (ctypes.c_int * (abi.OP_OFFSET // 4 + 1))(*range(100, 101 + abi.OP_OFFSET // 4))
    whole = list(node)
    guests = Guests()
    guests.begin(PASS)
    for _ in range(2):
        guests.skip(ctypes.addressof(node))
        assert node[-1] == abi.OP_NONE
    if ended_by == "report":
        guests._on_node(ctypes.addressof(node), False, 0)
    guests.end(complete=False)
    assert list(node) == whole


def test_guests_end_in_the_order_of_a_stack():
    calls = []

    class Named(Counter):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def begin(self, pass_):
            calls.append(f"begin {self.name}")

        def end(self, *, complete):
            calls.append(f"end {self.name}")

    guests = Guests()
    guests.add(Named("a"))
    with guests.joined_by(Named("b")):
        guests.begin(PASS)
        guests.end(complete=True)
    guests.begin(PASS)
    guests.end(complete=True)
    assert calls == ["begin a", "begin b", "end b", "end a", "begin a", "end a"]
