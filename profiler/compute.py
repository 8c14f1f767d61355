"""How long the layers and the head compute, measured in real passes of the engine.

The engine streams everything (k = 0, w = 1), so a model larger than memory can be measured; while anything is
computed the readers rest, so the times are those of the computation alone. Waiting for reads is not in them, nor is
what threads and cores need to wake up after it. A clock at every layer and the hand-over of every weight take time of
their own, half of a small model's token; so the times of decode passes are scaled to that of a token without them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from profiler.awake import Waker
from profiler.model_profile import Spread
from profiler.timing import columns
from runtime.engine.engine import Engine
from runtime.engine.trace import LayerTrace, layers_of
from runtime.llama.hollow import HollowModel
from runtime.plans.plan import Plan
from runtime.plans.residency import streamable_bytes

PREFILL_TOKENS = 128
DISTURBED = 1.25  # a pass that takes this many times the fastest one's time was disturbed
_WARM_TOKENS = 3  # the first loads the weights
_SLOW_S = ((0.5, 32), (0.1, 64))  # decode passes slower than this many seconds: fewer prompt tokens per pass

_Trace = TypeVar("_Trace", bound=LayerTrace)


@dataclass(frozen=True)
class ComputeTimes:
    """Seconds per pass: one Spread per layer, the head's last. overhead_s: the rest of a decode pass.

    steady says whether the passes took about the same time; if not, other programs took the processors.
    """

    decode: list[Spread]
    prefill: list[Spread]
    overhead_s: Spread
    prefill_tokens: int
    steady: bool


@dataclass(frozen=True)
class _Pass:
    """One timed pass: seconds of each layer and the head, and of everything else but waiting for reads."""

    group_s: list[float]
    rest_s: float

    @property
    def compute_s(self) -> float:
        """Seconds of all layers and the head."""
        return sum(self.group_s)


def layer_trace(engine: Engine, model: HollowModel, kind: type[_Trace]) -> _Trace:
    """A trace (of this kind) of every layer and the head."""
    return kind(layers_of(engine.file, model), engine.file.head.index + 1, lambda: engine.waited_s)


def measure_compute(
    engine: Engine,
    model: HollowModel,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
    *,
    room_bytes: int = 0,
) -> ComputeTimes:
    """Time decode passes, then prefill passes, `repeats` of each after one that warms up.

    room_bytes: what weights may take in memory; a token is timed with as many of them there.
    Passes that others disturbed are made again, up to twice as many: the fastest times of each layer count. progress
    is called after each pass.
    """
    settings = engine.settings
    waker = Waker(settings.n_threads)
    engine.weights.quiet = waker.wake
    try:
        decode = _passes(engine, layer_trace(engine, model, LayerTrace), 1, repeats, progress)
        most = next((tokens for limit_s, tokens in _SLOW_S if decode[0].compute_s > limit_s), PREFILL_TOKENS)
        n_tokens = min(most, settings.n_ubatch, settings.n_ctx)
        prefill = _passes(engine, layer_trace(engine, model, LayerTrace), n_tokens, repeats, progress)
        plain_s = _token_s(engine, repeats, room_bytes)
    finally:
        engine.weights.quiet = None
        waker.close()
    share = min(1.0, plain_s / statistics.median(p.compute_s + p.rest_s for p in decode))
    return ComputeTimes(
        columns([[share * seconds for seconds in p.group_s] for p in decode]),
        columns([p.group_s for p in prefill]),
        columns([[share * p.rest_s] for p in decode])[0],
        n_tokens,
        not (_disturbed(decode, repeats) or _disturbed(prefill, repeats)),
    )


def _passes(
    engine: Engine, trace: LayerTrace, n_tokens: int, repeats: int, progress: Callable[[], None]
) -> list[_Pass]:
    """The times that count, as so many passes, the fastest first."""
    engine.truncate(0)
    passes: list[_Pass] = []
    with engine.guests.joined_by(trace):
        _timed_pass(engine, n_tokens, 0)
        progress()
        while len(passes) < repeats or (len(passes) < 2 * repeats and _disturbed(passes, repeats)):
            rest_s = _timed_pass(engine, n_tokens, 1 + len(passes))
            passes.append(_Pass(trace.seconds[-1], max(0.0, rest_s - sum(trace.seconds[-1]))))
            passes.sort(key=lambda p: p.compute_s)
            progress()
    return _fastest(passes, repeats)


def _fastest(passes: Sequence[_Pass], repeats: int) -> list[_Pass]:
    """Passes made of the fastest times of each layer: what disturbs a pass takes the time of some layers only."""
    layers = [sorted(seconds)[:repeats] for seconds in zip(*(p.group_s for p in passes), strict=True)]
    rests = sorted(p.rest_s for p in passes)[:repeats]
    return [_Pass(list(group_s), rest_s) for *group_s, rest_s in zip(*layers, rests, strict=True)]


def _disturbed(passes: list[_Pass], repeats: int) -> bool:
    """Whether the fastest `repeats` passes (sorted) differ by more than a quiet machine's do."""
    return passes[repeats - 1].compute_s > DISTURBED * passes[0].compute_s


def _token_s(engine: Engine, repeats: int, room_bytes: int) -> float:
    """Seconds of a token without its waits, no clock in it: with all weights in memory that there is room for."""
    weights = streamable_bytes(engine.file)
    if weights <= room_bytes:
        engine.apply(Plan(engine.file.n_layers, 1, pinned_bytes=weights))
    elif room_bytes > 0:
        engine.apply(replace(engine.plan, pinned_bytes=room_bytes))
    engine.truncate(0)
    for seed in range(_WARM_TOKENS):
        _timed_pass(engine, 1, seed)
    return statistics.median(_timed_pass(engine, 1, seed) for seed in range(2 * repeats))


def _timed_pass(engine: Engine, n_tokens: int, seed: int) -> float:
    """Seconds of one pass without its waits for reads."""
    counters = engine.counters
    if n_tokens > 1 or engine.n_past + n_tokens > engine.settings.n_ctx:
        engine.truncate(0)
    before_s, waited_s = counters.seconds, counters.wait_s
    engine.forward(_tokens(engine.n_vocab, seed, n_tokens))
    return counters.seconds - before_s - (counters.wait_s - waited_s)


def _tokens(n_vocab: int, seed: int, n_tokens: int) -> list[int]:
    """Token ids from all over the vocabulary; which ones does not matter to the time."""
    return [(seed * 7919 + i * 104729) % n_vocab for i in range(n_tokens)]
