"""A matrix product whose weight matrix is never in memory as a whole: computed tile by tile of its rows.

llama.cpp's own node is switched off for one pass (its op becomes NONE) and its result is written by one-node graphs of
the same operation, one per tile. Each output element is the product of one weight row and one input column either way,
so the result has the same bits. What follows in the graph (scaling, soft caps, biases) runs as always.
"""

from __future__ import annotations

import ctypes

from runtime.llama import abi
from runtime.llama.node_filter import NodeFilter
from runtime.llama.own_graph import OwnGraph, cut_off, operate

_FLOATS = (0, 1, 30)  # f32, f16, bf16
_FLOAT_ROWS = 4  # ggml has a kernel for products of these with several tokens, where the rows are a multiple of 4


class TiledProduct:
    """Computes row ranges of MUL_MAT nodes, on a CPU backend of its own until it gets another one."""

    def __init__(self, n_threads: int, nodes: NodeFilter | None = None) -> None:
        """nodes: may have the product computed by a function of ours."""
        self._nodes = nodes
        self._weights, self._input, self._output = abi.Tensor(), abi.Tensor(), abi.Tensor()
        operate(self._output, abi.OP_MUL_MAT, self._weights, self._input)
        self._graph = OwnGraph(n_threads, [self._output])
        self.compute_on = self._graph.compute_on

    def begin(self, node_address: int) -> None:
        """Take over a MUL_MAT node: src[0] weights [n_in, n_rows], src[1] input [n_in, n_tokens].

        In its report: the input is still there, llama.cpp gives its memory to others from the next node on only.
        """
        node = abi.Tensor.from_address(node_address)
        for own, source in ((self._output, node_address), (self._weights, node.src[0]), (self._input, node.src[1])):
            ctypes.memmove(ctypes.addressof(own), source, abi.TENSOR_BYTES)
            cut_off(own)
        operate(self._output, abi.OP_MUL_MAT, self._weights, self._input)
        self._result = int(node.data)
        self._is_odd = self._weights.type in _FLOATS and node.ne[0] % _FLOAT_ROWS != 0 and node.ne[1] > 1

    def compute(self, data: int, first_row: int, n_rows: int) -> None:
        """Compute rows [first_row, first_row + n_rows) of the node's result from the weights at address data."""
        if self._is_odd and n_rows % _FLOAT_ROWS == 0:  # by the kernel that takes the whole matrix: the last row alone
            self._compute(data, first_row, n_rows - 1)
            data, first_row, n_rows = data + (n_rows - 1) * int(self._weights.nb[1]), first_row + n_rows - 1, 1
        self._compute(data, first_row, n_rows)

    def _compute(self, data: int, first_row: int, n_rows: int) -> None:
        self._weights.data = data
        self._weights.ne[1] = n_rows
        self._weights.nb[2] = self._weights.nb[3] = self._weights.nb[1] * n_rows
        self._output.data = self._result + first_row * 4
        self._output.ne[0] = n_rows
        if self._nodes and self._output.ne[1] > 1:
            self._nodes.turn_now(self._output)
        self._graph.compute("a tile", "raise -m")
        if self._nodes:
            self._nodes.put_back()

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()
