"""Positions of sequences that are copied out of a context's cache, and into it again."""

from __future__ import annotations

import ctypes

from runtime.errors import EngineError
from runtime.llama import abi
from runtime.memory import Region, view
from runtime.sizes import page_up

_HEADER_BYTES, _POSITION_BYTES, _TENSOR_BYTES = 256, 24, 16  # what llama.cpp writes besides keys and values, or more


def state_bytes(kv_bytes: int, n_positions: int, n_layers: int) -> int:
    """The most that llama.cpp's state of so many positions takes, in whole pages. kv_bytes: of one position."""
    return page_up(_HEADER_BYTES + n_positions * (kv_bytes + _POSITION_BYTES) + 2 * n_layers * _TENSOR_BYTES)


class CellMemory:
    """Sequences of a unified cache in which one cell can belong to several of them. `kept` holds what save() saved."""

    def __init__(self, context: int, n_bytes: int) -> None:
        """context: llama.cpp's. n_bytes: of the largest state to save."""
        self._context, self._region, self._n_bytes = context, Region(n_bytes), n_bytes
        self._memory = abi.llama.llama_get_memory(context)
        self.kept = view(self._region.address, n_bytes)

    def copy(self, source: int, target: int, first: int = 0, end: int = -1) -> None:
        """Have another sequence own the positions [first, end) of one too (end -1: all from there on)."""
        abi.llama.llama_memory_seq_cp(self._memory, source, target, first, end)

    def remove(self, sequence: int) -> None:
        """Have a sequence own nothing."""
        abi.llama.llama_memory_seq_rm(self._memory, sequence, 0, -1)

    def save(self, sequence: int) -> None:
        """Keep all positions of a sequence, in the order of their cells. Raises EngineError where they do not fit."""
        if not abi.llama.llama_state_seq_get_data(self._context, self._buffer, self._n_bytes, sequence):
            raise EngineError("llama.cpp did not give a text's keys and values", "use --admission simulate")

    def load(self, sequence: int) -> None:
        """Put what is kept into the next empty cells. Raises EngineError where llama.cpp does not take it."""
        if not abi.llama.llama_state_seq_set_data(self._context, self._buffer, self._n_bytes, sequence):
            raise EngineError("llama.cpp did not take a text's keys and values back", "use --admission simulate")

    @property
    def _buffer(self) -> ctypes.Array[ctypes.c_uint8]:
        return (ctypes.c_uint8 * self._n_bytes).from_address(self._region.address)

    def close(self) -> None:
        """Free what is kept."""
        self._region.free()
