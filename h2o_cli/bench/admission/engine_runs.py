"""Runs of the real engine whose answers have the lengths of a workload; what its passes and swaps take.

In CPU seconds of one thread, with all in memory. What else runs on the machine makes them longer all the same, by
turns: so runs are repeated, and what they say is a median or has an interval.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from h2o_cli.bench.admission.rows import Run
from h2o_cli.bench.admission.workload import Arrival
from h2o_cli.bench.batch.batch_run import Endless
from h2o_cli.output import note
from h2o_cli.session.batch_pool import RAM, RAM_SHARE, PoolChoice, position_bytes
from h2o_cli.session.caller import Caller
from h2o_cli.session.model import OpenModel
from h2o_cli.session.opening import Session, open_session
from h2o_cli.session.options import SessionOptions
from h2o_cli.session.smallest import CONVERSATION
from planner.pool_simulator import Arrivals, Costs, Outcome, Text, Work, fitted, simulate
from runtime.answer.admission import Admission
from runtime.answer.batch import Running, Wanted
from runtime.answer.generate import STOP, Request
from runtime.answer.pool import BLOCK_TOKENS, FAST, Pool
from runtime.answer.pressed import Parts, PressedBatch
from runtime.answer.sampler import Sampling
from runtime.answer.scheduler import Job, Limits
from runtime.answer.swapping import Saved, Swapping
from runtime.kv.slow_tier import RamTier
from runtime.llama.cell_memory import state_bytes
from runtime.plans.budget import Budget

GREEDY = Sampling(temp=0)


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, the most of its answer, how many come, and when it arrives."""

    tokens: tuple[int, ...]
    n_most: int
    n_answer: int
    at_pass: int

    @property
    def job(self) -> Job:
        """As the scheduler sees it."""
        return Job(len(self.tokens), 0, self.n_most)

    @property
    def text(self) -> Text:
        """As the simulator sees it."""
        return Text(len(self.tokens), self.n_most, self.n_answer, self.at_pass)


class _TimedSwapping(Swapping):
    """Adds up what swaps take, on each way: blocks of the pool and seconds."""

    def __init__(self, session: Session, slow: RamTier, block_bytes: int) -> None:
        super().__init__(session.engine, slow, block_bytes)
        self.n_out = self.n_in = 0
        self.out_s = self.in_s = 0.0

    def out(self, sequence: int, n_positions: int, blocks: Sequence[int]) -> Saved:
        """Save."""
        start = time.process_time()
        try:
            return super().out(sequence, n_positions, blocks)
        finally:
            self.out_s += time.process_time() - start
            self.n_out += len(blocks)

    def back(self, sequence: int, saved: Saved) -> None:
        """Put back."""
        start = time.process_time()
        super().back(sequence, saved)
        self.in_s += time.process_time() - start
        self.n_in += len(saved.blocks)


class _TimedBatch(PressedBatch):
    """Texts arrive and answers end when the workload says; what each pass computes is kept."""

    def __init__(
        self, parts: Parts, pool: Pool, admission: Admission, swapping: _TimedSwapping, prompts: Sequence[Prompt]
    ) -> None:
        """prompts: those that are going to be answered; a text's key is its place there."""
        super().__init__(parts, pool, admission, swapping)
        self.limits: Limits = self._limits
        self.works: list[Work] = []
        self._lengths = [prompt.n_answer for prompt in prompts]
        self._arrivals = Arrivals([prompt.at_pass for prompt in prompts])

    def _may_join(self, request: Request) -> bool:
        is_here = self._arrivals.is_here(self.n_joined, len(self.works), self.n_running)
        return is_here and super()._may_join(request)

    def _counts(self) -> list[int]:
        counts = super()._counts()
        self.works.append(Work.of([running.job for running in self._running], counts))
        return counts

    def _take(self, running: Running, token: int) -> str:
        finish = super()._take(running, token)
        return finish or (STOP if running.n_chosen == self._lengths[running.wanted.key] else "")


class PressedEngine:
    """A model in memory whose cache has room for a pool of so many blocks, or less, and a slow tier in memory."""

    def __init__(self, session: Session, fast: int, n_sequences: int) -> None:
        self._session, self._n_sequences, self.most_fast = session, n_sequences, fast
        file = session.model.file
        self._block_bytes = state_bytes(position_bytes(file, "f16"), BLOCK_TOKENS, file.n_layers)
        self.limits: Limits | None = None
        self._timed: dict[tuple[str, int], list[list[tuple[Work, float]]]] = {}
        self._swapped = [0, 0.0, 0, 0.0]  # blocks and seconds out, and in

    def slow(self, fast: int) -> int:
        """Blocks of the slow tier beside such a pool."""
        return fast * min(RAM_SHARE, self._n_sequences - 1)

    def prompts(self, arrivals: Sequence[Arrival]) -> list[Prompt]:
        """The tokens of texts."""
        encode = self._session.model.tokenizer.encode
        return [
            Prompt(tuple(encode(text.prompt)), text.n_predict, max(1, round(text.share * text.n_predict)), text.at_pass)
            for text in arrivals
        ]

    def run(self, prompts: Sequence[Prompt], admission: Admission, seed: int, fast: int, *, fit: bool = False) -> Run:
        """Answer texts in a pool of `fast` blocks.

        fit: what it takes is what costs() are fitted to; those with one admission and pool have the same texts.
        """
        with ExitStack() as opened:
            slow = RamTier(self.slow(fast), self._block_bytes)
            opened.callback(slow.close)
            swapping = _TimedSwapping(self._session, slow, self._block_bytes)
            opened.callback(swapping.close)
            times: list[tuple[float, float]] = []

            def between() -> None:
                times.append((time.process_time(), swapping.out_s + swapping.in_s))

            tokenizer = Endless(self._session.model.tokenizer)
            parts = Parts(self._session.engine, tokenizer, between)  # type: ignore[arg-type]
            pool = Pool(fast, self.slow(fast))
            possible = [prompt for prompt in prompts if pool.blocks_for(prompt.job.most_cells) <= fast]
            batch = _TimedBatch(parts, pool, admission, swapping, possible)
            self.limits = batch.limits
            requests = [Request(prompt.tokens, prompt.n_most) for prompt in possible]
            for _ in batch.answer(iter([Wanted(i, request, GREEDY) for i, request in enumerate(requests)])):
                pass
            between()
        outcome = Outcome(
            seconds=times[-1][0] - times[0][0],
            swap_s=swapping.out_s + swapping.in_s,
            n_passes=len(batch.works),
            n_tokens=batch.n_tokens,
            n_prompt_tokens=batch.n_prompt_tokens,
            n_refused=len(prompts) - len(possible),
            counts=pool.counts,
        )
        if fit:
            seconds = [end - start - (after - before) for (start, before), (end, after) in pairwise(times)]
            passes = list(zip(batch.works, seconds, strict=True))
            self._timed.setdefault((str(admission), fast), []).append(passes)
            found = swapping.n_out, swapping.out_s, swapping.n_in, swapping.in_s
            self._swapped = [a + b for a, b in zip(self._swapped, found, strict=True)]
        return run_of(outcome, seed)

    def costs(self, last: int = 0) -> Costs:
        """What passes and swaps took in the runs to fit; the same pass of several runs counts with its median.

        last: so many runs of each kind, 0 for all. Swaps are too short to be told from a single run.
        """
        passes = [
            (same[0][0], statistics.median(seconds for _, seconds in same))
            for runs in self._timed.values()
            for same in zip(*runs[-last:], strict=True)
        ]
        n_out, out_s, n_in, in_s = self._swapped
        return fitted(passes, out_s / max(1, n_out), in_s / max(1, n_in))


def run_of(outcome: Outcome, seed: int) -> Run:
    """As a row keeps it."""
    counts = outcome.counts
    return Run(
        seed=seed,
        seconds=outcome.seconds,
        swap_s=outcome.swap_s,
        n_passes=outcome.n_passes,
        n_tokens=outcome.n_tokens,
        n_prompt_tokens=outcome.n_prompt_tokens,
        n_refused=outcome.n_refused,
        swaps_in=counts.swaps_in,
        swaps_out=counts.swaps_out,
        blocks_in=counts.blocks_in,
        blocks_out=counts.blocks_out,
    )


@contextmanager
def open_engine(path: Path, fast: int, n_sequences: int) -> Iterator[PressedEngine]:
    """A model with room for a pool of `fast` blocks, for so many texts at once. Raises H2OError."""
    options = SessionOptions(
        model=path,
        sequences=n_sequences,
        kind=CONVERSATION,
        budget=Budget.parse(None),
        ctx=fast * BLOCK_TOKENS,
        threads=1,
        sampling=GREEDY,
        speculate="off",
    )
    choice = PoolChoice(Admission.parse("none"), Path(tempfile.gettempdir()), swap=RAM)
    model = OpenModel(options, Caller(note))
    try:
        options = choice.options_for(model.file, options)
        session = open_session(model, options, options.ctx or 0, options.ctx or 0)
        try:
            yield PressedEngine(session, fast, n_sequences)
        finally:
            session.close()
    finally:
        model.close()


def simulated(texts: Sequence[Text], pool: Pool, admission: Admission, limits: Limits, costs: Costs, seed: int) -> Run:
    """The same run without the engine, whose limits these are."""
    limits = replace(limits, n_cells=pool.size[FAST] * BLOCK_TOKENS)
    return run_of(simulate(texts, pool, admission, limits, costs), seed)
