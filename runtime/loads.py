"""What is on its way from the disk: pieces of weights, and the requests they are read in."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.model_file import Piece
from runtime.ring import Slot


@dataclass(eq=False)
class Load:
    """A piece on its way into memory, or there: in a slot of the ring, or at home (slot None)."""

    piece: Piece
    pass_number: int
    address: int
    slot: Slot | None
    chunks_left: int = 0
    asked: bool = False

    def has_place(self, wanted: frozenset[int], same_ring: bool) -> bool:
        """Whether its place is there under a plan that keeps `wanted` resident, and the same ring or another one."""
        return same_ring if self.slot else self.piece.number in wanted


@dataclass(frozen=True, eq=False)
class Chunk:
    """One read request. load is None for reads outside the stream (embedding rows)."""

    file: int
    offset: int
    address: int
    n_bytes: int
    load: Load | None = None
    batch: list[int] | None = None
