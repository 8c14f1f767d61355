"""Ctrl-C and SIGTERM: what they end depends on what is going on."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.errors import Cancelled

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_END_S = 1.5  # after a signal the process ends by then, even where the disk or one long call of C keeps it waiting
_ANSWER_S = 0.1  # in which the handler runs, unless the main thread is inside such a call


class Interrupts:
    """Handles SIGINT and SIGTERM of a command.

    By default a signal raises Cancelled where the program is. Inside `held` it waits for the block to end (C code is
    calling back into Python there); inside `ending` it calls a function that ends the work in an orderly way. What does
    not end in time is ended without ceremony, and a second signal that finds the first one still being served ends the
    process at once.

    Python runs its handlers in the main thread, between two steps of the interpreter. So a thread of its own is told of
    every signal by the C side of Python and keeps the promises while the main thread is inside one call of C.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._act: Callable[[int], None] = self._raise
        self._patient = False
        self._handled = 0
        self._must_end = False

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Handle signals inside the block, as before after it."""
        self._must_end = False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = [signal.signal(number, self._on_signal) for number in _SIGNALS]
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals").start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            os.close(writer)
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
        self._handled += 1
        if self.signal_number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal_number = number
        self._must_end |= self._ends(number)
        self._act(number)

    def _ends(self, number: int) -> bool:
        """Whether the process has to end after a signal that comes now."""
        return number != signal.SIGINT or not self._patient

    def _raise(self, number: int) -> None:
        self.signal_number = 0
        raise Cancelled(number)

    def _watch(self, reader: int) -> None:
        """Wait for signals, and end the process where the main thread does not; until the pipe is closed."""
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        number, handled, deadline, stuck = 0, self._handled, 0.0, False
        while True:
            if deadline and not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                os._exit(128 + number)
            arrived = os.read(reader, 64)
            if not arrived:
                os.close(reader)
                return
            numbers = [n for n in arrived if n in _SIGNALS]
            if not numbers:
                continue
            number, start = numbers[0], time.monotonic()
            time.sleep(_ANSWER_S)
            is_stuck = self._handled == handled
            if deadline or (is_stuck and (stuck or self.signal_number)):
                os._exit(128 + number)
            handled, stuck = self._handled, is_stuck
            if self._must_end or (is_stuck and any(map(self._ends, numbers))):
                deadline = start + _END_S


interrupts = Interrupts()
"""The handler of this process: signals are the process's own, so there is one."""
