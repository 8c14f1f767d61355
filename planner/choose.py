"""From a profile and a budget to a plan, with what it should reach and what would make it faster."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from planner.arms import h2o_arms, when_full
from planner.exact import Best, best_arm
from planner.footprint import Footprint, measure_footprint, streamable_bytes
from planner.kv import KvUse
from planner.simulator import decode_rates, first_token_s, limit_s, token_s
from profiler.model_profile import ModelProfile, Spread
from runtime.plans.plan import Layout, Plan
from runtime.sizes import format_size

if TYPE_CHECKING:
    from planner.bandit import ArmStatistics, BanditResult

BESIDE = 0.85  # of the profile's disk speed: what is left of it beside a computation
NEAR = 1.05  # an arm that streams less may be simulated to take this many times the fastest one's time
MOST_PLAYED_ARMS = 32  # by the bandit; with more, most plays would be first plays
PROMPT_TOKENS = 128  # of the prompt whose first token is predicted: one pass at the least memory
SAME_TIME = 0.01  # relative; the predictions are not better than that
WORTH_SAYING = 0.99  # what helps is named when it brings the time below this part of the predicted one


@dataclass(frozen=True)
class Choice:
    """A plan for a budget, and the figures that justify it. ledger's parts add up to the budget.

    full_ms_per_token is predicted for a full context, all other figures are for START_POSITIONS (kv.py). statistics is
    what the bandit saw, with the disk at BESIDE of its speed. exact is the exact search's arm.
    """

    plan: Plan
    predicted_ms_per_token: float
    full_ms_per_token: float
    predicted_ttft_s: float
    limit_ms_per_token: float
    floor_bytes: int
    ledger: dict[str, int]
    what_helps: tuple[str, ...]
    statistics: tuple[ArmStatistics[Plan], ...]
    exact: Best
    method: str


def choose(
    profile: ModelProfile,
    budget_bytes: int,
    *,
    ctx_tokens: int,
    ubatch_tokens: int,
    layout: Layout | None = None,
    kv: KvUse | None = None,
    seed: int = 0,
    floor_bytes: int = 0,
) -> Choice:
    """The plan for a process of budget_bytes, a context of ctx_tokens and passes of at most ubatch_tokens.

    layout None: the best of all. predicted_ttft_s is for a prompt of PROMPT_TOKENS. kv: how keys and values are kept
    (None: all of them, f16). The predictions leave out what a disk store reads of them. The bandit decides, and the
    exact search checks it (see decide). Below the floor, BudgetError is raised with the smallest budget that works.
    floor_bytes: that budget, where it is known better than from the profile (0: not).
    """
    footprint = measure_footprint(profile, ctx_tokens, ubatch_tokens, kv, floor_bytes)
    layouts = tuple(Layout) if layout is None else (layout,)
    arms = h2o_arms(profile, footprint.available_bytes(budget_bytes), layouts)
    exact, bandit = pick(profile, arms), play(profile, arms, seed)
    best, method = decide(profile, bandit, exact)
    arm = best.arm
    full = when_full(profile, arm, footprint.available_bytes(budget_bytes, full=True))
    return Choice(
        plan=replace(arm, budget_bytes=budget_bytes, model_hash=profile.model.hash),
        predicted_ms_per_token=best.token_ms,
        full_ms_per_token=1000 * token_s(profile, full),
        predicted_ttft_s=first_token_s(profile, arm, PROMPT_TOKENS, ubatch_tokens),
        limit_ms_per_token=1000 * limit_s(profile, streamable_bytes(profile) - arm.pinned_bytes),
        floor_bytes=footprint.floor_bytes,
        ledger=footprint.ledger(budget_bytes, arm.pinned_bytes, arm.window_bytes),
        what_helps=what_helps(profile, footprint, budget_bytes, layouts, best),
        statistics=bandit.statistics,
        exact=exact,
        method=method,
    )


def choose_exactly(
    profile: ModelProfile,
    budget_bytes: int,
    *,
    ctx_tokens: int,
    ubatch_tokens: int,
    layout: Layout | None = None,
    kv: KvUse | None = None,
) -> Plan:
    """The exact search's plan alone: what a run that has no plan yet starts with. It needs no numpy, and less time."""
    footprint = measure_footprint(profile, ctx_tokens, ubatch_tokens, kv)
    layouts = tuple(Layout) if layout is None else (layout,)
    arms = h2o_arms(profile, footprint.available_bytes(budget_bytes), layouts)
    return replace(pick(profile, arms).arm, budget_bytes=budget_bytes, model_hash=profile.model.hash)


def lean(arm: Plan) -> tuple[int, int, int]:
    """Sort key: balanced arms first, and of each layout those first that stream the fewest bytes."""
    return (-arm.layout, -arm.pinned_bytes, arm.window_bytes)


def leanest(times: Sequence[tuple[Plan, float]]) -> Plan:
    """The arm to run: of those that take at most NEAR the fastest one's time, the first by `lean`.

    Wide windows gain little by the simulation and cost bytes for certain, more so where the disk turns out slower.
    """
    limit = NEAR * min(ms for _, ms in times)
    return min((arm for arm, ms in times if ms <= limit), key=lean)


def pick(profile: ModelProfile, arms: Sequence[Plan], disk: float = BESIDE) -> Best:
    """The leanest() of all arms by the exact search, with its simulated time.

    disk: the part of the profile's disk speed that is left beside a computation.
    """
    beside = with_disk_speed(profile, disk)
    limit = NEAR * best_arm(beside, arms).token_ms
    arm = next(arm for arm in sorted(arms, key=lean) if 1000 * token_s(beside, arm) <= limit)
    return Best(arm, 1000 * token_s(profile, arm))


def play(profile: ModelProfile, arms: list[Plan], seed: int) -> BanditResult[Plan]:
    """The bandit's leanest() of the arms that stream the fewest bytes, on tokens simulated with the profile's noise."""
    from planner.bandit import EPISODES, Ucb1, noisy_pull  # numpy: not on the path of a run

    played = sorted(arms, key=lambda arm: -arm.pinned_bytes)[:MOST_PLAYED_ARMS]
    pull = noisy_pull(with_disk_speed(profile, BESIDE), random.Random(seed))
    episodes = EPISODES if len(played) > 1 else 1
    return Ucb1(played, pull, choice=leanest, episodes=episodes, seed=seed).run()


def decide(profile: ModelProfile, bandit: BanditResult[Plan], exact: Best) -> tuple[Best, str]:
    """The bandit's arm, unless the exact search's is faster by more than SAME_TIME; and a line on who found it."""
    found = Best(bandit.best, 1000 * token_s(profile, bandit.best))
    n_plans = len(bandit.statistics)
    name = f"the bandit ({bandit.n_episodes} plays of {n_plans} plan{'' if n_plans == 1 else 's'})"
    if found.arm == exact.arm:
        return found, f"{name}; the exact search finds the same"
    gain = found.token_ms / exact.token_ms - 1
    if gain > SAME_TIME:
        return exact, f"the exact search, whose plan is {gain:.1%} faster than that of {name}"
    than = f"{abs(gain):.1%} {'faster' if gain > 0 else 'slower'}"
    return found, f"{name}; the exact search's plan is {'as fast' if than.startswith('0.0%') else than}"


def what_helps(
    profile: ModelProfile, footprint: Footprint, budget_bytes: int, layouts: tuple[Layout, ...], best: Best
) -> tuple[str, ...]:
    """Lines on what would make a token faster: a quarter more memory, a disk twice as fast, or neither."""
    lines = []
    more_bytes = budget_bytes + budget_bytes // 4
    more = pick(profile, h2o_arms(profile, footprint.available_bytes(more_bytes), layouts))
    if more.token_ms < WORTH_SAYING * best.token_ms:
        lines.append(f"more memory: {format_size(more_bytes)} would give {more.token_ms:.1f} ms per token")
    fast = with_disk_speed(profile, 2.0)
    faster = pick(fast, h2o_arms(fast, footprint.available_bytes(budget_bytes), layouts))
    if faster.token_ms < WORTH_SAYING * best.token_ms:
        lines.append(f"a faster disk: twice the speed would give {faster.token_ms:.1f} ms per token")
    if not lines:
        rates = decode_rates(profile)
        compute_ms = 1000 * (sum(rates.compute_s) + rates.overhead_s)
        lines.append(f"neither memory nor disk: computing takes {compute_ms:.1f} ms of every token")
    return tuple(lines)


def with_disk_speed(profile: ModelProfile, factor: float) -> ModelProfile:
    """The profile as if the disk were factor times as fast."""
    old = profile.disk.bytes_per_s
    scaled = Spread(old.mean * factor, old.sd * factor, old.n, old.minimum * factor, old.maximum * factor)
    disk = msgspec.structs.replace(profile.disk, bytes_per_s=scaled)
    return msgspec.structs.replace(profile, disk=disk)
