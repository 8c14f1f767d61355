"""Work in a child, which a process is spared: data of strangers that may take all memory or never end, and code that
would take memory for good.

The child is a copy of this process, so starting it takes a few milliseconds and it has only the pages it changes.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from runtime.errors import EngineError
from runtime.memory import address_space_bytes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENDED_BY: dict[int, str] = {signal.SIGKILL: "MemoryError", signal.SIGXCPU: "TimeoutError"}
_OK, _FAILED = b"+", b"-"
_LENGTH_BYTES = 8


class Failed(Exception):
    """What the child ended of: the name of an exception and its text. No name: the child died without a word."""

    def __init__(self, name: str, text: str = "") -> None:
        super().__init__(text)
        self.name = name


def in_child(
    load: Callable[[], object], work: Callable[[], bytes], more_bytes: int, seconds: float, what: str
) -> bytes:
    """What work() returns in a child; see Child for the rest."""
    child = Child(load, lambda _: work(), more_bytes, seconds, what)
    try:
        return child.ask(b"")
    finally:
        child.close()


class Child:
    """A child that answers questions with what work() makes of them, one after the other, until it is closed.

    It may take more_bytes of memory from where load() was done, and some seconds for every answer; load() belongs to
    the first. what: it is for, in errors.
    """

    def __init__(
        self,
        load: Callable[[], object],
        work: Callable[[bytes], bytes],
        more_bytes: int,
        seconds: float,
        what: str,
    ) -> None:
        """Start it; load() begins at once. Raises EngineError where no process can be started."""
        self._seconds = seconds
        questions, self._writer = os.pipe()
        self._reader, answers = os.pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._child = 0
        try:
            self._child = _fork(what)
            if self._child == 0:
                _live(load, work, more_bytes, seconds, (questions, answers), (self._reader, self._writer), before)
        except EngineError:
            self.close()
            raise
        finally:
            os.close(questions)
            os.close(answers)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ask(self, question: bytes) -> bytes:
        """The answer. Raises Failed with the exception of the child: MemoryError, TimeoutError, or what it raised.

        It must not be asked again then.
        """
        deadline = time.monotonic() + self._seconds
        with suppress(BrokenPipeError):  # it has died; reading tells of what
            _write(self._writer, question)
        kind = self._read(1, deadline)
        answer = self._read(int.from_bytes(self._read(_LENGTH_BYTES, deadline), "little"), deadline)
        if kind == _OK:
            return answer
        name, _, text = answer.decode(errors="replace").partition(":")
        raise Failed(name, text)

    def _read(self, n_bytes: int, deadline_s: float) -> bytes:
        """So many bytes from the child. Raises Failed."""
        found = b""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while len(found) < n_bytes:
            if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                raise Failed("TimeoutError")
            part = os.read(self._reader, n_bytes - len(found))
            if not part:
                child, self._child = self._child, 0
                status = os.waitpid(child, 0)[1]
                raise Failed(_ENDED_BY.get(-os.waitstatus_to_exitcode(status), ""))
            found += part
        return found

    def close(self) -> None:
        """End it."""
        os.close(self._reader)
        os.close(self._writer)
        child, self._child = self._child, 0
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _fork(what: str) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of threads: this child uses nothing that they may hold
            return os.fork()
    except OSError as error:
        raise EngineError(
            f"no process can be started for {what} ({error.strerror})", "raise `ulimit -u`, or lower -m"
        ) from None


def _live(
    load: Callable[[], object],
    work: Callable[[bytes], bytes],
    more_bytes: int,
    seconds: float,
    ours: tuple[int, int],
    theirs: tuple[int, int],
    mask: set[signal.Signals] | set[int],
) -> NoReturn:
    """The life of the child."""
    try:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for fd in theirs:
            os.close(fd)
        _be_the_first_to_go()
        gc.freeze()  # what is there already is not looked at, and not copied for it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        _answer_all(load, work, more_bytes, *ours)
    finally:
        os._exit(0)


def _be_the_first_to_go() -> None:
    """Where memory runs out all the same, the kernel ends this process and not its parent."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _answer_all(
    load: Callable[[], object], work: Callable[[bytes], bytes], more_bytes: int, reader: int, writer: int
) -> None:
    """Answer until the parent asks no more, or something fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        load()
        taken = address_space_bytes()
        wanted = taken + more_bytes
        if taken and (limits[0] == resource.RLIM_INFINITY or wanted < limits[0]):
            resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
        with open(reader, "rb") as questions:
            while header := questions.read(_LENGTH_BYTES):
                answer = work(questions.read(int.from_bytes(header, "little")))
                os.write(writer, _OK)
                _write(writer, answer)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells it
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.write(writer, _FAILED)
        _write(writer, f"{type(error).__name__}:{str(error)[:300]}".encode(errors="replace"))


def _write(fd: int, data: bytes) -> None:
    """Length and data."""
    left = len(data).to_bytes(_LENGTH_BYTES, "little") + data
    while left:
        left = left[os.write(fd, left) :]
