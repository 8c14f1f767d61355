"""Where the rows of sparse layers are kept, and how they come into a layer's buffer."""

from __future__ import annotations

import errno
import math
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.errors import DiskError
from runtime.kv.cache import Cache
from runtime.kv.compact import Compact, RowArray, rows_at
from runtime.kv.gather import Gather, OddGather, gather
from runtime.kv.needs import BOUNCE_BYTES, staging_bytes
from runtime.kv.options import KvFilter
from runtime.kv.slots import Move, Rows
from runtime.kv.whole import read_whole, write_whole
from runtime.memory import Region, view
from runtime.sizes import PAGE, format_size, page_down, page_up

_GAP_PAGES = 2  # pages read for nothing when that saves a request
_OTHER_FOLDER = "set TMPDIR to a folder on a disk with room, lower --ctx, or use --kv-store ram"


class Store(Protocol):
    """Rows of sparse layers. Positions of the prompt are rows; a part is keys (0) or values (1)."""

    n_threads: int
    aside: bool  # fetch beside the computation: with a disk or a core that has nothing else to do
    fetched_bytes: int
    read_bytes: int

    def fetch(self, compact: Mapping[int, Compact], layers: Sequence[int], move: Move) -> None:
        """Bring rows of these layers into slots of their buffers."""

    def put(self, layer: int, part: int, first_row: int, rows: RowArray) -> None:
        """Keep rows [first_row, first_row + len(rows)) of one part of a layer."""

    def close(self) -> None:
        """Give everything back."""


class RamStore:
    """Rows stay in llama.cpp's own cache. A core that does not compute copies chosen ones, where there is one."""

    n_threads = 1

    def __init__(self, cache: Cache, layers: Sequence[int], options: KvFilter, n_threads: int) -> None:
        """n_threads: that compute."""
        self.aside = n_threads < len(os.sched_getaffinity(0))
        self._copy_threads = 1 if self.aside else n_threads
        self._layers = cache.layers
        self._gathers: dict[tuple[int, ...], Gather | OddGather] = {}
        self._staging = Region(staging_bytes(options, [cache.layers[n].parts for n in layers]))
        self.fetched_bytes = self.read_bytes = 0

    def fetch(self, compact: Mapping[int, Compact], layers: Sequence[int], move: Move) -> None:
        """Copy rows of these layers to slots of their buffers."""
        key = tuple(layers)
        if key not in self._gathers:
            cached, buffers = [self._layers[n] for n in key], [compact[n] for n in key]
            self._gathers[key] = gather(self._copy_threads, cached, buffers, self._staging)
        self._gathers[key].copy(move)
        self.fetched_bytes += len(move.copied) * sum(self._layers[n].row_bytes for n in key)

    def put(self, layer: int, part: int, first_row: int, rows: RowArray) -> None:
        """Write rows into the cache."""
        tensor = self._layers[layer].parts[part]
        rows_at(tensor.data, tensor.n_cells, tensor.row_bytes)[first_row : first_row + len(rows)] = rows

    def close(self) -> None:
        """Free what copies; the rows are llama.cpp's."""
        for copier in self._gathers.values():
            copier.close()
        self._staging.free()


@dataclass(frozen=True)
class _Place:
    """Where the rows of one part of a layer are in the file."""

    offset: int
    row_bytes: int


class DiskStore:
    """Rows are in a file without a name, page by page; direct I/O, so they take no page cache.

    While a prompt is computed, all sparse layers share one slot of memory (`slot_address`): the rows of earlier passes
    are loaded into it, llama.cpp adds the new ones, and those are saved.
    """

    aside = True

    def __init__(self, cache: Cache, layers: Sequence[int], options: KvFilter) -> None:
        self.n_threads = options.readers
        self.fetched_bytes = self.read_bytes = 0
        self._lock = threading.Lock()  # for the figures; bounce buffers are each thread's own, and so are target slots
        self._local = threading.local()
        self._bounces: list[Region] = []
        self._places: dict[tuple[int, int], _Place] = {}
        slots = [0, 0]
        self.n_bytes = 0
        for n in layers:
            for part, tensor in enumerate(cache.layers[n].parts):
                self._places[n, part] = _Place(self.n_bytes, tensor.row_bytes)
                self.n_bytes += page_up(tensor.n_bytes)
                slots[part] = max(slots[part], page_up(tensor.n_bytes))
        self._fd, self._direct = _open_file(options.folder or tempfile.gettempdir(), self.n_bytes)
        self._slots = [Region(n_bytes) for n_bytes in slots]
        for slot in self._slots:
            slot.use_huge_pages(0)

    # --- prompts ------------------------------------------------------------------------------------------------

    def slot_address(self, part: int) -> int:
        """Where row 0 of the layer at hand is."""
        return self._slots[part].address

    def load(self, layer: int, part: int, n_rows: int) -> None:
        """Read the first n_rows rows of a part of a layer into the slot; the bytes behind them stay as they are."""
        place, address = self._places[layer, part], self._slots[part].address
        n_bytes = n_rows * place.row_bytes
        whole = page_down(n_bytes)
        for start in range(0, whole, BOUNCE_BYTES):
            end = min(whole, start + BOUNCE_BYTES)
            self._read(place.offset + start, view(address + start, end - start))
        if whole < n_bytes:
            bounce = self._bounce()
            self._read(place.offset + whole, bounce[:PAGE])
            view(address + whole, n_bytes - whole)[:] = bounce[: n_bytes - whole]

    def save(self, layer: int, first_row: int, n_rows: int) -> None:
        """Write rows of the slot; the pages around them are rows of the same layer, or not used yet."""
        for part, slot in enumerate(self._slots):
            place = self._places[layer, part]
            start = page_down(first_row * place.row_bytes)
            end = page_up((first_row + n_rows) * place.row_bytes)
            self._write(place.offset + start, view(slot.address + start, end - start))

    def drop_slot(self) -> None:
        """Give the slot's memory back until the next prompt."""
        for slot in self._slots:
            slot.drop(0, slot.n_bytes)

    # --- rows ---------------------------------------------------------------------------------------------------

    def fetch(self, compact: Mapping[int, Compact], layers: Sequence[int], move: Move) -> None:
        """Read rows of these layers into slots of their buffers; neighbours come in one request."""
        for layer in layers:
            self._fetch(compact[layer], layer, move)

    def _fetch(self, compact: Compact, layer: int, move: Move) -> None:
        rows, slots = move.rows, move.slots
        for part, target in enumerate(compact.rows):
            place = self._places[layer, part]
            step = BOUNCE_BYTES // PAGE // (place.row_bytes // PAGE + 2 + _GAP_PAGES)
            for start in range(0, len(rows), step):
                self._read_rows(place, rows[start : start + step], slots[start : start + step], target)
        with self._lock:
            self.fetched_bytes += len(rows) * sum(part.row_bytes for part in compact.parts)

    def _read_rows(self, place: _Place, rows: Rows, slots: Rows, target: RowArray) -> None:
        first = rows * place.row_bytes // PAGE
        last = ((rows + 1) * place.row_bytes - 1) // PAGE + 1
        starts = np.flatnonzero(np.concatenate([[True], first[1:] > last[:-1] + _GAP_PAGES]))
        ends = np.append(starts[1:], len(rows))
        run_first, run_last = first[starts], last[ends - 1]
        places = np.cumsum(run_last - run_first) - (run_last - run_first)  # of each run in the bounce buffer, in pages
        bounce = self._bounce()
        for at, start, end in zip(places.tolist(), run_first.tolist(), run_last.tolist(), strict=True):
            self._read(place.offset + start * PAGE, bounce[at * PAGE : (at + end - start) * PAGE])
        moved = np.repeat((places - run_first) * PAGE, ends - starts) + rows * place.row_bytes
        unit = math.gcd(place.row_bytes, PAGE)
        units = np.frombuffer(bounce, np.dtype((np.void, unit)))
        found = units[(moved // unit)[:, None] + np.arange(place.row_bytes // unit)]
        target[slots] = found.view(target.dtype).ravel()

    def put(self, layer: int, part: int, first_row: int, rows: RowArray) -> None:
        """Write rows of one part of a layer."""
        place = self._places[layer, part]
        data = rows.view(np.uint8).ravel()
        start, bounce = place.offset + first_row * place.row_bytes, self._bounce()
        done = 0
        while done < len(data):
            base = page_down(start + done)
            before = start + done - base
            n = min(len(data) - done, len(bounce) - before)
            n_bytes = page_up(before + n)
            self._read(base, bounce[:PAGE])
            if n_bytes > PAGE:
                self._read(base + n_bytes - PAGE, bounce[n_bytes - PAGE : n_bytes])
            bounce[before : before + n] = data[done : done + n].data
            self._write(base, bounce[:n_bytes])
            done += n

    # --- the file -----------------------------------------------------------------------------------------------

    def _bounce(self) -> memoryview:
        """A page-aligned buffer of this thread's own."""
        found: memoryview | None = getattr(self._local, "bounce", None)
        if found is None:
            region = Region(BOUNCE_BYTES)
            self._bounces.append(region)
            found = self._local.bounce = view(region.address, BOUNCE_BYTES)
        return found

    def _read(self, offset: int, target: memoryview) -> None:
        try:
            read_whole(self._fd, target, offset)
        except OSError as error:
            raise DiskError(f"reading keys and values failed: {error.strerror}", _OTHER_FOLDER) from None
        with self._lock:
            self.read_bytes += len(target)
        self._forget_pages(offset, len(target))

    def _write(self, offset: int, source: memoryview) -> None:
        try:
            write_whole(self._fd, source, offset, direct=self._direct)
        except OSError as error:
            raise DiskError(f"writing keys and values failed: {error.strerror}", _OTHER_FOLDER) from None
        self._forget_pages(offset, len(source))

    def _forget_pages(self, offset: int, n_bytes: int) -> None:
        if not self._direct:
            os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file, which removes it, and free the slot."""
        os.close(self._fd)
        for region in (*self._slots, *self._bounces):
            region.free()


def _open_file(folder: str, n_bytes: int) -> tuple[int, bool]:
    """A file without a name in a folder, with room for n_bytes, and whether it does direct I/O. Raises DiskError."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix="h2o-kv-") as file:
            try:
                fd, direct = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                fd, direct = os.dup(file.fileno()), False  # e.g. tmpfs has no direct I/O
    except OSError as error:
        raise DiskError(
            f"no file for keys and values can be made in {folder}: {error.strerror}", _OTHER_FOLDER
        ) from None
    try:
        os.posix_fallocate(fd, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            os.close(fd)
            what = f"keys and values take {format_size(n_bytes)} in {folder}"
            raise DiskError(f"{what}, which is not possible: {error.strerror}", _OTHER_FOLDER) from None
        os.ftruncate(fd, n_bytes)
    return fd, direct
