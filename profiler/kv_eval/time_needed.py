"""How long an analysis takes, and how much of it fits into a time: pure functions of what one sample took."""

from __future__ import annotations

import math
from dataclasses import dataclass

_FIRST_PART = 3  # a third of the samples for every candidate, all of them for the best
_STEPS = 100


@dataclass(frozen=True)
class Costs:
    """Seconds: computing a sample prompt, answering it token by token, opening the model with another filter."""

    prompt_s: float
    answer_s: float
    open_s: float


@dataclass(frozen=True)
class Work:
    """Sample prompts, sets of filter layers, selectors tried with each, and how many of the best see all prompts."""

    n_prompts: int
    checks: int
    selects: int
    finalists: int

    @property
    def n_first(self) -> int:
        """Prompts that every candidate is measured on."""
        return -(-self.n_prompts // _FIRST_PART)

    @property
    def candidates(self) -> int:
        """What is measured on the first prompts."""
        return self.checks * self.selects

    @property
    def answers(self) -> int:
        """Answers under a filter."""
        return self.candidates * self.n_first + min(self.finalists, self.candidates) * self.n_prompts


def seconds(work: Work, costs: Costs) -> float:
    """About how long this takes."""
    opened = work.candidates + min(work.finalists, work.candidates)
    recorded = work.n_prompts * (costs.prompt_s + costs.answer_s)
    return recorded + work.answers * costs.answer_s + opened * costs.open_s


def fitted(work: Work, costs: Costs, limit_s: float) -> Work:
    """The most of this work that takes at most limit_s; where nothing does, the least that means anything.

    Prompts go first: twice as many prompts say less than twice as many choices.
    """
    for step in range(_STEPS, 0, -1):
        share = step / _STEPS
        root = math.sqrt(share)
        less = Work(
            max(min(_FIRST_PART, work.n_prompts), round(work.n_prompts * share)),
            max(1, math.ceil(work.checks * root)),
            work.selects,
            max(1, math.ceil(work.finalists * root)),
        )
        if seconds(less, costs) <= limit_s:
            break
    return less
