"""Whether drafts pay: what passes cost and how often proposals are right, measured all the time."""

from __future__ import annotations

import math
from typing import NamedTuple

_MEMORY = 16  # observations a running mean remembers
_OUTLIER = 4  # times the mean
_MARGIN = 0.05  # predicted gain below which one token per pass is better: predictions are no more exact than that
_LOSS_SHARE = 0.01  # of all time that may be lost to drafts that did not pay
_PLAIN_EVERY = 64  # passes after which one without a draft is made, to know what it costs
_WORTH_TAKING = 3  # times its cost that a draft model has to save before it takes memory from the weights
_GAIN_TAKING = 1.2  # and the least speed it has to promise
ODDS_POWER = 0.5  # a draft model proposes a token about as often as its probability to this power
_DOUBT = 0.5  # x that power: in what one token tells of that, it may be right so much less often
_LEAST_SEEN = 3  # tokens of an answer that tell whether it will
_UNSURE = 6  # observations that what was seen without the draft model counts for
_TRIAL_TOKENS = 3  # drafted in a trial of a drafter that did not pay
_HOPE = 32  # passes without a draft after which there is little hope
_FADE, _FADE_EVERY = 0.08, 8  # share of an old measurement that is forgotten in so many passes without a draft
_GROWTH = 0.5  # the least computing time of one more position, as a share of the first one's, until it is measured
_DEARER = 1.5  # and what it takes among a few, beside one of the many of a prompt (2 and 8 of SmolLM2-135M Q4_1: 1.4)
_FIRST_RIGHT = {1: 0.3, 2: 0.5, 3: 0.7}  # by grade; how often the first proposal is right, until it is measured
_NEXT_RIGHT = 0.7


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

    def doubt(self) -> None:
        """What was seen was not quite what is asked: let it weigh little beside what will be."""
        self._weight = min(self._weight, _UNSURE)


class PassTime(NamedTuple):
    """What one pass took: all of it with drafting, and the parts that went into drafting and computing."""

    seconds: float
    compute_s: float
    drafting_s: float = 0.0


class Gauge:
    """How many tokens to draft: the number with the most expected tokens per second, as far as measured."""

    def __init__(self, relative_cost: float = 0.0, odds_power: float = ODDS_POWER) -> None:
        """relative_cost: the drafter's; odds_power: how often it proposes a token, as a power of its probability."""
        self._relative_cost, self._odds_power = relative_cost, odds_power
        self._doubt = _DOUBT * odds_power
        self._right = _NEXT_RIGHT ** (odds_power / ODDS_POWER)  # how often a proposal is right, until it is measured
        self._pass_s: Mean | None = None  # one pass without a draft
        self._compute_s: Mean | None = None
        self._growth: Mean | None = None  # computing time of one more position, as a share of the first one's
        self._prompt = (1, 0.0)  # positions and computing time of a pass of the prompt
        self._drafting: Mean | None = None  # drafting one token / a pass without a draft
        self._ratios: dict[int, Mean] = {}  # pass with n drafted tokens / pass without a draft
        self._first: dict[int, Mean] = {}
        self._next = Mean(self._right)
        self._total_s = self._lost_s = 0.0
        self._since_plain = self._since_draft = 0
        self._here_s: float | None = None  # a pass without a draft, while the drafter has the place of weights
        self._coming_s = 0.0  # to read the drafter
        self._n_odds, self._n_vain, self._not_before_s, self._saved_before_s = 0, 0, 0.0, 0.0
        self.saved_s = 0.0  # by drafts, beside passes without; negative: lost

    # --- measuring ----------------------------------------------------------------------------------------------

    def see_prompt(self, n_positions: int, seconds: float, compute_s: float, disk_s: float) -> None:
        """A pass of the prompt. disk_s: what reading the streamed weights once takes at the rate seen.

        When it waited for the disk most of the time, and will wait again, a few more positions are known to be free.
        What its positions took to compute tells what drafted ones may cost.
        """
        if n_positions == 1:
            self.see_plain(PassTime(seconds, compute_s))
            return
        self._total_s += seconds
        self._prompt = n_positions, compute_s
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
            if self._growth:
                self._growth.fade(min(self._growth.value, self._guessed_growth))
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
        self.saved_s += n_tokens * plain_s - took.seconds
        self._growth = self._growth or Mean(self._guessed_growth)
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
        if self._here_s is None:
            (self._next if i else self._first_right(grade)).see(right)
        else:  # a model is as often right with the first token as with others, and it has to be known soon
            self._see_both(right)

    def see_odds(self, odds: float) -> None:
        """How likely a token was that was not drafted."""
        self._n_odds += 1
        self._see_both(odds**self._odds_power)

    def _see_both(self, right: float) -> None:
        self._first_right(0).see(right)
        self._next.see(right)

    def see_other(self, seconds: float, n_tokens: int = 0, *, for_drafts: bool = True) -> None:
        """Time that went into no usual pass, and the tokens it gave. for_drafts: the drafter's coming and going."""
        self._total_s += seconds
        if for_drafts and self._pass_s:
            self.saved_s += n_tokens * self._pass_s.value - seconds

    # --- a drafter that takes the place of weights ------------------------------------------------------------------

    def price(self, here_s: float, coming_s: float) -> None:
        """What a pass would take at least with the drafter in memory, and what it takes to read it."""
        self._here_s, self._coming_s = here_s, coming_s

    def begin(self) -> None:
        """A new answer: what the tokens of the last one said of drafts counts little."""
        self._n_odds = 0
        self._first_right(0).doubt()
        self._next.doubt()

    def pays_to_come(self, n_left: int, most: int) -> bool:
        """Whether a drafter that is not in memory should be, for n_left tokens and drafts of at most `most`."""
        if self._pass_s is None or self._n_odds < _LEAST_SEEN or self._total_s < self._not_before_s:
            return False
        doubt = self._doubt / math.sqrt(min(self._n_odds, _MEMORY))
        gain = max(self._gains(0, min(n_left, most), doubt))
        saved_s = n_left * self._pass_s.value * (1 - 1 / gain)
        return gain > _GAIN_TAKING and saved_s > _WORTH_TAKING * self._visit_s()

    def comes(self) -> None:
        """It comes: what odds said of it counts little beside what it does."""
        self._saved_before_s = self.saved_s
        self._first_right(0).doubt()
        self._next.doubt()

    def pays_to_go(self, n_left: int, most: int) -> bool:
        """Whether the drafter should give its place back to the weights."""
        gain = max(self._gains(0, min(n_left, most), -self._doubt / math.sqrt(_MEMORY)))
        lost_s = n_left * self._pass_s.value * (1 / gain - 1) if self._pass_s else 0.0
        return gain < 1 - _MARGIN and lost_s > self._visit_s() - self._coming_s

    def goes(self) -> None:
        """It goes, and comes again when another visit in vain would be a small share of all time, and ever smaller."""
        self._n_vain = 0 if self.saved_s > self._saved_before_s else self._n_vain + 1
        self._not_before_s = self._total_s + 2**self._n_vain * self._visit_s() / (2 * _LOSS_SHARE)

    def _visit_s(self) -> float:
        """What it costs to read the drafter, and later the weights again whose place it took."""
        plain_s = self._pass_s.value if self._pass_s else 0.0
        return self._coming_s + max(0.0, (self._here_s or 0.0) - plain_s)

    @property
    def is_hopeful(self) -> bool:
        """Whether drafts paid lately, or were not tried for long enough to know."""
        return self._since_draft < _HOPE

    # --- deciding -----------------------------------------------------------------------------------------------

    def best(self, grade: int, most: int) -> int:
        """How many tokens to draft, 0 to most."""
        if most < 1 or self._pass_s is None:
            return 0
        gains = self._gains(grade, most)
        best = max(range(most), key=gains.__getitem__) + 1
        if self._here_s is not None:
            return best
        if self._since_plain >= _PLAIN_EVERY or self._lost_s > _LOSS_SHARE * self._total_s:
            return 0
        if gains[best - 1] > 1 + _MARGIN:
            return best
        return self._trial(most) if self._relative_cost else 0

    def _trial(self, most: int) -> int:
        """A drafter that costs time and did not pay is tried again when the trial's cost has become small."""
        n = min(most, _TRIAL_TOKENS)
        wait = max(_PLAIN_EVERY, (self._ratio(n) - 1) / (_LOSS_SHARE / 2))
        return n if self._since_draft >= wait else 0

    def _gains(self, grade: int, most: int, doubt: float = 0.0) -> list[float]:
        """Tokens per time with 1 to `most` drafted tokens, as multiples of those without."""
        return [self._tokens(grade, n, doubt) / self._ratio(n) for n in range(1, most + 1)]

    def _tokens(self, grade: int, n: int, doubt: float = 0.0) -> float:
        """Tokens expected of a pass with n drafted ones. doubt: they are right so much less often than is known."""
        right = min(1.0, max(0.0, self._next.value - doubt))
        rest = n if right > 0.999 else (1 - right**n) / (1 - right)
        return 1 + min(1.0, max(0.0, self._first_right(grade).value - doubt)) * rest

    def _first_right(self, grade: int) -> Mean:
        if grade not in self._first:
            self._first[grade] = Mean(_FIRST_RIGHT.get(grade, self._right))
        return self._first[grade]

    def _ratio(self, n: int) -> float:
        """Time of a pass with n drafted tokens, as a multiple of one without."""
        return self._ratios[n].value if n in self._ratios else self._guessed_ratio(n)

    @property
    def _guessed_growth(self) -> float:
        """Computing time of one more position, until it is measured: more than those of the prompt took."""
        n_positions, seconds = self._prompt
        if n_positions == 1 or self._compute_s is None or not self._compute_s.value:
            return _GROWTH
        growth = _DEARER * (seconds / self._compute_s.value - 1) / (n_positions - 1)
        return min(1.0, max(_GROWTH, growth))

    def _guessed_ratio(self, n: int) -> float:
        if self._pass_s is None or self._compute_s is None or not self._pass_s.value:
            return math.inf
        compute = self._compute_s.value / self._pass_s.value
        growth = self._growth.value if self._growth else self._guessed_growth
        drafting = self._drafting.value if self._drafting else compute * self._relative_cost
        if self._here_s is None:
            return 1.0 + (compute * growth + drafting) * n  # as if computing never overlapped with reading
        # Where weights give way to the drafter, passes wait for the disk, and more positions are computed meanwhile.
        least = max(1.0, self._here_s / self._pass_s.value)
        return max(least, compute * (1 + growth * n)) + drafting * n
