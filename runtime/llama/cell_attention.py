"""Attention of the tokens of a pass, each to cells of its own, by a function in C (cell_attention.c).

llama.cpp's attention nodes are turned into ones that call the function. It sums the positions of a text in their order,
wherever their cells are, with the bits of llama.cpp's kernel for up to 63 tokens: so rows need not be copied together.
"""

from __future__ import annotations

import array
import ctypes
import os
from collections.abc import Sequence
from functools import cache

from runtime.llama import abi, turned
from runtime.llama.own_graph import OwnGraph, describe, operate
from runtime.llama.turned import NEAR_ONE, SMALL_HALF, Turner, Turning

MOST_TOKENS = 63  # of a part of a pass: llama.cpp computes more by another kernel
PADDED = 256  # llama.cpp attends to a multiple of so many cells; those behind the positions are masked
SEEN, NO_LOGIT = 0, 0xFC00  # a mask in 16 bits; the other is minus infinity
_NAME = "h2o_attention"
_F32, F16 = 0, 1
_TO_FLOAT = {2: "dequantize_row_q4_0", 8: "dequantize_row_q8_0"}
_CUT = 512  # cells, and more: one token's are cut over the threads, where they are f16
_NUMBERS = 3  # of a line


class _Attention(ctypes.Structure):
    """struct h2o_attention of cell_attention.c."""

    _fields_ = [
        ("turning", Turning),
        *((name, ctypes.c_size_t) for name in ("ne", "nb", "sources", "view_source", "data")),
        *((name, ctypes.c_int32) for name in ("attend", "type")),
        *((name, abi.POINTER) for name in ("convert", "dot", "to_float", "roots", "lines")),
        *((name, ctypes.c_int32) for name in ("n_roots", "n_tokens")),
    ]


def is_there() -> bool:
    """Whether the function was compiled, and the processor has what it takes."""
    return turned.is_there(_NAME)


def _to_float(kind: int) -> int | None:
    """The function that makes numbers of 32 bits of a row; None: it is f16, which ours reads."""
    name = _TO_FLOAT.get(kind)
    return ctypes.cast(getattr(abi.ggml_base, name), abi.POINTER).value if name else None


class CellAttention(Turner):
    """Turns the attention nodes of passes. Only where is_right().

    Between see() and put_back() every node that attends to keys which are views of the `roots` becomes one of ours.
    """

    def __init__(self, roots: Sequence[int], kind: int, most_tokens: int) -> None:
        """roots: tensors of keys, of all layers. kind: the type of keys and values. most_tokens: of a pass."""
        dot, tensor, self._roots = abi.cpu_traits(kind), abi.Tensor, (abi.POINTER * len(roots))(*roots)
        self._lines, self._is_cut = array.array("q", [0]) * (_NUMBERS * most_tokens), kind == F16
        self._own = _Attention(
            Turning(),
            *(getattr(tensor, name).offset for name in ("ne", "nb", "src", "view_src", "data")),
            *(abi.OP_FLASH_ATTN_EXT, kind),
            *(abi.cpu_traits(dot.vec_dot_type).from_float, dot.vec_dot, _to_float(kind)),
            *(ctypes.addressof(self._roots), self._lines.buffer_info()[0], len(roots), 0),
        )
        super().__init__(_NAME, self._own)

    def see(self, lines: Sequence[int]) -> None:
        """What the tokens of the next pass see: lines() of each of its parts, one behind the other."""
        memoryview(self._lines)[: len(lines)] = array.array("q", lines)
        self._own.n_tokens = len(lines) // _NUMBERS

    def lines(self, cells: array.array[int], first: int, n_tokens: int) -> list[int]:
        """What tokens at positions from `first` on see. cells: of all positions of their text; they stay where they
        are until the pass is over."""
        at, end = cells.buffer_info()[0], first + n_tokens
        if n_tokens == 1:
            n_padded = -(-end // PADDED) * PADDED
            return [at, end, n_padded if self._is_cut and n_padded >= _CUT else 0]
        return [number for n in range(first + 1, end + 1) for number in (at, n, 0)]

    def put_back(self) -> None:
        """The pass is over: make the nodes what they were."""
        self._own.n_tokens = 0
        super().put_back()


_SCALE = bytes(upper & 0x83 | 0x20 for upper in range(256))  # of a block of numbers up to 127: around 1/128


class Trial:
    """Attention of random queries [width, n_tokens, n_heads] to random cells, by llama.cpp and by the function.

    The cells of the positions lie in a row for llama.cpp, and backwards for the function.
    """

    def __init__(
        self, kind: int, shape: tuple[int, int, int], n_cells: int, n_threads: int = 1, values: tuple[int, int] = (0, 1)
    ) -> None:
        """kind: the type of keys and values. shape: of the queries. The last token sees all cells, the others one less
        each. values: their width (0: that of keys), and how many heads keys and values have."""
        (width, n_tokens, n_heads), n_padded = shape, -(-n_cells // PADDED) * PADDED
        widths, n_kv_heads = (width, values[0] or width), values[1]
        self._n_tokens, self._n_cells = n_tokens, n_cells
        self._row_bytes = [abi.ggml_row_size(kind, n) * n_kv_heads for n in widths]
        self._rows = [_random_rows(kind, n_cells * n) for n in self._row_bytes]
        query = bytearray(os.urandom(4 * width * n_tokens * n_heads))
        query[3::4] = query[3::4].translate(NEAR_ONE)
        seen = [n_cells - n_tokens + 1 + token for token in range(n_tokens)]
        masks = array.array("H", [SEEN if i < n else NO_LOGIT for n in seen for i in range(n_padded)])
        self.query = _tensor(_F32, shape, bytes(query))
        self.keys, self.values = (
            _tensor(kind, (n, n_kv_heads, n_padded), bytes(n_padded * row_bytes))
            for n, row_bytes in zip(widths, self._row_bytes, strict=True)
        )
        for tensor, _ in (self.keys, self.values):  # [width, cells, heads], as in llama.cpp's graph
            (tensor.ne[1], tensor.ne[2]), (tensor.nb[1], tensor.nb[2]) = tensor.ne[2:0:-1], tensor.nb[2:0:-1]
        self._mask = _tensor(F16, (n_padded, n_tokens), masks.tobytes())
        self._result = _tensor(_F32, (widths[1], n_heads, n_tokens), bytes(4 * widths[1] * n_tokens * n_heads))
        self.node = self._result[0]
        ctypes.c_float.from_buffer(self.node, abi.Tensor.op_params.offset).value = width**-0.5
        operate(self.node, abi.OP_FLASH_ATTN_EXT, *(one[0] for one in (self.query, self.keys, self.values, self._mask)))
        self._graph = OwnGraph(n_threads, [self.node])
        self._root = abi.Tensor()
        self.own = CellAttention([ctypes.addressof(self._root)], kind, n_tokens)

    def compute(self, *, turned: bool) -> bytes:
        """The result. The first time by llama.cpp: its scratch is made then."""
        cells = array.array("i", range(self._n_cells))[:: -1 if turned else 1]
        for (tensor, _), rows, n in zip((self.keys, self.values), self._rows, self._row_bytes, strict=True):
            lying = [rows[cell * n : (cell + 1) * n] for cell in cells]
            ctypes.memmove(tensor.data, b"".join(lying), len(rows))
        tensor, data = self._result
        ctypes.memset(data, 0xFF, len(data))
        if turned:
            self.see(cells).turn(tensor)
        self._graph.compute("an attention", "report this")
        self.own.put_back()
        return bytes(data)

    def see(self, cells: array.array[int]) -> CellAttention:
        """Have the function attend to these cells from now on, in their order."""
        keys = self.keys[0]
        keys.view_src, self._root.data = ctypes.addressof(self._root), keys.data
        self.own.see(self.own.lines(cells, self._n_cells - self._n_tokens, self._n_tokens))
        return self.own

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()


def _random_rows(kind: int, n_bytes: int) -> bytes:
    rows = bytearray(os.urandom(n_bytes))
    step, upper = (2, SMALL_HALF) if kind == F16 else (abi.ggml_row_size(kind, abi.ggml_blck_size(kind)), _SCALE)
    rows[1::step] = rows[1::step].translate(upper)
    return bytes(rows)


def _tensor(kind: int, ne: Sequence[int], data: bytes) -> tuple[abi.Tensor, ctypes.Array[ctypes.c_char]]:
    tensor, memory = abi.Tensor(), ctypes.create_string_buffer(data, len(data))
    describe(tensor, ctypes.addressof(memory), ne, kind)
    return tensor, memory


@cache
def is_right(kind: int) -> bool:
    """Whether the function is there, and gives llama.cpp's bits for keys and values of a type: tried once."""
    if not is_there():
        return False
    trials = [((120, 2, 2), 40, 1), ((120, 1, 1), _CUT - PADDED + 9, 2)] if kind == F16 else [((96, 2, 2), 40, 1)]
    return all(_agrees(Trial(kind, shape, n_cells, n_threads)) for shape, n_cells, n_threads in trials)


def _agrees(trial: Trial) -> bool:
    try:
        return trial.compute(turned=False) == trial.compute(turned=True)
    finally:
        trial.close()
