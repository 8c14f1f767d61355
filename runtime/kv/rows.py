"""Keys and values of some positions, layer by layer, copied out of a context's cache and into one again.

Position p is in cell p of every layer (see cache_memory.py). What is copied is what was computed, bit by bit, so it can
go into the cache of any context with the same layers, type of keys and values, and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runtime.kv.cache_memory import Rows, growing_rows, of_layers
from runtime.llama.model_file import ModelFile
from runtime.memory import view


class CacheRows:
    """The rows of every layer of `file`, in order; `cell_bytes` has each layer's bytes of a position.

    It is empty where a position is not in its own cell: recurrent states, windows, values with positions innermost.
    """

    def __init__(self, caches: Iterable[Mapping[str, int]], file: ModelFile, n_ctx: int) -> None:
        """caches: tensors (name -> address) of each buffer of the cache."""
        own, _ = of_layers(caches, {layer.index for layer in file.layers})
        names = [name for group in own for name in group]
        rows = growing_rows(own, file.architecture)
        self._layers: list[list[Rows]] = []
        if names and len(rows) == len(names) and rows[0].n_cells >= n_ctx:
            for layer in file.layers:
                self._layers.append([r for name, r in zip(names, rows, strict=True) if _layer(name) == layer.index])
        self.cell_bytes = tuple(sum(rows.row_bytes for rows in layer) for layer in self._layers)

    def read(self, first: int, n: int, begin: int, end: int) -> bytes:
        """The rows of n positions of the begin-th layer and those up to the end-th: n rows of keys, n of values, ..."""
        return b"".join(view(r.address + first * r.row_bytes, n * r.row_bytes) for r in self._of(begin, end))

    def write(self, first: int, n: int, begin: int, end: int, data: bytes) -> None:
        """Put such rows in. The positions have to be there (Engine.adopt)."""
        source, start = memoryview(data), 0
        for r in self._of(begin, end):
            n_bytes = n * r.row_bytes
            view(r.address + first * r.row_bytes, n_bytes)[:] = source[start : start + n_bytes]
            start += n_bytes

    def _of(self, begin: int, end: int) -> list[Rows]:
        return [rows for layer in self._layers[begin:end] for rows in layer]


def _layer(name: str) -> int:
    return int(name.rpartition("_l")[2])
