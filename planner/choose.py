"""From a profile and a budget to a plan, with what it should reach and what would make it faster."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from planner.arms import Arm, h2o_arms
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
MOST_PLAYED_ARMS = 32  # in the bandit's run that is shown beside the exact search
EPISODES = 120
CONFIRM_ARMS = 4
PROMPT_TOKENS = 128
SAME_SPEED = 1.0005
WORTH_SAYING = 0.99  # what helps is named when it brings the time below this part of the predicted one


@dataclass(frozen=True)
class Choice:
    """A plan for a budget, and the figures that justify it. ledger's parts add up to the budget."""

    plan: Plan
    predicted_ms_per_token: float
    predicted_ttft_s: float
    limit_ms_per_token: float
    floor_bytes: int
    ledger: dict[str, int]
    what_helps: tuple[str, ...]
    statistics: tuple[ArmStatistics, ...]
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
    (None: all of them, f16); what a disk store reads of them is not in the predictions. The bandit and the exact
    search both look; the exact one decides. Raises BudgetError, with the smallest budget that works, below the floor.
    floor_bytes: that budget, where it is known better than from the profile (0: not).
    """
    footprint = measure_footprint(profile, ctx_tokens, ubatch_tokens, kv, floor_bytes)
    layouts = tuple(Layout) if layout is None else (layout,)
    arms = h2o_arms(profile, footprint.available_bytes(budget_bytes), layouts)
    best = pick(profile, arms)
    bandit = play(profile, arms, best, seed)
    arm = best.arm
    return Choice(
        plan=_plan(profile, arm, budget_bytes),
        predicted_ms_per_token=best.token_ms,
        predicted_ttft_s=first_token_s(profile, arm, PROMPT_TOKENS, ubatch_tokens),
        limit_ms_per_token=1000 * limit_s(profile, streamable_bytes(profile) - arm.pinned_bytes),
        floor_bytes=footprint.floor_bytes,
        ledger=footprint.ledger(budget_bytes, arm.pinned_bytes, arm.window_bytes),
        what_helps=what_helps(profile, footprint, budget_bytes, layouts, best),
        statistics=bandit.statistics,
        method=_method(profile, best, bandit),
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
    """The plan of choose() without its explanations: what a run that has no plan yet starts with."""
    footprint = measure_footprint(profile, ctx_tokens, ubatch_tokens, kv)
    layouts = tuple(Layout) if layout is None else (layout,)
    arms = h2o_arms(profile, footprint.available_bytes(budget_bytes), layouts)
    return _plan(profile, pick(profile, arms).arm, budget_bytes)


def _plan(profile: ModelProfile, arm: Arm, budget_bytes: int) -> Plan:
    return Plan(arm.k, arm.w, arm.layout, arm.pinned_bytes, arm.window_bytes, budget_bytes, profile.model.hash)


def pick(profile: ModelProfile, arms: list[Arm]) -> Best:
    """The arm to run, with its simulated time: of those simulated to be NEAR the fastest, the one that streams the
    fewest bytes, balanced if there is such a one.

    Wide windows gain little by the simulation and cost bytes for certain, more so where the disk turns out slower.
    """
    beside = with_disk_speed(profile, BESIDE)
    best = best_arm(beside, arms)
    for arm in sorted(arms, key=lambda arm: (-arm.layout, -arm.pinned_bytes, arm.window_bytes)):
        if 1000 * token_s(beside, arm) <= NEAR * best.token_ms:
            return Best(arm, 1000 * token_s(profile, arm), best.n_simulated)
    return best


def play(profile: ModelProfile, arms: list[Arm], best: Best, seed: int) -> BanditResult:
    """The bandit, on tokens simulated with the profile's noise, over the arms that stream the fewest bytes."""
    fewest = sorted(arms, key=lambda arm: -arm.pinned_bytes)[:MOST_PLAYED_ARMS]
    played = [*fewest, best.arm] if best.arm not in fewest else fewest
    episodes = EPISODES if len(played) > 1 else 1
    from planner.bandit import Ucb1, noisy_pull  # numpy: not on the path of a run

    pull = noisy_pull(profile, random.Random(seed))
    return Ucb1(played, pull, episodes=episodes, seed=seed, confirm_arms=CONFIRM_ARMS).run()


def _method(profile: ModelProfile, best: Best, bandit: BanditResult) -> str:
    """One line: which search found the plan, and how the two compare."""
    plays = f"bandit of {bandit.n_episodes} plays over {len(bandit.statistics)} arms"
    if bandit.best == best.arm:
        return f"{plays}, confirmed by the exact search"
    bandit_ms = 1000 * token_s(profile, bandit.best)
    if bandit_ms <= best.token_ms * SAME_SPEED:
        return f"exact search; the {plays} found an arm as fast that leaves the disk or the window less slack"
    return f"exact search; the {plays} found an arm {bandit_ms / best.token_ms - 1:.1%} slower"


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
