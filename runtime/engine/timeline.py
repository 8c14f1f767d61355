"""When weights were loaded, layers computed, keys and values moved: a JSON object a line, for people and tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from runtime.engine.engine import Engine
from runtime.engine.trace import layer_at, layers_of
from runtime.errors import LIMITS, H2OError
from runtime.kv.slow_tier import SlowTier
from runtime.llama.hollow import HollowModel
from runtime.passes import Pass
from runtime.weights.loads import Chunk
from runtime.weights.store import LayerStore

LOAD_WEIGHT, COMPUTE, LOAD_CACHE, STORE_CACHE = "load_weight", "compute", "load_cache", "store_cache"


@contextmanager
def open_timeline(path: Path) -> Iterator[Timeline]:
    """A timeline in a file, written anew, of the stores that are opened inside. Raises H2OError."""
    try:
        with path.open("w", encoding="utf-8") as file:
            timeline = Timeline(file)
            LayerStore.read_observer = timeline.has_read
            try:
                yield timeline
            finally:
                LayerStore.read_observer = None
                timeline.write()
    except OSError as error:
        step = LIMITS.get(error.errno or 0, "give another --timeline")
        raise H2OError(f"the timeline {path} cannot be written: {error.strerror}", step) from None


class Timeline:
    """A guest, and an observer of reads. Times are seconds since it was made.

    i: a pass. j: a layer, the last one is the head. k: a batch, which has batch_size sequences of the cache. A layer's
    time begins behind the norm before it, and `wait_s` of it were waits for reads.
    """

    def __init__(self, file: TextIO) -> None:
        """join() comes before the first pass."""
        self._file, self._start = file, time.perf_counter()
        self._events: list[dict[str, Any]] = []  # any thread appends
        self._layer_of: dict[int, int] = {}  # see layers_of
        self._n_layers, self._batch_size = 0, 1
        self._waited_s: Callable[[], float] = float
        self._i, self._k = -1, list[int]()
        self._layer = self._next = -1  # being computed, and as of the node announced last
        self._mark = 0.0, 0.0  # when the layer began, and what was waited until then

    def join(self, engine: Engine, model: HollowModel, batch_size: int) -> None:
        """Take part in an engine's passes."""
        self._layer_of, self._n_layers = layers_of(engine.file, model), engine.file.head.index + 1
        self._batch_size, self._waited_s = batch_size, lambda: engine.waited_s
        engine.guests.add(self)

    def has_read(self, chunk: Chunk, begin: float, end: float) -> None:
        """A request for weights was read, or for embedding rows, which are no layer's. For readers."""
        if chunk.load:
            what = {"i": chunk.load.pass_number, "j": chunk.load.piece.layer, "stays": chunk.load.slot is None}
            self._add(LOAD_WEIGHT, what | {"bytes": chunk.n_bytes}, begin, end)

    def timed(self, tier: SlowTier) -> SlowTier:
        """The tier, with what it does on the timeline."""
        return _TimedTier(tier, self)

    def moved(self, event: str, n_bytes: int, begin: float) -> None:
        """Keys and values have moved, before pass i."""
        self._add(event, {"i": self._i + 1, "bytes": n_bytes}, begin, time.perf_counter())

    def _add(self, event: str, what: dict[str, Any], begin: float, end: float) -> None:
        times = {"begin_s": round(begin - self._start, 6), "end_s": round(end - self._start, 6)}
        self._events.append({"event": event, **what, **times})

    def write(self) -> None:
        """Write what has happened, in the order in which it ended."""
        events, self._events = self._events, []
        self._file.writelines(json.dumps(event) + "\n" for event in events)

    # --- a guest ------------------------------------------------------------------------------------------------

    def begin(self, pass_: Pass) -> None:
        """A pass begins."""
        self._i += 1
        self._k = sorted({part.sequence // self._batch_size for part in pass_.parts})
        self._layer = self._next = -1

    def before(self, node: int) -> bool:
        """A node is announced; True where a layer begins."""
        self._next = layer_at(node, self._layer_of, self._n_layers, self._layer)
        return self._next > self._layer

    def after(self, _node: int) -> None:
        """The node announced last has been computed."""
        if self._next > self._layer:
            self._close()
            self._layer = self._next

    def end(self, *, complete: bool) -> None:
        """The pass is over."""
        if complete:
            self._close()
        self.write()

    def _close(self) -> None:
        """The layer is computed."""
        now, waited = time.perf_counter(), self._waited_s()
        if self._layer >= 0:
            begin, before = self._mark
            what = {"i": self._i, "j": self._layer, "k": self._k, "wait_s": round(waited - before, 6)}
            self._add(COMPUTE, what, begin, now)
        self._mark = now, waited


class _TimedTier:
    """A slow tier whose reads and writes are on a timeline."""

    def __init__(self, tier: SlowTier, timeline: Timeline) -> None:
        self._tier, self._timeline = tier, timeline
        self.free, self.close = tier.free, tier.close

    def write(self, block: int, source: memoryview) -> None:
        """Keep a block. Raises DiskError."""
        begin = time.perf_counter()
        self._tier.write(block, source)
        self._timeline.moved(STORE_CACHE, len(source), begin)

    def read(self, block: int, target: memoryview) -> None:
        """Bring a block. Raises DiskError."""
        begin = time.perf_counter()
        self._tier.read(block, target)
        self._timeline.moved(LOAD_CACHE, len(target), begin)
