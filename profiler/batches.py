"""What a pass over one token of each of several texts takes: time and memory, of passes as `h2o batch` computes them.

Everything is streamed and the waits for it are left out, as in compute.py; then everything is in memory, where there is
room for that: weights are rearranged there, and no weight is handed over in a pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from profiler.awake import Waker
from profiler.model_profile import BatchProfile, Spread
from runtime.answer.sampler import Sampler, Sampling
from runtime.engine.engine import Engine
from runtime.engine.pass_memory import Use
from runtime.llama.cell_memory import CellMemory, state_bytes
from runtime.passes import Part, Pass
from runtime.plans.plan import Plan
from runtime.plans.residency import streamable_bytes
from runtime.settings import Settings

if TYPE_CHECKING:
    from runtime.kv.apart import SequenceAttention

N_TEXTS = (2, 16)
POSITIONS, MORE_POSITIONS = 64, 192  # of each text before what is measured: attention takes a part of the time
POSITIONS_EACH = 256
_WARM = 2  # the second one of a shape is like all that follow
DISTURBED = 1.25  # a time that is so many times the shortest one was disturbed


def settings_of(settings: Settings, n_texts: int) -> Settings:
    """The settings of an engine for n_texts."""
    return replace(settings, n_sequences=n_texts, n_logits=n_texts, n_ctx=n_texts * POSITIONS_EACH)


def untouched_bytes(engine: Engine, repeats: int) -> int:
    """What measuring does not touch of keys and values where texts share what they have read."""
    needs, settings = engine.layout.needs, engine.settings
    touched = MORE_POSITIONS + settings.n_sequences * (_WARM + 2 * repeats)
    return max(0, needs.kv_bytes(settings.n_ctx) - needs.kv_bytes(touched))


def measure_batch(
    engine: Engine, repeats: int, passed: Callable[[], None], *, room_bytes: int, spare_bytes: int
) -> BatchProfile:
    """Measure passes of as many texts as the engine has sequences. It streams everything.

    room_bytes: what weights may take in memory; spare_bytes: what measuring may take besides the engine with all its
    positions (below 0: not all of them fit). passed is called after each pass.
    """
    file, n_texts, needs = engine.file, engine.settings.n_sequences, engine.layout.needs
    short, long = (needs.ledger(Use(long=long, rows=n_texts)) for long in (False, True))
    sizes = [n.compute_bytes + n.embedding_bytes + n.sampler_bytes + n.attention_bytes for n in (short, long)]
    clock = _Clock(engine, n_texts, repeats, passed, spare_bytes)
    try:
        streamed = clock.quiet_spread(POSITIONS)
        resident, weights, more = None, streamable_bytes(file), clock.quiet_spread
        if weights <= room_bytes:
            engine.apply(Plan(file.n_layers, 1, pinned_bytes=weights))
            resident, more = clock.spread(POSITIONS), clock.spread
        position_s = 0.0
        if engine.attention:  # else texts have no positions yet
            more_s = more(MORE_POSITIONS).mean - (resident or streamed).mean
            position_s = max(0.0, more_s) / (MORE_POSITIONS - POSITIONS) / n_texts
    finally:
        clock.close()
    return BatchProfile(n_texts, sizes[0], max(0, sizes[1] - sizes[0]), streamed, resident, position_s)


class _Clock:
    """Passes over one token of each text, and the choice of the next tokens."""

    def __init__(
        self, engine: Engine, n_texts: int, repeats: int, passed: Callable[[], None], spare_bytes: int
    ) -> None:
        self._engine, self._n_texts, self._repeats, self._passed = engine, n_texts, repeats, passed
        self._spare_bytes = spare_bytes
        self._sampler = Sampler(Sampling(temp=0), engine.n_vocab, ())
        self._n_done = 0

    def quiet_spread(self, n_positions: int) -> Spread:
        """spread() while the readers rest in computations, which begin with all threads awake."""
        waker = Waker(self._engine.settings.n_threads)
        self._engine.weights.quiet = waker.wake
        try:
            return self.spread(n_positions)
        finally:
            self._engine.weights.quiet = None
            waker.close()

    def spread(self, n_positions: int) -> Spread:
        """Seconds of a pass without its waits for reads: of the fastest ones, after two that warm up."""
        engine = self._engine
        for i in range(self._n_texts):
            engine.truncate(0, i)
        self._n_done = n_positions if engine.attention else 0
        if engine.attention:
            self._read(engine.attention, n_positions)
        for _ in range(_WARM):
            self._seconds()
        times: list[float] = []
        while len(times) < self._repeats or (len(times) < 2 * self._repeats and self._disturbed(times)):
            times.append(self._seconds())
            times.sort()
        return Spread.of(times[: self._repeats])

    def _read(self, attention: SequenceAttention, n_positions: int) -> None:
        """Give all texts the same n_positions, computed once.

        Each has copies of its own: to attend to those takes longer than to others' that were just read. Where there is
        no memory to copy through, they share them.
        """
        engine, others = self._engine, range(1, self._n_texts)
        tokens = tuple(i % engine.n_vocab for i in range(n_positions))
        for first in range(0, n_positions, POSITIONS):
            engine.compute([Pass((Part(0, first, tokens[first : first + POSITIONS], 0, long=True),))])
        n_bytes = state_bytes(attention.position_bytes, n_positions, engine.file.n_layers)
        if n_bytes > self._spare_bytes:
            for i in others:
                engine.share(0, i, n_positions)
            return
        order = sorted(range(n_positions), key=attention.cells[0].__getitem__)
        with closing(CellMemory(engine.context, n_bytes)) as memory:
            memory.save(0)
            for i in others:
                engine.layout.make_cells(n_positions)
                cells = attention.next_cells(n_positions)
                memory.load(i)
                attention.put_back(i, order, cells)

    def _disturbed(self, times: list[float]) -> bool:
        return times[self._repeats - 1] > DISTURBED * times[0]

    def _seconds(self) -> float:
        engine, n_texts = self._engine, self._n_texts
        tokens = [(self._n_done * 7919 + i * 104729) % engine.n_vocab for i in range(n_texts)]
        parts = tuple(Part(i, self._n_done, (token,), 1) for i, token in enumerate(tokens))
        begin_s, waited_s = time.perf_counter(), engine.counters.wait_s
        engine.compute([Pass(parts, decode=True)])
        for i in range(-n_texts, 0):
            engine.is_number(self._sampler.sample(engine, i), i)
        took_s = time.perf_counter() - begin_s - (engine.counters.wait_s - waited_s)
        self._n_done += 1
        self._passed()
        return took_s

    def close(self) -> None:
        """Free the sampler."""
        self._sampler.close()
