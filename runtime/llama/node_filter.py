"""Which of llama.cpp's nodes Python hears of.

llama.cpp asks about every node before it computes it: a thousand questions for a token, nearly all of them about nodes
whose weights are in memory for good. A function in C (node_filter.c) answers those. Without the compiled function
Python is asked about all of them and answers the same, at 3 to 4 microseconds each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from runtime.llama import abi
from runtime.llama.cell_attention import CellAttention
from runtime.llama.compiled import LIBRARY
from runtime.llama.q4_1 import Products

_N_MARKS = 2**16
_GRAIN = 16  # bytes: structs are aligned to it


class _Filter(ctypes.Structure):
    """struct h2o_filter of node_filter.c."""

    _fields_ = [
        ("python", abi.EvalCallback),
        ("marks", abi.POINTER),
        ("n_marks", ctypes.c_size_t),
        ("source_offset", ctypes.c_size_t),
        ("n_sources", ctypes.c_size_t),
        ("everything", ctypes.c_int32),
        ("op_offset", ctypes.c_size_t),
        ("n_ops", ctypes.c_int32),
        ("ops", ctypes.c_int32 * 4),
        ("turn", abi.POINTER),
        ("turn_data", abi.POINTER),
        ("attend", abi.POINTER),
        ("attend_data", abi.POINTER),
    ]


class NodeFilter:
    """llama.cpp's callback: `callback` with `data`. It passes on the nodes with a watched tensor among their sources,
    and those of watched operations.

    A mark is a slot of a table, and two tensors may share one: then a node too many is passed on, never one too few.
    """

    def __init__(self, on_node: Callable[[int, bool, int], bool]) -> None:
        """on_node(address of the node, ask, data) is called for every node that is passed on."""
        self._marks = (ctypes.c_uint16 * _N_MARKS)()
        self._watched: set[int] = set()
        self._struct = _Filter(
            abi.EvalCallback(on_node),
            ctypes.addressof(self._marks),
            _N_MARKS,
            abi.SRC_OFFSET,
            abi.SRC_BYTES // ctypes.sizeof(abi.POINTER),
            1,
            abi.OP_OFFSET,
        )
        self.callback = self._struct.python
        if LIBRARY:
            self.callback = ctypes.cast(LIBRARY.h2o_filter_nodes, abi.EvalCallback)
        self.data = ctypes.addressof(self._struct)
        self._products: Products | None = None
        self._attention: CellAttention | None = None

    def attend(self, attention: CellAttention) -> None:
        """Have the nodes that this attention takes turned, in passes from the next one on: nobody hears of them."""
        self._attention = attention
        self._struct.attend, self._struct.attend_data = attention.function, attention.data

    def turn(self, products: Products) -> None:
        """Have these products computed by a function in C, in passes from the next one on."""
        self._products = products
        self._struct.turn, self._struct.turn_data = products.function, products.data

    def turn_now(self, node: abi.Tensor) -> None:
        """The same with a node of a graph of ours, which is computed next; put_back() follows."""
        if self._products:
            self._products.turn(node)

    def put_back(self) -> None:
        """What was asked for is computed: nodes that were turned are what they were."""
        if self._products:
            self._products.put_back()

    def pass_on_everything(self, wanted: bool) -> None:
        """Whether nodes are passed on whatever their sources are. Any thread may say it: nodes read it one by one."""
        self._struct.everything = wanted

    def watch_ops(self, ops: Sequence[int]) -> bool:
        """Pass nodes of these operations on, at most four; False where only pass_on_everything() does that."""
        if LIBRARY:
            self._struct.n_ops = len(ops)
            self._struct.ops[: len(ops)] = ops
        return LIBRARY is not None

    @property
    def is_watching(self) -> bool:
        """Whether any tensor or operation is watched."""
        return bool(self._watched) or self._struct.n_ops > 0

    def watch(self, address: int) -> None:
        """Pass nodes on that use the tensor at address."""
        if address not in self._watched:
            self._watched.add(address)
            self._marks[address // _GRAIN % _N_MARKS] += 1

    def forget(self, address: int) -> None:
        """A tensor is not watched any more."""
        if address in self._watched:
            self._watched.remove(address)
            self._marks[address // _GRAIN % _N_MARKS] -= 1
