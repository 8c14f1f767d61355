"""Rows of llama.cpp's cache copied into the buffers of sparse layers, by ggml: no Python code runs while bytes move."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from runtime.kv.cache import OFF, CacheLayer
from runtime.kv.compact import Compact, rows_at
from runtime.kv.slots import Move
from runtime.llama import abi
from runtime.llama.own_graph import OwnGraph, describe, operate
from runtime.memory import Region

_ELEMENT_BYTES = 4  # rows are copied as 32-bit numbers, whatever they are
_I32, _I64 = 26, 27  # types of ggml
_COPY = "a copy of keys and values"


class Gather:
    """Copies chosen rows of some layers, all of them at once.

    Every slot anew is one GET_ROWS per part, in order. Few new rows go through `staging` (as large as the largest part
    of them), because ggml copies either from anywhere or to anywhere: GET_ROWS, then SET_ROWS.
    """

    def __init__(
        self, n_threads: int, cached: Sequence[CacheLayer], compact: Sequence[Compact], staging: Region
    ) -> None:
        self._rows, self._new, self._slots = abi.Tensor(), abi.Tensor(), abi.Tensor()
        self._staging = staging
        self._parts = [
            (part, target)
            for layer, buffers in zip(cached, compact, strict=True)
            for part, target in zip(layer.parts, buffers.data, strict=True)
        ]
        self._sources, self._targets, self._staged = self._tensors(), self._tensors(), self._tensors()
        self._all, self._moved = self._tensors(), self._tensors()
        for i, (part, target) in enumerate(self._parts):
            width = part.row_bytes // _ELEMENT_BYTES
            describe(self._sources[i], part.data, (width, part.n_cells))
            describe(self._targets[i], target, (width, part.n_cells))
            operate(self._all[i], abi.OP_GET_ROWS, self._sources[i], self._rows)
            operate(self._staged[i], abi.OP_GET_ROWS, self._sources[i], self._new)
            operate(self._moved[i], abi.OP_SET_ROWS, self._staged[i], self._slots, self._targets[i])
        self._numbers = (ctypes.c_float * 3)()
        self._product = [abi.Tensor() for _ in self._numbers]
        for i, tensor in enumerate(self._product):
            describe(tensor, ctypes.addressof(self._numbers) + i * _ELEMENT_BYTES, (1,))
        # ggml gives a graph one thread unless some node of it is worth more, as a product of two numbers is
        operate(self._product[0], abi.OP_MUL_MAT, *self._product[1:])
        self._copy_all = OwnGraph(n_threads, [*self._all, self._product[0]])
        self._copy_new = OwnGraph(n_threads, [*self._moved, self._product[0]])

    def _tensors(self) -> list[abi.Tensor]:
        return [abi.Tensor() for _ in self._parts]

    def copy(self, move: Move) -> None:
        """Bring the rows of a move into their slots in every layer."""
        numbers = move.copied.astype(np.int32)
        describe(self._rows if move.are_many else self._new, numbers.ctypes.data, (len(numbers),), _I32)
        if move.are_many:
            for output, (part, target) in zip(self._all, self._parts, strict=True):
                describe(output, target, (part.row_bytes // _ELEMENT_BYTES, len(numbers)))
            self._copy_all.compute(_COPY, OFF)
            return
        describe(self._slots, move.slots.ctypes.data, (len(numbers),), _I32)
        self._slots.type, self._slots.nb[0] = _I64, move.slots.itemsize
        for i, (part, target) in enumerate(self._parts):
            width = part.row_bytes // _ELEMENT_BYTES
            describe(self._staged[i], self._staging.address, (width, len(numbers)))
            describe(self._moved[i], target, (width, part.n_cells))
        self._copy_new.compute(_COPY, OFF)

    def close(self) -> None:
        """Free the graphs."""
        self._copy_all.close()
        self._copy_new.close()


class OddGather:
    """The same for rows that are no whole number of elements: one by one."""

    def __init__(self, cached: Sequence[CacheLayer], compact: Sequence[Compact]) -> None:
        self._parts = [
            (rows_at(part.data, part.n_cells, part.row_bytes), target)
            for layer, buffers in zip(cached, compact, strict=True)
            for part, target in zip(layer.parts, buffers.rows, strict=True)
        ]

    def copy(self, move: Move) -> None:
        """Bring the rows of a move into their slots in every layer."""
        for source, target in self._parts:
            target[move.slots] = source[move.rows]

    def close(self) -> None:
        """Nothing to free."""


def gather(
    n_threads: int, cached: Sequence[CacheLayer], compact: Sequence[Compact], staging: Region
) -> Gather | OddGather:
    """What copies the rows of these layers."""
    if any(part.row_bytes % _ELEMENT_BYTES for layer in cached for part in layer.parts):
        return OddGather(cached, compact)
    return Gather(n_threads, cached, compact, staging)
