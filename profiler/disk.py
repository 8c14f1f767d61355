"""How fast weights can be read from this disk: the model's own file, in the engine's order, never from the page cache.

A sample reads pieces of the model with `depth` threads and requests of request_bytes, as the engine's readers do, for
a fraction of a second or once through the model, whichever is less. It goes on where the sample before it ended.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from profiler.awake import Computing
from profiler.model_profile import DiskPoint, Mode, Spread
from runtime.errors import DiskError
from runtime.llama.model_file import ModelFile
from runtime.memory import Region
from runtime.settings import Settings
from runtime.sizes import MIB, PAGE, page_down, page_up
from runtime.threads import start_threads
from runtime.weights.files import BUFFERED, DIRECT, WeightFiles

LEAST_BUFFER_BYTES, BUFFER_BYTES = MIB, 16 * MIB  # the most that is in flight at once
SAMPLE_S = 0.25
RAMP_S = 0.1  # at the start of a sample; bytes that arrive in it do not count
TURNS = 5  # samples of each way that is compared
RIVALS = 2  # ways that are compared with the usual one
BETTER = 1.15  # times the usual way's rate, at least, for another way to be chosen
AS_FAST = 0.97  # computing beside a way's reads, against the same beside the usual way's
ENOUGH_BYTES, MOST_CYCLES = 32 * MIB, 32  # a smaller model is read several times over in one sample
COLD = 0.01  # cached share of a file up to which it counts as cold

_CACHESTAT = 451  # the system call's number, the same on all machines but those below
_NO_CACHESTAT = ("mips", "alpha")
_MAP_STEP = 64 * MIB
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long


class Chunk(NamedTuple):
    """One request; group is the layer it belongs to (the head is the last)."""

    file: int
    offset: int
    n_bytes: int
    group: int


class Arrival(NamedTuple):
    """A request that was answered at time_s (performance counter)."""

    time_s: float
    n_bytes: int
    group: int


class Way(NamedTuple):
    """A way to read: bytes of a request, and how many are in flight."""

    request_bytes: int
    depth: int


USUAL = Way(Settings.request_bytes, Settings.depth)  # of a run without a profile
OTHERS = tuple(
    Way(request_bytes, depth)
    for request_bytes, depths in ((2 * MIB, (8, 2, 1)), (4 * MIB, (4, 2, 1)), (MIB, (4, 8)), (MIB // 4, (4, 8)))
    for depth in depths
)


# --- the page cache -------------------------------------------------------------------------------------------------


def cached_bytes(fd: int, offset: int, n_bytes: int) -> int | None:
    """Bytes of the file range in the page cache; None where the kernel does not tell."""
    found = _cachestat(fd, offset, n_bytes)
    return _mincore(fd, offset, n_bytes) if found is None else found


def make_cold(fd: int) -> None:
    """Ask the kernel to forget all pages of the file, without root. Pages that others have mapped stay."""
    with suppress(OSError):
        os.fsync(fd)  # pages that are not yet on disk cannot be dropped
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _cachestat(fd: int, offset: int, n_bytes: int) -> int | None:
    if platform.machine().startswith(_NO_CACHESTAT):
        return None
    file_range = (ctypes.c_uint64 * 2)(offset, n_bytes)
    counts = (ctypes.c_uint64 * 5)()  # pages cached, dirty, being written, evicted, evicted lately
    status = _libc.syscall(ctypes.c_long(_CACHESTAT), ctypes.c_long(fd), file_range, counts, ctypes.c_long(0))
    return int(counts[0]) * PAGE if status == 0 else None


def _mincore(fd: int, offset: int, n_bytes: int) -> int | None:
    """The same by mapping the range, part by part. Of files the user may not write, all counts as cached."""
    found = 0
    for start in range(offset, offset + n_bytes, _MAP_STEP):
        size = min(_MAP_STEP, offset + n_bytes - start)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
        if address in (None, ctypes.c_void_p(-1).value):
            return None
        pages = (ctypes.c_ubyte * -(-size // PAGE))()
        status = _libc.mincore(address, size, pages)
        _libc.munmap(address, size)
        if status != 0:
            return None
        found += sum(page & 1 for page in pages) * PAGE
    return found


def is_cold(model: ModelFile) -> bool:
    """Empty the page cache of the model's files and look whether that worked."""
    for path, size in zip(model.paths, model.file_sizes, strict=True):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            make_cold(fd)
            found = cached_bytes(fd, 0, size)
        finally:
            os.close(fd)
        if found is None or found > max(COLD * size, 16 * PAGE):
            return False
    return True


# --- reading --------------------------------------------------------------------------------------------------------


def weight_chunks(model: ModelFile, request_bytes: int, first_piece: int = 0) -> Iterator[Chunk]:
    """The requests of one pass through the model as the engine makes them, beginning at a piece and around."""
    pieces = tuple(model.pieces)
    for piece in (*pieces[first_piece:], *pieces[:first_piece]):
        start, end = piece.span
        for offset in range(start, end, request_bytes):
            yield Chunk(piece.tensor.file, offset, min(request_bytes, end - offset), piece.layer)


class ChunkReader:
    """Reads chunks with several threads at once into a buffer of `depth` requests."""

    def __init__(self, files: WeightFiles, buffer: Region) -> None:
        self._files, self._buffer = files, buffer
        self._lock = threading.Lock()

    def read(self, chunks: Iterable[Chunk], depth: int, limit_s: float = float("inf")) -> list[Arrival]:
        """Read until the chunks end or limit_s has passed; what was read when. Raises DiskError."""
        self._chunks, self._arrivals = iter(chunks), list[Arrival]()
        self._error: BaseException | None = None
        self._deadline = time.perf_counter() + limit_s
        slot_bytes = page_down(self._buffer.n_bytes // depth)
        addresses = [self._buffer.address + i * slot_bytes for i in range(depth)]
        threads = start_threads(depth, "sample", lambda: self._work(addresses.pop()), self._stop)
        try:
            for thread in threads:
                thread.join()
        finally:
            self._stop()
            for thread in threads:
                thread.join()
        if self._error:
            raise self._error
        return self._arrivals

    def _stop(self) -> None:
        self._deadline = 0.0

    def _work(self, address: int) -> None:
        while time.perf_counter() < self._deadline:
            with self._lock:
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            try:
                self._files.read(chunk.file, chunk.offset, address, chunk.n_bytes)
            except DiskError as error:
                self._error, self._deadline = error, 0.0
                return
            with self._lock:
                self._arrivals.append(Arrival(time.perf_counter(), chunk.n_bytes, chunk.group))


def _buffer(n_bytes: int) -> Region:
    """Memory to read into, present from the start as the engine's window is after its first pass."""
    buffer = Region(n_bytes)
    buffer.use_huge_pages(buffer.n_bytes)
    ctypes.memset(buffer.address, 0, buffer.n_bytes)
    return buffer


def rate_of(arrivals: list[Arrival], start_s: float, ramp_s: float = RAMP_S) -> float:
    """Bytes per second from the end of the ramp (at most a quarter of the sample) to the last arrival."""
    last_s = arrivals[-1].time_s
    ramp_end_s = start_s + min(ramp_s, (last_s - start_s) / 4)
    before = [a.time_s for a in arrivals if a.time_s <= ramp_end_s]
    from_s = max(before, default=start_s)
    counted = sum(a.n_bytes for a in arrivals if a.time_s > from_s)
    return counted / max(last_s - from_s, 1e-9)


def cycles(model: ModelFile) -> int:
    """How often a small model is read in one measurement, so that starting the threads does not count for much."""
    n_bytes = sum(piece.span_bytes for piece in model.pieces)
    return max(1, min(MOST_CYCLES, -(-ENOUGH_BYTES // n_bytes)))


def group_seconds(
    model: ModelFile, files: WeightFiles, way: Way, go_on: Callable[[], bool] = lambda: True
) -> list[float]:
    """Read the whole model in a stream; seconds for each layer and the head, which add up to one time through it.

    go_on is asked before every request; when it says no, the rest is not read and the result is of no use.
    """
    if files.mode == BUFFERED:
        is_cold(model)
    n_groups, n_cycles = len(model.groups), cycles(model)
    chunks = (
        chunk._replace(group=chunk.group + cycle * n_groups)
        for cycle in range(n_cycles)
        for chunk in weight_chunks(model, way.request_bytes)
    )
    buffer = _buffer(way.request_bytes * way.depth)
    try:
        start_s = time.perf_counter()
        arrivals = ChunkReader(files, buffer).read(itertools.takewhile(lambda _: go_on(), chunks), way.depth)
    finally:
        buffer.free()
    ends = [start_s] * (n_groups * n_cycles)
    for arrival in arrivals:
        ends[arrival.group] = max(ends[arrival.group], arrival.time_s)
    ends = list(itertools.accumulate(ends, max))
    seconds = [end - before for before, end in zip([start_s, *ends], ends, strict=False)]
    return [sum(seconds[group::n_groups]) / n_cycles for group in range(n_groups)]


def row_seconds(model: ModelFile, files: WeightFiles, n_rows: int) -> list[float]:
    """Seconds to read one row of the input embedding, for n_rows rows all over the table."""
    if not model.row_tables:
        return [0.0]
    table = model.row_tables[0]
    buffer = _buffer(table.row_bytes + 2 * PAGE)
    seconds = []
    for i in range(n_rows):
        first = table.offset + table.n_rows * (2 * i + 1) // (2 * n_rows) * table.row_bytes
        start, end = page_down(first), page_up(first + table.row_bytes)
        begin_s = time.perf_counter()
        files.read(table.file, start, buffer.address, end - start)
        seconds.append(time.perf_counter() - begin_s)
    buffer.free()
    return seconds


# --- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiskSearch:
    """The way to read, how the file system reads then, every way tried, and what the user should know about it."""

    best: Way
    mode: Mode
    points: tuple[DiskPoint, ...]
    notes: tuple[str, ...]

    @property
    def bytes_per_s(self) -> float:
        """The rate of the best way."""
        return next(p.bytes_per_s.mean for p in self.points if (p.request_bytes, p.depth) == self.best)


class _Search:
    """One search: samples of every way, from all over the model."""

    def __init__(
        self, model: ModelFile, files: WeightFiles, buffer: Region, progress: Callable[[float], None] = lambda _: None
    ) -> None:
        self.model, self.files, self.buffer = model, files, buffer
        self.rates: dict[Way, list[float]] = {}
        self._progress = progress
        self._most_bytes = max(piece.span_bytes for piece in model.pieces)
        self._n_pieces = sum(1 for _ in model.pieces)
        self._next_piece = self._n_samples = 0

    def in_flight(self, way: Way) -> int:
        """Bytes in flight: no request is larger than a piece."""
        return min(way.request_bytes, self._most_bytes) * way.depth

    def fitted(self, way: Way) -> Way:
        """The way, with requests that fit the buffer."""
        return way._replace(request_bytes=min(way.request_bytes, page_down(self.buffer.n_bytes // way.depth)))

    def sample(self, way: Way) -> float:
        """The rate of one way, in bytes per second."""
        if self.files.mode == BUFFERED:
            is_cold(self.model)
        chunks = list(weight_chunks(self.model, self.fitted(way).request_bytes, self._next_piece)) * cycles(self.model)
        start_s = time.perf_counter()
        arrivals = ChunkReader(self.files, self.buffer).read(chunks, way.depth, SAMPLE_S + RAMP_S)
        self._next_piece = (self._next_piece + self._pieces_begun(arrivals)) % self._n_pieces
        self._n_samples += 1
        self._progress(min(1.0, self._n_samples / (len(OTHERS) + (1 + RIVALS) * TURNS)))
        return rate_of(arrivals, start_s)

    def _pieces_begun(self, arrivals: list[Arrival]) -> int:
        """How many pieces a sample that began at _next_piece has touched."""
        left = sum(a.n_bytes for a in arrivals)
        pieces = tuple(self.model.pieces)
        for n, piece in enumerate((*pieces[self._next_piece :], *pieces[: self._next_piece])):
            if left <= 0:
                return n
            left -= piece.span_bytes
        return 0

    def turns(self, ways: Sequence[Way]) -> dict[Way, list[float]]:
        """TURNS samples of each way, in turns, so that a disk that gets slower gets slower for all of them."""
        rates: dict[Way, list[float]] = {way: [] for way in ways}
        for turn in range(TURNS):
            for way in ways[:: -1 if turn % 2 else 1]:
                rates[way].append(self.sample(way))
        return rates

    def rivals(self, usual_rate: float) -> list[Way]:
        """The ways that looked better than the usual one in a sample each; none on a disk too slow for samples."""
        seen = {(self.in_flight(USUAL), USUAL.depth)}
        for way in OTHERS:
            in_flight = self.in_flight(way)
            fits = in_flight <= self.buffer.n_bytes and in_flight <= usual_rate * SAMPLE_S / 4
            if fits and (in_flight, way.depth) not in seen:
                seen.add((in_flight, way.depth))
                self.rates[way] = [self.sample(way)]
        better = [way for way, rates in self.rates.items() if rates[0] > usual_rate]
        return sorted(better, key=lambda way: -self.rates[way][0])[:RIVALS]

    def best(self, n_threads: int) -> Way:
        """The usual way, unless another one is better beyond the noise, also while llama.cpp computes."""
        usual_rate = self.sample(USUAL)
        ways = [USUAL, *self.rivals(usual_rate)]
        self.rates |= self.turns(ways)
        found = max(ways, key=lambda way: statistics.median(self.rates[way]))
        if found == USUAL or not is_better(self.rates[found], self.rates[USUAL]):
            return USUAL
        return found if self._holds_while_computing(found, n_threads) else USUAL

    def _holds_while_computing(self, way: Way, n_threads: int) -> bool:
        """Whether a way is better too, and leaves as much to the computation, while that takes all threads."""
        rates: dict[Way, list[float]] = {USUAL: [], way: []}
        speeds: dict[Way, list[float]] = {USUAL: [], way: []}
        with Computing(n_threads) as computing:
            for turn in range(TURNS):
                for each in (USUAL, way) if turn % 2 else (way, USUAL):
                    computing.speed()
                    rates[each].append(self.sample(each))
                    speeds[each].append(computing.speed())
        as_fast = statistics.median(speeds[way]) >= AS_FAST * statistics.median(speeds[USUAL])
        return as_fast and is_better(rates[way], rates[USUAL])


def is_better(rates: Sequence[float], usual: Sequence[float]) -> bool:
    """Whether rates are higher than the usual way's beyond the noise: their medians, and all but one on each side."""
    faster = statistics.median(rates) > BETTER * statistics.median(usual)
    return faster and sorted(rates)[min(1, len(rates) - 1)] > sorted(usual)[max(0, len(usual) - 2)]


def search(
    model: ModelFile,
    *,
    n_threads: int,
    buffer_bytes: int = BUFFER_BYTES,
    progress: Callable[[float], None] = lambda _share: None,
) -> DiskSearch:
    """How to read the model: directly wherever the file system can, in the usual way unless another one is better.

    n_threads: of the computation the better way has to stand beside. Raises DiskError.
    """
    files, notes = WeightFiles(model.paths), list[str]()
    buffer = _buffer(max(buffer_bytes, LEAST_BUFFER_BYTES))
    try:
        if files.mode == BUFFERED:
            notes.append("this file system has no direct reads: measured through the page cache")
            if not is_cold(model):
                notes.append("the file stays in memory (another program or the file system holds it): not a disk speed")
        run = _Search(model, files, buffer, progress)
        best = run.best(n_threads)
    finally:
        files.close()
        buffer.free()
    mode: Mode = "direct" if files.mode == DIRECT else "buffered"
    points = tuple(DiskPoint(mode, *way, Spread.of(rates)) for way, rates in run.rates.items())
    return DiskSearch(best, mode, points, tuple(notes))
