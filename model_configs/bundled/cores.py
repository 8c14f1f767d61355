"""How many processor cores other programs leave free (Linux; elsewhere, all)."""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")


def _busy() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system = STAT.read_text().split("\n", 1)[0].split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


class FreeCores:
    """Watches the load of other programs between two calls of `count`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.last = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.monotonic(), _busy() if STAT.exists() else 0.0, time.process_time()

    def count(self) -> int:
        """Cores that were free since the last call, at least one.

        A thread that has to share its core holds up all others at every barrier, so it
        is better to have one thread less than one that waits.
        """
        now = self._now()
        passed, busy, own = (new - old for new, old in zip(now, self.last, strict=True))
        self.last = now
        others = max(0.0, busy - own) / max(passed, 1e-3)
        return max(1, min(self.most, int(self.most - others + 0.3)))
