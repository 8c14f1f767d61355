"""The batch size that is predicted to be the fastest, from a profile and a budget."""

from __future__ import annotations

import msgspec
import pytest
from test_model_profile import make_profile, spread

from planner.batches import (
    MEASURED_POSITIONS,
    USED,
    Prediction,
    batch_footprint,
    best,
    compute_s,
    predict,
    predict_inside,
)
from profiler.model_profile import BatchProfile
from runtime.errors import BudgetError
from runtime.plans.plan import Plan

SIZES = (1, 2, 4, 8, 16, 32)


def streaming(**more):
    """1 MB of layers in 10 pieces, 0.1 s to read; a token computes 10 ms, 100 tokens of a prompt 100 ms."""
    return make_profile([100_000] * 10, [0.001] * 10, disk=1e7, fixed=50_000, **more)


def measured(**more):
    """The same, where passes of 2 and 16 texts were measured: 6 ms are the hand-over of all weights."""
    batches = (
        BatchProfile(2, 2_000, 500, spread(0.022), spread(0.016), 1e-6),
        BatchProfile(16, 9_000, 400, spread(0.064), spread(0.058), 1e-6),
    )
    return msgspec.structs.replace(streaming(**more), batches=batches)


@pytest.fixture(autouse=True)
def small_margin(monkeypatch):
    monkeypatch.setattr("planner.batches.TURNS_MARGIN_BYTES", 0)
    monkeypatch.setattr("planner.batches.MARGIN_BYTES", 0)


def test_without_measured_batches_a_token_more_costs_what_it_costs_in_a_prompt():
    profile = streaming(head=10_000, head_s=0.002)
    assert compute_s(profile, 1, 0.0) == pytest.approx(0.012)
    assert compute_s(profile, 101, 0.0) == pytest.approx(0.112)


def test_measured_batches_are_points_of_a_line():
    profile = measured()
    resident = [compute_s(profile, n, 0.0) for n in (1, 2, 9, 16, 30)]
    assert resident == pytest.approx([0.01, 0.016, 0.037, 0.058, 0.1])
    streamed = [compute_s(profile, n, 1.0) for n in (1, 2, 9, 16)]
    assert streamed == pytest.approx([0.016, 0.022, 0.043, 0.064])
    assert compute_s(profile, 16, 0.5) == pytest.approx(0.061)  # half of the weights are handed over


def test_behind_two_texts_a_token_more_costs_what_it_costs_in_a_prompt():
    """Two texts took 37 ms where one took 15 and 16 took 40: a line through the first two chose one text."""
    profile = msgspec.structs.replace(measured(), batches=measured().batches[:1])
    assert compute_s(profile, 2, 0.0) == pytest.approx(0.016)
    assert compute_s(profile, 16, 0.0) == pytest.approx(0.016 + 14 * 0.001)


def test_weights_that_were_never_all_in_memory_count_as_streamed():
    batches = tuple(msgspec.structs.replace(batch, resident_s=None) for batch in measured().batches)
    profile = msgspec.structs.replace(measured(), batches=batches)
    assert compute_s(profile, 16, 0.5) == compute_s(profile, 16, 0.0) == pytest.approx(0.064)


def test_positions_beyond_those_that_were_measured_take_time():
    few, many = (predict(measured(), 3_000_000, [16], n)[0].pass_s for n in (96, 192))
    assert few == pytest.approx(0.058)
    assert many == pytest.approx(0.058 + 16 * 1e-6 * (USED * 192 - MEASURED_POSITIONS))


def test_memory_of_a_pass_is_what_was_measured_and_pages_that_tokens_do_not_use_are_weights():
    profile = measured()
    one, sixteen = batch_footprint(profile, 1, 10), batch_footprint(profile, 16, 10)
    assert (sixteen.compute_bytes, sixteen.prompt_bytes) == (9_000, 400)
    assert batch_footprint(profile, 9, 10).compute_bytes == 5_500
    spared = msgspec.structs.replace(profile, memory=msgspec.structs.replace(profile.memory, unused_bytes=7_000))
    with_spared = batch_footprint(spared, 1, 10)
    assert with_spared.floor_bytes == one.floor_bytes
    assert with_spared.available_bytes(300_000) == one.available_bytes(300_000) + 7_000


def test_passes_wait_for_the_disk_or_for_the_processor():
    found = {p.n_texts: p for p in predict(streaming(), 400_000, SIZES, 10)}
    assert list(found) == list(SIZES)
    assert found[1].pass_s == pytest.approx(found[1].read_s) and found[1].read_s > 0.05
    assert found[1].streamed_bytes < found[32].streamed_bytes < 1_000_000
    assert found[16].tokens_per_s > 10 * found[1].tokens_per_s
    everything = predict(streaming(), 3_000_000, (1, 8), 10)
    assert [p.read_s for p in everything] == [0, 0]
    assert everything[1].pass_s == pytest.approx(everything[1].compute_s)


def test_what_does_not_fit_is_left_out():
    fitting = [p.n_texts for p in predict(streaming(), 100_000, SIZES, 10)]
    assert fitting and fitting == list(SIZES[: len(fitting)]) and len(fitting) < len(SIZES)
    with pytest.raises(BudgetError):
        predict(streaming(), 10_000, SIZES, 10)


def test_positions_that_are_shared_out_bound_the_texts():
    assert [p.n_texts for p in predict_inside(measured(), 3_000_000, 256)] == [1, 2, 3, 4]
    assert [p.n_texts for p in predict_inside(measured(), 3_000_000, 32)] == [1]
    assert predict_inside(measured(), 10_000, 256) == []


def test_the_best_is_no_larger_than_it_has_to_be():
    found = [Prediction(n, Plan(0, 1), 0, 0, s, s) for n, s in ((1, 1.0), (4, 1.0), (8, 1.99), (16, 4.0))]
    assert best(found).n_texts == 4
    found.append(Prediction(32, Plan(0, 1), 0, 0, 7.0, 7.0))
    assert best(found).n_texts == 32
