"""What went into the layers of workers since the beginning of the text, and keys and values that they have computed, so
that another worker can take over.

It is kept in files that have no name, and are gone when the process ends: that of a long text is too much for a memory
budget.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.distributed.messages import BLOCK
from runtime.passes import Part


@dataclass
class Entry:
    """A pass. inputs: layer -> where in the file what went into it is, and its length."""

    part: Part
    inputs: dict[int, tuple[int, int]] = field(default_factory=dict)


class Journal:
    """Passes in order; the last one is at hand. Raises OSError where the file cannot be written."""

    def __init__(self, folder: Path | None = None) -> None:
        self.entries: list[Entry] = []
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the journal is
        self._end = 0
        self.snapshot = Snapshot(folder)

    def begin(self, part: Part) -> None:
        """A pass comes: those of positions that are computed anew are forgotten."""
        while self.entries and self.entries[-1].part.first >= part.first:
            self.entries.pop()
        ends = (offset + n for entry in self.entries[-1:] for offset, n in entry.inputs.values())
        self._end = max(ends, default=0)
        self.entries.append(Entry(part))
        self.snapshot.forget_from(part.first)

    def positions_of(self, cell_bytes: Mapping[int, int]) -> int:
        """How many positions, up to where a pass begins, the snapshot has of these layers (layer -> bytes of one)."""
        n = min((self.snapshot.n_positions(*layer) for layer in cell_bytes.items()), default=0)
        return max((entry.part.first for entry in self.entries if entry.part.first <= n), default=0)

    def put(self, layer: int, hidden: bytes | memoryview) -> None:
        """What goes into a layer in the pass at hand."""
        os.pwrite(self._file.fileno(), hidden, self._end)
        self.entries[-1].inputs[layer] = (self._end, len(hidden))
        self._end += len(hidden)

    def get(self, entry: Entry, layer: int) -> bytes:
        """What went into a layer. Raises KeyError where that was not seen."""
        if layer == 0:
            return b""
        offset, n_bytes = entry.inputs[layer]
        return os.pread(self._file.fileno(), n_bytes, offset)

    def close(self) -> None:
        """Forget all."""
        self._file.close()
        self.snapshot.close()


class Snapshot:
    """Keys and values of the first positions of each layer, BLOCK by BLOCK."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the journal is
        self._cell_bytes: dict[int, int] = {}  # layer -> of a position
        self._offsets: dict[int, array[int]] = {}  # layer -> where in the file each of its blocks is, or was
        self._end = 0
        self._n_blocks: dict[int, int] = {}

    def n_positions(self, layer: int, cell_bytes: int) -> int:
        """How many of the first positions it has of a layer that takes so many bytes for each."""
        same = self._cell_bytes.get(layer) == cell_bytes
        return BLOCK * self._n_blocks.get(layer, 0) if same else 0

    def put(self, layer: int, first: int, data: memoryview) -> None:
        """The next BLOCK positions of a layer, from first on; others are passed over. Raises OSError."""
        cell_bytes = len(data) // BLOCK
        if self._cell_bytes.setdefault(layer, cell_bytes) != cell_bytes or first != self.n_positions(layer, cell_bytes):
            return
        block, offsets = first // BLOCK, self._offsets.setdefault(layer, array("q"))
        if block == len(offsets):
            offsets.append(self._end)
            self._end += len(data)
        os.pwrite(self._file.fileno(), data, offsets[block])
        self._n_blocks[layer] = block + 1

    def get(self, layer: int, first: int) -> bytes:
        """The BLOCK positions of a layer from first on, which are there."""
        return os.pread(self._file.fileno(), BLOCK * self._cell_bytes[layer], self._offsets[layer][first // BLOCK])

    def forget_from(self, position: int) -> None:
        """Positions from here on are computed anew."""
        for layer, n in self._n_blocks.items():
            self._n_blocks[layer] = min(n, position // BLOCK)

    def close(self) -> None:
        """Forget all."""
        self._file.close()
