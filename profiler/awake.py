"""Keeping computing threads and cores awake before something is timed, or busy while it is.

After a wait for the disk the threads sleep and the cores are in a state of low power, or a virtual machine's host has
given them to others. What is computed then is several times slower for about a millisecond, which is no property of a
layer.
"""

from __future__ import annotations

import ctypes
import time

from runtime.llama import abi
from runtime.llama.own_graph import describe, operate
from runtime.llama.tiled_product import TiledProduct
from runtime.memory import Region
from runtime.threads import start_threads

AWAKE_S = 0.006  # 0.5, 2 and 6 ms made a pass of 440 ms behind a slow disk one of 93, 80 and 47 ms
_N_IN, _N_ROWS = 1024, 256  # a megabyte of weights: a small part of a millisecond on any core
_F32_BYTES = 4


class Waker:
    """Computes with all threads for a moment: a matrix of zeros times a vector."""

    def __init__(self, n_threads: int) -> None:
        weights_bytes, input_bytes = _F32_BYTES * _N_IN * _N_ROWS, _F32_BYTES * _N_IN
        self._memory = Region(weights_bytes + input_bytes + _F32_BYTES * _N_ROWS)
        self._weights, self._input, self._output = abi.Tensor(), abi.Tensor(), abi.Tensor()
        describe(self._weights, self._memory.address, (_N_IN, _N_ROWS))
        describe(self._input, self._memory.address + weights_bytes, (_N_IN,))
        describe(self._output, self._memory.address + weights_bytes + input_bytes, (_N_ROWS,))
        operate(self._output, abi.OP_MUL_MAT, self._weights, self._input)
        self._product = TiledProduct(n_threads)
        self._product.begin(ctypes.addressof(self._output))

    def wake(self) -> None:
        """Compute for AWAKE_S."""
        end_s = time.perf_counter() + AWAKE_S
        while time.perf_counter() < end_s:
            self.compute()

    def compute(self) -> None:
        """One product."""
        self._product.compute(self._memory.address, 0, _N_ROWS)

    def close(self) -> None:
        """Free everything."""
        self._product.close()
        self._memory.free()


class Computing:
    """While entered, llama.cpp computes with n_threads."""

    def __init__(self, n_threads: int) -> None:
        self._n_done, self._seen = 0, (0, 0.0)
        self._waker = Waker(n_threads)
        self._going = True

    def speed(self) -> float:
        """Products per second since the last question."""
        (n_before, since_s), self._seen = self._seen, (self._n_done, time.perf_counter())
        return (self._seen[0] - n_before) / (self._seen[1] - since_s)

    def _work(self) -> None:
        while self._going:
            self._waker.compute()
            self._n_done += 1

    def _stop(self) -> None:
        self._going = False

    def __enter__(self) -> Computing:
        (self._thread,) = start_threads(1, "computing", self._work, self._stop)
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()
        self._thread.join()
        self._waker.close()
