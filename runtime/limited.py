"""Work on data of strangers that may take all memory or never end: in a child process with limits on both.

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
_CHUNK = 2**16
_OK, _FAILED, _END = b"+", b"-", b"."


class Failed(Exception):
    """What the child ended of: the name of an exception and its text. No name: the child died without a word."""

    def __init__(self, name: str, text: str = "") -> None:
        super().__init__(text)
        self.name = name


def in_child(load: Callable[[], object], work: Callable[[], bytes], more_bytes: int, seconds: float) -> bytes:
    """What work() returns in a child that may take more_bytes of memory from where load() was done, and some seconds.

    Raises Failed with the exception of the child: MemoryError, TimeoutError, or what work() raised; EngineError where
    no process can be started.
    """
    reader, writer = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    child = 0
    try:
        try:
            child = _fork()
            if child == 0:
                _work(load, work, more_bytes, seconds, writer, before)
        finally:
            os.close(writer)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        answer = _read(reader, time.monotonic() + seconds)
        if not answer.endswith(_END):
            status, child = os.waitpid(child, 0)[1], 0
            raise Failed("MemoryError" if os.waitstatus_to_exitcode(status) == -signal.SIGKILL else "")
    finally:
        os.close(reader)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if answer.startswith(_OK):
        return answer[1:-1]
    name, _, text = answer[1:-1].decode(errors="replace").partition(":")
    raise Failed(name, text)


def _fork() -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of threads: this child uses nothing that they may hold
            return os.fork()
    except OSError as error:
        raise EngineError(
            f"no process can be started for the chat template ({error.strerror})", "raise `ulimit -u`, or lower -m"
        ) from None


def _read(reader: int, deadline_s: float) -> bytes:
    """All that the child writes. Raises Failed("TimeoutError")."""
    parts: list[bytes] = []
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
        part = os.read(reader, _CHUNK)
        if not part:
            return b"".join(parts)
        parts.append(part)
    raise Failed("TimeoutError")


def _work(
    load: Callable[[], object],
    work: Callable[[], bytes],
    more_bytes: int,
    seconds: float,
    writer: int,
    mask: set[signal.Signals] | set[int],
) -> NoReturn:
    """The life of the child."""
    try:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _be_the_first_to_go()
        gc.freeze()  # what is there already is not looked at, and not copied for it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        answer = _answer(load, work, more_bytes)
        while answer:
            answer = answer[os.write(writer, answer) :]
    finally:
        os._exit(0)


def _be_the_first_to_go() -> None:
    """Where memory runs out all the same, the kernel ends this process and not its parent."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _answer(load: Callable[[], object], work: Callable[[], bytes], more_bytes: int) -> bytes:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        load()
        taken = address_space_bytes()
        wanted = taken + more_bytes
        if taken and (limits[0] == resource.RLIM_INFINITY or wanted < limits[0]):
            resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
        return _OK + work() + _END
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells it
        resource.setrlimit(resource.RLIMIT_AS, limits)
        return _FAILED + f"{type(error).__name__}:{str(error)[:300]}".encode(errors="replace") + _END
