"""h2o and llama.cpp in turns, both open at the same time: one computes a round while the other sleeps.

The speed of a machine drifts by more than the engines differ; from one round to the next it hardly does. So the rounds
are compared pair by pair, the order within a pair changing every time. Where a process got its memory is worth a
percent or two as well, for as long as it lives: so both are opened anew a few times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from h2o_cli.bench.speed.engines import tokens_hash
from h2o_cli.bench.speed.rounds import AGAIN
from h2o_cli.bench.speed.rows import InTurns, Rounds
from runtime.errors import EngineError

OPENINGS = 3
PREFILL_PAIRS, DECODE_PAIRS = 6, 10  # of each opening
WARM_DECODE_PAIRS = 1
DECODE_TOKENS = 8
N_TOKENS = 1 + (WARM_DECODE_PAIRS + DECODE_PAIRS) * DECODE_TOKENS
"""Tokens of the answer."""
PAUSE_S = 0.05  # idle OpenMP threads of the other engine spin for some milliseconds
_TIMEOUT_S = 300.0


class Asked(Protocol):
    """An engine that does rounds."""

    def ask(self, line: str, timeout_s: float) -> str:
        """The answer to a line."""

    @property
    def peak_bytes(self) -> int:
        """The most memory it took."""


class _Round(msgspec.Struct):
    seconds: float
    n_computed: int
    tokens: tuple[int, ...]


@dataclass
class _Side:
    """One engine of the two, over all openings."""

    engine: Asked | None = None
    tokens: list[int] = field(default_factory=list)
    peak_bytes: int = 0

    def round(self, line: str) -> _Round:
        """Have one round done. Raises EngineError."""
        assert self.engine
        time.sleep(PAUSE_S)
        answer = self.engine.ask(line, _TIMEOUT_S)
        try:
            done = msgspec.json.decode(answer, type=_Round)
        except msgspec.DecodeError as error:
            raise EngineError(f"its output cannot be read: {error}", "run it by hand to see more") from None
        self.tokens += done.tokens
        self.peak_bytes = max(self.peak_bytes, self.engine.peak_bytes)
        return done


@dataclass(frozen=True)
class Taken:
    """What came of the turns: the figures, and of h2o all tokens and the peak."""

    figures: InTurns
    tokens: tuple[int, ...]
    peak_bytes: int


def take_turns(open_both: Callable[[], AbstractContextManager[tuple[Asked, Asked]]]) -> Taken:
    """Open (h2o, llama.cpp) some times; have each compute the prompt some times, then an answer. Raises EngineError."""
    own, other = sides = _Side(), _Side()
    prefill: list[tuple[_Round, _Round]] = []
    decode: list[tuple[_Round, _Round]] = []
    for _ in range(OPENINGS):
        with open_both() as (own.engine, other.engine):
            _pairs(sides, AGAIN, 1)
            prefill += _pairs(sides, AGAIN, PREFILL_PAIRS)
            _pairs(sides, str(DECODE_TOKENS), WARM_DECODE_PAIRS)
            decode += _pairs(sides, str(DECODE_TOKENS), DECODE_PAIRS)
    figures = InTurns(
        decode=_rounds([pair for pair in decode if all(len(one.tokens) == DECODE_TOKENS for one in pair)]),
        prefill=_rounds(prefill),
        llama_cpp_peak_bytes=other.peak_bytes,
        llama_cpp_tokens_hash=tokens_hash(other.tokens),
    )
    return Taken(figures, tuple(own.tokens), own.peak_bytes)


def _pairs(sides: tuple[_Side, _Side], line: str, n: int) -> list[tuple[_Round, _Round]]:
    """n pairs of rounds (h2o's, llama.cpp's); who begins changes with every pair."""
    found = []
    for i in range(n):
        if i % 2 == 0:
            own, other = (side.round(line) for side in sides)
        else:
            other, own = (side.round(line) for side in sides[::-1])
        found.append((own, other))
    return found


def _rounds(pairs: list[tuple[_Round, _Round]]) -> Rounds:
    """Raises EngineError where the model had ended its answer before there was a pair."""
    if not pairs:
        raise EngineError("the model ended its answer at once", "give another model")
    seconds = [(own.seconds, other.seconds) for own, other in pairs]
    ratios = [other / own for own, other in seconds]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    own_s, other_s = (statistics.median(side) for side in zip(*seconds, strict=True))
    n_tokens = pairs[0][0].n_computed
    return Rounds(n_tokens, n_tokens / own_s, n_tokens / other_s, middle, (low, high), tuple(seconds))
