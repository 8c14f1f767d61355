"""What a worker's machine has to give, measured once when it starts: room for weights, its disk, its processor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from runtime.engine.borders import Borders
from runtime.engine.engine import Engine
from runtime.errors import BudgetError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.passes import Pass
from runtime.plans.ledger import usable_bytes
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import layer_bytes, smallest_window
from runtime.settings import FULL_TILES, Settings
from runtime.sizes import MB

_MOST_BYTES = 64 * MB  # of weights to measure with
_SHARE = 4  # of the budget, at most
_RAMP_S, _MEASURED_S = 0.3, 0.5  # of reading: not looked at, looked at
_MOST_PASSES, _MOST_S = 100, 3.0
_TYPICAL_CONTEXT = 512


@dataclass(frozen=True)
class Offer:
    """budget_bytes: of the process, of which weights_bytes are for layers. Seconds per byte of weights of a token."""

    budget_bytes: int
    n_threads: int
    weights_bytes: int = 0
    disk_bytes_per_s: float = 0.0
    compute_s_per_byte: float = 0.0


class _Nowhere:
    """Hops of layers at the beginning of a model whose result nobody wants."""

    def begin(self, pass_: Pass) -> None:
        """Nothing to do."""

    def leave(self, layer: int, hidden: memoryview) -> None:
        """Nothing to do."""

    def enter(self, layer: int, n_bytes: int) -> bytes:
        """Nothing to wait for."""
        return bytes(n_bytes)


def measure(file: ModelFile, budget_bytes: int, n_threads: int) -> Offer:
    """Compute some tokens with the first layers, read anew for each. Raises H2OError where the budget is too small."""
    layers, n_bytes = [0], layer_bytes(file.layers[0])
    for layer in file.layers[1:]:
        n_bytes += layer_bytes(layer)
        if n_bytes > min(_MOST_BYTES, budget_bytes // _SHARE):
            break
        layers.append(layer.index)
    try:
        return _measure(file, layers, budget_bytes, n_threads)
    except BudgetError:
        if len(layers) == 1:
            raise
    return _measure(file, layers[:1], budget_bytes, n_threads)  # the smallest budget that is named is for these


def _measure(file: ModelFile, layers: Sequence[int], budget_bytes: int, n_threads: int) -> Offer:
    """With these layers."""
    part = file.owned(layers, head=False, embedding=True)
    n_bytes, window = sum(layer_bytes(layer) for layer in part.layers), 2 * smallest_window(part)
    settings = Settings(n_ctx=_TYPICAL_CONTEXT, n_ubatch=FULL_TILES, n_threads=n_threads, repack=False)
    plan = Plan(0, 1, Layout.BALANCED, window_bytes=window, budget_bytes=budget_bytes)
    with ExitStack() as opened:
        hollow = HollowModel(part)
        opened.callback(hollow.free)
        engine = Engine(part, hollow, plan, settings)
        opened.callback(engine.close)
        room = usable_bytes(budget_bytes) - engine.layout.fixed_bytes
        engine.apply(Plan(0, 1, Layout.BALANCED, window_bytes=window))  # nothing stays
        engine.guests.add(Borders(part, hollow.weights, engine.guests, _Nowhere()))
        rate, token_s = _rates(engine)
    return Offer(budget_bytes, n_threads, max(0, room), rate, token_s / n_bytes)


def _rates(engine: Engine) -> tuple[float, float]:
    """Bytes per second of the disk, and the fewest seconds of a token without its waits.

    What comes first comes too fast: a disk that is throttled has saved something up, and caches have something.
    """
    counters, token_s, start = engine.counters, [], (0, 0.0)
    end_s = time.perf_counter() + _MOST_S
    while counters.passes < _MOST_PASSES and counters.busy_s < _RAMP_S + _MEASURED_S:
        before_s, waited_s = time.perf_counter(), engine.waited_s
        engine.truncate(0)
        engine.forward([0])
        token_s.append(time.perf_counter() - before_s - (engine.waited_s - waited_s))
        if counters.busy_s < _RAMP_S and before_s < end_s - _MOST_S / 2:
            start = counters.bytes_read, counters.busy_s
        if before_s > end_s:
            break
    seconds = counters.busy_s - start[1]
    return (counters.bytes_read - start[0]) / seconds if seconds > 0 else 0.0, min(token_s)
