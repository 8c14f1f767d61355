"""Products of Q4_1 weights with four columns or more, computed by a function in C (q4_1.c) with llama.cpp's bits.

llama.cpp's own kernel for this type takes a row and a column, and unpacks the row again for each column. Ours unpacks
it once for eight. The nodes are turned into ones that call a function: llama.cpp's threads do it, in its scratch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

from runtime.llama import abi, turned
from runtime.llama.own_graph import OwnGraph, describe, operate
from runtime.llama.turned import NEAR_ONE, SMALL_HALF, Turner, Turning

TYPE_NAME, _NAME = "q4_1", "h2o_product"
_F32, _Q4_1 = 0, 3
_BLOCK, _BLOCK_BYTES = 32, 20


class _Product(ctypes.Structure):
    """struct h2o_product of q4_1.c."""

    _fields_ = [
        ("turning", Turning),
        *((name, ctypes.c_size_t) for name in ("ne", "nb", "sources", "data")),
        *((name, ctypes.c_int32) for name in ("product", "weights", "inputs")),
        *((name, abi.POINTER) for name in ("quantise", "dot", "scratch", "scratch_bytes")),
        *((name, ctypes.c_int32) for name in ("arrived", "next", "left")),
    ]


def is_there() -> bool:
    """Whether the function was compiled, and the processor has what it takes."""
    return turned.is_there(_NAME)


class Products(Turner):
    """Turns nodes of the passes that one backend computes. Only where is_right()."""

    def __init__(self, backend: int) -> None:
        """backend: a CPU backend, which outlives this."""
        dot, tensor = abi.cpu_traits(_Q4_1), abi.Tensor
        cpu = abi.Backend.from_address(backend).context
        struct = _Product(
            Turning(),
            *(getattr(tensor, name).offset for name in ("ne", "nb", "src", "data")),
            *(abi.OP_MUL_MAT, _Q4_1, _F32),
            *(abi.cpu_traits(dot.vec_dot_type).from_float, dot.vec_dot),
            *(cpu + abi.CpuBackend.work_data.offset, cpu + abi.CpuBackend.work_size.offset),
        )
        super().__init__(_NAME, struct)


class Trial:
    """A product of random weights [n_in, n_rows] and inputs [n_in, n_columns], by llama.cpp and by the function."""

    def __init__(
        self,
        n_in: int,
        n_rows: int,
        n_columns: int,
        n_threads: int = 1,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """random: so many bytes. (The module of that name takes memory that a run needs for weights.)"""
        row_bytes = n_in // _BLOCK * _BLOCK_BYTES
        weights, inputs = (bytearray(random(n)) for n in (n_rows * row_bytes, 4 * n_in * n_columns))
        for upper in (1, 3):  # bytes of each block's scale, and of its smallest weight
            weights[upper::_BLOCK_BYTES] = weights[upper::_BLOCK_BYTES].translate(SMALL_HALF)
        inputs[3::4] = inputs[3::4].translate(NEAR_ONE)
        self._weights_data = (ctypes.c_char * len(weights)).from_buffer(weights)
        self._inputs_data = (ctypes.c_char * len(inputs)).from_buffer(inputs)
        self._result = (ctypes.c_float * (n_rows * n_columns))()
        self.weights, self.inputs, self.node = abi.Tensor(), abi.Tensor(), abi.Tensor()
        describe(self.inputs, ctypes.addressof(self._inputs_data), (n_in, n_columns))
        describe(self.node, ctypes.addressof(self._result), (n_rows, n_columns))
        describe(self.weights, ctypes.addressof(self._weights_data), (n_in, n_rows), _Q4_1)
        operate(self.node, abi.OP_MUL_MAT, self.weights, self.inputs)
        self._graph = OwnGraph(n_threads, [self.node])
        self._products: Products | None = None

    @property
    def backend(self) -> int:
        """The one that computes it."""
        return self._graph.backend

    def compute(self, *, turned: bool) -> bytes:
        """The result. The first time by llama.cpp: its scratch is made then."""
        ctypes.memset(self._result, 0xFF, ctypes.sizeof(self._result))
        if turned:
            self._products = self._products or Products(self._graph.backend)
            self._products.turn(self.node)
        self._graph.compute("a product", "report this")
        if self._products:
            self._products.put_back()
        return bytes(self._result)

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()


@cache
def is_right() -> bool:
    """Whether the function is there, and gives the bits of this llama.cpp: tried once."""
    if not is_there():
        return False
    trial = Trial(n_in=34 * _BLOCK, n_rows=3, n_columns=13)  # eight columns, four and one; more blocks than a strip
    try:
        return trial.compute(turned=False) == trial.compute(turned=True)
    finally:
        trial.close()
