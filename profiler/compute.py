"""How long the layers and the head compute, measured in real passes of the engine.

The engine streams everything (k = 0, w = 1), so a model larger than memory can be measured; while anything is
computed the readers rest, so the times are those of the computation alone. Waiting for reads is not in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from profiler.model_profile import Spread
from profiler.timing import columns
from runtime.engine import Engine
from runtime.hollow import HollowModel
from runtime.model_file import ModelFile
from runtime.trace import LayerTrace

PREFILL_TOKENS = 128
_SLOW_S = ((0.5, 32), (0.1, 64))  # decode passes slower than this many seconds: fewer prompt tokens per pass


@dataclass(frozen=True)
class ComputeTimes:
    """Seconds per pass: one Spread per layer, the head's last. overhead_s: the rest of a decode pass."""

    decode: list[Spread]
    prefill: list[Spread]
    overhead_s: Spread
    prefill_tokens: int


def layer_trace(file: ModelFile, model: HollowModel) -> LayerTrace:
    """A trace of every layer and the head. The norm before the head counts as part of it."""
    head = file.n_layers
    group_of = {t.name: group.index for group in file.groups for t in group.small}
    group_of |= {piece.tensor.name: piece.layer for piece in file.pieces}
    group_of |= {t.name: head for t in file.globals if t.name.startswith("output_norm")}
    addresses = {a: group for name, group in group_of.items() for a in model.weights.get(name, ())}
    return LayerTrace(addresses, head + 1)


def measure_compute(
    engine: Engine, model: HollowModel, repeats: int, progress: Callable[[], None] = lambda: None
) -> ComputeTimes:
    """Time decode passes, then prefill passes, `repeats` of each after one that warms up.

    progress is called after each of the 2 * (repeats + 1) passes.
    """
    file, settings = engine.file, engine.settings
    engine.quiet = True
    decode, rest = _passes(engine, layer_trace(file, model), 1, repeats, progress)
    pass_s = min(sum(row) for row in decode)
    most = next((tokens for limit_s, tokens in _SLOW_S if pass_s > limit_s), PREFILL_TOKENS)
    n_tokens = min(most, settings.n_ubatch, settings.n_ctx)
    prefill, _ = _passes(engine, layer_trace(file, model), n_tokens, repeats, progress)
    engine.quiet = False
    return ComputeTimes(columns(decode), columns(prefill), columns([[s] for s in rest])[0], n_tokens)


def _passes(
    engine: Engine, trace: LayerTrace, n_tokens: int, repeats: int, progress: Callable[[], None]
) -> tuple[list[list[float]], list[float]]:
    """Seconds per layer of each pass but the first, and what each of those passes took besides."""
    counters = engine.counters
    rest: list[float] = []
    engine.truncate(0)
    engine.trace = trace
    for i in range(repeats + 1):
        if engine.n_past + n_tokens > engine.settings.n_ctx or n_tokens > 1:
            engine.truncate(0)
        before_s, waited_s = counters.seconds, counters.wait_s
        engine.forward(_tokens(engine.n_vocab, i, n_tokens))
        busy_s = counters.seconds - before_s - (counters.wait_s - waited_s)
        if i:
            rest.append(busy_s - sum(trace.seconds[-1]))
        progress()
    engine.trace = None
    return trace.seconds, rest


def _tokens(n_vocab: int, seed: int, n_tokens: int) -> list[int]:
    """Token ids from all over the vocabulary; which ones does not matter to the time."""
    return [(seed * 7919 + i * 104729) % n_vocab for i in range(n_tokens)]
