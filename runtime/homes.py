"""Where resident pieces live."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.memory import Region, drop_pages, huge_pages
from runtime.model_file import Piece, TensorInfo
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

    def expect(self, n_bytes: int) -> None:
        """The first n_bytes of the tensor are going to be resident: huge pages there and only there."""
        end = self._address + home_bytes(self._tensor)
        middle = min(end, page_up(self._address + n_bytes))
        huge_pages(self._address, middle, wanted=True)
        huge_pages(middle, end, wanted=False)

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
    beginning of the next where both are resident."""

    def __init__(self) -> None:
        self._homes: dict[str, Home] = {}
        self._regions: list[Region] = []

    def __getitem__(self, tensor_name: str) -> Home:
        return self._homes[tensor_name]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The addresses [start, end) of all homes."""
        return [region.range for region in self._regions]

    def expect(self, pieces: Iterable[Piece]) -> None:
        """These pieces and no others are going to be resident (of a tensor the first ones, in order).

        Raises EngineError, and leaves everything as it is, when there is no address space.
        """
        tensors: dict[str, TensorInfo] = {}
        sizes: dict[str, int] = {}
        for piece in pieces:
            name = piece.tensor.name
            tensors[name] = piece.tensor
            sizes[name] = sizes.get(name, 0) + piece.span_bytes
        self._make([info for name, info in tensors.items() if name not in self._homes])
        for name, home in self._homes.items():
            home.expect(sizes.get(name, 0))

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
