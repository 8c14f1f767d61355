"""Where resident pieces live."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.llama.model_file import Piece, TensorInfo
from runtime.memory import Region, drop_pages, huge_pages
from runtime.sizes import page_down, page_up


class Home:
    """The place of a tensor's resident pieces: address space for all of it, memory only for what was loaded."""

    def __init__(self, info: TensorInfo, address: int) -> None:
        """address: of the page that the tensor's first byte lies in."""
        self._tensor = info
        self._address = address
        self._start = page_down(info.offset)

    @property
    def data(self) -> int:
        """Address of the tensor's first byte."""
        return self._address + self._tensor.offset - self._start

    def span_address(self, piece: Piece) -> int:
        """Where the piece's span is to be read to."""
        return self._address + piece.span[0] - self._start

    def drop(self, piece: Piece, kept: Iterable[Piece]) -> None:
        """Give the memory of one piece back, but not the pages it shares with the kept pieces of the tensor."""
        start, end = piece.span
        for other in kept:
            if other.number < piece.number:
                start = max(start, other.span[1])
            else:
                end = min(end, other.span[0])
        drop_pages(self._address + start - self._start, self._address + end - self._start)


def home_bytes(info: TensorInfo) -> int:
    """Address space of a tensor's home: its pages in the file."""
    return page_up(info.offset + info.n_bytes) - page_down(info.offset)


class Homes:
    """The homes of tensors, by name. They lie one behind the other, so that huge pages hold the end of one and the
    beginning of the next.

    Huge pages are for when everything is resident: computing is faster with them. While a part of the model is streamed
    the disk sets the pace, and they only cost: in a virtual machine that gives free memory back to its host, 2 seconds
    per GB before the first token, four times as much as small pages.

    The lock of the store that owns them guards changes; a home, once there, stays where it is until the end.
    """

    def __init__(self) -> None:
        self._homes: dict[str, Home] = {}
        self._regions: list[Region] = []

    def __getitem__(self, tensor_name: str) -> Home:
        return self._homes[tensor_name]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The addresses [start, end) of all homes."""
        return [region.range for region in self._regions]

    def expect(self, pieces: Iterable[Piece], *, everything: bool) -> None:
        """These pieces are going to be resident; everything: in the end all pieces are.

        Raises EngineError, and leaves everything as it is, when there is no address space.
        """
        tensors = {piece.tensor.name: piece.tensor for piece in pieces}
        self._make([info for name, info in tensors.items() if name not in self._homes])
        for region in self._regions:
            huge_pages(*region.range, wanted=everything)

    def drop(self, pieces: Iterable[Piece], kept: Iterable[Piece]) -> None:
        """Give the memory of pieces back, but not what they share with the kept ones."""
        kept_of: dict[str, list[Piece]] = {}
        for piece in kept:
            kept_of.setdefault(piece.tensor.name, []).append(piece)
        for piece in pieces:
            self._homes[piece.tensor.name].drop(piece, kept_of.get(piece.tensor.name, ()))

    def _make(self, tensors: list[TensorInfo]) -> None:
        if not tensors:
            return
        region = Region(sum(map(home_bytes, tensors)))
        self._regions.append(region)
        address = region.address
        for info in tensors:
            self._homes[info.name] = Home(info, address)
            address += home_bytes(info)

    def free(self) -> None:
        """Unmap."""
        for region in self._regions:
            region.free()
        self._homes.clear()
        self._regions.clear()
