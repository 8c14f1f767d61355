"""A batch under pressure without an engine, the sweep's optimum and the bandit's choice."""

from __future__ import annotations

import random
import statistics

import pytest

from h2o_cli.bench.admission.rows import mean
from h2o_cli.bench.admission.runs import SHARE, grid, search
from planner.pool_simulator import Costs, Text, Work, fitted, simulate
from runtime.answer.admission import AVERAGE, RESERVE, Admission
from runtime.answer.pool import FAST, SLOW, Pool
from runtime.answer.scheduler import Limits

COSTS = Costs(2e-3, 1e-4, 3e-4, 1e-6, 1e-3, 1e-3)
N_SEQUENCES = 16


def texts(seed, n=40):
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        most = rng.randrange(1, 100)
        found.append(Text(rng.randrange(1, 120), most, rng.randrange(1, most + 1)))
    return found


def run(seed, admission, fast=40, n=40, costs=COSTS, events=None):
    limits = Limits(fast * 16, N_SEQUENCES, 512, 512, True)
    pool = Pool(fast, fast * N_SEQUENCES, record=events.append if events is not None else None)
    found = simulate(texts(seed, n), pool, Admission.parse(admission), limits, costs)
    assert (pool.n_free(FAST), pool.n_free(SLOW)) == (fast, fast * N_SEQUENCES)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_reserve_of_nothing_is_none(seed):
    none, zero = [], []
    assert run(seed, "none", events=none) == run(seed, "reserve:0", events=zero)
    assert none == zero
    assert none != []


@pytest.mark.parametrize("admission", ["simulate", "none", "reserve:2", "average:3", "watermark:0.1"])
def test_every_token_is_computed_once(admission):
    found = run(1, admission)
    assert found.n_tokens == sum(text.n_answer for text in texts(1))
    assert found.n_prompt_tokens == sum(text.n_prompt for text in texts(1))
    assert found.counts.swaps_in == found.counts.swaps_out
    assert (found.counts.swaps_out == 0) == (admission == "simulate")


@pytest.mark.parametrize("admission", ["simulate", "none", "reserve:2"])
def test_more_pool_is_never_slower(admission):
    """Over many seeds; a single schedule can be unlucky by a pass."""
    speeds = []
    for fast in (20, 30, 40, 60, 120):
        outcomes = [run(seed, admission, fast) for seed in range(6)]
        speeds.append(sum(o.n_tokens for o in outcomes) / sum(o.seconds for o in outcomes))
    assert speeds == sorted(speeds)


def test_what_never_fits_is_left_out():
    found = run(2, "none", fast=5)
    assert found.n_refused == sum(-(-(text.n_prompt + text.n_most - 1) // 16) > 5 for text in texts(2)) > 0


def test_costs_are_found_again():
    rng = random.Random(1)
    works = [Work(rng.randrange(300), rng.randrange(16), rng.randrange(4000)) for _ in range(50)]
    found = fitted([(work, COSTS.of(work)) for work in works], 1e-3, 1e-3)
    assert vars(found) == pytest.approx(vars(COSTS))
    costs = fitted([(work, 0.1 + 1e-3 * work.n_texts - 1e-5 * work.n_positions) for work in works], 0.0, 0.0)
    assert costs.position_s == 0 <= min(vars(costs).values())


def test_sweeps_have_both_ends():
    values = [arm.value for arm in grid(RESERVE, 0.2)]
    assert (values[:2], values[-1], len(values)) == ([0, 0.2], 12, 61)
    values = [arm.value for arm in grid(AVERAGE, 0.2)]
    assert (values[:2], values[-2:], len(values)) == ([1.8, 2.0], [7.4, 7.5], 30)


@pytest.mark.parametrize("policy", [RESERVE, AVERAGE])
def test_the_bandit_needs_a_fifth_of_the_runs(policy):
    arms, repeats, known = grid(policy, 0.4), 10, {}

    def out_per_s(arm, seed):
        if (arm, seed) not in known:
            found = run(seed, str(arm), n=24)
            known[arm, seed] = found.n_tokens / found.seconds
        return known[arm, seed]

    found = search(arms, out_per_s, repeats)
    assert found.n_episodes <= len(arms) * repeats / SHARE
    speeds = {arm: statistics.fmean(out_per_s(arm, seed) for seed in range(repeats)) for arm in arms}
    assert speeds[found.best] >= 0.98 * max(speeds.values())
    assert min(speeds.values()) < 0.98 * max(speeds.values())


def test_an_interval_is_students():
    found = mean([1.0, 2.0, 3.0])
    assert (found.value, found.half) == (2, pytest.approx(4.303 / 3**0.5))
    assert not mean([-1.0, 2.0]).is_apart
    assert mean([1.0, 1.1, 1.2]).is_apart
