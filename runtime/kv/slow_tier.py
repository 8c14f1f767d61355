"""Where keys and values wait that were swapped out: blocks of equal size in memory, or in a file without a name."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Protocol

from runtime.errors import LIMITS, DiskError
from runtime.kv.whole import read_whole, write_whole
from runtime.memory import Region, view

_NEXT = "write the answers to a disk with room, or use --swap ram"


class SlowTier(Protocol):
    """Blocks of block_bytes, in whole pages."""

    def write(self, block: int, source: memoryview) -> None:
        """Keep a block. Raises DiskError."""

    def read(self, block: int, target: memoryview) -> None:
        """Bring a block. Raises DiskError."""

    def free(self, block: int) -> None:
        """A block is not wanted any more."""

    def close(self) -> None:
        """Give everything back."""


class RamTier:
    """Blocks in memory, taken as they are written."""

    def __init__(self, n_blocks: int, block_bytes: int) -> None:
        self._region, self._block_bytes = Region(n_blocks * block_bytes), block_bytes
        self._region.use_huge_pages(0)

    def write(self, block: int, source: memoryview) -> None:
        """Keep a block."""
        self._view(block)[:] = source

    def read(self, block: int, target: memoryview) -> None:
        """Bring a block."""
        target[:] = self._view(block)

    def free(self, block: int) -> None:
        """Give a block's memory back."""
        self._region.drop(block * self._block_bytes, (block + 1) * self._block_bytes)

    def _view(self, block: int) -> memoryview:
        return view(self._region.address + block * self._block_bytes, self._block_bytes)

    def close(self) -> None:
        """Give everything back."""
        self._region.free()


class DiskTier:
    """Blocks in a file that is gone when the process is, whatever ends it; with direct I/O where there is any."""

    def __init__(self, folder: Path, block_bytes: int) -> None:
        """Raises DiskError where no file can be made."""
        self._block_bytes = block_bytes
        self.written_bytes = self.read_bytes = 0
        try:
            with tempfile.TemporaryFile(dir=folder, prefix="h2o-swap-") as file:
                try:
                    flags = os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT
                    self._fd, self._direct = os.open(f"/proc/self/fd/{file.fileno()}", flags), True
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._fd, self._direct = os.dup(file.fileno()), False  # e.g. tmpfs has no direct I/O
        except OSError as error:
            raise DiskError(f"no file to swap to can be made in {folder}: {error.strerror}", _NEXT) from None

    def write(self, block: int, source: memoryview) -> None:
        """Write a block. Raises DiskError."""
        offset = block * self._block_bytes
        try:
            write_whole(self._fd, source, offset, direct=self._direct)
        except OSError as error:
            step = f"{LIMITS.get(error.errno or 0, _NEXT)}, and run again: what is finished is kept"
            raise DiskError(f"swapping keys and values out failed: {error.strerror}", step) from None
        self._forget_pages(offset)
        self.written_bytes += len(source)

    def read(self, block: int, target: memoryview) -> None:
        """Read a block. Raises DiskError."""
        offset = block * self._block_bytes
        try:
            read_whole(self._fd, target, offset)
        except OSError as error:
            raise DiskError(f"swapping keys and values in failed: {error.strerror}", _NEXT) from None
        self._forget_pages(offset)
        self.read_bytes += len(target)

    def _forget_pages(self, offset: int) -> None:
        if not self._direct:
            os.posix_fadvise(self._fd, offset, self._block_bytes, os.POSIX_FADV_DONTNEED)

    def free(self, block: int) -> None:
        """Nothing: the place is written again."""

    def close(self) -> None:
        """Close the file, which removes it."""
        os.close(self._fd)
