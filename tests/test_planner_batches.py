"""The batch size that is predicted to be the fastest, from a profile and a budget."""

from __future__ import annotations

import pytest
from test_model_profile import make_profile

from planner.batches import Prediction, best, compute_s, predict
from runtime.errors import BudgetError

SIZES = (1, 2, 4, 8, 16, 32)


def streaming(**more):
    """1 MB of layers in 10 pieces, 0.1 s to read; a token computes 10 ms, of a prompt 9/9.9 of that per token."""
    return make_profile([100_000] * 10, [0.001] * 10, disk=1e7, fixed=50_000, **more)


def test_a_token_more_costs_what_it_costs_in_a_prompt():
    profile = streaming(head=10_000, head_s=0.002)
    assert compute_s(profile, 1) == pytest.approx(0.012)
    assert compute_s(profile, 100) == pytest.approx(0.12)  # ten times as long for 100 tokens


def test_passes_wait_for_the_disk_or_for_the_processor():
    found = {p.n_texts: p for p in predict(streaming(), 400_000, SIZES, 10)}
    assert list(found) == list(SIZES)
    assert found[1].pass_s == found[1].read_s > 0.05
    assert found[1].streamed_bytes < found[32].streamed_bytes < 1_000_000
    assert found[16].tokens_per_s > 12 * found[1].tokens_per_s
    everything = predict(streaming(), 3_000_000, (1, 8), 10)
    assert [p.read_s for p in everything] == [0, 0]
    assert everything[1].pass_s == everything[1].compute_s


def test_what_does_not_fit_is_left_out():
    fitting = [p.n_texts for p in predict(streaming(), 120_000, SIZES, 10)]
    assert fitting and fitting == list(SIZES[: len(fitting)]) and len(fitting) < len(SIZES)
    with pytest.raises(BudgetError):
        predict(streaming(), 10_000, SIZES, 10)


def test_the_best_is_no_larger_than_it_has_to_be():
    found = [Prediction(n, 0, 1.0, compute) for n, compute in ((1, 0.5), (4, 0.9), (8, 1.99), (16, 4.0))]
    assert best(found).n_texts == 4
    found.append(Prediction(32, 0, 1.0, 7.0))
    assert best(found).n_texts == 32
