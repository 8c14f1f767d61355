"""How much of llama.cpp's cache of keys and values the positions so far take.

The cache is made for the whole context, in memory of ours that is touched lazily: position p is written to cell p of
every layer's keys and values, so what is behind the positions so far takes nothing yet. Weights live in its room, and
leave in steps as the context grows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from runtime.llama import abi
from runtime.llama.hollow import ContextBuffers
from runtime.llama.model_file import ModelFile
from runtime.memory import drop_pages, make_pages
from runtime.plans.ledger import touched_bytes
from runtime.settings import KV_TYPES

STEP = 32  # positions that room is made for at once
_AHEAD = 8 * STEP  # whose pages are made at once where there is room for all
_ROWS = re.compile(r"^cache_[kv]_l\d+$")  # a row for each position
_STATES = re.compile(r"^cache_[rs]_l\d+$")  # recurrent: the same bytes for any number of positions
_TRANSPOSED = frozenset({"grok"})  # without flash attention llama.cpp keeps values with positions innermost


class Rows(NamedTuple):
    """Keys or values of a layer: n_cells rows of row_bytes, the first at an address."""

    address: int
    row_bytes: int
    n_cells: int


class CacheMemory:
    """The memory of a context's cache: n_bytes in all, of which `rows` fill from the front."""

    def __init__(self, n_bytes: int, rows: Iterable[Rows]) -> None:
        self.n_bytes = n_bytes
        self._rows = tuple(rows)
        self.n_cells = max((rows.n_cells for rows in self._rows), default=0)
        self._n_made = 0  # positions whose pages were made

    @classmethod
    def of(cls, buffers: ContextBuffers, file: ModelFile) -> CacheMemory:
        """Of the layers of `file`; where that is a part of a model, the other layers' memory is never touched."""
        own, others_bytes = of_layers(buffers.caches, {layer.index for layer in file.layers})
        return cls(buffers.kv_bytes - others_bytes, growing_rows(own, file.architecture))

    def steps(self, n_positions: int) -> int:
        """n_positions rounded up to where the next step begins, at most all cells."""
        return min(-(-max(n_positions, 1) // STEP) * STEP, self.n_cells)

    def bytes_for(self, n_positions: int) -> int:
        """The most bytes that n_positions take; what does not fill from the front counts in full."""
        return self.n_bytes - sum(
            rows.row_bytes * rows.n_cells - touched_bytes(rows.row_bytes, rows.n_cells, n_positions)
            for rows in self._rows
        )

    def make(self, n_positions: int) -> None:
        """Where there is room for all positions: have the pages of so many, and of some more."""
        if n_positions <= self._n_made:
            return
        first, self._n_made = self._n_made, min(n_positions + _AHEAD, self.n_cells)
        for rows in self._rows:
            make_pages(rows.address + rows.row_bytes * first, rows.address + rows.row_bytes * self._n_made)

    def drop_behind(self, n_positions: int) -> None:
        """Give back what positions from n_positions on had taken: none of them is in the sequence any more.

        They read as zeros then; attention masks cells without a position, and would only mind what is no number.
        """
        self._n_made = min(self._n_made, n_positions)
        for rows in self._rows:
            end = rows.address + rows.row_bytes * rows.n_cells
            drop_pages(min(rows.address + rows.row_bytes * n_positions, end), end)


def cell_bytes(file: ModelFile, kv_type: str) -> int:
    """Keys and values of a position in one layer, as the model's header says it, where its layers are alike."""
    heads = max(1, file.hyper_parameter("attention.head_count"))
    width = file.hyper_parameter("attention.key_length") or file.hyper_parameter("embedding_length") // heads
    heads = file.hyper_parameter("attention.head_count_kv") or heads
    return 2 * int(abi.ggml_row_size(KV_TYPES[kv_type], heads * width))


def of_layers(caches: Iterable[Mapping[str, int]], layers: Collection[int]) -> tuple[list[dict[str, int]], int]:
    """The tensors of a context's cache that belong to these layers, and the bytes of all others."""
    own, others = [], 0
    for group in caches:
        named = {name: address for name, address in group.items() if int(name.rpartition("_l")[2]) in layers}
        others += sum(int(abi.ggml_nbytes(address)) for name, address in group.items() if name not in named)
        own.append(named)
    return own, others


def growing_rows(caches: Iterable[Mapping[str, int]], architecture: str) -> list[Rows]:
    """The tensors (name -> address, buffer by buffer) of a context's cache that fill position by position.

    None where the cache has tensors of other kinds, or of different lengths: they may keep positions elsewhere.
    """
    tensors = [named for group in caches for named in group.items()]
    if not all(_ROWS.match(name) or _STATES.match(name) for name, _ in tensors):
        return []
    found = []
    for name, address in tensors:
        if _STATES.match(name) or (name.startswith("cache_v") and architecture in _TRANSPOSED):
            continue
        tensor = abi.Tensor.from_address(address)
        found.append(Rows(int(tensor.data), int(tensor.nb[1]), int(tensor.ne[1])))
    return found if len({rows.n_cells for rows in found}) <= 1 else []
