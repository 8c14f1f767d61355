"""Rounds of an answer on demand, so that two engines can take turns while both are open.

A process reads lines from its standard input and sleeps between them. "again": forget everything, compute the prompt
and choose a token. A number: choose so many more tokens. Each line is answered by one of JSON: the seconds, how many
tokens were computed, and those that were chosen, fewer than asked for where the model ended its answer. Only the
standard library is imported here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Protocol

AGAIN = "again"


class Answer(Protocol):
    """A greedy answer to a prompt."""

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens of the prompt."""

    def forget(self) -> None:
        """Begin anew; nothing is computed yet."""

    def next_token(self) -> int | None:
        """The next token, for the first one the prompt is computed; None: the model ended its answer."""


def serve(answer: Answer) -> None:
    """Do rounds until standard input ends."""
    for line in sys.stdin:
        again = line.strip() == AGAIN
        if again:
            answer.forget()
        seconds, tokens = _round(answer, 1 if again else int(line))
        n_computed = len(answer.prompt) if again else len(tokens)
        print(json.dumps({"seconds": seconds, "n_computed": n_computed, "tokens": tokens}), flush=True)


def _round(answer: Answer, n_tokens: int) -> tuple[float, list[int]]:
    tokens: list[int] = []
    start_s = time.perf_counter()
    while len(tokens) < n_tokens:
        token = answer.next_token()
        if token is None:
            break
        tokens.append(token)
    return time.perf_counter() - start_s, tokens
