"""Ctrl-C and SIGTERM: what they end depends on what is going on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.errors import Cancelled

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_END_S = 1.5  # after a signal the process ends by then, even where the disk keeps it waiting


class Interrupts:
    """Handles SIGINT and SIGTERM of a command.

    By default a signal raises Cancelled where the program is. Inside `held` it waits for the block to end (C code is
    calling back into Python there); inside `ending` it calls a function that ends the work in an orderly way. What does
    not end in time is ended without ceremony, and a second signal that finds the first one still being served ends the
    process at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._act: Callable[[int], None] = self._raise
        self._patient = False
        self._over = threading.Event()

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Handle signals inside the block, as before after it."""
        before = [signal.signal(number, self._on_signal) for number in _SIGNALS]
        self._over.clear()
        try:
            yield self
        finally:
            self._over.set()
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
    def ending(self, act: Callable[[int], None], *, patient: bool = False) -> Iterator[None]:
        """A signal calls act(number) instead of raising. patient: Ctrl-C ends the work only, which may take time."""
        before = self._act, self._patient
        self._act, self._patient = act, patient
        try:
            yield
        finally:
            self._act, self._patient = before

    def take(self) -> int:
        """The signal that came and was not raised, or 0; forgets it."""
        number, self.signal_number = self.signal_number, 0
        return number

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal_number = number
        if number != signal.SIGINT or not self._patient:
            threading.Thread(target=self._end_later, args=(number,), daemon=True, name="end").start()
        self._act(number)

    def _raise(self, number: int) -> None:
        self.signal_number = 0
        raise Cancelled(number)

    def _end_later(self, number: int) -> None:
        if not self._over.wait(_END_S):
            os._exit(128 + number)


interrupts = Interrupts()
"""The handler of this process: signals are the process's own, so there is one."""
