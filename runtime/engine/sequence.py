"""The tokens of one text in an engine's cache: which are known, which have to be computed, which are forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.engine.engine import Engine
from runtime.errors import EngineError, PromptError
from runtime.passes import Part


class TokenSequence:
    """Tokens whose keys and values are in an engine's cache, each at the position of its place in `tokens`."""

    def __init__(self, engine: Engine, note: Callable[[str], None] = print) -> None:
        self.engine, self.number = engine, 0  # an engine has one sequence
        self.tokens: list[int] = []
        self._note = note

    @property
    def n_past(self) -> int:
        """The position of the next token."""
        return len(self.tokens)

    @property
    def room(self) -> int:
        """How many tokens the context still takes."""
        return self.engine.settings.n_ctx - len(self.tokens)

    def feed(self, tokens: Sequence[int]) -> None:
        """Make `tokens` the whole sequence: what it has in common with the old one is kept, the rest is computed."""
        if not tokens:
            raise PromptError("the prompt is empty", "give some text with -p")
        kept = self.known(tokens)
        if kept < len(self.tokens):
            kept = self._shorten(kept)
        self.append(tokens[kept:])

    def known(self, tokens: Sequence[int]) -> int:
        """How many of the first of these tokens need not be computed again; the last one always is."""
        return min(_common_prefix(self.tokens, tokens), len(tokens) - 1)

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on with an answer; the logits of all these tokens are there afterwards."""
        self.append(tokens, len(tokens), decode=True)

    def append(self, tokens: Sequence[int], n_outputs: int = 1, *, decode: bool = False) -> None:
        """Compute more tokens; the logits of the last n_outputs of them are there afterwards. decode: they continue an
        answer.

        Raises PromptError when the context is full, and what Engine.compute raises. After an error the sequence is as
        it was before the pass that failed, or empty where the model's state cannot be shortened.
        """
        part = Part(self.number, self.n_past, tuple(tokens), n_outputs)
        self.tokens += tokens
        try:
            self.engine.compute(self.engine.cut(part, decode=decode))
        except BaseException:
            del self.tokens[self.engine.n_past :]
            raise

    def shorten(self, n_tokens: int) -> None:
        """Keep the first n_tokens only."""
        wanted = self.tokens[:n_tokens]
        if n_tokens < len(self.tokens) and self._shorten(n_tokens) < n_tokens:
            self.append(wanted)

    def _shorten(self, n_tokens: int) -> int:
        try:
            self.engine.truncate(n_tokens)
        except EngineError:
            self._note("this model's state cannot be shortened: the conversation is read again from its beginning")
            self.engine.truncate(0)
            n_tokens = 0
        del self.tokens[n_tokens:]
        return n_tokens


def _common_prefix(old: Sequence[int], new: Sequence[int]) -> int:
    n = min(len(old), len(new))
    return next((i for i in range(n) if old[i] != new[i]), n)
