"""Regions of memory, and what is read from the kernel's files."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import bytes_in_memory

from runtime import memory
from runtime.errors import EngineError
from runtime.memory import HUGE_PAGE, Region, view
from runtime.sizes import MIB, PAGE, page_up

FAR = 2**62


# --- regions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def region():
    region = Region(8 * PAGE)
    yield region
    region.free()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * HUGE_PAGE))
def test_regions_are_aligned_and_have_no_memory_before_they_are_written(n_bytes):
    region = Region(n_bytes)
    assert region.address % HUGE_PAGE == 0
    assert region.n_bytes == max(page_up(n_bytes), PAGE)
    assert region.range == (region.address, region.address + region.n_bytes)
    assert bytes_in_memory([region.range]) == 0
    view(region.address, region.n_bytes)[::PAGE] = bytes([7]) * (region.n_bytes // PAGE)
    assert bytes_in_memory([region.range]) == region.n_bytes
    region.free()
    region.free()


def test_address_space_is_not_memory():
    regions = [Region(2**36) for _ in range(8)]
    view(regions[3].address + 2**35, 1)[0] = 1
    assert sum(bytes_in_memory([(r.address + 2**35, r.address + 2**35 + MIB)]) for r in regions) == PAGE
    for region in regions:
        region.free()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 8 * PAGE), st.integers(0, 8 * PAGE))
def test_drop_gives_whole_pages_inside_back_and_only_those(start, end):
    region = Region(8 * PAGE)
    bytes_of = view(region.address, region.n_bytes)
    bytes_of[:] = b"x" * region.n_bytes
    region.drop(start, end)
    dropped = [page for page in range(0, region.n_bytes, PAGE) if start <= page and page + PAGE <= end]
    assert bytes_in_memory([region.range]) == region.n_bytes - len(dropped) * PAGE
    for page in range(0, region.n_bytes, PAGE):
        assert bytes(bytes_of[page : page + PAGE]) == (b"\0" if page in dropped else b"x") * PAGE
    region.free()


def flags_of(address):
    """VmFlags of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if match:
            inside = int(match.group(1), 16) <= address < int(match.group(2), 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.parametrize("n_bytes", [0, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE - PAGE, 4 * HUGE_PAGE])
def test_huge_pages_only_where_whole_ones_fit(n_bytes):
    region = Region(4 * HUGE_PAGE)
    region.use_huge_pages(0)
    if "nh" not in flags_of(region.address):
        region.free()
        pytest.skip("this kernel has no huge pages to ask for")
    region.use_huge_pages(n_bytes)
    for i in range(4):
        flags = flags_of(region.address + i * HUGE_PAGE)
        assert ("hg" in flags, "nh" in flags) == ((i + 1) * HUGE_PAGE <= n_bytes, (i + 1) * HUGE_PAGE > n_bytes)
    region.free()


@pytest.mark.parametrize(("start", "n_pages"), [(0, 1), (0, 2), (1, 3), (3, 700), (510, 1030)])
def test_touching_leaves_the_first_and_the_last_page_alone(start, n_pages):
    region = Region(4 * HUGE_PAGE)
    region.use_huge_pages(0)
    address = region.address + start * PAGE
    memory.touch(address, n_pages * PAGE)
    edges = [(address, address + PAGE), (address + (n_pages - 1) * PAGE, address + n_pages * PAGE)]
    assert bytes_in_memory(edges) == 0
    touched = {start + 1} | {page for page in range(0, 2048, 512) if start < page < start + n_pages - 1}
    assert bytes_in_memory([region.range]) == PAGE * len(touched if n_pages > 2 else ())
    region.free()


def test_forbidden_memory_is_given_back_and_cannot_be_touched(region):
    view(region.address, region.n_bytes)[:] = b"x" * region.n_bytes
    region.forbid()
    assert bytes_in_memory([region.range]) == 0
    assert not {"rd", "wr", "ex"} & set(flags_of(region.address))


def test_more_than_the_address_space():
    with pytest.raises(EngineError, match="no address space"):
        Region(2**60)


def test_a_view_is_the_memory_itself(region):
    view(region.address + 3, 5)[:] = b"hello"
    assert bytes(view(region.address, 9)) == b"\0\0\0hello\0"


# --- this process -------------------------------------------------------------------------------------------------


def test_what_is_written_counts_and_what_is_freed_does_not():
    before = memory.resident_bytes()
    region = Region(64 * MIB)
    region.use_huge_pages(0)
    view(region.address, region.n_bytes)[::PAGE] = b"x" * (region.n_bytes // PAGE)
    assert memory.resident_bytes() - before == pytest.approx(64 * MIB, abs=4 * MIB)
    outside = memory.resident_bytes_outside([region.range])
    assert memory.resident_bytes() - outside == pytest.approx(64 * MIB, abs=4 * MIB)
    assert memory.resident_bytes_outside([]) - outside == pytest.approx(64 * MIB, abs=4 * MIB)
    region.free()
    assert memory.resident_bytes() - before == pytest.approx(0, abs=4 * MIB)
    assert memory.peak_bytes() >= before + 60 * MIB
    memory.trim_heap()


def test_a_key_that_is_not_there():
    assert memory._status_bytes("NoSuchKey") == 0


# --- the kernel's files, made by hand -----------------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """kernel(path, text): write one of the kernel's files; runtime.memory sees no others."""
    root = tmp_path / "kernel"

    def fake(path):
        path = Path(path)
        return path if path.is_relative_to(root) else root / str(path).lstrip("/")

    def write(path, text):
        file = fake(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(text))

    monkeypatch.setattr(memory, "Path", fake)
    write("/proc/self/status", "Name:\th2o\nVmHWM:\t   2000 kB\nVmRSS:\t   1000 kB\nVmPTE:\t     24 kB\n")
    write("/proc/meminfo", "MemTotal:       9000000 kB\nMemAvailable:    4000000 kB\n")
    return write


OWN = 1024 * 1024  # resident bytes in the file above, page tables included
FREE = 4_000_000 * 1024


def version_2(kernel, path="/a/b", **files):
    kernel("/proc/self/cgroup", f"0::{path}\n")
    kernel("/sys/fs/cgroup/cgroup.controllers", "memory\n")
    for name, text in files.items():
        kernel(f"/sys/fs/cgroup{path}/{name.replace('_', '.', 1)}", text)


def version_1(kernel, path="/a/b", **files):
    kernel("/proc/self/cgroup", f"12:cpu,cpuacct:/x\n4:hugetlb,memory:{path}\n1:name=systemd:/\n0::/\n")
    for name, text in files.items():
        kernel(f"/sys/fs/cgroup/memory{path}/{name.replace('_', '.', 1)}", text)


def test_sizes_of_the_process(kernel):
    assert memory.resident_bytes() == OWN
    assert memory.peak_bytes() == 2024 * 1024
    assert memory.cgroup_folder() is None
    assert memory.available_bytes() == FREE


@pytest.mark.parametrize("row", ["0::/\n", "", "4:memory:/\n0::/\n"])
def test_a_process_in_no_group_of_its_own(kernel, row):
    kernel("/proc/self/cgroup", row)
    assert memory.cgroup_folder() is None
    assert memory.available_bytes() == FREE


def test_a_group_whose_folder_is_not_there(kernel):
    version_2(kernel, "/gone")
    assert memory.cgroup_folder() is None


def test_limit_of_a_version_2_group(kernel):
    version_2(kernel, memory_max="100000000", memory_current="30000000", memory_stat="anon 5\ninactive_file 10000000\n")
    assert memory.cgroup_folder().parts[-2:] == ("a", "b")
    assert memory.available_bytes() == 100_000_000 - 20_000_000 + OWN


def test_limit_of_a_version_1_group(kernel):
    version_1(
        kernel,
        memory_limit_in_bytes="100000000",
        memory_usage_in_bytes="30000000",
        memory_stat="inactive_file 1\ntotal_inactive_file 1\n",
    )
    assert memory.available_bytes() == 100_000_000 - 29_999_999 + OWN


def test_the_smallest_limit_of_all_parents_counts(kernel):
    version_2(kernel, memory_max="max", memory_current="1", memory_stat="")
    kernel("/sys/fs/cgroup/a/memory.max", 50_000_000)
    kernel("/sys/fs/cgroup/a/memory.current", 60_000_000)
    kernel("/sys/fs/cgroup/a/memory.stat", "anon 1\n")
    assert memory.available_bytes() == OWN


@pytest.mark.parametrize("limit", ["max", str(2**63 - PAGE), "", "none"])
def test_no_limit(kernel, limit):
    version_2(kernel, memory_max=limit, memory_current="1", memory_stat="")
    assert memory.available_bytes() == FREE


def test_a_limit_above_the_machines_memory(kernel):
    version_2(kernel, memory_max=FAR // 8, memory_current="0", memory_stat="")
    assert memory.available_bytes() == FREE


def test_peak_of_a_group_with_this_process_alone(kernel):
    version_2(kernel, cgroup_procs=f"{os.getpid()}\n", memory_peak="123456789\n")
    assert memory.peak_bytes() == 123_456_789
    version_1(kernel, cgroup_procs=f"{os.getpid()}\n", memory_max_usage_in_bytes="987654321\n")
    assert memory.peak_bytes() == 987_654_321


@pytest.mark.parametrize(
    "files",
    [
        {"cgroup_procs": f"{os.getpid()}\n1\n", "memory_peak": "5"},
        {"cgroup_procs": "1\n", "memory_peak": "5"},
        {"cgroup_procs": f"{os.getpid()}\n", "memory_peak": "much"},
        {"cgroup_procs": f"{os.getpid()}\n"},
        {"memory_peak": "5"},
    ],
)
def test_else_the_peak_is_the_process(kernel, files):
    version_2(kernel, memory_max="max", **files)
    assert memory.peak_bytes() == 2024 * 1024


@pytest.mark.parametrize("path", ["/", "/of the host/only"])
def test_limit_of_a_container(kernel, path):
    """Inside a container the group's own files are at the root of the file system of groups."""
    version_2(kernel, path)
    version_2(kernel, "", memory_max="100000000", memory_current="30000000", memory_stat="inactive_file 0\n")
    kernel("/proc/self/cgroup", f"0::{path}\n")
    assert memory.available_bytes() == 70_000_000 + OWN


MOUNTED = "31 23 0:28 {} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("path", "mounted", "folder"),
    [
        ("/..", "/..", ""),
        ("/../b", "/..", "/b"),
        ("/../../a/b", "/../..", "/a/b"),
        ("/a/b", "/", "/a/b"),
        ("/docker/x/b", "/docker/x", "/b"),
        ("/..", "/", ""),
        ("/../b", "/", ""),
    ],
)
def test_limit_of_a_group_seen_from_a_namespace(kernel, path, mounted, folder):
    """Both paths are relative to the namespace; what is mounted may begin above it. The last two groups are out of
    sight: the limit of what can be seen is the best that is known."""
    version_2(kernel, "/elsewhere")
    kernel("/proc/self/cgroup", f"0::{path}\n")
    kernel("/proc/self/mountinfo", "1 1 0:1 / / rw - ext4 /dev/x rw\n" + MOUNTED.format(mounted))
    kernel("/sys/fs/memory.max", "1")
    for name, text in {
        "memory.max": 100_000_000,
        "memory.current": 30_000_000,
        "memory.stat": "inactive_file 0",
    }.items():
        kernel(f"/sys/fs/cgroup{folder}/{name}", text)
    assert memory.available_bytes() == 70_000_000 + OWN


def test_a_group_of_version_1_seen_from_a_container(kernel):
    version_1(kernel, "/docker/x")
    kernel("/proc/self/mountinfo", "33 31 0:31 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    kernel("/sys/fs/cgroup/memory/memory.limit_in_bytes", 100_000_000)
    kernel("/sys/fs/cgroup/memory/memory.usage_in_bytes", 30_000_000)
    kernel("/sys/fs/cgroup/memory/memory.stat", "")
    assert memory.available_bytes() == 70_000_000 + OWN


# --- what the kernel answers --------------------------------------------------------------------------------------


class Kernel:
    """libc whose madvise answers with an error."""

    def __init__(self, advice, error):
        self._libc, self._advice, self._error = memory._libc, advice, error

    def __getattr__(self, name):
        return getattr(self._libc, name)

    def madvise(self, address, n_bytes, advice):
        if advice == self._advice:
            ctypes.set_errno(self._error)
            return -1
        return self._libc.madvise(address, n_bytes, advice)


@pytest.mark.parametrize(
    ("advice", "error"),
    [
        (memory._MADV_DONTNEED, errno.EINVAL),
        (memory._MADV_DONTNEED, errno.ENOMEM),
        (memory._MADV_COLD, errno.ENOMEM),
        (memory._MADV_NOHUGEPAGE, errno.ENOMEM),
    ],
)
def test_memory_that_the_kernel_keeps_is_an_error(region, monkeypatch, advice, error):
    monkeypatch.setattr(memory, "_libc", Kernel(advice, error))
    with pytest.raises(EngineError, match="advice about memory"):
        region.use_huge_pages(0)
        region.drop(0, region.n_bytes)


@pytest.mark.parametrize("advice", [memory._MADV_COLD, memory._MADV_NOHUGEPAGE, memory._MADV_HUGEPAGE])
def test_a_kernel_that_knows_less_is_none(region, monkeypatch, advice):
    """MADV_COLD came with Linux 5.4, and a kernel can be built without huge pages."""
    view(region.address, region.n_bytes)[:] = b"x" * region.n_bytes
    monkeypatch.setattr(memory, "_libc", Kernel(advice, errno.EINVAL))
    region.use_huge_pages(region.n_bytes)
    region.drop(0, region.n_bytes)
    assert bytes_in_memory([region.range]) == 0
