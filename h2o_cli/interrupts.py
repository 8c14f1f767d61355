"""Ctrl-C and SIGTERM: what they end depends on what is going on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.errors import Cancelled

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Handles SIGINT and SIGTERM of a command.

    By default a signal raises Cancelled where the program is. Inside `held` it waits for the block to end (C code is
    calling back into Python there); inside `ending` it calls a function that ends the work in an orderly way. A second
    signal that finds the first one still being served ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._act: Callable[[int], None] = self._raise

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Handle signals inside the block, as before after it."""
        before = [signal.signal(number, self._on_signal) for number in _SIGNALS]
        try:
            yield self
        finally:
            for number, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait for the end of the block and raise Cancelled there."""
        with self.ending(lambda _: None):
            yield
        if self.signal_number:
            self._raise(self.signal_number)

    @contextmanager
    def ending(self, act: Callable[[int], None]) -> Iterator[None]:
        """A signal calls act(number) instead of raising."""
        before, self._act = self._act, act
        try:
            yield
        finally:
            self._act = before

    def take(self) -> int:
        """The signal that came and was not raised, or 0; forgets it."""
        number, self.signal_number = self.signal_number, 0
        return number

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal_number = number
        self._act(number)

    def _raise(self, number: int) -> None:
        self.signal_number = 0
        raise Cancelled(number)


interrupts = Interrupts()
"""The handler of this process: signals are the process's own, so there is one."""
