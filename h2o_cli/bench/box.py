"""An emulated small device for one command: a hard memory limit and a slow disk, by control groups (version 1 or 2).

The memory limit counts the page cache and allows no swap; the disk limit holds for page faults of mapped files and
direct reads alike, so that engines are compared on the same device. Needs root on Linux.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from h2o_cli.bench.commands import last_words
from runtime.errors import EngineError, H2OError

ROOT = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
AS_ROOT = "run it as root on a Linux with memory and blkio (v1) or memory and io (v2) control groups"
KERNEL = "use Linux 5.19 or newer"
_ENTER = 'for f in "$1" "$2"; do echo $$ >"$f" || exit 125; done; shift 2; exec "$@"'
_COULD_NOT_ENTER = 125
_END_S = 10.0
_MOST_OUTPUT_BYTES = 2**24


@dataclass(frozen=True)
class Device:
    """The limits of a device; 0 means none. disk_folder lies on the disk that is slowed down."""

    memory_bytes: int = 0
    read_bytes_per_s: int = 0
    disk_folder: Path = Path()


@dataclass(frozen=True)
class Outcome:
    """What became of a command. Seconds from its start; output_s: when the last output came.

    peak_bytes is the kernel's own mark for the group, page cache included; rc is negative for a signal.
    """

    rc: int
    wall_s: float
    output_s: float
    peak_bytes: int
    bytes_read: int
    started_s: float  # on the system's monotonic clock
    oom_killed: bool = False
    timed_out: bool = False
    stdout: str = ""
    stderr: str = ""


class Groups(Protocol):
    """Control groups of one run: limits are set when it is made."""

    procs: tuple[Path, Path]

    def peak_bytes(self) -> int:
        """The most memory the group ever held."""

    def bytes_read(self) -> int:
        """Bytes the group read from the disk."""

    def n_oom_kills(self) -> int:
        """Processes the kernel killed for the limit's sake."""

    def remove(self) -> None:
        """Kill what is left in the group and remove it."""


def run_in_device(
    command: Sequence[str],
    device: Device,
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    cold: Iterable[Path] = (),
) -> Outcome:
    """Run a command in the device; the page cache is dropped first.

    `cold` names the files to evict where the whole cache may not be dropped. Nothing of the group is left afterwards,
    whatever happens. Raises H2OError where a device cannot be emulated.
    """
    groups = make_groups(device)
    try:
        drop_page_cache(cold)
        subprocess.run(["/bin/sh", "-c", ":"], stdin=subprocess.DEVNULL, check=False)  # its start is not the command's
        with tempfile.TemporaryFile() as errors:
            return _run(command, groups, errors, env, timeout_s)
    finally:
        groups.remove()


def check_rights(device: Device) -> None:
    """Raise H2OError with what to do where this process cannot emulate the device."""
    groups = make_groups(device)
    try:
        groups.peak_bytes()
    finally:
        groups.remove()


def _run(
    command: Sequence[str],
    groups: Groups,
    errors: IO[bytes],
    env: Mapping[str, str] | None,
    timeout_s: float,
) -> Outcome:
    start_s = time.monotonic()
    with _child(command, groups, errors, env, subprocess.DEVNULL) as child:
        output, output_s, timed_out = _collect(child, start_s, timeout_s)
        rc = child.wait()
    wall_s = time.monotonic() - start_s
    stderr = _text(errors)
    if rc == _COULD_NOT_ENTER:
        raise H2OError(f"the command could not enter its control group: {stderr.strip()}", AS_ROOT)
    return Outcome(
        rc=rc,
        wall_s=wall_s,
        output_s=output_s,
        peak_bytes=groups.peak_bytes(),
        bytes_read=groups.bytes_read(),
        started_s=start_s,
        oom_killed=groups.n_oom_kills() > 0,
        timed_out=timed_out,
        stdout=output.decode(errors="replace"),
        stderr=stderr,
    )


@contextmanager
def _child(
    command: Sequence[str], groups: Groups, errors: IO[bytes], env: Mapping[str, str] | None, stdin: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in its groups; it is ended with the block."""
    enter = ["/bin/sh", "-c", _ENTER, "sh", *map(str, groups.procs), *command]
    child = subprocess.Popen(enter, stdin=stdin, stdout=subprocess.PIPE, stderr=errors, env=env, start_new_session=True)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout)):
            pipe.close()


def _text(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read(_MOST_OUTPUT_BYTES).decode(errors="replace")


def _collect(child: subprocess.Popen[bytes], start_s: float, timeout_s: float) -> tuple[bytes, float, bool]:
    """Output of the child until it ends, when its last part came, and whether it had to be killed for its time."""
    assert child.stdout
    parts: list[bytes] = []
    output_s = 0.0
    timed_out = False
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            left_s = start_s + timeout_s - time.monotonic()
            if left_s <= 0 and not timed_out:
                timed_out = True
                os.killpg(child.pid, signal.SIGKILL)
            elif selector.select(None if timed_out else left_s):
                data = os.read(child.stdout.fileno(), 2**16)
                if not data:
                    return b"".join(parts), output_s, timed_out
                output_s = time.monotonic() - start_s
                parts.append(data)


# --- a command that is asked again and again -------------------------------------------------------------------------


class Talk:
    """A command running in the device that answers lines on its standard input by lines on its standard output."""

    def __init__(self, child: subprocess.Popen[bytes], groups: Groups, errors: IO[bytes]) -> None:
        self._child, self._groups, self._errors = child, groups, errors
        self._read = b""

    def ask(self, line: str, timeout_s: float) -> str:
        """The answer to a line. Raises EngineError where none comes."""
        assert self._child.stdin and self._child.stdout
        with suppress(BrokenPipeError):
            os.write(self._child.stdin.fileno(), f"{line}\n".encode())
        until_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._read:
                left_s = until_s - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise EngineError(f"no answer within {timeout_s:.0f} s", "close other programs")
                data = os.read(self._child.stdout.fileno(), 2**16)
                if not data:
                    raise self._ended()
                self._read += data
        answer, _, self._read = self._read.partition(b"\n")
        return answer.decode(errors="replace")

    @property
    def peak_bytes(self) -> int:
        """The most memory its group ever held."""
        return self._groups.peak_bytes()

    def _ended(self) -> EngineError:
        rc = self._child.wait()
        reason = "killed: out of memory" if self._groups.n_oom_kills() else last_words(_text(self._errors), rc)
        return EngineError(reason, "run it by hand to see more")


@contextmanager
def talk_in_device(command: Sequence[str], device: Device, *, env: Mapping[str, str] | None = None) -> Iterator[Talk]:
    """Start a command in the device, with caches as they are; it is ended with the block, and nothing of it is left."""
    groups = make_groups(device)
    try:
        with tempfile.TemporaryFile() as errors, _child(command, groups, errors, env, subprocess.PIPE) as child:
            yield Talk(child, groups, errors)
    finally:
        groups.remove()


# --- control groups --------------------------------------------------------------------------------------------------


def make_groups(device: Device) -> Groups:
    """Groups with the device's limits, of the version this system has. Raises H2OError."""
    name = f"h2o-device-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        if (ROOT / "memory" / "memory.limit_in_bytes").exists() and (ROOT / "blkio").is_dir():
            return _GroupsV1(name, device)
        if (ROOT / "cgroup.controllers").exists():
            return _GroupV2(name, device)
    except OSError as error:
        reason = error.strerror or str(error)
        raise H2OError(f"no device can be emulated here: {error.filename or ROOT}: {reason}", AS_ROOT) from error
    raise H2OError("no device can be emulated here: there are no control groups", AS_ROOT)


class _GroupsV1:
    """A memory group and a blkio group."""

    def __init__(self, name: str, device: Device) -> None:
        self._memory, self._disk = ROOT / "memory" / name, ROOT / "blkio" / name
        self.procs = (self._memory / "cgroup.procs", self._disk / "cgroup.procs")
        try:
            self._memory.mkdir()
            self._disk.mkdir()
            if device.memory_bytes:
                (self._memory / "memory.limit_in_bytes").write_text(str(device.memory_bytes))
                (self._memory / "memory.swappiness").write_text("0")
            if device.read_bytes_per_s:
                limit = f"{block_device(device.disk_folder)} {device.read_bytes_per_s}"
                (self._disk / "blkio.throttle.read_bps_device").write_text(limit)
        except BaseException:
            self.remove()
            raise

    def peak_bytes(self) -> int:
        return int((self._memory / "memory.max_usage_in_bytes").read_text())

    def bytes_read(self) -> int:
        rows = (self._disk / "blkio.throttle.io_service_bytes").read_text().splitlines()
        return sum(int(row.split()[2]) for row in rows if " Read " in row)

    def n_oom_kills(self) -> int:
        return _value(self._memory / "memory.oom_control", "oom_kill")

    def remove(self) -> None:
        remove_group(self._memory)
        remove_group(self._disk)


class _GroupV2:
    """One group with both limits."""

    def __init__(self, name: str, device: Device) -> None:
        (ROOT / "cgroup.subtree_control").write_text("+memory +io")
        self._group = ROOT / name
        self.procs = (self._group / "cgroup.procs", self._group / "cgroup.procs")
        try:
            self._group.mkdir()
            if device.memory_bytes:
                (self._group / "memory.max").write_text(str(device.memory_bytes))
                swap = self._group / "memory.swap.max"
                if swap.exists():
                    swap.write_text("0")
            if device.read_bytes_per_s:
                limit = f"{block_device(device.disk_folder)} rbps={device.read_bytes_per_s}"
                (self._group / "io.max").write_text(limit)
        except BaseException:
            self.remove()
            raise

    def peak_bytes(self) -> int:
        peak = self._group / "memory.peak"
        if not peak.exists():
            raise H2OError("no device can be emulated here: the kernel keeps no memory.peak", KERNEL)
        return int(peak.read_text())

    def bytes_read(self) -> int:
        words = (self._group / "io.stat").read_text().split()
        return sum(int(word.removeprefix("rbytes=")) for word in words if word.startswith("rbytes="))

    def n_oom_kills(self) -> int:
        return _value(self._group / "memory.events", "oom_kill")

    def remove(self) -> None:
        remove_group(self._group)


def _value(path: Path, wanted: str) -> int:
    """The number of a key, in a file of "key number" lines; 0 where the key is missing."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == wanted:
            return int(value)
    return 0


def remove_group(folder: Path) -> None:
    """Kill the processes left in a control group and remove it; nothing happens where it is not there."""
    deadline_s = time.monotonic() + _END_S
    while folder.exists() and time.monotonic() < deadline_s:
        with suppress(OSError):
            for pid in (folder / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.02)


def block_device(path: Path) -> str:
    """'major:minor' of the whole disk that holds path. Raises H2OError where it is on no disk that can be slowed."""
    device = os.stat(path).st_dev
    folder = Path(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    if (folder / "partition").exists():
        folder = folder.parent
    if not (folder / "dev").exists():
        raise H2OError(
            f"{path.resolve()} is on no disk whose speed can be limited (a memory or network file system?)",
            "choose a folder on a disk, or leave the disk as it is with --disk 0",
        )
    return (folder / "dev").read_text().strip()


# --- the page cache --------------------------------------------------------------------------------------------------


def drop_page_cache(files: Iterable[Path] = ()) -> None:
    """Make the next reads come from the disk: drop all of the page cache, or where that is forbidden, these files."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
