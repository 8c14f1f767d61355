"""Who is admitted while nobody knows how long answers become, and who steps aside when the pool is full.

Pure: a Pool is counted, nothing is computed or copied. The batch does both with what `Pressure` says; a simulator does
neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.answer.pool import FAST, SLOW, Pool
from runtime.answer.scheduler import Job, Limits, next_pass
from runtime.errors import UsageError

SIMULATE, NONE, RESERVE, AVERAGE, WATERMARK = "simulate", "none", "reserve", "average", "watermark"
_FORMS = "simulate, none, reserve:O, average:A or watermark:P"


@dataclass(frozen=True)
class Admission:
    """How many blocks stay free when a sequence comes into the fast tier.

    reserve: `value` blocks for each sequence there that begins a block, as many of them as begin one in each pass.
    average: none while each sequence there could have more than `value` blocks; all of them else.
    watermark: a share of the pool. simulate: see scheduler.may_join; it keeps no blocks free.
    """

    kind: str = SIMULATE
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Admission:
        """From --admission. Raises UsageError."""
        kind, colon, number = text.partition(":")
        if kind in (SIMULATE, NONE) and not colon:
            return cls(kind)
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        most = 1.0 if kind == WATERMARK else math.inf
        if kind not in (RESERVE, AVERAGE, WATERMARK) or not 0 <= value < most:
            raise UsageError(f"--admission {text} is not possible", f"give {_FORMS} (reserve:1, watermark:0.02)")
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}" if self.kind in (RESERVE, AVERAGE, WATERMARK) else self.kind

    @property
    def knows_lengths(self) -> bool:
        """Whether what an answer may take at most decides; then nothing ever steps aside."""
        return self.kind == SIMULATE

    def kept_free(self, n_resident: int, n_blocks: int, block_tokens: int) -> int:
        """Blocks that stay free, of n_blocks, when one comes to n_resident sequences in the fast tier."""
        if self.kind == RESERVE:
            return math.ceil(n_resident / block_tokens * self.value)
        if self.kind == AVERAGE and n_resident:
            return 0 if n_blocks / n_resident > self.value else n_blocks
        if self.kind == WATERMARK and n_resident:
            return int(self.value * n_blocks)
        return 0


@dataclass(frozen=True)
class Turn:
    """What comes before the next pass, in this order: sequence -> its blocks in the slow tier; and tokens of each."""

    swap_out: dict[int, tuple[int, ...]] = field(default_factory=dict)
    swap_in: dict[int, tuple[int, ...]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)


class Pressure:
    """Takes blocks for sequences as they grow. When there is none left, the youngest is swapped out.

    What is swapped out comes back in the order of arrival, and before anything new. The oldest sequence always goes on,
    so all of them end: it is never swapped out, as it fits the fast tier alone, and the slow tier has room for the most
    that all others may become. Sequences are numbers that grow with arrival.
    """

    def __init__(self, pool: Pool, admission: Admission, limits: Limits) -> None:
        """limits: its cells are at least the tokens of the pool's fast tier."""
        self.pool, self._admission, self._limits = pool, admission, limits
        self._most: dict[int, int] = {}  # blocks that a sequence may come to

    def fits(self, new: Job) -> bool:
        """Whether the fast tier can hold a sequence to its end."""
        return self.pool.blocks_for(new.most_cells) <= self.pool.size[FAST]

    def may_join(self, new: Job) -> bool:
        """Whether a sequence that fits() can be admitted now."""
        pool, most = self.pool, list(self._most.values())
        if len(most) >= self._limits.n_sequences or len(pool.resident()) < len(most):
            return False
        if sum(most[1:]) + (pool.blocks_for(new.most_cells) if most else 0) > pool.size[SLOW]:
            return False
        return self._may_come(pool.blocks_for(new.n_prompt))

    def join(self, sequence: int, new: Job) -> None:
        """Admit a sequence: it holds blocks for all of its prompt from now on."""
        self._most[sequence] = self.pool.blocks_for(new.most_cells)
        self.pool.hold(sequence, new.n_prompt)

    def leave(self, sequence: int) -> None:
        """A sequence is done."""
        del self._most[sequence]
        self.pool.free(sequence)

    def next_turn(self, jobs: Mapping[int, Job]) -> Turn:
        """Make room for the next token of those in the fast tier, bring others back, and say what the next pass is.

        jobs: all that joined and did not leave.
        """
        turn, pool = Turn(), self.pool
        for sequence in sorted(pool.resident()):
            needed = _needed(jobs[sequence])
            while pool.tier_of(sequence) == FAST and pool.missing(sequence, needed) > pool.n_free():
                youngest = max(pool.resident())
                turn.swap_out[youngest] = pool.swap_out(youngest)
            if pool.tier_of(sequence) == FAST:
                pool.hold(sequence, needed)
        if not turn.swap_out:
            self._bring_back(jobs, turn)
        running = sorted(pool.resident())
        counts = next_pass([jobs[sequence] for sequence in running], self._limits)
        turn.tokens.update((sequence, n) for sequence, n in zip(running, counts, strict=True) if n)
        return turn

    def _bring_back(self, jobs: Mapping[int, Job], turn: Turn) -> None:
        pool = self.pool
        for sequence in sorted(jobs.keys() - set(pool.resident())):
            needed = _needed(jobs[sequence])
            if not self._may_come(pool.blocks_for(needed)):
                return
            turn.swap_in[sequence] = pool.swap_in(sequence)
            pool.hold(sequence, needed)

    def _may_come(self, n_blocks: int) -> bool:
        pool = self.pool
        kept = self._admission.kept_free(len(pool.resident()), pool.size[FAST], pool.block_tokens)
        return n_blocks + kept <= pool.n_free()


def _needed(job: Job) -> int:
    """Tokens that blocks are needed for in the next pass: the whole prompt, or one more than there are."""
    return max(job.n_prompt, job.n_cached + 1)
