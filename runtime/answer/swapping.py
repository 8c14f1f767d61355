"""Keys and values of a text on their way out of the cache and back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.answer.pool import BLOCK_TOKENS, SwapTimes
from runtime.engine.engine import Engine
from runtime.errors import EngineError
from runtime.kv.slow_tier import SlowTier
from runtime.llama.cell_memory import CellMemory


@dataclass(frozen=True)
class Saved:
    """What was swapped out: the positions of each block in the order they were saved in, and a checksum of each."""

    blocks: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]
    checks: tuple[int, ...]


class Swapping:
    """Moves texts between the cache of an engine and a slow tier, block by block.

    On their way, a block's positions are those of a sequence that is no text (see Engine.share).
    """

    def __init__(self, engine: Engine, slow: SlowTier, block_bytes: int) -> None:
        self._engine, self._slow = engine, slow
        self._memory = CellMemory(engine.context, block_bytes)
        self._spare = engine.settings.n_sequences
        self.times = SwapTimes()

    def out(self, sequence: int, n_positions: int, blocks: Sequence[int]) -> Saved:
        """Save all positions of a sequence in blocks of the slow tier, and forget them. Raises DiskError."""
        start = time.perf_counter()
        attention, positions = self._engine.attention, []
        cells: Sequence[int] = attention.cells_of(sequence) if attention else range(n_positions)
        for block, first in zip(blocks, range(0, n_positions, BLOCK_TOKENS), strict=False):
            end = min(first + BLOCK_TOKENS, n_positions)
            self._memory.copy(sequence, self._spare, first, end)
            try:
                self._memory.save(self._spare)
                self._slow.write(block, self._memory.kept)
            finally:
                self._memory.remove(self._spare)
            positions.append(tuple(sorted(range(first, end), key=lambda position: cells[position])))
        checks = tuple(attention.check_of(cell) for cell in cells) if attention else ()
        self._engine.truncate(0, sequence)
        self.times.out_s += time.perf_counter() - start
        return Saved(tuple(blocks[: len(positions)]), tuple(positions), checks)

    def back(self, sequence: int, saved: Saved) -> None:
        """Put a text's positions into the cache again. Raises DiskError, and EngineError where they are others."""
        start = time.perf_counter()
        attention = self._engine.attention
        self._engine.layout.make_cells(sum(map(len, saved.positions)))
        for block, positions in zip(saved.blocks, saved.positions, strict=True):
            read_start = time.perf_counter()
            self._slow.read(block, self._memory.kept)
            self.times.read_s += time.perf_counter() - read_start
            self._slow.free(block)
            cells = attention.next_cells(len(positions)) if attention else []
            self._memory.load(self._spare)
            self._memory.copy(self._spare, sequence)
            self._memory.remove(self._spare)
            if attention:
                attention.put_back(sequence, positions, cells)
        if attention and tuple(map(attention.check_of, attention.cells_of(sequence))) != saved.checks:
            raise EngineError("keys and values came back other than they were", "use --admission simulate")
        self.times.in_s += time.perf_counter() - start

    def close(self) -> None:
        """Free what is on its way; the slow tier is its owner's."""
        self._memory.close()
