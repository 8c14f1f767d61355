"""The source system's planner: UCB1 over its (k, w) with its simulator as the reward, in its order and units.

The reward has no noise. So the first play of an arm says all about it, and later plays change nothing. With as many
episodes as arms the plan is the optimum of its simulator. With fewer, the last arms are never looked at.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from planner.arms import source_arms, tie_order
from planner.exact import Best, best_source_arm
from planner.simulator import source_token_ms
from planner.source.profile import SourceProfile
from runtime.plans.plan import Plan

EPISODES = 500  # the source system's
C = 1.0  # the source system's


@dataclass(frozen=True)
class SourcePlan:
    """The plan, its simulated ms per token and plays, how many of the arms were played, and the optimum of them all."""

    arm: Plan
    token_ms: float
    n_plays: int
    n_played: int
    n_arms: int
    optimum: Best


def source_plan(
    source: SourceProfile, memory_mib: float, *, episodes: int = EPISODES, c: float = C, seed: int | None = None
) -> SourcePlan:
    """The best arm that was played. Among equals it is the one with larger k + w, then larger k.

    An episode plays the arm with the highest mean + c * sqrt(ln(episode) / plays). Arms that were not played yet come
    first, in order (seed: in an order drawn with it). Raises BudgetError where not one layer fits memory_mib.
    """
    optimum = best_source_arm(source, memory_mib)
    arms = source_arms(source, memory_mib)
    if seed is not None:
        random.Random(seed).shuffle(arms)
    times = [source_token_ms(source, arm.k, arm.w) for arm in arms[:episodes]]
    plays = [1] * len(times)
    for episode in range(len(times) + 1, episodes + 1):
        scores = [c * math.sqrt(math.log(episode) / n) - ms for ms, n in zip(times, plays, strict=True)]
        plays[scores.index(max(scores))] += 1
    i = min(range(len(times)), key=lambda i: tie_order(arms[i], times[i]))
    return SourcePlan(arms[i], times[i], plays[i], len(times), len(arms), optimum)
