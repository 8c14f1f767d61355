"""Per-layer compute times of a pass, measured at the borders between layers."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.passes import Pass


def layers_of(file: ModelFile, model: HollowModel) -> dict[int, int]:
    """Address of every weight's tensor struct -> its layer. The norm before the head counts as part of it."""
    layer_of = {t.name: group.index for group in file.groups for t in group.small}
    layer_of |= {piece.tensor.name: piece.layer for piece in file.pieces}
    layer_of |= {t.name: file.head.index for t in file.globals if t.name.startswith("output_norm")}
    return {address: layer for name, layer in layer_of.items() for address in model.weights.get(name, ())}


def layer_at(node: int, layer_of: dict[int, int], n_groups: int, layer: int) -> int:
    """The layer that begins at a node; `layer`, the one before it (-1: none), where none does.

    A head that is also the embedding table is used before any layer: that use is no border.
    """
    for source in abi.unpack_src(ctypes.string_at(node + abi.SRC_OFFSET, abi.SRC_BYTES)):
        found = layer_of.get(source, -1)
        if found > layer and (found < n_groups - 1 or layer >= 0):
            layer = found
    return layer


class LayerTrace:
    """A guest: counts nodes in one pass to learn where each layer begins; times the layers in the passes after it.

    A layer's time runs from the end of the node before its first weight to the same point of the next layer, without
    the waits for reads in between. `seconds` holds one list per timed pass: one time per layer, then the head's.
    A trace is for passes of one batch size: another size has another graph.
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
        group = layer_at(node, self._layer_of, self._n_groups, self._group)
        if group > self._group:
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
