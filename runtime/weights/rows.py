"""Input embeddings: only the rows of the tokens at hand are in memory."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.llama.model_file import TensorInfo
from runtime.memory import Region
from runtime.sizes import PAGE, page_down, page_up
from runtime.weights.store import LayerStore

_MOST_BYTES = 2**20


class RowTable:
    """Address space of a whole table [n_rows of row_bytes]; pages are read for the rows asked for."""

    def __init__(self, info: TensorInfo, max_bytes: int) -> None:
        self.tensor = info
        self._least = 2 * (info.row_bytes + PAGE)
        self.max_bytes = max(max_bytes, self._least)
        self._start = page_down(info.offset)
        self._region = Region(page_up(info.offset + info.n_bytes) - self._start)
        self._region.use_huge_pages(0)
        self._pages: set[int] = set()

    @property
    def data(self) -> int:
        """Address of row 0 (which need not be there)."""
        return self._region.address + self.tensor.offset - self._start

    def fetch(self, rows: Iterable[int], store: LayerStore) -> None:
        """Make rows present. Rows fetched earlier stay as long as all together fit in max_bytes.

        llama.cpp reads the rows of a pass's tokens only: where it does not, check_architecture refuses the model.
        """
        pages: set[int] = set()
        for row in set(rows):
            first = self.tensor.offset + row * self.tensor.row_bytes - self._start
            pages.update(range(first // PAGE, (first + self.tensor.row_bytes - 1) // PAGE + 1))
        missing = pages - self._pages
        if not missing:
            return
        if (len(self._pages) + len(missing)) * PAGE > self.max_bytes:
            self._forget()
            missing = pages
        file, base = self.tensor.file, self._region.address
        store.read_now([(file, self._start + s, base + s, n) for s, n in _runs(missing)])
        self._pages |= missing

    def resize(self, max_bytes: int) -> None:
        """Keep rows of at most max_bytes from now on."""
        self.max_bytes = max(max_bytes, self._least)
        if len(self._pages) * PAGE > self.max_bytes:
            self._forget()

    def _forget(self) -> None:
        self._region.drop(0, self._region.n_bytes)
        self._pages.clear()

    def free(self) -> None:
        """Unmap."""
        self._region.free()


def _runs(pages: set[int]) -> list[tuple[int, int]]:
    """Page numbers as (first byte, bytes) of unbroken runs of at most 1 MiB."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and runs[-1][0] + runs[-1][1] == page * PAGE and runs[-1][1] < _MOST_BYTES:
            runs[-1] = (runs[-1][0], runs[-1][1] + PAGE)
        else:
            runs.append((page * PAGE, PAGE))
    return runs
