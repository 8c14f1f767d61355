"""Where the bytes of the budget go, and what is refused."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import BudgetError
from runtime.plans.ledger import (
    Ledger,
    below_floor,
    budget_for,
    embedding_rows_bytes,
    floor_for,
    more_margin,
    usable_bytes,
)
from runtime.settings import MARGIN_BYTES
from runtime.sizes import MB, PAGE, page_down, page_up, parse_size

QUICK = settings(max_examples=50, deadline=None)
sizes = st.integers(0, 10**11)
ledgers = st.builds(Ledger, *[sizes] * len(fields(Ledger)))


@QUICK
@given(ledgers)
def test_every_part_is_counted_once(ledger):
    parts = {field.name: getattr(ledger, field.name) for field in fields(Ledger)}
    assert ledger.total_bytes == sum(parts.values())
    assert ledger.fixed_bytes == ledger.total_bytes - ledger.window_bytes - ledger.resident_bytes
    assert sum(ledger.as_dict().values()) == ledger.total_bytes
    assert {key: parts[key] for key in ledger.as_dict()} == ledger.as_dict()


def test_the_draft_is_listed_only_where_there_is_one():
    ledger = Ledger(1, 2, 3, 4, 5)
    assert "draft_bytes" not in ledger.as_dict()
    assert replace(ledger, draft_bytes=6).as_dict()["draft_bytes"] == 6
    assert ledger.as_dict()["margin_bytes"] == MARGIN_BYTES


@QUICK
@given(ledgers, sizes, sizes)
def test_weights_get_what_is_left_or_the_floor_is_named(ledger, budget, smallest_window):
    if usable_bytes(budget) >= ledger.fixed_bytes + smallest_window:
        left = ledger.weights_bytes(budget, smallest_window)
        assert left + ledger.fixed_bytes == usable_bytes(budget)
        assert left >= smallest_window
        return
    with pytest.raises(BudgetError) as caught:
        ledger.weights_bytes(budget, smallest_window)
    floor = caught.value.floor_bytes
    assert ledger.weights_bytes(floor, smallest_window) >= smallest_window
    assert floor <= budget_for(ledger.fixed_bytes + smallest_window) + 2 * MB


@QUICK
@given(sizes)
def test_the_floor_in_the_error_can_be_typed(floor):
    error = below_floor(1, floor_for(floor))
    typed = re.search(r"-m (\d+)", error.next_step).group(1)
    assert parse_size(typed) == error.floor_bytes
    assert budget_for(floor) + MB <= error.floor_bytes < budget_for(floor) + 2 * MB


@QUICK
@given(st.integers(1, 40_000), st.integers(1, 30), st.integers(0, 10**6), st.data())
def test_rows_anywhere_in_the_table_fit(row_bytes, n_tokens, start, data):
    rows = data.draw(st.sets(st.integers(0, 1000), min_size=n_tokens, max_size=n_tokens))
    places = [(start + row * row_bytes, start + (row + 1) * row_bytes) for row in rows]
    pages = {page for a, b in places for page in range(page_down(a), page_up(b), PAGE)}
    assert len(pages) * PAGE <= embedding_rows_bytes(row_bytes, n_tokens)


def test_large_budgets_leave_room_for_page_tables():
    assert usable_bytes(25 * 10**7) == 25 * 10**7
    assert usable_bytes(33 * 10**9) == pytest.approx(33 * 10**9 - (33 - 0.25) * 10**9 / 512, abs=1)


@QUICK
@given(st.integers(1, 10**12))
def test_a_budget_for_what_is_needed(usable):
    budget = budget_for(usable)
    assert usable_bytes(budget) >= usable > usable_bytes(budget - 4)


def test_a_long_context_and_many_threads_have_a_larger_margin():
    assert more_margin(8192, 16) == 0
    assert more_margin(8192 + 1000, 16) == 64_000
    assert more_margin(512, 16 + 10) == 10 * 80 * 1024
