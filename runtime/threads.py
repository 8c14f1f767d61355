"""Threads of our own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from runtime.errors import NO_THREADS, EngineError

_POLL_S = 0.1


def start_threads(n: int, name: str, work: Callable[[], None], stop: Callable[[], None]) -> list[threading.Thread]:
    """n running threads that do `work` and do not keep the process alive.

    Raises EngineError where the system gives no more; `stop` has ended those that ran already.
    """
    threads = [threading.Thread(target=work, daemon=True, name=f"{name}-{i}") for i in range(n)]
    for i, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError:
            stop()
            for started in threads[:i]:
                started.join()
            raise EngineError(*NO_THREADS) from None
    return threads


def join_threads(threads: Sequence[threading.Thread], given_up: Callable[[], bool]) -> bool:
    """Wait until all have ended; False where one has not and given_up() says not to wait any longer."""
    for thread in threads:
        thread.join(_POLL_S)
        while thread.is_alive() and not given_up():
            thread.join(_POLL_S)
    return not any(thread.is_alive() for thread in threads)
