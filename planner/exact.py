"""The exact search finds the best arm for certain. It checks the bandit.

One arm per layout and w is enough (arms.py), because pinning more never makes a token slower:

The lanes' times follow from max and + alone. A segment's read starts when the read before it has ended and its room is
free. The compute of an earlier segment q frees it: q is the first one after which at most window_bytes are streamed,
this segment included. A segment's compute starts when it has arrived and the compute before it has ended. Pinning more
bytes at the same window (prefix: a superset of the layers) lowers some read times. It leaves no more streamed bytes
between any two segments, so every q is the same or an earlier one. All terms are then less or equal. By induction over
the segments all times are, too. In the balanced layout streamed bytes and window shrink by the same factor at the same
w. So every q stays the same, and only read times fall. Layers that are spread evenly are not nested from k to k + 1.
There an arm is the largest k that fits, by definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.arms import source_arms, tie_order
from planner.footprint import streamable_bytes
from planner.simulator import limit_s, source_token_ms, token_s
from planner.source.profile import SourceProfile
from profiler.model_profile import ModelProfile
from runtime.errors import BudgetError
from runtime.plans.plan import Plan


@dataclass(frozen=True)
class Best:
    """An arm, and its simulated time in ms per token."""

    arm: Plan
    token_ms: float


def best_arm(profile: ModelProfile, arms: Sequence[Plan]) -> Best:
    """The fastest of the arms. Among equals it is the one that streams the fewest bytes, then the evener layout.

    Arms are tried in order of their limit (limit_s), which no arm beats. Once an arm's limit is not below the best time
    so far, no later one's is.
    """
    total = streamable_bytes(profile)
    order = sorted(arms, key=lambda arm: (-arm.pinned_bytes, arm.window_bytes, -arm.layout))
    best = Best(order[0], 1000 * token_s(profile, order[0]))
    for arm in order[1:]:
        if 1000 * limit_s(profile, total - arm.pinned_bytes) >= best.token_ms * (1 - 1e-9):
            break
        token_ms = 1000 * token_s(profile, arm)
        if token_ms < best.token_ms * (1 - 1e-9):
            best = Best(arm, token_ms)
    return best


def best_source_arm(source: SourceProfile, memory_mib: float) -> Best:
    """Brute force over the source system's arms and simulator. Raises BudgetError when not one layer fits."""
    arms = source_arms(source, memory_mib)
    if not arms:
        need = source.layer_sizes[0]
        raise BudgetError(f"{memory_mib} MiB is less than the first layer", f"give at least {need} MiB", need * 2**20)
    timed = [(arm, source_token_ms(source, arm.k, arm.w)) for arm in arms]
    return Best(*min(timed, key=lambda pair: tie_order(*pair)))
