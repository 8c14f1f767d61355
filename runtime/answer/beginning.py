"""What prompts begin with, a system prompt for example: computed once, and taken over by every text that begins so."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.answer.scheduler import LONG
from runtime.engine.engine import Engine


class Beginning:
    """The beginning that is kept, in a sequence of its own: `tokens`, none at first."""

    def __init__(self, engine: Engine, n_block: int, *, is_possible: bool) -> None:
        """n_block: tokens of the blocks that prompts are cut into. is_possible: else nothing is ever taken over."""
        self.tokens: tuple[int, ...] = ()
        self._engine, self._n_block = engine, n_block
        self._sequence = engine.settings.n_sequences
        self.is_possible = is_possible

    def of(self, prompt: Sequence[int]) -> int:
        """How many of its first tokens are kept; 0: too few."""
        return self.common(self.tokens, prompt)

    def common(self, one: Sequence[int], prompt: Sequence[int]) -> int:
        """How many first tokens a prompt can take over from another text; 0: too few.

        Its last token is always computed. What is taken over ends where a block does, or behind 64 tokens of one: only
        then every text computes them by the same kernel.
        """
        most = min(len(one), len(prompt) - 1)
        n = next((i for i in range(most) if one[i] != prompt[i]), most)
        rest = n % self._n_block
        n -= rest if rest < LONG else 0
        return n if n >= LONG else 0

    def keep(self, prompt: Sequence[int], sequence: int, n: int) -> None:
        """Keep the first n tokens of a text, which are computed."""
        self.drop()
        self._engine.share(sequence, self._sequence, n)
        self.tokens = tuple(prompt[:n])

    def give(self, sequence: int, n: int) -> None:
        """Have a sequence without positions begin with the first n tokens."""
        self._engine.share(self._sequence, sequence, n)

    def drop(self) -> None:
        """Keep nothing."""
        if self.tokens:
            self._engine.truncate(0, self._sequence)
        self.tokens = ()
