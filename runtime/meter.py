"""How fast an answer was: a meter watches its steps and gives the figures."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace

from runtime.engine import Counters, Engine
from runtime.generate import CANCELLED, Step

_RATE_STEPS = 4  # the best observed read rate is taken over this many tokens


@dataclass(frozen=True)
class Statistics:
    """How fast an answer was. None: too few tokens to say.

    limit_ms_per_token is the least a token can take with one token per pass, when reading and computing overlap fully:
    the larger of streamed bytes per pass / disk bytes per second, and the computing time of a pass (its time minus
    waiting for the disk; passes without a draft count where there were any). Speculation can be faster than that.
    prefill_tokens_per_s is that of the prompt's passes, waits for the disk included.
    """

    n_tokens: int = 0
    ttft_s: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_ms_per_token: float | None = None
    tokens_per_s: float | None = None
    bytes_read_per_token: float | None = None
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
    """Watches the steps of one answer. disk_bytes_per_s 0: not known, the best rate seen counts."""

    def __init__(self, engine: Engine, disk_bytes_per_s: float = 0) -> None:
        self._engine = engine
        self._disk_bytes_per_s = disk_bytes_per_s
        self._start_s, self._start = time.perf_counter(), replace(engine.counters)
        self._first: _Seen | None = None
        self._last: _Seen | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RATE_STEPS)
        self._best_bytes_per_s = 0.0
        self._plain = [0, 0.0]  # passes without a draft, and their computing time
        self._n_steps, self._drafting_s = 0, 0.0
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
        if self._last is None or now.counters.passes != self._last.counters.passes or not self._recent:
            self._see_pass(now, step)
        self._last = now

    def _see_pass(self, now: _Seen, step: Step) -> None:
        """The first step of a pass."""
        if self._last and now is not self._last and not step.drafted:
            before = self._last.counters
            self._plain[0] += 1
            self._plain[1] += now.counters.seconds - before.seconds - now.counters.wait_s + before.wait_s
        self._recent.append((now.at_s, now.counters.bytes_read))
        seconds = self._recent[-1][0] - self._recent[0][0]
        if len(self._recent) == _RATE_STEPS and seconds > 0:
            rate = (self._recent[-1][1] - self._recent[0][1]) / seconds
            self._best_bytes_per_s = max(self._best_bytes_per_s, rate)

    def statistics(self) -> Statistics:
        """The figures so far. The first token counts for ttft_s only."""
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
        compute_s = self._plain[1] / self._plain[0] if self._plain[0] else (pass_s - wait_s) / passes
        rate = self._disk_bytes_per_s or max(self._best_bytes_per_s, n_bytes / (last.at_s - first.at_s))
        disk_s = self._engine.streamed_bytes / rate if rate else 0.0
        return Statistics(
            n_tokens=self.n_tokens,
            ttft_s=ttft_s,
            prefill_tokens_per_s=prefill,
            decode_ms_per_token=1000 * (pass_s + last.drafting_s - first.drafting_s) / n,
            tokens_per_s=n / (last.at_s - first.at_s),
            bytes_read_per_token=n_bytes / n,
            disk_wait_ms_per_token=1000 * wait_s / n,
            limit_ms_per_token=1000 * max(disk_s, compute_s),
            tokens_per_pass=n / passes,
            drafted=self._drafted,
            accepted=self._accepted,
        )
