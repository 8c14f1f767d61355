"""UCB1 (Auer, Cesa-Bianchi, Fischer 2002) over arms whose reward is noisy: minus the ms of a token.

Every arm is played once before any is repeated, however few episodes are asked for. A short run would otherwise leave
out the last arms, not the worst ones. At the end the confirm_arms best by mean and the chosen arm are each played
confirm_plays times, because the best of many single noisy plays is mostly the luckiest one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from planner.arms import tie_order
from planner.simulator import decode_rates, draw, token_s
from profiler.model_profile import ModelProfile
from runtime.plans.plan import Plan

EPISODES = 100  # with the confirming plays about a tenth of a second for 30 layers
C = 0.05  # small, because the noise of a play is mostly small against the range between arms
CONFIRM_ARMS = 4  # arms behind these four and the choice would have to be luckier than all of them
CONFIRM_PLAYS = 24  # makes the noise of a mean a fifth of that of a play

_Arm = TypeVar("_Arm")


@dataclass(frozen=True)
class ArmStatistics(Generic[_Arm]):
    """How often an arm was played, and the mean and standard deviation of its token time in ms."""

    arm: _Arm
    n_plays: int
    mean_ms: float
    sd_ms: float


@dataclass(frozen=True)
class BanditResult(Generic[_Arm]):
    """The arm that was chosen, and what was seen of every arm (best mean first)."""

    best: _Arm
    statistics: tuple[ArmStatistics[_Arm], ...]
    n_episodes: int


class Ucb1(Generic[_Arm]):
    """UCB1 with the reward range seen so far as its scale: score = mean + c * range * sqrt(2 ln t / n).

    pull(arm) returns a reward (minus ms per token). choice(times) says which arm to take when these are the means
    (default: the first by rank). seed decides the order of the first plays. rank(arm, ms) is a sort key, best first.
    """

    def __init__(  # noqa: PLR0913 - what a search is made of
        self,
        arms: Sequence[_Arm],
        pull: Callable[[_Arm], float],
        *,
        choice: Callable[[Sequence[tuple[_Arm, float]]], _Arm] | None = None,
        rank: Callable[[Any, float], Any] = tie_order,
        episodes: int = EPISODES,
        c: float = C,
        seed: int = 0,
        confirm_arms: int = CONFIRM_ARMS,
        confirm_plays: int = CONFIRM_PLAYS,
    ) -> None:
        self.arms = tuple(arms)
        self.pull = pull
        self.choice = choice or (lambda times: min(times, key=lambda pair: rank(*pair))[0])
        self.rank = rank
        self.episodes = episodes
        self.c = c
        self.seed = seed
        self.confirm_arms = confirm_arms
        self.confirm_plays = confirm_plays
        self._n = np.zeros(len(self.arms), dtype=np.int64)
        self._sum = np.zeros(len(self.arms))
        self._sum_squares = np.zeros(len(self.arms))
        self._lowest, self._highest = math.inf, -math.inf

    def run(self) -> BanditResult[_Arm]:
        """Play max(episodes, number of arms) times, then confirm the leaders and the choice."""
        order = list(range(len(self.arms)))
        random.Random(self.seed).shuffle(order)
        for i in order:
            self._play(i)
        for t in range(len(order) + 1, self.episodes + 1):
            width = self.c * (self._highest - self._lowest) * np.sqrt(2 * math.log(t) / self._n)
            self._play(int(np.argmax(self._sum / self._n + width)))
        return BanditResult(self._confirmed(), self._statistics(), int(self._n.sum()))

    def _confirmed(self) -> _Arm:
        """Play the arms that lead, and the one to be chosen, until none of them is where it is by luck."""
        while True:
            means = self._sum / self._n
            chosen = self.choice(list(zip(self.arms, (-means).tolist(), strict=True)))
            leaders = {*np.argsort(-means)[: self.confirm_arms].tolist(), self.arms.index(chosen)}
            unsure = [i for i in sorted(leaders) if self._n[i] < self.confirm_plays]
            if not unsure:
                return chosen
            for i in unsure:
                self._play(i)

    def _play(self, i: int) -> None:
        reward = self.pull(self.arms[i])
        self._n[i] += 1
        self._sum[i] += reward
        self._sum_squares[i] += reward * reward
        self._lowest = min(self._lowest, reward)
        self._highest = max(self._highest, reward)

    def _statistics(self) -> tuple[ArmStatistics[_Arm], ...]:
        mean = self._sum / self._n
        sd = np.sqrt(np.maximum(0.0, self._sum_squares / self._n - mean**2))
        rows = [ArmStatistics(arm, int(self._n[i]), float(-mean[i]), float(sd[i])) for i, arm in enumerate(self.arms)]
        return tuple(sorted(rows, key=lambda row: self.rank(row.arm, row.mean_ms)))


def noisy_pull(profile: ModelProfile, rng: random.Random) -> Callable[[Plan], float]:
    """A pull that simulates one token with disk and compute speeds drawn from the profile's spreads."""

    def pull(arm: Plan) -> float:
        rates = decode_rates(profile, lambda spread: draw(spread, rng))
        return -1000 * token_s(profile, arm, rates)

    return pull
