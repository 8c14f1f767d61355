"""Who proposes the next tokens: the text so far (prompt look-up), or a small model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

LONGEST, SHORTEST = 3, 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_SHIFT = 40


class LookupDrafter:
    """Proposes what followed the last time the text ended like this.

    For every suffix length a table of fixed size says where such a suffix ended last; a new token is one entry per
    length. Entries that collide are lost, never wrong: the tokens are compared.
    """

    name = "lookup"
    relative_cost = 0.0

    def __init__(self, n_ctx: int, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        self._lengths = range(shortest, longest + 1)
        self._n_slots = 1 << max(10, (2 * n_ctx - 1).bit_length())
        self.grade = 0
        self.begin()

    def begin(self) -> None:
        """Forget the text."""
        self._tokens = array("i")
        self._ends = {n: array("i", bytes(4 * self._n_slots)) for n in self._lengths}
        self._before = dict.fromkeys(self._lengths, 0)  # where the present suffix ended before; 0: nowhere

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        """What followed the longest suffix that occurred before, repeated where it reaches the end of the text."""
        self._read(tokens)
        text, end = self._tokens, len(self._tokens)
        for length in reversed(self._lengths):
            place = self._before[length]
            if place and text[place - length : place] == text[end - length :]:
                self.grade = length
                return [text[place + i % (end - place)] for i in range(n)]
        self.grade = 0
        return []

    def _read(self, tokens: Sequence[int]) -> None:
        """Take in what is new."""
        text, mask = self._tokens, self._n_slots - 1
        for i in range(len(text), len(tokens)):
            text.append(tokens[i])
            key = 0
            for length in range(1, min(self._lengths[-1], i + 1) + 1):
                key = (key * 0x10001 + text[i + 1 - length] + 1) * _MULTIPLIER & 0xFFFFFFFFFFFFFFFF
                if length in self._ends:
                    slot = key >> _SHIFT & mask
                    self._before[length] = self._ends[length][slot]
                    self._ends[length][slot] = i + 1

    def close(self) -> None:
        """Nothing to free."""
