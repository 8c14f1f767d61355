"""A memory cgroup of a test's own (version 1 or 2), for commands that must live inside a limit."""

from __future__ import annotations

import os
import subprocess
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
V1 = ROOT / "memory"


class MemoryGroup:
    """A group limited to n_bytes; run() starts commands in it, peak_bytes is the most it ever held."""

    def __init__(self, n_bytes: int) -> None:
        self.v1 = (V1 / "memory.limit_in_bytes").exists()
        self.folder = (V1 if self.v1 else ROOT) / f"h2o-test-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        if self.v1:
            (self.folder / "memory.limit_in_bytes").write_text(str(n_bytes))
        else:
            (self.folder / "memory.max").write_text(str(n_bytes))
            (self.folder / "memory.swap.max").write_text("0")

    def enter(self) -> None:
        """Move the calling process into the group (a preexec_fn)."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def run(self, command, **options):
        """subprocess.run inside the group."""
        return subprocess.run(command, preexec_fn=self.enter, capture_output=True, text=True, check=False, **options)

    def popen(self, command, **options):
        """subprocess.Popen inside the group."""
        return subprocess.Popen(command, preexec_fn=self.enter, text=True, **options)  # noqa: PLW1509

    @property
    def peak_bytes(self) -> int:
        """The kernel's own high-water mark of the group."""
        return int((self.folder / ("memory.max_usage_in_bytes" if self.v1 else "memory.peak")).read_text())

    @property
    def cached_bytes(self) -> int:
        """Page cache that is charged to the group now."""
        rows = dict(row.split() for row in (self.folder / "memory.stat").read_text().splitlines())
        return int(rows["cache" if self.v1 else "file"])

    @property
    def kills(self) -> int:
        """Processes the kernel killed for the limit's sake."""
        name = "memory.oom_control" if self.v1 else "memory.events"
        for line in (self.folder / name).read_text().splitlines():
            key, value = line.split()
            if key == "oom_kill":
                return int(value)
        return 0


@contextmanager
def memory_limit(n_bytes: int):
    """A MemoryGroup, removed afterwards; skips the test where groups cannot be made."""
    try:
        group = MemoryGroup(n_bytes)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield group
    finally:
        group.folder.rmdir()
