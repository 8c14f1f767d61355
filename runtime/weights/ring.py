"""The streaming window: one region of memory, handed out in slots from front to back and around."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from runtime.memory import Region


@dataclass(eq=False)
class Slot:
    """Bytes [start, end) of the ring; `free` once it was given back but an older slot was not."""

    start: int
    end: int
    free: bool = False


class Ring:
    """A byte ring of slots. Slots may be given back in any order; their bytes return in the order they were taken.

    The lock of the store that owns it guards it.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._region = Region(n_bytes)
        self._region.use_huge_pages(n_bytes)
        self._slots: deque[Slot] = deque()

    def take(self, n_bytes: int) -> Slot | None:
        """A slot of n_bytes, or None while there is no room."""
        start = self._room(n_bytes)
        if start is None:
            return None
        slot = Slot(start, start + n_bytes)
        self._slots.append(slot)
        return slot

    def _room(self, n_bytes: int) -> int | None:
        if not self._slots:
            return 0 if n_bytes <= self.n_bytes else None
        first, last = self._slots[0].start, self._slots[-1]
        if last.start < first:  # wrapped around
            return last.end if first - last.end >= n_bytes else None
        if self.n_bytes - last.end >= n_bytes:
            return last.end
        return 0 if first >= n_bytes else None

    def give_back(self, slot: Slot) -> None:
        """Take a slot back."""
        slot.free = True
        while self._slots and self._slots[0].free:
            self._slots.popleft()
        while self._slots and self._slots[-1].free:
            self._slots.pop()

    def address(self, slot: Slot) -> int:
        """Where the slot lies in memory (a multiple of the page size when all slots are)."""
        return self._region.address + slot.start

    @property
    def range(self) -> tuple[int, int]:
        """The addresses [start, end)."""
        return self._region.range

    def free(self) -> None:
        """Unmap."""
        self._slots.clear()
        self._region.free()
