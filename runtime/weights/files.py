"""Reads of weights: direct I/O into page-aligned memory, or buffered reads whose page cache is given back at once.

Direct wherever it works: buffered reads copy every byte on the cores that compute, and their pages take memory.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from runtime.errors import LIMITS, DiskError
from runtime.memory import view
from runtime.sizes import MIB, PAGE, page_down

DIRECT, BUFFERED = "direct", "buffered"
CACHED_BYTES = MIB // 2  # page cache that one reader may fill before it gives it back


def has_direct_reads(paths: Sequence[Path]) -> bool:
    """Whether weights in these files are read directly. Raises DiskError."""
    files = WeightFiles(paths)
    files.close()
    return files.mode == DIRECT


class WeightFiles:
    """The open files of one model. Offsets, addresses and lengths of reads are multiples of the page size.

    mode: how they are read, which the file system decides.
    """

    def __init__(self, paths: Sequence[Path], mode: str = DIRECT, sizes: Sequence[int] = ()) -> None:
        """Open paths. mode BUFFERED: do not even try direct reads. sizes: what the files had when they were indexed;
        another size is a DiskError."""
        self.paths = tuple(paths)
        self.mode = mode
        self._fds: list[int] = []
        self._sizes: list[int] = []
        self._times: list[int] = []
        with ExitStack() as opened:
            opened.callback(self.close)
            for path in self.paths:
                self._open(path)
            if sizes and tuple(sizes) != tuple(self._sizes):
                raise DiskError(f"{self.paths[0]} changed while it was opened", "run again when it is complete")
            opened.pop_all()

    def _open(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            fd = os.open(path, flags)
            self._fds.append(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: only what is asked for comes
            direct = _open_direct(path, flags, fd) if self.mode == DIRECT else None
        except OSError as error:
            next_step = LIMITS.get(error.errno or 0, "check the file and its permissions")
            raise DiskError(f"{path}: {error.strerror}", next_step) from None
        if direct is None:
            self.mode = BUFFERED
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # pages of read-ahead by others would start it here
        else:
            os.close(fd)
            self._fds[-1] = fd = direct
        self._sizes.append(os.fstat(fd).st_size)
        self._times.append(os.fstat(fd).st_mtime_ns)

    @property
    def cached_bytes(self) -> int:
        """Most bytes of page cache that one reader causes at a time."""
        return CACHED_BYTES if self.mode == BUFFERED else 0

    def read(self, file: int, offset: int, address: int, n_bytes: int) -> None:
        """Fill n_bytes at address from the file; what lies behind the end of the file stays as it is.

        Raises DiskError when the disk fails or the file became shorter.
        """
        if self.mode == DIRECT:
            self._read(file, offset, address, n_bytes)
            return
        for start in range(0, n_bytes, CACHED_BYTES):
            part_bytes = min(CACHED_BYTES, n_bytes - start)
            # Whoever reads the file with read-ahead leaves marks in its pages. A read that comes to one goes on reading
            # ahead, in ever larger blocks of pages, which stay: they are larger than what is given back at a time.
            os.posix_fadvise(self._fds[file], offset + start, part_bytes, os.POSIX_FADV_DONTNEED)
            self._read(file, offset + start, address + start, part_bytes)
            os.posix_fadvise(self._fds[file], offset + start, part_bytes, os.POSIX_FADV_DONTNEED)

    def _read(self, file: int, offset: int, address: int, n_bytes: int) -> None:
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


def _open_direct(path: Path, flags: int, buffered: int) -> int | None:
    """A descriptor for direct reads, or None where the file system has none or they bring other bytes than a buffered
    read of the same page. Raises OSError."""
    try:
        fd = os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None  # e.g. some file systems in memory
    try:
        if _reads_agree(fd, buffered):
            return fd
    except OSError as error:
        if error.errno != errno.EINVAL:
            return fd  # a failing disk: reading says so
    os.close(fd)
    return None


def _reads_agree(direct: int, buffered: int) -> bool:
    """Whether both descriptors of a file give the same page from its middle. Raises OSError."""
    offset = page_down(os.fstat(buffered).st_size // 2)
    pages = [mmap.mmap(-1, PAGE) for _ in range(2)]
    n_read = [os.preadv(fd, [page], offset) for fd, page in zip((direct, buffered), pages, strict=True)]
    os.posix_fadvise(buffered, offset, PAGE, os.POSIX_FADV_DONTNEED)
    same = n_read[0] == n_read[1] and pages[0][:] == pages[1][:]
    for page in pages:
        page.close()
    return same
