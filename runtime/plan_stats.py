"""What a running process measures under the plan in force, published beside the plan file at every token boundary.

The file is the plan file's name with `.stats` behind it. docs/plan-file.md has the table. Its writer keeps it locked
for as long as it lives, so a reader knows whether somebody is there, however the writer ended. Sums run from the
moment the plan was adopted: a reader that misses records takes differences and loses nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import PlanError
from runtime.shared_record import MOVE_AWAY, check_owner, is_whole, open_shared, with_crc

if TYPE_CHECKING:
    from runtime.engine import Engine

MAGIC = b"H2OSTAT\0"
VERSION = 1
# magic, version, pid, sequence, the fields of PlanStats from generation on, unused, crc32
RECORD = struct.Struct("=8siiQQQqqqqqqQQdQddII")
I_SEQUENCE_FIELD = 3
LOOK_EVERY_S = 1.0
READ_WAIT_S = 0.05
MOST_POSITIONS = 16  # a pass of more positions is part of a prompt
_WHAT = "statistics file"


def stats_path(plan_path: str | os.PathLike[str]) -> Path:
    """The companion of a plan file."""
    return Path(f"{os.fspath(plan_path)}.stats")


@dataclass(frozen=True)
class PlanStats:
    """One record. passes to bytes_read count decode passes since the plan `generation` was adopted; times in seconds.

    available_bytes is what the fixed bytes of the process leave of its budget, for window and resident weights.
    """

    pid: int
    generation: int
    refused_generation: int  # the last plan that could not be used; 0: none
    model_hash: int
    budget_bytes: int
    fixed_bytes: int
    available_bytes: int
    window_bytes: int
    resident_bytes: int
    passes: int
    tokens: int
    pass_s: float
    bytes_read: int
    wait_s: float
    written_s: float

    @property
    def ms_per_token(self) -> float | None:
        """Decode time of a token since the plan was adopted; None before the first one."""
        return 1000 * self.pass_s / self.tokens if self.tokens else None


class StatsWriter:
    """Publishes the figures of an engine: about 10 microseconds a token, and never an error.

    A process that finds the file in use by another one publishes nothing until that one is gone.
    """

    def __init__(self, path: str | os.PathLike[str], model_hash: int, note: Callable[[str], None]) -> None:
        self.path = path
        self._model_hash = model_hash
        self._note = note
        self._told = False
        self._fd = -1
        self._next_look_s = 0.0
        self._sequence = 0
        self._pid = os.getpid()
        self._generation = -1
        self._seen = (0, 0, 0.0, 0, 0.0, 0)  # passes, positions, seconds, bytes read, wait, positions in the cache
        self._passes = self._tokens = self._bytes_read = 0
        self._pass_s = self._wait_s = 0.0

    def publish(self, engine: Engine, budget_bytes: int, generation: int, refused_generation: int = 0) -> None:
        """Take in the pass since the last call, and write the record; `generation` is that of the plan in force."""
        self._count(engine, generation)
        now = time.monotonic()
        if now >= self._next_look_s:
            self._next_look_s = now + LOOK_EVERY_S
            self._look()
        if self._fd < 0:
            return
        self._sequence += 2
        ledger = engine.ledger
        fixed = ledger.fixed_bytes
        sizes = (budget_bytes, fixed, budget_bytes - fixed, ledger.window_bytes, ledger.resident_bytes)
        sums = (self._passes, self._tokens, self._pass_s, self._bytes_read, self._wait_s, time.time())
        head = (MAGIC, VERSION, self._pid, self._sequence, generation, refused_generation, self._model_hash)
        try:
            # One write of the whole record: what a reader may see half of has the wrong CRC.
            os.pwrite(self._fd, with_crc(RECORD.pack(*head, *sizes, *sums, 0, 0)), 0)
        except OSError as error:
            self._give_up(f"the statistics file {self.path} cannot be written: {error.strerror}")

    def close(self) -> None:
        """Remove the file: nobody is measuring any more."""
        if self._fd >= 0:
            with suppress(OSError):
                if self._is_ours():
                    os.unlink(self.path)
        self._release()

    def _count(self, engine: Engine, generation: int) -> None:
        counters = engine.counters
        last = self._seen
        seen = (
            counters.passes,
            counters.tokens,
            counters.seconds,
            counters.bytes_read,
            counters.wait_s,
            engine.n_past,
        )
        self._seen = seen
        if generation != self._generation:
            self._generation = generation
            self._passes = self._tokens = self._bytes_read = 0
            self._pass_s = self._wait_s = 0.0
        elif seen[0] == last[0] + 1 and seen[1] - last[1] <= MOST_POSITIONS and seen[5] > last[5]:
            self._passes += 1
            self._tokens += seen[5] - last[5]
            self._pass_s += seen[2] - last[2]
            self._bytes_read += seen[3] - last[3]
            self._wait_s += seen[4] - last[4]

    def _look(self) -> None:
        """Open and lock the file, unless it is open and still the one at its path."""
        try:
            if self._fd >= 0:
                if self._is_ours():
                    return
                self._release()
            self._fd = open_shared(self.path, os.O_RDWR | os.O_CREAT, _WHAT)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old = os.pread(self._fd, RECORD.size, 0)
            if old and not old.startswith(MAGIC):
                self._give_up(f"{self.path} holds something else; it was left alone")
            elif not self._is_ours():
                self._release()  # its last user removed it meanwhile
        except BlockingIOError:
            self._release()
        except (PlanError, OSError) as error:
            self._give_up(str(error))

    def _is_ours(self) -> bool:
        """Whether the open file is the one at the path, and only we can write it. Raises PlanError."""
        try:
            at_path = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        check_owner(at_path, self.path, _WHAT)
        opened = os.fstat(self._fd)
        return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)

    def _give_up(self, problem: str) -> None:
        """Go on without the file, and say so once."""
        self._release()
        if not self._told:
            self._told = True
            self._note(f"`h2o plan --live` cannot follow this run: {problem}")

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def decode_stats(data: bytes, path: str | os.PathLike[str]) -> PlanStats:
    """The record in a file's first bytes. Raises PlanError."""
    if not data.startswith(MAGIC):
        raise PlanError(f"{path} is not a statistics file", MOVE_AWAY)
    if len(data) < RECORD.size:
        raise PlanError(f"the statistics file {path} is cut short", MOVE_AWAY)
    _, version, pid, sequence, *rest = RECORD.unpack(data)
    if not is_whole(data, sequence):
        raise PlanError(f"the statistics file {path} holds half a record", MOVE_AWAY)
    if version != VERSION:
        raise PlanError(f"the statistics file {path} has version {version}, unknown here", MOVE_AWAY)
    generation, refused, model_hash, budget, fixed, available, window, resident, passes, tokens, *sums = rest
    pass_s, bytes_read, wait_s, written_s, _, _ = sums
    sizes = (budget, fixed, available, window, resident)
    return PlanStats(
        pid, generation, refused, model_hash, *sizes, passes, tokens, pass_s, bytes_read, wait_s, written_s
    )


class StatsReader:
    """Reads the figures of the process that publishes them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def read(self) -> PlanStats | None:
        """The record of the process that is running, or None when there is none. Raises PlanError."""
        try:
            fd = open_shared(self.path, what=_WHAT)
        except FileNotFoundError:
            return None
        try:
            return self._record(fd) if _is_locked(fd) else None
        finally:
            os.close(fd)

    def _record(self, fd: int) -> PlanStats | None:
        give_up = time.monotonic() + READ_WAIT_S
        while True:
            data = os.pread(fd, RECORD.size, 0)
            try:
                return decode_stats(data, self.path) if data else None
            except PlanError:
                if time.monotonic() > give_up or len(data) < RECORD.size:
                    raise
            time.sleep(0.0002)


def _is_locked(fd: int) -> bool:
    """Whether a writer holds the file. The lock taken to find out is given back at once."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
