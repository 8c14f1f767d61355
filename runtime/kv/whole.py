"""Reads and writes of a file of keys and values that are whole, or an error."""

from __future__ import annotations

import os

from runtime.errors import DiskError


def read_whole(fd: int, target: memoryview, offset: int) -> None:
    """Fill target from offset (bytes) on. Raises OSError, DiskError where the file ends before."""
    done = 0
    while done < len(target):
        n = os.preadv(fd, [target[done:]], offset + done)
        if n == 0:
            raise DiskError("the file of keys and values became shorter", "run again")
        done += n


def write_whole(fd: int, source: memoryview, offset: int, *, direct: bool) -> None:
    """Write source at offset (bytes). direct: past the page cache; else it is synced. Raises OSError."""
    done = 0
    while done < len(source):
        done += os.pwritev(fd, [source[done:]], offset + done)
    if not direct:
        os.fdatasync(fd)
