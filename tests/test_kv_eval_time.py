"""How long an analysis takes, and what of it fits into a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.kv_eval.time_needed import Costs, Work, fitted, seconds

WHOLE = Work(n_prompts=60, checks=20, selects=2, finalists=8)
Seconds = st.floats(0.001, 100)


def test_seconds_are_the_sum_of_what_is_done():
    work = Work(n_prompts=6, checks=3, selects=2, finalists=4)
    assert (work.n_first, work.candidates, work.answers) == (2, 6, 6 * 2 + 4 * 6)
    assert seconds(work, Costs(10, 0, 0)) == 60
    assert seconds(work, Costs(0, 1, 0)) == 6 + 36
    assert seconds(work, Costs(0, 0, 1)) == 6 + 4


def test_all_of_it_where_there_is_time():
    assert fitted(WHOLE, Costs(0.01, 0.01, 0.01), 80) == WHOLE


@given(Seconds, Seconds, Seconds, st.floats(10, 1000), st.integers(1, 60), st.integers(1, 20))
def test_what_fits(prompt_s, answer_s, open_s, limit_s, n_prompts, checks):
    whole, costs = Work(n_prompts, checks, 2, 8), Costs(prompt_s, answer_s, open_s)
    found = fitted(whole, costs, limit_s)
    least = (min(3, n_prompts), 1, 1)
    assert (found.n_prompts, found.checks, found.finalists) >= least
    assert found.n_prompts <= n_prompts and found.checks <= checks and found.selects == 2
    tiny = fitted(whole, costs, 0.0)
    assert seconds(found, costs) <= limit_s or found == tiny


def test_a_small_model_on_two_slow_cores():
    found = fitted(WHOLE, Costs(3.0, 0.6, 0.5), 80)
    assert found.n_prompts >= 3 and found.checks >= 4
    assert seconds(found, Costs(3.0, 0.6, 0.5)) == pytest.approx(80, abs=15)
