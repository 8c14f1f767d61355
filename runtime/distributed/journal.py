"""What went into the layers of workers since the beginning of the text, so that another worker can take over.

It is kept in a file that has no name, and is gone when the process ends: hidden states of a long text are too much for
a memory budget.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

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

    def begin(self, part: Part) -> None:
        """A pass comes: those of positions that are computed anew are forgotten."""
        while self.entries and self.entries[-1].part.first >= part.first:
            self.entries.pop()
        ends = (offset + n for entry in self.entries[-1:] for offset, n in entry.inputs.values())
        self._end = max(ends, default=0)
        self.entries.append(Entry(part))

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
