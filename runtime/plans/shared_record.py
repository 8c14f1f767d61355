"""Small records in shared files: opening them safely, telling a whole record from a torn one.

A record is a struct that starts with k and w or a magic, carries a sequence number that is odd while a write is going
on, and ends in a CRC-32 of everything before it.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib

from runtime.errors import PlanError

MOVE_AWAY = "remove the file or name another with -s"
MODE = 0o600
_CRC = struct.Struct("=I")


def open_shared(path: str | os.PathLike[str], flags: int = os.O_RDONLY, what: str = "plan file") -> int:
    """A descriptor of the file, its owner and mode checked. Raises PlanError; FileNotFoundError when missing."""
    try:
        # O_NONBLOCK: opening a FIFO somebody put there must not wait for its other end.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, MODE)
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = "is a symbolic link" if os.path.islink(path) else f"cannot be opened: {error.strerror}"
        raise PlanError(f"the {what} {path} {problem}", MOVE_AWAY) from None
    try:
        check_owner(os.fstat(fd), path, what)
    except PlanError:
        os.close(fd)
        raise
    return fd


def check_owner(status: os.stat_result, path: str | os.PathLike[str], what: str = "plan file") -> None:
    """Raise PlanError unless the file is regular, ours, and writable by nobody else."""
    if not stat.S_ISREG(status.st_mode):
        raise PlanError(f"the {what} {path} is not a regular file", MOVE_AWAY)
    if status.st_uid != os.geteuid():
        raise PlanError(f"the {what} {path} belongs to another user (uid {status.st_uid})", MOVE_AWAY)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PlanError(f"the {what} {path} can be written by other users", "chmod it to 600, or name another")


def with_crc(record: bytes) -> bytes:
    """The record with its last four bytes set to the CRC-32 of those before."""
    body = record[: -_CRC.size]
    return body + _CRC.pack(zlib.crc32(body))


def is_whole(data: bytes, sequence: int) -> bool:
    """Whether a record is what its writer wrote; a torn one was caught in the middle of a write, or was damaged."""
    return sequence % 2 == 0 and zlib.crc32(data[: -_CRC.size]) == _CRC.unpack(data[-_CRC.size :])[0]
