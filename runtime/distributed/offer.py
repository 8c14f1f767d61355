"""What a worker's machine has to give, measured once when it starts: room for weights, its disk, its processor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from statistics import linear_regression, median
from typing import Protocol

from runtime.engine.borders import Borders
from runtime.engine.engine import Engine
from runtime.errors import BudgetError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile, Piece
from runtime.passes import Pass
from runtime.plans.ledger import below_floor, usable_bytes
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import layer_bytes, smallest_window
from runtime.settings import FULL_TILES, Settings
from runtime.sizes import MB
from runtime.weights.head_start import open_weights
from runtime.weights.store import LayerStore

_MOST_BYTES = 64 * MB  # of weights to measure with
_SHARE = 4  # of the budget, at most
_VISIT_BYTES = 3 * MB  # what gRPC and a conversation take as soon as a root is there (measured: 2.5 to 3.6 MB)
_RAMP_S, _MEASURED_S = 0.3, 0.7  # of reading: not looked at, looked at
_LEAST_POINTS = 3
_LEAST_PASSES, _PASSES_S = 10, 0.3  # of computing: with the disk behind it, most take far more than the fewest
_REST_S = 0.01  # before a pass, as long as threads rest while others compute
_MOST_S = 3.0  # for each of the two, where a disk is slow
_TYPICAL_CONTEXT = 512


@dataclass(frozen=True)
class Offer:
    """budget_bytes: of the process, of which weights_bytes are for layers. Seconds per byte of weights of a token.

    compute_s_per_byte: of weights in memory; streaming_s_per_byte: how much more it is of those that are read. wake_s:
    what a token takes more after a rest.
    """

    budget_bytes: int
    n_threads: int
    weights_bytes: int = 0
    disk_bytes_per_s: float = 0.0
    compute_s_per_byte: float = 0.0
    streaming_s_per_byte: float = 0.0
    wake_s: float = 0.0


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
    """Compute some tokens with the first layers, then read those. Raises BudgetError below the smallest budget:
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
    """With these layers: in memory, as far as there is room for them, and then with none of them there."""
    part = file.owned(layers, head=False, embedding=True)
    n_bytes, window = sum(layer_bytes(layer) for layer in part.layers), 2 * smallest_window(part)
    plan = Plan(0, 1, Layout.BALANCED, window_bytes=window, budget_bytes=budget_bytes)
    with _opened(part) as hollow:
        weights = open_weights(part, settings)
        with closing(Engine(part, hollow, plan, settings, weights)) as engine:
            layout, streams = engine.layout, Plan(0, 1, Layout.BALANCED, window_bytes=window)
            room = usable_bytes(budget_bytes) - layout.fixed_bytes
            held = n_bytes if n_bytes <= room else max(0, room - window)
            engine.apply(replace(streams, pinned_bytes=held))
            engine.guests.add(Borders(part, hollow.weights, engine.guests, _Nowhere()))
            held_s = min(_seconds_of_tokens(engine))
            wake_s = max(0.0, median(_seconds_of_tokens(engine, _REST_S)) - held_s)
            room += layout.prompt_bytes + layout.spared_bytes  # weights take their place while tokens are computed
            engine.apply(streams)
            streamed_s = min(_seconds_of_tokens(engine))
            rate = _disk_rate(weights.store, tuple(part.pieces))
    room = max(room - _VISIT_BYTES, min(room, window), 0)
    each, more = _s_per_byte(n_bytes, held, held_s, streamed_s)
    return Offer(budget_bytes, settings.n_threads, room, rate, each, more, wake_s)


def _s_per_byte(n_bytes: int, held: int, held_s: float, streamed_s: float) -> tuple[float, float]:
    """Seconds for a byte that is in memory, and how many more for one that is read.

    held_s: of a token with so many of the n_bytes held; streamed_s: with none.
    """
    streamed = streamed_s / n_bytes
    if held_s >= streamed_s or not held:
        return streamed, 0.0
    more = min((streamed_s - held_s) / held, streamed)
    return streamed - more, more


def _seconds_of_tokens(engine: Engine, rest_s: float = 0.0) -> list[float]:
    """Seconds of tokens without their waits. rest_s: before each."""
    seconds: list[float] = []
    start_s = time.perf_counter()
    while True:
        time.sleep(rest_s)
        before_s, waited_s = time.perf_counter(), engine.waited_s
        engine.truncate(0)
        engine.forward([0])
        now_s = time.perf_counter()
        seconds.append(now_s - before_s - (engine.waited_s - waited_s))
        enough = len(seconds) >= _LEAST_PASSES and now_s - start_s > _PASSES_S
        if enough or now_s - start_s > _MOST_S:
            return seconds


def _disk_rate(store: LayerStore, pieces: Sequence[Piece]) -> float:
    """Bytes per second of pieces that are read one after the other while nothing is computed.

    A disk that is throttled saves something up whenever it rests. It rests while layers are computed, and would look
    faster than it is all the time. It gives its bytes in bursts: the rate is the slope of a line through all of them.
    """
    begun_s, end_s = store.busy_s, time.perf_counter() + _MOST_S
    seen: list[tuple[float, int]] = []
    for i in count(1):
        store.need(pieces[i % len(pieces) - 1])
        store.computed()
        seen.append((store.busy_s, store.bytes_read))
        is_over = store.busy_s > begun_s + _RAMP_S + _MEASURED_S or time.perf_counter() > end_s
        if is_over or i % len(pieces) == 0:
            store.end_pass(complete=not is_over)
        if is_over:
            break
    later = [point for point in seen if point[0] > begun_s + _RAMP_S]
    if len(later) < _LEAST_POINTS:
        return store.bytes_read / (store.busy_s or 1.0)
    return linear_regression(*zip(*later, strict=True)).slope
