"""Batches whose blocks are counted: to be traced, or to be given out while nobody knows how long answers become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from runtime.answer.admission import Admission, Pressure
from runtime.answer.batch import Batch, Finished, Running, Wanted
from runtime.answer.generate import Request
from runtime.answer.pool import Pool
from runtime.answer.scheduler import Job
from runtime.answer.swapping import Saved, Swapping
from runtime.engine.engine import Engine
from runtime.llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Parts:
    """What a batch is made of; between_passes: the place to adopt a new plan."""

    engine: Engine
    tokenizer: Tokenizer
    between_passes: Callable[[], None]


class CountedBatch(Batch):
    """A batch that admits as ever, but in whole blocks of a pool, which sees them come and go."""

    def __init__(self, parts: Parts, pool: Pool, *, in_blocks: bool = False) -> None:
        """in_blocks: see Batch."""
        super().__init__(parts.engine, parts.tokenizer, parts.between_passes, shares=False, in_blocks=in_blocks)
        self.pool = pool
        self._limits = replace(self._limits, n_unit=pool.block_tokens)

    def _counts(self) -> list[int]:
        counts = super()._counts()
        for running, n in zip(self._running, counts, strict=True):
            self.pool.hold(running.number, running.n_cached + n)
        return counts

    def _leave(self, running: Running, finish: str) -> Finished:
        self.pool.free(running.number)
        return super()._leave(running, finish)


class PressedBatch(Batch):
    """A batch that admits without knowing lengths, and swaps texts out and in."""

    def __init__(self, parts: Parts, pool: Pool, admission: Admission, swapping: Swapping) -> None:
        super().__init__(parts.engine, parts.tokenizer, parts.between_passes, shares=False)
        self.pool, self._swapping = pool, swapping
        self.counts, self.swap_times = pool.counts, swapping.times
        self._pressure = Pressure(pool, admission, self._limits)
        self._saved: dict[int, Saved] = {}

    def can_ever_run(self, request: Request) -> bool:
        """Whether the pool is large enough for an answer when nothing else is in it."""
        return self._pressure.fits(Job(len(request.prompt), 0, request.n_predict))

    def _may_join(self, request: Request) -> bool:
        return self._pressure.may_join(Job(len(request.prompt), 0, request.n_predict))

    def _join(self, wanted: Wanted) -> Running:
        running = super()._join(wanted)
        self._pressure.join(running.number, running.job)
        return running

    def _counts(self) -> list[int]:
        turn = self._pressure.next_turn({running.number: running.job for running in self._running})
        for running in self._running:
            if running.number in turn.swap_out:
                blocks = turn.swap_out[running.number]
                self._saved[running.number] = self._swapping.out(running.sequence, running.n_cached, blocks)
                self._free.append(running.sequence)
        for running in self._running:
            if running.number in turn.swap_in:
                running.sequence = self._free.pop()
                self._swapping.back(running.sequence, self._saved.pop(running.number))
        return [turn.tokens.get(running.number, 0) for running in self._running]

    def _leave(self, running: Running, finish: str) -> Finished:
        self._pressure.leave(running.number)
        return super()._leave(running, finish)
