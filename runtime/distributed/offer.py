"""What a worker's machine has to give, measured once when it starts: room for weights, its disk, its processor."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

from runtime.engine.borders import Borders
from runtime.engine.engine import Engine
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.passes import Pass
from runtime.plans.ledger import usable_bytes
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import layer_bytes, smallest_window
from runtime.settings import Settings
from runtime.sizes import MB

_MOST_BYTES = 64 * MB  # of weights to measure with
_SHARE = 4  # of the budget, at most
_PASSES = 4


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
    """Read the first layers and compute some tokens with them. Raises H2OError where the budget is too small."""
    layers, n_bytes = [0], layer_bytes(file.layers[0])
    for layer in file.layers[1:]:
        n_bytes += layer_bytes(layer)
        if n_bytes > min(_MOST_BYTES, budget_bytes // _SHARE):
            break
        layers.append(layer.index)
    part = file.owned(layers, head=False, embedding=True)
    settings = Settings(n_ctx=64, n_ubatch=16, n_threads=n_threads, repack=False)
    plan = Plan(0, 1, Layout.BALANCED, window_bytes=2 * smallest_window(part), budget_bytes=budget_bytes)
    with ExitStack() as opened:
        hollow = HollowModel(part)
        opened.callback(hollow.free)
        engine = Engine(part, hollow, plan, settings)
        opened.callback(engine.close)
        engine.guests.add(Borders(part, hollow.weights, engine.guests, _Nowhere()))
        engine.forward([0])
        counters = engine.counters
        rate = counters.bytes_read / counters.busy_s if counters.busy_s else 0.0
        seconds = min(_token_s(engine) for _ in range(_PASSES))
        room = usable_bytes(budget_bytes) - engine.layout.fixed_bytes
        return Offer(budget_bytes, n_threads, max(0, room), rate, seconds / sum(layer_bytes(la) for la in part.layers))


def _token_s(engine: Engine) -> float:
    """Seconds of a token without waits for reads."""
    start, waited = time.perf_counter(), engine.waited_s
    engine.forward([0])
    return time.perf_counter() - start - (engine.waited_s - waited)
