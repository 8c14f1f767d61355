"""What a worker's machine has to give, measured once when it starts: room for weights, its disk, its processor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from runtime.engine.borders import Borders
from runtime.engine.engine import Engine
from runtime.errors import BudgetError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.passes import Pass
from runtime.plans.ledger import below_floor, usable_bytes
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


class Least(Protocol):
    """The smallest budget of a process with this part of a model; not measured again where it is at most the budget."""

    def __call__(self, part: ModelFile, hollow: HollowModel, settings: Settings, budget_bytes: int, /) -> int:
        """In bytes."""


def measure(file: ModelFile, budget_bytes: int, n_threads: int, least: Least) -> Offer:
    """Compute some tokens with the first layers, read anew for each. Raises BudgetError below the smallest budget:
    that of the first layer alone, whatever this very process would need.
    """
    layers, n_bytes = [0], layer_bytes(file.layers[0])
    for layer in file.layers[1:]:
        n_bytes += layer_bytes(layer)
        if n_bytes > min(_MOST_BYTES, budget_bytes // _SHARE):
            break
        layers.append(layer.index)
    settings = Settings(n_ctx=_TYPICAL_CONTEXT, n_ubatch=FULL_TILES, n_threads=n_threads, repack=False)
    _check(file, budget_bytes, settings, least, budget_bytes)
    for chosen in (layers, layers[:1]):
        with suppress(BudgetError):
            return _measure(file, chosen, budget_bytes, settings)
    _check(file, budget_bytes, settings, least, 0)
    return _measure(file, layers[:1], budget_bytes, settings)


def _check(file: ModelFile, budget_bytes: int, settings: Settings, least: Least, known_for: int) -> None:
    part = file.owned([0], head=False, embedding=True)
    with _opened(part) as hollow:
        floor = least(part, hollow, settings, known_for)
    if budget_bytes < floor:
        raise below_floor(budget_bytes, floor)


@contextmanager
def _opened(part: ModelFile) -> Iterator[HollowModel]:
    """A model that is gone after the block."""
    hollow = HollowModel(part)
    try:
        yield hollow
    finally:
        hollow.free()


def _measure(file: ModelFile, layers: Sequence[int], budget_bytes: int, settings: Settings) -> Offer:
    """With these layers."""
    part = file.owned(layers, head=False, embedding=True)
    n_bytes, window = sum(layer_bytes(layer) for layer in part.layers), 2 * smallest_window(part)
    plan = Plan(0, 1, Layout.BALANCED, window_bytes=window, budget_bytes=budget_bytes)
    with _opened(part) as hollow, closing(Engine(part, hollow, plan, settings)) as engine:
        engine.apply(Plan(0, 1, Layout.BALANCED, window_bytes=window))  # nothing stays
        engine.guests.add(Borders(part, hollow.weights, engine.guests, _Nowhere()))
        rate, token_s = _rates(engine)
        layout = engine.layout
        for_token = layout.prompt_bytes + layout.spared_bytes  # weights take their place while tokens are computed
        room = usable_bytes(budget_bytes) - layout.fixed_bytes + for_token
    return Offer(budget_bytes, settings.n_threads, max(0, room), rate, token_s / n_bytes)


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
