"""Reads of weights: direct I/O into page-aligned memory, or buffered reads whose page cache is given back at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import DiskError
from runtime.memory import view
from runtime.sizes import page_down

DIRECT, BUFFERED = "direct", "buffered"


class WeightFiles:
    """The open files of one model. Offsets, addresses and lengths of reads are multiples of the page size."""

    def __init__(self, paths: Sequence[Path], mode: str = DIRECT, sizes: Sequence[int] = ()) -> None:
        """Open paths. sizes: what they had when they were indexed; another size is a DiskError."""
        self.paths = tuple(paths)
        self.mode = mode
        self._fds: list[int] = []
        self._sizes: list[int] = []
        self._times: list[int] = []
        for path in self.paths:
            self._open(path)
        if sizes and tuple(sizes) != tuple(self._sizes):
            self.close()
            raise DiskError(f"{self.paths[0]} changed while it was opened", "run again when it is complete")

    def _open(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            if self.mode == DIRECT:
                try:
                    fd = os.open(path, flags | getattr(os, "O_DIRECT", 0))
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self.mode = BUFFERED  # e.g. tmpfs: the file system has no direct I/O
                    fd = os.open(path, flags)
            else:
                fd = os.open(path, flags)
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}", "check the file and its permissions") from None
        self._fds.append(fd)
        self._sizes.append(os.fstat(fd).st_size)
        self._times.append(os.fstat(fd).st_mtime_ns)

    def read(self, file: int, offset: int, address: int, n_bytes: int) -> None:
        """Fill n_bytes at address from the file; what lies behind the end of the file stays as it is.

        Raises DiskError when the disk fails or the file became shorter.
        """
        wanted = min(n_bytes, self._sizes[file] - offset)
        got = 0
        try:
            while got < wanted:
                before, part = got, view(address + got, n_bytes - got)
                got += os.preadv(self._fds[file], [part], offset + got)
                if got < wanted:
                    got = page_down(got)
                    if got == before:  # not even one page: this is the end of the file now
                        raise DiskError(
                            f"{self.paths[file]} became shorter while it was read", "restore the file and run again"
                        )
        except OSError as error:
            raise DiskError(
                f"reading {self.paths[file]} failed: {error.strerror}", "check the disk, then run again"
            ) from None
        if self.mode == BUFFERED:
            os.posix_fadvise(self._fds[file], offset, n_bytes, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Raise DiskError when a file was written to since it was opened: what was read may be part of two models."""
        for path, fd, time_ns in zip(self.paths, self._fds, self._times, strict=True):
            if os.fstat(fd).st_mtime_ns != time_ns:
                raise DiskError(f"{path} was changed while it was in use", "run again when it is complete")

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
