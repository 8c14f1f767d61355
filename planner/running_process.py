"""Plans are tried on a running process: it follows the plan file, and what it publishes says how fast it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from runtime.errors import PlanError
from runtime.plans.file import write_plan
from runtime.plans.plan import Plan
from runtime.plans.stats import PlanStats, StatsReader, stats_path

SKIP_PASSES = 1  # after a change of plan: they load what the new plan keeps resident
MEASURE_PASSES = 3  # the least number that has a median
MEASURE_LEAST_S = 0.5  # of passes: shorter ones vary more
MEASURE_ENOUGH_S = 5.0  # after which one pass is enough
STALL_S = 120.0  # without a token, after which the process counts as stuck; a user may think that long between turns
STALL_PASSES = 10  # times a pass, in addition: slow models
TELL_AFTER_S = 10.0  # without a token, after which the user hears what is waited for


@dataclass(frozen=True)
class Measured:
    """Medians over the passes that were measured under one plan. So one disturbed pass does not count.

    fixed_bytes: what the process needed besides weights in the last of them.
    """

    n_passes: int
    pass_ms: float
    wait_ms: float
    bytes_read: float
    fixed_bytes: int


class Overtaken(PlanError):
    """Somebody else wrote a plan while one of ours was being measured."""


class RunningProcess:
    """The process that follows a plan file. Plans can be tried on it."""

    def __init__(
        self,
        plan_path: str | os.PathLike[str],
        model_hash: int,
        note: Callable[[str], None],
        write: Callable[[str | os.PathLike[str], Plan], Plan] = write_plan,
    ) -> None:
        """Find the process. Raises PlanError where there is none, or where it runs another model."""
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
        """Leave a plan in force. Writes it, unless it is the last one that was written."""
        if self.written is None or replace(self.written, generation=0) != plan:
            self.written = self._write(self.plan_path, plan)
        return self.written

    def measure(self, plan: Plan) -> Measured:
        """Let the process follow a plan, and time some passes under it. Raises PlanError."""
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
            seen[-1].fixed_bytes,
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
        """Say once that the process makes no tokens. Raises PlanError when it has made none for long."""
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
