"""A small ggml graph over tensor structs of ours, computed between llama.cpp's nodes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from runtime.errors import EngineError
from runtime.llama import abi

_GRAPH_MEMORY = 2**20
_F32, _I32, _FLOAT_BYTES = 0, 26, 4


class OwnGraph:
    """Computes `outputs`, on a CPU backend of its own with n_threads, until it gets another one.

    Their sources, addresses and sizes may change between two computations, their number not.
    """

    def __init__(self, n_threads: int, outputs: Sequence[abi.Tensor]) -> None:
        self._outputs = tuple(outputs)  # the graph has their addresses
        self._own_backend: int = abi.ggml_backend_cpu_init()
        self.backend: int = self._own_backend
        abi.ggml_backend_cpu_set_n_threads(self.backend, n_threads)
        self._context = abi.ggml_init(abi.GgmlInitParams(_GRAPH_MEMORY, None, True))
        self._graph = abi.ggml_new_graph(self._context)
        for output in self._outputs:
            abi.ggml_build_forward_expand(self._graph, ctypes.addressof(output))

    def compute_on(self, backend: int) -> None:
        """Compute on the backend of a context from now on, in its scratch: no node needs it between two nodes."""
        self._free_backend()
        self.backend = backend

    def compute(self, what: str, next_step: str) -> None:
        """Compute everything. Raises EngineError with what could not be computed, and what to do then.

        Between two nodes of llama.cpp, whose threads wait for the callback.
        """
        status = abi.ggml_backend_graph_compute(self.backend, self._graph)
        if status != 0:
            raise EngineError(f"llama.cpp could not compute {what} (status {status})", next_step)

    def close(self) -> None:
        """Free the graph, and its own backend."""
        abi.ggml_free(self._context)
        self._free_backend()

    def _free_backend(self) -> None:
        if self._own_backend:
            abi.ggml_backend_free(self._own_backend)
            self._own_backend = 0


def operate(output: abi.Tensor, op: int, *sources: abi.Tensor) -> None:
    """Make a tensor the result of an operation on others."""
    output.op = op  # its flags stay: ggml passes over a node that the graph has not marked
    for i, source in enumerate(sources):
        output.src[i] = ctypes.addressof(source)


def cut_off(tensor: abi.Tensor) -> None:
    """Make a copy of a node a tensor that depends on nothing."""
    tensor.op, tensor.view_src, tensor.src = abi.OP_NONE, None, (ctypes.c_void_p * 10)()


def describe(tensor: abi.Tensor, data: int, ne: Sequence[int], kind: int = _F32) -> None:
    """Make a contiguous tensor [ne0, ne1, ...] of a struct; ne0: a whole number of the type's blocks."""
    tensor.type, tensor.data = kind, data
    if kind in (_F32, _I32):  # most are, and asking takes a while
        tensor.nb[0], n_bytes = _FLOAT_BYTES, _FLOAT_BYTES * ne[0]
    else:
        tensor.nb[0], n_bytes = abi.ggml_row_size(kind, abi.ggml_blck_size(kind)), abi.ggml_row_size(kind, ne[0])
    tensor.ne[0] = ne[0]
    for i in (1, 2, 3):
        tensor.ne[i], tensor.nb[i] = ne[i] if i < len(ne) else 1, n_bytes
        n_bytes *= tensor.ne[i]
