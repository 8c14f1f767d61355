"""Where the chosen rows of a segment lie in its buffers: a row keeps its slot as long as it stays chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.kv.needs import most_new

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Move:
    """Rows (rising) that go into slots; `every`: the row each slot has afterwards."""

    rows: Rows
    slots: Rows
    every: Rows

    @property
    def are_many(self) -> bool:
        """Whether it is less work to copy the rows of all slots, in order."""
        return len(self.rows) > most_new(len(self.every))

    @property
    def copied(self) -> Rows:
        """The rows that are copied then, or the new ones."""
        return self.every if self.are_many else self.rows


class Slots:
    """n_slots slots for n_slots of n_rows rows."""

    def __init__(self, n_slots: int, n_rows: int) -> None:
        self._row_of = np.full(n_slots, -1, np.int64)
        self._slot_of = np.full(n_rows, -1, np.int64)
        self._chosen = np.zeros(n_rows + 1, bool)  # the last one stands for an empty slot

    def overlap(self, rows: Rows) -> float:
        """The share of these rows that has a slot."""
        return float(np.count_nonzero(self._slot_of[rows] >= 0)) / max(1, len(rows))

    def choose(self, rows: Rows) -> Move | None:
        """Make n_slots rows (rising, different) the chosen ones; what has to be fetched for that, None: nothing."""
        missing = rows[self._slot_of[rows] < 0]
        if not len(missing):
            return None
        self._chosen[rows] = True
        free = np.flatnonzero(~self._chosen[self._row_of])[: len(missing)]
        self._chosen[rows] = False
        old = self._row_of[free]
        self._slot_of[old[old >= 0]] = -1
        self._row_of[free] = missing
        self._slot_of[missing] = free
        return Move(missing, free, self._row_of.copy())

    def forget(self) -> None:
        """No row has a slot."""
        self._row_of[:] = -1
        self._slot_of[:] = -1
