"""Speculation: a drafter proposes the next tokens, one pass computes all of them, the sampler decides which were right.

A pass that waits for the disk takes about as long for several positions as for one, so every proposal that turns out
right is a token for nothing. Where passes are bound by computing it is not, so what a pass costs and how often
proposals are right are measured all the time, and drafts are used only as long as they pay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.engine import Counters
from runtime.settings import SHORT_PASS

MOST_DRAFTED = SHORT_PASS - 1
LOOKUP, DRAFT, OFF = "lookup", "draft", "off"

_LOGITS_SHARE, _LOGITS_FREE = 0.01, 2**15  # of the model's bytes that the drafts' logits may take; as much always may
_MEMORY = 16  # observations a running mean remembers
_OUTLIER = 4  # times the mean
_MARGIN = 0.05  # predicted gain below which one token per pass is better: predictions are no more exact than that
_LOSS_SHARE = 0.01  # of all time that may be lost to drafts that did not pay
_PLAIN_EVERY = 64  # passes after which one without a draft is made, to know what it costs
_TRIAL_TOKENS = 3  # drafted in a trial of a drafter that did not pay
_HOPE, _SELDOM = 32, 8  # after so many passes without a draft proposals are looked up for one token in so many
_FADE, _FADE_EVERY = 0.08, 8  # share of an old measurement that is forgotten in so many passes without a draft
_GROWTH = 0.5  # computing time of one more position, as a share of the first one's, until it is measured
_FIRST_RIGHT = {1: 0.3, 2: 0.5, 3: 0.7}  # by grade; how often the first proposal is right, until it is measured
_NEXT_RIGHT = 0.7


def most_drafted(n_vocab: int, model_bytes: int) -> int:
    """The most tokens to draft, 2 to MOST_DRAFTED.

    The logits of every drafted token take the place of resident weights: 4 bytes per entry of the vocabulary, twice.
    So they may take no more than a small share of what a pass reads.
    """
    allowed = max(_LOGITS_FREE, int(_LOGITS_SHARE * model_bytes))
    return max(2, min(MOST_DRAFTED, allowed // (4 * max(1, n_vocab))))


class Drafter(Protocol):
    """Proposes tokens. Within an answer the texts it is given only grow."""

    name: str
    relative_cost: float  # time of one proposal as a share of a pass's computing time; 0: nothing worth counting
    reading_s: float  # time spent so far on reading long texts that were new to it

    @property
    def grade(self) -> int:
        """How sure the last proposal was: grades are counted apart."""

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked."""

    def begin(self) -> None:
        """A new answer begins: the next text may have nothing in common with the last one."""

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        """At most n tokens that may follow `tokens`."""

    def close(self) -> None:
        """Free what it holds."""


class Mean:
    """A running mean that forgets; starts as a guess that weighs as much as one observation."""

    def __init__(self, guess: float, memory: int = _MEMORY) -> None:
        self.value = guess
        self._weight = 1.0
        self._memory = memory

    def see(self, value: float) -> None:
        """Take an observation in."""
        self._weight = min(self._weight + 1, self._memory)
        self.value += (value - self.value) / self._weight

    def see_time(self, value: float) -> None:
        """Take a time in. One that is far too long was not measured well: the process was stopped, say."""
        self.see(min(value, _OUTLIER * self.value) if self.value > 0 else value)

    def fade(self, towards: float) -> None:
        """Trust it a little less: move towards a guess."""
        self.value += _FADE * (towards - self.value)


@dataclass(frozen=True)
class PassTime:
    """What one pass took: all of it with drafting, and the parts that went into drafting and computing."""

    seconds: float
    compute_s: float
    drafting_s: float = 0.0


class Gauge:
    """How many tokens to draft: the number with the most expected tokens per second, as far as measured."""

    def __init__(self, relative_cost: float = 0.0) -> None:
        self._relative_cost = relative_cost
        self._pass_s: Mean | None = None  # one pass without a draft
        self._compute_s: Mean | None = None
        self._growth = Mean(_GROWTH)
        self._drafting: Mean | None = None  # drafting one token / a pass without a draft
        self._ratios: dict[int, Mean] = {}  # pass with n drafted tokens / pass without a draft
        self._first: dict[int, Mean] = {}
        self._next = Mean(_NEXT_RIGHT)
        self._total_s = self._lost_s = 0.0
        self._since_plain = self._since_draft = 0

    # --- measuring ----------------------------------------------------------------------------------------------

    def see_prompt(self, n_positions: int, seconds: float, compute_s: float, disk_s: float) -> None:
        """A pass of the prompt. disk_s: what reading the streamed weights once takes at the rate seen.

        When it waited for the disk most of the time, and will wait again, a few more positions are known to be free.
        """
        if n_positions == 1:
            self.see_plain(PassTime(seconds, compute_s))
            return
        self._total_s += seconds
        if self._pass_s is None and seconds > 2 * compute_s and disk_s > compute_s:
            self._pass_s, self._compute_s = Mean(disk_s, 2), Mean(compute_s / n_positions, 2)

    def see_plain(self, took: PassTime) -> None:
        """A pass without a draft."""
        self._since_plain, self._since_draft = 0, self._since_draft + 1
        self._total_s += took.seconds
        if self._pass_s is None or self._compute_s is None:
            self._pass_s, self._compute_s = Mean(took.seconds), Mean(took.compute_s)
        else:
            self._pass_s.see_time(took.seconds)
            self._compute_s.see_time(took.compute_s)
        if self._since_draft % _FADE_EVERY == 0:
            self._growth.fade(min(self._growth.value, _GROWTH))
            for n, ratio in self._ratios.items():
                ratio.fade(self._guessed_ratio(n))

    def see_drafted(self, took: PassTime, n_drafted: int, n_tokens: int) -> None:
        """A pass with a draft, which gave n_tokens."""
        self._since_plain, self._since_draft = self._since_plain + 1, 0
        self._total_s += took.seconds
        if self._pass_s is None or self._compute_s is None:
            return
        plain_s, compute_s = self._pass_s.value, self._compute_s.value
        worst_s = _OUTLIER * self._ratio(n_drafted) * plain_s  # more is not the draft's doing
        self._lost_s = max(0.0, self._lost_s + min(took.seconds, worst_s) - n_tokens * plain_s)
        self._growth.see_time((took.compute_s / compute_s - 1) / n_drafted if compute_s else 0.0)
        if self._relative_cost:
            self._drafting = self._drafting or Mean(took.drafting_s / n_drafted / plain_s)
            self._drafting.see_time(took.drafting_s / n_drafted / plain_s)
        self._ratios.setdefault(n_drafted, Mean(self._guessed_ratio(n_drafted), 8)).see_time(took.seconds / plain_s)

    def see_right(self, grade: int, n_right: int, n_drafted: int) -> None:
        """Of n_drafted proposals the first n_right were right and the next one was not; others were not looked at."""
        for i in range(min(n_right + 1, n_drafted)):
            self.see_one(grade, i, right=i < n_right)

    def see_one(self, grade: int, i: int, *, right: bool) -> None:
        """Whether the i-th proposal was right, after all before it were."""
        (self._next if i else self._first_right(grade)).see(right)

    @property
    def is_hopeful(self) -> bool:
        """Whether drafts paid lately, or were not tried for long enough to know."""
        return self._since_draft < _HOPE

    # --- deciding -----------------------------------------------------------------------------------------------

    def best(self, grade: int, most: int) -> int:
        """How many tokens to draft, 0 to most."""
        if most < 1 or self._pass_s is None or self._since_plain >= _PLAIN_EVERY:
            return 0
        if self._lost_s > _LOSS_SHARE * self._total_s:
            return 0
        gains = [self._tokens(grade, n) / self._ratio(n) for n in range(1, most + 1)]
        best = max(range(most), key=gains.__getitem__) + 1
        if gains[best - 1] > 1 + _MARGIN:
            return best
        return self._trial(most) if self._relative_cost else 0

    def _trial(self, most: int) -> int:
        """A drafter that costs time and did not pay is tried again when the trial's cost has become small."""
        n = min(most, _TRIAL_TOKENS)
        wait = max(_PLAIN_EVERY, (self._ratio(n) - 1) / (_LOSS_SHARE / 2))
        return n if self._since_draft >= wait else 0

    def _tokens(self, grade: int, n: int) -> float:
        """Tokens expected of a pass with n drafted ones."""
        right = self._next.value
        rest = n if right > 0.999 else (1 - right**n) / (1 - right)
        return 1 + self._first_right(grade).value * rest

    def _first_right(self, grade: int) -> Mean:
        if grade not in self._first:
            self._first[grade] = Mean(_FIRST_RIGHT.get(grade, _NEXT_RIGHT))
        return self._first[grade]

    def _ratio(self, n: int) -> float:
        """Time of a pass with n drafted tokens, as a multiple of one without."""
        return self._ratios[n].value if n in self._ratios else self._guessed_ratio(n)

    def _guessed_ratio(self, n: int) -> float:
        if self._pass_s is None or self._compute_s is None or not self._pass_s.value:
            return math.inf
        compute = self._compute_s.value / self._pass_s.value
        drafting = self._drafting.value if self._drafting else compute * self._relative_cost
        return 1 + (compute * self._growth.value + drafting) * n  # as if computing never overlapped with reading


class Speculation:
    """A drafter under a gauge. Counts what it did: drafted and accepted tokens."""

    def __init__(
        self,
        drafter: Drafter,
        most: int = MOST_DRAFTED,
        gauge: Gauge | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.drafter = drafter
        self.most = most
        self._gauge = gauge or Gauge(drafter.relative_cost)
        self._clock = clock
        self._proposed: list[int] = []
        self._grade = 0
        self._n_asked = 0
        self._unused: list[int] = []  # a proposal that is compared with the tokens that came instead
        self._unused_grade = self._n_right = 0
        self._took = PassTime(0.0, 0.0)
        self.drafting_s = 0.0  # for the last pass
        self._reading_s = 0.0

    def begin(self) -> None:
        """A new answer begins."""
        self.drafter.begin()
        self.drafting_s = 0.0
        self._unused = []

    def saw_prompt(self, before: Counters, after: Counters, streamed_bytes: int) -> None:
        """The prompt was computed."""
        n = after.passes - before.passes
        seconds, n_bytes = after.seconds - before.seconds, after.bytes_read - before.bytes_read
        if n > 0:
            compute_s = (seconds - after.wait_s + before.wait_s) / n
            disk_s = streamed_bytes * seconds / n_bytes if n_bytes else 0.0
            self._gauge.see_prompt((after.tokens - before.tokens) // n, seconds / n, compute_s, disk_s)

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow tokens, at most `most`; nothing while it does not pay."""
        start, read_s = self._clock(), self.drafter.reading_s
        draft = self._propose(tokens, min(most, self.most)) if self.drafter.is_ready else []
        self._grade = self.drafter.grade
        self.drafting_s = self._clock() - start
        self._reading_s = self.drafter.reading_s - read_s
        return draft

    def _propose(self, tokens: Sequence[int], most: int) -> list[int]:
        self._proposed = []
        if self.drafter.relative_cost:
            n = self._gauge.best(self.drafter.grade, most)
            self._proposed = self.drafter.propose(tokens, n) if n else []
            return self._proposed
        self._n_asked += 1
        if most > 0 and (self._gauge.is_hopeful or self._n_asked % _SELDOM == 0):
            self._proposed = self.drafter.propose(tokens, most)  # not used, they tell how good they would have been
        return self._proposed[: self._gauge.best(self.drafter.grade, len(self._proposed))]

    def saw_pass(self, seconds: float, wait_s: float) -> None:
        """The pass that verifies the last draft was computed. wait_s of its time went into waiting for the disk."""
        drafting_s = self.drafting_s - self._reading_s
        self._took = PassTime(seconds + drafting_s, seconds - wait_s, drafting_s)

    def verified(self, n_drafted: int, tokens: Sequence[int]) -> None:
        """The tokens that the pass gave in the end: the accepted ones and one more."""
        if not self.drafter.is_ready:
            return  # the disk is busy with the drafter: no pass is like those that will follow
        if n_drafted:
            self._unused = []
            self._gauge.see_drafted(self._took, n_drafted, len(tokens))
            self._gauge.see_right(self._grade, len(tokens) - 1, n_drafted)
        else:
            self._gauge.see_plain(self._took)
            self._follow(tokens[0])

    def _follow(self, token: int) -> None:
        """See how good a proposal would have been that was not used."""
        if not self._unused:
            self._unused, self._unused_grade, self._n_right = self._proposed, self._grade, 0
        if not self._unused:
            return
        right = self._unused[self._n_right] == token
        self._gauge.see_one(self._unused_grade, self._n_right, right=right)
        self._n_right += right
        if not right or self._n_right == len(self._unused):
            self._unused = []

    def close(self) -> None:
        """Free the drafter."""
        self.drafter.close()
