import random

import pytest
from source_profiles import SOURCE_PROFILES
from test_model_profile import make_profile

from planner.arms import h2o_arms, source_arms
from planner.bandit import Ucb1, noisy_pull
from planner.exact import best_arm, best_source_arm
from planner.simulator import source_token_ms, token_s
from planner.source.profile import SourceProfile
from runtime.plans.plan import Layout, Plan

SHARES = [share / 10 for share in range(1, 11)]
OWN = {
    "disk-bound": SourceProfile(800, (90,) * 24, (15,) * 23 + (7,), (20,) * 24),
    "balanced": SourceProfile(700, (28,) * 20, (37,) + (36,) * 19, (10,) * 20),
    "compute-bound": SourceProfile(850, (200,) * 16, (600,) * 16, (70,) * 16),
    "unequal": SourceProfile(840, tuple(range(22, 118, 4)), tuple(range(32, 152, 5)), tuple(range(8, 32))),
}
THOROUGH = {"episodes": 500, "confirm_arms": 16}  # for hundreds of arms
SOURCES = {**OWN, **SOURCE_PROFILES}


def repeated(source, n):
    return SourceProfile(source.io_speed, source.layer_sizes * n, source.t_compute * n, source.t_release * n)


def source_pull(source, rng=None, sd=0.0):
    times = {}

    def pull(arm):
        if arm not in times:
            times[arm] = source_token_ms(source, arm.k, arm.w)
        return -times[arm] * (1 + sd * rng.gauss(0, 1) if rng else 1)

    return pull


LARGE = repeated(SOURCES["qwen2.5-1.5b-f16"], 3)


@pytest.mark.parametrize("name", SOURCES)
def test_same_arm_as_brute_force(name):
    source = SOURCES[name]
    for share in SHARES:
        memory = share * sum(source.layer_sizes)
        arms = source_arms(source, memory)
        if arms:
            assert Ucb1(arms, source_pull(source)).run().best == best_source_arm(source, memory).arm


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_same_arm_as_brute_force_with_many_layers(share):
    memory = share * sum(LARGE.layer_sizes)
    arms = source_arms(LARGE, memory)
    assert len(arms) > 500
    assert Ucb1(arms, source_pull(LARGE)).run().best == best_source_arm(LARGE, memory).arm


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("seed", [0, 1])
def test_near_the_optimum_with_noise(name, seed):
    source = SOURCES[name]
    for share in SHARES[::3]:
        memory = share * sum(source.layer_sizes)
        arms = source_arms(source, memory)
        if arms:
            result = Ucb1(arms, source_pull(source, random.Random(seed), 0.03), seed=seed, **THOROUGH).run()
            best_ms = best_source_arm(source, memory).token_ms
            assert source_token_ms(source, result.best.k, result.best.w) <= 1.02 * best_ms


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_near_the_optimum_with_noise_and_many_layers(share):
    memory = share * sum(LARGE.layer_sizes)
    result = Ucb1(source_arms(LARGE, memory), source_pull(LARGE, random.Random(5), 0.03), seed=5, **THOROUGH).run()
    best_ms = best_source_arm(LARGE, memory).token_ms
    assert source_token_ms(LARGE, result.best.k, result.best.w) <= 1.02 * best_ms


def test_every_arm_is_played_even_when_there_are_more_arms_than_episodes():
    arms = [Plan(k, 1) for k in range(100)]
    played = []
    result = Ucb1(arms, lambda arm: played.append(arm) or -100.0 - arm.k, episodes=10).run()
    assert set(played) == set(arms)
    assert result.best == arms[0]
    assert result.n_episodes == len(played)


def test_episodes_go_to_the_better_arms():
    arms = [Plan(k, 1) for k in range(10)]
    result = Ucb1(arms, lambda arm: -100.0 - 10 * arm.k, episodes=500, confirm_arms=1).run()
    plays = {row.arm.k: row.n_plays for row in result.statistics}
    assert plays[0] > 300
    assert result.n_episodes == 500
    # a larger c explores more
    explorer = Ucb1(arms, lambda arm: -100.0 - 10 * arm.k, episodes=500, c=2.0, confirm_arms=1).run()
    assert {row.arm.k: row.n_plays for row in explorer.statistics}[0] < plays[0]


def test_scale_of_the_rewards_does_not_matter():
    arms = [Plan(k, 1) for k in range(10)]
    small, large = (
        Ucb1(arms, lambda arm, scale=scale: -scale * (100 + arm.k), episodes=200).run() for scale in (0.001, 1000.0)
    )
    assert [row.n_plays for row in small.statistics] == [row.n_plays for row in large.statistics]


def test_ties_go_to_larger_k_plus_w_then_larger_k():
    arms = [Plan(0, 3), Plan(1, 1), Plan(1, 2), Plan(2, 1), Plan(0, 1)]
    assert Ucb1(arms, lambda arm: -5.0).run().best == Plan(2, 1)


def test_the_choice_is_confirmed_too():
    """Of ten arms the tenth is the slowest, and wanted where it is near the fastest: one lucky play is not enough."""
    arms = [Plan(k, 1) for k in range(10)]
    lucky = iter([-105.0])

    def pull(arm):
        return next(lucky, -120.0) if arm.k == 9 else -100.0 - arm.k

    def wanted(times):
        return max((arm for arm, ms in times if ms <= 110), key=lambda arm: arm.k)

    result = Ucb1(arms, pull, choice=wanted, episodes=10, confirm_arms=1, confirm_plays=8).run()
    plays = {row.arm.k: row.n_plays for row in result.statistics}
    assert result.best == arms[8]
    assert plays[9] > 1 and plays[8] == 8 and plays[7] == 1


def test_statistics():
    rewards = iter([-10.0, -20.0] * 50)
    result = Ucb1([Plan(1, 1)], lambda arm: next(rewards), episodes=100).run()
    (row,) = result.statistics
    assert (row.n_plays, row.mean_ms, row.sd_ms) == (100, pytest.approx(15), pytest.approx(5))


def test_the_same_seed_plays_the_same():
    profile = make_profile([10**8] * 8, [0.05] * 8, disk=1e9, noise=0.05)
    arms = h2o_arms(profile, 4 * 10**8)
    runs = [Ucb1(arms, noisy_pull(profile, random.Random(2)), episodes=50, seed=2).run() for _ in range(2)]
    assert runs[0] == runs[1]


def test_noisy_pull_spreads_around_the_simulated_time():
    profile = make_profile([10**8] * 8, [0.01] * 8, disk=1e9, noise=0.05)
    arm = Plan(4, 2, Layout.PREFIX, 4 * 10**8, 2 * 10**8)
    pull = noisy_pull(profile, random.Random(1))
    rewards = [pull(arm) for _ in range(300)]
    mean = -sum(rewards) / len(rewards)
    assert mean == pytest.approx(1000 * token_s(profile, arm), rel=0.02)
    assert max(rewards) > 1.04 * min(rewards) or max(rewards) - min(rewards) > 0.1 * mean
    steady = noisy_pull(make_profile([10**8] * 8, [0.01] * 8, disk=1e9), random.Random(1))
    assert steady(arm) == steady(arm) == pytest.approx(-1000 * token_s(profile, arm))


def test_near_the_exact_search_on_this_programs_arms():
    profile = make_profile([10**8] * 24, [0.06] * 24, disk=1e9, head=3 * 10**8, head_s=0.05, noise=0.03)
    arms = h2o_arms(profile, 10**9)
    result = Ucb1(arms, noisy_pull(profile, random.Random(0)), episodes=300).run()
    assert 1000 * token_s(profile, result.best) <= 1.02 * best_arm(profile, arms).token_ms
