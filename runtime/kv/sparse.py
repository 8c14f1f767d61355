"""The rows of all sparse layers: where each of them is, in a prompt's pass and in a decode pass.

`stored` rows are where prompts are kept (the store). Rows from there on, the tail, were decoded since; they are only in
the buffers, behind the chosen rows, until the next prompt comes and takes them in.
"""

from __future__ import annotations

from contextlib import ExitStack

from runtime.errors import EngineError
from runtime.kv.cache import OFF, Cache, K, V
from runtime.kv.compact import PAD, Compact, Mask
from runtime.kv.jobs import Jobs, Stopped
from runtime.kv.needs import most_tail
from runtime.kv.options import KvFilter
from runtime.kv.prompt import PromptSlot
from runtime.kv.selection import Buffers, Selection
from runtime.kv.slots import Rows
from runtime.kv.store import DiskStore, RamStore, Store
from runtime.llama import abi


class SparseRows:
    """Rows of the sparse layers in `segments`, each a group that attends to the same selection."""

    def __init__(
        self,
        options: KvFilter,
        cache: Cache,
        segments: tuple[tuple[int, ...], ...],
        stopped: Stopped,
        n_threads: int,
    ) -> None:
        """n_threads: that compute."""
        self.stored = self.kept = 0
        self.layers = tuple(layer for segment in segments for layer in segment)
        self._options, self._cache, self._segments = options, cache, segments
        self._n_cells = max(part.n_cells for n in cache.filterable for part in cache.layers[n].parts)
        self._segment_of = {layer: i for i, segment in enumerate(segments) for layer in segment}
        self._selections: list[Selection] = []
        self._mask = Mask(self._n_cells)
        self._slot: PromptSlot | None = None
        with ExitStack() as opened:
            disk = DiskStore(cache, self.layers, options) if options.store == "disk" else None
            self.store: Store = disk or RamStore(cache, self.layers, options, n_threads)
            opened.callback(self.store.close)
            jobs = Jobs(self.store.n_threads)
            opened.callback(jobs.close)
            if disk:
                self._slot = PromptSlot(disk, self.layers, jobs, stopped)
            compact = {}
            for n in self.layers:
                compact[n] = Compact(cache.layers[n], self._n_cells)
                opened.callback(compact[n].free)
            self._buffers = Buffers(compact, self.store, jobs, stopped)
            opened.pop_all()

    # --- figures ------------------------------------------------------------------------------------------------

    @property
    def own(self) -> set[int]:
        """The tensors that take the places of a node's keys."""
        own = {compact.addresses[K] for compact in self._buffers.compact.values()}
        return own | ({self._slot.addresses[K]} if self._slot else set())

    def bytes_in_memory(self, n_past: int) -> int:
        """Keys and values of n_past positions that are in memory between two decode passes."""
        bytes_of = {n: layer.row_bytes for n, layer in self._cache.layers.items()}
        sparse = sum(bytes_of[n] for n in self.layers)
        dense = (
            sum(min(n_past, self._cache.layers[n].parts[K].n_cells) * bytes_of[n] for n in bytes_of) - n_past * sparse
        )
        buffers = (self.kept + n_past - self.stored) * sparse if self._selections else 0
        return dense + buffers + (0 if isinstance(self.store, DiskStore) else self.stored * sparse)

    @property
    def bytes_on_disk(self) -> int:
        """Keys and values that are in a file."""
        return self.stored * sum(self._cache.layers[n].row_bytes for n in self.layers) if self._slot else 0

    # --- around a pass ------------------------------------------------------------------------------------------

    def begin_prompt(self, n_past: int, n_tokens: int) -> None:
        """A dense pass comes: what was decoded becomes part of the prompt."""
        self.take_in_tail(n_past)
        if self._slot:
            self._slot.begin(n_past, n_tokens)

    def take_in_tail(self, n_past: int) -> None:
        """Make the rows decoded since the last prompt part of it."""
        n_tail = n_past - self.stored
        if n_tail > 0 and self._selections:
            for n, compact in self._buffers.compact.items():
                for part in (K, V):
                    self.store.put(n, part, self.stored, compact.rows[part][self.kept : self.kept + n_tail])
        self.forget()
        self.stored = n_past

    def begin_decode(self, n_past: int) -> bool:
        """A pass over one token comes. True when the prompt is another one than before, and nothing is chosen yet."""
        if n_past - self.stored >= most_tail(self._options, self._n_cells):
            self.take_in_tail(n_past)
        if self._selections:
            return False
        if self._slot:
            self._slot.drop()
        self.kept = self._options.n_rows(self.stored)
        self._selections = [Selection(self._options, segment, self.stored, self._buffers) for segment in self._segments]
        return True

    def failed(self) -> None:
        """A pass ended early: what was being fetched cannot be relied on."""
        for selection in self._selections:
            selection.forget()

    def forget(self) -> None:
        """Nothing is chosen, and the tail is gone."""
        for selection in self._selections:
            selection.forget()
            selection.settle()
        self._selections = []
        for compact in self._buffers.compact.values():
            compact.drop()

    def truncate(self, n_past: int) -> None:
        """Positions from n_past on are forgotten."""
        if n_past < self.stored:
            self.stored = n_past
            self.forget()

    def close(self) -> None:
        """Free everything; memory that a hanging disk may still write to stays until the process ends."""
        if not self._buffers.jobs.close():
            return
        for compact in self._buffers.compact.values():
            compact.free()
        self.store.close()

    # --- nodes --------------------------------------------------------------------------------------------------

    def take(self, i: int, rows: Rows) -> None:
        """Make these the chosen rows of segment i."""
        self._selections[i].take(rows)

    def write_prompt(self, node: abi.Tensor, layer: int, part: int) -> bool:
        """Place a write of a prompt's rows; whether its end has to be waited for before the attention."""
        if self._slot is None:
            # in a graph that is used again it is still where write_decoded put it
            node.data = self._cache.layers[layer].parts[part].data
            return False
        self._slot.place_write(node, part)
        return part == V and not self._slot.is_ready

    def attend_prompt(self, node: abi.Tensor) -> bool:
        """Place a sparse layer's attention over a prompt; whether its end has to be reported."""
        if self._slot is None:
            return False
        self._slot.place(node)
        return True

    def computed_prompt(self, layer: int) -> None:
        """The attention that attend_prompt wanted reported is done."""
        if self._slot:
            self._slot.computed(layer)

    def write_decoded(self, node: abi.Tensor, layer: int, part: int, row: int) -> bool:
        """Place the write of a row behind the chosen ones; whether to end the chunk there, to let a fetch overlap."""
        node.data = self._buffers.compact[layer].target(part, row, self.kept + row - self.stored)
        return part == V and not self._selections[self._segment_of[layer]].is_ready(layer)

    def attend_selected(self, node: abi.Tensor, layer: int, n_past: int) -> None:
        """Make the attention of position n_past see the chosen rows and the tail."""
        self._selections[self._segment_of[layer]].wait(layer)
        n_rows = self.kept + n_past - self.stored + 1
        if n_rows > self._n_cells:
            raise EngineError(f"{n_rows} rows do not fit a buffer of {self._n_cells}", OFF)
        n_padded = n_rows
        if self.kept == self.stored:  # with the shape of llama.cpp's own node, its own bits
            n_padded = min(-(-n_rows // PAD) * PAD, self._n_cells)
        self._buffers.compact[layer].place(node, n_padded)
        self._mask.place(node, n_rows, n_padded)
