"""Anonymous memory, and what the kernel says this process uses."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from runtime.errors import EngineError
from runtime.sizes import PAGE, page_down, page_up

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

PROT_NONE = 0
_CGROUPS = "/sys/fs/cgroup"
_PROT_RW = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_COLD = 4, 14, 15, 20
_MADV_DONTFORK, _MADV_POPULATE_WRITE = 10, 23
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK_BYTES = 128 * 2**10  # glibc's own, to begin with
_PAGEMAP_ENTRY_BYTES, _PAGEMAP_STATE = 8, 5  # proc(5): the highest bits say present, swapped, of a file
_PAGEMAP_HIGHEST = 7 if sys.byteorder == "little" else 0  # the byte of an entry that has them
_NOT_THERE, _FROM_FILE = 0b000, 0b101
# A row of /proc/self/maps: a private mapping of a file that nobody can write to; its addresses, "x" where it is code,
# and its file (device and inode).
_READ_ONLY = re.compile(rb"^(\w+)-(\w+) .-(.)p \w+ (\S+ [1-9]\d*) ", re.M)


def _huge_page_bytes() -> int:
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 2 * 2**20


HUGE_PAGE = _huge_page_bytes()


def _mmap(address: int | None, n_bytes: int, prot: int, flags: int) -> int:
    found = _libc.mmap(address, n_bytes, prot, flags, -1, 0)
    if found == _MAP_FAILED or found is None:
        reason = os.strerror(ctypes.get_errno())
        raise EngineError(
            f"the system gave no address space ({n_bytes} bytes: {reason})",
            "lower -m, or raise `ulimit -v` and `ulimit -d`",
        )
    return int(found)


def touch(address: int, n_bytes: int) -> None:
    """Have the huge pages there of a range that is to be read into; its first and last page may be in use already.

    Pages that a read finds missing are made under a lock that every allocation of the process waits for; what a thread
    touches itself is not. A byte is set to zero in each of them.
    """
    first, end = address + PAGE, address + n_bytes - PAGE
    if first < end:
        for place in (first, *range(-(-(first + 1) // HUGE_PAGE) * HUGE_PAGE, end, HUGE_PAGE)):
            _libc.memset(place, 0, 1)


def make_pages(start: int, end: int) -> None:
    """Have the whole pages inside the addresses [start, end) at once, for less than a fault for each takes.

    A hint: where the kernel does not know it (before Linux 5.14), they come when they are written to.
    """
    first, last = page_up(start), page_down(end)
    if last > first:
        _libc.madvise(first, last - first, _MADV_POPULATE_WRITE)


def drop_pages(start: int, end: int) -> None:
    """Give the whole pages inside the addresses [start, end) back; they read as zeros afterwards.

    The kernel keeps a huge page whole, and counts all of it, until all of it was given back. So those that lie in the
    range in part are split first, which is what MADV_COLD does with them.
    """
    first, last = page_up(start), page_down(end)
    if last > first:
        inner_start, inner_end = -(-first // HUGE_PAGE) * HUGE_PAGE, last // HUGE_PAGE * HUGE_PAGE
        for edge_start, edge_end in ((first, min(inner_start, last)), (max(inner_end, first), last)):
            if edge_start < edge_end:
                _advise(edge_start, edge_end, _MADV_COLD, optional=True)  # not before Linux 5.4
        _advise(first, last, _MADV_DONTNEED)


def _advise(start: int, end: int, advice: int, *, optional: bool = False) -> None:
    """madvise on whole pages. optional: nothing is lost where the kernel does not know this advice."""
    if _libc.madvise(start, end - start, advice) != 0:
        error = ctypes.get_errno()
        if not (optional and error == errno.EINVAL):
            reason = os.strerror(error)
            raise EngineError(
                f"the system did not take an advice about memory ({advice}: {reason})", "report this, and your kernel"
            )


def drop_file_pages() -> None:
    """Give back all pages of libraries that were never written to; those that are used come again.

    Nothing happens where the kernel does not tell which those are. Other threads load and close libraries meanwhile,
    and memory of theirs may come to be where one was: so what is not there any more after all were looked at is left
    alone, and so are other files, which are mapped for a moment only.
    """
    with suppress(OSError, EngineError):  # EngineError: it was closed just now
        unwritten = _unwritten(_library_mappings())
        for start, end in unwritten & _library_mappings():
            _advise(start, end, _MADV_DONTNEED, optional=True)  # not where somebody has locked them


def use_file(path: Path) -> None:
    """Read a file twice: then the system keeps its pages in its cache while it takes others out."""
    buffer = bytearray(64 * 2**10)
    with suppress(OSError):
        for _ in range(2):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _library_mappings() -> set[tuple[int, int]]:
    """Addresses [start, end) of private mappings that nobody can write to, of files with code that can be run."""
    found = _READ_ONLY.findall(Path("/proc/self/maps").read_bytes())
    with_code = {file for *_, access, file in found if access == b"x"}
    return {(int(start, 16), int(end, 16)) for start, end, access, file in found if file in with_code}


def _unwritten(mappings: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those of which this process has written no page, as it has where a library's relocated addresses are."""
    found = set()
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        for start, end in mappings:
            n_bytes = (end - start) // PAGE * _PAGEMAP_ENTRY_BYTES
            entries = os.pread(pages.fileno(), n_bytes, start // PAGE * _PAGEMAP_ENTRY_BYTES)
            highest = set(entries[_PAGEMAP_HIGHEST::_PAGEMAP_ENTRY_BYTES])
            if {byte >> _PAGEMAP_STATE for byte in highest} <= {_NOT_THERE, _FROM_FILE}:
                found.add((start, end))
    return found


def huge_pages(start: int, end: int, *, wanted: bool) -> None:
    """Ask for huge pages between two addresses (multiples of the page size), or for small ones."""
    if start < end:  # a kernel can be built without huge pages
        _advise(start, end, _MADV_HUGEPAGE if wanted else _MADV_NOHUGEPAGE, optional=True)


class Region:
    """Private anonymous memory: address space at once, pages when they are first written. Aligned to huge pages."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = max(page_up(n_bytes), PAGE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        start = _mmap(None, self.n_bytes + HUGE_PAGE, _PROT_RW, flags)
        self.address = -(-start // HUGE_PAGE) * HUGE_PAGE
        before = self.address - start
        if before:
            _libc.munmap(start, before)
        _libc.munmap(self.address + self.n_bytes, HUGE_PAGE - before)
        _libc.madvise(self.address, self.n_bytes, _MADV_DONTFORK)  # a child would take page tables for all of it

    @property
    def range(self) -> tuple[int, int]:
        """The addresses [start, end)."""
        return self.address, self.address + self.n_bytes

    def use_huge_pages(self, n_bytes: int) -> None:
        """Ask for huge pages in the first n_bytes (rounded down to whole ones), small pages behind them."""
        middle = self.address + n_bytes // HUGE_PAGE * HUGE_PAGE
        huge_pages(self.address, middle, wanted=True)
        huge_pages(middle, self.address + self.n_bytes, wanted=False)

    def drop(self, start: int, end: int) -> None:
        """Give the whole pages inside [start, end) back; they read as zeros afterwards."""
        drop_pages(self.address + start, self.address + end)

    def forbid(self) -> None:
        """Make every access a fault, and give all pages back."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(self.address, self.n_bytes, PROT_NONE, flags)

    def grown(self, n_bytes: int) -> Region:
        """This region where it has n_bytes; else another one, and this one is freed."""
        if n_bytes <= self.n_bytes:
            return self
        self.free()
        return Region(n_bytes)

    def free(self) -> None:
        """Unmap. The region must not be used afterwards."""
        if self.n_bytes:
            _libc.munmap(self.address, self.n_bytes)
            self.n_bytes = 0

    close = free


def view(address: int, n_bytes: int) -> memoryview:
    """A writable view of raw memory."""
    return memoryview((ctypes.c_char * n_bytes).from_address(address)).cast("B")


def keep_heap_small() -> None:
    """Have large blocks of the C library's heap mapped one by one, from now on: they are gone when they are freed.

    glibc does so by itself only until the first of them is freed. Later ones are cut from the heap, leave holes in it,
    and are cleared, and so taken as a whole, where a program asked for zeros and touches few of them (mallopt(3)).
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def trim_heap() -> None:
    """Return freed heap pages to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def address_space_bytes() -> int:
    """Bytes of address space this process has taken; 0 where the kernel does not say."""
    return _status_bytes("VmSize")


def resident_bytes() -> int:
    """Bytes of this process in memory now, libraries and page tables included."""
    return _status_bytes("VmRSS") + _status_bytes("VmPTE")


def resident_bytes_outside(ranges: Iterable[tuple[int, int]]) -> int:
    """Bytes of this process in memory now that do not lie in the given address ranges [start, end)."""
    ours = sorted(ranges)
    starts = [start for start, _ in ours]
    total, counted = _status_bytes("VmPTE"), True
    with open("/proc/self/smaps", "rb") as rows:
        for row in rows:
            if row[:4] == b"Rss:":
                total += int(row.split()[1]) * 1024 * counted
            elif not 65 <= row[0] <= 90:  # addresses are in small letters, names of figures begin with a capital
                start, end = (int(text, 16) for text in row.split(b" ", 1)[0].split(b"-"))
                i = bisect_right(starts, start) - 1
                counted = not (i >= 0 and end <= ours[i][1])
    return total


def file_bytes() -> int:
    """Bytes of mapped files of this process in memory now."""
    return _status_bytes("RssFile")


def peak_bytes() -> int:
    """The most bytes this process ever had in memory.

    When the process is alone in a memory cgroup, the kernel's own peak of that group (page cache included) is the
    answer; else the process's resident high-water mark.
    """
    group = _own_cgroup_peak()
    return group if group is not None else _status_bytes("VmHWM") + _status_bytes("VmPTE")


def device_bytes_read() -> int | None:
    """Bytes that disks have delivered for this process; None where the kernel does not count them."""
    try:
        found = Path("/proc/self/io").read_text()
    except OSError:
        return None
    return int(found.partition("\nread_bytes:")[2].split()[0])


def _own_cgroup_peak() -> int | None:
    folder = cgroup_folder()
    if folder is None:
        return None
    try:
        members = (folder / "cgroup.procs").read_text().split()
        if members != [str(os.getpid())]:
            return None
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if (folder / name).exists():
                return int((folder / name).read_text())
    except (OSError, ValueError):
        return None
    return None


def cgroup_folder() -> Path | None:
    """The folder of this process's memory cgroup (version 1 or 2), if it has one of its own.

    Inside a container the group's path is "/" or one of the host's; its files are then at the root.
    """
    try:
        rows = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for row in rows:
        _, controllers, path = row.split(":", 2)
        if "memory" in controllers.split(","):
            mount = _CGROUPS + "/memory"
        elif controllers == "" and Path(_CGROUPS + "/cgroup.controllers").exists():
            mount = _CGROUPS
        else:
            continue
        root, folder = Path(mount), _folder_below(mount, path)
        if folder and folder != root and folder.is_dir():
            return folder
        if _limit_of(root) is not None:
            return root
    return None


def _folder_below(mount: str, path: str) -> Path | None:
    """The folder of a group below a mount point; None when it is not in there.

    The kernel gives both the group's path and what is mounted relative to the process's namespace of groups, so that
    either can begin with "..".
    """
    mounted: tuple[str, ...] = ("/",)
    with suppress(OSError):
        for row in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = row.split()
            if fields[4] == mount:
                mounted = PurePosixPath(fields[3]).parts
    parts = PurePosixPath(path).parts
    rest = parts[len(mounted) :]
    return Path(mount).joinpath(*rest) if parts[: len(mounted)] == mounted and ".." not in rest else None


def _limit_of(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def _usage_of(folder: Path) -> int:
    """Bytes charged to the group that cannot simply be reclaimed (inactive page cache left out)."""
    for name in ("memory.current", "memory.usage_in_bytes"):
        try:
            used = int((folder / name).read_text())
            rows = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        for row in rows:
            key, value = row.split()[:2]
            if key in ("inactive_file", "total_inactive_file"):
                return max(0, used - int(value))
        return used
    return 0


def available_bytes() -> int:
    """Memory this process may still take: the machine's, or what its cgroups leave when that is less."""
    own = resident_bytes()
    left = (max(0, limit - _usage_of(folder)) + own for folder, limit in _limits())
    return min([_meminfo_bytes("MemAvailable"), *left])


def memory_bytes() -> int:
    """The most this process could ever take: the machine's memory, or the limit of its cgroups when that is less."""
    return min([_meminfo_bytes("MemTotal"), *(limit for _, limit in _limits())])


def _limits() -> Iterator[tuple[Path, int]]:
    """This process's memory cgroups that have a limit."""
    folder = cgroup_folder()
    while folder is not None and "cgroup" in folder.parts:
        limit = _limit_of(folder)
        if limit is not None:
            yield folder, limit
        folder = folder.parent


def _meminfo_bytes(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0
