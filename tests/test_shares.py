"""The source system's formulas for several devices, with its own numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.source.shares import Latencies, Offer, enough, in_order, memory_need_mb, token_shares
from runtime.errors import BudgetError

BIG, SMALL = Offer("a:1", 16000, 14000, 10.0), Offer("b:1", 8000, 14000, 5.0)


def test_the_shares_of_its_readme():
    assert token_shares([BIG, SMALL], 128) == {"a:1": 86, "b:1": 42}


@given(st.lists(st.tuples(st.integers(1, 10**5), st.floats(0.1, 1000)), min_size=1, max_size=6), st.integers(1, 5000))
def test_shares_sum_to_the_tokens(devices, n_tokens):
    offers = [Offer(str(i), memory, memory, speed) for i, (memory, speed) in enumerate(devices)]
    shares = token_shares(offers, n_tokens)
    assert sum(shares.values()) == n_tokens
    assert all(share >= 0 for share in shares.values())


def test_memory_of_a_model_of_30b_in_4_bits():
    assert memory_need_mb(30 * 10**9, 4096, four_bit=True) == 14305 + 2001


def test_the_fewest_devices_with_enough_memory():
    assert enough([BIG, SMALL], 14000) == [BIG]
    assert enough([BIG, SMALL], 14001) == [BIG, SMALL]
    with pytest.raises(BudgetError, match="28000 MB free together, and the model takes 30000 MB"):
        enough([BIG, SMALL], 30000)


def test_orders():
    third = Offer("c:1", 32000, 1, 1.0)
    assert in_order([SMALL, BIG, third], by_memory=True) == [third, BIG, SMALL]
    assert in_order([BIG, SMALL, third], ["b:1"]) == [SMALL, third, BIG]


def test_half_of_a_slow_devices_share_moves():
    latencies = Latencies()
    for _ in range(10):
        latencies.see("a:1", 0.1)
        latencies.see("b:1", 1.0)
    assert latencies.rebalanced({"a:1": 86, "b:1": 42}, "a:1") == {"a:1": 107, "b:1": 21}
    assert Latencies().rebalanced({"a:1": 86, "b:1": 42}, "a:1") == {"a:1": 86, "b:1": 42}
