"""Attention of one query to every row, as products of matrices: what dense layers do when a token is decoded.

Choosing rows takes the products of the query with all keys. A softmax over them and one more product, with the values,
is the whole attention. llama.cpp's flash-attention kernel takes rows of a head one by one and adds up values in f16;
ggml's product adds up along rows of memory in f32, many times faster. For that the values are turned: positions
innermost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from runtime.kv.cache import OFF, Rows2D
from runtime.kv.needs import padded_scores
from runtime.kv.scores import Floats
from runtime.llama import abi
from runtime.llama.own_graph import OwnGraph, describe, operate
from runtime.memory import Region, drop_pages, view
from runtime.sizes import PAGE, page_down

_HALF, _F16 = 2, 1  # bytes of a value, its type in ggml
_BLOCK = 256  # rows turned at once: both sides of that fit a processor's cache
_PAGE_CELLS = PAGE // _HALF
LEAST_ROWS = 1024  # with fewer, llama.cpp's node is as fast: ending a part of the graph there takes longer


class TurnedValues:
    """Values of one layer with positions innermost: [n_values of a row, n_cells], in f16.

    A row is in one place only: what is taken in here leaves llama.cpp's cache page by page, and comes back before a
    node of its own reads it.
    """

    def __init__(self, values: Rows2D) -> None:
        self._rows = values
        n_values, n_cells = values.row_bytes // _HALF, padded_scores(values.n_cells)
        if n_cells > _PAGE_CELLS:
            n_cells = -(-n_cells // _PAGE_CELLS) * _PAGE_CELLS
        self._region = Region(n_values * n_cells * _HALF)
        self._region.use_huge_pages(0)
        self._turned = _halves(self._region.address, n_values, n_cells)
        self._n_rows = 0
        self._first_page = 0  # of the cache that is still there; an address

    def take_in(self, n_rows: int) -> None:
        """Have the first n_rows rows of the cache here."""
        data, row_bytes = self._rows.data, self._rows.row_bytes
        for start in range(self._n_rows, n_rows, _BLOCK):
            end = min(n_rows, start + _BLOCK)
            self._turned[:, start:end] = _halves(data + start * row_bytes, end - start, len(self._turned)).T
            self._n_rows = end
            drop_pages(max(data, self._first_page), data + end * row_bytes)
            self._first_page = page_down(data + end * row_bytes)

    def give_back(self) -> None:
        """Bring everything back to the cache."""
        data, row_bytes = self._rows.data, self._rows.row_bytes
        n_values, n_cells = self._turned.shape
        for start in range(0, self._n_rows, _PAGE_CELLS):
            end = min(self._n_rows, start + _PAGE_CELLS)
            _halves(data + start * row_bytes, end - start, n_values)[:] = self._turned[:, start:end].T
            for i in range(n_values):
                self._region.drop((i * n_cells + start) * _HALF, (i * n_cells + start + _PAGE_CELLS) * _HALF)
        self.truncate(0)

    def truncate(self, n_rows: int) -> None:
        """The rows from n_rows on are going to be others."""
        if n_rows == 0:
            self._region.drop(0, self._region.n_bytes)
        elif n_rows < self._n_rows:
            self._turned[:, n_rows : self._n_rows] = 0
        self._n_rows = min(n_rows, self._n_rows)
        self._first_page = min(self._first_page, page_down(self._rows.data + n_rows * self._rows.row_bytes))

    def describe(self, tensor: abi.Tensor, n_rows: int, head_dim: int) -> None:
        """Make a tensor the first n_rows rows: [n_rows, head_dim, n_kv_heads]; zeros behind those taken in."""
        n_values, n_cells = self._turned.shape
        describe(tensor, self._region.address, (n_rows, head_dim, n_values // head_dim), _F16)
        row = n_cells * _HALF
        tensor.nb[0], tensor.nb[1], tensor.nb[2], tensor.nb[3] = _HALF, row, row * head_dim, row * n_values

    def free(self) -> None:
        """Unmap."""
        self._region.free()


def _halves(address: int, n_rows: int, n_values: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    """Memory as bit patterns of f16 [n_rows, n_values]."""
    return np.frombuffer(view(address, n_rows * n_values * _HALF), np.uint16).reshape(n_rows, n_values)


class DenseAttention:
    """The attention of some layers: a graph of two nodes, softmax and the product with the values."""

    def __init__(self, n_threads: int, values: Mapping[int, Rows2D]) -> None:
        """values: of each layer."""
        self._turned = {layer: TurnedValues(rows) for layer, rows in values.items()}
        self._logits, self._weights, self._grouped = abi.Tensor(), abi.Tensor(), abi.Tensor()
        self._values, self._output = abi.Tensor(), abi.Tensor()
        operate(self._weights, abi.OP_SOFT_MAX, self._logits)
        operate(self._output, abi.OP_MUL_MAT, self._values, self._grouped)
        self._graph = OwnGraph(n_threads, [self._weights, self._output])
        self._region = Region(0)

    def pays(self, layer: int, n_rows: int) -> bool:
        """Whether a layer attends to so many rows here, and not in llama.cpp's node."""
        return layer in self._turned and n_rows >= LEAST_ROWS

    def compute(self, layer: int, logits: Floats, scale: float, node: abi.Tensor) -> None:
        """The output of a layer's flash-attention node over one query, from its products with the keys.

        logits [n_heads, n_rows]: a Scorer's, with its room behind n_rows.
        """
        n_heads, n_rows = logits.shape
        n_padded = logits.strides[0] // logits.itemsize
        np.lib.stride_tricks.as_strided(logits, (n_heads, n_padded))[:, n_rows:] = -np.inf
        values = self._turned[layer]
        values.take_in(n_rows)
        head_dim, n_kv_heads = node.ne[0], abi.Tensor.from_address(node.src[2]).ne[2]
        self._region = self._region.grown(n_heads * n_padded * logits.itemsize)
        describe(self._logits, logits.ctypes.data, (n_padded, n_heads))
        describe(self._weights, self._region.address, (n_padded, n_heads))
        ctypes.memmove(self._weights.op_params, (ctypes.c_float * 2)(scale, 0.0), 8)
        # heads that share a key head side by side: each value is read once for all of them
        describe(self._grouped, self._region.address, (n_padded, n_heads // n_kv_heads, n_kv_heads))
        values.describe(self._values, n_padded, head_dim)
        describe(self._output, node.data, (head_dim, n_heads // n_kv_heads, n_kv_heads))
        self._graph.compute("attention", OFF)

    def give_back(self, layer: int) -> None:
        """Bring all values of a layer, where they are here, back to the cache."""
        if layer in self._turned:
            self._turned[layer].give_back()

    def truncate(self, n_rows: int) -> None:
        """The rows from n_rows on are going to be others."""
        for values in self._turned.values():
            values.truncate(n_rows)

    def close(self) -> None:
        """Free everything."""
        for values in self._turned.values():
            values.free()
        self._graph.close()
        self._region.free()
