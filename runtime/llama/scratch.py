"""ggml's scratch: what nodes need to compute besides their results. All nodes of a pass use it, one after the other.

ggml plans it for the longest pass and for every path that a kernel may take. What a pass touches of it depends on its
tokens: a product turns its inputs into another type, and from some number of tokens on a kernel computes in tiles, with
a set of them for each thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from runtime.errors import EngineError
from runtime.llama import abi
from runtime.sizes import page_up

_TILED_PRODUCT = 8  # columns from which a product with k-quants or iq types is computed in tiles (on x86)
_TILED_ATTENTION = 64  # queries from which attention is, to keys and values of these types:
_FLOATS = (0, 1)  # f32, f16
_FLOAT_BYTES = 4
_EXPERT_BYTES = 80  # of counters and the like, whatever the pass
_PRODUCTS = (abi.OP_MUL_MAT, abi.OP_MUL_MAT_ID)
_NOTHING = abi.VIEW_OPS | {abi.OP_NONE}
_GRAPH_MEMORY = 2**20
_INT_BYTES = 4


class _Need(NamedTuple):
    """Bytes that a node takes: in any pass, for each token (or output), and in tiles, from so many of them on."""

    of_outputs: bool
    fixed: int
    each: int = 0
    tiles: int = 0
    tiled_from: int = 0

    def bytes_for(self, n: int) -> int:
        """For so many tokens (or outputs)."""
        return self.fixed + n * self.each + (self.tiles if n >= self.tiled_from else 0)


class _Reserved(NamedTuple):
    """The longest pass, as llama.cpp reserves memory for it, and the threads that compute it."""

    n_tokens: int
    n_outputs: int
    n_threads: int

    def product(self, node: abi.Tensor, planned: int) -> _Need:
        """Of a product of a matrix, or of those of experts."""
        inputs, experts = abi.Tensor.from_address(node.src[1]), node.op == abi.OP_MUL_MAT_ID
        rows = int(node.ne[2 if experts else 1])
        of_outputs = rows == self.n_outputs < self.n_tokens
        tiles = int(abi.ggml_tiled_wdata_size(self.n_threads, ctypes.addressof(node)))
        grows = experts or inputs.ne[1] in (self.n_tokens, self.n_outputs)  # else it has many columns in any pass
        fixed = _EXPERT_BYTES * int(abi.Tensor.from_address(node.src[0]).ne[2]) if experts else 0
        each = -(-(planned - tiles) // (self.n_outputs if of_outputs else self.n_tokens))
        return _Need(of_outputs, fixed, each, tiles, _TILED_PRODUCT if grows else 0)

    def attention(self, node: abi.Tensor, planned: int) -> _Need:
        """Of attention: with few queries a thread needs one row; a single query is split over the threads."""
        query, keys, values = (abi.Tensor.from_address(node.src[i]) for i in range(3))
        row, n_heads = int(values.ne[0]), int(query.ne[2])
        rows = int(keys.ne[0]) + 2 * row + abi.CACHE_LINE // _FLOAT_BYTES
        single = self.n_threads * _FLOAT_BYTES * (rows + n_heads * (row + 2))
        tiles = max(0, planned - single) if keys.type in _FLOATS else 0
        return _Need(of_outputs=False, fixed=single, tiles=tiles, tiled_from=_TILED_ATTENTION)


@dataclass(frozen=True)
class Scratch:
    """planned_bytes: ggml's own plan for the longest pass. needs: of its nodes."""

    planned_bytes: int
    needs: frozenset[_Need]

    @classmethod
    def of(cls, context: int, longest: tuple[int, int], n_sequences: int, n_threads: int) -> Scratch:
        """Of a llama_context that was just made. longest: tokens and outputs that it reserves memory for.

        llama.cpp reserves once more what it has reserved, to give us its graph.
        """
        graph = abi.llama_graph_reserve(context, longest[0], n_sequences, longest[1])
        if not graph:
            raise EngineError("llama.cpp could not reserve a pass", "lower --ctx or --ubatch")
        planned = int(abi.ggml_graph_plan(graph, n_threads, None).work_size)
        return cls(planned, frozenset(_needs(graph, _Reserved(*longest, n_threads))))

    def bytes_for(self, n_tokens: int, n_outputs: int) -> int:
        """The most that a pass touches, in whole pages."""
        counts = n_tokens, min(n_tokens, n_outputs)
        return page_up(max((need.bytes_for(counts[need.of_outputs]) for need in self.needs), default=0))

    def untiled(self, most: int) -> int:
        """The longest pass, of at most so many tokens, whose products take no tiles."""
        tiled = [need.tiled_from - 1 for need in self.needs if need.tiles and not need.of_outputs]
        return min([most, *(n for n in tiled if n > 0)])


def _needs(graph: int, reserved: _Reserved) -> Iterator[_Need]:
    """Of each kind of node that takes something."""
    memory = abi.ggml_init(abi.GgmlInitParams(_GRAPH_MEMORY, None, True))
    single = abi.ggml_new_graph(memory)
    for address, op in _kinds(graph):
        abi.ggml_graph_clear(single)
        abi.ggml_graph_add_node(single, address)
        planned = int(abi.ggml_graph_plan(single, reserved.n_threads, None).work_size)
        node = abi.Tensor.from_address(address)
        if op in _PRODUCTS:
            yield reserved.product(node, planned)
        elif op == abi.OP_FLASH_ATTN_EXT:
            yield reserved.attention(node, planned)
        elif planned:
            yield _Need(of_outputs=False, fixed=planned)
    abi.ggml_free(memory)


def _kinds(graph: int) -> Iterator[tuple[int, int]]:
    """One node of each kind, as layers are alike: its address and operation."""
    seen = set()
    for address in (ctypes.c_void_p * abi.ggml_graph_n_nodes(graph)).from_address(abi.ggml_graph_nodes(graph)):
        op = ctypes.c_int.from_address(address + abi.OP_OFFSET).value
        kind = ctypes.string_at(address, abi.OP_OFFSET + _INT_BYTES)  # type, shape, strides and operation
        if op in _PRODUCTS:
            weights, inputs, *_ = abi.unpack_src(ctypes.string_at(address + abi.SRC_OFFSET, abi.SRC_BYTES))
            kind += ctypes.string_at(weights, _INT_BYTES) + ctypes.string_at(inputs, abi.OP_OFFSET)
        if op not in _NOTHING and kind not in seen:
            seen.add(kind)
            yield address, op
