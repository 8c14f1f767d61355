"""Watching the plan file from a running process: one small read at every token boundary."""

from __future__ import annotations

import os
import time

from runtime.errors import PlanError
from runtime.plans.file import RECORD, decode_record, is_torn
from runtime.plans.plan import Plan
from runtime.plans.shared_record import check_owner, open_shared

LOOK_EVERY_S = 0.2


class PlanWatcher:
    """Reports plans that appear in a plan file, each once; keeps quiet while nothing changes.

    The open file is read at every poll (no mapping: a file cut short by somebody must not kill the process). Whether
    it appeared, was replaced or changed its owner or mode is looked up at most every 0.2 s. What is wrong with the
    file is left in `problem`, once per problem; the plans before it stay in force.
    """

    def __init__(self, path: str | os.PathLike[str], model_hash: int, generation: int = 0) -> None:
        """Watch path for plans of a model (hash 0: of any); generation is that of the plan already in use."""
        self.path = path
        self.model_hash = model_hash
        self.problem: str | None = None
        self._generation = generation
        self._told: set[str] = set()
        self._fd = -1
        self._inode = (0, 0)
        self._raw = b""
        self._unfinished = (b"", 0.0)  # half-written contents, and when they were first seen
        self._last_plan: Plan | None = None
        self._next_look_s = 0.0

    def poll(self) -> Plan | None:
        """A newer valid plan for this model, or None. About 2 microseconds when nothing changed."""
        now = time.monotonic()
        if now >= self._next_look_s:
            self._next_look_s = now + LOOK_EVERY_S
            self._look()
        if self._fd < 0:
            return None
        raw = os.pread(self._fd, RECORD.size, 0)
        return None if raw == self._raw else self._changed(raw, now)

    def take_problem(self) -> str | None:
        """What went wrong since the last call, or None."""
        problem, self.problem = self.problem, None
        return problem

    def close(self) -> None:
        """Close the plan file; a later poll opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _look(self) -> None:
        """Open the file when it appears or is replaced; stop trusting it when it is not ours alone any more."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
            inode = (status.st_dev, status.st_ino)
            if self._fd >= 0 and inode == self._inode:
                check_owner(status, self.path)
                return
            self.close()
            self._fd = open_shared(self.path)
        except FileNotFoundError:
            self.close()
            self._inode = (0, 0)
            return
        except (PlanError, OSError) as error:
            self.close()
            self._tell(str(error))
            return
        status = os.fstat(self._fd)
        if (status.st_dev, status.st_ino) != self._inode:
            self._inode = (status.st_dev, status.st_ino)
            self._raw = b""

    def _changed(self, raw: bytes, now: float) -> Plan | None:
        """The plan in new contents, if it can be used. Half-written ones are told of when they stay as they are."""
        try:
            plan = decode_record(raw, self.path)
        except PlanError as error:
            if len(raw) < RECORD.size or is_torn(raw):
                if raw != self._unfinished[0]:
                    self._unfinished = (raw, now)
                if now - self._unfinished[1] < LOOK_EVERY_S:
                    return None
            self._raw = raw
            self._tell(str(error))
            return None
        self._raw = raw
        if self.model_hash and plan.model_hash not in (0, self.model_hash):
            self._tell(f"the plan in {self.path} is for another model; the plan before it stays in force")
            return None
        return self._news(plan)

    def _news(self, plan: Plan) -> Plan | None:
        """The plan, unless it was seen last. Generations grow within a file: a lower one is a file made anew."""
        in_use = self._last_plan is None and 0 < plan.generation == self._generation
        if in_use or plan == self._last_plan:
            return None
        self._last_plan = plan
        return plan

    def _tell(self, problem: str) -> None:
        if problem not in self._told:
            self._told.add(problem)
            self.problem = problem
