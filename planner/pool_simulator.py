"""A batch under pressure without an engine: the same pool, the same policies, the same passes; only time is a model.

Who joins, what a pass computes and what is swapped are the functions that a real batch calls. So counts are exact
where the lengths of prompts and answers are, and seconds are as good as Costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from runtime.answer.admission import Admission, Pressure, Turn
from runtime.answer.pool import Counts, Pool
from runtime.answer.scheduler import Job, Limits, may_join, next_pass


class Text(NamedTuple):
    """Tokens of a prompt, the most of its answer, and those that really come; in tokens, each at least 1.

    at_pass: when it arrives (see Arrivals).
    """

    n_prompt: int
    n_most: int
    n_answer: int
    at_pass: int = 0


class Arrivals:
    """Which texts are there already. Time is counted in passes; while there is nothing to answer it is skipped."""

    def __init__(self, at_pass: Sequence[int]) -> None:
        """at_pass: for each text in order, before which pass it arrives (0: the first)."""
        self._at_pass, self._skipped = at_pass, 0

    def is_here(self, number: int, n_passes: int, n_running: int) -> bool:
        """Whether the number-th text is there after n_passes, when so many are running."""
        at_pass = self._at_pass[number]
        if not n_running:
            self._skipped = max(self._skipped, at_pass - n_passes)
        return at_pass <= n_passes + self._skipped


class Work(NamedTuple):
    """What a pass computes: tokens of prompts, texts that get their next token, and positions that those look at."""

    n_prompt_tokens: int
    n_texts: int
    n_positions: int

    @classmethod
    def of(cls, jobs: Sequence[Job], counts: Sequence[int]) -> Work:
        """With so many tokens of each job."""
        answering = [job for job, n in zip(jobs, counts, strict=True) if n and not job.n_unread]
        n_prompt_tokens = sum(n for job, n in zip(jobs, counts, strict=True) if job.n_unread)
        return cls(n_prompt_tokens, len(answering), sum(job.n_cached + 1 for job in answering))


@dataclass(frozen=True)
class Costs:
    """Seconds: of a pass, of each part of its Work, and of a block that is swapped."""

    pass_s: float
    prompt_token_s: float
    text_s: float
    position_s: float
    block_out_s: float
    block_in_s: float

    def of(self, work: Work) -> float:
        """Seconds of a pass."""
        parts = self.prompt_token_s * work.n_prompt_tokens + self.text_s * work.n_texts
        return self.pass_s + parts + self.position_s * work.n_positions


def fitted(passes: Sequence[tuple[Work, float]], block_out_s: float, block_in_s: float) -> Costs:
    """The costs that are nearest to passes and their seconds; what would be negative is 0.

    Least squares, where the square of an error may be as large as the pass is long.
    """
    seconds = np.array([s for _, s in passes])
    known = np.array([(1, *work) for work, _ in passes], dtype=float) / np.sqrt(seconds)[:, None]
    used = list(range(known.shape[1]))
    while True:
        found = np.linalg.lstsq(known[:, used], np.sqrt(seconds), rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(np.argmin(found)))
    costs = dict.fromkeys(range(known.shape[1]), 0.0) | dict(zip(used, found.tolist(), strict=True))
    return Costs(costs[0], costs[1], costs[2], costs[3], block_out_s, block_in_s)


@dataclass
class Outcome:
    """What a batch took. Tokens that were chosen, and those of prompts; texts that could never fit are only counted.

    swap_s: seconds that are swaps'.
    """

    seconds: float = 0.0
    swap_s: float = 0.0
    n_passes: int = 0
    n_tokens: int = 0
    n_prompt_tokens: int = 0
    n_refused: int = 0
    counts: Counts = field(default_factory=Counts)


def simulate(texts: Sequence[Text], pool: Pool, admission: Admission, limits: Limits, costs: Costs) -> Outcome:
    """Answer all texts, each admitted in its order as soon as it is there and may be. pool: an empty one, left empty.

    limits: as the engine's, with the cells of the pool's fast tier.
    """
    return _Simulated(pool, admission, limits, costs).run(texts)


class _Simulated:
    def __init__(self, pool: Pool, admission: Admission, limits: Limits, costs: Costs) -> None:
        self._pool, self._costs = pool, costs
        self._limits = replace(limits, n_unit=pool.block_tokens)
        self._pressure = None if admission.knows_lengths else Pressure(pool, admission, limits)
        self._jobs: dict[int, Job] = {}
        self._ends: dict[int, int] = {}  # n_left of a job whose answer ends
        self._outcome = Outcome(counts=pool.counts)

    def run(self, texts: Sequence[Text]) -> Outcome:
        possible = [(job, text) for text in texts if self._fits(job := Job(text.n_prompt, 0, text.n_most))]
        self._outcome.n_refused = len(texts) - len(possible)
        arrivals = Arrivals([text.at_pass for _, text in possible])
        n_joined = 0
        while n_joined < len(possible) or self._jobs:
            while n_joined < len(possible) and arrivals.is_here(n_joined, self._outcome.n_passes, len(self._jobs)):
                job, text = possible[n_joined]
                if not self._may_join(job):
                    break
                self._jobs[n_joined], self._ends[n_joined] = job, text.n_most - text.n_answer
                if self._pressure:
                    self._pressure.join(n_joined, job)
                n_joined += 1
            self._step()
        return self._outcome

    def _fits(self, new: Job) -> bool:
        return self._pressure.fits(new) if self._pressure else may_join([], new, self._limits)

    def _may_join(self, new: Job) -> bool:
        if self._pressure:
            return self._pressure.may_join(new)
        return may_join(list(self._jobs.values()), new, self._limits)

    def _step(self) -> None:
        """One pass, and what is chosen after it."""
        jobs, outcome, costs = self._jobs, self._outcome, self._costs
        turn = self._pressure.next_turn(jobs) if self._pressure else self._turn()
        counts = [turn.tokens.get(sequence, 0) for sequence in jobs]
        work = Work.of(list(jobs.values()), counts)
        swap_s = costs.block_out_s * sum(map(len, turn.swap_out.values()))
        swap_s += costs.block_in_s * sum(map(len, turn.swap_in.values()))
        outcome.swap_s += swap_s
        outcome.seconds += costs.of(work) + swap_s
        outcome.n_passes += 1
        outcome.n_prompt_tokens += work.n_prompt_tokens
        for sequence, n in zip(list(jobs), counts, strict=True):
            job = jobs[sequence].after(n)
            outcome.n_tokens += jobs[sequence].n_left - job.n_left
            jobs[sequence] = job
            if job.n_left == self._ends[sequence]:
                self._leave(sequence)

    def _turn(self) -> Turn:
        """The next pass where nothing is ever swapped out."""
        jobs = self._jobs
        counts = next_pass(list(jobs.values()), self._limits)
        for (sequence, job), n in zip(jobs.items(), counts, strict=True):
            self._pool.hold(sequence, job.n_cached + n)
        return Turn(tokens=dict(zip(jobs, counts, strict=True)))

    def _leave(self, sequence: int) -> None:
        del self._jobs[sequence]
        if self._pressure:
            self._pressure.leave(sequence)
        else:
            self._pool.free(sequence)
