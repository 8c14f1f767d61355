"""Per-layer compute times of a pass, measured at the borders between layers."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from runtime.llama import abi
from runtime.passes import Pass


class LayerTrace:
    """A guest: counts nodes in one pass to learn where each layer begins; times the layers in the passes after it.

    A layer's time runs from the end of the node before its first weight to the same point of the next layer, without
    the waits for reads in between. `seconds` holds one list per timed pass: one time per layer, then the head's.
    A trace is for passes of one batch size: another size has another graph. A head that is also the embedding table is
    used before any layer: that use is no border.
    """

    def __init__(self, layer_of: dict[int, int], n_groups: int, waited_s: Callable[[], float]) -> None:
        """layer_of: tensor struct address -> layer (the last group is the head). waited_s: all waits until now."""
        self._layer_of = layer_of
        self._n_groups = n_groups
        self._waited_s = waited_s
        self._begins: dict[int, int] = {}  # number of the border node -> the group that begins behind it
        self._learned = False
        self._node = 0
        self._group = -1
        self._mark = (0.0, 0.0)
        self.seconds: list[list[float]] = []

    def begin(self, pass_: Pass) -> None:
        """A pass begins."""
        self._node, self._group, self._mark = 0, -1, (time.perf_counter(), self._waited_s())
        if self._learned:
            self.seconds.append([0.0] * self._n_groups)

    def before(self, node: int) -> bool:
        """A node is announced; True at a border between layers."""
        self._node += 1
        if self._learned:
            return self._node in self._begins
        for source in abi.unpack_src(ctypes.string_at(node + abi.SRC_OFFSET, abi.SRC_BYTES)):
            group = self._layer_of.get(source, -1)
            if group > self._group and (group < self._n_groups - 1 or self._group >= 0):
                self._group = group
                self._begins[max(1, self._node - 1)] = group
        return False

    def after(self, node: int) -> None:
        """The node announced last has been computed."""
        if self._learned and self._node in self._begins:
            self._close()
            self._group = self._begins[self._node]

    def end(self, *, complete: bool) -> None:
        """The pass is over."""
        if self._learned:
            self._close()
        self._learned = True

    def _close(self) -> None:
        now, wait_s = time.perf_counter(), self._waited_s()
        if self._group >= 0:
            self.seconds[-1][self._group] += now - self._mark[0] - (wait_s - self._mark[1])
        self._mark = (now, wait_s)
