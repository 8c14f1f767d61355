"""Repeated measurements: the first ones are dropped, the rest become a Spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from profiler.model_profile import Spread


def seconds_of(action: Callable[[], object]) -> float:
    """How long one call takes, in seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def repeat(action: Callable[[], object], repeats: int, warm_ups: int = 1) -> Spread:
    """Seconds per call over `repeats` calls, after warm_ups calls that do not count."""
    for _ in range(warm_ups):
        action()
    return Spread.of([seconds_of(action) for _ in range(repeats)])


def columns(rows: Sequence[Sequence[float]]) -> list[Spread]:
    """One Spread per column of repeated measurements (rows of equal length). A time below 0 is clock noise: 0."""
    return [Spread.of([max(0.0, value) for value in column]) for column in zip(*rows, strict=True)]
