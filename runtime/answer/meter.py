"""How fast an answer was: a meter watches its steps and gives the figures."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

from runtime.answer.generate import CANCELLED, Step
from runtime.engine.engine import Counters, Engine
from runtime.memory import device_bytes_read
from runtime.settings import Machine

_RATE_STEPS = 4  # the best observed read rate is taken over this many tokens


class Statistics(NamedTuple):
    """How fast an answer was. None: too few tokens to say.

    limit_ms_per_token is the least a token can take with one token per pass, when reading and computing overlap fully:
    the larger of streamed bytes per pass / disk bytes per second, and the time the resident model computes (None where
    that is not known and may be the larger one). Speculation can be faster than that. bytes_read_per_token is what the
    disk delivered, bytes_asked_per_token what the stream asked for, streamed_bytes_per_pass what the plans in force
    streamed: more and more as keys and values take the place of weights.
    prefill_tokens_per_s is that of the prompt's passes, waits for the disk included.
    """

    n_tokens: int = 0
    ttft_s: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_ms_per_token: float | None = None
    tokens_per_s: float | None = None
    bytes_read_per_token: float | None = None
    bytes_asked_per_token: float | None = None
    streamed_bytes_per_pass: float | None = None
    disk_wait_ms_per_token: float | None = None
    limit_ms_per_token: float | None = None
    tokens_per_pass: float | None = None
    drafted: int = 0
    accepted: int = 0

    @property
    def yield_(self) -> float | None:
        """How close the answer came to the limit: limit / measured."""
        if not self.decode_ms_per_token or self.limit_ms_per_token is None:
            return None
        return self.limit_ms_per_token / self.decode_ms_per_token


@dataclass
class _Seen:
    """What a Meter knew at one step: passes that gave tokens to it, and their parts."""

    at_s: float
    counters: Counters
    n_steps: int
    drafting_s: float


class Meter:
    """Watches the steps of one answer on a machine that a profile may know."""

    def __init__(self, engine: Engine, machine: Machine | None = None) -> None:
        self._engine = engine
        self._machine = machine or Machine()
        self._start_s, self._start = time.perf_counter(), replace(engine.counters)
        self._first: _Seen | None = None
        self._last: _Seen | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RATE_STEPS)  # busy seconds, bytes
        self._best_bytes_per_s = 0.0
        self._plain = [0, 0.0]  # passes without a draft, and their computing time
        self._streamed = [0, 0]  # passes behind the first step, and the bytes that were streamed in them
        self._n_steps, self._drafting_s = 0, 0.0
        self._device_bytes: int | None = None  # at the first step
        self.n_tokens = self._drafted = self._accepted = 0

    def see(self, step: Step) -> None:
        """Take note of a step, when it is there."""
        self.n_tokens += step.token is not None
        self._n_steps += 1
        self._drafted += step.drafted
        self._accepted += step.accepted
        self._drafting_s += step.drafting_s
        if step.finish == CANCELLED:
            return
        now = _Seen(time.perf_counter(), replace(self._engine.counters), self._n_steps, self._drafting_s)
        if self._first is None:
            self._first = self._last = now
            self._device_bytes = device_bytes_read()
        if self._last is None or now.counters.passes != self._last.counters.passes or not self._recent:
            self._see_pass(now, step)
        self._last = now

    def _see_pass(self, now: _Seen, step: Step) -> None:
        """The first step of a pass."""
        if self._last and now is not self._last:
            self._streamed[0] += 1
            self._streamed[1] += self._engine.streamed_bytes
        if self._last and now is not self._last and not step.drafted:
            before = self._last.counters
            self._plain[0] += 1
            self._plain[1] += now.counters.seconds - before.seconds - now.counters.wait_s + before.wait_s
        self._recent.append((now.counters.busy_s, now.counters.bytes_read))
        busy_s = self._recent[-1][0] - self._recent[0][0]
        if len(self._recent) == _RATE_STEPS and busy_s > 0:
            rate = (self._recent[-1][1] - self._recent[0][1]) / busy_s
            self._best_bytes_per_s = max(self._best_bytes_per_s, rate)

    def statistics(self) -> Statistics:
        """The figures so far, right after the last step. The first token counts for ttft_s only."""
        first, last = self._first, self._last
        if first is None or last is None:
            return Statistics(self.n_tokens)
        ttft_s, prompt_s = first.at_s - self._start_s, first.counters.seconds - self._start.seconds
        prefill = (first.counters.tokens - self._start.tokens) / prompt_s if prompt_s else None
        passes = last.counters.passes - first.counters.passes
        if passes <= 0:
            return Statistics(self.n_tokens, ttft_s, prefill)
        n = last.n_steps - first.n_steps
        pass_s = last.counters.seconds - first.counters.seconds
        wait_s = last.counters.wait_s - first.counters.wait_s
        n_bytes = last.counters.bytes_read - first.counters.bytes_read
        streamed = self._streamed[1] / self._streamed[0]
        busy_s = last.counters.busy_s - first.counters.busy_s
        limit_s = self._limit_s(streamed, n_bytes, busy_s, (pass_s - wait_s) / passes)
        return Statistics(
            n_tokens=self.n_tokens,
            ttft_s=ttft_s,
            prefill_tokens_per_s=prefill,
            decode_ms_per_token=1000 * (pass_s + last.drafting_s - first.drafting_s) / n,
            tokens_per_s=n / (last.at_s - first.at_s),
            bytes_read_per_token=self._delivered(n_bytes) / n,
            bytes_asked_per_token=n_bytes / n,
            streamed_bytes_per_pass=streamed,
            disk_wait_ms_per_token=1000 * wait_s / n,
            limit_ms_per_token=None if limit_s is None else 1000 * limit_s,
            tokens_per_pass=n / passes,
            drafted=self._drafted,
            accepted=self._accepted,
        )

    def _delivered(self, n_asked: int) -> int:
        """Bytes the disk delivered since the first step; those asked for where the kernel does not count."""
        now = device_bytes_read()
        return n_asked if now is None or self._device_bytes is None else now - self._device_bytes

    def _limit_s(self, streamed: float, n_bytes: int, busy_s: float, own_s: float) -> float | None:
        """The limit of one token per pass. streamed: bytes of a pass. own_s: what passes took here without waits,
        callbacks and all."""
        if self._plain[0]:
            own_s = self._plain[1] / self._plain[0]
        if not streamed:
            return own_s
        seen = self._best_bytes_per_s or (n_bytes / busy_s if busy_s else 0.0)
        rate = min((rate for rate in (seen, self._machine.disk_bytes_per_s) if rate), default=0.0)
        disk_s = streamed / rate if rate else 0.0
        if self._machine.compute_s:
            return max(disk_s, min(own_s, self._machine.compute_s))
        return disk_s if disk_s >= own_s else None
