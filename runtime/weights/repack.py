"""Weights rearranged for this processor's fastest kernels, as llama.cpp does it for a model that fits in memory.

llama.cpp decides per tensor (type, shape, processor) whether it has such an arrangement; its own code rearranges.
The kernels for it sum in another order, so results differ from plain ones in the last bits.
"""

from __future__ import annotations

import ctypes

from runtime.llama import abi
from runtime.memory import Region, view

_STEP_ROWS = 64  # a multiple of every arrangement's row group
_STEP_BYTES = 2**20

_SetTensor = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


class Repacker:
    """Rearranges resident weights in place. Takes about 1 MB while it works."""

    def __init__(self) -> None:
        buffer_type = abi.ggml_backend_cpu_repack_buffer_type()
        self._buffer = int(abi.ggml_backend_buft_alloc_buffer(buffer_type, 64))
        functions = abi.Buffer.from_address(self._buffer)
        self._init_tensor = abi.InitTensor(functions.init_tensor)
        self._set_tensor = _SetTensor(functions.set_tensor)
        self._plain: dict[int, int | None] = {}  # repacked tensor -> its own buffer

    def repack(self, address: int) -> None:
        """Rearrange the tensor's bytes where they are, if llama.cpp has an arrangement for it."""
        tensor = abi.Tensor.from_address(address)
        arrangement = self._arrangement(address)
        if address in self._plain or arrangement is None:
            return
        row_bytes, n_rows = int(tensor.nb[1]), int(tensor.ne[1] * tensor.ne[2] * tensor.ne[3])
        step = max(_STEP_ROWS, _STEP_BYTES // row_bytes // _STEP_ROWS * _STEP_ROWS)
        bounce = Region(step * row_bytes)
        part = abi.Tensor()
        ctypes.memmove(ctypes.addressof(part), address, abi.TENSOR_BYTES)
        part.extra = arrangement
        part.ne[2] = part.ne[3] = 1
        for first in range(0, n_rows, step):
            rows = min(step, n_rows - first)
            part.data, part.ne[1] = tensor.data + first * row_bytes, rows
            part.nb[2] = part.nb[3] = rows * row_bytes
            view(bounce.address, rows * row_bytes)[:] = view(part.data, rows * row_bytes)
            self._set_tensor(self._buffer, ctypes.addressof(part), bounce.address, 0, rows * row_bytes)
        bounce.free()
        self._plain[address] = tensor.buffer
        tensor.buffer, tensor.extra = self._buffer, arrangement  # llama.cpp looks at them when it computes a node

    def _arrangement(self, address: int) -> int | None:
        copy = abi.Tensor()
        ctypes.memmove(ctypes.addressof(copy), address, abi.TENSOR_BYTES)
        if copy.ne[2] * copy.ne[3] > 1 and b"exps." not in copy.name:
            return None  # its kernels take stacks of matrices for experts only, and abort on others (MLA)
        self._init_tensor(self._buffer, ctypes.addressof(copy))
        return int(copy.extra) if copy.extra else None

    def has(self, address: int) -> bool:
        """Whether the tensor's bytes are rearranged."""
        return address in self._plain

    def forget(self, address: int) -> None:
        """The tensor's bytes are going to be plain ones again."""
        if address in self._plain:
            tensor = abi.Tensor.from_address(address)
            tensor.buffer, tensor.extra = self._plain.pop(address), None

    def close(self) -> None:
        """Give llama.cpp its tensors back as they were."""
        for address in list(self._plain):
            self.forget(address)
        abi.ggml_backend_buffer_free(self._buffer)
