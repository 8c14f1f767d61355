"""The threads that read weights, and the queue of what they are to read."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from runtime.memory import touch
from runtime.threads import join_threads, start_threads
from runtime.weights.files import WeightFiles
from runtime.weights.loads import Batch, Chunk, Load

Observer = Callable[[Chunk, float, float], None]  # begin, end
_POLL_S = 0.1


class Source(Protocol):
    """Who knows what comes next. Everything here is called with the lock held."""

    def start_load(self) -> bool:
        """Queue the reads of one more piece; False when there is none, or no room for it."""

    def begins(self, chunk: Chunk) -> None:
        """This read is the next one, unless others are queued before it now."""

    def loaded(self, load: Load) -> None:
        """All reads of a load have ended, well or not."""


class Readers:
    """`depth` threads: each makes the read at the front of the queue, or asks the source for more.

    `lock` guards everything here and in the source, but for three things:

    - A read itself is made without it. A chunk in `flying` is its reader's until that has the lock again, and the place
      it is read to stays as long: the source frees none that a chunk in `flying` has (LayerStore.apply waits for them),
      and nothing is freed at the end before `close` has said that no thread is left.
    - `interrupt` is set from anywhere, also from a signal handler, which must not wait for a lock that the thread under
      it may hold. So nothing wakes who waits for a read: it looks every _POLL_S seconds.
    - `bytes_read` and `busy_s` change with the lock, but are read without it: they are figures, at most a read late.
    """

    def __init__(self, files: WeightFiles, source: Source, depth: int, observer: Observer | None) -> None:
        """They pause until `go_on`, so the source need not be ready yet. Raises EngineError."""
        self.lock = threading.Lock()
        self.queue: deque[Chunk] = deque()
        self.flying: list[Chunk] = []  # what is being read just now
        self.resting = 0  # threads that wait for something to read
        self.interrupt: BaseException | None = None
        self.bytes_read, self.busy_s, self._busy_since = 0, 0.0, 0.0
        self._files, self._source, self._observer = files, source, observer
        self._paused = True
        self._closing = False
        self._readable = threading.Condition(self.lock)  # for the threads: there may be something to read
        self._arrived = threading.Condition(self.lock)  # for who waits for a read: one has ended
        self._threads = start_threads(depth, "reader", self._work, self._stop)

    # --- called with the lock held ------------------------------------------------------------------------------

    def pause(self) -> None:
        """Begin no read of the source's until `go_on`; those under way go on, and batches are read."""
        self._paused = True

    def go_on(self) -> None:
        """Read again."""
        self._paused = False
        self._readable.notify_all()

    def put_first(self, chunks: Sequence[Chunk]) -> None:
        """Queue reads before all others, in this order."""
        self.queue.extendleft(reversed(chunks))
        self._readable.notify(len(chunks))

    def take_out(self, part: Load | Batch) -> None:
        """Forget the reads of a load or a batch that are not under way yet; they no longer count as left."""
        others = [chunk for chunk in self.queue if chunk.part is not part]
        part.chunks_left -= len(self.queue) - len(others)
        self.queue = deque(others)

    def feed(self) -> None:
        """Queue reads for resting threads, and wake as many: one that wakes in vain takes a core for nothing."""
        while len(self.queue) < self.resting and not self._paused and self._source.start_load():
            pass

    def check(self) -> None:
        """Raise the interrupt, if there is one."""
        if self.interrupt:
            raise self.interrupt

    def wait(self) -> None:
        """Give the lock away until a read has ended, or _POLL_S seconds have passed."""
        self._arrived.wait(_POLL_S)

    def read_now(self, chunks: Sequence[tuple[int, int, int, int]]) -> None:
        """Read (file, offset, address, bytes) ranges before anything else, and wait for them. Raises DiskError."""
        batch = Batch(len(chunks))
        self.put_first([Chunk(*chunk, batch) for chunk in chunks])
        while batch.chunks_left and not (batch.error or self.interrupt):
            self.wait()
        if batch.chunks_left or batch.error:
            self.take_out(batch)
            raise batch.error or self.interrupt  # type: ignore[misc]

    # --- the threads --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self.lock:
                if (chunk := self.next_chunk()) is None:
                    return
                if not self.flying:
                    self._busy_since = time.perf_counter()
                self.flying.append(chunk)
            error: BaseException | None = None
            try:
                self._read(chunk)
            except BaseException as caught:  # noqa: BLE001 - handed to the computing thread, which raises it
                error = caught
            with self.lock:
                self.flying.remove(chunk)
                now, since = time.perf_counter(), self._busy_since
                self.busy_s, self._busy_since = self.busy_s + now - since, now
                self.finish(chunk, error)
                self._arrived.notify_all()

    def _read(self, chunk: Chunk) -> None:
        """Without the lock: nobody else touches the chunk's bytes, and `_files` and `_observer` never change."""
        start = time.perf_counter()
        if chunk.load:
            touch(chunk.address, chunk.n_bytes)
        self._files.read(chunk.file, chunk.offset, chunk.address, chunk.n_bytes)
        if self._observer:
            self._observer(chunk, start, time.perf_counter())

    def next_chunk(self) -> Chunk | None:
        """The next read, waiting for one; None when the store is closed. Called with the lock held."""
        while not self._closing:
            if self.queue and (not self._paused or self.queue[0].load is None):
                self._source.begins(self.queue[0])
                return self.queue.popleft()
            if self._paused or not self._source.start_load():
                self.resting += 1
                self._readable.wait()
                self.resting -= 1
        return None

    def finish(self, chunk: Chunk, error: BaseException | None) -> None:
        """A read has ended. Called with the lock held."""
        part = chunk.part
        part.chunks_left -= 1
        if error:
            part.error = error
            self.take_out(part)
        else:
            self.bytes_read += chunk.n_bytes
        if isinstance(part, Load) and part.chunks_left == 0:
            self._source.loaded(part)

    # --- the end ------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        with self.lock:
            self._closing = True
            self.queue.clear()
            self._readable.notify_all()

    def close(self) -> bool:
        """Forget the queue and wait for the threads to end; False after an interrupt while a read still hangs."""
        self._stop()
        return join_threads(self._threads, lambda: bool(self.interrupt))
