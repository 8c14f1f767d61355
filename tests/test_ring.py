"""The ring under random use, against a plain list of slots."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.memory import view
from runtime.sizes import PAGE
from runtime.weights.ring import Ring

SIZE = 16


class RingUse(RuleBasedStateMachine):
    """Takes and gives back in any order; every slot taken is filled with a number of its own."""

    def __init__(self):
        super().__init__()
        self.ring = None
        self.taken = []  # slots in use
        self.n_taken = 0

    @initialize(n_pages=st.integers(1, SIZE))
    def make(self, n_pages):
        self.ring = Ring(n_pages * PAGE)

    def in_ring(self, slot):
        return view(self.ring.address(slot), slot.end - slot.start)

    @rule(n_pages=st.integers(1, SIZE))
    def take(self, n_pages):
        slot = self.ring.take(n_pages * PAGE)
        if slot is None:
            assert self.taken or n_pages * PAGE > self.ring.n_bytes, "an empty ring has room for all it can hold"
            return
        assert slot.end - slot.start == n_pages * PAGE
        self.n_taken += 1
        self.taken.append((slot, self.n_taken % 251))
        self.in_ring(slot)[::PAGE] = bytes([self.n_taken % 251]) * n_pages

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data):
        slot, number = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        assert set(self.in_ring(slot)[::PAGE]) == {number}, "nobody else wrote there"
        self.ring.give_back(slot)

    @precondition(lambda self: self.ring)
    @rule()
    def give_all_back_then_the_whole_ring_is_free(self):
        while self.taken:
            self.ring.give_back(self.taken.pop()[0])
        slot = self.ring.take(self.ring.n_bytes)
        assert (slot.start, slot.end) == (0, self.ring.n_bytes)
        assert self.ring.take(PAGE) is None
        self.ring.give_back(slot)

    @invariant()
    def slots_are_in_bounds_and_apart(self):
        places = sorted((slot.start, slot.end) for slot, _ in self.taken)
        assert all(0 <= start < end <= self.ring.n_bytes for start, end in places)
        assert all(end <= start for (_, end), (start, _) in pairwise(places))

    def teardown(self):
        if self.ring:
            self.ring.free()


TestRingUse = RingUse.TestCase
TestRingUse.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def ring():
    ring = Ring(10 * PAGE)
    yield ring
    ring.free()


def pages(slot):
    return slot and (slot.start // PAGE, slot.end // PAGE)


def test_front_to_back_and_around(ring):
    a, b, c = (ring.take(n * PAGE) for n in (4, 3, 2))
    assert [pages(slot) for slot in (a, b, c)] == [(0, 4), (4, 7), (7, 9)]
    assert ring.take(2 * PAGE) is None
    ring.give_back(a)
    assert pages(ring.take(2 * PAGE)) == (0, 2)  # one page at the end is too small for it
    assert pages(ring.take(2 * PAGE)) == (2, 4)
    assert ring.take(PAGE) is None
    ring.give_back(b)
    assert pages(ring.take(PAGE)) == (4, 5)


def test_bytes_return_in_the_order_they_were_taken(ring):
    a, b, _ = (ring.take(n * PAGE) for n in (4, 3, 3))
    ring.give_back(b)
    assert ring.take(PAGE) is None  # an older slot is still in use
    ring.give_back(a)
    assert pages(ring.take(7 * PAGE)) == (0, 7)


def test_the_newest_slot_returns_at_once(ring):
    a, b = ring.take(4 * PAGE), ring.take(6 * PAGE)
    ring.give_back(b)
    assert pages(ring.take(5 * PAGE)) == (4, 9)
    ring.give_back(a)
    assert pages(ring.take(4 * PAGE)) == (0, 4)


def test_a_slot_taken_around_the_end_returns_to_before_it(ring):
    a, b = ring.take(6 * PAGE), ring.take(3 * PAGE)
    ring.give_back(a)
    around = ring.take(5 * PAGE)
    assert pages(around) == (0, 5)
    ring.give_back(around)
    assert pages(ring.take(PAGE)) == (9, 10)
    ring.give_back(b)
    assert ring.take(9 * PAGE)  # the page at the end is the only one in use


def test_addresses_are_those_of_the_region(ring):
    a, b = ring.take(PAGE), ring.take(PAGE)
    start, end = ring.range
    assert ring.address(a) == start
    assert ring.address(b) == start + PAGE
    assert end - start == ring.n_bytes == 10 * PAGE
