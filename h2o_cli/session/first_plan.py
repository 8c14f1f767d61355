"""The plan a run begins with and the budget of its process: decided once, from -m, the plan file and the profile."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from h2o_cli.session.profiled import Profiled
from runtime.errors import PlanError
from runtime.llama.model_file import ModelFile
from runtime.memory import memory_bytes
from runtime.plans.budget import Budget
from runtime.plans.file import read_plan
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import first_window
from runtime.settings import Settings

FROM_FILE, FROM_PROFILE, DEFAULT = "plan file", "profile", "default"


class Chosen(NamedTuple):
    """A plan, where it came from, and the budget of the process."""

    plan: Plan
    origin: str
    budget_bytes: int


@dataclass(frozen=True)
class FirstPlan:
    """What a run's first plan is chosen from.

    in_file: the plan in the plan file at `path`, where it counts; is_named: the user named that file. budget: without
    the plan in the file.
    """

    path: Path
    is_named: bool
    in_file: Plan | None
    budget: Budget

    @classmethod
    def find(
        cls, file: ModelFile, path: Path, budget: Budget, note: Callable[[str], None], *, is_named: bool
    ) -> FirstPlan:
        """Look into the plan file. Raises PlanError where the user named it and it cannot be used.

        With -m a plan in the default file counts when it was made for the same budget or for none. One in a file that
        the user named counts always, at most for the budget of -m.
        """
        plan = _plan_in(path, file, must_fit=is_named, note=note)
        if plan and budget.is_given and plan.budget_bytes not in (0, budget.n_bytes):
            plan = plan.capped(budget.n_bytes, note) if is_named else None
        return cls(path, is_named, plan, budget)

    @property
    def budget_bytes(self) -> int:
        """Bytes of the process, whatever the plan."""
        return self.budget.following(self.in_file)

    def without_file(self) -> FirstPlan:
        """The same without the plan in the file, whose budget is none of this run's, either."""
        return replace(self, in_file=None)

    def choose(self, file: ModelFile, profile: Profiled | None, settings: Settings, layout: Layout | None) -> Chosen:
        """The plan in the file, else the planner's for the profile, else the default one. layout None: the best."""
        budget = self.budget_bytes
        if self.in_file:
            plan = replace(self.in_file, layout=self.in_file.layout if layout is None else layout)
            return Chosen(plan, FROM_FILE, budget)
        planned = profile.plan(budget - settings.draft_bytes, settings, layout) if profile else None
        if planned:
            return Chosen(replace(planned, budget_bytes=budget), FROM_PROFILE, budget)
        plan = Plan(
            k=0,
            w=1,
            layout=Layout.BALANCED if layout is None else layout,
            window_bytes=first_window(file, budget),
            budget_bytes=budget,
            model_hash=file.hash,
        )
        return Chosen(plan, DEFAULT, budget)


def _plan_in(path: Path, file: ModelFile, *, must_fit: bool, note: Callable[[str], None]) -> Plan | None:
    """The plan for this model in a plan file; must_fit: the user named the file, so an unusable one is an error."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        if must_fit:
            note(f"there is no plan file {path} yet; plans written there later will be followed")
        return None
    except OSError:
        pass
    try:
        plan = read_plan(path)
        if plan.model_hash not in (0, file.hash):
            if must_fit:
                raise PlanError(f"the plan in {path} is for another model", "make one with `h2o plan -m SIZE -s FILE`")
            return None
        _check(plan, path, file)
    except PlanError as error:
        if must_fit:
            raise
        note(f"the plan file was not used: {error}")
        return None
    return plan


def _check(plan: Plan, path: Path, file: ModelFile) -> None:
    try:
        plan.check(file.n_layers, memory_bytes())
    except PlanError as error:
        raise PlanError(f"the plan in {path}: {error.message}", error.next_step) from None
