"""What a running engine measures under the plan in force, published beside the plan file between two passes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from runtime.engine.engine import Engine
from runtime.plans.stats import PlanStats, StatsFile

PUBLISH_EVERY_S = 0.05  # short passes would else be a tenth longer for it


class StatsWriter:
    """Publishes the figures of an engine, not after every short pass, and never an error."""

    def __init__(self, path: str | os.PathLike[str], model_hash: int, note: Callable[[str], None]) -> None:
        self._file = StatsFile(path, note)
        self._model_hash = model_hash
        self._pid = os.getpid()
        self._generation = -1
        self._next_s, self._published = 0.0, (0, 0, 0)  # when the next record is due, and the last one's plans
        self._seen = (
            0,
            0,
            0.0,
            0,
            0.0,
            0,
        )  # passes, those of answers, seconds, bytes read, wait, positions in the cache
        self._passes = self._tokens = self._bytes_read = 0
        self._pass_s = self._wait_s = 0.0

    def publish(self, engine: Engine, budget_bytes: int, generation: int, refused_generation: int = 0) -> None:
        """Take in the pass since the last call, and write the record where it is time for one, or where plan or budget
        changed; `generation` is that of the plan in force."""
        self._count(engine, generation)
        now, plans = time.monotonic(), (budget_bytes, generation, refused_generation)
        if now < self._next_s and plans == self._published:
            return
        self._next_s, self._published = now + PUBLISH_EVERY_S, plans
        ledger = engine.ledger
        fixed = ledger.fixed_bytes
        self._file.put(
            PlanStats(
                pid=self._pid,
                generation=generation,
                refused_generation=refused_generation,
                model_hash=self._model_hash,
                budget_bytes=budget_bytes,
                fixed_bytes=fixed,
                available_bytes=budget_bytes - fixed,
                window_bytes=ledger.window_bytes,
                resident_bytes=ledger.resident_bytes,
                passes=self._passes,
                tokens=self._tokens,
                pass_s=self._pass_s,
                bytes_read=self._bytes_read,
                wait_s=self._wait_s,
                written_s=time.time(),
                floor_bytes=engine.layout.floor_bytes,
            )
        )

    def close(self) -> None:
        """Remove the file: nobody is measuring any more."""
        self._file.close()

    def _count(self, engine: Engine, generation: int) -> None:
        counters = engine.counters
        last = self._seen
        seen = (
            counters.passes,
            counters.decodes,
            counters.seconds,
            counters.bytes_read,
            counters.wait_s,
            engine.n_past,
        )
        self._seen = seen
        if generation != self._generation:
            self._generation = generation
            self._passes = self._tokens = self._bytes_read = 0
            self._pass_s = self._wait_s = 0.0
        elif seen[0] == last[0] + 1 and seen[1] == last[1] + 1 and seen[5] > last[5]:
            self._passes += 1
            self._tokens += seen[5] - last[5]
            self._pass_s += seen[2] - last[2]
            self._bytes_read += seen[3] - last[3]
            self._wait_s += seen[4] - last[4]
