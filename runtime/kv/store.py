"""Where the rows of sparse layers are kept, and how they come into a layer's buffer."""

from __future__ import annotations

from runtime.kv.cache import Cache, CacheLayer
from runtime.kv.compact import Compact, RowArray, rows_at
from runtime.kv.slots import Rows


class RamStore:
    """Rows stay in llama.cpp's own cache. Copies are short, so nothing is gained by making them aside."""

    n_threads = 0

    def __init__(self, cache: Cache) -> None:
        self._layers = cache.layers

    def fetch(self, compact: Compact, layer: int, rows: Rows, slots: Rows) -> int:
        """Copy rows of a layer to slots of its buffer; returns the bytes."""
        for part, target in enumerate(compact.rows):
            target[slots] = self._rows(self._layers[layer], part)[rows]
        return len(rows) * self._layers[layer].row_bytes

    def put(self, layer: int, part: int, first_row: int, rows: RowArray) -> None:
        """Write rows [first_row, first_row + len(rows)) of one part of a layer."""
        self._rows(self._layers[layer], part)[first_row : first_row + len(rows)] = rows

    def _rows(self, layer: CacheLayer, part: int) -> RowArray:
        tensor = layer.parts[part]
        return rows_at(tensor.data, tensor.n_cells, tensor.row_bytes)

    def close(self) -> None:
        """Nothing to give back: the memory is llama.cpp's."""
