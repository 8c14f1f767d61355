"""A dense pass over a prompt while sparse layers are kept in a file: one slot of memory serves them all, one by one.

Before a sparse layer's attention the rows of earlier passes are loaded into the slot, while the layers before it
compute; llama.cpp's writes of new rows go there too; after the attention the new rows are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from runtime.kv.compact import StandIn
from runtime.kv.jobs import Job, Jobs, Stopped, settle
from runtime.kv.store import DiskStore
from runtime.llama import abi


class PromptSlot:
    """Serves the sparse layers of a pass in their order."""

    def __init__(self, store: DiskStore, layers: Sequence[int], jobs: Jobs, stopped: Stopped) -> None:
        self._store, self._layers, self._jobs, self._stopped = store, tuple(layers), jobs, stopped
        self._tensors = (StandIn(), StandIn())
        self._loads: list[Job] = []
        self._n_past = self._n_tokens = 0

    @property
    def addresses(self) -> tuple[int, int]:
        """The tensors that take the places of a node's keys and values."""
        return self._tensors[0].address, self._tensors[1].address

    def begin(self, n_past: int, n_tokens: int) -> None:
        """Positions [n_past, n_past + n_tokens) come next."""
        settle(self._loads, self._stopped)
        self._n_past, self._n_tokens = n_past, n_tokens
        self._load(self._layers[0])

    def _load(self, layer: int) -> None:
        self._loads = [self._jobs.start(partial(self._store.load, layer, part, self._n_past)) for part in (0, 1)]

    def place_write(self, node: abi.Tensor, part: int) -> None:
        """Make a write of new rows go to the slot."""
        node.data = self._store.slot_address(part)

    @property
    def is_ready(self) -> bool:
        """Whether the rows of earlier passes are there."""
        return all(load.done for load in self._loads)

    def place(self, node: abi.Tensor) -> None:
        """Make a flash-attention node read the slot, once the rows of earlier passes are there."""
        for load in self._loads:
            load.wait(self._stopped)
        for part, own in enumerate(self._tensors):
            own.copy(node.src[1 + part])
            own.tensor.data = self._store.slot_address(part)
            node.src[1 + part] = own.address

    def computed(self, layer: int) -> None:
        """The attention of a sparse layer is done: save its new rows, and load what the next one needs."""
        self._store.save(layer, self._n_past, self._n_tokens)
        i = self._layers.index(layer) + 1
        if i < len(self._layers):
            self._load(self._layers[i])

    def drop(self) -> None:
        """No prompt is computed for now: give the memory back."""
        settle(self._loads, self._stopped)
        self._store.drop_slot()
