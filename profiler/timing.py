"""Times measured, alone or repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from profiler.model_profile import Spread


def seconds_of(action: Callable[[], object]) -> float:
    """How long one call takes, in seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def columns(rows: Sequence[Sequence[float]]) -> list[Spread]:
    """One Spread per column of repeated measurements (rows of equal length). A time below 0 is clock noise: 0."""
    return [Spread.of([max(0.0, value) for value in column]) for column in zip(*rows, strict=True)]
