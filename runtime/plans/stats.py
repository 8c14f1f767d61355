"""The record beside the plan file, in which a running process says what it measures under the plan in force.

The file's name is the plan file's with `.stats` appended. docs/plan-file.md has the table. The writer keeps the file
locked as long as it lives, so a reader knows whether somebody is there, however the writer ended. Sums run from the
moment the plan was adopted: a reader that misses records takes differences and loses nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from runtime.errors import PlanError
from runtime.plans.shared_record import MOVE_AWAY, check_owner, is_whole, open_shared, with_crc
from runtime.sizes import MB

MAGIC = b"H2OSTAT\0"
VERSION = 1
# magic, version, pid, sequence, the fields of PlanStats from generation on (the last in MB), crc32
RECORD = struct.Struct("=8siiQQQqqqqqqQQdQddII")
LOOK_EVERY_S = 1.0
READ_WAIT_S = 0.05
_WHAT = "statistics file"


def stats_path(plan_path: str | os.PathLike[str]) -> Path:
    """The companion of a plan file."""
    return Path(f"{os.fspath(plan_path)}.stats")


class PlanStats(NamedTuple):
    """One record. passes to bytes_read count decode passes since the plan `generation` was adopted; times in seconds.

    available_bytes is what the fixed bytes of the process leave of its budget, for window and resident weights.
    floor_bytes: the smallest budget in which it follows a plan, in whole MB.
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
    floor_bytes: int


class StatsFile:
    """The file as its writer has it. No record is ever an error: what goes wrong is noted once.

    Of several processes on one file the first has it; the others write nothing until that one is gone.
    """

    def __init__(self, path: str | os.PathLike[str], note: Callable[[str], None]) -> None:
        self.path = path
        self._note = note
        self._told = False
        self._fd = -1
        self._next_look_s = 0.0
        self._sequence = 0

    def put(self, stats: PlanStats) -> None:
        """Replace the record, where the file is ours; every LOOK_EVERY_S seconds, see to that first."""
        now = time.monotonic()
        if now >= self._next_look_s:
            self._next_look_s = now + LOOK_EVERY_S
            self._look()
        if self._fd < 0:
            return
        self._sequence += 2
        try:
            # One write of the whole record: what a reader may see half of has the wrong CRC.
            os.pwrite(self._fd, _encode(stats, self._sequence), 0)
        except OSError as error:
            self._give_up(f"the statistics file {self.path} cannot be written: {error.strerror}")

    def close(self) -> None:
        """Remove the file: nobody is measuring any more."""
        if self._fd >= 0:
            with suppress(OSError, PlanError):  # something else is there now: it is left alone
                if self._is_ours():
                    os.unlink(self.path)
        self._release()

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


def _encode(stats: PlanStats, sequence: int) -> bytes:
    """The record, with its CRC."""
    s = stats
    plan = (s.generation, s.refused_generation, s.model_hash)
    sizes = (s.budget_bytes, s.fixed_bytes, s.available_bytes, s.window_bytes, s.resident_bytes)
    sums = (s.passes, s.tokens, s.pass_s, s.bytes_read, s.wait_s, s.written_s)
    return with_crc(RECORD.pack(MAGIC, VERSION, s.pid, sequence, *plan, *sizes, *sums, s.floor_bytes // MB, 0))


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
    pass_s, bytes_read, wait_s, written_s, floor_mb, _ = sums
    seen = (passes, tokens, pass_s, bytes_read, wait_s, written_s)
    sizes = (budget, fixed, available, window, resident)
    return PlanStats(pid, generation, refused, model_hash, *sizes, *seen, floor_mb * MB)


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
