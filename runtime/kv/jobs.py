"""Threads that move rows while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from runtime.errors import EngineError, H2OError
from runtime.threads import start_threads

_LOOK_S = 0.1  # how often a wait looks whether it shall end
_CLOSE_S = 5.0

Stopped = Callable[[], BaseException | None]


class Job:
    """Work in another thread; `wait` hands over its error."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do it (in one of the threads)."""
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised by who waits
            self._error = error
        self._done.set()

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._done.is_set()

    def wait(self, stopped: Stopped) -> None:
        """Return when it is done. Raises its error, or what `stopped` returns meanwhile."""
        while not self._done.wait(_LOOK_S):
            stop = stopped()
            if stop is not None:
                raise stop
        if self._error is not None:
            raise self._error


def settle(jobs: list[Job], stopped: Stopped) -> None:
    """Wait until none of these jobs runs any more, however they ended; empties the list."""
    for job in jobs:
        with suppress(H2OError):
            job.wait(stopped)
        if not job.done:
            raise EngineError("reading keys and values does not end", "check the disk")
    jobs.clear()


class Jobs:
    """n_threads threads that do jobs in order. They end with the process: a disk that hangs keeps nobody waiting."""

    def __init__(self, n_threads: int) -> None:
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._n_threads = n_threads
        self._threads = start_threads(n_threads, "kv", self._run, self._stop)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            job.run()

    def start(self, work: Callable[[], None]) -> Job:
        """Do this as soon as a thread is free."""
        job = Job(work)
        self._queue.put(job)
        return job

    def _stop(self) -> None:
        for _ in range(self._n_threads):
            self._queue.put(None)

    def close(self) -> bool:
        """End the threads; False: one of them still hangs and may touch memory."""
        self._stop()
        for thread in self._threads:
            thread.join(_CLOSE_S)
        return not any(thread.is_alive() for thread in self._threads)
