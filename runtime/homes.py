"""Where resident pieces live."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.memory import Region
from runtime.model_file import Piece, TensorInfo
from runtime.sizes import page_down, page_up


class Home:
    """The place of a tensor's resident pieces: address space for all of it, memory only for what was loaded."""

    def __init__(self, info: TensorInfo) -> None:
        self._start = page_down(info.offset)
        self._tensor = info
        self._region = Region(page_up(info.offset + info.n_bytes) - self._start)
        self._region.use_huge_pages(0)

    @property
    def data(self) -> int:
        """Address of the tensor's first byte."""
        return self._region.address + self._tensor.offset - self._start

    def span_address(self, piece: Piece) -> int:
        """Where the piece's span is to be read to."""
        return self._region.address + piece.span[0] - self._start

    @property
    def range(self) -> tuple[int, int]:
        """The addresses [start, end)."""
        return self._region.range

    def expect(self, n_bytes: int) -> None:
        """The first n_bytes of the tensor are going to be resident: huge pages there and only there."""
        self._region.use_huge_pages(n_bytes)

    def drop(self, piece: Piece, kept: Iterable[Piece]) -> None:
        """Give the memory of one piece back, but not the pages it shares with the kept pieces of the tensor."""
        start, end = piece.span
        for other in kept:
            if other.number < piece.number:
                start = max(start, other.span[1])
            else:
                end = min(end, other.span[0])
        self._region.drop(start - self._start, end - self._start)

    def free(self) -> None:
        """Unmap."""
        self._region.free()
