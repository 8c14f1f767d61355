"""What is computed at once: a pass, its parts, and how the tokens of a sequence are cut into passes.

Whoever makes a pass says all about it here; all who take part in it (memory, weights, keys and values, llama.cpp's
context) are given this one value.
"""

from __future__ import annotations

from typing import NamedTuple

from runtime.errors import EngineError


class Part(NamedTuple):
    """Tokens of one sequence, at positions from `first` on. The logits of the last n_outputs of them are wanted.

    long: they are a piece of a block of 64 tokens or more, whose attention another kernel computes (see cut).
    """

    sequence: int
    first: int
    tokens: tuple[int, ...]
    n_outputs: int = 0
    long: bool = False

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.first + len(self.tokens)


class Pass(NamedTuple):
    """One run through all layers. decode: it continues an answer; else it reads a prompt, or some of it."""

    parts: tuple[Part, ...]
    decode: bool = False

    @property
    def only(self) -> Part:
        """The part of a pass over one sequence. Raises EngineError where there are several."""
        if len(self.parts) != 1:
            raise EngineError(
                f"a pass over {len(self.parts)} sequences cannot be computed", "compute one sequence after the other"
            )
        return self.parts[0]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of all parts."""
        return sum((part.tokens for part in self.parts), ())

    @property
    def n_tokens(self) -> int:
        """How many tokens all parts have."""
        return sum([len(part.tokens) for part in self.parts])

    @property
    def n_outputs(self) -> int:
        """Of how many tokens the logits are wanted."""
        return sum([part.n_outputs for part in self.parts])

    @property
    def needs_head(self) -> bool:
        """Whether the output head is computed."""
        return self.n_outputs > 0


def cut(part: Part, n_ubatch: int, most: int, *, decode: bool = False) -> list[Pass]:
    """The passes that a part takes alone: blocks of n_ubatch tokens as llama.cpp cuts them, each of them evenly into
    passes of at most `most`. What is wanted of its outputs and fits the last pass is computed there.

    Attention over 64 or more tokens gives the same bits however they are cut; fewer tokens take another path
    through llama.cpp's kernels. So with most >= FULL_TILES the answer does not depend on how much memory there was.
    """
    tokens, passes = part.tokens, []
    if part.n_outputs <= len(tokens) <= min(n_ubatch, most):  # for every token of an answer: so it is quick
        return [Pass((part,), decode)]
    for block in range(0, len(tokens), n_ubatch):
        n = min(n_ubatch, len(tokens) - block)
        n_passes = -(-n // most)
        for i in range(n_passes):
            start, end = block + n * i // n_passes, block + n * (i + 1) // n_passes
            n_outputs = min(part.n_outputs, end - start) if end == len(tokens) else 0
            piece = Part(part.sequence, part.first + start, tokens[start:end], n_outputs)
            passes.append(Pass((piece,), decode))
    return passes
