"""What a running process measures under the plan in force, published beside the plan file at every token boundary.

The file is the plan file's name with `.stats` behind it. docs/plan-file.md has the table. Its writer keeps it locked
for as long as it lives, so a reader knows whether somebody is there, however the writer ended. Sums run from the
moment the plan was adopted: a reader that misses records takes differences and loses nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.answer.speculate import MOST_DRAFTED
from runtime.errors import PlanError
from runtime.plans.file import write_plan
from runtime.plans.plan import Plan
from runtime.plans.shared_record import MOVE_AWAY, check_owner, is_whole, open_shared, with_crc

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

MAGIC = b"H2OSTAT\0"
VERSION = 1
# magic, version, pid, sequence, the fields of PlanStats from generation on, unused, crc32
RECORD = struct.Struct("=8siiQQQqqqqqqQQdQddII")
I_SEQUENCE_FIELD = 3
LOOK_EVERY_S = 1.0
READ_WAIT_S = 0.05
MOST_POSITIONS = 1 + MOST_DRAFTED  # a pass of more positions is part of a prompt
SKIP_PASSES = 1  # after a change of plan: they load what the new plan keeps resident
MEASURE_PASSES, MEASURE_LEAST_S, MEASURE_ENOUGH_S = 3, 0.5, 5.0
STALL_S, STALL_PASSES = 120.0, 10
TELL_AFTER_S = 10.0
_WHAT = "statistics file"


def stats_path(plan_path: str | os.PathLike[str]) -> Path:
    """The companion of a plan file."""
    return Path(f"{os.fspath(plan_path)}.stats")


@dataclass(frozen=True)
class PlanStats:
    """One record. passes to bytes_read count decode passes since the plan `generation` was adopted; times in seconds.

    available_bytes is what the fixed bytes of the process leave of its budget, for window and resident weights.
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

    @property
    def ms_per_token(self) -> float | None:
        """Decode time of a token since the plan was adopted; None before the first one."""
        return 1000 * self.pass_s / self.tokens if self.tokens else None


class StatsWriter:
    """Publishes the figures of an engine: about 10 microseconds a token, and never an error.

    A process that finds the file in use by another one publishes nothing until that one is gone.
    """

    def __init__(self, path: str | os.PathLike[str], model_hash: int, note: Callable[[str], None]) -> None:
        self.path = path
        self._model_hash = model_hash
        self._note = note
        self._told = False
        self._fd = -1
        self._next_look_s = 0.0
        self._sequence = 0
        self._pid = os.getpid()
        self._generation = -1
        self._seen = (0, 0, 0.0, 0, 0.0, 0)  # passes, positions, seconds, bytes read, wait, positions in the cache
        self._passes = self._tokens = self._bytes_read = 0
        self._pass_s = self._wait_s = 0.0

    def publish(self, engine: Engine, budget_bytes: int, generation: int, refused_generation: int = 0) -> None:
        """Take in the pass since the last call, and write the record; `generation` is that of the plan in force."""
        self._count(engine, generation)
        now = time.monotonic()
        if now >= self._next_look_s:
            self._next_look_s = now + LOOK_EVERY_S
            self._look()
        if self._fd < 0:
            return
        self._sequence += 2
        ledger = engine.ledger
        fixed = ledger.fixed_bytes
        sizes = (budget_bytes, fixed, budget_bytes - fixed, ledger.window_bytes, ledger.resident_bytes)
        sums = (self._passes, self._tokens, self._pass_s, self._bytes_read, self._wait_s, time.time())
        head = (MAGIC, VERSION, self._pid, self._sequence, generation, refused_generation, self._model_hash)
        try:
            # One write of the whole record: what a reader may see half of has the wrong CRC.
            os.pwrite(self._fd, with_crc(RECORD.pack(*head, *sizes, *sums, 0, 0)), 0)
        except OSError as error:
            self._give_up(f"the statistics file {self.path} cannot be written: {error.strerror}")

    def close(self) -> None:
        """Remove the file: nobody is measuring any more."""
        if self._fd >= 0:
            with suppress(OSError, PlanError):  # something else is there now: it is left alone
                if self._is_ours():
                    os.unlink(self.path)
        self._release()

    def _count(self, engine: Engine, generation: int) -> None:
        counters = engine.counters
        last = self._seen
        seen = (
            counters.passes,
            counters.tokens,
            counters.seconds,
            counters.bytes_read,
            counters.wait_s,
            engine.n_past,
        )
        self._seen = seen
        if generation != self._generation:
            self._generation = generation
            self._passes = self._tokens = self._bytes_read = 0
            self._pass_s = self._wait_s = 0.0
        elif seen[0] == last[0] + 1 and seen[1] - last[1] <= MOST_POSITIONS and seen[5] > last[5]:
            self._passes += 1
            self._tokens += seen[5] - last[5]
            self._pass_s += seen[2] - last[2]
            self._bytes_read += seen[3] - last[3]
            self._wait_s += seen[4] - last[4]

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
    pass_s, bytes_read, wait_s, written_s, _, _ = sums
    sizes = (budget, fixed, available, window, resident)
    return PlanStats(
        pid, generation, refused, model_hash, *sizes, passes, tokens, pass_s, bytes_read, wait_s, written_s
    )


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


@dataclass(frozen=True)
class Measured:
    """Medians over the passes that were measured under one plan: a single pass that was disturbed does not count."""

    n_passes: int
    pass_ms: float
    wait_ms: float
    bytes_read: float


class Overtaken(PlanError):
    """Somebody else wrote a plan while one of ours was being measured."""


class RunningProcess:
    """The process that follows a plan file, as something that plans can be tried on."""

    def __init__(
        self,
        plan_path: str | os.PathLike[str],
        model_hash: int,
        note: Callable[[str], None],
        write: Callable[[str | os.PathLike[str], Plan], Plan] = write_plan,
    ) -> None:
        """Find the process. Raises PlanError when there is none, or one with another model."""
        self.plan_path = plan_path
        self.written: Plan | None = None
        self._note = note
        self._write = write
        self._reader = StatsReader(stats_path(plan_path))
        self._told = False
        self._pid = 0
        stats = self.stats()
        self._pid = stats.pid
        if model_hash and stats.model_hash != model_hash:
            raise PlanError(f"process {stats.pid} runs another model", "name its model, or its profile with -c")

    def stats(self) -> PlanStats:
        """The process's last record. Raises PlanError when it is gone."""
        stats = self._reader.read()
        if stats and self._pid in (0, stats.pid):
            return stats
        if self._pid:
            raise PlanError(f"the running process ({self._pid}) has ended", "start it again with `h2o run`")
        raise PlanError(
            f"no running process follows {self.plan_path}", "start one with `h2o run`, with the same -s if there is one"
        )

    def keep(self, plan: Plan) -> Plan:
        """Leave a plan in force: write it, unless it is the last one that was written."""
        if self.written is None or replace(self.written, generation=0) != plan:
            self.written = self._write(self.plan_path, plan)
        return self.written

    def measure(self, plan: Plan) -> Measured:
        """Have the process follow a plan, and time some passes under it. Raises PlanError."""
        from statistics import median  # megabytes that the running process does not need

        self.written = self._write(self.plan_path, plan)
        first = self._wait(lambda stats: stats.passes >= SKIP_PASSES)
        seen = [first]

        def is_enough(stats: PlanStats) -> bool:
            if stats.passes > seen[-1].passes:
                seen.append(stats)
            return _is_enough(stats.passes - first.passes, stats.pass_s - first.pass_s)

        n = self._wait(is_enough).passes - first.passes
        steps = [(b.passes - a.passes, a, b) for a, b in pairwise(seen)]
        return Measured(
            n,
            1000 * median((b.pass_s - a.pass_s) / passes for passes, a, b in steps),
            1000 * median((b.wait_s - a.wait_s) / passes for passes, a, b in steps),
            median((b.bytes_read - a.bytes_read) / passes for passes, a, b in steps),
        )

    def _wait(self, done: Callable[[PlanStats], bool]) -> PlanStats:
        """The first record under the plan written last for which done() is true."""
        generation = self.written.generation if self.written else 0
        stats, seen_s = self.stats(), time.monotonic()
        while stats.generation != generation or not done(stats):
            if stats.refused_generation == generation:
                raise PlanError("the running process cannot use a plan for this budget", "give it a larger -m")
            if stats.generation > generation:
                raise Overtaken(f"another plan was written to {self.plan_path} meanwhile", "try again")
            pass_s = stats.pass_s / stats.passes if stats.passes else 0.0
            time.sleep(min(0.05, max(0.002, pass_s / 20)))
            new = self.stats()
            if new.written_s != stats.written_s:
                stats, seen_s = new, time.monotonic()
            else:
                self._check_alive(time.monotonic() - seen_s, pass_s)
        return stats

    def _check_alive(self, silent_s: float, pass_s: float) -> None:
        """Say once that the process makes no tokens; raise PlanError when it has not for long."""
        if silent_s > TELL_AFTER_S + STALL_PASSES * pass_s and not self._told:
            self._told = True
            self._note(f"waiting for process {self._pid} to make tokens")
        if silent_s > STALL_S + STALL_PASSES * pass_s:
            raise PlanError(
                f"process {self._pid} has made no tokens for {silent_s:.0f} s", "try again while it answers"
            )


def _is_enough(n_passes: int, seconds: float) -> bool:
    """Whether that many passes tell what a pass takes."""
    few = n_passes < MEASURE_PASSES or seconds < MEASURE_LEAST_S
    return n_passes > 0 and (not few or seconds >= MEASURE_ENOUGH_S)
