"""Who opens a session: it hands in where it is told things and how its signals wait. The session itself prints
nothing and handles no signals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass


def _nowhere(*_texts: str) -> None:
    """Nobody is told."""


def _unseen(_what: str, _share: Callable[[], float]) -> AbstractContextManager[object]:
    """Nobody watches."""
    return nullcontext()


@dataclass(frozen=True)
class Caller:
    """By default a caller that hears nothing and is not interrupted.

    note: takes a line for the user. warn: takes what may be wrong with the answer, and what to do about it.
    progress: shows the share done, 0 to 1, of work that takes long, inside a block. held: no exception comes from
    outside inside this block (llama.cpp calls back into Python there); one that was due comes at its end.
    ending: inside this block a signal calls a function with its number instead, which ends the work in order.
    """

    note: Callable[[str], None] = _nowhere
    warn: Callable[[str, str], None] = _nowhere
    progress: Callable[[str, Callable[[], float]], AbstractContextManager[object]] = _unseen
    held: Callable[[], AbstractContextManager[object]] = nullcontext
    ending: Callable[[Callable[[int], None]], AbstractContextManager[object]] = nullcontext
