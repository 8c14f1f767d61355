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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from profiler.model_profile import DiskPoint, Spread
from runtime.aligned_io import BUFFERED, DIRECT, WeightFiles
from runtime.errors import DiskError
from runtime.memory import Region
from runtime.model_file import ModelFile
from runtime.sizes import MIB, PAGE, page_down, page_up

REQUESTS = (MIB, 4 * MIB, MIB // 4)
DEPTHS = (4, 2, 8, 1)
LEAST_BUFFER_BYTES, BUFFER_BYTES = MIB, 16 * MIB  # the most that is in flight at once
LIMIT_S = 10.0  # for the whole search
SAMPLE_S = 0.25
RAMP_S = 0.1  # at the start of a sample; bytes that arrive in it do not count
SAME = 0.03  # relative difference within which the smaller request and depth win
FINALISTS = 3
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
    """A way to read."""

    mode: Literal["direct", "buffered"]
    request_bytes: int
    depth: int


def way_of(point: DiskPoint) -> Way:
    """The way a point of a profile was measured with."""
    return Way(point.mode, point.request_bytes, point.depth)


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
        threads = [threading.Thread(target=self._work, args=(address,), daemon=True) for address in addresses]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            self._deadline = 0.0
            for thread in threads:
                thread.join()
        if self._error:
            raise self._error
        return self._arrivals

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
    if way.mode == BUFFERED:
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
    """The best way to read, everything that was tried, and what the user should know about it."""

    best: Way
    points: tuple[DiskPoint, ...]
    notes: tuple[str, ...]


@dataclass
class _Search:
    """One search: samples of every way, taken in turns from all over the model."""

    model: ModelFile
    buffer: Region
    progress: Callable[[float], None]
    sample_s: float = SAMPLE_S
    limit_s: float = LIMIT_S
    rates: dict[Way, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    next_piece: int = 0

    def __post_init__(self) -> None:
        self.start_s = time.perf_counter()
        self.n_pieces = sum(1 for _ in self.model.pieces)

    @property
    def spent(self) -> float:
        """Share of the time limit that has passed."""
        return min(1.0, (time.perf_counter() - self.start_s) / self.limit_s)

    def sample(self, files: WeightFiles, way: Way, counts: bool = True) -> float:
        """The rate of one way, in bytes per second."""
        chunks = list(weight_chunks(self.model, way.request_bytes, self.next_piece)) * cycles(self.model)
        start_s = time.perf_counter()
        arrivals = ChunkReader(files, self.buffer).read(chunks, way.depth, self.sample_s + RAMP_S)
        rate = rate_of(arrivals, start_s)
        self.next_piece = (self.next_piece + self._pieces_begun(arrivals)) % self.n_pieces
        if counts:
            self.rates.setdefault(way, []).append(rate)
        self.progress(self.spent)
        return rate

    def _pieces_begun(self, arrivals: list[Arrival]) -> int:
        """How many pieces a sample that began at next_piece has touched."""
        left = sum(a.n_bytes for a in arrivals)
        pieces = tuple(self.model.pieces)
        for n, piece in enumerate((*pieces[self.next_piece :], *pieces[: self.next_piece])):
            if left <= 0:
                return n
            left -= piece.span_bytes
        return 0

    def scan(self, files: WeightFiles, mode: Literal["direct", "buffered"], share: float) -> None:
        """One sample of every way that fits the buffer and the disk's speed, while the share of time lasts."""
        rate = self.sample(files, Way(mode, MIB // 4, 2), counts=False)
        for request_bytes, depth in itertools.product(REQUESTS, DEPTHS):
            in_flight = request_bytes * depth
            fits = in_flight <= self.buffer.n_bytes and in_flight <= rate * self.sample_s
            if (fits and self.spent < share) or not self.rates:
                rate = max(rate, self.sample(files, self._fitted(Way(mode, request_bytes, depth))))

    def _fitted(self, way: Way) -> Way:
        """The way, with requests that fit the buffer."""
        return way._replace(request_bytes=min(way.request_bytes, page_down(self.buffer.n_bytes // way.depth)))

    def finalists(self, mode: str) -> list[Way]:
        """The fastest ways of a mode after one sample each."""
        ways = [way for way in self.rates if way.mode == mode]
        return sorted(ways, key=lambda way: -self.rates[way][0])[:FINALISTS]

    def best(self) -> Way:
        """The fastest way by the median; within SAME of it the least in flight, direct before buffered."""
        most = max(len(rates) for rates in self.rates.values())
        medians = {way: statistics.median(r) for way, r in self.rates.items() if len(r) == most}
        fastest = max(medians.values())
        near = [way for way, median in medians.items() if median >= (1 - SAME) * fastest]
        return min(near, key=lambda way: (way.request_bytes * way.depth, way.mode != DIRECT, way.request_bytes))


def search(
    model: ModelFile,
    repeats: int = 3,
    *,
    buffer_bytes: int = BUFFER_BYTES,
    limit_s: float = LIMIT_S,
    progress: Callable[[float], None] = lambda _share: None,
) -> DiskSearch:
    """Find the best way to read the model: `repeats` samples of the fastest few of all ways. Raises DiskError."""
    buffer = _buffer(max(buffer_bytes, LEAST_BUFFER_BYTES))
    run = _Search(model, buffer, progress, limit_s=limit_s)
    direct, buffered = WeightFiles(model.paths, DIRECT), WeightFiles(model.paths, BUFFERED)
    try:
        if direct.mode == DIRECT:
            run.scan(direct, "direct", 0.4)
        else:
            run.notes.append("this file system has no direct reads: measured through the page cache")
        _scan_buffered(run, buffered)
        finalists = [*run.finalists("direct"), *run.finalists("buffered")[:1]]
        for _ in range(repeats - 1):
            for way in finalists:
                if way.mode == DIRECT or is_cold(model) or direct.mode != DIRECT:
                    run.sample(direct if way.mode == DIRECT else buffered, way)
    finally:
        direct.close()
        buffered.close()
        buffer.free()
    points = tuple(DiskPoint(way.mode, way.request_bytes, way.depth, Spread.of(r)) for way, r in run.rates.items())
    return DiskSearch(run.best(), points, tuple(run.notes))


def _scan_buffered(run: _Search, files: WeightFiles) -> None:
    """Sample buffered reads where the file can be made cold: as many ways as direct reads were good at."""
    cold = is_cold(run.model)
    best_direct = run.finalists("direct")
    if not best_direct:
        if not cold:
            run.notes.append("the file stays in memory (another program or the file system holds it): not a disk speed")
        run.scan(files, "buffered", 0.6)
        return
    if not cold:
        run.notes.append("buffered reads were not measured: the file cannot be dropped from the page cache")
        return
    ways = {Way("buffered", way.request_bytes, way.depth) for way in best_direct} | {Way("buffered", MIB, 1)}
    for way in sorted(ways, reverse=True):
        if run.spent < 0.6 and is_cold(run.model):
            run.sample(files, run._fitted(way))
