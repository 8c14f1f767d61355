"""Attention over keys and values in a file: where they lie, or copied into memory before.

    python -m h2o_cli.bench.batch.in_place [FOLDER [POSITIONS [THREADS]]]

FlexGen's --cpu-cache-compute attends to the part of keys and values on the slower tier without copying it. Here that
tier is a file, which a processor sees as mapped pages. One token's attention in all layers of SmolLM2-135M.
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from h2o_cli.output import emit, table
from runtime.llama import abi
from runtime.llama.own_graph import OwnGraph, describe, operate
from runtime.memory import Region, device_bytes_read
from runtime.sizes import MB, page_up
from runtime.weights.files import WeightFiles

Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]
_F16, _HALF_BYTES = 1, 2
_ROUNDS, _LAYERS, _READERS = 15, 30, 4
_HEADS, _KV_HEADS, _WIDTH = 9, 3, 64


class Attention:
    """ggml's own kernel for the attention of one token, over keys and values at any addresses."""

    def __init__(self, n_threads: int) -> None:
        self._query, self._keys, self._values, self._mask, self._out = (abi.Tensor() for _ in range(5))
        operate(self._out, abi.OP_FLASH_ATTN_EXT, self._query, self._keys, self._values, self._mask)
        self._graph = OwnGraph(n_threads, [self._out])

    def compute(self, query: Floats, keys: int, values: int, n_rows: int, n_kv_heads: int) -> Floats:
        """Of query [heads, width], over n_rows rows [kv_heads, width] of halves at two addresses."""
        n_heads, width = query.shape
        found, seen = np.zeros_like(query), np.zeros(n_rows, np.float16)
        describe(self._query, query.ctypes.data, (width, 1, n_heads))
        describe(self._out, found.ctypes.data, (width, n_heads))
        for tensor, address, ne in (
            (self._keys, keys, (width, n_rows, n_kv_heads)),
            (self._values, values, (width, n_rows, n_kv_heads)),
            (self._mask, seen.ctypes.data, (n_rows, 1)),
        ):
            describe(tensor, address, ne, _F16)
            tensor.nb[0] = _HALF_BYTES
            tensor.nb[1] = width * n_kv_heads * _HALF_BYTES
            tensor.nb[2], tensor.nb[3] = width * _HALF_BYTES, n_rows * width * n_kv_heads * _HALF_BYTES
        parameters = np.array([width**-0.5, 0, 0], np.float32).view(np.int32)
        self._out.op_params[:3] = parameters.tolist()
        self._graph.compute("attention", "")
        return found

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()


def segments(n_rows: int, n_kv_heads: int, percents: Sequence[int]) -> list[range]:
    """FlexGen's parts of sequences * kv_heads rows: so many percent for each tier, in whole sequences; the rest is the
    last one's."""
    ends, start = [0], 0
    for percent in percents:
        start += n_rows * percent // 100 // n_kv_heads * n_kv_heads
        ends.append(start)
    ends[-1] = n_rows
    return [range(*pair) for pair in pairwise(ends)]


@contextmanager
def mapped(path: Path) -> Iterator[tuple[int, mmap.mmap]]:
    """The address of a file's pages."""
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    whole = np.frombuffer(pages, np.uint8)
    try:
        yield int(whole.ctypes.data), pages
    finally:
        del whole
        pages.close()


class Ways:
    """The attention of one token in all layers, in each of the ways."""

    def __init__(self, attention: Attention, path: Path, n_rows: int) -> None:
        self._attention, self._path, self._n_rows = attention, path, n_rows
        self._half = page_up(n_rows * _KV_HEADS * _WIDTH * _HALF_BYTES)
        random = np.random.default_rng(0)
        self._query = random.standard_normal((_HEADS, _WIDTH)).astype(np.float32)
        layer = random.standard_normal(self._half).astype(np.float16).tobytes()
        with path.open("wb") as file:
            for _ in range(_LAYERS):
                file.write(layer)
        self._files = WeightFiles([path])
        self._readers = ThreadPoolExecutor(_READERS)
        self._buffers = [Region(2 * self._half) for _ in range(2)]

    @property
    def n_bytes(self) -> int:
        """Of all layers."""
        return 2 * self._half * _LAYERS

    def _attend(self, address: int) -> Floats:
        return self._attention.compute(self._query, address, address + self._half, self._n_rows, _KV_HEADS)

    def _read(self, layer: int) -> int:
        """Read a layer, in several requests at once as the engine reads weights."""
        address, n_bytes = self._buffers[layer % 2].address, page_up(2 * self._half // _READERS)

        def read(start: int) -> None:
            self._files.read(0, layer * 2 * self._half + start, address + start, min(n_bytes, 2 * self._half - start))

        list(self._readers.map(read, range(0, 2 * self._half, n_bytes)))
        return address

    def copied(self) -> list[Floats]:
        """Each layer is read, then attended to."""
        return [self._attend(self._read(layer)) for layer in range(_LAYERS)]

    def copied_ahead(self) -> list[Floats]:
        """The next layer is read meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            found, coming = [], reader.submit(self._read, 0)
            for layer in range(_LAYERS):
                address = coming.result()
                if layer + 1 < _LAYERS:
                    coming = reader.submit(self._read, layer + 1)
                found.append(self._attend(address))
            return found

    def in_place(self, *, ahead: bool = False) -> list[Floats]:
        """Mapped pages are attended to; ahead: the system is asked for the next layer's."""
        with mapped(self._path) as (address, pages):
            found = []
            for layer in range(_LAYERS):
                if ahead and layer + 1 < _LAYERS:
                    pages.madvise(mmap.MADV_WILLNEED, (layer + 1) * 2 * self._half, 2 * self._half)
                found.append(self._attend(address + layer * 2 * self._half))
            return found

    def computed(self) -> list[Floats]:
        """One layer that is in memory, again and again: what computing takes."""
        return [self._attend(self._buffers[0].address) for _ in range(_LAYERS)]

    def close(self) -> None:
        """Free all."""
        self._readers.shutdown()
        self._files.close()
        for region in self._buffers:
            region.free()
        self._path.unlink()


def main(folder: Path = Path(), n_rows: int = 4096, n_threads: int = 2) -> None:
    """Compare them."""
    with closing(Attention(n_threads)) as attention, closing(Ways(attention, folder / "in-place", n_rows)) as ways:
        ways_of: dict[str, Callable[[], list[Floats]]] = {
            "copied, then attended to": ways.copied,
            "copied, the next layer meanwhile": ways.copied_ahead,
            "in place": ways.in_place,
            "in place, the next layer asked for": lambda: ways.in_place(ahead=True),
            "in memory": ways.computed,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways_of}
        n_read = dict.fromkeys(ways_of, 0)
        for _ in range(_ROUNDS):
            found = []
            for name, way in ways_of.items():
                forget(folder / "in-place")
                start, before = time.perf_counter(), device_bytes_read() or 0
                found.append(way())
                seconds[name].append(time.perf_counter() - start)
                n_read[name] = (device_bytes_read() or 0) - before
            if not all(np.array_equal(found[0], one) for one in found[1:4]):
                raise SystemExit("the ways do not give the same attention")
        lines = [[f"{n_rows} positions, {ways.n_bytes / MB:.0f} MB", "ms", "least", "most", "MB read"]]
        for name, all_s in seconds.items():
            lines.append(
                [
                    name,
                    *(f"{1000 * one:.1f}" for one in (statistics.median(all_s), min(all_s), max(all_s))),
                    f"{n_read[name] / MB:.0f}",
                ]
            )
        emit(table(lines, right=range(1, 5)) + "\n")


def forget(path: Path) -> None:
    """Have the system keep none of a file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "."), *map(int, sys.argv[2:]))
