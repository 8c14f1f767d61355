"""Passes with one token of each of many texts: which rows every text sees, noted once and added to from then on."""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence

from runtime.passes import Part

PADDED = 256  # llama.cpp attends to a multiple of so many cells; those behind the positions are masked
SEEN, NO_LOGIT = 0, 0xFC00  # in 16 bits; the other is minus infinity
_GRAIN = 8  # rows that are copied: a multiple of it, so that a pass mostly copies as many as the one before


class SingleTokens:
    """Tables with a line of PADDED entries for each text of a pass.

    `cells`: the cells of its positions, in their order; behind them some cells of the cache. `masks`: in 16 bits.
    """

    def __init__(self, n_texts: int) -> None:
        self.cells = array.array("i", [0]) * (PADDED * n_texts)
        self.masks = array.array("H", [NO_LOGIT]) * (PADDED * n_texts)
        self._texts: list[int] = []
        self._ends: list[int] = []

    def forget(self) -> None:
        """A text's cells were changed by others."""
        self._texts = []

    def place(self, parts: Sequence[Part], cells: Mapping[int, Sequence[int]]) -> None:
        """The parts of a pass, one token each, and the cells of their texts with those of these tokens."""
        texts, ends = [part.sequence for part in parts], [part.first for part in parts]
        if texts == self._texts and ends == self._ends:
            for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
                at = PADDED * i + end
                self.cells[at], self.masks[at] = cells[text][end], SEEN
        else:
            for i, part in enumerate(parts):
                begin, end = PADDED * i, PADDED * i + part.end
                self.cells[begin:end] = array.array("i", cells[part.sequence])
                line = [SEEN] * part.end + [NO_LOGIT] * (PADDED - part.end)
                self.masks[begin : begin + PADDED] = array.array("H", line)
        self._texts, self._ends = texts, [end + 1 for end in ends]


def rows_to_copy(n_seen: int, n_texts: int, most: int) -> int:
    """How many rows of each text are copied where the longest one sees n_seen; 0: more than most in all."""
    n = -(-n_seen // _GRAIN) * _GRAIN
    if n * n_texts <= most:
        return n
    return n_seen if n_seen * n_texts <= most else 0
