"""The callback in C passes on what Python would look at, and nothing is lost on the way."""

from __future__ import annotations

import ctypes

import pytest
from engines import assert_same, cancel_at_piece, engine, greedy
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.weights_guest import WeightsGuest
from runtime.errors import Cancelled
from runtime.llama import abi, node_filter
from runtime.llama.node_filter import NodeFilter
from runtime.passes import Part, Pass
from runtime.plans.plan import Layout, Plan

PROMPT = [7 + (i * 37) % 200 for i in range(7)]
needs_compiled = pytest.mark.skipif(node_filter.LIBRARY is None, reason="built without a compiler")


def ask(filter_, node, ask=True):
    """Call the callback as llama.cpp does."""
    return filter_.callback(ctypes.addressof(node), ask, filter_.data)


addresses = st.integers(1, 2**44).map(lambda n: n * 16)


@needs_compiled
@given(
    steps=st.lists(st.tuples(st.sampled_from(["watch", "forget"]), addresses), max_size=30),
    sources=st.lists(addresses, max_size=10),
    answer=st.booleans(),
)
def test_a_node_with_a_watched_source_is_always_passed_on(steps, sources, answer):
    seen = []
    filter_ = NodeFilter(lambda address, asked, _: seen.append((address, asked)) or answer)
    filter_.pass_on_everything(False)
    watched = set()
    for step, address in [*steps, *(("watch", source) for source in sources[::3])]:
        getattr(filter_, step)(address)
        (watched.add if step == "watch" else watched.discard)(address)
    node = abi.Tensor()
    for i, source in enumerate(sources):
        node.src[i] = source
    got = ask(filter_, node)
    if watched & set(sources):
        assert seen == [(ctypes.addressof(node), True)]
        assert got == answer
    elif not seen:
        assert not got
    filter_.pass_on_everything(True)
    seen.clear()
    assert ask(filter_, node) == answer and len(seen) == 1
    for address in watched:
        filter_.forget(address)
    filter_.pass_on_everything(False)
    seen.clear()
    assert not ask(filter_, node) and not seen
    assert ask(filter_, node, ask=False) == answer and len(seen) == 1  # a report goes to Python always


@needs_compiled
def test_nodes_of_watched_operations_are_passed_on():
    seen = []
    filter_ = NodeFilter(lambda address, asked, _: seen.append(address) or False)
    filter_.pass_on_everything(False)
    assert not filter_.is_watching
    assert filter_.watch_ops([3, 5])
    assert filter_.is_watching
    nodes = [abi.Tensor() for _ in range(7)]
    for op, node in enumerate(nodes):
        node.op = op
        ask(filter_, node)
    assert seen == [ctypes.addressof(nodes[i]) for i in (3, 5)]


def questions(monkeypatch):
    """Counts the nodes that reach Python."""
    counted = []
    before = WeightsGuest.before
    monkeypatch.setattr(WeightsGuest, "before", lambda self, node: counted.append(node) or before(self, node))
    return counted


@needs_compiled
def test_python_is_asked_about_streamed_weights_only(bundled_model, monkeypatch):
    asked = questions(monkeypatch)
    with engine(bundled_model, Plan(1, 1, Layout.PREFIX), n_threads=2) as opened:
        greedy(opened, PROMPT, 2)
        asked.clear()
        opened.forward([5])
        n_pieces = sum(1 for piece in opened.file.pieces if not opened._store.is_resident(piece))
        assert 0 < len(asked) <= n_pieces + 2  # the input embedding, and the head as a whole; of some 500 nodes


def test_without_the_compiled_function_the_tokens_are_the_same(bundled_model, monkeypatch):
    plan = Plan(1, 1, Layout.BALANCED)
    with engine(bundled_model, plan, n_threads=2) as opened:
        expected = greedy(opened, PROMPT, 8)
    monkeypatch.setattr(node_filter, "LIBRARY", None)
    with engine(bundled_model, plan, n_threads=2) as opened:
        assert_same(greedy(opened, PROMPT, 8), expected)


def test_a_stop_at_the_beginning_of_a_pass_ends_it(bundled_model, monkeypatch):
    with engine(bundled_model, Plan(1, 1, Layout.PREFIX), n_threads=2) as opened:
        greedy(opened, PROMPT, 2)
        filter_, calls = opened.guests.filter, []
        pass_on = filter_.pass_on_everything

        def cancel_just_before(wanted):
            calls.append(wanted)
            if len(calls) == 1:
                opened.cancel()
            pass_on(wanted)

        monkeypatch.setattr(filter_, "pass_on_everything", cancel_just_before)
        opened.guests.begin(Pass((Part(0, opened.n_past, (5,)),)))
        assert filter_._struct.everything
        opened.guests.end(complete=False)
        opened.forget_cancel()


@needs_compiled
def test_a_stop_in_the_middle_of_a_pass_ends_it_at_the_next_node(bundled_model, monkeypatch):
    with engine(bundled_model, Plan(1, 1, Layout.PREFIX), n_threads=2) as opened:
        greedy(opened, PROMPT, 2)
        asked = questions(monkeypatch)
        needed = cancel_at_piece(monkeypatch, opened, 2)
        with pytest.raises(Cancelled):
            opened.forward([5])
        assert len(needed) == 2
        assert len(asked) <= 4
