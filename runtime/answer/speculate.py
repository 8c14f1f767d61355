"""Speculation: a drafter proposes the next tokens, one pass computes all of them, the sampler decides which were right.

A pass that waits for the disk takes about as long for several positions as for one, so every proposal that turns out
right is a token for nothing. Where passes are bound by computing it is not, so what a pass costs and how often
proposals are right are measured all the time, and drafts are used only as long as they pay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from runtime.answer.gauge import Gauge, PassTime
from runtime.engine.engine import Counters

MOST_DRAFTED = 32
LOOKUP, DRAFT, OFF = "lookup", "draft", "off"

_LOGITS_SHARE, _LOGITS_FREE = 0.025, 2**15  # of the model's bytes that the drafts' logits may take; as much always may
_SELDOM = 8  # of so many tokens one is looked up where there is little hope


def most_drafted(n_vocab: int, model_bytes: int) -> int:
    """The most tokens to draft, 2 to MOST_DRAFTED.

    The logits of every drafted token take the place of resident weights: 4 bytes per entry of the vocabulary, twice.
    So they may take no more than a small share of the model's bytes; passes with up to half as many take half of it.
    """
    allowed = max(_LOGITS_FREE, int(_LOGITS_SHARE * model_bytes))
    return max(2, min(MOST_DRAFTED, allowed // (4 * max(1, n_vocab))))


class Lodging(Protocol):
    """A drafter's place in memory, taken from the weights of the model that verifies."""

    @property
    def is_taken(self) -> bool:
        """Whether the drafter has it."""

    @property
    def n_bytes(self) -> int:
        """What the drafter reads when it comes."""

    @property
    def pass_bytes(self) -> int:
        """What a pass reads while the drafter is there."""

    def take(self) -> bool:
        """The drafter comes; False where it cannot."""

    def leave(self) -> None:
        """The drafter goes."""


class Drafter(Protocol):
    """Proposes tokens. Within an answer the texts it is given only grow."""

    name: str
    relative_cost: float  # time of one proposal as a share of a pass's computing time; 0: nothing worth counting
    reading_s: float  # time spent so far on reading long texts that were new to it

    @property
    def lodging(self) -> Lodging | None:
        """Where it takes memory from the weights of the model that verifies."""

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
        self._reading_s = self._bytes_per_s = 0.0
        self._is_usual = True  # the pass: it reads no weights that will stay
        self._has_left = False  # the drafter, just now: weights take its place

    def begin(self) -> None:
        """A new answer begins."""
        self.drafter.begin()
        self.drafting_s = 0.0
        self._unused = []
        if self.drafter.lodging:
            self._gauge.begin()
            self._is_usual = False

    def saw_prompt(self, before: Counters, after: Counters, streamed_bytes: int) -> None:
        """The prompt was computed."""
        n = after.passes - before.passes
        seconds, n_bytes = after.seconds - before.seconds, after.bytes_read - before.bytes_read
        self._see_rate(n_bytes, seconds)
        if n > 0 and not self.drafter.lodging:
            compute_s = (seconds - after.wait_s + before.wait_s) / n
            disk_s = streamed_bytes * seconds / n_bytes if n_bytes else 0.0
            self._gauge.see_prompt((after.tokens - before.tokens) // n, seconds / n, compute_s, disk_s)

    def _see_rate(self, n_bytes: int, seconds: float) -> None:
        self._bytes_per_s = max(self._bytes_per_s, n_bytes / seconds if seconds else 0.0)

    @property
    def wants_odds(self) -> bool:
        """Whether it helps to know how likely a token was that was chosen: while a drafter is not in memory."""
        return self.drafter.lodging is not None and not self.drafter.lodging.is_taken

    def saw_odds(self, odds: float) -> None:
        """The probability of a token that was chosen."""
        self._gauge.see_odds(odds)

    @property
    def saved_s(self) -> float:
        """Seconds that drafts have saved so far; negative: lost."""
        return self._gauge.saved_s

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow tokens, at most `most`; nothing while it does not pay."""
        start, read_s = self._clock(), self.drafter.reading_s
        draft = self._propose(tokens, most) if self.drafter.is_ready else []
        self._grade = self.drafter.grade
        self.drafting_s = self._clock() - start
        self._reading_s = self.drafter.reading_s - read_s
        return draft

    def _propose(self, tokens: Sequence[int], most: int) -> list[int]:
        self._proposed = []
        if self.drafter.lodging and not self._is_there(self.drafter.lodging, most):
            return []
        most = min(most, self.most)
        if self.drafter.relative_cost:
            n = self._gauge.best(self.drafter.grade, most)
            self._proposed = self.drafter.propose(tokens, n) if n else []
            return self._proposed
        self._n_asked += 1
        if most > 0 and (self._gauge.is_hopeful or self._n_asked % _SELDOM == 0):
            self._proposed = self.drafter.propose(tokens, most)  # not used, they tell how good they would have been
        return self._proposed[: self._gauge.best(self.drafter.grade, len(self._proposed))]

    def _is_there(self, lodging: Lodging, n_left: int) -> bool:
        """Whether a drafter that takes the place of weights is in memory; it comes and goes here."""
        gauge = self._gauge
        if lodging.is_taken:
            if n_left > 0 and gauge.pays_to_go(n_left, self.most):
                lodging.leave()
                gauge.goes()
                self._is_usual, self._has_left = False, True
            return lodging.is_taken
        if self._bytes_per_s:
            gauge.price(lodging.pass_bytes / self._bytes_per_s, lodging.n_bytes / self._bytes_per_s)
            if n_left > 0 and gauge.pays_to_come(n_left, self.most) and lodging.take():
                gauge.comes()
        return lodging.is_taken

    def saw_pass(self, before: Counters, after: Counters) -> None:
        """The pass that verifies the last draft was computed."""
        seconds, wait_s = after.seconds - before.seconds, after.wait_s - before.wait_s
        self._see_rate(after.bytes_read - before.bytes_read, seconds)
        drafting_s = self.drafting_s - self._reading_s
        self._took = PassTime(seconds + drafting_s, seconds - wait_s, drafting_s)

    def verified(self, n_drafted: int, tokens: Sequence[int]) -> None:
        """The tokens that the pass gave in the end: the accepted ones and one more."""
        if not self.drafter.is_ready:
            return  # the disk is busy with the drafter: no pass is like those that will follow
        if self.drafter.lodging and self._reading_s:
            self._gauge.see_other(self._reading_s)
        if n_drafted:
            self._unused = []
            self._gauge.see_drafted(self._took, n_drafted, len(tokens))
            self._gauge.see_right(self._grade, len(tokens) - 1, n_drafted)
        elif self.drafter.lodging and (self.drafter.lodging.is_taken or not self._is_usual):
            for_drafts = self.drafter.lodging.is_taken or self._has_left
            self._gauge.see_other(self._took.seconds, len(tokens), for_drafts=for_drafts)
            self._is_usual, self._has_left = True, False
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
