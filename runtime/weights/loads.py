"""What is on its way from the disk: pieces of weights, and the requests they are read in."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.llama.model_file import Piece
from runtime.weights.ring import Slot

Numbers = frozenset[int]  # of pieces
NONE: Numbers = frozenset()


@dataclass(eq=False)
class Load:
    """A piece on its way into memory, or there: in a slot of the ring, or at home (slot None)."""

    piece: Piece
    pass_number: int
    address: int
    slot: Slot | None
    chunks_left: int = 0
    asked: bool = False
    error: BaseException | None = None  # a read of it failed: it is not there and never will be

    def has_place(self, wanted: frozenset[int], same_ring: bool) -> bool:
        """Whether its place is there under a plan that keeps `wanted` resident, and the same ring or another one."""
        return same_ring if self.slot else self.piece.number in wanted

    def cut(self, request_bytes: int) -> list[Chunk]:
        """All reads of it, of at most request_bytes."""
        start, end = self.piece.span
        chunks = [
            Chunk(self.piece.tensor.file, at, self.address + at - start, min(request_bytes, end - at), self)
            for at in range(start, end, request_bytes)
        ]
        self.chunks_left = len(chunks)
        return chunks


@dataclass(eq=False)
class Batch:
    """Reads outside the stream (embedding rows) that somebody waits for."""

    chunks_left: int
    error: BaseException | None = None


@dataclass(frozen=True, eq=False)
class Chunk:
    """One read request, of a load or of a batch."""

    file: int
    offset: int
    address: int
    n_bytes: int
    part: Load | Batch

    @property
    def load(self) -> Load | None:
        """The load it is part of, unless it is part of a batch."""
        return self.part if isinstance(self.part, Load) else None
