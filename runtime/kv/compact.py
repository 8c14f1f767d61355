"""What a sparse layer attends to: chosen rows and decoded rows side by side, and the tensors that say so.

A flash-attention node reads keys, values and mask through its src[1..3]. Tensors of our own take their place there: the
same shapes and strides, other bytes, fewer rows.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.kv.cache import CacheLayer
from runtime.llama import abi
from runtime.llama.own_graph import cut_off
from runtime.memory import Region, view

RowArray = npt.NDArray[Any]
_HALF = 2  # bytes of a mask's elements
PAD = 256  # llama.cpp rounds the rows of a node up to this


def rows_at(address: int, n_rows: int, row_bytes: int) -> RowArray:
    """Memory as rows [n_rows] of row_bytes bytes each."""
    return np.frombuffer(view(address, n_rows * row_bytes), np.dtype((np.void, row_bytes)))


class StandIn:
    """A tensor that takes another one's place for some passes."""

    def __init__(self) -> None:
        self.tensor = abi.Tensor()
        self.address = ctypes.addressof(self.tensor)

    def copy(self, original: int) -> None:
        """Become a copy of a tensor that depends on nothing."""
        ctypes.memmove(self.address, original, abi.TENSOR_BYTES)
        cut_off(self.tensor)


class Compact:
    """Keys and values of one sparse layer: n_rows rows each, memory that is touched lazily."""

    def __init__(self, cache: CacheLayer, n_rows: int) -> None:
        self.parts = cache.parts
        self._regions = [Region(n_rows * part.row_bytes) for part in cache.parts]
        for region in self._regions:
            region.use_huge_pages(0)
        self.rows = [
            rows_at(region.address, n_rows, part.row_bytes)
            for region, part in zip(self._regions, cache.parts, strict=True)
        ]
        self._tensors = (StandIn(), StandIn())

    @property
    def addresses(self) -> tuple[int, int]:
        """The tensors that take the places of a node's keys and values."""
        return self._tensors[0].address, self._tensors[1].address

    @property
    def data(self) -> tuple[int, int]:
        """Where slot 0 of keys and values is."""
        return self._regions[0].address, self._regions[1].address

    def place(self, node: abi.Tensor, n_rows: int) -> None:
        """Make a flash-attention node read the first n_rows rows from here. Filter._layer_of puts its sources back."""
        for i, (own, region) in enumerate(zip(self._tensors, self._regions, strict=True)):
            own.copy(node.src[1 + i])
            own.tensor.ne[1] = n_rows
            own.tensor.data = region.address
            node.src[1 + i] = own.address

    def target(self, part: int, row: int, slot: int) -> int:
        """The address that makes a write to row `row` of a tensor go to slot `slot` of this buffer."""
        return self._regions[part].address + (slot - row) * self.parts[part].row_bytes

    def drop(self) -> None:
        """Give the memory back; all rows are zero afterwards."""
        for region in self._regions:
            region.drop(0, region.n_bytes)

    def free(self) -> None:
        """Unmap."""
        for region in self._regions:
            region.free()


class Mask:
    """A mask [n_rows] for one query: 0 for rows that are there, minus infinity for those behind them."""

    def __init__(self, n_rows: int) -> None:
        self._values = np.zeros(n_rows, np.float16)
        self._own = StandIn()
        self._shown = 0

    def place(self, node: abi.Tensor, n_rows: int, n_padded: int) -> None:
        """Make a flash-attention node use this mask: n_rows rows of n_padded."""
        self._own.copy(node.src[3])
        tensor = self._own.tensor
        tensor.ne[0], tensor.data = n_padded, self._values.ctypes.data
        for i in (1, 2, 3):
            tensor.nb[i] = _HALF * n_padded
            tensor.ne[i] = 1
        if self._shown != n_rows:
            self._values[:n_rows] = 0
            self._values[n_rows:] = -np.inf
            self._shown = n_rows
        node.src[3] = self._own.address
